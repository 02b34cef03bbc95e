"""Draw without a display, and write what was drawn."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """Return matplotlib.pyplot, without a display. Raises: ModuleNotFoundError: no matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def legend(figure: Any, axes: Iterable[Any], **options: Any) -> None:
    """Put one legend of all axes' labels, each once, below a figure; options: its legend's."""
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", frameon=False, **options)


def write(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure to path, whose suffix chooses the format, and let go of it; options: savefig's."""
    figure.savefig(path, dpi=150, **options)
    pyplot().close(figure)
