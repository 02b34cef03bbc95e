"""Give each kernel something to compute in a case: its tensors, its launch, torch's own GEMM and the truth in fp64.

x, dy and pre_act are drawn from N(0, 1), weights and biases from U(±1/√(their reduction)): results are of order 1.
Whatever a kernel may store is stored, and the activation is the heaviest, gelu or geglu: that is the variant which the
filter has compiled, so that a launch finds it in Triton's cache.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from tune_candidates import dtype_of
from tune_cases import Case
from workloads import Draws

from tpffn_triton.kernels._configs import Config, arch_of
from tpffn_triton.kernels.activations import halves
from tpffn_triton.kernels.ffn_few_tokens import ffn_few_tokens
from tpffn_triton.kernels.ffn_single_launch import ffn_single_launch
from tpffn_triton.kernels.forward import DEPENDENT_LAUNCHES
from tpffn_triton.kernels.linear_act import linear_act
from tpffn_triton.kernels.linear_dact import PARTIAL_ROWS, linear_dact
from tpffn_triton.kernels.matmul import dgrad, linear, wgrad
from tpffn_triton.kernels.weight_grads import weight_grads
from tpffn_triton.reference import ACTIVATIONS

PLAIN, GATED = "gelu", "geglu"
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """What a case computes.

    launch   config → the kernel's results, by name
    torch    the same by torch's GEMM (cuBLAS), None where it is more than one
    truth    the same in fp64
    """

    launch: Callable[[Config], Outputs]
    torch: Callable[[], Outputs] | None
    truth: Callable[[], Outputs]


def workload(case: Case, device: torch.device) -> Workload:
    """Return a case's workload, its tensors on the device. Raises: KeyError: an unknown kernel."""
    kernel = case.kernel.removeprefix("gated_")
    make = {
        "ffn": _ffn,
        "few_tokens": _ffn,
        "linear_act": _linear_act,
        "linear_dact": _linear_dact,
        "weight_grads": _weight_grads,
    }
    make |= {"linear": _linear, "dgrad": _dgrad, "wgrad": _wgrad}
    return make[kernel](case, Draws(dtype_of(case), device))


def _activation(case: Case) -> str:
    return GATED if case.kernel.startswith("gated_") else PLAIN


def _linear(case: Case, drawn: Draws) -> Workload:
    a, bias = drawn.normal(case.rows, case.inner), drawn.uniform(case.inner, case.cols)
    weight = drawn.uniform(case.inner, case.cols, case.inner)
    return Workload(
        lambda config: {"y": linear(a, weight, bias, config=config)},
        lambda: {"y": F.linear(a, weight, bias)},
        lambda: {"y": F.linear(a.double(), weight.double(), bias.double())},
    )


def _dgrad(case: Case, drawn: Draws) -> Workload:
    dy, weight = drawn.normal(case.rows, case.inner), drawn.uniform(case.inner, case.inner, case.cols)
    return Workload(
        lambda config: {"dx": dgrad(dy, weight, config=config)},
        lambda: {"dx": dy @ weight},
        lambda: {"dx": dy.double() @ weight.double()},
    )


def _wgrad(case: Case, drawn: Draws) -> Workload:
    dy, x = drawn.normal(case.inner, case.rows), drawn.normal(case.inner, case.cols)
    return Workload(
        lambda config: {"dw": wgrad(dy, x, config=config)},
        lambda: {"dw": dy.T @ x},
        lambda: {"dw": dy.double().T @ x.double()},
    )


def _linear_act(case: Case, drawn: Draws) -> Workload:
    activation = _activation(case)
    width = halves(activation) * case.cols
    x, weight = drawn.normal(case.rows, case.inner), drawn.uniform(case.inner, width, case.inner)
    bias = drawn.uniform(case.inner, width)

    # Where it can be the first of two dependent launches, it is compiled as that.
    first = arch_of(x.device) in DEPENDENT_LAUNCHES

    def launch(config: Config) -> Outputs:
        act, pre_act = linear_act(x, weight, bias, activation, True, config, has_dependent=first)
        assert pre_act is not None
        return {"act": act, "pre_act": pre_act}

    def truth() -> Outputs:
        pre_act = F.linear(x.double(), weight.double(), bias.double())
        return {"act": ACTIVATIONS[activation](pre_act), "pre_act": pre_act}

    return Workload(launch, None, truth)


def _linear_dact(case: Case, drawn: Draws) -> Workload:
    activation = _activation(case)
    dy, weight = drawn.normal(case.rows, case.inner), drawn.uniform(case.inner, case.inner, case.cols)
    pre_act = drawn.normal(case.rows, halves(activation) * case.cols)

    def launch(config: Config) -> Outputs:
        d_pre, act, db_partial = linear_dact(dy, weight, pre_act, activation, True, True, config)
        assert act is not None
        assert db_partial is not None
        return {"d_pre": d_pre, "act": act, "db_partial": db_partial}

    def truth() -> Outputs:
        wide = pre_act.double().requires_grad_()
        act = ACTIVATIONS[activation](wide)
        (d_pre,) = torch.autograd.grad(act, wide, dy.double() @ weight.double())
        padded = F.pad(d_pre, (0, 0, 0, -case.rows % PARTIAL_ROWS))
        partial = padded.unflatten(0, (-1, PARTIAL_ROWS)).sum(1)
        return {"d_pre": d_pre, "act": act.detach(), "db_partial": partial}

    return Workload(launch, None, truth)


def _ffn(case: Case, drawn: Draws) -> Workload:
    activation = _activation(case)
    width = halves(activation) * case.cols
    x, w1 = drawn.normal(case.rows, case.inner), drawn.uniform(case.inner, width, case.inner)
    b1, b2 = drawn.uniform(case.inner, width), drawn.uniform(case.cols, case.inner)
    w2 = drawn.uniform(case.cols, case.inner, case.cols)

    launcher = ffn_few_tokens if case.kernel.endswith("few_tokens") else ffn_single_launch

    def launch(config: Config) -> Outputs:
        y, act, pre_act = launcher(x, w1, b1, w2, b2, activation, True, config=config)
        assert pre_act is not None
        return {"y": y, "act": act, "pre_act": pre_act}

    def truth() -> Outputs:
        pre_act = F.linear(x.double(), w1.double(), b1.double())
        act = ACTIVATIONS[activation](pre_act)
        return {"y": F.linear(act, w2.double(), b2.double()), "act": act, "pre_act": pre_act}

    return Workload(launch, None, truth)


def _weight_grads(case: Case, drawn: Draws) -> Workload:
    # Of W + F/P only the sum is known, which is what counts.
    tokens, hidden, features = case.inner, case.cols, case.rows // 2
    width = case.rows - features
    d_pre, x, dy = drawn.normal(tokens, width), drawn.normal(tokens, hidden), drawn.normal(tokens, hidden)
    act = drawn.normal(tokens, features)
    partial = drawn.normal(triton.cdiv(tokens, PARTIAL_ROWS), width).float()

    def launch(config: Config) -> Outputs:
        dw1, dw2, db1, db2 = weight_grads(d_pre, x, dy, act, partial, dy, b1_dtype=dy.dtype, config=config)
        assert db1 is not None
        assert db2 is not None
        return {"dw1": dw1, "dw2": dw2, "db1": db1, "db2": db2}

    def truth() -> Outputs:
        dw1, dw2 = d_pre.double().T @ x.double(), dy.double().T @ act.double()
        return {"dw1": dw1, "dw2": dw2, "db1": partial.double().sum(0), "db2": dy.double().sum(0)}

    return Workload(launch, None, truth)
