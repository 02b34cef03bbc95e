"""Order memory between programs and launches, and fetch it early: what Triton has no words for.

Inline PTX, of which the interpreter (interpreter.py) knows that it computes nothing.

Source: PTX ISA, "Async proxy", "griddepcontrol" and "prefetch"; griddepcontrol as in triton.language.extra.cuda.gdc,
which the interpreter cannot run.
"""

import triton
import triton.language as tl


@triton.jit
def fence_async_proxy():
    """Order this thread's plain accesses before and TMA accesses after, or the other way round; sm_90 or later."""
    tl.inline_asm_elementwise("fence.proxy.async; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def launch_dependents():
    """Let the next launch of the stream start, if it is a dependent one, once every program has come here."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_for_launch():
    """Wait until the launch before has ended and what it wrote is visible."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch_to_l2(ptrs):
    """Begin to bring the cache lines of these global addresses into L2; nobody waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // dummy $0", "=r,l", [ptrs.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )
