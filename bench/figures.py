"""Draw without a display, and write what was drawn."""

from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """Return matplotlib.pyplot, without a display. Raises: ModuleNotFoundError: no matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def write(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure to path, whose suffix chooses the format, and let go of it; options: savefig's."""
    figure.savefig(path, dpi=150, **options)
    pyplot().close(figure)
