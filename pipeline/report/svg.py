"""Charts as inline SVG: text that a browser lays out, colours that follow the page's light or dark.

Colours are classes of the page's style sheet (page.py): `s0` to `s6` for series, `bar`, `grid`, `axis`. Every
function returns finished markup; words from outside are escaped here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from .numbers import Histogram, number, ticks

SERIES = 7
W, H = 320, 190  # of a small chart; it is shown at about this size, so letters keep theirs
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 30


def _open(width: int, height: int, title: str, extra: str = "") -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, True)}"{extra}>'
        f"<title>{escape(title)}</title>"
    )


def histogram_chart(told: Histogram, title: str) -> str:
    """Bars with the axis' ends below and thin marks at the 1st, 50th and 99th percentile."""
    width, height, floor, top = 200, 86, 64, 6
    span = told.high - told.low
    most = max(1, int(told.counts.max(initial=0)))
    step = width / len(told.counts)
    # The square root keeps what is rare to be seen beside a heap at one value.
    heights = np.sqrt(told.counts / most) * (floor - top)
    bars = "".join(
        f"M{i * step + 0.4:.1f} {floor}v{-h:.1f}h{max(step - 0.8, 0.5):.1f}v{h:.1f}z"
        for i, h in enumerate(heights)
        if h > 0
    )
    marks = "".join(
        f'<line class="mark {name}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{floor}"/>'
        for name, value in told.marks.items()
        for x in [(value - told.low) / span * width]
    )
    ends = (
        f'<text x="0" y="{height - 6}">{number(told.low)}</text>'
        f'<text x="{width}" y="{height - 6}" text-anchor="end">{number(told.high)}</text>'
    )
    if "q50" in told.marks:
        ends += f'<text x="{width / 2}" y="{height - 6}" text-anchor="middle">median {number(told.marks["q50"])}</text>'
    base = f'<line class="axis" x1="0" x2="{width}" y1="{floor}" y2="{floor}"/>'
    return _open(width, height, title) + f'<path class="bar" d="{bars}"/>{marks}{base}{ends}</svg>'


def bar_chart(counts: NDArray[np.integer], labels: Sequence[str], title: str, axis: str) -> str:
    """Counts from zero, a label under the first, the last and those between that have room."""
    width, height = 420, 170
    floor, top = height - 34, 12
    most = int(max(1, counts.max(initial=1)))
    step = (width - LEFT - RIGHT) / len(counts)
    parts = [_open(width, height, title)]
    for value in ticks(0, most, 3):
        if value != int(value):
            continue
        y = floor - (floor - top) * value / most
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for i, (count, label) in enumerate(zip(counts.tolist(), labels, strict=True)):
        h = (floor - top) * count / most
        if count:
            x = LEFT + i * step
            parts.append(
                f'<rect class="bar" x="{x + 1:.1f}" y="{floor - h:.1f}" width="{max(step - 2, 1):.1f}" '
                f'height="{h:.1f}"><title>{escape(label)}: {count}</title></rect>'
            )
    shown = sorted({0, len(labels) - 1, *range(0, len(labels), max(1, -(-len(labels) // 6)))})
    for i in shown:
        if 0 < i < len(labels) - 1 and (len(labels) - 1 - i) * step < 70:
            continue
        x = LEFT + (i + 0.5) * step
        parts.append(f'<text x="{x:.1f}" y="{floor + 15}" text-anchor="middle">{escape(labels[i])}</text>')
    parts.append(
        f'<text x="{(LEFT + width) / 2}" y="{height - 3}" text-anchor="middle">{escape(axis)}</text></svg>'
    )
    return "".join(parts)


def line_chart(
    title: str,
    series: Mapping[
        str, tuple[Sequence[float] | NDArray[np.floating], Sequence[float] | NDArray[np.floating]]
    ],
    axis: str = "",
    labels: Sequence[str] = (),
    from_zero: bool = False,
    guide: float | None = None,
) -> str:
    """Lines over a common axis; with `labels`, x is a place in them. Gaps where a value is no number."""
    xs = np.concatenate([np.asarray(x, float) for x, _ in series.values()])
    ys = np.concatenate([np.asarray(y, float) for _, y in series.values()])
    ys = ys[np.isfinite(ys)]
    if not len(xs) or not len(ys):
        return ""
    x0, x1 = float(xs.min()), float(xs.max())
    y0, y1 = float(ys.min()), float(ys.max())
    y0 = 0.0 if from_zero and y0 > 0 else y0
    if y1 - y0 < 1e-12 * max(1.0, abs(y1)):
        y0, y1 = y0 - 0.5 * (abs(y0) or 1), y1 + 0.5 * (abs(y1) or 1)
    x1 = x1 if x1 > x0 else x0 + 1
    legend = 16 * (len(series) > 1)
    height = H + legend

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (W - LEFT - RIGHT) * (x - x0) / (x1 - x0)
        return across, height - BOTTOM - (height - BOTTOM - TOP - legend) * (y - y0) / (y1 - y0)

    parts = [_open(W, height, title)]
    for value in ticks(y0, y1):
        y = place(x0, value)[1]
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{W - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    marks = (
        [(float(i), label) for i, label in enumerate(labels)]
        if labels
        else [(v, number(v)) for v in ticks(x0, x1)]
    )
    for value, label in marks:
        x = place(value, y0)[0]
        parts.append(
            f'<text x="{x:.1f}" y="{height - BOTTOM + 14}" text-anchor="middle">{escape(label)}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + W - RIGHT) / 2}" y="{height - 2}" text-anchor="middle">{escape(axis)}</text>'
    )
    if guide is not None:
        x = place(guide, y0)[0]
        parts.append(
            f'<line class="mark q50" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP + legend}" y2="{height - BOTTOM}"/>'
        )
    for i, (x, y) in enumerate(series.values()):
        pieces, pen = [], "M"
        for a, b in zip(x, y, strict=True):
            if not np.isfinite(b):
                pen = "M"
                continue
            across, up = place(float(a), float(b))
            pieces.append(f"{pen}{across:.1f} {up:.1f}")
            pen = "L"
        parts.append(f'<path class="line s{i % SERIES}" d="{"".join(pieces)}"/>')
        if len(x) <= 20:
            parts += [
                f'<circle class="dot s{i % SERIES}" cx="{place(float(a), float(b))[0]:.1f}" '
                f'cy="{place(float(a), float(b))[1]:.1f}" r="2.5"/>'
                for a, b in zip(x, y, strict=True)
                if np.isfinite(b)
            ]
    if legend:
        across = LEFT
        for i, name in enumerate(series):
            parts.append(f'<rect class="dot s{i % SERIES}" x="{across}" y="5" width="9" height="9"/>')
            parts.append(f'<text x="{across + 13}" y="13">{escape(name)}</text>')
            across += 24 + 6.3 * len(name)
    return "".join(parts) + "</svg>"


def paths_chart(
    title: str, paths: Sequence[tuple[int, NDArray[np.floating]]], across: str, upward: str
) -> str:
    """Many curves [T, 2] in one square of equal scales, each with the class of its group; a dot where it starts."""
    side, room = 300, 24
    points = np.concatenate([path for _, path in paths])
    low, high = points.min(axis=0), points.max(axis=0)
    span = float(max((high - low).max(), 1e-9))
    middle = (low + high) / 2
    scale = (side - 2 * room) / span

    def place(point: NDArray[np.floating]) -> tuple[float, float]:
        return side / 2 + (point[0] - middle[0]) * scale, side / 2 - (point[1] - middle[1]) * scale

    parts = [
        _open(side, side, title),
        f'<rect class="frame" x="1" y="1" width="{side - 2}" height="{side - 2}"/>',
    ]
    for group, path in paths:
        steps = "L".join("{:.1f} {:.1f}".format(*place(p)) for p in path)
        x, y = place(path[0])
        parts.append(f'<path class="trace s{group % SERIES}" d="M{steps}"/>')
        parts.append(f'<circle class="dot s{group % SERIES}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>')
    bar = 10.0 ** np.floor(np.log10(span / 2))
    parts.append(
        f'<line class="axis" x1="10" x2="{10 + bar * scale:.1f}" y1="{side - 9}" y2="{side - 9}"/>'
        f'<text x="{14 + bar * scale:.1f}" y="{side - 5}">{number(bar)}</text>'
        f'<text x="{side - 8}" y="{side - 6}" text-anchor="end">{escape(across)} →</text>'
        f'<text x="8" y="16">↑ {escape(upward)}</text></svg>'
    )
    return "".join(parts)


def band(values: NDArray[np.floating], tokens: NDArray[np.integer], bins: int, title: str) -> str:
    """One dimension of one episode: its coarse bins as colours, its normalised value as a curve over them.

    Stretched to the width it is given, so it carries no letters: those stand beside it in the page.
    """
    n, height = len(values), 30
    parts = [_open(n, height, title, ' preserveAspectRatio="none" class="band"')]
    bounds = np.flatnonzero(np.diff(tokens.astype(int), prepend=-1)).tolist()
    for start, stop in zip(bounds, [*bounds[1:], n], strict=True):
        colour = bin_colour(int(tokens[start]), bins)
        parts.append(f'<rect x="{start}" y="0" width="{stop - start}" height="{height}" fill="{colour}"/>')
    curve = "L".join(
        f"{t + 0.5:g} {height / 2 - float(np.clip(v, -1, 1)) * (height / 2 - 3):.1f}"
        for t, v in enumerate(values)
        if np.isfinite(v)
    )
    if curve:
        parts.append(f'<path class="curve" vector-effect="non-scaling-stroke" d="M{curve}"/>')
    return "".join(parts) + "</svg>"


LOWEST, MIDDLE, HIGHEST = (0, 114, 178), (244, 244, 240), (213, 94, 0)  # Okabe and Ito's blue and vermilion


def bin_colour(token: int, bins: int) -> str:
    """Blue over white to vermilion; a token beyond the bins (no number) is grey."""
    if token >= bins:
        return "#777"
    place = 2 * (token + 0.5) / bins - 1
    end = HIGHEST if place > 0 else LOWEST
    red, green, blue = (round(m + 0.9 * abs(place) * (e - m)) for m, e in zip(MIDDLE, end, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def pairs_chart(title: str, rows: Sequence[tuple[str, float, float]], names: tuple[str, str]) -> str:
    """Two bars a row, one under the other: (label, first, second), all from zero."""
    row, left = 34, 128
    height = len(rows) * row + 30
    most = max([1e-12, *(max(a, b) for _, a, b in rows)])
    width = W - left - 52
    parts = [_open(W, height, title)]
    for i, name in enumerate(names):
        parts.append(f'<rect class="dot s{i}" x="{left + 90 * i}" y="5" width="9" height="9"/>')
        parts.append(f'<text x="{left + 13 + 90 * i}" y="13">{escape(name)}</text>')
    for r, (label, *values) in enumerate(rows):
        y = 24 + r * row
        parts.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(label)}</text>')
        for i, value in enumerate(values):
            length = width * value / most
            parts.append(
                f'<rect class="dot s{i}" x="{left}" y="{y + 13 * i}" width="{length:.1f}" height="11"/>'
                f'<text x="{left + length + 4:.1f}" y="{y + 13 * i + 10}">{number(value)}</text>'
            )
    return "".join(parts) + "</svg>"
