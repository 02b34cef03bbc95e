"""Register every kernel as a PyTorch operator: `torch.ops.tpffn.*`.

    linear_act(x, weight, bias?, activation, save_pre_act) -> (act, pre_act)
    linear(a, weight, bias?) -> y
    linear_dact(dy, weight, pre_act, activation, need_act, need_db) -> (d_pre, act, db)
    dgrad(dy, weight) -> dx
    wgrad(dy, x) -> dw
    column_sum(src) -> out

Shapes and dtypes: kernels/. Each has CUDA and CPU implementations (backends.py chooses), a fake one for tracing, and a
FLOP formula for torch.utils.flop_counter. None is differentiable: functional.py owns the gradient.
`torch.library.Library` rather than `custom_op`: a third of the dispatch time.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tpffn_triton.backends import implementation

_library = torch.library.Library("tpffn", "DEF")


def _register(name: str, schema: str, fake: Callable, flops: Callable | None) -> None:
    def run(*args):
        function = getattr(implementation(args[0].device), name)
        if not torch.is_autocast_enabled("cpu"):
            return function(*args)
        # Autocast would also reach into the native implementation and change its dtypes half-way.
        with torch.autocast("cpu", enabled=False):
            return function(*args)

    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(f"tpffn::{name}", fake, lib=_library)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.tpffn, name))(flops)


def _fake_linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre_act: bool):
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save_pre_act else (0,))


def _fake_linear(a: Tensor, weight: Tensor, bias: Tensor | None):
    return a.new_empty((a.shape[0], weight.shape[0]))


def _fake_linear_dact(dy: Tensor, weight: Tensor, pre_act: Tensor, activation: str, need_act: bool, need_db: bool):
    act = dy.new_empty(pre_act.shape if need_act else (0,))
    return dy.new_empty(pre_act.shape), act, dy.new_empty((weight.shape[1] if need_db else 0,))


def _fake_dgrad(dy: Tensor, weight: Tensor):
    return dy.new_empty((dy.shape[0], weight.shape[1]))


def _fake_wgrad(dy: Tensor, x: Tensor):
    return dy.new_empty((dy.shape[1], x.shape[1]))


def _fake_column_sum(src: Tensor):
    return src.new_empty((src.shape[1],))


def _gemm_flops(a_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """2·M·N·K: a is [M, K] and weight has N·K elements, whichever way round."""
    return 2 * a_shape[0] * weight_shape[0] * weight_shape[1]


def _wgrad_flops(dy_shape, x_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * dy_shape[0] * dy_shape[1] * x_shape[1]


_register(
    "linear_act",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, bool save_pre_act) -> (Tensor, Tensor)",
    _fake_linear_act,
    _gemm_flops,
)
_register("linear", "(Tensor a, Tensor weight, Tensor? bias) -> Tensor", _fake_linear, _gemm_flops)
_register(
    "linear_dact",
    "(Tensor dy, Tensor weight, Tensor pre_act, str activation, bool need_act, bool need_db)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_linear_dact,
    _gemm_flops,
)
_register("dgrad", "(Tensor dy, Tensor weight) -> Tensor", _fake_dgrad, _gemm_flops)
_register("wgrad", "(Tensor dy, Tensor x) -> Tensor", _fake_wgrad, _wgrad_flops)
_register("column_sum", "(Tensor src) -> Tensor", _fake_column_sum, None)

linear_act = torch.ops.tpffn.linear_act
linear = torch.ops.tpffn.linear
linear_dact = torch.ops.tpffn.linear_dact
dgrad = torch.ops.tpffn.dgrad
wgrad = torch.ops.tpffn.wgrad
column_sum = torch.ops.tpffn.column_sum
