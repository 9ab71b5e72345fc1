"""fast: the published numbers, byte pairs that come back, and no zeros where something cannot be read."""

import shutil
from itertools import pairwise

import numpy as np
import pytest
from dpipe.pipeline import target_parts
from dpipe.pipeline.precompute import precompute
from dpipe.schemas.chunks import chunk_index
from dpipe.schemas.errors import DataError, UsageError
from dpipe.schemas.normalisers import fit
from dpipe.stages import bpe
from dpipe.stages.fast import Params, dct_matrix, decode, quantise, restore
from dpipe.streams.targets import open_targets
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_dataset import ACTION, episode_columns, write_tiny

EPISODES = [(seed, 30 + 5 * seed) for seed in range(4)]

# --- cosines -----------------------------------------------------------------------------------------------


def test_four_ones_are_one_coefficient():
    ones = np.ones((1, 4, 1))
    assert (dct_matrix(4) @ ones[0])[:, 0] == pytest.approx([2, 0, 0, 0], abs=1e-12)
    assert quantise(ones, 10)[0].tolist() == [20, 0, 0, 0]


def test_a_ramp_and_a_sine_have_these_coefficients():
    t = np.arange(8)
    chunk = np.stack([2 * t / 7 - 1, np.sin(2 * np.pi * t / 7)], axis=1)[None]
    found = quantise(chunk, 10)
    assert found[0].tolist() == [0, 0, -18, 13, 0, 0, -2, -13, 0, 0, -1, -2, 0, 0, 0, 0]
    error = restore(found, 8, 10) - chunk
    assert np.abs(error).max() == pytest.approx(0.0415, abs=5e-5)
    assert np.sqrt((error**2).mean()) == pytest.approx(0.0243, abs=5e-5)


def test_the_transform_is_scipys_orthonormal_dct():
    from scipy.fft import dct

    chunk = np.random.default_rng(0).normal(size=(11, 3))
    np.testing.assert_allclose(dct_matrix(11) @ chunk, dct(chunk, axis=0, norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(dct_matrix(11) @ dct_matrix(11).T, np.eye(11), atol=1e-12)


@given(st.integers(1, 20), st.integers(0, 2**16))
@settings(max_examples=40)
def test_no_value_is_off_by_more_than_the_bound(steps, seed):
    chunk = np.random.default_rng(seed).uniform(-1, 1, (3, steps, 2))
    error = restore(quantise(chunk, 10), steps, 10) - chunk
    assert np.abs(error).max() <= np.sqrt(steps) * 0.05 + 1e-9


# --- byte pairs --------------------------------------------------------------------------------------------


def test_the_most_frequent_pair_is_merged_first_and_never_across_sequences():
    merges = bpe.fit_merges([np.array([1, 2, 1, 2]), np.array([1, 2, 0]), np.array([2, 1])], 3, 4)
    assert merges.tolist() == [[1, 2]]
    assert [ids.tolist() for ids in bpe.encode([np.array([2, 1, 2, 0])], merges, 3)] == [[2, 3, 0]]


def test_runs_merge_from_the_left_without_overlap():
    merges = np.array([[0, 0]], dtype=np.int32)
    found = bpe.encode([np.zeros(n, int) for n in range(6)], merges, 1)
    assert [ids.tolist() for ids in found] == [[], [0], [1], [1, 0], [1, 1], [1, 1, 0]]


def test_fitting_stops_where_no_pair_occurs_twice():
    assert len(bpe.fit_merges([np.arange(5)], 5, 100)) == 0
    assert bpe.encode([], np.zeros((0, 2), np.int32), 5) == []


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=30), min_size=1, max_size=6), st.integers(4, 20))
def test_byte_pairs_come_back_and_equal_the_slow_encoder(sequences, vocabulary):
    arrays = [np.array(s, dtype=int) for s in sequences]
    merges = bpe.fit_merges(arrays, 4, vocabulary)
    for sequence, ids in zip(arrays, bpe.encode(arrays, merges, 4), strict=True):
        assert bpe.decode(ids, merges, 4).tolist() == sequence.tolist()
        assert ids.tolist() == slow_encode(sequence.tolist(), merges.tolist(), 4)


def slow_encode(symbols, merges, alphabet):
    """Always the earliest-made merge that occurs, at its leftmost place."""
    rank = {tuple(pair): i for i, pair in enumerate(merges)}
    while True:
        found = [(rank[p], i) for i, p in enumerate(pairwise(symbols)) if p in rank]
        if not found:
            return symbols
        made, at = min(found)
        symbols = [*symbols[:at], alphabet + made, *symbols[at + 2 :]]


def test_against_the_tokenizers_library_on_the_same_merges():
    tokenizers = pytest.importorskip("tokenizers")
    rng = np.random.default_rng(0)
    words = [rng.integers(0, 6, 40) for _ in range(30)]
    merges = bpe.fit_merges(words, 6, 40)
    spelt = ["".join(chr(97 + s) for s in letters) for letters in bpe.spellings(merges, 6)]
    model = tokenizers.models.BPE(
        vocab={word: i for i, word in enumerate(spelt)},
        merges=[(spelt[a], spelt[b]) for a, b in merges.tolist()],
    )
    theirs = tokenizers.Tokenizer(model)
    for word, ids in zip(words, bpe.encode(words, merges, 6), strict=True):
        assert theirs.encode("".join(chr(97 + s) for s in word)).ids == ids.tolist()


# --- the target --------------------------------------------------------------------------------------------


def make(root, **options):
    (made,) = precompute(root, ["fast"], {"fast": {"chunk": 8, "vocabulary": 300, **options}})
    return made


def normal_chunks(e):
    rows = np.concatenate([episode_columns(*x)["action"] for x in EPISODES])
    actions = episode_columns(*EPISODES[e])["action"]
    return fit(rows, names=ACTION).normalise(actions[chunk_index(len(actions), 8)[0]])


def test_every_chunk_decodes_to_itself_within_the_rounding(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES, parts=[2, 2])
    made = make(root)
    assert made.folder.name == "H8-q01q99-v300"
    saved = target_parts.load_prepared(made.folder, target_parts.read_json(made.folder / "prepared.json"))
    targets = open_targets(root, ["fast", "fast:array=is_pad,as=step"])
    for e, (_, frames) in enumerate(EPISODES):
        chunks = normal_chunks(e)
        found = targets.take(episode=e, frame=np.arange(frames))
        for t in range(frames):
            ids = found["fast"][t][~found["fast_is_pad"][t]]
            back = decode(ids, Params(chunk=8, vocabulary=300), saved, 4)
            assert np.abs(back - chunks[t]).max() <= np.sqrt(8) * 0.05 + 1e-6
        np.testing.assert_array_equal(found["step"], chunk_index(frames, 8)[1])
    report = made.report
    assert report["chunks"] == sum(n for _, n in EPISODES) and report["chunks_outside_the_fitted_range"] == 0
    assert report["rmse"] < 0.0289 * 1.1 and report["values_per_token"] > 1
    assert report["tokens_per_chunk"] < 32


def test_a_chunk_outside_the_fitted_alphabet_gets_no_tokens_and_is_counted(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES)
    make(root, normaliser="meanstd")
    shutil.rmtree(root / "data")

    def wild(seed, frames):
        columns = episode_columns(seed, frames)
        if seed == 9 and frames > 10:
            columns["action"][10, 0] = 1e4
        return columns

    write_tiny(root, [*EPISODES, (9, 30)], columns=wild)
    made = make(root, normaliser="meanstd")
    assert made.computed_episodes == 1
    report = made.report
    assert report["chunks_outside_the_fitted_range"] == 8  # chunks that reach frame 10
    found = open_targets(root, ["fast"]).take(episode=4, frame=[2, 3, 10, 11])
    assert found["fast_is_pad"].all(axis=1).tolist() == [False, True, True, False]


def test_actions_that_are_no_numbers_have_no_tokens(tmp_path):
    def broken(seed, frames):
        columns = episode_columns(seed, frames)
        if seed == 1 and frames > 5:
            columns["action"][5] = np.nan
        return columns

    made = make(write_tiny(tmp_path / "set", EPISODES, columns=broken))
    assert made.report["chunks_with_invalid_actions"] == 6  # frames 0 to 5 reach it


def test_tokens_that_spell_no_chunk_are_refused_not_read_as_zeros(tmp_path):
    made = make(write_tiny(tmp_path / "set", EPISODES))
    saved = target_parts.load_prepared(made.folder, target_parts.read_json(made.folder / "prepared.json"))
    with pytest.raises(DataError, match="no action chunk"):
        decode(np.array([0, 1, 2]), Params(chunk=8, vocabulary=300), saved, 4)


def test_a_vocabulary_below_the_alphabet_is_refused_with_the_number(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES)
    with pytest.raises(UsageError, match=r"coefficients take \d+ values .* more than --vocabulary 10"):
        make(root, vocabulary=10)


PROCESSOR = '''
import numpy as np
from transformers.processing_utils import ProcessorMixin


class Plain(ProcessorMixin):
    """Rounds to tenths, one token each, and has no symbol above 1.5."""

    attributes = []
    scale, vocab_size = 10.0, 64

    def __init__(self):
        pass

    def __call__(self, chunks):
        return [np.clip(np.rint(c * 10) + 15, 0, 30).astype(int).ravel().tolist() for c in chunks]

    def decode(self, rows, time_horizon, action_dim):
        return np.stack([(np.array(r) - 15).reshape(time_horizon, action_dim) / 10 for r in rows])
'''


@pytest.mark.slow
def test_a_published_processor_encodes_instead_and_is_checked_too(tmp_path):
    pytest.importorskip("transformers")
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "processing_plain.py").write_text(PROCESSOR)
    (folder / "processor_config.json").write_text(
        '{"processor_class": "Plain", "auto_map": {"AutoProcessor": "processing_plain.Plain"}}'
    )
    root = write_tiny(tmp_path / "set", EPISODES)
    made = make(root, processor=str(folder), normaliser="meanstd")
    assert made.folder.name == "H8-meanstd-plain"
    found = open_targets(root, ["fast"]).take(index=[0, 1])
    kept = ~found["fast_is_pad"]
    assert made.report["chunks_outside_the_fitted_range"] > 0  # z-scores beyond 1.5 were not read back
    assert kept.sum(axis=1).tolist() in ([32, 32], [0, 32], [32, 0], [0, 0])
