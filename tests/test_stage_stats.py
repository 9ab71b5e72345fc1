"""stats: exact over every frame, and over every chunk relative to its start, without decoding anything."""

import json

import numpy as np
import pytest
from dpipe.pipeline import precompute as module
from dpipe.pipeline.precompute import precompute
from dpipe.schemas.errors import UsageError
from dpipe.schemas.normalisers import make_normaliser
from tiny_dataset import ACTION, episode_columns, write_tiny

EPISODES = [(seed, 20 + 3 * seed) for seed in range(5)]


def test_absolute_statistics_are_numpys_over_all_frames(tmp_path):
    (made,) = precompute(write_tiny(tmp_path / "set", EPISODES), ["stats"])
    assert made.folder.name == "absolute"
    rows = np.concatenate([episode_columns(*e)["observation.state"] for e in EPISODES]).astype(np.float64)
    found = made.report["columns"]["observation.state"]
    assert set(made.report["columns"]) == {"observation.state", "action"}
    for name, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
        np.testing.assert_array_equal(found[name], np.quantile(rows, q, axis=0))
    np.testing.assert_array_equal(found["min"], rows.min(0))
    np.testing.assert_allclose(found["std"], rows.std(0), rtol=1e-12)
    assert found["count"] == [len(rows)]


def test_relative_statistics_count_every_unpadded_step_of_every_chunk(tmp_path, monkeypatch):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    monkeypatch.setattr(module.Dataset, "frames", lambda *_: pytest.fail("a frame was decoded"))
    (made,) = precompute(root, ["stats"], {"stats": {"relative": True, "chunk": 6}})
    assert made.folder.name == "relative6"
    rows = []
    for e in EPISODES:
        columns = episode_columns(*e)
        for t in range(e[1]):
            for h in range(6):
                if t + h < e[1]:
                    row = columns["action"][t + h].astype(np.float64)
                    row[:3] -= columns["observation.state"][t, :3].astype(np.float64)
                    rows.append(row)
    found = made.report["columns"]["action"]
    assert found["count"] == [len(rows)] and found["names"] == list(ACTION)
    for name, q in (("q01", 0.01), ("q99", 0.99)):
        np.testing.assert_allclose(found[name], np.quantile(np.array(rows), q, axis=0), rtol=1e-12)
    assert found["min"][3] == -1 and found["levels"][3] == 2  # the gripper stays what it was


def test_the_report_feeds_any_normaliser(tmp_path):
    (made,) = precompute(write_tiny(tmp_path / "set", EPISODES), ["stats"])
    found = json.loads((made.folder / "report.json").read_text())["columns"]["action"]
    statistics = {name: found[name] for name in ("min", "max", "mean", "std", "q01", "q99", "levels")}
    normaliser = make_normaliser("q01q99", statistics, names=found["names"])
    assert normaliser.kinds == ("scaled", "scaled", "scaled", "binary")


def test_deltas_have_no_start_to_be_measured_from(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["action"]["names"] = ["delta_x", "delta_y", "delta_z", "gripper"]
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(UsageError, match="already relative"):
        precompute(root, ["stats"], {"stats": {"relative": True, "chunk": 6}})
