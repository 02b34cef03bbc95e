"""batch_invariant: a token's y has the same bits alone and in any batch, at any place, beside any others."""

import pytest
import torch
import torch.distributed as dist
from ffn_cases import assert_all_accurate, draw, eager, exact, ours, shards
from launches import count_launches
from mlp_modules import GatedMLP, PlainMLP
from rank_pool import use
from torch.distributed.tensor import Shard

import tpffn_triton as tp
from tpffn_triton import interpreter
from tpffn_triton.huggingface import parallelize
from tpffn_triton.kernels import forward
from tpffn_triton.kernels._configs import MOST_WAVES, TABLES, batch_invariant
from tpffn_triton.kernels._launch import Operand, signature
from tpffn_triton.kernels.forward import SINGLE, TWO, forward_form
from tpffn_triton.parallel_style import FusedFFNParallel

interpreter.install()
H, F = 64, 160
BATCHES = (2, 17, 64, 65, 130)


def rows_differ(call, x: torch.Tensor, batches=BATCHES) -> list[tuple[int, int]]:
    """Return (M, place) of each batch in which a token's bits are not those it has alone."""
    alone = call(x[:1])
    found = []
    for M in batches:
        for place in {0, M // 2, M - 1}:
            batch = x[1 : M + 1].clone()
            batch[place] = x[0]
            if not torch.equal(call(batch)[place], alone[0]):
                found.append((M, place))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.usefixtures("implementation")
def test_bits_of_a_token(activation, dtype, device):
    problem = draw((131,), H, F, activation=activation, dtype=dtype, device=device)

    def call(x):
        return tp.ffn(x, *problem.leaves()[1:], activation=activation, batch_invariant=True)

    assert not rows_differ(call, problem.x)
    y = call(problem.x)
    for leaf in problem.leaves():  # nor may it matter what backward keeps
        leaf.requires_grad_()
        assert torch.equal(call(problem.x), y)
        leaf.requires_grad_(False)


@pytest.mark.cpu_only
def test_bits_of_a_token_in_a_real_layer(monkeypatch):
    """By torch's GEMMs, at sizes for which they choose other kernels; without the flag some token tells its batch."""
    monkeypatch.setattr(interpreter, "interpreting", lambda: False)
    problem = draw((131,), 1024, 1024)

    def call(x, invariant=True):
        return tp.ffn(x, *problem.leaves()[1:], batch_invariant=invariant)

    assert not rows_differ(call, problem.x)
    # If this fails, this BLAS does by itself what the flag asks of it, and nothing is shown here.
    assert rows_differ(lambda x: call(x, False), problem.x)


@pytest.mark.usefixtures("implementation")
def test_where_x_lies_does_not_matter(device):
    problem = draw((9,), H, F, dtype=torch.bfloat16, device=device)
    weights = problem.leaves()[1:]
    y = tp.ffn(problem.x, *weights, batch_invariant=True)
    wide = torch.empty(9, H + 1, dtype=torch.bfloat16, device=device)
    wide[:, 1:] = problem.x
    shifted = torch.empty(9 * H + 1, dtype=torch.bfloat16, device=device)[1:].view(9, H).copy_(problem.x)
    for x in (wide[:, 1:], shifted, problem.x.view(3, 3, H)):
        assert torch.equal(tp.ffn(x, *weights, batch_invariant=True).view(9, H), y)


@pytest.mark.cpu_only
def test_every_launch_has_these_tiles(monkeypatch):
    """Whatever the number of tokens, and wherever x lies: rows that TMA cannot address are copied."""
    found = []
    launch = forward.ffn_single_launch

    def recorded(*args):
        found.append(args[-1])
        return launch(*args)

    monkeypatch.setattr(forward, "ffn_single_launch", recorded)
    problem = draw((70,), 64, 128, dtype=torch.bfloat16)
    w1, w2, b1, b2 = problem.leaves()[1:]
    shifted = torch.empty(70 * 64 + 1, dtype=torch.bfloat16)[1:].view(70, 64).copy_(problem.x)
    wide = torch.empty(70, 65, dtype=torch.bfloat16)[:, :64].copy_(problem.x)
    for x in (problem.x, problem.x[:1], problem.x[:33], shifted, shifted[:1], wide):
        forward.ffn_forward(x, w1, b1, w2, b2, "gelu", "nothing", None, True)
    assert found == [batch_invariant("ffn", problem.x, "sm_90")] * 6
    assert found[0].USE_TMA


def test_a_single_row_has_no_stride(device):
    """Torch gives a view of one row whatever stride it was cut with: it may choose no other tiles."""
    x = torch.zeros(1, 65, dtype=torch.bfloat16, device=device)[:, :64]
    assert x.stride() == (65, 1)
    assert x.is_contiguous()
    w1, w2 = torch.zeros(128, 64), torch.zeros(64, 128)
    operands = [Operand(*signature(t.to(device, torch.bfloat16))) for t in (x, w1, w2)]
    own = Operand(*signature(x.clone(memory_format=torch.contiguous_format)))
    for invariant in (False, True):
        assert forward_form(*operands, "gelu", "sm_90", invariant) == forward_form(
            own, *operands[1:], "gelu", "sm_90", invariant
        )


@pytest.mark.parametrize("M", [3, 32])
@pytest.mark.usefixtures("implementation")
def test_y_may_be_modified_in_place(M, device):
    problem = draw((M,), H, F, device=device)
    x = problem.x.requires_grad_()
    y = tp.ffn(x, *problem.leaves()[1:], batch_invariant=True)
    y += x
    y.sum().backward()
    assert x.grad is not None
    assert y.untyped_storage().nbytes() == y.nbytes


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.usefixtures("implementation")
def test_values_and_gradients(activation, device):
    problem = draw((3, 20), 64, 96, activation=activation, device=device)
    assert_all_accurate(ours(problem, batch_invariant=True), eager(problem), exact(problem))


def of_ranks(rank, world_size, implementation, dtype):
    use(implementation)
    problem = draw((70,), H, F, dtype=dtype)
    w1, b1, w2, b2 = shards(problem, rank, world_size)
    place = rank, world_size, dist.group.WORLD

    def call(x):
        return tp.ffn(x, w1, w2, b1, b2, tp_group=dist.group.WORLD, batch_invariant=True)

    assert_all_accurate(ours(problem, *place, batch_invariant=True), eager(problem, *place), exact(problem, *place[:2]))
    with count_launches() as launches, pytest.raises(RuntimeError, match=r"vmap over .* batch_invariant"):
        torch.func.vmap(call)(problem.x[None])
    assert not launches
    return rows_differ(call, problem.x, (2, 33, 64)), call(problem.x)


@pytest.mark.cpu_only
@pytest.mark.parametrize("implementation", ["triton", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_over_ranks(dtype, implementation, ranks_of):
    """Partial sums are added in the order of ranks, which a ring does for some of a message's parts."""
    results = ranks_of(4).run(of_ranks, implementation, dtype)
    for different, y in results:
        assert not different
        assert torch.equal(y, results[0][1])


def with_flag_on_rank_0(rank, world_size):
    use("native")
    problem = draw((8,), 32, 64)
    w1, b1, w2, b2 = shards(problem, rank, world_size)
    tp.ffn(problem.x, w1, w2, b1, b2, tp_group=dist.group.WORLD, batch_invariant=rank == 0)


@pytest.mark.cpu_only
def test_ranks_agree_on_it(ranks_of):
    for ok, (kind, message, _) in ranks_of(2).outcomes(with_flag_on_rank_0):
        assert not ok
        assert kind == "ValueError"
        assert "batch_invariant" in message


@pytest.mark.parametrize("arch", TABLES)
@pytest.mark.parametrize("gated", ["", "gated_"])
def test_form_and_tiles_are_the_same_for_every_number_of_tokens(gated, arch):
    def of(rows, cols):
        return Operand((rows, cols), (cols, 1), torch.bfloat16, torch.device("cpu"), 0)

    activation = "swiglu" if gated else "gelu"
    choices = {
        forward_form(of(M, 1024), of(4096, 1024), of(1024, 4096 // (2 if gated else 1)), activation, arch, True)
        for M in (1, 16, 64, 65, 1024, 65536)
    }
    (choice,) = choices
    assert choice.form == (SINGLE if MOST_WAVES[arch] else TWO)
    kernel = "ffn" if choice.form == SINGLE else "linear_act"
    assert choice.config == batch_invariant(f"{gated}{kernel}", of(1, 1), arch)
    # Programs for few tokens, and no small tile for many.
    assert (choice.config.BLOCK_N, choice.config.SPLIT_K) == (64, 1)
    tall = 128 if arch == "sm_90" or (arch, gated) == ("sm_100", "") else 64
    assert tall <= choice.config.BLOCK_M
    explained = tp.explain((8, 128, 1024), 4096, activation=activation, batch_invariant=True, arch=arch)
    assert explained.launches[0].config == choice.config
    assert "batch-invariant" in str(explained)


def test_layer_and_compile(device):
    layer = tp.TensorParallelFFN(64, 128, batch_invariant=True, device=device, dtype=torch.bfloat16)
    assert "batch_invariant=True" in repr(layer)
    x = torch.randn(65, 64, device=device, dtype=torch.bfloat16)
    with torch.no_grad(), count_launches() as launches:
        y = layer(x)
        assert torch.equal(layer(x[7:8])[0], y[7])
    assert launches == {"ffn_kernel": 2}
    dense = tp.TensorParallelFFN.from_dense(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8), batch_invariant=True)
    assert dense.batch_invariant
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), y)


@pytest.mark.cpu_only
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_replaced_mlp(activation, monkeypatch):
    """As transformers' models get it (huggingface.py), whose gate and up are two linears."""
    monkeypatch.setattr(interpreter, "interpreting", lambda: False)
    mlp = GatedMLP(256, 512, "swiglu") if activation == "swiglu" else PlainMLP(256, 512, "gelu")
    model = torch.nn.Sequential(mlp)
    assert len(parallelize(model, batch_invariant=True).replaced) == 1
    with torch.no_grad():
        assert not rows_differ(model, torch.randn(66, 256), (2, 65))
    with pytest.raises(ValueError, match="cannot go with sequence_parallel"):
        FusedFFNParallel(input_layouts=Shard(0), batch_invariant=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_parallel": True}, "batch_invariant adds .* it cannot go with sequence_parallel"),
        ({"forward_chunks": 2}, "cannot go with forward_chunks=2"),
    ],
)
def test_rejected(options, message):
    problem = draw((8,), 32, 64)
    with pytest.raises(ValueError, match=message):
        tp.ffn(*problem.leaves(), batch_invariant=True, **options)
    with pytest.raises(ValueError, match=message):
        tp.TensorParallelFFN(32, 64, batch_invariant=True, **options)


@pytest.mark.cpu_only
def test_fp64_is_rejected(monkeypatch):
    monkeypatch.setattr(interpreter, "interpreting", lambda: False)
    problem = draw((8,), 32, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"fp32, bf16 or fp16, got torch\.float64"):
        tp.ffn(*problem.leaves(), batch_invariant=True)
