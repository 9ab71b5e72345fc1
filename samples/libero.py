"""LIBERO raw HDF5 from the tabletop: what `create_dataset.py` leaves behind, traps included.

Raw tree     <suite>/<TASK>_demo.hdf5, groups data/demo_<i>; images upside down; arrays contiguous
Conventions  obs[t] and robot_states[t] are recorded after actions[t], states[t] before; gripper -1 open,
             +1 close; 20 Hz; instruction in the file name, another wording in `problem_info`
Regenerated  OpenVLA's no-noops kind: no attributes, 256 x 256, observation before the action, no-ops left out,
             failed demonstrations left out (hence gaps in the numbering), a JSON of outcomes beside it
Source       formats of Lifelong-Robot-Learning/LIBERO 8f1084e `scripts/create_dataset.py` and moojink/openvla-oft
             213c5ff `experiments/robot/libero/regenerate_libero_dataset.py`

Beside the suites stands `tabletop.json`: the seed of every demonstration, from which the simulator restores
its scene; a reader of LIBERO looks at *.hdf5 alone.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..schemas.errors import UsageError
from .motion import Motion, is_no_op, record, seeds_by_task, write_seeds
from .panda import Array
from .tabletop import BASE_POSITION, FPS, TABLE_Z, Observation, Tabletop, Task

if TYPE_CHECKING:
    import h5py

# Container -> suite, prefix of the file name, problem. One suite of each naming style: lower case alone, and
# an upper-case scene with a number of two digits. Both scenes put the robot's base where the tabletop has it.
SUITES = {
    "tray": ("libero_goal", "", "Libero_Tabletop_Manipulation"),
    "plate": ("libero_10", "KITCHEN_SCENE10_", "Libero_Kitchen_Tabletop_Manipulation"),
}
REGENERATED_SIZE = 256


def write(
    raw: Path,
    episodes: int,
    seed: int,
    *,
    tasks: int | None = None,
    objects: int = 3,
    image_size: int | None = None,
    regenerated: bool = False,
    fail_every: int | None = None,
    bddl_content: bool = False,
) -> list[Path]:
    """Write `episodes` demonstrations, a file per instruction, and return the files.

    `tasks` limits the instructions; every `fail_every`-th demonstration of a task drops its object (0 for
    none; a regenerated file leaves those out, and by default has them so that its numbering has gaps);
    `bddl_content` adds the attribute that the published files lack.
    """
    if episodes < 1:
        raise UsageError(f"sample libero: episodes must be 1 or more, not {episodes}")
    if fail_every is None:
        fail_every = 4 if regenerated else 0
    size = image_size or (REGENERATED_SIZE if regenerated else 128)
    paths: list[Path] = []
    seeds: dict[str, dict[str, Any]] = {}
    outcomes: dict[str, dict[str, dict[str, Any]]] = {}
    for instruction, task_seeds in seeds_by_task(episodes, seed, tasks, objects).items():
        motions = (
            record(one, objects, size, clumsy=bool(fail_every and i % fail_every == 1))
            for i, one in enumerate(task_seeds)
        )
        task = _task_of(task_seeds[0], objects)
        suite, prefix, _ = SUITES[task.container]
        name = prefix + instruction.replace(" ", "_")
        path = raw / suite / f"{name}_demo.hdf5"
        writer = _write_regenerated if regenerated else _write_released
        kept = writer(path, motions, name, suite, bddl_content)
        for i, (motion_seed, frames, success, state) in enumerate(kept):
            if frames:
                seeds[f"{suite}/{path.stem}/demo_{i}"] = {
                    "seed": motion_seed,
                    "objects": objects,
                    "frames": frames,
                    # A released file's first observation follows the first action.
                    "start_s": 0.0 if regenerated else 1 / FPS,
                    "success": success,
                }
            if regenerated:
                per_task = outcomes.setdefault(suite, {}).setdefault(instruction.replace(" ", "_"), {})
                per_task[f"demo_{i}"] = {"success": success, "initial_state": state}
        paths.append(path)
    for suite, tasks_json in outcomes.items():
        _write_json(raw / f"{suite}_metainfo.json", tasks_json)
    write_seeds(raw, FPS, np.eye(4), seeds)
    return paths


def _task_of(seed: int, objects: int) -> Task:
    table = Tabletop(objects, image_size=8)
    table.reset(seed)
    return table.task


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


Kept = tuple[int, int, bool, list[float]]  # seed, frames written (0: left out), success, first state


def _write_released(
    path: Path, motions: Iterable[Motion], name: str, suite: str, bddl_content: bool
) -> list[Kept]:
    import h5py

    kept: list[Kept] = []
    part = _part(path)
    with h5py.File(part, "w") as file:
        data = file.create_group("data")
        task: Task | None = None
        for i, motion in enumerate(motions):
            task = motion.task
            group = data.create_group(f"demo_{i}")
            frames = len(motion.actions)
            _write_arrays(group, motion.actions, motion.states[:-1], motion.seen[1:])
            group.attrs["num_samples"] = frames
            group.attrs["init_state"] = motion.states[0]
            group.attrs["model_file"] = model_xml(motion)
            kept.append((motion.seed, frames, motion.success, motion.states[0].tolist()))
        assert task is not None
        for key, value in _data_attributes(task, name, suite).items():
            data.attrs[key] = value
        data.attrs["num_demos"] = len(kept)
        data.attrs["total"] = sum(frames for _, frames, _, _ in kept)
        if bddl_content:
            data.attrs["bddl_file_content"] = _bddl(task)
    part.rename(path)
    return kept


def _write_regenerated(
    path: Path, motions: Iterable[Motion], name: str, suite: str, bddl_content: bool
) -> list[Kept]:
    """Replays each demonstration without its no-ops and keeps it if it still succeeds."""
    import h5py

    kept: list[Kept] = []
    part = _part(path)
    with h5py.File(part, "w") as file:
        data = file.create_group("data")
        for i, motion in enumerate(motions):
            table = Tabletop(len(motion.task.bodies), motion.seen[0].image_size)
            table.reset(motion.seed)
            seen = table.set_state(motion.states[0])
            for _ in range(10):
                seen = table.step(np.array([0.0, 0, 0, 0, 0, 0, -1]))
            actions: list[Array] = []
            states: list[Array] = []
            before: list[Observation] = []
            for action in motion.actions:
                if is_no_op(action, actions[-1] if actions else None):
                    continue
                states.append(table.state() if actions else motion.states[0])  # upstream copies the first
                actions.append(action)
                before.append(seen)
                seen = table.step(action)
            frames = len(actions) if table.success else 0
            kept.append((motion.seed, frames, table.success, motion.states[0].tolist()))
            if frames:
                group = data.create_group(f"demo_{i}")
                robot = _robot_states(before)
                robot[0] = _robot_states([motion.seen[1]])[0]
                _write_arrays(group, np.array(actions), np.array(states), before, robot)
    part.rename(path)
    return kept


def _part(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(path.name + ".part")


def _robot_states(seen: Sequence[Observation]) -> Array:
    """[T, 9]: fingers, hand position, hand quaternion xyzw."""
    return np.array([np.concatenate([o.gripper_qpos, o.ee_pos, o.ee_quat_xyzw]) for o in seen])


def _write_arrays(
    group: "h5py.Group",
    actions: Array,
    states: Array,
    seen: Sequence[Observation],
    robot: Array | None = None,
) -> None:
    """The datasets of one demonstration, contiguous and uncompressed as h5py writes them by default."""
    last = np.zeros(len(actions), np.uint8)
    last[-1] = 1  # upstream marks the last row whatever the outcome
    position = np.array([o.ee_pos for o in seen])
    rotvec = np.array([o.ee_rotvec for o in seen])
    arrays = {
        "actions": actions,
        "states": states,
        "robot_states": _robot_states(seen) if robot is None else robot,
        "rewards": last,
        "dones": last,
        "obs/gripper_states": np.array([o.gripper_qpos for o in seen]),
        "obs/joint_states": np.array([o.joint_pos for o in seen]),
        "obs/ee_states": np.concatenate([position, rotvec], axis=1),
        "obs/ee_pos": position,
        "obs/ee_ori": rotvec,
        # The "opengl" image convention: row 0 is the bottom of the picture.
        "obs/agentview_rgb": np.array([o.front[::-1] for o in seen]),
        "obs/eye_in_hand_rgb": np.array([o.wrist[::-1] for o in seen]),
    }
    for name, values in arrays.items():
        group.create_dataset(name, data=values)


def _bddl_wording(task: Task) -> str:
    """The bddl file's sentence: for some tasks (29 of LIBERO's 130) in other words than the file name."""
    differs = task.container == "tray" and task.bodies[task.target].shape == "cylinder"
    return task.instruction.replace("pick up", "pick", 1) if differs else task.instruction


def _data_attributes(task: Task, name: str, suite: str) -> dict[str, Any]:
    problem_name = SUITES[task.container][2]
    old_path = f"chiliocosm/bddl_files/{suite}/{_bddl_wording(task).replace(' ', '_')}.bddl"
    low, high = [-0.05] * 3 + [-0.5] * 3, [0.05] * 3 + [0.5] * 3
    controller = {
        "type": "OSC_POSE",
        "input_max": 1,
        "input_min": -1,
        "output_max": high,
        "output_min": low,
        "kp": 150,
        "damping_ratio": 1,
        "impedance_mode": "fixed",
        "uncouple_pos_ori": True,
        "control_delta": True,
        "interpolation": None,
        "ramp_ratio": 0.2,
    }
    env_kwargs = {
        "robots": ["Panda"],
        "controller_configs": controller,
        "bddl_file_name": old_path,
        "has_renderer": False,
        "has_offscreen_renderer": True,
        "ignore_done": True,
        "use_camera_obs": True,
        "camera_depths": False,
        "camera_names": ["robot0_eye_in_hand", "agentview"],
        "reward_shaping": True,
        "control_freq": FPS,
        "camera_heights": 128,
        "camera_widths": 128,
        "camera_segmentations": None,
    }
    env_args = {
        "type": 1,
        "env_name": problem_name,
        "problem_name": problem_name.lower(),
        "bddl_file": old_path,  # published files still name their pre-release path here
        "env_kwargs": env_kwargs,
    }
    problem = {
        "problem_name": problem_name.lower(),
        "domain_name": "robosuite",
        "language_instruction": _bddl_wording(task),
    }
    return {
        "env_name": problem_name,
        "env_args": json.dumps(env_args),
        "problem_info": json.dumps(problem),
        "bddl_file_name": f"libero/libero/bddl_files/{suite}/{name}.bddl",
        "macros_image_convention": "opengl",
        "tag": "libero-v1",
    }


def _bddl(task: Task) -> str:
    objects = "\n".join(f"    {b.colour}_{b.shape}_1 - {b.colour}_{b.shape}" for b in task.bodies)
    target = task.bodies[task.target]
    problem = SUITES[task.container][2].replace("Libero", "LIBERO")
    goal = f"{'In' if task.container == 'tray' else 'On'} {target.colour}_{target.shape}_1 {task.container}_1"
    return (
        f"(define (problem {problem})\n  (:domain robosuite)\n"
        f"  (:language {_bddl_wording(task).capitalize()})\n  (:fixtures\n    main_table - table\n  )\n"
        f"  (:objects\n{objects}\n    tray_1 - tray\n    plate_1 - plate\n  )\n"
        f"  (:obj_of_interest\n    {target.colour}_{target.shape}_1\n    {task.container}_1\n  )\n"
        f"  (:goal\n    (And ({goal}))\n  )\n)\n"
    )


def model_xml(motion: Motion) -> str:
    """The scene as MuJoCo XML, above 64 kB like the published ones, with paths of a machine long gone.

    The robot's links are inline meshes (rings of vertices); `custom` names the seed of the scene.
    """
    meshes, bodies = [], []
    for link in range(8):
        angle = np.linspace(0, 2 * np.pi, 192, endpoint=False)
        rings = [
            np.stack([0.06 * np.cos(angle), 0.06 * np.sin(angle), np.full(192, z)], axis=1)
            for z in (-0.05, 0.05)
        ]
        vertices = " ".join(f"{value:.6f}" for value in np.concatenate(rings).ravel())
        meshes.append(f'    <mesh name="robot0_link{link}" vertex="{vertices}"/>')
        bodies.append(f'    <geom name="robot0_link{link}" type="mesh" mesh="robot0_link{link}"/>')
    scene = motion.seen[0].scene
    for body, position in zip(scene.bodies, scene.object_pos, strict=True):
        kind, size = ("box", "0.024 0.024 0.024") if body.shape == "cube" else ("cylinder", "0.024 0.024")
        rgba = " ".join(f"{channel / 255:.3f}" for channel in body.rgb)
        where = " ".join(f"{value:.6f}" for value in position)
        bodies.append(
            f'    <body name="{body.colour}_{body.shape}_1_main" pos="{where}"><freejoint/>'
            f'<geom type="{kind}" size="{size}" rgba="{rgba} 1"/></body>'
        )
    base = " ".join(str(value) for value in BASE_POSITION)
    return (
        '<mujoco model="base">\n  <compiler angle="radian" meshdir="/home/teleop/tabletop/meshes/"/>\n'
        f'  <custom><numeric name="tabletop_seed" data="{motion.seed}"/></custom>\n  <asset>\n'
        '    <texture name="wood" type="2d" file="/home/teleop/tabletop/textures/wood.png"/>\n'
        + "\n".join(meshes)
        + f'\n  </asset>\n  <worldbody>\n    <body name="robot0_base" pos="{base}"/>\n'
        f'    <geom name="table" type="plane" size="0.5 0.5 0.1" pos="0 0 {TABLE_Z}"/>\n'
        + "\n".join(bodies)
        + "\n  </worldbody>\n</mujoco>\n"
    )
