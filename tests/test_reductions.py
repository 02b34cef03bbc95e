"""How partial sums meet: in fp32 where asked for, and chunk by chunk while the next chunk is computed."""

import pytest
import torch
import torch.distributed as dist
from acceptance import assert_exact
from ffn_cases import NAMES, assert_all_accurate, draw, eager, exact, ours, results, shards, tokens
from launches import CountCollectives, RecordOperators
from rank_pool import use

import tpffn_triton as tp
from tpffn_triton import passes
from tpffn_triton.machines import AlphaBeta, Compute, Link, Machine

pytestmark = pytest.mark.cpu_only
SIXTEEN_BIT = [torch.float16, torch.bfloat16]


def in_fp32(rank, world_size, implementation, activation, dtype, sequence_parallel):
    use(implementation)
    problem = draw((8, 5), 64, 96, activation=activation, dtype=dtype)
    group = dist.group.WORLD
    options = {"sequence_parallel": sequence_parallel, "reduce_dtype": torch.float32}
    mine = ours(problem, rank, world_size, group, **options)
    again = ours(problem, rank, world_size, group, **options)
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True)), "bits differ from run to run"
    assert [t.dtype for t in mine] == [dtype] * 6
    right = exact(problem, rank, world_size, sequence_parallel)
    assert_all_accurate(mine, eager(problem, rank, world_size, group, sequence_parallel), right)
    rounded = ours(problem, rank, world_size, group, sequence_parallel=sequence_parallel)
    return [
        ((a.double() - c).norm() / (b.double() - c).norm()).item()
        for a, b, c in zip(mine[:2], rounded[:2], right[:2], strict=True)
    ]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "slices"])
@pytest.mark.parametrize("implementation", ["triton", "native"])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_fp32_reduction_of_16_bit_partials(activation, dtype, implementation, sequence_parallel, ranks_of):
    """y and dx lose the roundings of the partial sums and of the sums on the way."""
    for ratios in ranks_of(4).run(in_fp32, implementation, activation, dtype, sequence_parallel):
        assert max(ratios) < 0.9


def bytes_sent(rank, world_size, dtype, reduce_dtype):
    use("native")
    problem = draw((4, 8), 32, 48, dtype=dtype)
    with CountCollectives() as collectives:
        ours(problem, rank, world_size, dist.group.WORLD, reduce_dtype=reduce_dtype)
    return collectives.counts


@pytest.mark.parametrize(
    ("dtype", "reduce_dtype", "itemsize"),
    [
        (torch.bfloat16, None, 2),
        (torch.bfloat16, torch.float32, 4),
        (torch.float32, torch.float32, 4),
        (torch.float64, torch.float32, 8),
    ],
)
def test_fp32_reduction_sends_twice_the_bytes(dtype, reduce_dtype, itemsize, ranks_of):
    """Of 16-bit partial sums; wider ones are never narrowed."""
    for counts in ranks_of(2).run(bytes_sent, dtype, reduce_dtype):
        assert counts == {"all_reduce_": [2, 2 * 4 * 8 * 32 * itemsize]}


def chunked(rank, world_size, implementation, dtype, token_count, chunks, options):
    """Chunks change the order of the ranks' sum alone: exact on small integers, accurate on others."""
    use(implementation)
    group = dist.group.WORLD
    problem = draw((token_count,), 32, 48, dtype=dtype)
    mine = ours(problem, rank, world_size, group, forward_chunks=chunks, **options)
    again = ours(problem, rank, world_size, group, forward_chunks=chunks, **options)
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True)), "bits differ from run to run"
    assert_all_accurate(mine, eager(problem, rank, world_size, group), exact(problem, rank, world_size))
    whole = ours(problem, rank, world_size, group, **options)
    assert all(torch.equal(a, b) for a, b in zip(mine[1:], whole[1:], strict=True)), "backward is not cut"
    small = draw((token_count,), 32, 48, dtype=dtype, activation="relu")
    for t in (small.x, small.dy, *small.leaves()[1:]):
        t.copy_(t.sign())
    y = ours(small, rank, world_size, group, forward_chunks=chunks, **options)[0]
    assert_exact("y", y, exact(small, rank, world_size)[0])
    with torch.no_grad():
        in_place = tp.ffn(problem.x, *shards_in_order(problem, rank, world_size), tp_group=group, forward_chunks=chunks)
    in_place += 1


def shards_in_order(problem, rank, world_size):
    w1, b1, w2, b2 = shards(problem, rank, world_size)
    return w1, w2, b1, b2


@pytest.mark.parametrize(
    ("token_count", "chunks", "options"),
    [(300, 2, {}), (257, 8, {"reduce_dtype": torch.float32}), (3, 4, {"save": "nothing"}), (0, 3, {})],
)
@pytest.mark.parametrize("implementation", ["triton", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_chunks(dtype, implementation, token_count, chunks, options, ranks_of):
    ranks_of(2).run(chunked, implementation, dtype, token_count, chunks, options)


def order_of_forward(rank, world_size, token_count, chunks):
    use("native")
    events, rows = [], []
    originals = passes.start_all_reduce, passes.wait
    passes.start_all_reduce = lambda t, g: (events.append("start"), rows.append(len(t)), originals[0](t, g))[-1]
    passes.wait = lambda t: events.append("wait") or originals[1](t)
    try:
        problem = draw((token_count,), 32, 48)
        with torch.no_grad(), RecordOperators(events):
            leaves = shards_in_order(problem, rank, world_size)
            tp.ffn(problem.x, *leaves, tp_group=dist.group.WORLD, forward_chunks=chunks)
    finally:
        passes.start_all_reduce, passes.wait = originals
    return events, rows


def test_a_chunk_is_in_flight_behind_the_next_ones_gemm(ranks_of):
    for events, rows in ranks_of(2).run(order_of_forward, 700, 3):
        assert events == ["linear_act", *["linear_into", "start"] * 3, *["wait"] * 3]
        assert rows == [256, 256, 188], "chunks are multiples of the tallest tile"
    for events, _ in ranks_of(2).run(order_of_forward, 128, 3):
        assert events == ["linear_act", "linear_into", "start", "wait"]
    for events, _ in ranks_of(2).run(order_of_forward, 700, 1):
        assert events == ["ffn_forward", "start", "wait"]


def chosen_by_the_cost_model(rank, world_size):
    """As many chunks as the model says, in fp32 and with twice the bytes; nothing of it where it cannot apply."""
    use("native")
    problem = draw((2048,), 32, 48, dtype=torch.bfloat16)
    leaves = problem.x, *shards_in_order(problem, rank, world_size)
    slow_link, fast_link = (
        Machine(
            "by hand",
            (Compute((("bf16", 1e-4),), 1.0, 0.0, 1.0, "by hand"),),
            Link("link", (AlphaBeta("ring", 0.0, alpha_us, gb_per_s, "by hand"),)),
            None,
            2,
        )
        for alpha_us, gb_per_s in ((0.0, 2.0), (1e6, 1e3))
    )
    counts = []
    for machine, options in ((slow_link, {}), (slow_link, {"reduce_dtype": torch.float32}), (fast_link, {})):
        with CountCollectives() as collectives:
            tp.ffn(*leaves, tp_group=dist.group.WORLD, forward_chunks=machine, **options)
        counts.append(collectives.get_total_counts())
    assert torch.equal(tp.ffn(*leaves, forward_chunks=slow_link), tp.ffn(*leaves))
    tp.ffn(*(t.double() for t in leaves), tp_group=dist.group.WORLD, forward_chunks=slow_link)
    with pytest.raises(ValueError, match=r"forward_chunks=Machine.* cuts an all-reduce"):
        tp.ffn(*leaves, tp_group=dist.group.WORLD, forward_chunks=slow_link, sequence_parallel=True)
    is_compiling, torch.compiler.is_compiling = torch.compiler.is_compiling, lambda: True
    try:
        with pytest.raises(ValueError, match=r"forward_chunks must be a number under torch\.compile"):
            tp.ffn(*leaves, tp_group=dist.group.WORLD, forward_chunks=slow_link)
    finally:
        torch.compiler.is_compiling = is_compiling
    return counts


def test_the_cost_model_chooses_the_chunks(ranks_of):
    for counts in ranks_of(2).run(chosen_by_the_cost_model):
        assert counts == [8, 8, 1]


def under_pytorch(rank, world_size, options):
    """Compiled whole, with transforms and under autocast."""
    use("native")
    group = dist.group.WORLD
    problem = draw((300,), 32, 48, dtype=torch.bfloat16)
    leaves = problem.x, *shards_in_order(problem, rank, world_size)

    def ffn(*t):
        return tp.ffn(*t, tp_group=group, **options)

    plain = results(ffn, leaves, problem.dy)
    torch._dynamo.reset()
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager", dynamic=True)
    for name, a, b in zip(NAMES, results(compiled, leaves, problem.dy), plain, strict=True):
        assert torch.equal(a, b), name
    again = results(lambda *t: torch.utils.checkpoint.checkpoint(ffn, *t, use_reentrant=False), leaves, problem.dy)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    for mine, other in zip(torch.func.vjp(ffn, *leaves)[1](problem.dy), plain[1:], strict=True):
        torch.testing.assert_close(mine, other)
    rows = torch.func.vmap(lambda x: ffn(x, *leaves[1:]))(torch.stack([leaves[0], problem.dy]))
    whole = tp.ffn(*leaves, tp_group=group, **options | {"forward_chunks": 1})
    torch.testing.assert_close(rows[0], whole)
    x = tokens(draw((300,), 32, 48), rank, world_size, False)[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = tp.ffn(x, *(t.float() for t in leaves[1:]), tp_group=group, **options)
    y.backward(problem.dy)
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    "options", [{"forward_chunks": 2}, {"reduce_dtype": torch.float32, "forward_chunks": 3}], ids=str
)
def test_under_pytorchs_modes(options, ranks_of):
    ranks_of(2).run(under_pytorch, options)
