"""What was precomputed from a dataset, as pictures: coarse bins, foresight, residuals.

Targets are looked up as a trainer looks them up (`streams/targets.py`), so what is shown is what is learnt from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...schemas.errors import DpipeError
from ...schemas.features import CAMERA_PREFIX
from ...schemas.normalisers import Normaliser
from ...streams.targets import open_targets
from . import page, svg
from .numbers import (
    change_maps,
    errors_around_switches,
    evenly,
    number,
    pca_colours,
    truth_of_decisions,
)
from .pictures import Detail, heat_over, picture, tiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...streams.dataset import Dataset

FRAMES_SHOWN = 4
MOST_BINS = 32  # in the band picture: of more, neighbours look alike
SWITCH_EPISODES = 400
REACH = 15  # frames either side of a gripper's switch


@dataclass(frozen=True)
class Target:
    base: Path
    stage: str
    variant: str
    done: Mapping[str, Any]  # contract.json
    report: Mapping[str, Any]
    prepared: Mapping[str, Any]

    @property
    def title(self) -> str:
        return f"{self.stage}, {self.variant}"


def finished_targets(bases: Sequence[Path]) -> Iterator[Target]:
    for base in bases:
        for path in sorted(base.glob("*/*/contract.json")) if base.is_dir() else []:
            folder = path.parent
            yield Target(
                base,
                folder.parent.name,
                folder.name,
                json.loads(path.read_text()),
                _json(folder / "report.json"),
                _json(folder / "prepared.json"),
            )


def target_sections(dataset: Dataset, bases: Sequence[Path], detail: Detail) -> Iterator[str]:
    found = list(finished_targets(bases))
    if not found:
        return
    yield "<h3>Targets</h3>"
    rows = [
        (
            t.stage,
            t.variant,
            f"{t.done.get('episodes', 0):,}",
            f"{t.done.get('frames', 0):,}",
            page.size_text(t.done.get("bytes", 0)),
            _short_model(t.done["contract"].get("model") or ""),
        )
        for t in found
    ]
    yield page.table(("stage", "variant", "episodes", "frames", "size", "model"), rows, (2, 3, 4))
    makers = {"tokens": _tokens, "foresight": _foresight, "residuals": _residuals}
    for target in found:
        if target.stage not in makers:
            continue
        yield f"<h4>{page.text(target.title)}</h4>"
        try:
            yield from makers[target.stage](dataset, target, detail)
        except (DpipeError, KeyError, OSError, ValueError) as error:
            words = str(error).splitlines()[0] if str(error) else type(error).__name__
            yield f"<p class=bad>no picture of it: {page.text(words)}</p>"


def _short_model(model: str) -> str:
    """A model without the folders above it: a page is passed on, and they are nobody's business."""
    names = []
    for name in model.split(","):
        kind, colon, place = name.partition(":")
        parts = Path(place).parts
        names.append(f"{kind}:{'/'.join(parts[-3:])}" if colon and place.startswith("/") else name)
    return ", ".join(filter(None, names))


# --- coarse bins ----------------------------------------------------------------------------------------------


def _tokens(dataset: Dataset, target: Target, detail: Detail) -> Iterator[str]:
    params = target.done["contract"]["params"]
    bins = _shown_bins(params["bins"])
    if not params.get("relative") and params["column"] in dataset.features:
        yield _band_picture(dataset, target, params["column"], bins, detail)
    found = target.report.get("complexity")
    if not found:
        return
    numbers = sorted(map(int, found["bins"]))
    entries = [found["bins"][str(n)] for n in numbers]
    if not entries[0]["mean"]:
        return
    labels = [str(n) if i % 2 == 0 or len(numbers) < 9 else "" for i, n in enumerate(numbers)]
    x = np.arange(len(numbers), dtype=float)

    def line(key: str) -> NDArray[np.float64]:
        return np.array([entry["mean"][key] for entry in entries], float)

    charts = [
        (
            "How much a planner must say",
            {"H(Y)": (x, line("H")), "I(Y;S)": (x, line("I")), "H(Y|S)": (x, line("H_given_S"))},
            "bits a token: all of it, what the situation tells, what it leaves open",
        ),
        (
            "Share of what the situation tells",
            {"share": (x, np.array([e["share"] for e in entries], float))},
            "asked of a planner of N bins",
        ),
        ("Top-1 of a probe", {"top-1": (x, line("top1"))}, "on held-out episodes"),
        (
            "Left to the refiner",
            {"dB": (x, line("dB"))},
            "decibels by which the residual is below the action",
        ),
    ]
    cells = []
    for title, series, note in charts:
        drawn = svg.line_chart(title, series, "bins N", labels, from_zero=True)
        cells.append(
            page.cell(title, drawn or "<p>No number: the probe learnt nothing that holds.</p>", note)
        )
    reading = ", ".join(
        f"{name.removeprefix('N_').replace('_', ' ')}: {'never' if found.get(name) is None else found[name]}"
        for name in ("N_at_share_0.5", "N_at_share_0.9", "N_where_top1_below_0.7")
    )
    yield "<h4>How many bins?</h4>" + page.grid(cells) + f"<p class=soft>N {page.text(reading)}</p>"


def _shown_bins(bins: Sequence[int]) -> int:
    """The number of bins a picture shows best: the largest of at most MOST_BINS, else the smallest."""
    fitting = [n for n in bins if n <= MOST_BINS]
    wanted = [n for n in fitting if n == 10]
    return wanted[0] if wanted else max(fitting) if fitting else min(bins)


def _band_picture(dataset: Dataset, target: Target, column: str, bins: int, detail: Detail) -> str:
    """One episode: a strip of frames, and below it a band a dimension of what the arm was told."""
    episode = len(dataset) // 2
    length = int(dataset.episodes.length[episode])
    asked = [f"tokens:name={target.variant},N={bins}"]
    tokens = open_targets(dataset, asked, targets=target.base, allow_missing=True).take(
        episode=np.full(length, episode), frame=np.arange(length)
    )["tokens"]
    normaliser = Normaliser.from_json(target.prepared["facts"]["normaliser"])
    values = normaliser.normalise(dataset.columns([column], episode)[column].reshape(length, -1))
    names = dataset.names(column) or tuple(str(d) for d in range(values.shape[1]))
    rows = []
    for camera in dataset.cameras[:1]:
        shown = [(2 * i + 1) * length // 12 for i in range(6)]
        images = "".join(
            page.image(
                picture(dataset.frames(episode, camera, t, t + 1)[0], 180, detail.quality), f"frame {t}"
            )
            for t in shown
        )
        rows.append(
            f"<span class=soft>{page.text(camera.removeprefix(CAMERA_PREFIX))}</span>"
            f"<div class=strip>{images}</div>"
        )
    for d in range(tokens.shape[1]):
        name = str(names[d]) if d < len(names) else str(d)
        rows.append(
            f"<span>{page.text(name)}</span>{svg.band(values[:, d], tokens[:, d], bins, f'{name}, {bins} bins')}"
        )
    task = " / ".join(dataset.episodes.tasks(episode))
    caption = (
        f"Episode {episode}, {length} frames: {task}. Curve: the action in [-1, 1]; colour: which of {bins} bins it "
        "falls in, blue lowest, vermilion highest."
    )
    return f"<figure><div class=bands>{''.join(rows)}</div><figcaption>{page.text(caption)}</figcaption></figure>"


# --- foresight ------------------------------------------------------------------------------------------------


def _foresight(dataset: Dataset, target: Target, detail: Detail) -> Iterator[str]:
    params, facts = target.done["contract"]["params"], target.prepared["facts"]
    if params.get("in_loop"):
        yield "<p class=soft>computed from the frames while training; nothing is stored to show</p>"
        return
    camera, grid = facts["camera"], tuple(facts["stored_grid"])
    ahead = int(params["at"])
    request = f"foresight:name={target.variant},array=feat,at=0|{ahead}"
    reader = open_targets(dataset, [request], targets=target.base, allow_missing=True)
    episode = len(dataset) // 2
    length = int(dataset.episodes.length[episode])
    frames = [(2 * i + 1) * max(1, length - ahead) // (2 * FRAMES_SHOWN) for i in range(FRAMES_SHOWN)]
    frames = [min(t, length - 1) for t in frames]
    features = reader.take(episode=np.full(len(frames), episode), frame=np.array(frames))["foresight"]
    now, later = features[:, 0].astype(np.float64), features[:, 1].astype(np.float64)
    colours = pca_colours(np.concatenate([now, later]))
    heat = change_maps(now, later)
    figures = []
    for i, t in enumerate(frames):
        future = min(t + ahead, length - 1)
        seen = [dataset.frames(episode, camera, f, f + 1)[0] for f in (t, future)]
        pixels = [_cropped(frame, params.get("crop", "")) for frame in seen]
        # Squares of tokens in the shape of the frame they stand for.
        images = [
            (picture(pixels[0], detail.side, detail.quality), f"frame {t}"),
            (tiles(colours[i], grid), f"features of frame {t}"),
            (picture(heat_over(pixels[0], heat[i], grid), detail.side, detail.quality), "change"),
            (picture(pixels[1], detail.side, detail.quality), f"frame {future}"),
        ]
        inner = "".join(page.image(address, words) for address, words in images)
        figures.append(
            f"<figure><div class=four>{inner}</div><figcaption>frame {t}, its features, where they change, "
            f"frame {future}</figcaption></figure>"
        )
    yield (
        f"<p class=soft>Episode {episode}, camera {page.text(camera.removeprefix(CAMERA_PREFIX))}. Colours: the first "
        f"three principal components of {grid[0]} x {grid[1]} tokens, one basis for all; vermilion: how far each token "
        f"moves within {ahead} frames.</p>"
    )
    yield f"<div class='grid large'>{''.join(figures)}</div>"
    told = target.report
    if "mse_copy_current" in told:
        rows = [
            ("repeat the present feature", number(told["mse_copy_current"])),
            ("say the mean feature of its place", number(told["mse_mean_of_place"])),
            ("say the mean feature", number(told["mse_mean_feature"])),
        ]
        words = f"mean squared error {told['frames_ahead']} frames ahead: what a world model must beat"
        yield f"<p class=soft>{words}</p>" + page.pairs(rows)


def _cropped(frame: NDArray[np.uint8], crop: str) -> NDArray[np.uint8]:
    from ...stages.foresight import crop_frames

    return crop_frames(frame[None], crop)[0]


# --- residuals ------------------------------------------------------------------------------------------------


def _residuals(dataset: Dataset, target: Target, detail: Detail) -> Iterator[str]:
    told = target.report
    groups = told.get("groups", {})
    cells = []
    words = {
        "all": "all chunks",
        "at_switch": "at a switch",
        "away_from_switch": "away from one",
        "training": "seen in training",
        "held_out": "held out",
    }
    for key, title in (("mean_norm", "Mean length of a chunk"), ("trace", "Trace of the covariance")):
        rows = [
            (words[name], g["raw"][key], g["residual"][key]) for name, g in groups.items() if name in words
        ]
        if rows:
            chart = svg.pairs_chart(title, rows, ("action", "residual"))
            cells.append(page.cell(title, chart, "normalised; smaller is easier to predict"))
    if "raw_std" in told:
        names = dataset.names("action")
        dims = target.prepared["facts"]["arm_dims"]
        rows = [
            (names[d] if d < len(names) else str(d), raw, rest)
            for d, raw, rest in zip(dims, told["raw_std"], told["delta_std"], strict=True)
        ]
        chart = svg.pairs_chart("Deviation by dimension", rows, ("action", "residual"))
        cells.append(page.cell("Deviation by dimension", chart))
    if target.prepared["facts"]["gripper_dims"]:
        cells.append(_gripper_cell(dataset, target))
    yield page.grid(cells)
    if told.get("note"):
        yield f"<p class=soft>{page.text(told['note'])}</p>"


def _gripper_cell(dataset: Dataset, target: Target) -> str:
    requests = [
        f"residuals:name={target.variant},array={name},as={name}" for name in ("grip_logit", "grip_target")
    ]
    reader = open_targets(dataset, requests, targets=target.base, allow_missing=True)
    wrong, truth = [], []
    for episode in evenly(len(dataset), SWITCH_EPISODES):
        length = int(dataset.episodes.length[episode])
        rows = reader.take(episode=np.full(length, episode), frame=np.arange(length))
        # [T, (draws,) K, G]: the first draw's decision for the frame itself
        now = [
            rows[name] if rows[name].ndim == 3 else rows[name][:, 0] for name in ("grip_logit", "grip_target")
        ]
        mistakes, closed = truth_of_decisions(now[0][:, 0], now[1][:, 0])
        wrong.append(mistakes)
        truth.append(closed)
    offsets, rate, seen = errors_around_switches(wrong, truth, REACH)
    overall = float(np.concatenate(wrong).mean())
    if not seen.any():
        return page.cell("Gripper errors around a switch", "<p>no gripper switches</p>")
    chart = svg.line_chart(
        "Gripper errors around a switch",
        {"share wrong": (offsets.astype(float), np.where(seen > 0, rate, np.nan))},
        "frames from the switch",
        from_zero=True,
        guide=0.0,
    )
    note = f"share of wrong decisions; {number(overall)} over all frames, {seen[REACH]:,} switches"
    return page.cell("Gripper errors around a switch", chart, note)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
