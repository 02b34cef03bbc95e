"""What ranks compare and when: over the group's store, once per kind and change of shape, and on demand."""

import time
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from exchanges import counted_exchanges, new_group
from ffn_cases import draw, ours, shards
from rank_pool import use
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend "fake"

import tpffn_triton as tp
from tpffn_triton import agreement, group_store

pytestmark = pytest.mark.cpu_only


def exchanges_of_calls(rank, world_size, calls):
    """Return what each call, (tokens, hidden size) compared: names of facts."""
    use("native")
    group = new_group(world_size)
    compared = []
    for tokens, H in calls:
        with counted_exchanges() as sent:
            p = draw((tokens,), H, 48)
            w1, b1, w2, b2 = shards(p, rank, world_size)
            tp.ffn(p.x, w1, w2, b1, b2, tp_group=group)
        compared.append(",".join(sorted(name for facts in sent for name in facts)))
    return compared


def test_only_what_is_new_is_compared(ranks_of):
    """Contents on a new kind, shapes when they change, nothing at all in a call like the one before."""
    first, everything, shapes, nothing = "anew,b1,b2,call,w1,w2,x", "b1,b2,call,w1,w2,x", "call", ""
    calls = ((6, 32), (4, 32), (4, 32), (6, 32), (6, 16), (6, 16))
    expected = [first, shapes, nothing, shapes, everything, nothing]
    assert ranks_of(2).run(exchanges_of_calls, calls) == [expected] * 2


def test_the_finiteness_of_a_slice_is_not_compared(ranks_of):
    """One rank's tokens may overflow in fp16, for a gradient scaler to see."""
    compared = [["anew", "b1", "b2", "call", "w1", "w2"]]
    assert ranks_of(2).run(overflow_of_one_rank) == [(compared, True), (compared, False)]


def overflow_of_one_rank(rank, world_size):
    use("native")
    p = draw((6,), 32, 48)
    p.x[3:] = float("inf")
    w1, b1, w2, b2 = shards(p, rank, world_size)
    x = p.x.chunk(world_size)[rank]
    with counted_exchanges() as sent:
        y = tp.ffn(x, w1, w2, b1, b2, tp_group=new_group(world_size), sequence_parallel=True)
    return [sorted(facts) for facts in sent], y.isfinite().all().item()


def test_layers_that_take_turns_compare_nothing_once_that_is_known(ranks_of):
    calls = ((6, 32), (6, 16), (4, 32)) * 4
    for compared in ranks_of(2).run(exchanges_of_calls, calls):
        assert [bool(facts) for facts in compared] == [True] * 4 + [False] * 8


def chosen_chunks(rank, world_size):
    """Two numbers of chunks, as a Machine would choose for two lengths."""
    use("native")
    group = new_group(world_size)
    p = draw((300,), 32, 48)
    w1, b1, w2, b2 = shards(p, rank, world_size)
    with counted_exchanges() as sent:
        for chunks in (1, 2):
            tp.ffn(p.x, w1, w2, b1, b2, tp_group=group, forward_chunks=chunks)
    return [sorted(facts) for facts in sent][1:], sent[1]["call"].endswith("forward_chunks=2")


def test_another_number_of_chunks_is_compared_without_reading_tensors(ranks_of):
    assert ranks_of(2).run(chosen_chunks) == [([["call"]], True)] * 2


def every_call_compared(rank, world_size):
    use("native")
    group = new_group(world_size)
    problem = draw((6,), 32, 48)
    plain = ours(problem, rank, world_size, group)
    with counted_exchanges() as sent, tp.comparing_every_call():
        compared = ours(problem, rank, world_size, group)
        ours(problem, rank, world_size, group)
    with counted_exchanges() as after:
        ours(problem, rank, world_size, group)
    assert all(torch.equal(a, b) for a, b in zip(plain, compared, strict=True))
    return [facts["call"].split()[0] for facts in sent], len(after)


def test_comparing_every_call_compares_forward_and_backward_until_its_end(ranks_of):
    assert ranks_of(2).run(every_call_compared) == [(["x", "dy", "x", "dy"], 0)] * 2


def equal_models(rank, world_size):
    use("native")
    group = new_group(world_size)
    torch.manual_seed(0)
    layers = [tp.TensorParallelFFN(32, 48, tp_group=group, bias=bias) for bias in (True, False)]
    model = torch.nn.Sequential(*layers, tp.TensorParallelFFN(32, 48))  # the last has no group
    model(torch.ones(3, 32))
    with counted_exchanges() as sent:
        tp.compare_ranks(model)
        tp.compare_ranks(layers[0])
    return [sorted(facts) for facts in sent]


def test_compare_ranks_of_equal_models(ranks_of):
    first, second = (
        [f"{i}.linear_{own}" for own in names]
        for i, names in enumerate(
            (["fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight"], ["fc1.weight", "fc2.weight"]),
        )
    )
    alone = [" settings", "layers", *(name[2:] for name in first)]
    both = sorted(["0 settings", "1 settings", *first, *second, "layers"])
    assert ranks_of(2).run(equal_models) == [[both, sorted(alone)]] * 2


def same_nan_everywhere(rank, world_size):
    use("native")
    problem = draw((6,), 32, 48)
    problem.x[0, 0] = problem.b2[1] = float("nan")
    w1, b1, w2, b2 = shards(problem, rank, world_size)
    with tp.comparing_every_call():
        return tp.ffn(problem.x, w1, w2, b1, b2, tp_group=new_group(world_size)).isnan().sum().item()


def test_a_nan_that_all_ranks_have_is_no_disagreement(ranks_of):
    assert ranks_of(2).run(same_nan_everywhere) == [32 + 5] * 2


def absent_rank(rank, world_size, seconds):
    use("native")
    group = new_group(world_size, timeout=timedelta(seconds=seconds))
    start, text = time.monotonic(), ""
    if rank == 0:
        with pytest.raises(tp.CollectiveError) as error:
            ours(draw((6,), 32, 48), rank, world_size, group)
        text = str(error.value)
    waited = time.monotonic() - start
    dist.barrier()
    return text, waited


def test_the_timeout_is_the_groups_own(ranks_of):
    """Not the default group's, a minute here."""
    (text, waited), _ = ranks_of(2).run(absent_rank, 1)
    assert text.startswith("comparing arguments over the group's store failed on rank 0 of 2 after 1.")
    assert text.endswith("rank 1 of 2 did not come")
    assert 1 <= waited < 30


def rank_that_comes_between_two_looks(rank, world_size):
    store = group_store.store_of(new_group(world_size, timeout=timedelta(seconds=0.2)))
    if rank == 0:
        asked = store._store

        class Late:
            """A store that does not know of all keys together, as if the last had come right after the question."""

            def check(self, keys):
                return len(keys) == 1 and asked.check(keys)

            def __getattr__(self, name):
                return getattr(asked, name)

        store._store = Late()
        asked.wait([f"tpffn/0/{1 - rank}"])
    return [facts["call"] for facts in store.exchange({"call": str(rank)})]


def test_a_rank_that_comes_at_the_last_moment_is_not_absent(ranks_of):
    assert ranks_of(2).run(rank_that_comes_between_two_looks)[0] == ["0", "1"]


def keys_left(rank, world_size):
    use("native")
    group = new_group(world_size, timeout=timedelta(seconds=20))
    for tokens in range(12):
        p = draw((tokens,), 16, 24)
        w1, b1, w2, b2 = shards(p, rank, world_size)
        tp.ffn(p.x, w1, w2, b1, b2, tp_group=group)
    dist.barrier()
    store = group.get_group_store()
    found = [n for n in range(20) for r in range(world_size) if store.check([f"tpffn/{n}/{r}"])]
    dist.barrier()
    return found


def test_the_store_does_not_fill_up(ranks_of):
    """What is left is the last exchange, which others may still read."""
    assert ranks_of(2).run(keys_left) == [[11, 11]] * 2


def rejected_on_all(rank, world_size):
    use("native")
    group = new_group(world_size)
    problem = draw((6,), 32, 48)
    w1, b1, w2, b2 = shards(problem, rank, world_size)
    for _ in range(3):
        tp.ffn(problem.x, w1, w2, b1, b2, tp_group=group)
        with pytest.raises(ValueError, match="x must be"):
            tp.ffn(problem.x[:, 1:], w1, w2, b1, b2, tp_group=group)
    store = group.get_group_store()
    tp.ffn(problem.x, w1, w2, b1, b2, tp_group=group)
    dist.barrier()
    return [r for r in range(world_size) if store.check([f"tpffn/note/{r}"])]


def test_what_all_ranks_reject_and_catch_disturbs_nothing(ranks_of):
    """And the notes of it are gone: no later error quotes them."""
    assert ranks_of(2).run(rejected_on_all) == [[], []]


def two_notes(rank, world_size):
    store = group_store.store_of(new_group(world_size))
    for text in ("fell over", "heard nothing, as it had fallen over"):
        if rank == 1:
            store.note(text)
    dist.barrier()
    return str(store.failure("a call failed", time.monotonic(), "nobody there"))


def test_the_first_failure_of_a_rank_is_the_one_that_others_quote(ranks_of):
    first, second = ranks_of(2).run(two_notes)
    assert first == "a call failed on rank 0 of 2 after 0.0 s: nobody there\n  rank 1 fell over"
    assert second.splitlines()[0] == "a call failed on rank 1 of 2 after 0.0 s: nobody there"


def test_digests_see_every_bit_and_the_order():
    t = torch.tensor([1.0, 2.0, 0.0])
    others = [torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, -0.0]), t.bfloat16(), t.double()]
    texts = [agreement.contents({"t": other}, ("t",))["t"] for other in (t, *others)]
    assert len(set(texts)) == len(texts)
    assert agreement.contents({"t": t.repeat(2, 1).t()[:, 0]}, ("t",))["t"] == texts[0]
    assert agreement.contents({"t": torch.ones(0)}, ("t",))["t"] != texts[0]


def test_what_cannot_be_read_is_not_looked_at():
    seen = []

    def under_vmap(row):
        seen.append(agreement.contents({"x": row, "b2": None}, ("x",)))
        return row

    torch.func.vmap(under_vmap)(torch.ones(2, 3))
    seen.append(agreement.contents({"x": torch.ones(2, device="meta")}, ("x",)))
    assert seen == [{}, {}]


class Storeless(dist.ProcessGroup):
    """A group without a store, as a test's own implementation may be."""

    def __init__(self):
        super().__init__(0, 2)


def test_a_group_without_a_store_is_told_once(monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    group = Storeless()
    with pytest.warns(UserWarning, match="not compared: this group of 2 ranks has no store"):
        assert group_store.store_of(group) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agreement.compare(group, {"call": "x"})


def fake_group(rank, world_size):
    return group_store.store_of(new_group(world_size, backend="fake"))


def test_fake_ranks_are_not_waited_for(ranks_of):
    assert ranks_of(2).run(fake_group) == [None, None]
