"""The real LIBERO recordings, converted, judged by lerobot 0.6.1 and Hugging Face datasets."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from dpipe.pipeline.payload import VideoOptions
from trees import run_convert

CAMERAS = {"observation.images.image": "agentview_rgb", "observation.images.image2": "eye_in_hand_rgb"}


@pytest.fixture(scope="module")
def converted(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sample in both codecs."""
    roots = {}
    for codec in ("h264", "av1"):
        roots[codec] = tmp_path_factory.mktemp("sample") / codec
        run_convert(sample_data / "libero", roots[codec], video=VideoOptions(codec=codec), part_frames=400)
    return roots


def open_lerobot(root: Path, **settings):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("local/sample", root=root, video_backend="pyav", **settings)


def raw_frames(sample_data: Path, source_id: str, camera: str) -> np.ndarray:
    """The source frames of an episode under the default options, [T, H, W, 3]."""
    file, demo = source_id.rsplit("/", 1)
    with h5py.File(sample_data / "libero" / f"{file}.hdf5", locking=False) as raw:
        return raw[f"data/{demo}/obs/{CAMERAS[camera]}"][:-1][:, ::-1, ::-1]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_every_frame_is_its_own_source_frame_and_sharp_enough(sample_data: Path, converted: dict[str, Path]):
    from dpipe.streams.dataset import open_dataset

    mean = {}
    for codec, root in converted.items():
        dataset = open_dataset(root)
        quality = []
        for episode in range(len(dataset)):
            for camera in CAMERAS:
                source = raw_frames(sample_data, dataset.episodes.source_id(episode), camera)
                decoded = dataset.frames(episode, camera, 0, len(source))
                # Squared distances of every decoded frame to every source frame, over all pixels.
                a, b = (x.reshape(len(x), -1).astype(np.float32) for x in (decoded, source))
                distance = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
                offset = distance.argmin(axis=1) - np.arange(len(source))
                assert np.median(offset) == 0 and np.abs(offset).max() <= 1, (codec, episode, camera)
                quality += [psnr(a, b) for a, b in zip(decoded, source, strict=True)]
        mean[codec] = np.mean(quality)
        assert min(quality) >= 31, codec
    assert mean["av1"] >= 35 and mean["h264"] >= mean["av1"] + 1


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_lerobot_reads_all_of_it_with_delta_timestamps(converted: dict[str, Path], codec: str):
    from dpipe.streams.dataset import open_dataset

    deltas = {"action": [i / 20 for i in range(8)], "observation.images.image": [-0.05, 0.0]}
    judge = open_lerobot(converted[codec], delta_timestamps=deltas)
    ours = open_dataset(converted[codec])
    assert len(judge) == ours.total_frames == 916 and judge.meta.total_episodes == 8
    actions = ours.all_columns(["action"])["action"]
    for index in [*range(0, len(judge), 61), len(judge) - 1]:
        item = judge[index]
        assert item["observation.images.image"].shape == (2, 3, 128, 128)
        assert np.array_equal(item["action"][0].numpy(), actions[index])
        episode = int(item["episode_index"])
        assert item["task"] == ours.episodes.tasks(episode)[0]
        frame = ours.frames(
            episode, "observation.images.image", int(item["frame_index"]), int(item["frame_index"]) + 1
        )
        theirs = (item["observation.images.image"][1].numpy().transpose(1, 2, 0) * 255).round()
        assert np.abs(theirs - frame[0]).mean() < 1


def test_lerobots_own_metadata_and_statistics_are_complete(converted: dict[str, Path]):
    judge = open_lerobot(converted["h264"])
    for name, feature in judge.meta.features.items():
        stats = judge.meta.stats[name]
        assert set(stats) == {"min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"}
        expected = (3, 1, 1) if feature["dtype"] == "video" else tuple(feature["shape"])
        assert stats["mean"].shape == expected
    actions = np.asarray(judge.hf_dataset.with_format("numpy")["action"][:])
    assert np.allclose(
        judge.meta.stats["action"]["q99"], np.quantile(actions.astype(np.float64), 0.99, axis=0)
    )


@pytest.mark.slow
def test_an_act_training_step_of_lerobot_runs(converted: dict[str, Path]):
    import torch
    from lerobot.configs.types import FeatureType
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.utils.feature_utils import dataset_to_policy_features

    torch.set_num_threads(1)
    judge = open_lerobot(converted["h264"], delta_timestamps={"action": [i / 20 for i in range(10)]})
    features = dataset_to_policy_features(judge.meta.features)
    outputs = {k: f for k, f in features.items() if f.type is FeatureType.ACTION}
    inputs = {k: f for k, f in features.items() if k not in outputs}
    assert set(outputs) == {"action"} and set(inputs) == {"observation.state", *CAMERAS}
    config = ACTConfig(
        input_features=inputs,
        output_features=outputs,
        chunk_size=10,
        n_action_steps=10,
        pretrained_backbone_weights=None,
        dim_model=64,
        dim_feedforward=128,
        n_heads=4,
        n_encoder_layers=1,
        n_vae_encoder_layers=1,
        device="cpu",
    )
    policy = ACTPolicy(config)
    prepare, _ = make_pre_post_processors(config, dataset_stats=judge.meta.stats)
    batch = next(iter(torch.utils.data.DataLoader(judge, batch_size=2)))
    loss, _ = policy.forward(prepare(batch))
    loss.backward()
    assert torch.isfinite(loss) and any(
        p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters()
    )


def test_hugging_face_datasets_opens_the_folder(converted: dict[str, Path], tmp_path: Path):
    import datasets

    rows = datasets.load_dataset(str(converted["h264"]), cache_dir=str(tmp_path))["train"]
    assert len(rows) == 916 and len(rows[0]["action"]) == 7


def test_statistics_are_exact_over_every_frame(converted: dict[str, Path]):
    import json

    from dpipe.streams.dataset import open_dataset

    stats = json.loads((converted["h264"] / "meta" / "stats.json").read_text())
    rows = open_dataset(converted["h264"]).all_columns(["action", "observation.state", "index", "timestamp"])
    for name, values in rows.items():
        wide = values.astype(np.float64).reshape(len(values), -1)
        assert stats[name]["count"] == [916]
        for key, q in {
            "min": 0,
            "q01": 0.01,
            "q10": 0.1,
            "q50": 0.5,
            "q90": 0.9,
            "q99": 0.99,
            "max": 1,
        }.items():
            np.testing.assert_allclose(stats[name][key], np.quantile(wide, q, axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(stats[name]["std"], wide.std(axis=0), rtol=1e-9, atol=1e-12)
