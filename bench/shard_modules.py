"""Have a module compute with the harness's own tensors, in which backward is to leave its gradients."""

import operator
from collections.abc import Callable
from typing import Any


class OnShards:
    """A module that `make` makes of tensors, and whatever goes with them; again where it is called with others."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self.given: tuple[Any, ...] = ()
        self.module: Any = None

    def __call__(self, *given: Any) -> Any:
        """Return the module of what is given."""
        if self.module is None or any(map(operator.is_not, given, self.given)):
            self.module, self.given = self.make(*given), given
        return self.module
