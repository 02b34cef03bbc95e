"""Register every kernel as a PyTorch operator: `torch.ops.tpffn.*`.

    ffn_forward(x, w1, b1?, w2, b2?, activation, keep, out_dtype?, batch_invariant) -> (y, kept)
    linear_act(x, weight, bias?, activation, save_pre_act) -> (act, pre_act)
    linear(a, weight, bias?, out_dtype?) -> y
    linear_into(y, a, weight, bias?) -> ()    writes y
    linear_dact(dy, weight, pre_act, activation, need_act, need_db) -> (d_pre, act, db_partial)
    dgrad(dy, weight, out_dtype?) -> dx
    wgrad(dy, x, out_dtype?) -> dw
    wgrad_accumulate(dw, dy, x) -> ()         adds to dw
    column_sum(src, out_dtype?) -> out
    weight_grads(d_pre, x, dy, act, db_partial?, db2_src?, w1_dtype?, w2_dtype?, b1_dtype?, b2_dtype?)
        -> (dw1, dw2, db1, db2)
    weight_grads_accumulate(dw1, dw2, d_pre, x, dy, act, db_partial?, db2_src?, b1_dtype?, b2_dtype?)
        -> (db1, db2)                         adds to dw1 and dw2

Shapes and dtypes: kernels/; an output that is not asked for is an empty tensor, [0]. Each has CUDA and CPU
implementations (backends.py chooses), a fake one for tracing, and a FLOP formula for torch.utils.flop_counter; under
torch.func.vmap it runs once per element of the batch. None is differentiable: functional.py owns the gradient.
`library.Library` rather than `library.custom_op`: a third of the dispatch time.
"""

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from tpffn_triton.backends import implementation
from tpffn_triton.kernels.activations import halves
from tpffn_triton.kernels.linear_dact import PARTIAL_ROWS

_library = library.Library("tpffn", "DEF")


def _register(name: str, schema: str, fake: Callable, flops: Callable | None) -> None:
    def run(kind, args):
        results = getattr(implementation(kind), name)(*args)
        if not isinstance(results, tuple):
            return results
        # A schema has no output that is absent.
        return tuple(args[0].new_empty((0,)) if t is None else t for t in results)

    def run_on_cpu(*args):
        if not torch.is_autocast_enabled("cpu"):
            return run("cpu", args)
        # Autocast would also reach into the native implementation and change its dtypes half-way.
        with torch.autocast("cpu", enabled=False):
            return run("cpu", args)

    def run_on_cuda(*args):
        return run("cuda", args)

    def run_batch(info, in_dims, *args):
        def element(arg, dim, i):
            if dim is None:
                return arg
            if info.batch_size == 0:  # anything of the shape
                return arg.new_zeros(arg.movedim(dim, 0).shape[1:])
            return arg.select(dim, i).contiguous()

        results = [
            getattr(torch.ops.tpffn, name)(*(element(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(max(info.batch_size, 1))
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results)[: info.batch_size], 0
        stacked = tuple(torch.stack(outputs)[: info.batch_size] for outputs in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run_on_cpu, "CPU")
    _library.impl(name, run_on_cuda, "CUDA")
    library.register_fake(f"tpffn::{name}", fake, lib=_library)
    if "!" not in schema:  # an element of a batch is a copy
        library.register_vmap(f"tpffn::{name}", run_batch, lib=_library)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.tpffn, name))(flops)


def _fake_ffn_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    keep: str,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
):
    tokens, width = x.shape[0], {"pre_act": w1.shape[0], "act": w2.shape[1]}.get(keep)
    kept = x.new_empty((0,) if width is None else (tokens, width))
    return x.new_empty((tokens, w2.shape[0]), dtype=out_dtype), kept


def _fake_linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre_act: bool):
    tokens, width = x.shape[0], weight.shape[0]
    N = width // halves(activation)
    return x.new_empty((tokens, N)), x.new_empty((tokens, width) if save_pre_act else (0,))


def _fake_linear(a: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None):
    return a.new_empty((a.shape[0], weight.shape[0]), dtype=out_dtype)


def _fake_linear_into(y: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None):
    return None


def _fake_linear_dact(dy: Tensor, weight: Tensor, pre_act: Tensor, activation: str, need_act: bool, need_db: bool):
    tokens, width = pre_act.shape
    act = dy.new_empty((tokens, weight.shape[1]) if need_act else (0,))
    db_partial = dy.new_empty((0,))
    if need_db:
        rows = (tokens + PARTIAL_ROWS - 1) // PARTIAL_ROWS
        db_partial = dy.new_empty((rows, width), dtype=torch.promote_types(dy.dtype, torch.float32))
    return dy.new_empty(pre_act.shape), act, db_partial


def _fake_dgrad(dy: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None):
    return dy.new_empty((dy.shape[0], weight.shape[1]), dtype=out_dtype)


def _fake_wgrad(dy: Tensor, x: Tensor, out_dtype: torch.dtype | None = None):
    return dy.new_empty((dy.shape[1], x.shape[1]), dtype=out_dtype)


def _fake_wgrad_accumulate(dw: Tensor, dy: Tensor, x: Tensor):
    return None


def _fake_column_sum(src: Tensor, out_dtype: torch.dtype | None = None):
    return src.new_empty((src.shape[1],), dtype=out_dtype)


def _fake_bias_grad(src: Tensor | None, dtype: torch.dtype | None, like: Tensor):
    return like.new_empty((0,)) if src is None else _fake_column_sum(src, dtype)


def _fake_weight_grads(
    d_pre: Tensor,
    x: Tensor,
    dy: Tensor,
    act: Tensor,
    db_partial: Tensor | None,
    db2_src: Tensor | None,
    w1_dtype: torch.dtype | None = None,
    w2_dtype: torch.dtype | None = None,
    b1_dtype: torch.dtype | None = None,
    b2_dtype: torch.dtype | None = None,
):
    biases = _fake_bias_grad(db_partial, b1_dtype, d_pre), _fake_bias_grad(db2_src, b2_dtype, d_pre)
    return _fake_wgrad(d_pre, x, w1_dtype), _fake_wgrad(dy, act, w2_dtype), *biases


def _fake_weight_grads_accumulate(
    dw1: Tensor,
    dw2: Tensor,
    d_pre: Tensor,
    x: Tensor,
    dy: Tensor,
    act: Tensor,
    db_partial: Tensor | None,
    db2_src: Tensor | None,
    b1_dtype: torch.dtype | None = None,
    b2_dtype: torch.dtype | None = None,
):
    return _fake_bias_grad(db_partial, b1_dtype, dw1), _fake_bias_grad(db2_src, b2_dtype, dw1)


def _gemm_flops(a_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """2·M·N·K: a is [M, K] and weight has N·K elements, whichever way round."""
    return 2 * a_shape[0] * weight_shape[0] * weight_shape[1]


def _ffn_forward_flops(x_shape, w1_shape, b1_shape, w2_shape, *args, out_shape=None, **kwargs) -> int:
    return _gemm_flops(x_shape, w1_shape) + _gemm_flops(x_shape, w2_shape)


def _linear_into_flops(y_shape, a_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return _gemm_flops(a_shape, weight_shape)


def _wgrad_flops(dy_shape, x_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * dy_shape[0] * dy_shape[1] * x_shape[1]


def _wgrad_accumulate_flops(dw_shape, dy_shape, x_shape, *args, out_shape=None, **kwargs) -> int:
    return _wgrad_flops(dy_shape, x_shape)


def _weight_grads_flops(d_pre_shape, x_shape, dy_shape, act_shape, *args, out_shape=None, **kwargs) -> int:
    return _wgrad_flops(d_pre_shape, x_shape) + _wgrad_flops(dy_shape, act_shape)


def _weight_grads_accumulate_flops(dw1_shape, dw2_shape, *matrices, out_shape=None, **kwargs) -> int:
    return _weight_grads_flops(*matrices)


_register(
    "ffn_forward",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, str keep, ScalarType? out_dtype=None,"
    " bool batch_invariant=False)"
    " -> (Tensor, Tensor)",
    _fake_ffn_forward,
    _ffn_forward_flops,
)
_register(
    "linear_act",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, bool save_pre_act) -> (Tensor, Tensor)",
    _fake_linear_act,
    _gemm_flops,
)
_register(
    "linear",
    "(Tensor a, Tensor weight, Tensor? bias, ScalarType? out_dtype=None) -> Tensor",
    _fake_linear,
    _gemm_flops,
)
_register(
    "linear_into",
    "(Tensor(a!) y, Tensor a, Tensor weight, Tensor? bias) -> ()",
    _fake_linear_into,
    _linear_into_flops,
)
_register(
    "linear_dact",
    "(Tensor dy, Tensor weight, Tensor pre_act, str activation, bool need_act, bool need_db)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_linear_dact,
    _gemm_flops,
)
_register("dgrad", "(Tensor dy, Tensor weight, ScalarType? out_dtype=None) -> Tensor", _fake_dgrad, _gemm_flops)
_register("wgrad", "(Tensor dy, Tensor x, ScalarType? out_dtype=None) -> Tensor", _fake_wgrad, _wgrad_flops)
_register(
    "wgrad_accumulate",
    "(Tensor(a!) dw, Tensor dy, Tensor x) -> ()",
    _fake_wgrad_accumulate,
    _wgrad_accumulate_flops,
)
_register("column_sum", "(Tensor src, ScalarType? out_dtype=None) -> Tensor", _fake_column_sum, None)
_register(
    "weight_grads",
    "(Tensor d_pre, Tensor x, Tensor dy, Tensor act, Tensor? db_partial, Tensor? db2_src, ScalarType? w1_dtype=None,"
    " ScalarType? w2_dtype=None, ScalarType? b1_dtype=None, ScalarType? b2_dtype=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_weight_grads,
    _weight_grads_flops,
)
_register(
    "weight_grads_accumulate",
    "(Tensor(a!) dw1, Tensor(b!) dw2, Tensor d_pre, Tensor x, Tensor dy, Tensor act, Tensor? db_partial,"
    " Tensor? db2_src, ScalarType? b1_dtype=None, ScalarType? b2_dtype=None) -> (Tensor, Tensor)",
    _fake_weight_grads_accumulate,
    _weight_grads_accumulate_flops,
)

_NAMES = (
    *("ffn_forward", "linear_act", "linear", "linear_into", "linear_dact", "dgrad", "wgrad", "wgrad_accumulate"),
    *("weight_grads", "weight_grads_accumulate", "column_sum"),
)
REGISTERED = SimpleNamespace(**{name: getattr(torch.ops.tpffn, name).default for name in _NAMES})
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def kernels(*tensors: Tensor | None) -> ModuleType | SimpleNamespace:
    """Return what to call on these tensors: the registered operators; or the functions behind them, where nothing looks
    at operators: no tracing, transform, mode, profiler or autocast is active and no tensor is of a subclass.

    The dispatcher's 3 µs a call are a tenth of the host's time for a forward.
    """
    first = tensors[0]
    kind = "cpu" if first.is_cpu else "cuda" if first.is_cuda else None  # type: ignore[union-attr]
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or torch.autograd.profiler._is_profiler_enabled
        or kind is None
        or torch.is_autocast_enabled(kind)
        or not _PLAIN.issuperset(map(type, tensors))
    ):
        return REGISTERED
    return implementation(kind)
