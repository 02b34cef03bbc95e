"""Let Megatron-Core run on CPU tensors, over gloo, in a process without a GPU.

Megatron-Core names CUDA in places where a CPU would do: tensors made with device="cuda", `.cuda()`, the type name
"torch.cuda.FloatTensor", the current device, the random state. Here these lead to the CPU. Its fused activations are
compiled functions; here they run eagerly, so that no compiler is needed.

    run_on_cpu()    # once a process, before the first import of megatron.core

Models are to be built with use_cpu_initialization=True. Dropout draws from the CPU's random state, which Megatron's
trackers do not switch: not for a comparison of dropout.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _CudaLeadsToCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0]
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        if func is Tensor.type and isinstance(result, str):  # "torch.FloatTensor"
            return result.replace("torch.", "torch.cuda.")
        return result


def run_on_cpu() -> None:
    """Redirect this process, for good.

    Raises: RuntimeError: this process has a GPU.
    """
    if torch.cuda.is_available():
        raise RuntimeError("run_on_cpu() is for processes without a GPU")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.set_device = lambda device: None
    cuda.current_stream = torch.cpu.current_stream
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.manual_seed = torch.manual_seed
    cuda.synchronize = lambda device=None: None
    torch.compiler.set_stance("force_eager")
    _CudaLeadsToCpu().__enter__()
