"""Say what a peer is: one way to compute one rank's FFN, where it exists, and what it needs where it is not."""

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import checkout  # noqa: F401
from implementations import Forward
from torch import Tensor
from workloads import DTYPES, MODES, Problem

from tpffn_triton.kernels.activations import ACTIVATIONS

# Names of peers that others are held against; the last computes less than the FFN: no bias, no activation.
FUSED, EAGER, TWO_GEMMS = "fused", "eager", "two-gemms"


@dataclass(frozen=True)
class Place:
    """What is measured, and on what: `capability` of a CUDA device, (0, 0) elsewhere."""

    device_type: str
    dtype: str
    activation: str
    capability: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class Peer:
    """build(activation) -> forward(x [1, M, H], w1 [F/P, H], b1 [F/P], w2 [H, F/P], b2 [H], None) -> y [1, M, H]

    gated activations: w1 [2F/P, H], b1 [2F/P].

    computes   device type → the activations it computes there
    shapes     the names of the only ones it is timed at; None: any
    least      least CUDA capability
    missing    of a place: returns what it needs that is not installed, None: nothing
    package    the distribution whose version tells what was measured
    reference  of a problem and an activation: its own fp64 results; None: the FFN's
    ours       whether it is tpffn_triton's
    launchers  what computes in the place of the package's own (exchanged_launchers.py)
    """

    name: str
    label: str
    build: Callable[[str], Forward]
    computes: Mapping[str, Iterable[str]] = field(default_factory=lambda: {"cpu": ACTIVATIONS, "cuda": ACTIVATIONS})
    dtypes: tuple[str, ...] = tuple(DTYPES)
    modes: tuple[str, ...] = MODES
    shapes: tuple[str, ...] | None = None
    least: tuple[int, int] = (0, 0)
    missing: Callable[[Place], str | None] = lambda place: None
    package: str | None = None
    reference: Callable[[Problem, str], dict[str, Tensor]] | None = None
    ours: bool = False
    launchers: Mapping[str, Callable] = field(default_factory=dict)

    def reason_against(self, place: Place) -> str | None:
        """Say why it is not here; None: it is."""
        if place.device_type not in self.computes:
            return f"runs on {', '.join(self.computes)} alone, not on {place.device_type}"
        if place.dtype not in self.dtypes:
            return f"takes {', '.join(self.dtypes)}, not {place.dtype}"
        computes = self.computes[place.device_type]
        if place.activation not in computes:
            return f"computes {', '.join(computes)} on {place.device_type}, not {place.activation}"
        if place.capability < self.least:
            least, found = (f"{major}.{minor}" for major, minor in (self.least, place.capability))
            return f"needs compute capability {least}, this device has {found}"
        return self.missing(place)

    def is_timed(self, shape: str, mode: str) -> bool:
        """Say whether it is timed at the shape of this name, in this mode."""
        return mode in self.modes and (self.shapes is None or shape in self.shapes)


def importable(module: str, install: str) -> Callable[[Place], str | None]:
    """Return a Peer's `missing`: what to install where the module cannot be imported."""

    @functools.cache
    def missing(place: Place) -> str | None:
        try:
            importlib.import_module(module)
        except Exception as error:  # a vendor's library raises what it likes where a library of its own is missing
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            return f"needs {module} ({reason}): pip install {install}"
        return None

    return missing
