"""CALVIN raw play data from the tabletop: one npz per frame, index files, language windows.

Raw tree     <dataset>/{training,validation}/episode_<0000000>.npz, ep_start_end_ids.npy, ep_lens.npy,
             scene_info.npy (training), statistics.yaml, .hydra/, lang_annotations/auto_lang_ann.npy; or the same
             inside <dataset>.zip
Conventions  `actions[t]` is the pose of frame t + 1 and the gripper command then in force, `rel_actions` its
             clipped and scaled difference; Euler angles extrinsic xyz; gripper -1 close, +1 open; 30 Hz
Scenes       task_D_D: all D. task_ABC_D: training B, C, A in that order of ids, validation D.
             Blocks lie in the scene's own order (A pink, blue, red; C blue, red, pink; B, D red, blue, pink);
             the tabletop's objects 0, 1, 2 stand for red, blue, pink, whatever colours they have.
Not CALVIN   the table's furniture rests; sentences and task ids are the tabletop's; every play episode is one
             motion of about 90 frames
Source       mees/calvin fa03f01, mees/calvin_env 797142c: datarenderer.py, automatic_lang_annotator_mp.py
"""

import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..schemas.errors import UsageError
from ..schemas.rotations import matrix_to_euler
from .motion import Frames, Motion, record, resample, seeds_by_task, split_off, write_seeds
from .panda import Array
from .render import FRONT_EYE, FRONT_ROTATION, FRONT_TARGET, Camera, render_with_depth, wrist_pose
from .tabletop import BASE_POSITION

FPS = 30
CALVIN_BASE_POSITION = np.array([-0.34, -0.46, 0.24])  # calvin_env conf/scene
WORLD_FROM_TABLETOP = np.eye(4)
WORLD_FROM_TABLETOP[:3, 3] = CALVIN_BASE_POSITION - BASE_POSITION

STATIC = Camera.square(200, 10.0)
GRIPPER = Camera.square(84, 75.0)
# CALVIN's narrow lens looks from four metres; ours looks along the tabletop's own front view.
STATIC_EYE = FRONT_TARGET + (FRONT_EYE - FRONT_TARGET) / np.linalg.norm(FRONT_EYE - FRONT_TARGET) * 3.9

# Dataset -> scene and first frame id of each stretch of training, then of validation. As published, so that a
# reader who knows the published borders agrees with scene_info.npy.
DATASETS: dict[str, tuple[tuple[tuple[str, int], ...], tuple[str, int]]] = {
    "task_D_D": ((("D", 358_482),), ("D", 219_635)),
    "task_ABC_D": ((("B", 0), ("C", 598_910), ("A", 1_191_339)), ("D", 0)),
    "task_ABCD_D": ((("D", 53_819), ("B", 611_099), ("C", 1_210_009), ("A", 1_802_438)), ("D", 0)),
    "calvin_debug_dataset": ((("D", 358_482),), ("D", 553_567)),
}
SCENE_RANGES = {
    "task_D_D": {"D": (0, 611_098)},
    "task_ABC_D": {"B": (0, 598_909), "C": (598_910, 1_191_338), "A": (1_191_339, 1_795_044)},
    "task_ABCD_D": {
        "D": (0, 611_098),
        "B": (611_099, 1_210_008),
        "C": (1_210_009, 1_802_437),
        "A": (1_802_438, 2_406_143),
    },
}
BLOCK_ORDER = {"A": (2, 1, 0), "B": (0, 1, 2), "C": (1, 0, 2), "D": (0, 1, 2)}  # of red, blue, pink
EMBEDDING_WIDTH = 384
STRAY_IDS = (37_682, 53_818, 244_284, 420_498)  # validation frames in ABCD's training folder


@dataclass(frozen=True)
class Play:
    """One play episode: its scene, its first frame id, the motion in it."""

    scene: str
    first_id: int
    motion: Motion
    frames: Frames

    @property
    def stored(self) -> int:
        """The recording's terminal frame serves as the last action and is not stored."""
        return len(self.frames) - 1


def write(
    raw: Path,
    episodes: int,
    seed: int,
    *,
    dataset: str = "task_D_D",
    tasks: int | None = None,
    validation_every: int = 5,
    digits: int = 7,
    depth: bool = False,
    tactile: bool = False,
    zipped: bool = False,
    strays: bool = False,
) -> list[Path]:
    """Write `episodes` play episodes, of which every `validation_every`-th goes to `validation/`.

    `digits` is the width of the ids in file names (7 as published, 6 in low-frequency copies); `depth` and
    `tactile` add those images (published frames have them; they cost five times the time and space);
    `strays` puts frames that belong to no episode into `training/`, as ABCD has them.
    """
    if dataset not in DATASETS:
        raise UsageError(f"sample calvin: no dataset '{dataset}'\n  known: {', '.join(DATASETS)}")
    if episodes < 1:
        raise UsageError(f"sample calvin: episodes must be 1 or more, not {episodes}")
    training, validation = _plan(dataset, episodes, seed, tasks, validation_every)
    seeds: dict[str, dict[str, Any]] = {}
    with _tree(raw, dataset, zipped) as tree:
        for split, plays in (("training", training), ("validation", validation)):
            if not plays:
                continue
            for play in plays:
                for k in range(play.stored):
                    content = _frame(play, k, depth, tactile)
                    tree.put(f"{split}/episode_{play.first_id + k:0{digits}d}.npz", content)
                last_id = play.first_id + play.stored - 1
                seeds[f"{dataset}/{split}/{play.first_id:07d}-{last_id:07d}"] = {
                    "seed": play.motion.seed,
                    "objects": 3,
                    "frames": play.stored,
                    "start_s": 0.0,
                    "success": play.motion.success,
                    "first_id": play.first_id,
                    "instruction": play.motion.instruction,
                }
            if strays and split == "training":
                for stray in STRAY_IDS:
                    tree.put(f"{split}/episode_{stray:0{digits}d}.npz", _frame(plays[0], 0, depth, tactile))
            _write_index(tree, split, dataset, plays)
    write_seeds(raw, FPS, WORLD_FROM_TABLETOP, seeds)
    return tree.paths


def _plan(
    dataset: str, episodes: int, seed: int, tasks: int | None, validation_every: int
) -> tuple[list[Play], list[Play]]:
    """The plays of training and of validation, ids counted up within each scene, scenes shared out evenly."""
    stretches, held_scene = DATASETS[dataset]
    chosen = sorted(one for seeds in seeds_by_task(episodes, seed, tasks).values() for one in seeds)
    held = split_off(episodes, validation_every)
    next_id = dict(stretches)
    held_id = held_scene[1]
    training: list[Play] = []
    validation: list[Play] = []
    count = episodes - sum(held)
    for one, is_held in zip(chosen, held, strict=True):
        motion = record(one, image_size=8)
        frames = resample(motion, FPS)
        if is_held:
            validation.append(Play(held_scene[0], held_id, motion, frames))
            held_id += validation[-1].stored
        else:
            scene = stretches[len(training) * len(stretches) // count][0]
            training.append(Play(scene, next_id[scene], motion, frames))
            next_id[scene] += training[-1].stored
    return training, validation


class _Tree:
    """Where the dataset's files go: a folder, or members of a zip."""

    def __init__(self, folder: Path, archive: zipfile.ZipFile | None, name: str) -> None:
        self.folder, self.archive, self.name = folder, archive, name
        self.paths: list[Path] = []

    def put(self, path: str, content: bytes) -> None:
        if self.archive is not None:
            # Stored: the members are deflated already. A fixed date keeps equal seeds at equal bytes.
            self.archive.writestr(zipfile.ZipInfo(f"{self.name}/{path}"), content)
            return
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        self.paths.append(target)


@contextmanager
def _tree(raw: Path, dataset: str, zipped: bool) -> Iterator[_Tree]:
    raw.mkdir(parents=True, exist_ok=True)
    if not zipped:
        yield _Tree(raw / dataset, None, dataset)
        return
    path = raw / f"{dataset}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        tree = _Tree(raw, archive, dataset)
        tree.paths.append(path)
        yield tree


def robot_obs(frames: Frames, k: int) -> Array:
    """[15]: tcp position, Euler xyz, opening width, seven joints, last gripper command (-1 close, +1 open)."""
    position = frames.ee_pos[k] + WORLD_FROM_TABLETOP[:3, 3]
    euler = matrix_to_euler(frames.ee_rot[k])
    return np.concatenate(
        [position, euler, [2 * frames.finger[k]], frames.joint_pos[k], [-frames.command[k]]]
    )


def relative_action(absolute: Array, observed: Array) -> Array:
    """`to_relative_action` of calvin_env: world frame, each Euler angle by itself, clipped, scaled to 1."""
    turn = (absolute[3:6] - observed[3:6] + np.pi) % (2 * np.pi) - np.pi
    position = np.clip(absolute[:3] - observed[:3], -0.02, 0.02) / 0.02
    return np.concatenate([position, np.clip(turn, -0.05, 0.05) / 0.05, absolute[6:]])


def _scene_obs(play: Play, k: int) -> Array:
    """[24]: furniture at rest (lamp and LED off), then three blocks in the scene's own order."""
    scene = play.frames.scenes[k]
    blocks = [
        np.concatenate(
            [scene.object_pos[i] + WORLD_FROM_TABLETOP[:3, 3], matrix_to_euler(scene.object_rot[i])]
        )
        for i in BLOCK_ORDER[play.scene]
    ]
    return np.concatenate([np.zeros(6), *blocks])


def _frame(play: Play, k: int, depth: bool, tactile: bool) -> bytes:
    here, after = robot_obs(play.frames, k), robot_obs(play.frames, k + 1)
    absolute = np.concatenate([after[:6], after[14:]])
    scene = play.frames.scenes[k]
    static, static_depth = render_with_depth(scene, STATIC, STATIC_EYE, FRONT_ROTATION)
    wrist, wrist_depth = render_with_depth(scene, GRIPPER, *wrist_pose(scene), wearer="hand", far_m=2.0)
    arrays: dict[str, Any] = {
        "actions": absolute,
        "rel_actions": relative_action(absolute, here),
        "robot_obs": here,
        "scene_obs": _scene_obs(play, k),
        "rgb_static": static,
        "rgb_gripper": wrist,
    }
    if tactile:
        arrays["rgb_tactile"] = _tactile_image(play, k)
    if depth:
        arrays["depth_static"] = static_depth
        arrays["depth_gripper"] = wrist_depth
    if tactile:
        contact = 0.004 if _touches(play, k) else 0.0
        arrays["depth_tactile"] = np.zeros((160, 120, 2), np.float32)
        arrays["depth_tactile"][60:100, 40:80] = contact
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def _touches(play: Play, k: int) -> bool:
    return bool(play.frames.command[k] > 0 and abs(play.frames.finger[k] - 0.024) < 1e-6)


def _tactile_image(play: Play, k: int) -> Any:
    """[160, 120, 6] uint8: grey gel with the sensor's noise (sigma 7), darker where something presses."""
    rng = np.random.default_rng([play.motion.seed, k, 0x7AC])
    gel = np.full((160, 120, 6), 128.0)
    if _touches(play, k):
        gel[60:100, 40:80] -= 40
    return np.clip(gel + 7 * rng.standard_normal(gel.shape), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Window:
    """A language window (start, end) as stored: `end - start` is 64 or 33 to 48."""

    start: int
    end: int
    text: str
    task: str


def windows(play: Play) -> list[Window]:
    """Overlapping windows of a play: the whole task (its last 64 frames), the taking, the placing."""
    task = play.motion.task
    body = task.bodies[task.target]
    taking, placing = play.motion.segments
    last = play.stored - 1
    taken = min(last, -(-taking.stop * FPS // 20))
    preposition = "in" if task.container == "tray" else "on"
    spans = [
        (0, last, play.motion.instruction, f"bring_{body.colour}_{body.shape}_to_{task.container}"),
        (0, taken, taking.text, f"lift_{body.colour}_{body.shape}_table"),
        (taken, last, placing.text, f"place_{preposition}_{task.container}"),
    ]
    found = []
    for begin, end, text, name in spans:
        length = 64 if end - begin >= 64 else min(48, max(33, end - begin))
        end = max(end, length)
        found.append(Window(play.first_id + end - length, play.first_id + end, text, name))
    return found


def _write_index(tree: _Tree, split: str, dataset: str, plays: list[Play]) -> None:
    ids = np.array([[play.first_id, play.first_id + play.stored - 1] for play in plays], dtype=np.int64)
    tree.put(f"{split}/ep_start_end_ids.npy", _npy(ids))
    tree.put(f"{split}/ep_lens.npy", _npy(ids[:, 1] - ids[:, 0] + 1))
    debug = dataset == "calvin_debug_dataset"
    if split == "training" or debug:
        ranges = SCENE_RANGES.get(dataset) or {"D": (int(ids.min()), int(ids.max()))}
        info = {f"calvin_scene_{letter}": list(bounds) for letter, bounds in ranges.items()}
        tree.put(f"{split}/scene_info.npy", _npy(np.array(info, dtype=object)))
    found = [window for play in plays for window in windows(play)]
    language = {
        "language": {
            "ann": [window.text for window in found],
            "task": [window.task for window in found],
            "emb": np.stack([_embedding(window.text) for window in found]),
        },
        "info": {
            "episodes": [],
            "indx": [(np.int64(window.start), np.int64(window.end)) for window in found],
        },
    }
    tree.put(f"{split}/lang_annotations/auto_lang_ann.npy", _npy(np.array(language, dtype=object)))
    if split == "validation":
        prompts = {
            window.task: {"emb": _embedding(window.text)[None], "ann": [f"please {window.text}"]}
            for window in found
        }
        tree.put(f"{split}/lang_annotations/embeddings.npy", _npy(np.array(prompts, dtype=object)))
    tree.put(f"{split}/statistics.yaml", _statistics(plays).encode())
    for name, text in _hydra(dataset).items():
        tree.put(f"{split}/.hydra/{name}.yaml", text.encode())


def _npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def _embedding(text: str) -> Any:
    """[1, 384] float32: no language model, only a vector that is the sentence's own."""
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    return rng.standard_normal((1, EMBEDDING_WIDTH)).astype(np.float32)


def _statistics(plays: list[Play]) -> str:
    robot = np.array([robot_obs(play.frames, k) for play in plays for k in range(play.stored)])
    scene = np.array([_scene_obs(play, k) for play in plays for k in range(play.stored)])
    actions = np.array([robot_obs(play.frames, k + 1) for play in plays for k in range(play.stored)])
    actions = actions[:, [0, 1, 2, 3, 4, 5, 14]]
    lines = []
    for name, values in (("robot_obs", robot), ("scene_obs", scene)):
        lines += [f"{name}:", "  - _target_: calvin_agent.utils.transforms.NormalizeVector"]
        lines += [f"    mean: {_yaml(values.mean(axis=0))}", f"    std: {_yaml(values.std(axis=0))}"]
    lines += ["", f"act_min_bound: {_yaml(actions.min(axis=0))}"]
    lines += [f"act_max_bound: {_yaml(actions.max(axis=0))}"]
    return "\n".join(lines) + "\n"


def _yaml(values: Array) -> str:
    return "[" + ", ".join(f"{value:.6f}" for value in values) + "]"


def _hydra(dataset: str) -> dict[str, str]:
    """Provenance no reader should trust: in one published folder two of these files name different scenes."""
    return {
        "config": "scene: calvin_scene_A\nload_dir: /home/operator/recordings\n",
        "merged_config": (
            "scene:\n  name: calvin_scene_D\n  data_path: ${data_path}\n"
            "cameras:\n  static: {fov: 10, height: 200, width: 200}\n"
            "  gripper: {fov: 75, height: 84, width: 84}\n"
        ),
        "hydra": f"hydra:\n  job: {{name: {dataset}}}\n",
        "overrides": "[]\n",
    }
