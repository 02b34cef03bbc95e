"""Compile a producer and a consumer in one launch, right or with a mistake, and lint the PTX (ptx_lint.py).

    python tests/ptx_lint_kernels.py '{"no barrier": ["sm_90", {"BARRIER": false}]}'

Prints one JSON object: name → the fields of the report, and triton's version beside them.

Run it in a process without TRITON_INTERPRET.
"""

import json
import sys
from dataclasses import asdict

import triton
import triton.language as tl
from ptx_lint import lint
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

RIGHT = {
    "RELEASE": "release",
    "ACQUIRE": "acquire",
    "SCOPE": "gpu",
    "BARRIER": True,
    "STORE_BY_TMA": False,
    "POLL_PER_STEP": False,
}
BLOCK = 64


@triton.jit
def fence_proxy_async():
    """Order this thread's accesses through pointers with those by TMA."""
    tl.inline_asm_elementwise("fence.proxy.async; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait(flag_ptr, ACQUIRE: tl.constexpr, SCOPE: tl.constexpr, FENCE: tl.constexpr):
    while tl.atomic_add(flag_ptr, 0, sem=ACQUIRE, scope=SCOPE) < 1:
        pass
    if FENCE:
        fence_proxy_async()


@triton.jit
def load(src, k, K, BLOCK: tl.constexpr, USE_TMA: tl.constexpr):
    if USE_TMA:
        tile = src.load([0, k])
    else:
        tile = tl.load(src + tl.arange(0, BLOCK)[:, None] * K + k + tl.arange(0, BLOCK)[None, :])
    return tile


@triton.jit
def producer_and_consumer(
    x,
    hidden,
    weight,
    y,
    hidden_ptr,
    counters_ptr,
    K,
    RELEASE: tl.constexpr,
    ACQUIRE: tl.constexpr,
    SCOPE: tl.constexpr,
    BARRIER: tl.constexpr,
    FENCE_BEFORE_RELEASE: tl.constexpr,
    FENCE_AFTER_ACQUIRE: tl.constexpr,
    STORE_BY_TMA: tl.constexpr,
    POLL_PER_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """The program with the first ticket copies a tile of x to hidden, that with the second multiplies hidden with
    weight; x, hidden, weight, y are [BLOCK, K] descriptors with USE_TMA, else pointers."""
    offs = tl.arange(0, BLOCK)[:, None] * K + tl.arange(0, BLOCK)[None, :]
    flag_ptr = counters_ptr + 1
    if tl.atomic_add(counters_ptr, 1, sem="relaxed") == 0:
        tile = load(x, 0, K, BLOCK, USE_TMA)
        if STORE_BY_TMA:
            hidden.store([0, 0], tile)
        else:
            tl.store(hidden_ptr + offs, tile)
        if FENCE_BEFORE_RELEASE:
            fence_proxy_async()
        if BARRIER:
            tl.debug_barrier()
        tl.atomic_add(flag_ptr, 1, sem=RELEASE, scope=SCOPE)
    else:
        if not POLL_PER_STEP:
            wait(flag_ptr, ACQUIRE, SCOPE, FENCE_AFTER_ACQUIRE)
        acc = tl.zeros((BLOCK, BLOCK), tl.float32)
        for k in range(0, K, BLOCK):
            if POLL_PER_STEP:
                wait(flag_ptr, ACQUIRE, SCOPE, FENCE_AFTER_ACQUIRE)
            acc = tl.dot(load(hidden, k, K, BLOCK, USE_TMA), load(weight, k, K, BLOCK, USE_TMA).T, acc)
        if USE_TMA:
            y.store([0, 0], acc.to(y.dtype))
        else:
            tl.store(y + offs, acc.to(y.dtype.element_ty))


def ptx(arch: str, changed: dict) -> str:
    """Return the PTX for an architecture; by TMA on sm_90, unless changed says otherwise."""
    use_tma = changed.get("USE_TMA", arch == "sm_90")
    fences = dict.fromkeys(("FENCE_BEFORE_RELEASE", "FENCE_AFTER_ACQUIRE"), use_tma)
    constants = RIGHT | {"BLOCK": BLOCK, "USE_TMA": use_tma} | fences | changed
    matrix = f"tensordesc<bf16[{BLOCK}, {BLOCK}]>" if use_tma else "*bf16"
    function = producer_and_consumer
    types = dict.fromkeys(function.arg_names, "constexpr") | dict.fromkeys(("x", "hidden", "weight", "y"), matrix)
    types |= {"hidden_ptr": "*bf16", "counters_ptr": "*i32", "K": "i32"}
    divisible = [name for name, kind in types.items() if kind in ("*bf16", "i32")]
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn=function, signature=types, constexprs=constants, attrs=attributes)
    return compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options={"num_warps": 4}).asm["ptx"]


if __name__ == "__main__":
    reports = {name: asdict(lint(ptx(*case))) for name, case in json.loads(sys.argv[1]).items()}
    print(json.dumps({"triton": triton.__version__, "reports": reports}))
