"""`dpipe info` names what lies there; `dpipe diff` finds the one thing that was changed."""

import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dpipe.pipeline.diff import diff
from dpipe.pipeline.info import describe
from dpipe.samples import write_sample
from dpipe.schemas.errors import DataError, UsageError
from small_datasets import write_dataset, write_video
from tiny_dataset import write_tiny


def facts(path: Path) -> tuple[str, dict[str, str]]:
    told = describe(path)
    assert told.to_text().startswith(f"{path}: {told.kind}")
    return told.kind, dict(told.rows)


def test_a_dataset_is_told_with_its_columns_and_targets(tmp_path: Path):
    from dpipe.pipeline.precompute import precompute

    root = write_tiny(tmp_path / "one", [(0, 20), (1, 30)])
    precompute(root, ["stats"])
    kind, rows = facts(root)
    assert kind == "LeRobot v3.0 dataset, converted by dpipe"
    assert rows["frames"] == "50, 5.0 s at 10 fps" and "gripper_width" in rows["observation.state"]
    (variant,) = (root / "dpipe/targets/stats").iterdir()
    assert rows["target stats"] == variant.name
    kind, rows = facts(variant)
    assert kind == "target" and rows["episodes"] == "2"


@pytest.mark.parametrize("source", ["libero", "calvin", "egodex", "agibot"])
def test_raw_recordings_are_known_by_their_layout(tmp_path: Path, source: str):
    write_sample(source, tmp_path / "somewhere", episodes=2, seed=0)
    kind, rows = facts(tmp_path / "somewhere")
    assert kind == f"raw {source} recordings" and int(rows["recordings"].split()[0]) >= 1


def test_single_files_are_known_by_their_first_bytes(tmp_path: Path):
    import h5py
    import pyarrow as pa
    import pyarrow.parquet as pq

    with h5py.File(tmp_path / "a.bin", "w") as file:
        file.attrs["made"] = "here"
        for i in range(20):
            file[f"data/demo_{i:02d}/actions"] = np.zeros((5, 7), np.float32)
    kind, rows = facts(tmp_path / "a.bin")
    assert (
        kind == "HDF5 file" and rows["@made"] == "here" and rows["data/demo_00/actions"] == "float32 [5, 7]"
    )
    assert rows["data/..."] == "18 more, to demo_19"
    write_video(tmp_path / "b.mp4", [np.zeros((32, 48, 3), np.uint8)] * 6, fps=10)
    (tmp_path / "b.mp4").rename(tmp_path / "b.bin")
    kind, rows = facts(tmp_path / "b.bin")
    assert (kind, rows["pictures"], rows["frames"], rows["fps"]) == ("MP4 video", "48 x 32", "6, 0.6 s", "10")
    pq.write_table(pa.table({"x": [1, 2, 3]}), tmp_path / "c.bin")
    assert facts(tmp_path / "c.bin")[1]["rows"] == "3 in 1 row groups"
    np.savez(tmp_path / "d.npz", actions=np.zeros((4, 7)), odd=np.array([{}], dtype=object))
    kind, rows = facts(tmp_path / "d.npz")
    assert rows == {"actions": "float64 [4, 7]", "odd": "pickled objects [1]"}


def test_a_pickle_is_not_opened(tmp_path: Path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    kind, rows = facts(path)
    assert kind == "pickle" and "not looked at" in rows["contents"]


def test_weights_are_counted_from_their_header(tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    folder = tmp_path / "step-000010"
    folder.mkdir()
    arrays = {"head.weight": np.zeros((3, 4), np.float32), "head.bias": np.zeros(3, np.float32)}
    safetensors.save_file(arrays, folder / "model.safetensors")
    kind, rows = facts(folder)
    assert kind == "checkpoint" and rows["tensors"] == "2, 15 numbers of F32"


def test_zarr_of_both_formats_lists_its_arrays(tmp_path: Path):
    zarr = pytest.importorskip("zarr")
    for form in (2, 3):
        group = zarr.open_group(tmp_path / f"z{form}", mode="w", zarr_format=form)
        group.create_array("data/action", shape=(5, 7), dtype="f4")
        kind, rows = facts(tmp_path / f"z{form}")
        assert kind == f"Zarr format {form} tree" and "[5, 7]" in rows["data/action"]


def test_what_is_damaged_or_unknown_says_so(tmp_path: Path):
    with pytest.raises(UsageError, match="nothing at"):
        describe(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    assert describe(tmp_path / "empty").kind == "a folder of no kind dpipe knows"
    root = write_dataset(tmp_path / "x", [4], kind="none")
    (root / "meta/info.json").write_text("{ torn")
    with pytest.raises(DataError, match="damaged"):
        describe(root)
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04" + bytes(20))
    with pytest.raises(DataError, match="damaged"):
        describe(tmp_path / "bad.zip")
    zipfile.ZipFile(tmp_path / "good.zip", "w").close()


def test_a_folder_is_told_of_without_heavy_packages(tmp_path: Path):
    """What makes it quick: neither torch, pyarrow, pandas nor av is imported."""
    root = write_dataset(tmp_path / "x", [4, 5], kind="none")
    code = (
        "import sys\nfrom dpipe.cli import cli\n"
        f"cli.main(['info', {str(root)!r}], standalone_mode=False)\n"
        "heavy = {'torch', 'pyarrow', 'pandas', 'av', 'h5py', 'dask', 'duckdb'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    begin = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "episodes" in done.stdout and time.process_time() - begin < 5


# --- diff -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    root = write_dataset(tmp_path / "a", [6, 8, 4], episodes_per_file=1)
    shutil.copytree(root, tmp_path / "b")
    return root, tmp_path / "b"


def found(pair: tuple[Path, Path]) -> dict[str, tuple[str, str]]:
    return {d.where: (d.a, d.b) for d in diff(*pair).differences}


def test_equal_datasets_do_not_differ(pair: tuple[Path, Path]):
    assert diff(*pair).same


def test_a_convention_is_named(pair: tuple[Path, Path]):
    path = pair[1] / "meta/info.json"
    info = json.loads(path.read_text())
    info["robot_type"] = "other"
    info["features"]["action"]["names"] = ["x", "y", "hand"]
    path.write_text(json.dumps(info))
    assert found(pair) == {
        "robot_type": ("paper", "other"),
        "features.action.names": ("['x', 'y', 'gripper']", "['x', 'y', 'hand']"),
    }


def test_one_number_of_the_statistics_is_named(pair: tuple[Path, Path]):
    (pair[1] / "meta/stats.json").write_text(json.dumps({"action": {"mean": [0, 0.5, 0]}}))
    assert found(pair) == {"action.mean[y]": ("0", "0.5")}


def test_the_first_differing_value_is_found(pair: tuple[Path, Path]):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = pair[1] / "data/chunk-000/file-001.parquet"
    table = pq.read_table(path)
    action = np.array(table.column("action").to_pylist(), np.float32)
    action[5, 1] += 0.25  # frame 5 of episode 1
    column = pa.FixedSizeListArray.from_arrays(pa.array(action.reshape(-1)), 3)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), path)
    ((where, values),) = found(pair).items()
    assert where == "episode 1, action[y], first at frame 5, in 12% of the frames"
    assert values == ("-5", "-4.75")


def test_other_pixels_are_found_by_their_packets(pair: tuple[Path, Path]):
    video = next((pair[1] / "videos").rglob("file-002.mp4"))
    write_video(video, [np.full((40, 60, 3), 90, np.uint8)] * 4, fps=10)
    assert list(found(pair)) == ["episode 2, observation.images.image"]


def test_a_longer_dataset_says_where_the_other_ends(tmp_path: Path):
    a = write_dataset(tmp_path / "a", [6, 8], kind="none", stats=False)
    b = write_dataset(tmp_path / "b", [6], kind="none", stats=False, tasks=("pick", "place"))
    told = found((a, b))
    assert told["episodes"] == ("2", "1") and told["episode 1"][1] == "B ends"
