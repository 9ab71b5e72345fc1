"""Raw EgoDex episodes: proper poses in an ARKit world, named and typed as the publisher's files are.

Not a test file: helpers that test files import with `from raw_egodex import ...`.
"""

import zipfile
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
from scipy.spatial.transform import Rotation

FINGER_BONES = ("Metacarpal", "Knuckle", "IntermediateBase", "IntermediateTip", "Tip")


def joint_names() -> list[str]:
    """The 68 joints, written out from the fact sheet rather than from the converter."""
    names = ["hip", *(f"spine{i}" for i in range(1, 8)), *(f"neck{i}" for i in range(1, 5))]
    for side in ("left", "right"):
        names += [f"{side}Shoulder", f"{side}Arm", f"{side}Forearm", f"{side}Hand"]
        names += [f"{side}Thumb{bone}" for bone in FINGER_BONES[1:]]
        names += [f"{side}{f}Finger{b}" for f in ("Index", "Middle", "Ring", "Little") for b in FINGER_BONES]
    return names


def poses(frames: int, seed: int = 0) -> dict[str, np.ndarray]:
    """[N, 4, 4] float32 for the camera and every joint: position = (joint number, frame, 1) in tenths."""
    rng = np.random.default_rng(seed)
    out = {}
    for number, joint in enumerate(["camera", *joint_names()]):
        pose = np.tile(np.eye(4), (frames, 1, 1))
        pose[:, :3, :3] = Rotation.random(frames, random_state=rng.integers(1 << 30)).as_matrix()
        pose[:, :3, 3] = np.stack([np.full(frames, number), np.arange(frames), np.ones(frames)], axis=1) / 10
        out[joint] = pose.astype(np.float32)
    return out


def attributes(task: str) -> dict[str, Any]:
    return {
        "annotated": True,
        "annotator_version": "0.3",
        "task": task,
        "type": "reset",
        "description": "Pick up the stapler.",
        "environment": "table:metal, position:sitting, hand:right",
        "object": "object:stapler, color:black",
        "session_name": "2025-03-27_16-14-11.mov",
        "llm_type": "reset",
        "llm_description": "Pick up the stapler and place it on the box lid.",
        "llm_description2": "None",
        "which_llm_description": "1",
    }


def write_episode(
    stem: Path,
    frames: int = 6,
    video_frames: int | None = None,
    attrs: dict[str, Any] | None = None,
    confidence: bool = True,
    transforms: dict[str, np.ndarray] | None = None,
    size: tuple[int, int] = (64, 48),
    fps: int = 30,
) -> Path:
    """`stem`.hdf5 and .mp4; confidence of joint i at frame t is (i + t / 100) / 100."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(stem.with_suffix(".hdf5"), "w") as file:
        intrinsic = np.array([[736.6339, 0, 960], [0, 736.6339, 540], [0, 0, 1]], np.float32)
        file.create_dataset("camera/intrinsic", data=intrinsic)
        for joint, pose in (poses(frames) if transforms is None else transforms).items():
            file.create_dataset(f"transforms/{joint}", data=pose)
        if confidence:
            for i, joint in enumerate(sorted(joint_names())):
                values = ((i + np.arange(frames) / 100) / 100).astype(np.float32)
                file.create_dataset(f"confidences/{joint}", data=values)
        for name, value in (attributes(stem.parent.name) if attrs is None else attrs).items():
            file.attrs[name] = value
        file.attrs["llm_verbs"] = np.array(["pick", "place"], object)
    write_video(stem.with_suffix(".mp4"), frames if video_frames is None else video_frames, size, fps)
    return stem


def write_video(
    path: Path, frames: int, size: tuple[int, int] = (64, 48), fps: int = 30, codec: str = "h264"
) -> None:
    """Frame t is grey 10 + 3 t, modulo 240."""
    width, height = size
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"bf": "0", "g": "2", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(frames):
            picture = np.full((height, width, 3), (10 + 3 * t) % 240, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def zip_part(folder: Path, method: int = zipfile.ZIP_STORED) -> Path:
    """part2/ -> part2.zip beside it, its top folder the part, as published."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path
