"""One picture of one episode: what the cameras saw, what the arm was told, and which coarse bins that falls in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.bins import encode
from ..schemas.errors import UsageError
from ..schemas.normalisers import DEFAULT_MODE, make_normaliser
from ..streams.dataset import Dataset
from ..streams.statistics import statistics_of

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

WIDTH, LEFT, RIGHT = 1280, 150, 20
FRAMES_SHOWN = 8
BAND = 58  # height of one action dimension
LOW, MIDDLE, HIGH = (31, 119, 180), (245, 245, 245), (214, 96, 30)  # bins from lowest to highest


def draw_episode(dataset: Dataset, episode: int, path: Path, bins: int = 10) -> None:
    """Write a PNG: a strip of frames a camera, below it one band a dimension of the action over the same time.

    The curve is the action as a policy sees it, normalised to [-1, 1] by the default mode over the dataset; the
    colour behind it is the coarse bin it falls in, as the tokens stage has it.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not 0 <= episode < len(dataset):
        raise UsageError(f"episode {episode}: {dataset.name} has episodes 0 to {len(dataset) - 1}")
    length = int(dataset.episodes.length[episode])
    action = dataset.columns(["action"], episode)["action"].reshape(length, -1)
    scaled = _normalised(dataset, action)
    tokens = encode(scaled, bins)
    shown = np.round(np.linspace(0, length - 1, FRAMES_SHOWN)).astype(int)
    side = (WIDTH - LEFT - RIGHT) // FRAMES_SHOWN
    strips = [(camera, _thumbnails(dataset, episode, camera, shown, side)) for camera in dataset.cameras]
    top = 64
    height = top + sum(s[0].height + 8 for _, s in strips) + BAND * action.shape[1] + 60
    image = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    text, title = ImageFont.load_default(13), ImageFont.load_default(18)
    task = " / ".join(dataset.episodes.tasks(episode))
    draw.text((16, 12), f"{dataset.name}, episode {episode}: {task}", fill="black", font=title)
    draw.text(
        (16, 38),
        f"{length} frames at {dataset.fps} fps, {bins} coarse bins a dimension",
        fill="#555555",
        font=text,
    )
    for camera, strip in strips:
        draw.text((12, top + 8), camera.removeprefix("observation.images."), fill="black", font=text)
        for place, (frame, picture) in enumerate(zip(shown, strip, strict=True)):
            x = LEFT + place * side
            image.paste(picture, (x, top))
            draw.text(
                (x + 4, top + 3), f"{frame}", fill="white", font=text, stroke_width=1, stroke_fill="black"
            )
        top += strip[0].height + 8
    for d, name in enumerate(dataset.names("action")):
        _band(draw, top + d * BAND, name, scaled[:, d], tokens[:, d], bins, text)
    top += BAND * action.shape[1]
    for frame in range(0, length, max(1, round(length / 10))):
        x = LEFT + (WIDTH - LEFT - RIGHT) * (frame + 0.5) / length
        draw.text((x, top + 6), f"{frame}", fill="#555555", font=text, anchor="ma")
    draw.text(
        (LEFT, top + 26),
        "frame; curve: action in [-1, 1]; colour: bin, blue lowest, orange highest",
        fill="#555555",
        font=text,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _normalised(dataset: Dataset, action: NDArray[Any]) -> NDArray[np.float64]:
    stats = statistics_of(dataset, "action")
    return make_normaliser(DEFAULT_MODE, stats, names=dataset.names("action")).normalise(action)


def _thumbnails(
    dataset: Dataset, episode: int, camera: str, frames: NDArray[np.int64], side: int
) -> list[Any]:
    from PIL import Image

    pictures = []
    for frame in frames:
        pixels = dataset.frames(episode, camera, int(frame), int(frame) + 1)[0]
        height = round((side - 4) * pixels.shape[0] / pixels.shape[1])
        pictures.append(Image.fromarray(pixels).resize((side - 4, height), Image.Resampling.BICUBIC))
    return pictures


def _band(
    draw: ImageDraw,
    top: int,
    name: str,
    values: NDArray[np.float64],
    tokens: NDArray[Any],
    bins: int,
    font: Any,
) -> None:
    span = WIDTH - LEFT - RIGHT
    edges = LEFT + span * np.arange(len(values) + 1) / len(values)
    for t, token in enumerate(tokens):
        draw.rectangle([edges[t], top + 2, edges[t + 1], top + BAND - 4], fill=_colour(int(token), bins))
    middle = top + (BAND - 2) / 2
    draw.line([(LEFT, middle), (WIDTH - RIGHT, middle)], fill="#C8C8C8")
    curve = [
        ((edges[t] + edges[t + 1]) / 2, middle - float(np.clip(v, -1, 1)) * (BAND / 2 - 7))
        for t, v in enumerate(values)
    ]
    draw.line(curve, fill="black", width=2)
    draw.text((12, middle), name, fill="black", font=font, anchor="lm")


def _colour(token: int, bins: int) -> tuple[int, int, int]:
    """Blue over white to orange; a token beyond the bins (not valid) is dark grey."""
    if token >= bins:
        return (90, 90, 90)
    place = 2 * (token + 0.5) / bins - 1
    end = HIGH if place > 0 else LOW
    share = 0.85 * abs(place)
    red, green, blue = (round(m + share * (e - m)) for m, e in zip(MIDDLE, end, strict=True))
    return red, green, blue
