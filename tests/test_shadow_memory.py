"""What an access must not do: leave its arguments, read what nobody wrote, meet another that nothing orders."""

import pytest
import torch
import triton
import triton.language as tl
from shadow_memory import OutOfBounds, Race, Uninitialised
from simulator import Simulation
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.cpu_only

SEEDS = range(10)


@triton.jit
def copy_kernel(x_ptr, y_ptr, STEP: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + SHIFT + offs))


@pytest.mark.parametrize("seed", SEEDS)
def test_out_of_bounds(seed):
    x, y, around = torch.zeros(16), torch.zeros(16), torch.zeros(4, 20)
    with pytest.raises(OutOfBounds, match=r"program 1 of .* reads 4 bytes .* x_ptr\[16\]"), Simulation(seed=seed):
        copy_kernel[(2,)](x, y, 8, 1, 8)
    with pytest.raises(OutOfBounds, match=r"program 0 of .* reads 8 bytes .* x_ptr\[-2\]"), Simulation(seed=seed):
        copy_kernel[(1,)](x, y, 8, -2, 8)
    with pytest.raises(OutOfBounds, match=r"writes 16 bytes .* y_ptr\[2, 0\]"), Simulation(seed=seed):
        copy_kernel[(2,)](x, torch.zeros(2, 6), 8, 0, 8)
    # Between the rows of a view, although its storage goes on.
    with pytest.raises(OutOfBounds, match=r"reads 16 bytes .* x_ptr\[0, 4\] \(shape \[4, 4\]\)"), Simulation(seed=seed):
        copy_kernel[(1,)](around[:, :4], y, 8, 0, 8)


@pytest.mark.parametrize("seed", SEEDS)
def test_uninitialised_reads(seed):
    y = torch.zeros(16)

    def there_and_back(make, programs):
        with Simulation(seed=seed):
            x = make()
            copy_kernel[(programs,)](y, x, 8, 0, 8)
            copy_kernel[(2,)](x, y, 8, 0, 8)
            copy_kernel[(2,)](make().normal_(), y, 8, 0, 8)  # written by the host

    for make in (lambda: torch.empty(16), lambda: y.new_empty(16), lambda: torch.empty_like(y)):
        there_and_back(make, 2)
        with pytest.raises(Uninitialised, match=r"program 1 of .* reads x_ptr\[8\] .*nobody has written"):
            there_and_back(make, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_overlapping_writes(seed):
    x, y = torch.zeros(2, 16)
    with (
        pytest.raises(Race, match=r"program [01] .* writes y_ptr\[[4-7]\] .* program [01] .* writes it"),
        Simulation(seed=seed),
    ):
        copy_kernel[(2,)](x, y, 4, 0, 8)
    # Two views of a storage, and elements of two sizes.
    with pytest.raises(Race, match=r"(reads|writes) x_ptr\[\d+\] .* also y_ptr\[\d+\]"), Simulation(seed=seed):
        copy_kernel[(2,)](y[4:].view(torch.int16), y.view(torch.int16)[:24], 8, 0, 8)


@triton.jit
def hand_over_kernel(descriptor, out_ptr, BLOCK: tl.constexpr, ORDERED: tl.constexpr, flag_ptr):
    """Program 0 writes through the descriptor, program 1 reads through the pointer."""
    if tl.program_id(0) == 0:
        descriptor.store([0, 0], tl.full((BLOCK, BLOCK), 1.0, tl.float32))
        tl.atomic_xchg(flag_ptr, 1)
    else:
        if ORDERED:
            while tl.atomic_add(flag_ptr, 0) == 0:
                pass
        offs = tl.arange(0, BLOCK)
        tl.store(flag_ptr + 1, tl.load(out_ptr + offs[:, None] * BLOCK + offs[None, :]).sum().to(tl.int32))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_descriptor_and_a_pointer_are_one_buffer(seed):
    """Also: atomics order by default."""
    out, flag = torch.zeros(8, 8), torch.zeros(2, dtype=torch.int32)
    descriptor = TensorDescriptor.from_tensor(out, [8, 8])
    with Simulation(seed=seed):
        hand_over_kernel[(2,)](descriptor, out, 8, True, flag)
    assert flag.tolist() == [1, 64]
    with pytest.raises(Race, match=r"(descriptor|out_ptr)\[0, 0\]"), Simulation(seed=seed):
        hand_over_kernel[(2,)](descriptor, out, 8, False, flag)


@triton.jit
def lock_kernel(lock_ptr, total_ptr, UNLOCK: tl.constexpr, PLAIN: tl.constexpr):
    while tl.atomic_cas(lock_ptr, 0, 1, sem="acquire") != 0:
        pass
    tl.store(total_ptr, tl.load(total_ptr) + 1)
    if PLAIN:
        tl.store(lock_ptr, 0)
    else:
        tl.atomic_xchg(lock_ptr, 0, sem=UNLOCK)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lock(seed):
    """By compare-and-swap; and a plain store to what others poll."""
    lock, total = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    with Simulation(seed=seed):
        lock_kernel[(5,)](lock, total, "release", False)
    assert (lock.item(), total.item()) == (0, 5)
    with pytest.raises(Race, match=r"total_ptr\[0\]"), Simulation(seed=seed):
        lock_kernel[(5,)](lock.zero_(), total, "relaxed", False)
    with pytest.raises(Race, match=r"lock_ptr\[0\]"), Simulation(seed=seed):
        lock_kernel[(5,)](lock.zero_(), total, "release", True)


@triton.jit
def chain_kernel(data_ptr, flag_ptr, SECOND: tl.constexpr, READ: tl.constexpr):
    """Program 0 publishes data[0]; program 1 writes data[1] and counts on; program 2 reads data[READ]."""
    program = tl.program_id(0)
    if program == 2:
        while tl.atomic_add(flag_ptr, 0, sem="acquire") < 2:
            pass
        tl.load(data_ptr + READ)
    else:
        if program == 1:
            while tl.atomic_add(flag_ptr, 0, sem="relaxed") < 1:
                pass
        tl.store(data_ptr + program, 1)
        if program == 0:
            tl.atomic_add(flag_ptr, 1, sem="release")
        else:
            tl.atomic_add(flag_ptr, 1, sem=SECOND)


@pytest.mark.parametrize("seed", SEEDS)
def test_release_sequences(seed):
    """A relaxed atomic in between passes on what was released before it, and releases nothing itself."""
    for second, read in (("relaxed", 0), ("release", 0), ("release", 1)):
        with Simulation(seed=seed):
            chain_kernel[(3,)](torch.zeros(2), torch.zeros(1, dtype=torch.int32), second, read)
    with pytest.raises(Race, match=r"program 2 .* reads data_ptr\[1\] .* program 1"), Simulation(seed=seed):
        chain_kernel[(3,)](torch.zeros(2), torch.zeros(1, dtype=torch.int32), "relaxed", 1)
