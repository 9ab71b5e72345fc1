"""AgiBot World's proprio_stats.h5 in one shape, whichever of its layouts a file has.

Variants     effector (N, 2 or 12); left_effector and right_effector; 16 joints of which two are grippers;
             full-length or short action arrays with an index of the rows they were sent for
Missing      absent quantities are stored as empty arrays: they come back as None, never as zeros
Source       OpenDriveLab/AgiBot-World issues, Tavish9/any4lerobot 6937315 `agibot2lerobot/`, one real recording
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import DataError, UsageError
from .hdf5 import read_dataset

if TYPE_CHECKING:
    import h5py

SIDES = ("left", "right")
ACTION_GROUPS = ("joint", "effector", "end", "head", "waist", "robot")
OPTIONAL = ("base_pose", "base_velocity", "joint_current", "wrench", "camera_pose")
SAME = 1e-6  # rad: an action this close to the state is the state
# Raw gripper readings: open, closed.
GRIPPER_RANGES = {"0:120": (0.0, 120.0), "35:120": (35.0, 120.0)}
OLD_OPEN_LEAST, OLD_OPEN_MOST = 30.0, 42.0  # readings of an older gripper when open
LEAST_TRAVEL = 3.0  # a gripper told to close reads more than this; angles and fractions never do
GRIPPER_DELAY = 10  # frames by which the reading follows the command


@dataclass
class Raw:
    """proprio_stats.h5 in one shape, whatever layout it had; T frames, E = 2 or 12 effector values."""

    time_ns: NDArray[np.int64]
    joint: NDArray[np.float64]  # [T, 14] left 7, right 7
    effector: NDArray[np.float64]  # [T, E] raw readings
    end: NDArray[np.float64]  # [T, 14] xyz and quaternion xyzw, left then right
    head: NDArray[np.float64]  # [T, 2]
    waist: NDArray[np.float64]  # [T, 2]
    action: dict[str, NDArray[np.float64]]  # joint, effector, end, head, waist: scattered over the state
    sent: NDArray[np.bool_]  # [T, 6] by ACTION_GROUPS
    has_command: bool  # whether action["effector"] is a command, not absent nor the reading again
    optional: dict[str, NDArray[np.float64]]  # OPTIONAL that the file has
    notes: list[str]

    @property
    def frames(self) -> int:
        return len(self.time_ns)


class _Reader:
    """Datasets of one file, absent and empty ones as None; problems gather here."""

    def __init__(self, file: h5py.File) -> None:
        self.file = file
        self.problems: list[str] = []
        self.notes: list[str] = []

    def array(self, path: str, frames: int | None, *shapes: tuple[int, ...]) -> NDArray[np.float64] | None:
        """Dataset `path` [frames, *one of shapes] flattened to [frames, D]; frames None: any length."""
        array = read_dataset(self.file, path)
        if array is None or array.size == 0:
            return None
        if array.ndim == 1 and (1,) in shapes:
            array = array[:, None]
        if array.dtype.kind not in "fiu" or array.shape[1:] not in shapes:
            wanted = " or ".join(str(("N", *shape)) for shape in shapes).replace("'", "")
            self.problems.append(f"{path} is {array.dtype} {array.shape}, expected {wanted}")
            return None
        if frames is not None and len(array) != frames:
            self.problems.append(f"{path} has {len(array)} rows, timestamp {frames}")
            return None
        flat = array.reshape(len(array), -1).astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(flat).all(axis=1))
        if len(bad):
            self.problems.append(f"{path} is not finite in {len(bad)} rows, first at row {bad[0]}")
            return None
        return flat

    def spare(self, path: str, frames: int, *shapes: tuple[int, ...]) -> NDArray[np.float64] | None:
        """A quantity an episode can do without: what is wrong with it is a note, and it counts as missing."""
        before = len(self.problems)
        array = self.array(path, frames, *shapes)
        self.notes += [f"{problem}: not kept" for problem in self.problems[before:]]
        del self.problems[before:]
        return array

    def needed(self, path: str, frames: int, *shapes: tuple[int, ...]) -> NDArray[np.float64]:
        before = len(self.problems)
        array = self.array(path, frames, *shapes)
        if array is None:
            if len(self.problems) == before:
                self.problems.append(f"{path} is missing or empty")
            return np.zeros((frames, int(np.prod(shapes[0]))))
        return array

    def scattered(
        self,
        group: str,
        twin: NDArray[np.float64],
        *shapes: tuple[int, ...],
        name: str = "position",
        hold: bool = False,
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_], bool]:
        """(rows [T, D], which were sent [T], whether there are any) of action/<group>.

        Alpha stores only the rows that were sent, `index` saying which; Beta stores them all and an index beside.
        The others come from `twin` [T, D], the state; or hold the last one sent (`hold`), where a command is not
        in the units of the state: a gripper told 1 reads 120.
        """
        frames = len(twin)
        path = f"action/{group}/{name}"
        array = self.array(path, None, *shapes)
        index = self._index(group, frames)
        sent = np.ones(frames, bool)
        if index is not None:
            sent[:] = False
            sent[index] = True
        if array is None:
            return twin.copy(), np.zeros(frames, bool), False
        if len(array) > frames:
            self.problems.append(
                f"{path} has {len(array)} rows for {frames} frames of state: a corrupt recording"
            )
        elif len(array) == frames:
            return array, sent, True
        elif index is None or len(index) != len(array):
            count = "no index" if index is None else f"an index of {len(index)}"
            self.problems.append(
                f"{path} has {len(array)} rows for {frames} frames and {count} to place them by"
            )
        elif hold:
            last = np.searchsorted(index, np.arange(frames), side="right") - 1
            return array[np.maximum(last, 0)], sent, True  # before the first: the first
        else:
            rows = twin.copy()
            rows[index] = array
            return rows, sent, True
        return twin.copy(), sent, False

    def _index(self, group: str, frames: int) -> NDArray[np.int64] | None:
        for candidate in (group, "joint") if group == "end" else (group,):
            index = read_dataset(self.file, f"action/{candidate}/index")
            if index is None or index.size == 0:
                continue
            index = index.reshape(-1).astype(np.int64)
            if index.min() < 0 or index.max() >= frames or (np.diff(index) <= 0).any():
                self.problems.append(f"action/{candidate}/index is not a rising list of rows below {frames}")
                return None
            return index
        return None


def load(file: h5py.File) -> tuple[Raw | None, list[str]]:
    """All of proprio_stats.h5, any layout variant; (None, problems) when it cannot be used."""
    reader = _Reader(file)
    stamps = read_dataset(file, "timestamp")
    if stamps is None or stamps.ndim != 1 or stamps.size == 0 or stamps.dtype.kind not in "iu":
        found = "missing" if stamps is None else f"{stamps.dtype} {stamps.shape}"
        return None, [f"timestamp is {found}, expected integers (N,)"]
    time_ns = stamps.astype(np.int64)
    frames = len(time_ns)
    if (np.diff(time_ns) <= 0).any():
        reader.problems.append(
            f"timestamp does not rise at row {int(np.flatnonzero(np.diff(time_ns) <= 0)[0]) + 1}"
        )
    joint = reader.needed("state/joint/position", frames, (14,), (16,))
    effector = _state_effector(reader, joint, frames)
    end = np.concatenate(
        [
            reader.needed("state/end/position", frames, (2, 3)).reshape(frames, 2, 3),
            reader.needed("state/end/orientation", frames, (2, 4)).reshape(frames, 2, 4),
        ],
        axis=2,
    ).reshape(frames, 14)
    head = reader.needed("state/head/position", frames, (2,))
    waist = reader.needed("state/waist/position", frames, (2,))
    if reader.problems or effector is None:
        return None, reader.problems
    lengths = np.linalg.norm(end.reshape(frames, 2, 7)[:, :, 3:], axis=2)
    bad = np.flatnonzero((np.abs(lengths - 1) > 1e-3).any(axis=1))
    if len(bad):
        reader.problems.append(
            f"state/end/orientation has no unit quaternion in {len(bad)} rows, first {bad[0]}"
        )
    action, sent, has_command, notes = _load_action(reader, joint, effector, end, head, waist)
    optional = _load_optional(reader, frames)
    known = len(reader.problems)
    velocity, sent_base, moving = reader.scattered("robot", np.zeros((frames, 2)), (2,), name="velocity")
    notes += [*reader.notes, *(f"{problem}: not kept" for problem in reader.problems[known:])]
    del reader.problems[known:]
    if moving:
        optional["base_velocity"] = velocity
    sent[:, ACTION_GROUPS.index("robot")] = sent_base if moving else False
    raw = Raw(time_ns, joint[:, :14], effector, end, head, waist, action, sent, has_command, optional, notes)
    return (None if reader.problems else raw), list(dict.fromkeys(reader.problems))


def _state_effector(reader: _Reader, joint: NDArray[np.float64], frames: int) -> NDArray[np.float64] | None:
    """[T, 2] or [T, 12] effector readings from whichever of the three layouts has them."""
    both = reader.array("state/effector/position", frames, (2,), (12,))
    if both is not None:
        return both
    sides = [reader.array(f"state/{side}_effector/position", frames, (1,), (6,)) for side in SIDES]
    if sides[0] is not None and sides[1] is not None:
        return np.concatenate([sides[0], sides[1]], axis=1)
    if joint.shape[1] == 16:
        return joint[:, 14:]
    if not reader.problems:
        reader.problems.append(
            "no effector state: neither effector, left_effector and right_effector, nor 16 joints"
        )
    return None


def _load_action(
    reader: _Reader,
    joint: NDArray[np.float64],
    effector: NDArray[np.float64],
    end: NDArray[np.float64],
    head: NDArray[np.float64],
    waist: NDArray[np.float64],
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.bool_], bool, list[str]]:
    """The file's action columns over the state, rows sent by group, whether there is an effector command, notes."""
    frames, notes = len(joint), []
    sent = np.zeros((frames, len(ACTION_GROUPS)), bool)
    action: dict[str, NDArray[np.float64]] = {}
    stored = read_dataset(reader.file, "action/joint/position")
    columns = 14 if stored is not None and stored.ndim == 2 and stored.shape[1] == 14 else joint.shape[1]
    joints, sent[:, 0], has_joint = reader.scattered("joint", joint[:, :columns], (columns,))
    action["joint"] = joints[:, :14]
    if reader.array("state/effector/position", None, (2,), (12,)) is not None:
        command, sent[:, 1], known = reader.scattered("effector", effector, effector.shape[1:], hold=True)
    elif joint.shape[1] == 16 and reader.array("action/effector/position", None, (2,)) is not None:
        command, sent[:, 1], known = reader.scattered("effector", effector, (2,), hold=True)
    elif joint.shape[1] == 16 and columns == 14:
        command, known = effector.copy(), False
    elif joint.shape[1] == 16:
        held, sent[:, 1], known = reader.scattered("joint", joint, joint.shape[1:], hold=True)
        command = held[:, 14:]
    else:
        half = effector.shape[1] // 2
        parts = [
            reader.scattered(f"{side}_effector", effector[:, i * half : (i + 1) * half], (half,), hold=True)
            for i, side in enumerate(SIDES)
        ]
        command = np.concatenate([part[0] for part in parts], axis=1)
        sent[:, 1], known = parts[0][1] & parts[1][1], parts[0][2] and parts[1][2]
    # Sixteen joints repeat their state, grippers included: a reading of 0 to 120 is no command.
    action["effector"] = command
    has_command = known and bool(np.abs(command - effector).max() > SAME)
    poses = end.reshape(frames, 2, 7)
    position, sent[:, 2], has_end = reader.scattered("end", poses[:, :, :3].reshape(frames, 6), (2, 3))
    turned, _, _ = reader.scattered("end", poses[:, :, 3:].reshape(frames, 8), (2, 4), name="orientation")
    action["end"] = np.concatenate([position.reshape(frames, 2, 3), turned.reshape(frames, 2, 4)], 2).reshape(
        frames, 14
    )
    action["head"], sent[:, 3], has_head = reader.scattered("head", head, (2,))
    action["waist"], sent[:, 4], has_waist = reader.scattered("waist", waist, (2,))
    lacking = [
        name
        for name, has in (("joint", has_joint), ("end", has_end), ("head", has_head), ("waist", has_waist))
        if not has
    ]
    if lacking:
        notes.append(f"no action for {', '.join(lacking)}: stored_action holds the state there")
    return action, sent, has_command, notes


def _load_optional(reader: _Reader, frames: int) -> dict[str, NDArray[np.float64]]:
    """Quantities some recordings lack. A quaternion of zeros is what other converters make of an empty array."""
    optional: dict[str, NDArray[np.float64]] = {}
    position = reader.spare("state/robot/position", frames, (3,))
    turned = reader.spare("state/robot/orientation", frames, (4,))
    if position is not None and turned is not None and (np.linalg.norm(turned, axis=1) > 0.5).all():
        optional["base_pose"] = np.concatenate([position, turned], axis=1)
    current = reader.spare("state/joint/current_value", frames, (14,), (16,))
    if current is not None:
        optional["joint_current"] = current[:, :14]
    wrench = reader.spare("state/end/wrench", frames, (12,), (2, 6))
    if wrench is not None:
        optional["wrench"] = wrench
    return optional


# --- grippers --------------------------------------------------------------------------------------------


def parse_gripper_range(text: str) -> tuple[float, float] | None:
    """ "35:120" -> (35.0, 120.0); None for auto."""
    if text == "auto":
        return None
    match = re.fullmatch(r"(-?[\d.]+):(-?[\d.]+)", text)
    if match is None or float(match[1]) == float(match[2]):
        raise UsageError(
            f"--gripper-range {text!r}: expected OPEN:CLOSED raw readings, such as 35:120, or auto"
        )
    return float(match[1]), float(match[2])


def gripper_range(state: NDArray[np.float64], command: NDArray[np.float64] | None) -> tuple[str, str]:
    """(name in GRIPPER_RANGES, note) for raw readings [T, 2] and commands [T, 2], if any, of one recording.

    The newer gripper reads 0 open and 120 closed, the older 35 and 120; both overshoot. A reading that the older
    one cannot have decides; else which scale foretells the readings from the commands; else whether an older
    gripper would be open at the least of them. A recording whose grippers stay closed shows nothing, and both
    scales say nearly the same of it.
    """
    least, most = float(state.min()), float(state.max())
    if least < -5 or most > 250:
        raise DataError(
            f"gripper readings of {least:g} to {most:g} fit no known gripper (0 to 120, 35 to 120): "
            "say what they mean with --gripper-range OPEN:CLOSED"
        )
    closing = None if command is None else command[:-GRIPPER_DELAY] > 0.5  # told to, and with the time for it
    travelled = (least < -0.1 and most - least > 0.3) if closing is None else bool(closing.any())
    if most < LEAST_TRAVEL and travelled:
        raise DataError(
            f"gripper readings of {least:g} to {most:g} are no actuator's (0 to 120, 35 to 120), radians perhaps: "
            "say what they mean with --gripper-range OPEN:CLOSED"
        )
    if least < OLD_OPEN_LEAST:
        return "0:120", ""
    if command is None and least <= OLD_OPEN_MOST:
        return (
            "35:120",
            f"gripper readings of {least:g} at least, no commands: read on the older scale, 35 to 120",
        )
    told = np.ones((0, 2)) if command is None else command[:-GRIPPER_DELAY]
    read = state[GRIPPER_DELAY:]
    telling = told < 0.9  # near 1 both scales agree
    if telling.sum() < GRIPPER_DELAY:
        return "0:120", f"grippers never open (least reading {least:g}): read on the newer scale, 0 to 120"
    error = {
        name: float(np.median(np.abs(read - (opened + (closed - opened) * told))[telling]))
        for name, (opened, closed) in GRIPPER_RANGES.items()
    }
    return min(error, key=lambda name: error[name]), ""


def gripper_closed(state: NDArray[np.float64], opened: float, closed: float) -> NDArray[np.float64]:
    """Raw readings -> 0 open, 1 closed, overshoot kept."""
    return (state - opened) / (closed - opened)


def arm_action_is_state(raw: Raw) -> bool:
    """Whether what the file calls the arms' action is their state at the same moment, as in all known releases."""
    return bool(np.abs(raw.action["joint"] - raw.joint).max() <= SAME)
