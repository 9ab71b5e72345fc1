"""A software renderer for the tabletop: one ray per pixel, boxes and cylinders, in numpy.

Fast because little is traced: everything flat (table, tray, plate) is one texture looked up where a ray meets
the table, and a body is traced only in the pixels its bounding box can cover.

Conventions  a camera's axes are OpenCV's (x right, y down, z forward); `rotation` takes camera to world
             vectors; a ray's direction has z = 1, so the ray parameter is depth along the optical axis, m.
             Images are [H, W, 3] uint8 RGB, row 0 at the top.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Image = NDArray[np.uint8]

TABLE_Z = 0.90
TABLE_X, TABLE_Y = (-0.55, 0.16), (-0.42, 0.42)
BODY_HALF_M = 0.024
TRAY_HALF_M = PLATE_RADIUS_M = 0.05
TEXEL_M = 0.002
TEXTURE_ORIGIN = (-0.55, -0.42)
TEXTURE_SIZE = (355, 420)  # texels along x, y

WOOD = (186, 158, 122)
WOOD_LINE = (170, 142, 108)
FLOOR = (70, 74, 82)
WALL_LOW, WALL_HIGH = (150, 162, 176), (196, 206, 216)
TRAY_RIM, TRAY_FLOOR = (52, 56, 64), (118, 124, 134)
PLATE_RIM, PLATE_FLOOR = (250, 250, 250), (214, 218, 226)
FINGER, FINGERTIP, PALM, LINK = (60, 62, 68), (20, 20, 24), (232, 234, 238), (206, 210, 216)
SKIN, SLEEVE = (250, 200, 170), (84, 108, 156)
SHADOW = 0.62
LIGHT = np.array([0.35, 0.25, 0.9])  # towards the light, world


@dataclass(frozen=True)
class Body:
    """An object's looks: `shape` cube or cylinder, the colour's name and its RGB."""

    shape: str
    colour: str
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """Everything a camera can see at one moment, world frame, m. Rotations are [3, 3]."""

    bodies: tuple[Body, ...]
    object_pos: Array  # [N, 3] middles
    object_rot: Array  # [N, 3, 3]
    tray_pos: Array  # [3] on the table
    plate_pos: Array  # [3]
    hand_pos: Array  # [3] grip site
    hand_rot: Array  # [3, 3] columns: along the pads, the fingers' sliding axis, out of the hand
    finger: float  # m from the middle to each pad
    elbow_pos: Array  # [3] of the fourth joint
    wrist_pos: Array  # [3] of the sixth joint


@dataclass(frozen=True)
class Camera:
    """A pinhole: image size and focal lengths in pixels, principal point at the middle."""

    height: int
    width: int
    focal_px: float

    @staticmethod
    def square(size: int, fovy_deg: float) -> "Camera":
        return Camera(size, size, size / 2 / math.tan(math.radians(fovy_deg) / 2))


FRONT_FOV_DEG = 26.0
WRIST_FOV_DEG = 75.0
FRONT_EYE = np.array([0.36, 0.0, TABLE_Z + 0.74])
FRONT_TARGET = np.array([-0.13, 0.0, TABLE_Z + 0.045])
WRIST_EYE_IN_HAND = np.array([0.062, 0.0, -0.085])  # m from the grip site, in the hand's frame
WRIST_TILT_RAD = 0.30  # towards the fingertips


def look_at(eye: Array, target: Array) -> Array:
    """[3, 3] camera-to-world of a camera at `eye` whose picture has world z upwards."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(forward, right), forward], axis=1).astype(np.float64)


FRONT_ROTATION = look_at(FRONT_EYE, FRONT_TARGET)


def wrist_pose(scene: Scene) -> tuple[Array, Array]:
    """Eye [3] and camera-to-world rotation [3, 3] of the camera on the hand.

    Picture upwards is the hand's x axis (away from the robot when the hand points down), so that the
    fingertips stand at the lower edge, opening to left and right.
    """
    c, s = math.cos(WRIST_TILT_RAD), math.sin(WRIST_TILT_RAD)
    in_hand = np.array([[0.0, -c, -s], [1.0, 0.0, 0.0], [0.0, -s, c]])
    return scene.hand_pos + scene.hand_rot @ WRIST_EYE_IN_HAND, scene.hand_rot @ in_hand


def render_front(scene: Scene, size: int) -> Image:
    return render(scene, Camera.square(size, FRONT_FOV_DEG), FRONT_EYE, FRONT_ROTATION)


def render_wrist(scene: Scene, size: int) -> Image:
    eye, rotation = wrist_pose(scene)
    return render(scene, Camera.square(size, WRIST_FOV_DEG), eye, rotation, "hand")


def project(points: Array, camera: Camera, eye: Array, rotation: Array) -> Array:
    """World points [N, 3] -> [N, 3]: column and row in pixels (0, 0 the top left corner), depth in m."""
    seen = (points - eye) @ rotation
    middle = np.array([camera.width / 2, camera.height / 2])
    return np.concatenate([seen[:, :2] / seen[:, 2:] * camera.focal_px + middle, seen[:, 2:]], axis=1)


def render(scene: Scene, camera: Camera, eye: Array, rotation: Array, wearer: str = "robot") -> Image:
    """The scene from a camera at `eye`; for `wearer` see `render_with_depth`."""
    return _draw(scene, camera, eye, rotation, wearer)[0]


def render_with_depth(
    scene: Scene, camera: Camera, eye: Array, rotation: Array, wearer: str = "robot", far_m: float = 10.0
) -> tuple[Image, NDArray[np.float32]]:
    """The picture and the depth along the optical axis, [H, W] m, `far_m` where nothing stands.

    `wearer` is who holds the camera, which decides what is drawn beside the table: "robot" a camera that
    stands still (the whole arm), "hand" one on the hand (fingers alone), "torso" one on a robot of human shape
    (its forearm comes from the right shoulder), "person" one on a person's head (a hand for the gripper).
    """
    image, depth, ground = _draw(scene, camera, eye, rotation, wearer)
    table = ground.depth if ground.beyond is None else np.where(ground.beyond, far_m, ground.depth)
    return image, np.minimum(np.minimum(depth, table), far_m).astype(np.float32)


def _draw(
    scene: Scene, camera: Camera, eye: Array, rotation: Array, wearer: str
) -> "tuple[Image, NDArray[np.float32], _Ground]":
    where = rotation.tobytes(), eye.tobytes()
    containers = scene.tray_pos.tobytes(), scene.plate_pos.tobytes()
    if wearer == "robot":  # its camera's ground is kept, because it stands still
        ground = _meet_table_kept(camera, *where)
        image = _paint_kept(camera, *where, *containers).copy()
    else:
        ground = _meet_table(camera, *where)
        image = _paint(ground, *containers)
    _cast_shadows(image, scene, camera, eye, rotation, ground)
    depth = np.full((camera.height, camera.width), np.inf, np.float32)
    for solid in _solids(scene, wearer, camera, eye, rotation):
        _trace(image, depth, solid, camera)
    return image, depth, ground


@lru_cache(maxsize=16)
def _rays(camera: Camera) -> NDArray[np.float32]:
    """[3, H, W] directions through the pixels' middles, z = 1."""
    columns = (np.arange(camera.width) + 0.5 - camera.width / 2) / camera.focal_px
    rows = (np.arange(camera.height) + 0.5 - camera.height / 2) / camera.focal_px
    rays = np.ones((3, camera.height, camera.width), np.float32)
    rays[0], rays[1] = columns[None, :], rows[:, None]
    return rays


@dataclass(frozen=True)
class _Ground:
    """Where each pixel's ray meets the table plane: x, y in m, texel index, depth; and what lies beside it."""

    x: NDArray[np.float32]
    y: NDArray[np.float32]
    texel: NDArray[np.integer]
    depth: NDArray[np.float32]
    beyond: NDArray[np.bool_] | None
    backdrop: Image  # [P, 3] of the P pixels beyond the table


def _meet_table(camera: Camera, rotation: bytes, eye: bytes) -> _Ground:
    turn = np.frombuffer(rotation).reshape(3, 3).astype(np.float32)
    start = np.frombuffer(eye)
    rays = _rays(camera)
    world = (turn @ rays.reshape(3, -1)).reshape(rays.shape)
    down = np.minimum(world[2], np.float32(-1e-4))
    reach = np.float32(TABLE_Z - start[2]) / down
    x = world[0] * reach + np.float32(start[0])
    y = world[1] * reach + np.float32(start[1])
    row = (x * np.float32(1 / TEXEL_M) - np.float32(TEXTURE_ORIGIN[0] / TEXEL_M)).astype(np.int32)
    column = (y * np.float32(1 / TEXEL_M) - np.float32(TEXTURE_ORIGIN[1] / TEXEL_M)).astype(np.int32)
    inside = (row >= 0) & (row < TEXTURE_SIZE[0]) & (column >= 0) & (column < TEXTURE_SIZE[1])
    texel = row * TEXTURE_SIZE[1] + column
    if inside.all():
        return _Ground(x, y, texel, reach, None, np.zeros((0, 3), np.uint8))
    beyond = ~inside
    texel[beyond] = 0
    wx, wy, wz = world[:, beyond]
    rise = np.clip(wz / np.hypot(wx, wy) * 2, 0, 1)
    backdrop = _WALL[(rise * 63).astype(np.intp)]
    backdrop[wz < -0.15] = FLOOR
    return _Ground(x, y, texel, reach, beyond, backdrop)


_WALL = np.linspace(WALL_LOW, WALL_HIGH, 64).astype(np.uint8)  # from the floor's edge upwards


_meet_table_kept = lru_cache(maxsize=16)(_meet_table)


def _paint(ground: _Ground, tray: bytes, plate: bytes) -> Image:
    """[H, W, 3]: the table with its containers, and what lies beside it."""
    image = _texture(tray, plate).reshape(-1, 3)[ground.texel]
    if ground.beyond is not None:
        image[ground.beyond] = ground.backdrop
    return image


@lru_cache(maxsize=16)
def _paint_kept(camera: Camera, rotation: bytes, eye: bytes, tray: bytes, plate: bytes) -> Image:
    return _paint(_meet_table_kept(camera, rotation, eye), tray, plate)


@lru_cache(maxsize=8)
def _texture(tray: bytes, plate: bytes) -> Image:
    """The table from above with the tray and the plate painted on it: [x, y, 3]."""
    x = TEXTURE_ORIGIN[0] + (np.arange(TEXTURE_SIZE[0]) + 0.5) * TEXEL_M
    y = TEXTURE_ORIGIN[1] + (np.arange(TEXTURE_SIZE[1]) + 0.5) * TEXEL_M
    image = np.empty((*TEXTURE_SIZE, 3), np.uint8)
    image[:] = WOOD
    boards = (np.mod(y, 0.08) < TEXEL_M * 1.5)[None, :]
    image[np.broadcast_to(boards, TEXTURE_SIZE)] = WOOD_LINE
    middle = np.frombuffer(tray)
    square = np.maximum(np.abs(x - middle[0])[:, None], np.abs(y - middle[1])[None, :])
    image[square <= TRAY_HALF_M + 0.004] = TRAY_RIM
    image[square <= TRAY_HALF_M - 0.004] = TRAY_FLOOR
    middle = np.frombuffer(plate)
    circle = np.hypot((x - middle[0])[:, None], (y - middle[1])[None, :])
    image[circle <= PLATE_RADIUS_M + 0.004] = np.array(WOOD_LINE) - 30
    image[circle <= PLATE_RADIUS_M + 0.001] = PLATE_RIM
    image[circle <= PLATE_RADIUS_M - 0.012] = PLATE_FLOOR
    return image


@dataclass(frozen=True)
class _Solid:
    """A box, or a cylinder about its own z axis, as one camera sees it."""

    window: tuple[slice, slice]  # rows and columns its bounding box can cover
    to_local: NDArray[np.float32]  # [3, 3] camera to body vectors
    origin: NDArray[np.float32]  # [3] the eye in the body's frame
    half: tuple[float, float, float]  # half sizes; a cylinder's radius is half[0]
    faces: NDArray[np.float32]  # [3] brightness of the visible face across each axis
    light: NDArray[np.float32]  # [3] towards the light, in the body's frame
    rgb: tuple[int, int, int]
    is_cylinder: bool


_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)
_LIGHT = LIGHT / np.linalg.norm(LIGHT)
_NEAR_M = 0.005
Part = tuple[Array, Array, tuple[float, float, float], tuple[int, int, int], bool]


def _parts(scene: Scene, wearer: str) -> list[Part]:
    """Centre, rotation, half sizes, colour and roundness of everything solid."""
    half = (BODY_HALF_M, BODY_HALF_M, BODY_HALF_M)
    parts: list[Part] = [
        (scene.object_pos[i], scene.object_rot[i], half, body.rgb, body.shape == "cylinder")
        for i, body in enumerate(scene.bodies)
    ]
    hand, turn = scene.hand_pos, scene.hand_rot
    out = turn[:, 2]
    for side in (1.0, -1.0):
        across = hand + turn[:, 1] * (side * (scene.finger + 0.006))
        if wearer == "person":
            parts.append((across - out * 0.028, turn, (0.009, 0.008, 0.037), SKIN, False))
            continue
        parts.append((across - out * 0.002, turn, (0.009, 0.006, 0.011), FINGERTIP, False))
        parts.append((across - out * 0.041, turn, (0.009, 0.006, 0.028), FINGER, False))
    if wearer == "person":
        parts.append((hand - out * 0.100, turn, (0.020, 0.045, 0.045), SKIN, False))
        wrist = hand - out * 0.145
        parts.append(_rod(wrist, wrist - np.array([0.22, 0.04, -0.06]), 0.030, SLEEVE))
    if wearer == "torso":
        wrist = hand - out * 0.16
        parts.append((hand - out * 0.085, turn, (0.019, 0.062, 0.018), PALM, False))
        parts.append(_rod(hand - out * 0.103, wrist, 0.030, LINK))
        parts.append(_rod(wrist, wrist + np.array([-0.24, -0.30, 0.06]), 0.032, PALM))
    if wearer == "robot":
        top = hand - out * 0.20
        parts.append((hand - out * 0.085, turn, (0.019, 0.062, 0.018), PALM, False))
        parts.append(_rod(hand - out * 0.103, top, 0.030, LINK))
        parts.append(_rod(top, scene.wrist_pos, 0.045, PALM))
        parts.append(_rod(scene.wrist_pos, scene.elbow_pos, 0.050, LINK))
    return parts


def _rod(start: Array, end: Array, radius: float, rgb: tuple[int, int, int]) -> Part:
    axis = end - start
    length = math.sqrt(float(axis @ axis))
    x, y, z = (axis / length).tolist()
    flat = math.hypot(x, y)  # the rod never points along world z exactly: the hand is never quite upright
    side = (-y / flat, x / flat, 0.0) if flat > 1e-9 else (1.0, 0.0, 0.0)
    third = (-z * side[1], z * side[0], x * side[1] - y * side[0])
    rotation = np.array([side, third, (x, y, z)]).T
    return (start + end) / 2, rotation, (radius, radius, length / 2), rgb, True


def _solids(scene: Scene, wearer: str, camera: Camera, eye: Array, rotation: Array) -> list[_Solid]:
    """What the camera can see of the parts; the small matrices of all parts in one go, for speed."""
    parts = _parts(scene, wearer)
    centres = np.array([part[0] for part in parts])
    turns = np.array([part[1] for part in parts])
    halves = np.array([part[2] for part in parts])
    inverse = turns.transpose(0, 2, 1)
    seen = (centres[:, None] + (_CORNERS * halves[:, None]) @ inverse - eye) @ rotation
    to_local = (inverse @ rotation).astype(np.float32)
    origins = (inverse @ (eye - centres)[:, :, None])[:, :, 0]
    lights = inverse @ _LIGHT
    # The face a ray meets first across an axis is the one on the eye's side.
    faces = (0.55 + 0.45 * np.maximum(lights * np.sign(origins), 0.0)).astype(np.float32)
    origins, lights = origins.astype(np.float32), lights.astype(np.float32)
    windows = _windows(seen, camera)
    return [
        _Solid(window, to_local[i], origins[i], part[2], faces[i], lights[i], part[3], part[4])
        for i, (part, window) in enumerate(zip(parts, windows, strict=True))
        if window is not None
    ]


def _windows(seen: Array, camera: Camera) -> list[tuple[slice, slice] | None]:
    """Points [S, K, 3] in camera axes -> rows and columns each set's convex hull can cover, None if none."""
    depth = seen[:, :, 2]
    flat = seen[:, :, :2] / np.maximum(depth, 1e-6)[:, :, None] * camera.focal_px
    flat += [camera.width / 2, camera.height / 2]
    bounds = np.concatenate([flat.min(axis=1), flat.max(axis=1), depth.min(axis=1)[:, None]], axis=1)
    farthest = depth.max(axis=1).tolist()
    windows: list[tuple[slice, slice] | None] = []
    for (left, top, right, bottom, nearest), far in zip(bounds.tolist(), farthest, strict=True):
        if far <= _NEAR_M:
            windows.append(None)
            continue
        if nearest <= _NEAR_M:  # reaches behind the camera: no bound worth computing
            left, top, right, bottom = 0, 0, camera.width, camera.height
        rows = slice(max(0, int(top)), min(camera.height, int(bottom) + 1))
        columns = slice(max(0, int(left)), min(camera.width, int(right) + 1))
        sees = rows.start < rows.stop and columns.start < columns.stop
        windows.append((rows, columns) if sees else None)
    return windows


def _trace(image: Image, depth: NDArray[np.float32], solid: _Solid, camera: Camera) -> None:
    """Draw one solid where it is nearer than what `depth` [H, W] already holds."""
    rays = _rays(camera)[:, solid.window[0], solid.window[1]]
    direction = solid.to_local @ rays.reshape(3, -1)
    hit, shade = (_hit_cylinder if solid.is_cylinder else _hit_box)(direction, solid)
    behind = depth[solid.window]
    hit = hit.reshape(behind.shape)
    nearer = hit < behind
    np.copyto(behind, hit, where=nearer)
    np.copyto(image[solid.window], shade.reshape(*behind.shape, 3), where=nearer[..., None])


def _hit_box(direction: NDArray[np.float32], solid: _Solid) -> tuple[NDArray[np.float32], Image]:
    """Depth [P] (inf where missed) and colour [P, 3] of rays [3, P], by slabs, in the box's frame."""
    half = np.array(solid.half, np.float32)[:, None]
    origin = solid.origin[:, None]
    inverse = 1.0 / np.where(np.abs(direction) < 1e-9, np.float32(1e-9), direction)
    middle, reach = -origin * inverse, np.abs(inverse) * half
    enter, leave = middle - reach, middle + reach
    near = enter.max(axis=0)
    hit = np.where((near <= leave.min(axis=0)) & (near > _NEAR_M), near, np.float32(np.inf))
    palette = (solid.faces[:, None] * np.array(solid.rgb, np.float32)).astype(np.uint8)
    return hit, palette[enter.argmax(axis=0)]


def _hit_cylinder(direction: NDArray[np.float32], solid: _Solid) -> tuple[NDArray[np.float32], Image]:
    """The same for a cylinder: its side, and the end that faces the eye."""
    radius, height = solid.half[0], solid.half[2]
    dx, dy, dz = direction
    ox, oy, oz = solid.origin.tolist()
    a = np.maximum(dx * dx + dy * dy, np.float32(1e-12))
    b = ox * dx + oy * dy
    root = b * b - a * (ox * ox + oy * oy - radius * radius)
    side = (-b - np.sqrt(np.maximum(root, 0))) / a
    hit = np.where(
        (root > 0) & (np.abs(oz + side * dz) <= height) & (side > _NEAR_M), side, np.float32(np.inf)
    )
    bright = ((ox + side * dx) * float(solid.light[0]) + (oy + side * dy) * float(solid.light[1])) / radius
    bright = 0.55 + 0.45 * np.maximum(bright, np.float32(0))
    if abs(oz) > height:
        cap = (math.copysign(height, oz) - oz) / np.where(np.abs(dz) < 1e-9, np.float32(1e-9), dz)
        px, py = ox + cap * dx, oy + cap * dy
        on_cap = (px * px + py * py <= radius * radius) & (cap > _NEAR_M)
        hit = np.where(on_cap, cap, hit)
        bright = np.where(on_cap, solid.faces[2], bright)
    # 64 shades are plenty for an eye and much cheaper than a multiplication per pixel and channel.
    shades = (np.linspace(0, 1, 64)[:, None] * np.array(solid.rgb)).astype(np.uint8)
    return hit, shades[np.minimum(bright * 63, 63).astype(np.intp)]


def _cast_shadows(
    image: Image, scene: Scene, camera: Camera, eye: Array, rotation: Array, ground: _Ground
) -> None:
    """Darken the table straight below the hand and below lifted objects: how high they are can be seen."""
    spots = [(scene.hand_pos, scene.hand_rot, (0.019, 0.062))]
    for position, turn in zip(scene.object_pos, scene.object_rot, strict=True):
        if position[2] > TABLE_Z + BODY_HALF_M + 0.004:
            spots.append((position, turn, (BODY_HALF_M, BODY_HALF_M)))
    corners = np.array([position + _CORNERS * math.hypot(*half) for position, _, half in spots])
    corners[:, :, 2] = TABLE_Z
    windows = _windows((corners - eye) @ rotation, camera)
    for (position, turn, half), window in zip(spots, windows, strict=True):
        if window is None:
            continue
        c, s = float(turn[0, 0]), float(turn[1, 0])
        length = math.hypot(c, s)
        c, s = c / length, s / length
        x = ground.x[window] - np.float32(position[0])
        y = ground.y[window] - np.float32(position[1])
        dark = (np.abs(x * c + y * s) <= half[0]) & (np.abs(y * c - x * s) <= half[1])
        part = image[window]
        part[dark] = (part[dark] * SHADOW).astype(np.uint8)
