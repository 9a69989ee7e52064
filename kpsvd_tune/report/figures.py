"""Line figures of the pages: their colours, traces and axes, and curves thinned to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import Any

# Hues of Okabe and Ito, which colour-blind readers can tell apart, in the lightness that each
# background needs.
PALETTES = {
    "light": "#0072b2 #d55e00 #00875f #b8528f #96760a #2f8fc9 #7d55a8 #6b6b6b".split(),
    "dark": "#4db3ff #ff8b4d #2fd6a3 #f0a0cc #f2c037 #a9dcff #c3a3f0 #b5b5b5".split(),
}
# The ninth method and those after it share colours and differ in this.
DASHES = ("solid", "dash", "dot")
# Points of a line that are drawn: more than a screen has columns.
MOST_POINTS = 1500
# A smooth line is the mean over this share of all points on it.
_SMOOTH_SHARE = 50

Trace = dict[str, Any]


@dataclass(frozen=True)
class Style:
    """How traces that belong together look: place of their colour in a palette, and dashes."""

    name: str
    colour: int
    dash: str = "solid"

    def line(self, xs: Sequence[float], ys: Sequence[float], **parts: Any) -> Trace:
        """A line with its name in the legend; the page adds the colour of the theme."""
        look = {"mode": "lines", "line": {"dash": self.dash, "width": 2}}
        return self._trace(xs, ys, **{"name": escape(self.name), **look, **parts})

    def behind(self, xs: Sequence[float], ys: Sequence[float], **parts: Any) -> Trace:
        """A trace that belongs to the line: the legend and the mouse pass over it."""
        return self._trace(xs, ys, showlegend=False, hoverinfo="skip", **parts)

    def _trace(self, xs: Sequence[float], ys: Sequence[float], **parts: Any) -> Trace:
        meta = {"colour": self.colour}
        return {"meta": meta, "x": xs, "y": ys, "legendgroup": self.name, **parts}


def figure(
    traces: list[Trace], x_title: str, y_title: str, x_type: str = "linear", y_type: str = "linear"
) -> dict[str, Any]:
    """Traces with the titles and kinds of their axes, as plotly.js takes them."""
    return {
        "traces": traces,
        "x": {"title": {"text": x_title}, "type": x_type},
        "y": {"title": {"text": y_title}, "type": y_type},
    }


def thinned(
    xs: Sequence[float], ys: Sequence[float], most: int = MOST_POINTS
) -> tuple[list[float], list[float]]:
    """Of each of ``most`` / 2 stretches of a curve its lowest and its highest point.

    A curve of few points stays whole. No peak is lost, and every point drawn is one that was
    measured, where it was measured.
    """
    if len(xs) <= most:
        return list(xs), list(ys)
    kept = {0, len(xs) - 1}
    stretches = max(1, most // 2)
    for number in range(stretches):
        places = range(number * len(xs) // stretches, (number + 1) * len(xs) // stretches)
        kept |= {min(places, key=ys.__getitem__), max(places, key=ys.__getitem__)}
    return [xs[place] for place in sorted(kept)], [ys[place] for place in sorted(kept)]


def smooth(ys: Sequence[float]) -> tuple[list[float], int]:
    """The moving mean over a fiftieth of a curve, centred, and the number of points of each."""
    half = len(ys) // _SMOOTH_SHARE // 2
    sums = [0.0, *accumulate(ys)]
    ends = [(max(0, i - half), min(len(ys), i + half + 1)) for i in range(len(ys))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends], 2 * half + 1
