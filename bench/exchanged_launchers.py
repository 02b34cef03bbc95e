"""Compute a step of tpffn_triton.ffn by other launchers than the package's own: same operators, host included."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import checkout  # noqa: F401
from steps import Step
from torch import Tensor

from tpffn_triton.backends import implementation


def launched_by(kind: str, launchers: Mapping[str, Callable], make: Callable[[], Step]) -> Step:
    """Return the step that `make` makes, with these launchers if there are any; kind: of device."""
    return LaunchedBy(kind, launchers, make) if launchers else make()


class LaunchedBy(Step):
    """A step of ffn, made and run with these launchers in place of the package's own."""

    def __init__(self, kind: str, exchanged: Mapping[str, Callable], make: Callable[[], Step]) -> None:
        self.kernels, self.exchanged = vars(implementation(kind)), exchanged
        with self._in_place():
            self.step = make()
        step = self.step
        super().__init__(step.forward, step.problem, step.group, step.mode)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        own = {name: self.kernels[name] for name in self.exchanged}
        self.kernels.update(self.exchanged)
        try:
            yield
        finally:
            self.kernels.update(own)

    def reset(self) -> None:
        """Reset the step."""
        self.step.reset()

    def __call__(self) -> None:
        """Compute."""
        with self._in_place():
            self.step()

    def outputs(self) -> dict[str, Tensor]:
        """Return the step's last results."""
        return self.step.outputs()
