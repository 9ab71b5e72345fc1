"""Other forms of a finished dataset: built whole under a temporary name, then renamed; present means complete.

    zarr         the replay buffer that diffusion-policy code reads            zarr_output
    lerobot21    LeRobot v2.1, with GR00T's meta/modality.json                 lerobot21

Both are made from the LeRobot v3.0 dataset, so that one conversion serves all three. A form keeps the recipe it
was made by; the same command again is a no-op, another recipe is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..schemas.errors import DataError, UsageError, unknown_name
from ..streams.dataset import Dataset, open_dataset
from .durable import exclusive, move_file, require_space, sync_folder, sync_path
from .execute import Executor, Failure, open_executor, stop_requests
from .progress import Progress

if TYPE_CHECKING:
    from .catalog import Catalog
    from .plan import Step
    from .request import ConvertRequest

FORMS = {
    "zarr": "zarr_output",
    "lerobot21": "lerobot21",
}
CHUNK_BYTES = 2_000_000  # zarr: of a chunk before compression
SYNCS_AT_A_TIME = 8
WORTH_A_CLUSTER = 32  # tasks: starting worker processes takes a second or two


@dataclass(frozen=True)
class OutputOptions:
    """What a form depends on beside its dataset."""

    images: bool = True  # zarr: decoded pictures, or none
    zarr_format: int = 2  # zarr: 2 is what the zarr releases that diffusion-policy code is pinned to read


@dataclass(frozen=True)
class OutputRequest:
    root: Path  # the finished v3.0 dataset
    form: str
    out: Path
    options: OutputOptions = OutputOptions()
    workers: int = 0
    scheduler: str | None = None
    max_time_s: float | None = None


@dataclass(frozen=True)
class OutputResult:
    root: Path
    form: str
    episodes: int
    frames: int
    bytes: int  # of files of its own
    linked: int  # video files shared with the dataset
    unchanged: bool


@dataclass(frozen=True)
class Task:
    """A module-level function of the form's module and its picklable arguments."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    frames: int


@dataclass(frozen=True)
class Form:
    """How one form is made; every form's module has one as `FORM`."""

    estimate: Callable[[Dataset, OutputOptions], int]
    """Bytes before compression."""
    begin: Callable[[Dataset, Path, OutputOptions, Mapping[str, Any]], Sequence[Task]]
    """Lay out the folder, the recipe in it, and list the tasks that fill it, in any order."""
    recipe: Callable[[Path], Mapping[str, Any] | None]
    """The recipe a finished folder was made by, None where it is not ours."""


def load_form(name: str) -> Form:
    if name not in FORMS:
        raise unknown_name("form", name, FORMS)
    return import_module(f".{FORMS[name]}", __package__).FORM


def estimate(request: OutputRequest) -> int:
    """Bytes the form takes before compression."""
    return load_form(request.form).estimate(open_dataset(request.root), request.options)


def plan_output(
    request: ConvertRequest, catalog: Catalog, form: str, place: Path, options: OutputOptions
) -> Step:
    """The step after a conversion: what a form would take, by shapes alone; nothing is written."""
    from ..converters import load_converter
    from .plan import BYTES_PER_PIXEL, Step
    from .work import plan_conversion

    found, _ = plan_conversion(request, catalog)
    body = load_converter(request.source).embodiment_of(request.raw, request.options, request.variant)
    sets = catalog.of(request.variant).refs.camera_sets()
    cameras = [request.video.size(camera) for camera in next((c for c, _, _ in sets), ())]
    if not found.todo_episodes and (request.out / "dpipe" / "manifest.json").is_file():
        size = estimate(OutputRequest(request.out, form, place, options))
    else:
        row = sum(f.dim * np.dtype(f.dtype).itemsize for f in body.features) + 8
        pixels = sum(camera.height * camera.width for camera in cameras)
        seen = (3 * pixels if options.images else 0) if form == "zarr" else round(pixels * BYTES_PER_PIXEL)
        size = found.frames * (row + seen)
    there = place.exists()
    if form == "zarr":
        files = len(body.features) + len(cameras) + size // CHUNK_BYTES
    else:
        files = found.episodes * (1 + len(cameras))
    return Step(
        name=f"convert --to {form}",
        needs=str(request.out),
        makes=str(place),
        episodes=0 if there else found.episodes,
        frames=0 if there else found.frames,
        done_episodes=found.episodes if there else 0,
        why=("not written yet",),
        read_bytes=0,
        write_bytes=0 if there else size,
        files=0 if there else files,
        pilot="bytes before compression"
        if form == "zarr"
        else "videos of one episode are shared, not written",
        cheaper=("--no-images, --resize WxH, --limit or --where make it smaller",),
    )


def write_output(request: OutputRequest, progress: Progress) -> OutputResult:
    """Make a form of a finished dataset, or find it made."""
    form = load_form(request.form)
    dataset = open_dataset(request.root)
    recipe = {
        "dpipe": 1,
        "form": request.form,
        "dataset": dataset.name,
        "digest": dataset.digest(),
        "state": (dataset.manifest or {}).get("state", ""),  # of datasets of ours: pixels included
        "episodes": len(dataset),
        "frames": dataset.total_frames,
        "options": asdict(request.options),
    }
    if request.out.exists():
        _refuse_other(request.out, form.recipe(request.out), recipe)
        return _result(request, dataset, unchanged=True)
    require_space(
        request.out, form.estimate(dataset, request.options) // 4, f"writing {len(dataset)} episodes"
    )
    partial = request.out.with_name(f".{request.out.name}.partial")
    with exclusive(partial, f"convert --to {request.form}"), stop_requests(request.max_time_s) as stop:
        tree = partial / "tree"
        shutil.rmtree(tree, ignore_errors=True)  # of a run that was stopped
        tree.mkdir()
        tasks = form.begin(dataset, tree, request.options, recipe)
        many = request.scheduler is not None or len(tasks) >= WORTH_A_CLUSTER
        workers = min(request.workers, len(tasks)) if many else 0
        with open_executor(stop, workers, request.scheduler) as executor:
            _run(executor, tasks, request.form, progress)
        sync_tree(tree)
        if request.out.exists():
            raise DataError(f"{request.out} appeared while it was made; look at it, then run this again")
        move_file(tree, request.out)
    shutil.rmtree(partial, ignore_errors=True)
    return _result(request, dataset, unchanged=False)


def _run(executor: Executor, tasks: Sequence[Task], form: str, progress: Progress) -> None:
    progress.begin(f"write {form}", len(tasks), "pieces")
    for number, task in enumerate(tasks):
        executor.submit(number, task.function, *task.arguments)
    for number, outcome in executor.results():
        if isinstance(outcome, Failure):
            raise DataError(f"writing {form}: {outcome.message}")
        progress.advance(1, tasks[number].frames)
    progress.end()


def _refuse_other(out: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    if before is None:
        raise DataError(
            f"{out} is there and dpipe did not write it; choose another place with --name or --out"
        )
    now = json.loads(json.dumps(now))
    flat = [{**r, **r.get("options", {})} for r in (before, now)]
    differing = [
        f"    {name}: {flat[0].get(name)!r} then, {flat[1].get(name)!r} now"
        for name in sorted(set(flat[0]) | set(flat[1]))
        if flat[0].get(name) != flat[1].get(name) and name != "options"
    ]
    if differing:
        raise UsageError(
            f"{out} was made from something else:\n" + "\n".join(differing) + "\n"
            "  next: remove it yourself, or choose another place with --name or --out"
        )


def _result(request: OutputRequest, dataset: Dataset, unchanged: bool) -> OutputResult:
    own = linked = 0
    for path in request.out.rglob("*"):
        status = path.lstat()
        if path.is_file() and status.st_nlink == 1:
            own += status.st_size
        elif path.is_file():
            linked += 1
    return OutputResult(request.out, request.form, len(dataset), dataset.total_frames, own, linked, unchanged)


def sync_tree(folder: Path) -> None:
    """Make every file and folder below durable; a hard link's bytes already are."""
    paths = sorted(folder.rglob("*"))
    with ThreadPoolExecutor(SYNCS_AT_A_TIME) as pool:  # files waited for together share the disk's commits
        list(pool.map(sync_path, [p for p in paths if p.is_dir() or p.stat().st_nlink == 1]))
    sync_folder(folder)
