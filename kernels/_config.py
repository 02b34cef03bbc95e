"""The kernels that are configured, and one tile configuration: the constants of a compiled variant of a kernel."""

from dataclasses import asdict, dataclass
from functools import cached_property

PLAIN_GEMMS = ("linear", "dgrad", "wgrad", "weight_grads")
_OF_ACTIVATIONS = ("ffn", "few_tokens", "linear_act", "linear_dact")
KERNELS = (*_OF_ACTIVATIONS, *(f"gated_{kernel}" for kernel in _OF_ACTIVATIONS), *PLAIN_GEMMS)
ARITHMETICS = ("16bit", "tf32", "ieee")


@dataclass(frozen=True)
class Config:
    """Constants of one compiled variant.

    BLOCK_M × BLOCK_N   output tile; BLOCK_K is the step through the reduction
    num_warps, num_stages   warps a program, depth of the software pipeline
    USE_TMA             tensor descriptors instead of pointers; needs 16-byte aligned bases and row strides
    SPLIT_EPILOGUE      work on the accumulator in two column halves
    GROUP_M             row tiles that share their columns of tiles in L2
    SPLIT_K, PREFETCH_K     slices of the reduction, and columns of w2 that are fetched early; of few_tokens alone
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    USE_TMA: bool = False
    SPLIT_EPILOGUE: bool = False
    GROUP_M: int = 8
    SPLIT_K: int = 1
    PREFETCH_K: int = 0
    origin: str = "compiles"

    @property
    def STORED_N(self) -> int:
        """Columns of a tile that the epilogue loads and stores at once."""
        return self.BLOCK_N // 2 if self.SPLIT_EPILOGUE else self.BLOCK_N

    @cached_property
    def meta(self) -> dict:
        """The keyword arguments of a launch."""
        return {key: value for key, value in asdict(self).items() if key != "origin"}
