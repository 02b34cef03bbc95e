"""The counter protocol of the single-launch kernel, in every interleaving (protocol_model.py): right as it is, and
wrong in the way that each mistake (model_mutants.py) is wrong."""

from functools import lru_cache

import pytest
import torch
import triton
import triton.language as tl
from model_mutants import GROWS, MUTANTS, consumers_first, grouped, row_major
from protocol_model import Launch, Order, Protocol, Tile, check

from tpffn_triton.kernels.ffn_single_launch import tile_of_ticket

ALL = 99  # more places than any launch here has programs
RESIDENT = (1, 2, 3, ALL)
ORDERS = {"row_major": row_major, "grouped_1": grouped(1), "grouped_2": grouped(2)}
SEQUENCES = [
    [(2, 2, 2), (1, 2, 2)],
    [(1, 2, 2), (3, 2, 2)],
    [(2, 2, 2), (3, 2, 2), (1, 2, 2)],
    [(4, 2, 1), (1, 2, 1), (3, 2, 1)],
    [(2, 2, 2), (2, 3, 1), (1, 1, 3)],  # other layers, through the same counters
]


def assert_right(outcome) -> None:
    print(f"{outcome.states} states explored")
    assert outcome.verdict == "right", "\n".join((outcome.detail, *outcome.trace))


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("launches", SEQUENCES, ids=str)
def test_the_protocol_is_right_however_programs_interleave(launches, order):
    states = []
    for resident in RESIDENT:
        outcome = check(launches, order, resident)
        assert_right(outcome)
        states.append(outcome.states)
    assert states[0] < states[1] < states[2] < states[3]


@triton.jit
def tiles_of_tickets(out_ptr, M, N, H, BLOCK: tl.constexpr, GROUP_M: tl.constexpr):
    """Write stage, row block and column of the program's number, as a ticket, to its row of out [tickets, 3]."""
    ticket = tl.program_id(0)
    stage, tile_m, tile_n = tile_of_ticket(ticket, M, N, H, BLOCK, BLOCK, GROUP_M)
    tl.store(out_ptr + 3 * ticket, stage)
    tl.store(out_ptr + 3 * ticket + 1, tile_m)
    tl.store(out_ptr + 3 * ticket + 2, tile_n)


@lru_cache
def kernels_tiles(launch: Launch, group: int, device: str) -> list[Tile]:
    """Return the tiles by ticket, as the kernel has them; each matrix ends inside of its last tiles."""
    row_blocks, hidden_tiles, out_tiles = launch
    tickets = row_blocks * (hidden_tiles + out_tiles)
    out = torch.full((tickets, 3), -1, dtype=torch.int32, device=device)
    tiles_of_tickets[(tickets,)](out, *(16 * tiles - 3 for tiles in launch), BLOCK=16, GROUP_M=group)
    return [tuple(row) for row in out.tolist()]


def kernels_order(group: int, device: str) -> Order:
    return lambda *launch: kernels_tiles(launch, group, device)


@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("launch", [(1, 2, 2), (2, 1, 3), (3, 2, 1), (5, 3, 1), (7, 1, 1)], ids=str)
def test_tickets_are_the_tiles_in_an_order_that_never_waits_for_a_later_one(launch, group, device):
    order = kernels_tiles(launch, group, device)
    row_blocks, hidden_tiles, out_tiles = launch
    everything = [
        (stage, row, col)
        for stage, columns in ((1, hidden_tiles), (2, out_tiles))
        for row in range(row_blocks)
        for col in range(columns)
    ]
    assert sorted(order) == everything
    for row in range(row_blocks):
        stages = [stage for stage, of, _ in order if of == row]
        assert stages == sorted(stages)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("launches", [[(3, 2, 1), (1, 2, 2), (3, 2, 1)], [(2, 2, 2), (5, 1, 1), (1, 2, 2)]], ids=str)
def test_the_protocol_is_right_in_the_kernels_own_order(launches, group, device):
    for resident in RESIDENT:
        assert_right(check(launches, kernels_order(group, device), resident))


def test_streams_with_counters_of_their_own():
    for resident in RESIDENT:
        assert_right(check(GROWS, row_major, resident, Protocol(streams=2)))
        assert_right(check([(1, 2, 1)] * 4, row_major, resident, Protocol(streams=2)))


def test_one_state_a_step_where_nothing_can_interleave():
    """One producer, one consumer, one place: both start, publish, clear the ticket, wait, count, clear the
    counter, read, and the launch ends; with the state before, ten."""
    outcome = check([(1, 1, 1)], row_major, 1)
    assert_right(outcome)
    assert outcome.states == 10


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "_"))
def test_each_mistake_is_found_as_what_it_is(mutant):
    outcome = check(mutant.launches, mutant.order, mutant.resident, mutant.protocol)
    assert outcome.verdict == mutant.verdict, "\n".join((outcome.detail, *outcome.trace))
    assert outcome.detail
    assert outcome.trace
    # It is the mistake: without it the same launches are right.
    assert_right(check(mutant.launches, row_major, mutant.resident, Protocol(streams=mutant.protocol.streams)))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "_"))
def test_buffers_that_drain_earlier_change_no_verdict(mutant):
    outcome = check(mutant.launches, mutant.order, mutant.resident, mutant.protocol, early_drains=True)
    assert outcome.verdict == mutant.verdict


def test_buffers_that_drain_earlier_make_nothing_wrong():
    for resident in RESIDENT:
        late = check(GROWS, row_major, resident)
        early = check(GROWS, row_major, resident, early_drains=True)
        assert_right(early)
        assert early.states > late.states


def test_a_trace_is_the_shortest_way_from_the_start():
    (relaxed,) = (mutant for mutant in MUTANTS if mutant.name == "relaxed flag")
    outcome = check([(1, 1, 1)], row_major, 2, relaxed.protocol)
    start = ["stream 0 hidden[0, 0] starts, number 0", "stream 0 y[0, 0] starts, number 1"]
    y = [f"stream 0 y[0, 0]: {step}" for step in ("clear ticket", "wait", "read")]
    assert outcome.detail == "stream 0 y[0, 0] reads hidden[0, 0] of no launch in launch 0"
    assert outcome.trace[-2:] == y[-2:]
    assert sorted(outcome.trace) == sorted([*start, "stream 0 hidden[0, 0]: publish", *y])


@pytest.mark.parametrize(
    ("protocol", "order"),
    [
        pytest.param(Protocol(), consumers_first, id="consumers_first"),
        pytest.param(Protocol(tickets=False), row_major, id="program_numbers"),
    ],
)
def test_without_tickets_in_order_every_program_has_to_be_resident(protocol, order):
    """What a grid that counts on co-residency relies on, and what a collective beside it takes away."""
    launches = [(1, 2, 2), (1, 2, 2)]
    assert_right(check(launches, order, ALL, protocol))
    assert check(launches, order, 2, protocol).verdict == "deadlock"


@pytest.mark.parametrize(
    "protocol", [Protocol(clears="epoch"), Protocol(clears_ticket="modulo")], ids=("epoch", "wrap")
)
def test_counters_that_are_never_cleared_are_right_while_nothing_changes(protocol):
    for resident in RESIDENT:
        assert_right(check([(2, 2, 1)] * 3, row_major, resident, protocol))
