"""fast: action chunks as a few tokens, for policies that speak them. FAST's compression (arXiv:2501.09747).

    ids      ragged uint16      the tokens of frame t's chunk are ids[offset[t] : offset[t] + count[t]]
    offset   [T] int64          counted from the episode's first id
    count    [T] int32          0 where the chunk has no tokens (below)
    is_pad   [T, H] bool        which steps of the chunk were padding when it was encoded

    chunk [H, D], normalised (q01 and q99 to -1 and 1)
      -> orthonormal DCT-II over time -> round(scale x coefficient), scale 10
      -> flattened with all dimensions of the lowest frequency first -> minus the smallest -> byte pairs

Upstream lifts values below the fitted range to its lowest symbol, has none for values above, and decodes what
it cannot read to zeros with a printed line. Here the alphabet is fitted on every chunk, a chunk that falls outside it
later (an added episode) gets no tokens and is counted, and every encoded chunk is decoded and its length and
values checked. With --processor FOLDER the published transformers processor encodes instead, under the same
check.

Error of a value: at most sqrt(H) / (2 scale); about 0.29 / scale on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.chunks import dimension_kinds, gather_chunk
from ..schemas.contract import ArraySpec, digest_of
from ..schemas.errors import DataError, UsageError
from ..schemas.normalisers import DEFAULT_MODE, IMPORTERS, MODES, Normaliser
from . import Block, DatasetInfo, DatasetView, EpisodeView, Prepared, Run, Stage, TargetReader
from .actions import column_rows, normaliser_for
from .bpe import decode as bpe_decode
from .bpe import encode as bpe_encode
from .bpe import fit_merges

FITTED_CHUNKS = 4096  # of the byte pairs; the alphabet is fitted on every chunk


@dataclass(frozen=True)
class Params:
    chunk: int = field(default=16, metadata={"help": "steps H of a chunk"})
    column: str = field(default="action", metadata={"help": "which column holds the actions"})
    normaliser: str = field(
        default=DEFAULT_MODE, metadata={"help": "how actions become [-1, 1]", "choices": tuple(MODES)}
    )
    gripper: str = field(
        default="auto",
        metadata={
            "help": "gripper dimensions: two values, by degrees, as they are, or like the rest",
            "choices": ("auto", "binary", "bounds", "raw", "scaled"),
        },
    )
    normaliser_file: str = field(
        default="", metadata={"help": "another trainer's statistics instead of ours"}
    )
    normaliser_kind: str = field(
        default="", metadata={"help": "whose file it is", "choices": ("", *IMPORTERS)}
    )
    normaliser_key: str = field(
        default="", metadata={"help": "which data set or embodiment inside that file"}
    )
    scale: float = field(default=10.0, metadata={"help": "coefficients are rounded to 1 / scale"})
    vocabulary: int = field(default=1024, metadata={"help": "number of tokens"})
    processor: str = field(
        default="", metadata={"help": "folder or id of a published FAST processor (its code is run)"}
    )

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.scale <= 0 or not 2 <= self.vocabulary <= 65_536:
            raise UsageError("--chunk is at least 1, --scale above 0, --vocabulary 2 to 65536")


@lru_cache(maxsize=8)
def dct_matrix(steps: int) -> NDArray[np.float64]:
    """Orthonormal DCT-II [H, H]: rows are frequencies, so that coefficients = matrix @ chunk."""
    k, n = np.arange(steps)[:, None], np.arange(steps)[None]
    matrix = np.cos(np.pi * k * (2 * n + 1) / (2 * steps)) * np.sqrt(2 / steps)
    matrix[0] /= np.sqrt(2)
    return matrix


def quantise(chunks: NDArray[np.floating], scale: float) -> NDArray[np.int32]:
    """Normalised chunks [B, H, D] -> rounded coefficients [B, H D], lowest frequency first."""
    coefficients = np.einsum("kh,bhd->bkd", dct_matrix(chunks.shape[1]), np.asarray(chunks, np.float64))
    return np.rint(coefficients * scale).astype(np.int32).reshape(len(chunks), -1)


def restore(quantised: NDArray[np.integer], steps: int, scale: float) -> NDArray[np.float64]:
    """Rounded coefficients [B, H D] -> normalised chunks [B, H, D]."""
    table = np.asarray(quantised, np.float64).reshape(len(quantised), steps, -1) / scale
    return np.einsum("kh,bkd->bhd", dct_matrix(steps), table)


def variant(params: Params, info: DatasetInfo) -> str:
    name = f"H{params.chunk}"
    name += f"-{params.normaliser_kind or 'file'}" if params.normaliser_file else f"-{params.normaliser}"
    return name + (
        f"-{Path(params.processor).name.lower()}" if params.processor else f"-v{params.vocabulary}"
    )


def _chunks(
    actions: NDArray[Any], normaliser: Normaliser, kinds: Sequence[str], steps: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Normalised chunks [T, H, D], is_pad [T, H], and which frames' chunks are all numbers [T].

    Padding is put in before normalising: an arm that moves by deltas stands still there, by 0 in its own unit.
    """
    chunks, is_pad = gather_chunk(actions, steps, kinds=kinds)
    normal = normaliser.normalise(chunks)
    sound = np.isfinite(normal).reshape(len(normal), -1).all(axis=1).astype(bool)
    return np.where(sound[:, None, None], normal, 0.0), is_pad, sound


def kinds_of(info: DatasetInfo, column: str) -> tuple[str, ...]:
    """How padding is filled: deltas are told by the dataset's conventions or the dimensions' names."""
    names = info.names(column)
    told = " ".join([str(info.conventions.get(column, "")), *names])
    return dimension_kinds(names, delta="delta" in told or "relative" in told)


def prepare(params: Params, dataset: DatasetView) -> Prepared:
    info = dataset.info
    normaliser = normaliser_for(
        dataset,
        params.column,
        params.normaliser,
        params.gripper,
        params.normaliser_file,
        params.normaliser_kind,
        params.normaliser_key,
    )
    kinds = kinds_of(info, params.column)
    low, high, kept = 0, 0, []
    thin = max(1, info.frames // FITTED_CHUNKS)
    for _, (actions,) in column_rows(dataset, [params.column]):
        chunks, _, sound = _chunks(actions, normaliser, kinds, params.chunk)
        quantised = quantise(chunks[sound], params.scale)
        if len(quantised):
            low, high = min(low, int(quantised.min())), max(high, int(quantised.max()))
            kept.append(quantised[::thin])
    if not kept:
        raise DataError(
            f"'{params.column}' of {info.name} has no chunk of finite actions\n  Run  dpipe doctor."
        )
    alphabet = high - low + 1
    facts: dict[str, Any] = {
        "normaliser": normaliser.to_json(),
        "kinds": list(kinds),
        "min_token": low,
        "alphabet": alphabet,
        "scale": params.scale,
    }
    arrays: dict[str, NDArray[Any]] = {}
    if params.processor:
        told = _open_processor(params.processor)
        facts["processor"] = {"name": params.processor, "scale": float(getattr(told, "scale", params.scale))}
        facts["processor"]["vocabulary"] = int(getattr(told, "vocab_size", 0))
    else:
        if alphabet > params.vocabulary:
            raise UsageError(
                f"coefficients take {alphabet} values ({low} to {high}), more than --vocabulary {params.vocabulary}\n"
                f"  Raise it above {alphabet}, or lower --scale."
            )
        sequences = list(np.concatenate(kept) - low)
        arrays["merges"] = fit_merges(sequences, alphabet, params.vocabulary)
        facts["symbols"] = alphabet + len(arrays["merges"])
    return Prepared(
        facts=facts,
        arrays=arrays,
        contract={
            "model": params.processor or "dct + byte pairs",
            "weights": digest_of([facts, [a.tolist() for a in arrays.values()]]),
            "layer": "FAST",
            "dtype": "uint16",
            "horizon_frames": params.chunk,
            "horizon_seconds": params.chunk / info.fps,
            "normaliser": normaliser.digest,
        },
    )


def makes(params: Params, info: DatasetInfo, prepared: Prepared) -> tuple[ArraySpec, ...]:
    ragged = {"primary": True, "ragged": {"start": "offset", "rows": "count"}}
    hidden = {"auxiliary": True}
    return (
        ArraySpec("ids", (), "uint16", (), ragged, "id", 0),
        ArraySpec("offset", (), "int64", (), hidden),
        ArraySpec("count", (), "int32", (), hidden),
        ArraySpec("is_pad", (params.chunk,), "bool", ("step",), hidden),
    )


Encode = Callable[[NDArray[np.float64]], list[NDArray[np.uint16] | None]]


def open_run(params: Params, info: DatasetInfo, prepared: Prepared) -> Run:
    normaliser = Normaliser.from_json(prepared.facts["normaliser"])
    kinds = prepared.facts["kinds"]
    encode = encoder(params, prepared)

    def run(episode: EpisodeView) -> Iterator[Block]:
        actions = episode.columns([params.column])[params.column]
        chunks, is_pad, sound = _chunks(actions, normaliser, kinds, params.chunk)
        found: list[NDArray[np.uint16] | None] = [None] * len(chunks)
        for t, ids in zip(np.flatnonzero(sound), encode(chunks[sound]), strict=True):
            found[t] = ids
        count = np.array([0 if ids is None else len(ids) for ids in found], dtype=np.int32)
        yield {
            "ids": np.concatenate([np.zeros(0, np.uint16), *(ids for ids in found if ids is not None)]),
            "offset": np.concatenate([[0], np.cumsum(count)[:-1]]).astype(np.int64),
            "count": count,
            "is_pad": is_pad,
        }

    return run


def encoder(params: Params, prepared: Prepared) -> Encode:
    """Chunks [B, H, D] -> tokens of each, None where a chunk lies outside what was fitted; all checked."""
    if params.processor:
        return _processor_encoder(params)
    low, alphabet = int(prepared.facts["min_token"]), int(prepared.facts["alphabet"])
    merges = prepared.arrays["merges"]

    def encode(chunks: NDArray[np.float64]) -> list[NDArray[np.uint16] | None]:
        symbols = quantise(chunks, params.scale) - low
        inside = ((symbols >= 0) & (symbols < alphabet)).all(axis=1)
        found: list[NDArray[np.uint16] | None] = [None] * len(chunks)
        for i, ids in zip(
            np.flatnonzero(inside), bpe_encode(list(symbols[inside]), merges, alphabet), strict=True
        ):
            if not np.array_equal(bpe_decode(ids, merges, alphabet), symbols[i]):
                raise AssertionError("byte pairs that do not decode to what was encoded")
            found[i] = ids.astype(np.uint16)
        return found

    return encode


def decode(ids: NDArray[np.integer], params: Params, prepared: Prepared, dims: int) -> NDArray[np.float64]:
    """Tokens -> the normalised chunk [H, D]; DataError where they do not spell one, never zeros."""
    low, alphabet = int(prepared.facts["min_token"]), int(prepared.facts["alphabet"])
    symbols = bpe_decode(ids, prepared.arrays["merges"], alphabet)
    if len(symbols) != params.chunk * dims:
        raise DataError(
            f"{len(ids)} tokens spell {len(symbols)} coefficients, not {params.chunk} x {dims}\n"
            "  They are no action chunk of this target."
        )
    return restore(symbols[None] + low, params.chunk, params.scale)[0]


def _open_processor(source: str) -> Any:
    try:
        from transformers import AutoProcessor
    except ImportError as error:
        raise UsageError(
            f"--processor needs transformers, which is not installed ({error.name})\n"
            '  Install it:  pip install "dpipe[train]"'
        ) from None
    return AutoProcessor.from_pretrained(source, trust_remote_code=True)


def _processor_encoder(params: Params) -> Encode:
    processor = _open_processor(params.processor)

    def encode(chunks: NDArray[np.float64]) -> list[NDArray[np.uint16] | None]:
        if len(chunks) == 0:
            return []
        steps, dims = chunks.shape[1:]
        rows = processor(chunks.astype(np.float32))
        found: list[NDArray[np.uint16] | None] = []
        # It decodes what it cannot read to zeros, so equality is asked of every chunk.
        back = np.asarray(processor.decode(rows, time_horizon=steps, action_dim=dims))
        scale = float(getattr(processor, "scale", params.scale))
        within = (
            np.abs(back - chunks).reshape(len(chunks), -1).max(axis=1) <= np.sqrt(steps) / (2 * scale) + 1e-6
        )
        for ids, sound in zip(rows, within, strict=True):
            found.append(np.asarray(ids, dtype=np.uint16) if sound else None)
        return found

    return encode


def report(
    params: Params, dataset: DatasetView, prepared: Prepared, reader: TargetReader, folder: Path
) -> dict[str, Any]:
    """Tokens a chunk, how much is left out, and the error of reading them back."""
    normaliser = Normaliser.from_json(prepared.facts["normaliser"])
    kinds, dims = prepared.facts["kinds"], normaliser.dim
    lengths, squares, worst, values, unsound = [], 0.0, 0.0, 0, 0
    for position, (_, (actions,)) in enumerate(column_rows(dataset, [params.column])):
        chunks, _, sound = _chunks(actions, normaliser, kinds, params.chunk)
        count = np.asarray(reader.read(position, "count"))
        lengths.append(count[sound])
        unsound += int((~sound).sum())
        exact = chunks[sound & (count > 0)]
        if len(exact) and not params.processor:
            error = restore(quantise(exact, params.scale), params.chunk, params.scale) - exact
            squares, values = squares + float((error**2).sum()), values + error.size
            worst = max(worst, float(np.abs(error).max()))
    counts = np.concatenate(lengths)
    written = counts[counts > 0]
    result: dict[str, Any] = {
        **{name: prepared.facts[name] for name in ("min_token", "alphabet", "scale")},
        "tokens_per_chunk": float(written.mean()) if len(written) else 0.0,
        "tokens_per_chunk_q99": float(np.quantile(written, 0.99)) if len(written) else 0.0,
        "longest": int(written.max(initial=0)),
        "values_per_token": params.chunk * dims / float(written.mean()) if len(written) else 0.0,
        "chunks": len(counts),
        "chunks_outside_the_fitted_range": int((counts == 0).sum()),
        "chunks_with_invalid_actions": unsound,
    }
    if values:
        result |= {"rmse": float(np.sqrt(squares / values)), "largest_error": worst}
    return result


STAGE = Stage(
    name="fast",
    version=1,
    Params=Params,
    summary="action chunks as a few byte-pair tokens of their cosines",
    recipes=(),
    variant=variant,
    prepare=prepare,
    makes=makes,
    open=open_run,
    report=report,
)
