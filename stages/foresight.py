"""foresight: a frozen vision tower's tokens of every frame. What DIAL's and other world-model heads predict.

    feat        [T, N, k] one row per frame (or every k-th), of one camera; k is the tower's width or --pca
    feat_<view> the same for each further view asked for, e.g. --views identity,flip

Cached once per frame: the target for frame t at horizon H is row min(t + H, T - 1), so any H, or several, and
the present come from the same array. A cache holds one view of the pixels (crop, resize) and features do not
commute with flips: the contract says so, and a loader that flips is refused.

DIAL predicts the merged tokens of Qwen2.5-VL (64 x 2048 at 224 px), t + 16 clamped to the last frame. The
default tower is embedded (`models/dct.py`); name a real one with --tower hf:FOLDER. Where no cache fits,
--in-loop writes the contract alone and the loader computes the same features from the same frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.towers import VisionTower, open_tower
from ..schemas.contract import FIXED_VIEW, ArraySpec, digest_of
from ..schemas.errors import DataError, UsageError
from . import (
    Block,
    DatasetInfo,
    DatasetView,
    EpisodeView,
    FrameWish,
    Prepared,
    Run,
    Stage,
    TargetReader,
    short_camera,
)
from .compress import (
    STORAGES,
    Code,
    between_frame_variance,
    delta_rms,
    explained_variance,
    fit_pca,
    int8_scale,
    overflows_float16,
    relative_rms,
)

PLAIN_PILOT = 32  # pairs of frames when nothing has to be fitted
FITTED_PILOT = 500  # pairs of frames for scales and directions: 1,000 frames
REPORT_ROWS = 2048
PICTURE_SIDE = 320  # pixels of a frame's longer side in the report's picture
VIEWS = ("identity", "flip")


@dataclass(frozen=True)
class Params:
    tower: str = field(default="embedded", metadata={"help": "embedded, or hf:FOLDER, or hf:OWNER/NAME"})
    camera: str = field(default="", metadata={"help": "which camera; the first by default"})
    tensor: str = field(default="", metadata={"help": "another of the tensors the tower offers"})
    image_size: int = field(
        default=0, metadata={"help": "resize frames to this many pixels square; 0: the tower's rule"}
    )
    crop: str = field(
        default="",
        metadata={"help": "fixed crop before the tower, as shares: 0.17:0.83 rows, or rows,columns"},
    )
    every: int = field(default=1, metadata={"help": "keep every k-th frame only"})
    storage: str = field(
        default="auto",
        metadata={"help": "auto is float16, or bfloat16 where that overflows", "choices": STORAGES},
    )
    pca: int = field(default=0, metadata={"help": "keep this many principal directions of the width"})
    pool: int = field(default=1, metadata={"help": "average k x k neighbouring tokens"})
    limit: float = field(
        default=0.1,
        metadata={"help": "refuse a storage whose error on what changes (delta-RMS) is above this"},
    )
    views: tuple[str, ...] = field(
        default=("identity",),
        metadata={"help": "views of every frame to cache: identity, flip", "choices_each": VIEWS},
    )
    in_loop: bool = field(
        default=False, metadata={"help": "store nothing: the loader computes the features from the frames"}
    )
    at: int = field(default=16, metadata={"help": "frames ahead at which the report measures"})
    compute: str = field(
        default="float32",
        metadata={"help": "precision of the tower", "choices": ("float32", "bfloat16", "float16")},
    )
    device: str = field(default="cpu", metadata={"help": "where the tower runs: cpu, cuda", "key": False})
    batch: int = field(default=32, metadata={"help": "frames a forward pass", "key": False})

    def __post_init__(self) -> None:
        parse_crop(self.crop)
        if self.every < 1 or self.pool < 1 or self.batch < 1 or self.at < 1:
            raise UsageError("--every, --pool, --batch and --at are at least 1")
        if unknown := set(self.views) - set(VIEWS):
            raise UsageError(f"unknown view {sorted(unknown)}\n  known: {', '.join(VIEWS)}")
        if self.in_loop and (self.pca or self.storage == "int8" or len(self.views) > 1):
            raise UsageError("--in-loop stores nothing: leave out --pca, --storage int8 and further --views")


def parse_crop(text: str) -> tuple[float, float, float, float]:
    """ "rows" or "rows,columns", each first:last as shares of the picture -> (top, bottom, left, right)."""
    spans = [(0.0, 1.0), (0.0, 1.0)]
    try:
        for i, span in enumerate(filter(None, text.split(","))):
            first, last = map(float, span.split(":"))
            spans[i] = (first, last)
    except (ValueError, IndexError):
        raise UsageError(f"--crop takes shares like 0.17:0.83 or 0.3:1,0:1, not '{text}'") from None
    if any(not 0 <= first < last <= 1 for first, last in spans):
        raise UsageError(f"--crop '{text}': each span must grow, within 0 and 1")
    return *spans[0], *spans[1]


def crop_frames(frames: NDArray[np.uint8], crop: str) -> NDArray[np.uint8]:
    """[B, H, W, 3] -> the crop of each, edges rounded to whole pixels."""
    top, bottom, left, right = parse_crop(crop)
    height, width = frames.shape[1:3]
    rows = slice(round(top * height), round(bottom * height))
    return frames[:, rows, round(left * width) : round(right * width)]


def view_of(frames: NDArray[np.uint8], view: str) -> NDArray[np.uint8]:
    return frames[:, :, ::-1] if view == "flip" else frames


def tower_of(params: Params) -> VisionTower:
    return open_tower(
        params.tower,
        image_size=params.image_size or None,
        tensor=params.tensor or None,
        device=params.device,
        dtype=params.compute,
    )


def encode(
    tower: VisionTower, frames: NDArray[np.uint8], params: Params, view: str = "identity"
) -> NDArray[np.float32]:
    """Frames [B, H, W, 3] as the camera gives them -> the tower's tokens [B, N, d]."""
    return tower.encode(np.ascontiguousarray(view_of(crop_frames(frames, params.crop), view)))[0]


def read_size(tower: VisionTower, params: Params, size: tuple[int, int]) -> tuple[int, int] | None:
    """The (height, width) a camera's frames are decoded to, where the tower would average them down anyway.

    A crop is a share of the picture: the whole is read so large that the crop is still as large as the tower looks at.
    """
    wanted = getattr(tower, "frame_size", None)
    if wanted is None:
        return None
    top, bottom, left, right = parse_crop(params.crop)
    height, width = crop_frames(np.empty((1, *size, 3), np.uint8), params.crop).shape[1:3]
    rows, columns = wanted(height, width)
    smaller = min(size[0], round(rows / (bottom - top))), min(size[1], round(columns / (right - left)))
    return smaller if smaller != size else None


def grid_of(tower: VisionTower, params: Params, size: tuple[int, int]) -> tuple[int, int]:
    """The tower's grid for frames of a camera's size, after the crop."""
    height, width = crop_frames(np.empty((1, *size, 3), np.uint8), params.crop).shape[1:3]
    return tower.grid(height, width)


def variant(params: Params, info: DatasetInfo) -> str:
    name = params.tower.removeprefix("hf:").rstrip("/").rsplit("/", 1)[-1].lower()
    parts = [name, short_camera(info.camera(params.camera))]
    parts += [params.tensor] if params.tensor else []
    parts += [f"{params.image_size}px"] if params.image_size else []
    parts += ["crop" + params.crop.replace(":", "_").replace(",", "_")] if params.crop else []
    parts += [f"every{params.every}"] if params.every > 1 else []
    parts += [f"pool{params.pool}"] if params.pool > 1 else []
    parts += [f"pca{params.pca}"] if params.pca else []
    parts += [params.storage] if params.storage != "auto" else []
    parts += ["views"] if len(params.views) > 1 else []
    parts += ["inloop"] if params.in_loop else []
    return "-".join(parts)


# --- settled once -------------------------------------------------------------------------------------------


def prepare(params: Params, dataset: DatasetView) -> Prepared:
    """Open the tower, look at a pilot, settle the storage, measure what it loses, refuse what loses too much."""
    info = dataset.info
    camera = info.camera(params.camera)
    tower = tower_of(params)
    grid = grid_of(tower, params, info.cameras[camera])
    told = tower.describe()
    facts: dict[str, Any] = {"tower": told, "camera": camera, "grid": list(grid), "width": tower.width}
    facts["read_size"] = read_size(tower, params, info.cameras[camera])
    code = Code("float32", params.pool)
    if not params.in_loop:
        fitted = params.pca > 0 or params.storage == "int8"
        now, later, episodes = _pilot(params, dataset, camera, tower, FITTED_PILOT if fitted else PLAIN_PILOT)
        code, measured = settle(params, grid, now, later, episodes)
        facts["measured"] = measured
    facts["storage"] = code.storage
    facts["stored_grid"] = list(code.stored_grid(grid))
    facts["stored_width"] = tower.width if code.basis is None else code.basis.shape[1]
    named = {"mean": code.mean, "basis": code.basis, "scale": code.scale}
    return Prepared(
        facts=facts,
        arrays={name: values for name, values in named.items() if values is not None},
        contract={
            "model": params.tower,
            "weights": str(told.get("weights", tower.digest)),
            "layer": str(told.get("tensor", "")),
            "preprocessing": digest_of(
                [told.get("preprocess"), params.crop, params.image_size, tower.digest]
            ),
            "camera": camera,
            "dtype": code.storage,
            "augmentation": FIXED_VIEW if len(params.views) == 1 else "views:" + ",".join(params.views),
        },
    )


def settle(
    params: Params,
    grid: tuple[int, int],
    now: NDArray[np.float32],
    later: NDArray[np.float32],
    episodes: NDArray[np.integer],
) -> tuple[Code, dict[str, Any]]:
    """The code for features like these pairs [B, N, d], and its errors; DataError above the limit."""
    both = np.concatenate([now, later])
    measured: dict[str, Any] = {"pilot_frames": len(both), "largest": float(np.abs(both).max())}
    pooled = Code("float32", params.pool).project(both, grid)
    mean = basis = scale = None
    if params.pca:
        tokens = pooled.reshape(-1, pooled.shape[-1])
        mean, basis = fit_pca(tokens, params.pca)
        measured["pca_tokens"] = len(tokens)
        measured["explained_variance"] = explained_variance(tokens, mean, basis)
        measured["explained_between_frames"] = between_frame_variance(pooled, np.tile(episodes, 2), basis)
    projected = Code("float32", params.pool, mean, basis).project(both, grid)
    storage = params.storage
    if storage == "auto":
        storage = "bfloat16" if overflows_float16(projected) else "float16"
    if storage == "int8":
        scale = int8_scale(projected)
    code = Code(storage, params.pool, mean, basis, scale)

    def through(features: NDArray[np.float32]) -> NDArray[np.float32]:
        return code.restore(code.store(code.project(features, grid)), grid)

    measured["rel_rms"] = relative_rms(through(both), both)
    moved = np.linalg.norm(later - now)
    measured["delta_rms"] = delta_rms(through, now, later) if moved > 0 else 0.0
    measured["delta_frames"] = params.at
    if measured["delta_rms"] > params.limit:
        raise DataError(
            f"stored as {storage}, pool {params.pool}, pca {params.pca or 'none'}, what changes in "
            f"{params.at} frames is off by {measured['delta_rms']:.3f} (delta-RMS), more than {params.limit:g}\n"
            f"  of the features themselves it is {measured['rel_rms']:.3f} (rel-RMS)\n"
            "  Store more (float16, more --pca, less --pool), or accept it:  --limit NUMBER"
        )
    return code, measured


def _pilot(
    params: Params, dataset: DatasetView, camera: str, tower: VisionTower, pairs: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Features of up to `pairs` frames spread evenly over the dataset, and of the frames `at` ahead."""
    lengths = np.array([dataset.episode(i).frames for i in range(len(dataset))])
    size = read_size(tower, params, dataset.info.cameras[camera])
    starts = np.r_[0, np.cumsum(lengths)[:-1]]
    wanted = np.unique(np.linspace(0, lengths.sum() - 1, min(pairs, int(lengths.sum()))).astype(np.int64))
    owner = np.searchsorted(starts, wanted, side="right") - 1
    now, later = [], []
    for episode in np.unique(owner):
        view = dataset.episode(int(episode))
        first = wanted[owner == episode] - starts[episode]
        second = np.minimum(first + params.at, view.frames - 1)
        rows = np.unique(np.r_[first, second])
        features = np.concatenate(
            [encode(tower, block, params) for block in view.images(camera, rows, params.batch, size)]
        )
        now.append(features[np.searchsorted(rows, first)])
        later.append(features[np.searchsorted(rows, second)])
    return np.concatenate(now), np.concatenate(later), owner


def makes(params: Params, info: DatasetInfo, prepared: Prepared) -> tuple[ArraySpec, ...]:
    facts = prepared.facts
    rows, columns = facts["stored_grid"]
    shape = (rows * columns, int(facts["stored_width"]))
    told: dict[str, Any] = {"primary": True, "grid": [rows, columns]}
    if params.in_loop:
        told |= {"compute": "foresight", "read_size": facts["read_size"]}
        return (ArraySpec("feat", shape, "float32", ("token", "channel"), told, "none", 0),)
    for name in ("scale",):
        if name in prepared.arrays:
            told[name] = f"prepared/{name}.npy"
    axis = ("frame", 1) if params.every == 1 else ("kept", params.every)
    several = len(params.views) > 1
    return tuple(
        ArraySpec(
            "feat" if view == "identity" else f"feat_{view}",
            shape,
            facts["storage"],
            ("token", "channel"),
            {**told, "select": {"view": view}} if several else told,
            *axis,
        )
        for view in params.views
    )


# --- per episode --------------------------------------------------------------------------------------------


def open_run(params: Params, info: DatasetInfo, prepared: Prepared) -> Run:
    if params.in_loop:
        return lambda episode: iter(())
    tower = tower_of(params)
    check_tower(tower, prepared.contract["weights"])
    code, grid = code_of(params, prepared), tuple(prepared.facts["grid"])
    camera, size = prepared.facts["camera"], size_of(prepared)

    def run(episode: EpisodeView) -> Iterator[Block]:
        rows = np.arange(0, episode.frames, params.every)
        for frames in episode.images(camera, rows, params.batch, size):
            yield {
                "feat" if view == "identity" else f"feat_{view}": code.store(
                    code.project(encode(tower, frames, params, view), grid)
                )
                for view in params.views
            }

    return run


def size_of(prepared: Prepared) -> tuple[int, int] | None:
    found = prepared.facts["read_size"]
    return None if found is None else (int(found[0]), int(found[1]))


def code_of(params: Params, prepared: Prepared) -> Code:
    arrays = prepared.arrays
    return Code(
        prepared.facts["storage"], params.pool, arrays.get("mean"), arrays.get("basis"), arrays.get("scale")
    )


def check_tower(tower: VisionTower, weights: str) -> None:
    """The weights a target was begun with are the weights it is finished, or read, with."""
    found = str(tower.describe().get("weights", tower.digest))
    if found != weights:
        raise DataError(
            f"the tower's weights have changed: {found}, the target was made with {weights}\n"
            "  Put the old ones back, or make another target:  dpipe precompute foresight --name NEW"
        )


def compute_in_loop(folder: Path, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Features [B, N, d] of frames [B, H, W, 3] on the terms of an --in-loop target in `folder`."""
    params, tower, code, grid = _in_loop(folder)
    return code.project(encode(tower, frames, params), grid)


@lru_cache(maxsize=4)
def _in_loop(folder: Path) -> tuple[Params, VisionTower, Code, tuple[int, int]]:
    import json

    saved = json.loads((folder / "prepared.json").read_text())
    params = Params(**{**saved["terms"]["params"], "views": tuple(saved["terms"]["params"]["views"])})
    tower = tower_of(params)
    check_tower(tower, saved["contract"]["weights"])
    return params, tower, Code("float32", params.pool), tuple(saved["facts"]["grid"])


# --- report -------------------------------------------------------------------------------------------------


def report(
    params: Params, dataset: DatasetView, prepared: Prepared, reader: TargetReader, folder: Path
) -> dict[str, Any]:
    """What the cache costs and loses, the feature's mean and deviation, and the two errors to beat."""
    result: dict[str, Any] = dict(prepared.facts)
    if params.in_loop:
        return result
    code = code_of(params, prepared)
    step = max(1, params.at // params.every)
    now, later = [], []
    frames = dataset.info.frames // params.every
    thin = max(1, frames // REPORT_ROWS)
    for position in range(len(dataset)):
        rows = reader.read(position, "feat")
        first = np.arange(0, len(rows) - step, thin)
        if len(first):
            stored = Code(code.storage, scale=code.scale)
            now.append(stored.restore(np.asarray(rows[first]), (1, 1)))
            later.append(stored.restore(np.asarray(rows[first + step]), (1, 1)))
    if not now:
        return {**result, "note": f"no episode is longer than {params.at} frames: no error to beat"}
    a, b = np.concatenate(now).astype(np.float64), np.concatenate(later).astype(np.float64)
    mean, deviation = b.mean(axis=(0, 1)), b.std(axis=(0, 1))
    result |= {
        "pairs": len(a),
        "frames_ahead": step * params.every,
        "mse_copy_current": float(((b - a) ** 2).mean()),
        "mse_mean_feature": float(((b - mean) ** 2).mean()),
        "mse_mean_of_place": float(((b - b.mean(axis=0)) ** 2).mean()),
        "feature_mean": mean.tolist(),
        "feature_std": deviation.tolist(),
    }
    tower = tower_of(params)
    if hasattr(tower, "decode"):
        _picture(folder / "foresight.png", params, dataset, prepared, tower, code)
    return result


def _picture(
    path: Path, params: Params, dataset: DatasetView, prepared: Prepared, tower: Any, code: Code
) -> None:
    """Four frames and the frames ahead of them, each over the picture its stored features still hold."""
    from PIL import Image, ImageDraw, ImageFont

    camera, grid = prepared.facts["camera"], tuple(prepared.facts["grid"])
    height, width = dataset.info.cameras[camera]
    shrink = min(1.0, PICTURE_SIDE / max(height, width))
    size = (round(height * shrink), round(width * shrink)) if shrink < 1 else None
    columns = []
    for position in np.linspace(0, len(dataset) - 1, min(4, len(dataset))).astype(int):
        episode = dataset.episode(int(position))
        t = max(0, episode.frames // 2 - params.at // 2)
        rows = np.unique([t, min(t + params.at, episode.frames - 1)])
        frames = crop_frames(np.concatenate(list(episode.images(camera, rows, 2, size))), params.crop)
        features = code.restore(code.store(code.project(tower.encode(frames)[0], grid)), grid)
        seen = tower.decode(features, *frames.shape[1:3])
        columns += [np.concatenate([frames[i], seen[i]]) for i in range(len(rows))]
    gap = np.full((columns[0].shape[0], 4, 3), 255, np.uint8)
    row = np.concatenate([piece for column in columns for piece in (column, gap)], axis=1)
    picture = Image.fromarray(np.concatenate([np.full((22, row.shape[1], 3), 255, np.uint8), row]))
    words = (
        f"{short_camera(camera)}, frames t and t + {params.at} by turns; below: what the stored features hold"
    )
    ImageDraw.Draw(picture).text((4, 3), words, fill="black", font=ImageFont.load_default(13))
    picture.save(path)


def wishes(params: Params, info: DatasetInfo, prepared: Prepared) -> tuple[FrameWish, ...]:
    if params.in_loop:
        return ()
    return (FrameWish(prepared.facts["camera"], params.every, params.batch, size_of(prepared)),)


STAGE = Stage(
    name="foresight",
    version=2,
    Params=Params,
    summary="a frozen vision tower's tokens of every frame",
    recipes=("dial",),
    variant=variant,
    prepare=prepare,
    makes=makes,
    open=open_run,
    report=report,
    uses_model=lambda params: params.tower != "embedded",
    wishes=wishes,
)
