"""One's own HDF5 files: what a first look finds and a map says, what is refused, converters outside the project."""

import io
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import h5py
import numpy as np
import pytest
from dpipe.converters import load_converter
from dpipe.converters.mapped import CONVERTER, Options, embodiment, natural, open_points, parse_map, read_map
from dpipe.converters.mapped_draft import draft_map
from dpipe.schemas.errors import UsageError
from dpipe.streams.dataset import open_dataset
from pages import run_page
from small_datasets import number_of, picture
from trees import run_convert


def frames_of(count: int, camera: int = 0, first: int = 0, size: tuple[int, int] = (40, 60)) -> np.ndarray:
    return np.stack([picture(first + t, camera, *size) for t in range(count)])


def vectors(rows: int, dim: int, first: int = 0) -> np.ndarray:
    """value[t, d] = first + t + d / 10."""
    return first + np.arange(rows)[:, None] + np.arange(dim) / 10


def write_robomimic(path: Path, demos: int = 3, language: bool = False) -> Path:
    """data/demo_<i> of 6 + i steps; the gripper closes half-way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arguments = {
        "env_name": "Lift",
        "type": 1,
        "env_kwargs": {
            "control_freq": 20,
            "robots": ["Panda"],
            "controller_configs": {"type": "OSC_POSE", "control_delta": True},
        },
    }
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(arguments)
        for i in range(demos):
            rows = 6 + i
            demo = data.create_group(f"demo_{i}")
            demo.attrs["num_samples"] = rows
            if language:
                demo.attrs["ep_meta"] = json.dumps({"lang": f"lift cube {i}"})
            actions = vectors(rows, 7, i)
            actions[:, 6] = np.where(np.arange(rows) < 3, -1, 1)
            demo["actions"], demo["states"], demo["rewards"] = actions, vectors(rows, 32), np.zeros(rows)
            demo["dones"] = np.zeros(rows, np.int64)
            for group in ("obs", "next_obs"):
                demo[f"{group}/agentview_image"] = frames_of(rows, 0, 10 * i)
                demo[f"{group}/robot0_eef_pos"] = vectors(rows, 3)
                demo[f"{group}/robot0_eef_quat"] = vectors(rows, 4)
                demo[f"{group}/robot0_gripper_qpos"] = vectors(rows, 2)
                demo[f"{group}/robot0_joint_vel"] = vectors(rows, 7)
                demo[f"{group}/object"] = vectors(rows, 10)
        file["mask/train"] = np.array([b"demo_0", b"demo_2"])
        file["mask/valid"] = np.array([b"demo_1"])
    return path


def jpeg(frame: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_aloha(folder: Path, episodes: int = 2, compressed: bool = False, swap: bool = False) -> Path:
    """episode_<i>.hdf5 of 5 + i steps, 14 joints, two cameras; compressed as act-plus-plus pads its JPEGs."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(episodes):
        rows = 5 + i
        with h5py.File(folder / f"episode_{i}.hdf5", "w") as file:
            file.attrs["sim"] = False
            file.attrs["compress"] = compressed
            file["action"] = vectors(rows, 14, i)
            file["observations/qpos"] = vectors(rows, 14) / 2
            file["observations/qvel"] = vectors(rows, 14)
            for number, camera in enumerate(("cam_high", "cam_left_wrist")):
                frames = frames_of(rows, number, 10 * i)
                if compressed:
                    coded = [jpeg(f[..., ::-1] if swap else f) for f in frames]
                    stored = np.zeros((rows, max(map(len, coded)) + 7), np.uint8)
                    for t, code in enumerate(coded):
                        stored[t, : len(code)] = np.frombuffer(code, np.uint8)
                    file[f"observations/images/{camera}"] = stored
                else:
                    file[f"observations/images/{camera}"] = frames
    return folder


def answered(draft: str, /, **answers) -> dict:
    """A draft with its open points answered: fps, text, open, close."""
    lines = []
    for line in draft.splitlines():
        name = line.partition(" =")[0]
        lines.append(f"{name} = {json.dumps(answers[name])}" if '"?"' in line and name in answers else line)
    return tomllib.loads("\n".join(lines))


def convert(raw: Path, out: Path, told: dict, **changes):
    return run_convert(raw, out, "mapped", options=Options(told), **changes)


# --- the draft --------------------------------------------------------------------------------------------


def test_a_robomimic_file_is_recognised_down_to_its_rate_and_controller(tmp_path: Path):
    write_robomimic(tmp_path / "raw/image.hdf5")
    draft = draft_map(tmp_path / "raw")
    assert (draft.layout, draft.open) == ("robomimic", ("instruction.text",))
    told = tomllib.loads(draft.text)
    assert (told["fps"], told["robot_type"]) == (20, "panda")
    assert told["files"]["episodes"] == "data/demo_*"
    assert told["files"]["splits"] == {"train": "mask/train", "validation": "mask/valid"}
    assert told["action"]["datasets"] == ["actions"] and told["action"]["meaning"] == "osc_pose_delta"
    assert told["action"]["names"][0] == "delta_x" and told["action"]["names"][6] == "gripper"
    assert told["gripper"] == {"open": -1, "close": 1}
    assert told["state"]["datasets"] == [
        "obs/robot0_eef_pos",
        "obs/robot0_eef_quat",
        "obs/robot0_gripper_qpos",
    ]
    assert told["state"]["names"][3:7] == [f"eef_quat_{axis}" for axis in "xyzw"]
    assert told["cameras"] == {"agentview": {"dataset": "obs/agentview_image"}}


def test_a_robomimic_file_converts_with_its_splits_in_the_order_of_its_numbers(tmp_path: Path):
    write_robomimic(tmp_path / "raw/image.hdf5")
    told = answered(draft_map(tmp_path / "raw").text, text="lift the cube")
    result = convert(tmp_path / "raw", tmp_path / "out", told)
    assert result.dropped == ()
    dataset = open_dataset(tmp_path / "out")
    assert [dataset.episodes.source_id(e) for e in range(3)] == [f"image/data/demo_{i}" for i in (0, 2, 1)]
    assert dataset.splits == {"train": (0, 2), "validation": (2, 3)} and dataset.fps == 20
    actions = dataset.columns(["action"], 1)["action"]
    assert np.array_equal(actions[:, :6], vectors(8, 7, 2)[:, :6].astype(np.float32))
    state = dataset.columns(["observation.state"], 0)["observation.state"]
    expected = np.concatenate([vectors(6, d) for d in (3, 4, 2)], axis=1).astype(np.float32)
    assert np.array_equal(state, expected)
    frames = dataset.frames(2, "observation.images.agentview", 0, 7)
    assert [number_of(f) for f in frames] == [(10 + t, 0) for t in range(7)]
    conventions = json.loads((tmp_path / "out/dpipe/manifest.json").read_text())["conventions"]
    assert conventions["action"] == "osc_pose_delta"
    assert conventions["gripper_action"] == {"open": -1, "close": 1}


def test_sentences_in_the_files_are_taken_from_each_episode(tmp_path: Path):
    write_robomimic(tmp_path / "raw/a.hdf5", demos=2, language=True)
    draft = draft_map(tmp_path / "raw")
    assert draft.open == ()
    convert(tmp_path / "raw", tmp_path / "out", tomllib.loads(draft.text))
    assert open_dataset(tmp_path / "out").tasks == ["lift cube 0", "lift cube 1"]


@pytest.mark.parametrize("compressed", [False, True])
def test_aloha_files_are_recognised_and_asked_only_for_rate_and_sentence(tmp_path: Path, compressed: bool):
    raw = write_aloha(tmp_path / "raw", compressed=compressed, swap=compressed)
    draft = draft_map(raw)
    assert (draft.layout, draft.open) == ("ALOHA", ("fps", "instruction.text"))
    told = answered(draft.text, fps=50, text="fold the shirt")
    assert told["action"]["names"][6] == "left_gripper" and told["action"]["names"] == told["state"]["names"]
    assert told["gripper"] == {"open": 1, "close": 0}
    assert told["cameras"]["cam_high"].get("colours", "rgb") == ("bgr" if compressed else "rgb")
    assert convert(raw, tmp_path / "out", told).dropped == ()
    dataset = open_dataset(tmp_path / "out")
    assert dataset.fps == 50 and dataset.episodes.length.tolist() == [5, 6]
    for number, camera in enumerate(("cam_high", "cam_left_wrist")):
        frames = dataset.frames(1, f"observation.images.{camera}", 0, 6)
        assert [number_of(f) for f in frames] == [(10 + t, number) for t in range(6)]
    assert np.array_equal(dataset.columns(["action"], 1)["action"], vectors(6, 14, 1).astype(np.float32))


def test_a_draft_of_unknown_files_says_what_it_saw_and_leaves_the_rest_open(tmp_path: Path):
    (tmp_path / "raw").mkdir()
    with h5py.File(tmp_path / "raw/log.h5", "w") as file:
        for i in range(2):
            rows = 8 + i
            group = file.create_group(f"take_{i}")
            group["cam/rgb"] = frames_of(rows)
            group["arm_pos"], group["arm_vel"] = vectors(rows, 6), vectors(rows, 6)
            command = vectors(rows, 7)
            command[:, 6] = np.arange(rows) % 2
            group["command"], group["time_s"] = command, np.arange(rows) / 15
            group["depth"] = np.zeros((rows, 40, 60), np.uint16)
    draft = draft_map(tmp_path / "raw")
    assert draft.layout == "" and draft.open == ("fps", "instruction.text", "gripper.open", "gripper.close")
    assert "each group take_* is an episode" in draft.report
    for line in (
        "cam/rgb  8 x 40 x 60 x 3 uint8   likely camera, 60x40",
        "command  8 x 7 float64   likely action",
        "arm_pos  8 x 6 float64   likely state",
        "depth    8 x 40 x 60 uint16",
    ):
        assert line in draft.report
    assert "'time_s' steps by 0.0666667" in draft.text and "gripper takes 0 and 1" in draft.text
    told = tomllib.loads(draft.text)
    assert told["files"] == {"pattern": "*.h5", "episodes": "take_*"}
    assert told["state"]["datasets"] == ["arm_pos"] and told["action"]["names"][6] == "gripper"
    assert list(told["cameras"]) == ["cam"] and "# [columns.arm_vel]" in draft.text


def test_two_robots_in_one_file_are_not_two_episodes(tmp_path: Path):
    (tmp_path / "raw").mkdir()
    with h5py.File(tmp_path / "raw/a.hdf5", "w") as file:
        for robot in ("robot0", "robot1"):
            file[f"{robot}/qpos"], file[f"{robot}/action"] = vectors(5, 6), vectors(5, 6)
    told = tomllib.loads(draft_map(tmp_path / "raw").text)
    assert told["files"]["episodes"] == "" and told["state"]["datasets"] == ["robot0/qpos", "robot1/qpos"]


def test_an_unreadable_first_file_does_not_hide_the_others(tmp_path: Path):
    write_aloha(tmp_path / "raw")
    (tmp_path / "raw/episode_0.hdf5").write_bytes(b"cut short")
    assert draft_map(tmp_path / "raw").layout == "ALOHA"


# --- the map ----------------------------------------------------------------------------------------------

MINIMAL = {
    "fps": 10,
    "instruction": {"text": "go"},
    "action": {"datasets": ["action"], "names": ["x", "y"]},
}


def test_open_points_are_refused_by_name(tmp_path: Path):
    told = MINIMAL | {"fps": "?", "gripper": {"open": "?", "close": 1}, "state": {"datasets": ["?"]}}
    assert open_points(told) == ["fps", "gripper.open", "state.datasets"]
    with pytest.raises(UsageError, match=r"open points: fps, gripper.open, state.datasets"):
        parse_map(told)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 29.97}, "fps is 29.97"),
        ({"instruction": {}}, "needs one of text, attribute, dataset, name"),
        ({"instruction": {"text": "a", "name": "file"}}, "needs one of"),
        ({"camera": {}}, "unknown entry 'camera'.*Did you mean 'cameras'"),
        ({"cameras": {"top": {"dataset": "x", "rotate": 45}}}, "rotate 0, 90, 180 or 270"),
        (
            {"cameras": {"top": {"datasets": "x"}}},
            r"\[cameras.top\] knows dataset, colours, rotate, not 'datasets'",
        ),
        ({"gripper": {"open": 1}}, "needs open and close"),
        ({"gripper": {"open": 1, "close": 0}}, "no dimension of the action is named so"),
        ({"action": {"datasets": ["a"], "names": ["x", "x"]}}, "names a dimension twice"),
        ({"columns": {"c": {"datasets": ["c"], "names": ["c"], "dtype": "int3"}}}, "of dtype 'int3'"),
    ],
)
def test_a_map_with_a_mistake_is_refused_with_its_reason(changes: dict, message: str):
    with pytest.raises(UsageError, match=message):
        parse_map(MINIMAL | changes)


def test_a_map_that_is_no_toml_names_its_line(tmp_path: Path):
    (tmp_path / "map.toml").write_text('fps = 10\nrobot_type "x"\n')
    with pytest.raises(UsageError, match=r"map\.toml is not valid TOML.*line 2"):
        read_map(tmp_path / "map.toml")


def test_the_map_says_what_the_numbers_mean():
    told = MINIMAL | {
        "robot_type": "ur5",
        "licence": "cc-by-4.0",
        "action": {"datasets": ["a"], "names": ["x", "gripper"], "meaning": "joint_position", "unit": "rad"},
        "gripper": {"open": 0, "close": 255},
        "conventions": {"state_frame": "base"},
    }
    body = embodiment(Options(told), "")
    assert (body.name, body.fps, body.fps_origin, body.licence) == (
        "ur5",
        10,
        "given in the map",
        "cc-by-4.0",
    )
    assert body.features[0].unit == "rad" and body.features[0].names == ("x", "gripper")
    assert body.conventions["action"] == "joint_position" and body.conventions["state_frame"] == "base"
    assert body.conventions["gripper_action"] == {"open": 0, "close": 255}


def test_numbers_in_names_count_as_numbers():
    assert sorted(["ep10", "ep2", "ep1"], key=natural) == ["ep1", "ep2", "ep10"]


# --- reading ----------------------------------------------------------------------------------------------


def write_log(path: Path, rows: int = 6, **datasets) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in ({"action": vectors(rows, 2)} | datasets).items():
            if values is not None:
                file[name] = values
    return path


def test_pictures_are_turned_and_coloured_as_the_map_says(tmp_path: Path):
    frames = frames_of(4)
    colours = np.zeros((4, 40, 60, 3), np.uint8)
    colours[..., 0] = 200  # red, if read as it lies
    varying = h5py.vlen_dtype(np.uint8)
    path = write_log(
        tmp_path / "raw/a.hdf5",
        4,
        turned=np.rot90(frames, -1, axes=(1, 2)),
        planes=np.moveaxis(frames, -1, 1),
        blue=colours,
    )
    with h5py.File(path, "a") as file:
        coded = file.create_dataset("coded", (4,), varying)
        for t in range(4):
            coded[t] = np.frombuffer(jpeg(frames[t]), np.uint8)
    cameras = {
        "turned": {"dataset": "turned", "rotate": 90},
        "planes": {"dataset": "planes"},
        "coded": {"dataset": "coded"},
        "blue": {"dataset": "blue", "colours": "bgr"},
    }
    assert convert(tmp_path / "raw", tmp_path / "out", MINIMAL | {"cameras": cameras}).dropped == ()
    dataset = open_dataset(tmp_path / "out")
    for camera in ("turned", "planes", "coded"):
        read = dataset.frames(0, f"observation.images.{camera}", 0, 4)
        assert read.shape == (4, 40, 60, 3) and [number_of(f)[0] for f in read] == [0, 1, 2, 3]
    red, _, blue = dataset.frames(0, "observation.images.blue", 0, 1)[0].mean(axis=(0, 1))
    assert blue > 180 and red < 30


def test_columns_beside_the_dataset_keep_their_type(tmp_path: Path):
    stamps = 1_700_000_000_000_000_000 + np.arange(6)
    write_log(tmp_path / "raw/a.hdf5", stamp=stamps, force=vectors(6, 6).reshape(6, 2, 3))
    told = MINIMAL | {
        "columns": {
            "stamp_ns": {"datasets": ["stamp"], "names": ["stamp_ns"], "dtype": "int64"},
            "force": {"datasets": ["force"], "names": [f"force_{i}" for i in range(6)]},
        }
    }
    assert convert(tmp_path / "raw", tmp_path / "out", told).dropped == ()
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "out/dpipe/columns/chunk-000/file-000.parquet")
    assert table.column("stamp_ns").to_pylist() == stamps.tolist()
    assert np.allclose(table.column("force").to_pylist(), vectors(6, 6))


def test_what_does_not_fit_the_map_is_left_out_with_every_reason(tmp_path: Path):
    told = MINIMAL | {
        "state": {"datasets": ["state"], "names": ["a", "b", "c"]},
        "cameras": {"top": {"dataset": "top"}},
    }
    good = {"state": vectors(6, 3), "top": frames_of(6)}
    write_log(tmp_path / "raw/good.hdf5", **good)
    nan = vectors(6, 3)
    nan[4:] = np.nan
    write_log(tmp_path / "raw/bad_1.hdf5", state=nan, top=frames_of(5))
    write_log(tmp_path / "raw/bad_2.hdf5", state=vectors(6, 4), top=np.zeros((6, 40, 60), np.uint8))
    write_log(tmp_path / "raw/bad_3.hdf5", **good | {"state": None})
    (tmp_path / "raw/bad_4.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n")
    result = convert(tmp_path / "raw", tmp_path / "out", told)
    found = {drop.source_id: drop.reason for drop in result.dropped}
    assert result.episodes == 1 and list(found) == [f"bad_{i}" for i in (1, 2, 3, 4)]
    assert "'state' is not finite in 2 rows, first at row 4" in found["bad_1"]
    assert "lengths differ: the action has 6 rows, 'top' 5" in found["bad_1"]
    assert "4 values a row, the map names 3" in found["bad_2"] and "no pictures" in found["bad_2"]
    assert found["bad_3"] == "no dataset 'state'" and "not a readable HDF5 file" in found["bad_4"]


def test_a_last_observation_without_action_is_dropped_only_when_the_map_says_so(tmp_path: Path):
    told = MINIMAL | {"state": {"datasets": ["state"], "names": ["a", "b"]}}
    write_log(tmp_path / "raw/a.hdf5", state=vectors(7, 2))
    (dropped,) = CONVERTER.scan(next(CONVERTER.find(tmp_path / "raw", Options(told))), Options(told))
    assert 'last_observation = "drop"' in dropped.reason
    told |= {"files": {"last_observation": "drop"}}
    convert(tmp_path / "raw", tmp_path / "out", told)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.episodes.length.tolist() == [6]
    assert dataset.columns(["observation.state"], 0)["observation.state"][-1, 0] == 5
    assert tomllib.loads(draft_map(tmp_path / "raw").text)["files"]["last_observation"] == "drop"


def test_names_of_files_and_folders_may_be_the_sentence(tmp_path: Path):
    write_log(tmp_path / "raw/open_the_door/run_1.hdf5")
    for way, expected in (("file", "run 1"), ("folder", "open the door")):
        told = MINIMAL | {"instruction": {"name": way}}
        convert(tmp_path / "raw", tmp_path / way, told)
        assert open_dataset(tmp_path / way).tasks == [expected]


def test_a_missing_sentence_leaves_the_episode_out(tmp_path: Path):
    write_log(tmp_path / "raw/a.hdf5")
    path = write_log(tmp_path / "raw/b.hdf5")
    with h5py.File(path, "a") as file:
        file.attrs["task"] = "push"
    told = MINIMAL | {"instruction": {"attribute": "task"}}
    result = convert(tmp_path / "raw", tmp_path / "out", told)
    assert result.dropped[0].reason == "no sentence in attribute 'task'" and result.episodes == 1


def test_files_that_reach_outside_themselves_are_refused(tmp_path: Path):
    write_log(tmp_path / "other.hdf5")
    path = write_log(tmp_path / "raw/a.hdf5", action=None)
    with h5py.File(path, "a") as file:
        file["action"] = h5py.ExternalLink(str(tmp_path / "other.hdf5"), "action")
    (dropped,) = CONVERTER.scan(next(CONVERTER.find(tmp_path / "raw", Options(MINIMAL))), Options(MINIMAL))
    assert "link into another file" in dropped.reason


def test_a_changed_map_over_a_finished_dataset_is_refused_by_name(tmp_path: Path):
    write_log(tmp_path / "raw/a.hdf5")
    convert(tmp_path / "raw", tmp_path / "out", MINIMAL)
    with pytest.raises(UsageError, match="fps: 10 then, 20 now"):
        convert(tmp_path / "raw", tmp_path / "out", MINIMAL | {"fps": 20})


# --- typed ------------------------------------------------------------------------------------------------


def dpipe(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dpipe.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_a_folder_is_drafted_once_answered_and_converted(tmp_path: Path):
    write_aloha(tmp_path / "my_logs", episodes=1)
    (tmp_path / "map.toml").write_text("# mine\n")
    first = dpipe("convert", "my_logs", cwd=tmp_path)
    assert first.returncode == 2 and "recognised: ALOHA" in first.stderr and "map-2.toml" in first.stderr
    again = dpipe("convert", "my_logs", cwd=tmp_path)
    assert again.returncode == 2 and (tmp_path / "map.toml").read_text() == "# mine\n"
    assert sorted(p.name for p in tmp_path.glob("*.toml")) == ["map-2.toml", "map.toml"]
    still_open = dpipe("convert", "my_logs", "--map", "map-2.toml", cwd=tmp_path)
    assert still_open.returncode == 2 and "open points: fps, instruction.text" in still_open.stderr
    text = (tmp_path / "map-2.toml").read_text()
    lines = [
        "fps = 50" if line.startswith("fps =") else 'text = "go"' if line.startswith("text =") else line
        for line in text.splitlines()
    ]
    (tmp_path / "map-2.toml").write_text("\n".join(lines))
    done = dpipe("convert", "my_logs", "--map", "map-2.toml", "--workers", 0, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert open_dataset(tmp_path / "lerobot/my_logs").total_frames == 5


OUTSIDE = """
from dataclasses import dataclass
import numpy as np
from dpipe.converters import Converter
from dpipe.schemas.episode import Embodiment, Episode, EpisodeRef, Recording
from dpipe.schemas.features import Feature

@dataclass(frozen=True)
class Options:
    scale: float = 1.0

ACTION = Feature("action", "float32", ("x", "gripper"))

def find(raw, options):
    return [Recording(p.stem, "train", (p,)) for p in sorted(raw.glob("*.npy"))]

def scan(recording, options):
    frames = len(np.load(recording.files[0]))
    return [EpisodeRef(recording.name, "train", frames, "go", recording.files, ())]

def read(ref, options):
    return Episode(ref, {"action": (np.load(ref.files[0]) * options.scale).astype(np.float32)}, {})

def embodiment(options, variant):
    return Embodiment("lab", "arm", 10, "our rig", (ACTION,), {"action": "joint_position"})

CONVERTER = Converter("mylab", 1, Options, find, scan, read, embodiment, "<episode>.npy")
"""


def write_lab(root: Path) -> Path:
    (root / "my_lab.py").write_text(OUTSIDE)
    (root / "raw/mylab").mkdir(parents=True)
    for i in range(4):
        np.save(root / f"raw/mylab/run_{i}.npy", vectors(5 + i, 2, i))
    return root / "my_lab.py"


def test_a_converter_outside_the_project_runs_in_other_processes_with_its_options(tmp_path: Path):
    path = write_lab(tmp_path)
    converter = load_converter(str(path))
    results = [
        run_convert(
            tmp_path / "raw/mylab",
            tmp_path / f"out{workers}",
            str(path),
            options=converter.Options(scale=2.0),
            workers=workers,
        )
        for workers in (0, 2)
    ]
    for result in results:
        dataset = open_dataset(result.root)
        assert dataset.episodes.length.tolist() == [5, 6, 7, 8]
        expected = (vectors(8, 2, 3) * 2).astype(np.float32)
        assert np.array_equal(dataset.columns(["action"], 3)["action"], expected)
    manifest = json.loads((tmp_path / "out0/dpipe/manifest.json").read_text())
    assert manifest["source"] == "mylab" and str(tmp_path) not in json.dumps(manifest)


def test_a_converter_outside_the_project_is_named_in_dpipe_toml(tmp_path: Path):
    write_lab(tmp_path)
    (tmp_path / "dpipe.toml").write_text('[sources.mylab]\nconverter = "my_lab.py"\n')
    done = dpipe(
        "convert", "mylab", "--scale", 3, "--workers", 0, "--workspace", tmp_path, cwd=tmp_path.parent
    )
    assert done.returncode == 0, done.stderr
    assert open_dataset(tmp_path / "lerobot/mylab").columns(["action"], 1)["action"][0, 0] == 3
    (tmp_path / "my_lab.py").write_text("import nothing_of_that_name\n")
    broken = dpipe("convert", "mylab", cwd=tmp_path)
    assert broken.returncode == 2 and "ModuleNotFoundError" in broken.stderr
    (tmp_path / "my_lab.py").write_text("CONVERTER = 3\n")
    wrong = dpipe("convert", "mylab", cwd=tmp_path)
    assert wrong.returncode == 2 and "is no converter" in wrong.stderr and "found: int" in wrong.stderr


# --- the tutorial -----------------------------------------------------------------------------------------

TUTORIAL = Path(__file__).resolve().parent.parent / "docs/tutorial-own-files.md"


@pytest.mark.slow
def test_the_tutorial_runs_as_printed_and_its_converter_stays_short(tmp_path: Path):
    answers = run_page(
        TUTORIAL, tmp_path, {r"(dpipe convert \S+)": r"\1 --workers 0"}
    )  # in this process: faster here
    assert len(answers) >= 6
    assert len((tmp_path / "my_lab.py").read_text().splitlines()) < 60
    dataset = open_dataset(tmp_path / "lerobot/mylab")
    state = dataset.columns(["observation.state"], 0)["observation.state"]
    assert state[0, 3:].tolist() == [0, 0, 0, 1] and dataset.tasks == ["push the block away"]
    assert set(dataset.columns(["action"], 0)["action"][:, 7]) == {0.0, 1.0}
