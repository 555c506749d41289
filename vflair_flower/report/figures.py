"""Curves and bars as inline SVG: text stays text, ids are unique, nothing points outside the page.

matplotlib draws, without pyplot and without a display.  Names of parties never go into a picture, legends are HTML:
both then wrap, scale and are escaped like the rest of the page.
"""

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

BLUE = "#1f5fbf"
AMBER = "#f0b866"
GREY = "#6b7482"
PARTS = ("#1f5fbf", "#8fb6ea", "#e0a23c", "#7a6bb8", "#5aa88f", "#c8657b", "#9aa3b2")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a picture; `style` is ``"thin"``, ``"wide"`` (drawn beneath) or ``"dashed"``."""

    values: Sequence[float | None]
    color: str
    style: str


def curves(curves: Sequence[Curve], *, ident: str, rounds: Sequence[int], fractions: bool) -> str:
    """Draw lines over rounds and return the SVG.

    Parameters
    ----------
    curves : sequence of Curve
        Each with one value per round; ``None`` leaves a gap.
    ident : str
        Prefix of every id in the SVG; must be unique on its page.
    rounds : sequence of int
        Round numbers.
    fractions : bool
        Whether values lie in 0..1 and are shown as %.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    with style():
        figure = Figure(figsize=(4.7, 2.6))
        axes = figure.add_axes((0.1, 0.16, 0.87, 0.79))
        marker_size = 4.0 if len(rounds) <= 40 else 0.0
        for curve in curves:
            values = [float("nan") if value is None else value for value in curve.values]
            if curve.style == "dashed":
                axes.axhline(values[0], color=curve.color, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
            elif curve.style == "wide":
                axes.plot(rounds, values, color=curve.color, linewidth=6, marker="o", markersize=2.2 * marker_size,
                          solid_capstyle="round", solid_joinstyle="round", markeredgewidth=0, zorder=2)  # fmt: skip
            else:
                axes.plot(
                    rounds, values, color=curve.color, linewidth=1.8, marker="o", markersize=marker_size, zorder=3
                )
        _round_ticks(axes, rounds)
        if rounds:
            axes.set_xlim(min(rounds) - 0.35 - 0.01 * len(rounds), max(rounds) + 0.35 + 0.01 * len(rounds))
        if fractions:
            axes.set_ylim(0, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))
        else:
            known = [value for curve in curves for value in curve.values if value is not None]
            axes.set_ylim(0, 1.06 * max([*known, 1e-9]))
        axes.set_xlabel("round")
        quiet(axes)
        return svg_of(figure, ident)


def stacked_bars(parts: Mapping[str, Sequence[float]], *, ident: str, rounds: Sequence[int]) -> str:
    """Draw one bar per round, stacked of named parts in seconds, and return the SVG; colours are `PARTS` in order."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(4.7, 2.6))
        axes = figure.add_axes((0.1, 0.16, 0.87, 0.79))
        below = [0.0] * len(rounds)
        for index, values in enumerate(parts.values()):
            axes.bar(rounds, values, bottom=below, color=PARTS[index % len(PARTS)], width=0.62, zorder=2)
            below = [low + value for low, value in zip(below, values, strict=True)]
        _round_ticks(axes, rounds)
        if rounds:
            spare = max(0.7, (5 - len(rounds)) / 2)  # few bars stay narrow and in the middle
            axes.set_xlim(min(rounds) - spare, max(rounds) + spare)
        axes.set_xlabel("round")
        axes.yaxis.set_major_formatter("{x:g} s")
        quiet(axes)
        return svg_of(figure, ident)


def style() -> AbstractContextManager[None]:
    """Return the settings that all pictures are drawn under."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "vflair",  # the same result gives the same bytes
            "text.parse_math": False,
            "font.family": "sans-serif",
            "font.size": 8.5,
            "axes.edgecolor": "#b8bfca",
            "axes.linewidth": 0.8,
            "xtick.color": "#5a6473",
            "ytick.color": "#5a6473",
            "axes.labelcolor": "#5a6473",
        }
    )


def _round_ticks(axes: object, rounds: Sequence[int]) -> None:
    """Mark rounds that there were, and all of them when they are few."""
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator

    assert isinstance(axes, Axes)
    if len(rounds) <= 8:
        axes.set_xticks(list(rounds))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def quiet(axes: object) -> None:
    """Leave out every line that says nothing."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, pad=5)
    axes.grid(axis="y", color="#e6e9ee", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)


def svg_of(figure: object, ident: str) -> str:
    """Return the picture as an element that can stand beside others in one page."""
    from matplotlib.figure import Figure

    assert isinstance(figure, Figure)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return embedded(text.getvalue(), ident)


def embedded(svg: str, ident: str) -> str:
    """Make a whole SVG file fit for a page: no prologue, no metadata, no namespaces, ids under `ident`."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"\sxmlns(:\w+)?=\"[^\"]*\"", "", body)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r'\bid="([^"]+)"', rf'id="{ident}-\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{ident}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{ident}-\1)", body)
    body = re.sub(r'^<svg width="[^"]*" height="[^"]*"', "<svg", body)
    body = re.sub(r'<svg height="[^"]*" version="1.1" viewBox="([^"]*)" width="[^"]*"', r'<svg viewBox="\1"', body)
    # The page's own fonts; sizes stay as drawn.
    return re.sub(r"'DejaVu Sans'(, '[^']*')*, sans-serif", "inherit", body)
