"""Figures as inline SVG whose colours follow the page: light, dark and print.

Series use the palette of Okabe and Ito (2008), safe for colour-blind readers. matplotlib draws
with placeholder colours; :func:`to_svg` replaces each by a CSS variable of the page.
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "EMPTY",
    "INK",
    "Panel",
    "legend",
    "new_figure",
    "style",
    "to_svg",
]

# Placeholder -> CSS variable. No other code may use exactly these colours.
INK, GRID, EMPTY = "#010203", "#040506", "#0a0b0c"
COLOURS = {
    "reference": "#100001",
    "chain": "#100002",
    "flow": "#100003",
    "raw": "#100004",
    "prior": "#100005",
    "alert": "#100006",
    "sky": "#100007",
}
_VARIABLES = {INK: "--ink", GRID: "--grid", EMPTY: "--empty"} | {
    value: f"--c-{key}" for key, value in COLOURS.items()
}
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "svg.fonttype": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.unicode_minus": True,
    "image.cmap": "cividis",
}


@dataclass(frozen=True)
class Panel:
    """One figure of the report: short title, SVG, a caption that says how to read it."""

    key: str
    title: str
    svg: str
    caption: str


def style() -> contextlib.AbstractContextManager[None]:
    """Return the matplotlib settings of the report; draw every figure inside it."""
    return matplotlib.rc_context(_STYLE)


def new_figure(height: float = 2.7, width: float = 3.7) -> tuple[Figure, Axes]:
    """One set of axes, sized so that its text is readable on a phone without zooming (inches)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def legend(figure: Figure, axes: Axes) -> None:
    """Put the legend above the axes, in two columns, where it hides no data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=2, columnspacing=1.0, handlelength=1.7
    )


def to_svg(figure: Figure, key: str, description: str) -> str:
    """Render to inline SVG with unique ids, CSS colours and a text for screen readers."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{key}-\1"', text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, f"var({variable})")
    # Fixed sizes would not shrink on a narrow screen; the viewBox keeps the proportions.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # The page's own font: names listed by matplotlib may not exist on the reader's machine.
    text = re.sub(r"font-family: [^;]+; ?", "", text)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    label = description.replace("&", "and").replace("<", "").replace('"', "'")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()
