"""A limit of time that is divided over what is to be done."""

from __future__ import annotations

import time


class Budget:
    """Seconds from now on; None: no limit."""

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Return the seconds left, at least 0; None: no limit."""
        return None if self.end is None else max(0.0, self.end - time.monotonic())

    def is_spent(self) -> bool:
        """Say whether nothing is left."""
        return self.left() == 0

    def share(self, of: int) -> Budget:
        """Return one of so many equal shares of what is left."""
        left = self.left()
        return Budget(None if left is None else left / of)
