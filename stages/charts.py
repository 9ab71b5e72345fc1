"""Line charts as PNG, with Pillow alone: what a report shows to a person choosing a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

# Okabe and Ito's palette, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PANEL_W, PANEL_H = 480, 320
LINE = 16  # pixels from one line of text to the next
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 34, 46


def line_charts(
    path: Path,
    title: str,
    panels: Sequence[tuple[str, Mapping[str, Sequence[float]]]],
    ticks: Sequence[Any],
    axis: str,
    columns: int = 2,
    notes: Sequence[str] = (),
    marks: Mapping[Any, Sequence[str]] | None = None,
) -> None:
    """One panel per (title, {series: values}); every series has one value per tick of the common axis.

    Ticks are spaced evenly, whatever their values: bins of 2 and 256 deserve the same room. NaN is a gap. `notes`
    are lines below the title; `marks` are ticks to stand out in every panel, each with its colours.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows = -(-len(panels) // columns)
    head = 40 + LINE * len(notes)
    image = Image.new("RGB", (columns * PANEL_W, rows * PANEL_H + head), "white")
    draw = ImageDraw.Draw(image)
    small, large = ImageFont.load_default(12), ImageFont.load_default(17)
    draw.text((12, 10), title, fill="black", font=large)
    for number, note in enumerate(notes):
        draw.text((12, 38 + LINE * number), note, fill="black", font=small)
    for number, (name, series) in enumerate(panels):
        left, top = number % columns * PANEL_W, number // columns * PANEL_H + head
        _panel(draw, left, top, name, series, ticks, axis, small, marks or {})
    image.save(path, optimize=False)


def _panel(
    draw: ImageDraw,
    left: int,
    top: int,
    name: str,
    series: Mapping[str, Sequence[float]],
    ticks: Sequence[Any],
    axis: str,
    font: FreeTypeFont | ImageFont,
    marks: Mapping[Any, Sequence[str]],
) -> None:
    values = np.array([value for line in series.values() for value in line], dtype=float)
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    low = min(low, 0.0) if low > -0.2 * max(high, 1e-9) else low
    step = _round_step((high - low) / 4 if high > low else 0.25)
    low, high = step * np.floor(low / step + 1e-9), step * max(np.ceil(high / step - 1e-9), low / step + 1)
    x0, x1, y0, y1 = left + LEFT, left + PANEL_W - RIGHT, top + PANEL_H - BOTTOM, top + TOP
    draw.text((left + LEFT, top + 8), name, fill="black", font=font)
    draw.line([(x0, y1), (x0, y0), (x1, y0)], fill="#808080")

    def at(i: int, value: float) -> tuple[float, float]:
        x = x0 + (x1 - x0) * (i + 0.5) / len(ticks)
        return x, y0 + (y1 - y0) * (value - low) / (high - low)

    for value in np.arange(low, high + step / 2, step):
        y = at(0, float(value))[1]
        draw.line([(x0, y), (x1, y)], fill="#E4E4E4")
        draw.text((x0 - 6, y), f"{value + 0.0:.3g}", fill="#404040", font=font, anchor="rm")
    for i, tick in enumerate(ticks):
        x = at(i, low)[0]
        for place, colour in enumerate(marks.get(tick, ())):
            beside = x + 3 * (place - (len(marks[tick]) - 1) / 2)
            draw.line([(beside, y1), (beside, y0)], fill=colour, width=2)
        draw.text(
            (x, y0 + 6), str(tick), fill="black" if tick in marks else "#707070", font=font, anchor="mt"
        )
    draw.text(((x0 + x1) / 2, y0 + 24), axis, fill="#404040", font=font, anchor="mt")
    for number, (label, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [at(i, value) if np.isfinite(value) else None for i, value in enumerate(line)]
        for first, second in pairwise(points):
            if first and second:
                draw.line([first, second], fill=colour, width=2)
        for point in filter(None, points):
            draw.ellipse([point[0] - 3, point[1] - 3, point[0] + 3, point[1] + 3], fill=colour)
        if len(series) > 1:
            y = y1 + 4 + LINE * number
            draw.rectangle(
                [x0 + 5, y, x0 + 24 + draw.textlength(label, font=font), y + LINE - 1], fill="white"
            )
            draw.rectangle([x0 + 8, y + 3, x0 + 16, y + 11], fill=colour)
            draw.text((x0 + 21, y), label, fill="black", font=font)


def _round_step(wanted: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10 ** np.floor(np.log10(wanted))
    return float(power * next(n for n in (1, 2, 2.5, 5, 10) if n >= wanted / power - 1e-9))
