"""The unified vector: one layout of named slots for every embodiment, a mask for what each has, projections.

Slots        per side: hand position and rot6d, gripper opening and command, fingertips, arm and hand joints; then
             head, waist and base. A robot with one arm is a right-handed one.
Axes         x forward, y left, z up, metres, radians, in the recording's own frame: no translation is invented, so
             positions of different sources compare up to where their origins are. EgoDex comes from ARKit axes
             (y up) or camera axes by a signed permutation.
Hand         position of a gripper is the point between its fingers, of a hand its wrist. Rotation as rot6d by
             columns: z towards the fingers; of a gripper y the axis they slide along, of a hand x out of its back
Gripper      0 closed, 1 open, not clipped, so that readings beyond the end stops survive
Projections  named vectors of published recipes, each piece of them invertible: dial47, dial18, hrdt48, go1,
             libero8, calvin15
Source       xpeng-robotics/DIAL b611fed `data_config_dial.py`, `lerobot_dataset_egodex.py`; alafumee/H_RDT
             `precompute_48d_actions.py`; OpenDriveLab/AgiBot-World (GO-1, 16 dimensions)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .episode import Embodiment
from .errors import DataError, unknown_name
from .features import Feature
from .rotations import (
    euler_to_matrix,
    matrix_to_euler,
    matrix_to_rot6d,
    matrix_to_rotvec,
    quat_to_matrix,
    rot6d_to_matrix,
    rotvec_to_matrix,
)

Array = NDArray[np.floating]

SIDES = ("left", "right")
FINGERS = ("thumb", "index", "middle", "ring", "little")
XYZ = ("x", "y", "z")
ROT6D = tuple(f"rot6d_{i}" for i in range(6))
FINGERS_APART_M = 0.08  # Panda hand, fully open
FLANGE_TO_GRIP_M = (
    0.143  # AgiBot G1, along the flange's z (34328/AgiBot_eef_extraction, by forward kinematics)
)

_SIDE_SLOTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ee_pos", XYZ),
    ("ee_rot6d", tuple(str(i) for i in range(6))),
    ("gripper_open", ("",)),
    ("gripper_command", ("",)),
    ("fingertips", tuple(f"{finger}_{axis}" for finger in FINGERS for axis in XYZ)),
    ("arm_joint", tuple(str(i) for i in range(1, 8))),
    ("hand_joint", tuple(str(i) for i in range(1, 7))),
)
_SLOTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    *((f"{side}_{slot}", parts) for side in SIDES for slot, parts in _SIDE_SLOTS),
    ("head_joint", ("yaw", "pitch", "roll")),
    ("head_pos", XYZ),  # of the camera the head carries
    ("head_rot6d", tuple(str(i) for i in range(6))),
    ("waist", ("yaw", "pitch", "roll", "lift")),
    ("base_velocity", ("x", "y", "yaw")),
    ("base_pose", ("x", "y", "yaw")),
)


def _layout() -> tuple[dict[str, slice], tuple[str, ...]]:
    slots: dict[str, slice] = {}
    names: list[str] = []
    for slot, parts in _SLOTS:
        slots[slot] = slice(len(names), len(names) + len(parts))
        names += [f"{slot}_{part}" if part else slot for part in parts]
    return slots, tuple(names)


SLOTS, NAMES = _layout()
DIM = len(NAMES)

# Rows are the unified axes: forward, left, up in ARKit's (x right, y up, z backward) and a camera's (x right, y
# down, z forward).
ARKIT_TO_UNIFIED = np.array([[0.0, 0, -1], [-1, 0, 0], [0, 1, 0]])
CAMERA_TO_UNIFIED = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
ARKIT_TO_DIAL = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # x right, y forward, z up
# Columns are the unified hand axes in Apple's wrist axes: left x to the fingers, y out of the palm; right x away
# from the fingers, y into the back of the hand.
WRIST_TO_HAND = {
    "left": np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]),
    "right": np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]),
}
# Apple's wrist axes to DIAL's. DIAL's own matrices have determinant -1, but only their first two columns are kept;
# these are the proper rotations with the same two columns: right [-c0, -c1], left [c0, -c1].
WRIST_TO_DIAL = {"left": np.diag([1.0, -1.0, -1.0]), "right": np.diag([-1.0, -1.0, 1.0])}


@dataclass(frozen=True)
class Unified:
    """`values` [T, DIM], 0 where `mask` [DIM] says the embodiment has no such dimension."""

    values: Array
    mask: NDArray[np.bool_]

    def slot(self, name: str) -> Array:
        if name not in SLOTS:
            raise unknown_name("slot", name, SLOTS)
        return self.values[:, SLOTS[name]]

    def has(self, name: str) -> bool:
        return bool(self.mask[SLOTS[name]].all())


def from_slots(slots: Mapping[str, Array], frames: int) -> Unified:
    """Unified vectors from slots [T, k] (or [T] for one dimension).

    What an embodiment lacks is masked out: a slot not given, a dimension that is NaN throughout.
    """
    values, mask = np.zeros((frames, DIM)), np.zeros(DIM, bool)
    for name, array in slots.items():
        if name not in SLOTS:
            raise unknown_name("slot", name, SLOTS)
        place = SLOTS[name]
        array = np.asarray(array, np.float64).reshape(frames, place.stop - place.start)
        mask[place] = ~np.isnan(array).all(axis=0)
        values[:, place] = np.where(mask[place], array, 0.0)
    return Unified(values, mask)


# --- hands seen by a headset -------------------------------------------------------------------------------


def hand_to_unified(matrix: Array, side: str, axes: Array = ARKIT_TO_UNIFIED) -> Array:
    """Wrist rotation [..., 3, 3] as EgoDex stores it -> hand rotation in unified axes."""
    return axes @ np.asarray(matrix, np.float64) @ WRIST_TO_HAND[side]


def unified_to_hand(matrix: Array, side: str, axes: Array = ARKIT_TO_UNIFIED) -> Array:
    """The inverse of `hand_to_unified`."""
    return axes.T @ matrix @ WRIST_TO_HAND[side].T


def points_to_unified(points: Array, axes: Array = ARKIT_TO_UNIFIED) -> Array:
    """Points [..., 3] in ARKit's world (x right, y up, z backward) -> x forward, y left, z up."""
    return np.asarray(points, np.float64) @ axes.T


def unified_to_points(points: Array, axes: Array = ARKIT_TO_UNIFIED) -> Array:
    """The inverse of `points_to_unified`."""
    return points @ axes


def hand_to_dial(matrix: Array, side: str) -> Array:
    """Wrist rotation [..., 3, 3] as EgoDex stores it -> DIAL's, proper."""
    return ARKIT_TO_DIAL @ np.asarray(matrix, np.float64) @ WRIST_TO_DIAL[side]


def points_to_dial(points: Array) -> Array:
    """Points [..., 3] in ARKit's world -> x right, y forward, z up: (x, -z, y)."""
    return np.asarray(points, np.float64) @ ARKIT_TO_DIAL.T


# --- projections -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Consecutive dimensions of a projection made from one slot, both ways."""

    names: tuple[str, ...]
    slot: str
    part: slice  # of the slot; what `back` returns has its width
    forth: Callable[[Array], Array] | None = None
    back: Callable[[Array], Array] | None = None


@dataclass(frozen=True)
class Projection:
    """A named vector of a published recipe, cut from unified vectors and put back."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for piece in self.pieces for name in piece.names)

    @property
    def dim(self) -> int:
        return len(self.names)

    def project(self, unified: Unified) -> tuple[Array, NDArray[np.bool_]]:
        """(vectors [T, dim], mask [dim]): 0 and False where the embodiment has nothing to give."""
        vectors = np.zeros((len(unified.values), self.dim))
        mask = np.zeros(self.dim, bool)
        for piece, place in self._places():
            source = _part(piece)
            if piece.forth is None:
                vectors[:, place], mask[place] = unified.values[:, source], unified.mask[source]
            elif unified.mask[source].all():
                vectors[:, place], mask[place] = piece.forth(unified.values[:, source]), True
        return vectors, mask

    def unproject(self, vectors: NDArray[np.floating], mask: NDArray[np.bool_] | None = None) -> Unified:
        """Vectors [T, dim] back to unified ones; what `mask` [dim] does not cover stays masked."""
        vectors = np.asarray(vectors, np.float64)
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise DataError(f"{self.name} has {self.dim} dimensions, found an array of shape {vectors.shape}")
        values, covered = np.zeros((len(vectors), DIM)), np.zeros(DIM, bool)
        for piece, place in self._places():
            part, target = vectors[:, place], _part(piece)
            given = np.ones(len(piece.names), bool) if mask is None else mask[place]
            if piece.back is None:
                values[:, target], covered[target] = np.where(given, part, 0.0), given
            elif given.all():
                values[:, target], covered[target] = piece.back(part), True
        return Unified(values, covered)

    def _places(self) -> list[tuple[Piece, slice]]:
        ends = np.cumsum([len(piece.names) for piece in self.pieces]).tolist()
        return [(p, slice(end - len(p.names), end)) for p, end in zip(self.pieces, ends, strict=True)]


def _part(piece: Piece) -> slice:
    start = SLOTS[piece.slot].start
    return slice(start + piece.part.start, start + piece.part.stop)


def _whole(slot: str, names: Sequence[str] = (), **both: Callable[[Array], Array]) -> Piece:
    place = SLOTS[slot]
    own = NAMES[place] if not names else tuple(names)
    return Piece(own, slot, slice(0, place.stop - place.start), **both)


def _rot6d_to_rotvec(rot6d: Array) -> Array:
    return matrix_to_rotvec(rot6d_to_matrix(rot6d))


def _rotvec_to_rot6d(rotvec: Array) -> Array:
    return matrix_to_rot6d(rotvec_to_matrix(rotvec))


def _rot6d_to_euler(rot6d: Array) -> Array:
    return matrix_to_euler(rot6d_to_matrix(rot6d))


def _euler_to_rot6d(euler: Array) -> Array:
    return matrix_to_rot6d(euler_to_matrix(euler))


# A turn of the world and one of the hand, from unified vectors to a recipe's: matrix -> world @ matrix @ hand.
_DIAL_WORLD = ARKIT_TO_DIAL @ ARKIT_TO_UNIFIED.T


def _turned(slot: str, world: Array, hand: Array | None = None) -> Piece:
    """A slot of positions (`hand` None) or of rot6d in axes of the recipe's own."""

    def forth(values: Array) -> Array:
        if hand is None:
            return (values.reshape(len(values), -1, 3) @ world.T).reshape(values.shape)
        return matrix_to_rot6d(world @ rot6d_to_matrix(values) @ hand)

    def back(values: Array) -> Array:
        if hand is None:
            return (values.reshape(len(values), -1, 3) @ world).reshape(values.shape)
        return matrix_to_rot6d(world.T @ rot6d_to_matrix(values) @ hand.T)

    return _whole(slot, forth=forth, back=back)


def _inverted(gripper: Array) -> Array:
    return 1.0 - gripper


_DIAL18 = tuple(
    piece
    for side in ("right", "left")
    for piece in (
        _turned(f"{side}_ee_pos", _DIAL_WORLD),
        _turned(f"{side}_ee_rot6d", _DIAL_WORLD, WRIST_TO_HAND[side].T @ WRIST_TO_DIAL[side]),
    )
)
_HRDT48 = tuple(  # as in the file: ARKit's world, Apple's wrists
    piece
    for side in SIDES
    for piece in (
        _turned(f"{side}_ee_pos", ARKIT_TO_UNIFIED.T),
        _turned(f"{side}_ee_rot6d", ARKIT_TO_UNIFIED.T, WRIST_TO_HAND[side].T),
        _turned(f"{side}_fingertips", ARKIT_TO_UNIFIED.T),
    )
)
_GO1 = tuple(
    piece
    for side in SIDES
    for piece in (
        _whole(f"{side}_arm_joint"),
        # 0 open, 1 closed, as in action/effector.
        _whole(f"{side}_gripper_open", [f"{side}_gripper"], forth=_inverted, back=_inverted),
    )
)
_LIBERO8 = (
    _whole("right_ee_pos", XYZ),
    _whole(
        "right_ee_rot6d",
        [f"axis_angle_{axis}" for axis in XYZ],
        forth=_rot6d_to_rotvec,
        back=_rotvec_to_rot6d,
    ),
    _whole(
        "right_gripper_open",
        ["gripper_left", "gripper_right"],
        forth=lambda opening: opening * [FINGERS_APART_M / 2, -FINGERS_APART_M / 2],
        back=lambda fingers: (fingers[:, :1] - fingers[:, 1:]) / FINGERS_APART_M,
    ),
)
_CALVIN15 = (
    _whole("right_ee_pos", XYZ),
    _whole("right_ee_rot6d", [f"euler_{axis}" for axis in XYZ], forth=_rot6d_to_euler, back=_euler_to_rot6d),
    _whole(
        "right_gripper_open",
        ["gripper_width"],
        forth=lambda opening: opening * FINGERS_APART_M,
        back=lambda width: width / FINGERS_APART_M,
    ),
    _whole("right_arm_joint", [f"joint_{i}" for i in range(1, 8)]),
    _whole(
        "right_gripper_command",
        ["gripper_action"],
        forth=lambda command: 2.0 * command - 1.0,
        back=lambda action: (action + 1.0) / 2.0,
    ),
)
PROJECTIONS: dict[str, Projection] = {
    projection.name: projection
    for projection in (
        Projection(
            "dial47",
            (
                *_DIAL18,
                *(
                    _whole(f"{s}_{joints}")
                    for s in ("right", "left")
                    for joints in ("arm_joint", "hand_joint")
                ),
                Piece(("waist_yaw", "waist_pitch", "waist_roll"), "waist", slice(0, 3)),
            ),
        ),
        Projection("dial18", _DIAL18),
        Projection("hrdt48", _HRDT48),
        Projection("go1", _GO1),
        Projection("libero8", _LIBERO8),
        Projection("calvin15", _CALVIN15),
    )
}


def projection(name: str) -> Projection:
    if name not in PROJECTIONS:
        raise unknown_name("projection", name, PROJECTIONS)
    return PROJECTIONS[name]


# --- from a dataset's columns ------------------------------------------------------------------------------


class _Columns:
    """Columns of a dataset by feature and dimension name, in float64."""

    def __init__(self, embodiment: Embodiment, columns: Mapping[str, NDArray[Any]]) -> None:
        self.features = {f.name: f for f in (*embodiment.features, *embodiment.sidecar)}
        self.columns = columns
        self.conventions = embodiment.conventions

    def has(self, feature: str, *names: str) -> bool:
        known = self.features.get(feature)
        return known is not None and feature in self.columns and set(names) <= set(known.names)

    def get(self, feature: str, *names: str) -> Array:
        """[T, k] of the named dimensions, all of them without names."""
        if not self.has(feature, *names):
            raise DataError(
                f"the unified vector needs {', '.join(names) or 'all'} of column '{feature}', "
                f"which this dataset has not; it has: {', '.join(sorted(self.columns))}"
            )
        column = np.asarray(self.columns[feature], np.float64)
        column = column.reshape(len(column), -1)
        known: Feature = self.features[feature]
        return column[:, [known.names.index(name) for name in names]] if names else column


def unify_state(embodiment: Embodiment, columns: Mapping[str, NDArray[Any]]) -> Unified:
    """Where everything is, from an episode's or a dataset's columns [T, D], sidecar columns among them."""
    return _unify(embodiment, columns, "state")


def unify_action(embodiment: Embodiment, columns: Mapping[str, NDArray[Any]]) -> Unified:
    """Where everything shall be one frame later, absolute, whatever form the source's actions have."""
    return _unify(embodiment, columns, "action")


def _unify(embodiment: Embodiment, columns: Mapping[str, NDArray[Any]], what: str) -> Unified:
    source = embodiment.name.split("-")[0]
    if source not in _MAPS:
        raise unknown_name("embodiment with a map to the unified vector", source, _MAPS)
    slots = _MAPS[source](_Columns(embodiment, columns), what)
    return from_slots(slots, len(next(iter(columns.values()))))


def _from_libero(columns: _Columns, what: str) -> dict[str, Array]:
    if what == "action":
        pose = columns.get("next_ee_pose")
        command = _command_open(columns.get("action", "gripper"), columns.conventions["gripper_action"])
        return {
            "right_ee_pos": pose[:, :3],
            "right_ee_rot6d": pose[:, 3:9],
            "right_gripper_open": command,
            "right_gripper_command": command,
        }
    state = columns.get("observation.state")
    fingers = columns.get("observation.state", "gripper_left", "gripper_right")
    slots = {
        "right_ee_pos": state[:, :3],
        "right_ee_rot6d": _rotvec_to_rot6d(state[:, 3:6]),
        "right_gripper_open": (fingers[:, :1] - fingers[:, 1:]) / FINGERS_APART_M,
    }
    if columns.has("joint_pos"):
        slots["right_arm_joint"] = columns.get("joint_pos")
    return slots


def _from_calvin(columns: _Columns, what: str) -> dict[str, Array]:
    if what == "action":
        pose = columns.get("next_ee_pose")
        return {
            "right_ee_pos": pose[:, :3],
            "right_ee_rot6d": pose[:, 3:9],
            "right_gripper_open": pose[:, 9:],
            "right_gripper_command": pose[:, 9:],
        }
    state = columns.get("observation.state")
    return {
        "right_ee_pos": state[:, :3],
        "right_ee_rot6d": columns.get("ee_rot6d")
        if columns.has("ee_rot6d")
        else _euler_to_rot6d(state[:, 3:6]),
        "right_gripper_open": state[:, 6:7] / FINGERS_APART_M,
        "right_arm_joint": state[:, 7:14],
        "right_gripper_command": (state[:, 14:] + 1.0) / 2.0,
    }


def _from_egodex(columns: _Columns, what: str) -> dict[str, Array]:
    """The dataset's own layout, in its own frame, with axes turned; hands have no gripper."""
    feature = "observation.state" if what == "state" else "action"
    layout, frame = columns.conventions["layout"], columns.conventions["frame"]
    if layout == "dial18":
        vectors = columns.get(feature)
        dial = projection("dial18").unproject(vectors)
        return {name: dial.slot(name) for side in SIDES for name in (f"{side}_ee_pos", f"{side}_ee_rot6d")}
    axes = ARKIT_TO_UNIFIED if frame == "world" else CAMERA_TO_UNIFIED
    full = layout == "full"
    slots: dict[str, Array] = {}
    for side in SIDES:
        wrist = f"{side}Hand" if full else f"{side}_wrist"
        position = columns.get(feature, *(f"{wrist}_{axis}" for axis in XYZ))
        rot6d = columns.get(feature, *(f"{wrist}_{i}" for i in ROT6D))
        slots[f"{side}_ee_pos"] = points_to_unified(position, axes)
        matrix = hand_to_unified(rot6d_to_matrix(rot6d), side, axes)
        slots[f"{side}_ee_rot6d"] = matrix_to_rot6d(matrix)
        tips = [_tip_name(side, finger, full) for finger in FINGERS]
        points = columns.get(feature, *(f"{tip}_{axis}" for tip in tips for axis in XYZ))
        slots[f"{side}_fingertips"] = points_to_unified(points.reshape(-1, 5, 3), axes).reshape(-1, 15)
    if columns.has(feature, "camera_x"):
        # In its own frame the head camera's pose is kept relative to the first frame's camera.
        slots["head_pos"] = points_to_unified(columns.get(feature, *(f"camera_{axis}" for axis in XYZ)), axes)
        camera = rot6d_to_matrix(columns.get(feature, *(f"camera_{i}" for i in ROT6D)))
        slots["head_rot6d"] = matrix_to_rot6d(axes @ camera)
    return slots


def _tip_name(side: str, finger: str, full: bool) -> str:
    if not full:
        return f"{side}_{finger}_tip"
    return f"{side}{finger.title()}{'' if finger == 'thumb' else 'Finger'}Tip"


def _from_agibot(columns: _Columns, what: str) -> dict[str, Array]:
    feature = "observation.state" if what == "state" else "action"
    slots: dict[str, Array] = {}
    end = "end_pose" if what == "state" else "next_end_pose"
    for side in SIDES:
        slots[f"{side}_arm_joint"] = columns.get(feature, *(f"{side}_arm_joint_{i}" for i in range(1, 8)))
        if columns.has(end):
            flange = columns.get(end, *(f"{side}_{axis}" for axis in XYZ))
            matrix = quat_to_matrix(columns.get(end, *(f"{side}_q{axis}" for axis in ("x", "y", "z", "w"))))
            # As with the other grippers: the point between the fingers. A dexterous hand: its wrist.
            reach = FLANGE_TO_GRIP_M if columns.has(feature, f"{side}_gripper") else 0.0
            slots[f"{side}_ee_pos"] = flange + reach * matrix[:, :, 2]
            slots[f"{side}_ee_rot6d"] = matrix_to_rot6d(matrix)
        if columns.has(feature, f"{side}_gripper"):
            slots[f"{side}_gripper_open"] = 1.0 - columns.get(feature, f"{side}_gripper")
            if what == "action":
                slots[f"{side}_gripper_command"] = slots[f"{side}_gripper_open"]
        else:
            slots[f"{side}_hand_joint"] = columns.get(
                feature, *(f"{side}_hand_joint_{i}" for i in range(1, 7))
            )
    frames = len(slots["left_arm_joint"])
    head = columns.get(feature, "head_yaw", "head_pitch")
    waist = columns.get(feature, "waist_pitch", "waist_lift")
    nothing = np.full((frames, 1), np.nan)
    slots["head_joint"] = np.concatenate([head, nothing], axis=1)
    slots["waist"] = np.concatenate([nothing, waist[:, :1], nothing, waist[:, 1:]], axis=1)
    return slots


def _command_open(gripper: Array, meaning: Mapping[str, float]) -> Array:
    """Gripper commands in a dataset's own polarity, {"open": a, "close": b}, -> 0 closed, 1 open."""
    return (gripper - meaning["close"]) / (meaning["open"] - meaning["close"])


_MAPS: dict[str, Callable[[_Columns, str], dict[str, Array]]] = {
    "libero": _from_libero,
    "calvin": _from_calvin,
    "egodex": _from_egodex,
    "agibot": _from_agibot,
}
