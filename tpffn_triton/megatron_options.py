"""What a Megatron-Core TransformerConfig asks of an MLP: which activation, and what is not computed here.

Read by attribute, so that a config of any version will do; nothing of megatron-core is imported.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tpffn_triton.kernels.activations import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS
from tpffn_triton.reference import ACTIVATIONS

# Options that change how an MLP computes; those of the second list act on gated MLPs alone. Older versions lack some.
_REFUSED = (
    "fp8",
    "fp4",
    "cpu_offloading",
    "use_te_activation_func",
    "activation_func_fp8_input_store",
    "use_kitchen",
    "batch_invariant_mode",
)
_REFUSED_WHERE_GATED = ("glu_linear_offset", "activation_func_clamp_value")
_GATED = {plain: gated for gated, plain in GATED_ACTIVATIONS.items()}


def check_options(config: Any) -> None:
    """Raises: ValueError: an option that FusedMLP does not honour is set; names it and its value."""
    names = _REFUSED + (_REFUSED_WHERE_GATED if config.gated_linear_unit else ())
    for name in names:
        value = getattr(config, name, None)
        if value is not None and value is not False and value != 0:
            raise ValueError(f"FusedMLP does not support {name}={value!r}: use Megatron's MLP for it")


def activation_of(config: Any) -> str:
    """Return the name in `tpffn_triton.ffn` of the activation that Megatron's MLP applies under this config.

    With bias_activation_fusion Megatron runs kernels of its own, in which gelu and geglu are the tanh approximation;
    without it, config.activation_func: F.gelu there is erf.

    Raises: ValueError: an activation_func that is none of ours, is not gated here, or that Megatron cannot fuse.
    """
    function, gated = config.activation_func, config.gated_linear_unit
    if config.bias_activation_fusion:
        if function is not F.gelu and not (function is F.silu and gated):
            raise ValueError(
                f"bias_activation_fusion is for F.gelu and, with gated_linear_unit, F.silu; got {_shown(function)}, "
                f"gated_linear_unit={gated}"
            )
        name = "gelu_tanh" if function is F.gelu else "silu"
    else:
        name = _plain_name(function)
    if gated and name not in _GATED:
        raise ValueError(f"gated_linear_unit goes with {', '.join(_GATED)}; got {_shown(function)}, which is {name}")
    return _GATED[name] if gated else name


def _plain_name(function: Any) -> str:
    """Name a function by its values: it may be a partial, a lambda, torch.relu or a model's own squared ReLU."""
    z = torch.linspace(-12, 12, 1201, dtype=torch.float64, device="cpu")
    # Megatron compiles some of its own; for one look that would take seconds, and a C++ compiler.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            values = function(z)
        except Exception as error:
            raise ValueError(f"activation_func {_shown(function)} does not take an fp64 tensor on the CPU") from error
        if isinstance(values, Tensor) and values.shape == z.shape:
            for name in PLAIN_ACTIVATIONS:
                # Constants of ten digits are within this; erf and tanh are 5e-4 apart, sigmoid(1.702 z) 2e-2.
                if torch.allclose(values.double(), ACTIVATIONS[name](z), rtol=1e-8, atol=1e-8):
                    return name
    raise ValueError(f"activation_func {_shown(function)} is none of {', '.join(PLAIN_ACTIVATIONS)}")


def _shown(function: Any) -> str:
    return getattr(function, "__name__", None) or repr(function)
