"""What a conversion is asked for, and how a dataset or an episode is known to have been made so before."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..converters import Converter
from ..schemas.errors import UsageError
from .durable import write_json
from .payload import VideoOptions

if TYPE_CHECKING:
    from ..streams.shard_format import ShardOptions

PART_FRAMES = 16_384
LAYOUT = 2  # raise when the same inputs would give other files
VERSIONS = {"layout": "layout of files", "converter_version": "version of the converter"}


@dataclass(frozen=True)
class ConvertRequest:
    """Everything a conversion depends on; `workers`, `scheduler` and `max_time_s` do not change the result."""

    source: str
    raw: Path
    out: Path
    name: str
    options: Any
    variant: str = ""  # of recordings that differ in their features: see convert_all
    video: VideoOptions = field(default_factory=VideoOptions)
    part_frames: int = PART_FRAMES
    where: str | None = None
    limit: int | None = None
    verify: bool = False
    share: tuple[int, int] | None = None  # (i, n): only parts of number i modulo n, and no finishing
    finish_only: bool = False
    workers: int = 0
    scheduler: str | None = None
    max_time_s: float | None = None
    shards: ShardOptions | None = None  # write shards too, from the recorded frames


def check_request(request: ConvertRequest) -> None:
    """Usage errors that need no data."""
    if request.video.resize and any(side <= 0 or side % 2 for side in request.video.resize):
        width, height = request.video.resize
        raise UsageError(f"--resize {width}x{height}: both sides must be even and positive (yuv420p)")
    if request.part_frames < 1:
        raise UsageError("--part-frames must be at least 1")


def options_from_strings(options_type: type, given: dict[str, Any]) -> Any:
    """An Options value from command-line words, checked against each field's choices."""
    known = {f.name: f for f in fields(options_type)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        choices = known[name].metadata.get("choices")
        if choices and value not in choices:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected one of {', '.join(choices)}")
        values[name] = value
    return options_type(**values)


def check_settings(request: ConvertRequest, converter: Converter, journal: Path) -> None:
    """Remember what this dataset is made with; refuse to go on with anything else."""
    path = journal / "settings.json"
    settings = {
        "layout": LAYOUT,
        "name": request.name,
        "source": converter.name,
        "converter_version": converter.version,
        "options": asdict(request.options),
        "video": request.video.to_json(),
        "part_frames": request.part_frames,
    }
    if converter.rate:
        settings |= {"fps": converter.rate, "actions": converter.actions}
    if converter.embodiment is None:
        body = converter.embodiment_of(request.raw, request.options, request.variant)
        settings |= {"features": {f.name: list(f.names) for f in body.features}, "fps": body.fps}
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        write_json(path, settings)
        return
    before = json.loads(path.read_text())
    differing = _differences(before, settings)
    if differing:
        newer = any(name in VERSIONS for name, _, _ in differing)
        raise UsageError(
            f"{request.out} was made {'by another version of dpipe' if newer else 'with other options'}:\n"
            + "\n".join(
                f"    {VERSIONS.get(name, name)}: {was!r} then, {now!r} now" for name, was, now in differing
            )
            + "\n  next: use "
            + (
                "another --name, or delete it to make it anew"
                if newer
                else "the same options, or another --name"
            )
        )


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    result: list[tuple[str, Any, Any]] = []
    for name in sorted(set(before) | set(now)):
        was, is_now = before.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(is_now, dict):
            result += _differences(was, is_now, "--" if name in ("options", "video") else f"{name} of ")
        elif was != is_now:
            shown = name.replace("_", "-") if prefix == "--" else name
            result.append((prefix + shown, was, is_now))
    return result


def episode_key_base(converter: Converter, request: ConvertRequest) -> str:
    """What of an episode's identity is common to the run: name, version, parameters; never a path."""
    return json.dumps(
        [
            *(LAYOUT, converter.name, converter.version, asdict(request.options), request.video.to_json()),
            *([converter.rate, converter.actions] if converter.rate else []),
        ],
        sort_keys=True,
    )


def episode_key(base: str, source_id: str) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(f"{base}\n{source_id}".encode())
