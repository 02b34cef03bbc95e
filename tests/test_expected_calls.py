"""Which calls ranks expect, and so do not compare: tpffn_triton/agreement.py."""

from datetime import timedelta

import pytest
import torch
from exchanges import counted_exchanges, new_group
from ffn_cases import draw, ours, shards
from rank_pool import use
from torch.utils.checkpoint import checkpoint

import tpffn_triton as tp
from tpffn_triton import agreement, group_store

pytestmark = pytest.mark.cpu_only


def exchanges_of_steps(rank, world_size, pattern):
    """Return how many exchanges each step of a model makes: pattern names its layers by letters, after which come
    "frozen", whose first x needs no gradient, or the kind of checkpointing."""
    use("native")
    group = new_group(world_size)
    letters, option = pattern
    torch.manual_seed(0)
    layers = [tp.TensorParallelFFN(32, {"A": 48, "B": 64}[letter], tp_group=group) for letter in letters]
    numbers, notes = [], []
    note = group_store.GroupStore.note
    group_store.GroupStore.note = lambda self, text: notes.append(text)
    try:
        for _ in range(7):
            x = torch.ones(6, 32, requires_grad=option != "frozen")
            with counted_exchanges() as sent:
                for layer in layers:
                    x = checkpoint(layer, x, use_reentrant=option == "reentrant") if "reent" in option else layer(x)
                x.sum().backward()
            numbers.append(len(sent))
    finally:
        group_store.GroupStore.note = note
    return numbers, notes


@pytest.mark.parametrize(
    "pattern",
    [("AAAA", ""), ("ABAB", ""), ("AABB", ""), ("AAAA", "frozen"), ("AAAA", "reentrant"), ("AAAA", "non-reentrant")],
    ids="-".join,
)
def test_a_model_that_repeats_itself_compares_nothing_after_its_first_steps(ranks_of, pattern):
    """Nor does what is no failure, as checkpointing's early stop, leave a note."""
    first, second = ranks_of(2).run(exchanges_of_steps, pattern)
    assert first == second
    numbers, notes = first
    assert numbers[0] > 0
    assert numbers[4:] == [0, 0, 0]
    assert notes == []


def places_after_many_lengths(rank, world_size):
    use("native")
    group, most = new_group(world_size), agreement.MOST_PLACES
    agreement.MOST_PLACES = 16
    try:
        for tokens in range(40):
            ours(draw((tokens % 13,), 32, 48), rank, world_size, group)
            assert len(agreement._agreed[group].follows) <= 16 + 2
    finally:
        agreement.MOST_PLACES = most
    with counted_exchanges() as sent:
        for _ in range(3):
            ours(draw((3,), 32, 48), rank, world_size, group)
    return len(sent)


def test_the_places_known_are_bounded_and_forgotten_by_all_ranks_at_once(ranks_of):
    first, second = ranks_of(2).run(places_after_many_lengths)
    assert first == second <= 2


def test_of_the_backwards_of_a_new_step_one_is_compared(ranks_of):
    """After it the next call is compared in any case."""
    numbers, _ = ranks_of(2).run(exchanges_of_steps, ("AAAA", ""))[0]
    assert numbers[:2] == [2, 3]


def skipped_without_communication(rank, world_size):
    use("native")
    group = new_group(world_size, timeout=timedelta(seconds=5))
    p = draw((6,), 32, 48)
    w1, b1, w2, b2 = (t.requires_grad_() for t in shards(p, rank, world_size))
    numbers = []
    for step in range(4):
        with counted_exchanges() as sent:
            y = tp.ffn(p.x, w1, w2, b1, b2, tp_group=group)
            if step != 2 or rank == 0:
                y.sum().backward()
        numbers.append(len(sent))
    return numbers


def test_a_backward_that_sends_nothing_may_be_left_out(ranks_of):
    assert ranks_of(2).run(skipped_without_communication) == [[1, 0, 0, 0]] * 2


def one_rank_starts_anew(rank, world_size):
    use("native")
    group = new_group(world_size, timeout=timedelta(seconds=5))

    def lengths(*tokens):
        with counted_exchanges() as sent:
            for length in tokens:
                p = draw((length,), 32, 48)
                w1, b1, w2, b2 = shards(p, rank, world_size)
                tp.ffn(p.x, w1, w2, b1, b2, tp_group=group)
        return len(sent)

    known = lengths(6, 4, 6, 4, 6, 4)
    if rank == 1:
        agreement.report(group, tp.CollectiveError("one that rank 0 has not seen"))
    return known, lengths(5, 6, 4, 6, 4, 6, 4)


def test_where_one_rank_starts_anew_all_do(ranks_of):
    """Else one would expect a call that the other compares."""
    assert ranks_of(2).run(one_rank_starts_anew) == [(3, 4)] * 2


def rejected_by_one_rank(rank, world_size):
    use("native")
    group = new_group(world_size, timeout=timedelta(seconds=5))
    p = draw((6,), 32, 48)
    w1, b1, w2, b2 = shards(p, rank, world_size)
    ours(p, rank, world_size, group)
    with pytest.raises(ValueError, match="x must be" if rank else "rank 1 rejected"):
        tp.ffn(p.x[:, 1:] if rank else p.x, w1, w2, b1, b2, tp_group=group)
    ours(p, rank, world_size, group)
    return rank


def test_a_call_rejected_by_one_rank_is_over_for_all(ranks_of):
    """Backwards before it do not count for the next, of which the others would know none."""
    assert ranks_of(2).run(rejected_by_one_rank) == [0, 1]
