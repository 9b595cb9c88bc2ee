"""How every picture looks.

Owns: colours, type, frames, how numbers are written, and the file with the digest of what it was
drawn from. Promises: the same figures give the same bytes for one version of the plotting library.
Called by plot.py. Knows no figure.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, Final

COLOURS: Final = {
    "ours": "#0b6e75",
    "peer": "#c4622d",
    "paper": "#75629c",
    "limit": "#2b2b2b",
    "goal": "#dcefe2",
    "reached": "#2f8f57",
}
DIGEST_KEY: Final = "Source"
_STYLE: Final = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": "#bbbbbb",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "xtick.color": "#444444",
    "ytick.color": "#222222",
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """The pictures' style; raises ImportError where matplotlib is not installed."""
    import matplotlib as mpl

    mpl.use("Agg")
    with mpl.rc_context(_STYLE):
        yield


def frame(width: float, height: float, *, columns: int = 1) -> Any:
    """A picture of so many inches and its axes."""
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")
    for one in [axes] if columns == 1 else axes:
        one.grid(axis="y", visible=columns > 1)
    return picture, axes


def label_at(
    axes: Any,
    text: str,
    at: tuple[float, float],
    up: float,
    *,
    size: float,
    colour: str,
    weight: str = "normal",
) -> None:
    """Text so many points above a place, or below it; lines behind it do not cross it."""
    from matplotlib import patheffects

    side = {"ha": "center", "va": "bottom" if up > 0 else "top", "linespacing": 0.95}
    style = {"fontsize": size, "color": colour, "weight": weight, "zorder": 7}
    said = axes.annotate(text, at, (0, up), textcoords="offset points", **side, **style)
    said.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])


def save_picture(picture: Any, path: pathlib.Path, digest: str) -> None:
    """Write it with the digest, or remove the old one where there is nothing to draw."""
    if picture is None:
        path.unlink(missing_ok=True)
        print(f"plot: nothing measured for {path.name}", file=sys.stderr)
        return
    from matplotlib import pyplot

    picture.savefig(path, dpi=144, metadata={DIGEST_KEY: digest, "Software": None})
    pyplot.close(picture)
    print(path)


def say_time(us: float) -> str:
    """Microseconds in the unit that has the fewest digits."""
    for size, unit in ((1e6, "s"), (1e3, "ms"), (1.0, "µs"), (1e-3, "ns")):
        if us >= size * 0.9995:
            return f"{us / size:.3g} {unit}"
    return f"{us * 1e3:.2g} ns"


def length(tokens: int) -> str:
    """Tokens as 8K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
