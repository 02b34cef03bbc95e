"""Compute a step of tpffn_triton.ffn by other launchers than the package's own: same operators, host included."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import checkout  # noqa: F401
from steps import Step
from torch import Tensor

from tpffn_triton.backends import implementation

T = TypeVar("T")


def launched_by(kind: str, launchers: Mapping[str, Callable], make: Callable[[], Step]) -> Step:
    """Return the step that `make` makes, with these launchers if there are any; kind: of device."""
    return LaunchedBy(kind, launchers, make) if launchers else make()


class LaunchedBy(Step):
    """A step of ffn, made and run with these launchers in place of the package's own.

    They are exchanged for each call, inside what is timed: two updates of a dictionary, the host's for 1 µs or less.
    """

    def __init__(self, kind: str, exchanged: Mapping[str, Callable], make: Callable[[], Step]) -> None:
        self.kernels, self.exchanged = vars(implementation(kind)), exchanged
        self.own = {name: self.kernels[name] for name in exchanged}
        self.step = self._with_exchanged(make)
        step = self.step
        super().__init__(step.forward, step.problem, step.group, step.mode)

    def _with_exchanged(self, call: Callable[[], T]) -> T:
        self.kernels.update(self.exchanged)
        try:
            return call()
        finally:
            self.kernels.update(self.own)

    def reset(self) -> None:
        """Reset the step."""
        self.step.reset()

    def __call__(self) -> None:
        """Compute."""
        self._with_exchanged(self.step)

    def outputs(self) -> dict[str, Tensor]:
        """Return the step's last results."""
        return self.step.outputs()
