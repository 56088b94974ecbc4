"""Draws lines as an SVG file: for people who look at a simulation or a report, no library needed.

The horizontal axis is logarithmic, the vertical one begins at 0; each line has its name at its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, log2

WIDTH, HEIGHT = 900, 520
LEFT, RIGHT, TOP, BOTTOM = 60, 150, 40, 50
COLOURS = ("#888", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b", "#d62728", "#2ca02c")
FONT = 'font-family="sans-serif" font-size="13"'
NAME_WIDTH = 36  # of a number below the axis
LABEL_GAP = 15  # between names at the ends of lines

Line = Sequence[tuple[int, float]]  # (x, y), x rising


def svg(title: str, x_name: str, lines: Mapping[str, Line]) -> str:
    """The picture of at least one line."""
    xs = sorted({x for line in lines.values() for x, _ in line})
    highest = max(y for line in lines.values() for _, y in line)
    axes = _Axes(xs, ceil(2 * highest) / 2 or 1.0)
    names = _spread([axes.y(line[-1][1]) for line in lines.values()])
    parts = [_text(WIDTH / 2, TOP / 2, title), *axes.grid(x_name)]
    for i, ((name, line), height) in enumerate(zip(lines.items(), names, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        points = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(axes.x(line[-1][0]) + 8, height + 4, name, "start", colour))
    body = "\n".join(parts)
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<rect width="100%" height="100%" fill="#fff"/>'
    return f"{head}\n{body}\n</svg>\n"


class _Axes:
    """From numbers to places."""

    def __init__(self, xs: Sequence[int], highest: float) -> None:
        self._xs, self._highest = xs, highest

    def x(self, value: float) -> float:
        first, last = log2(self._xs[0]), log2(self._xs[-1])
        return LEFT + (log2(value) - first) / ((last - first) or 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self._highest * (HEIGHT - TOP - BOTTOM)

    def grid(self, x_name: str) -> list[str]:
        parts = [_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_name)]
        parts += [_text(self.x(value), HEIGHT - BOTTOM + 18, str(value)) for value in self._told()]
        for half in range(round(2 * self._highest) + 1):
            height = self.y(half / 2)
            ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"'
            parts.append(f'<line {ends} stroke="#ddd"/>')
            parts.append(_text(LEFT - 8, height + 4, f"{half / 2:.1f}", "end"))
        return parts

    def _told(self) -> list[int]:
        """The values that are written below the axis: from the last one on, those with room for their name."""
        told: list[int] = []
        for value in reversed(self._xs):
            if not told or self.x(told[-1]) - self.x(value) >= NAME_WIDTH:
                told.append(value)
        return told


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" {FONT}>{escape(text)}</text>'


def _spread(heights: Sequence[float]) -> list[float]:
    """The same heights, moved down as far as needed for none to hide another."""
    found = list(heights)
    lowest = float("-inf")
    for i in sorted(range(len(heights)), key=lambda i: heights[i]):
        found[i] = lowest = max(heights[i], lowest + LABEL_GAP)
    return found
