"""teacher: the cached state is the teacher's state, whatever the mode, the block or the episode's length."""

import json
import shutil

import numpy as np
import pytest
from dpipe.pipeline import target_parts
from dpipe.pipeline.precompute import precompute, read_index
from dpipe.schemas.errors import DataError, UsageError
from dpipe.schemas.normalisers import fit
from dpipe.stages.windows import full_windows, label_mask, last_windows
from dpipe.streams.arrays import open_array
from dpipe.streams.targets import open_targets
from tiny_dataset import ACTION, CAMERA, episode_columns, picture, write_tiny

torch = pytest.importorskip("torch")
from dpipe.models.action_decoder import load_decoder  # noqa: E402
from dpipe.models.policies import (  # noqa: E402
    EmbeddedPolicy,
    PolicyConfig,
    open_teacher,
    save_policy,
)

S, Q, WIDTH = 3, 3, 32
EPISODES = [(0, 12), (1, 2), (2, 9)]


# --- windows, on paper -------------------------------------------------------------------------------------


def test_the_newest_frame_is_read_and_short_histories_stand_at_the_left():
    index, read = last_windows(frames=4, steps=3)
    assert index.tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 2], [1, 2, 3]]
    assert read.tolist() == [0, 1, 2, 2]
    assert all(index[t, read[t]] == t for t in range(4))


def test_windows_start_at_every_kth_frame_and_a_short_episode_is_one():
    index, starts = full_windows(frames=7, steps=3, stride=2)
    assert starts.tolist() == [0, 2, 4] and index.tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    index, starts = full_windows(frames=2, steps=3, stride=1)
    assert index.tolist() == [[0, 1, 1]] and starts.tolist() == [0]


def test_a_token_speaks_of_a_frame_that_exists():
    mask = label_mask(np.array([0, 4]), frames=7, steps=3, queries=3)
    assert mask[0].all()
    assert mask[1].tolist() == [[True, True, True], [True, True, False], [True, False, False]]


# --- the cache ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = PolicyConfig(
        kind="teacher",
        cameras=(CAMERA,),
        state_mean=(0.0,) * 4,
        state_std=(1.0,) * 4,
        action_dim=4,
        grippers=(3,),
        window=S,
        queries=Q,
        width=WIDTH,
        layers=1,
        heads=2,
        image_size=32,
        points=4,
    )
    network = EmbeddedPolicy(config)
    rows = np.concatenate([episode_columns(*e)["action"] for e in EPISODES])
    place = tmp_path_factory.mktemp("teacher") / "policy"
    save_policy(place, network, fit(rows, names=ACTION), {"seed": 0, "steps": 0, "split": "train"})
    return place


def make(root, folder, **options):
    (made,) = precompute(root, ["teacher"], {"teacher": {"teacher": f"embedded:{folder}", **options}})
    return made


def direct(teacher, e, start, read=None):
    """The teacher on one window of episode e, straight from the pictures."""
    seed, frames = EPISODES[e]
    ids = np.minimum(np.arange(start, start + S), frames - 1)
    images = np.stack([picture(seed, int(t)) for t in ids])[None]
    state = episode_columns(seed, frames)["observation.state"][ids][None]
    hidden = teacher.hidden({CAMERA: images}, state, [f"task {seed % 2}"])[0]
    return hidden if read is None else hidden[read]


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_last_holds_the_newest_step_of_every_frame(tmp_path, folder, batch):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    made = make(root, folder, batch=batch)
    assert made.folder.name == "embedded-" + folder.parent.name.lower() + "-last"
    teacher = open_teacher(f"embedded:{folder}")
    targets = open_targets(root, ["teacher"])
    for e, (_, frames) in enumerate(EPISODES):
        for t in {0, 1, frames - 1, min(5, frames - 1)}:
            found = targets.take(episode=e, frame=t)
            # later steps of a short history are unseen, so any frames may stand there
            expected = direct(teacher, e, max(0, t - S + 1), read=min(t, S - 1))
            np.testing.assert_allclose(found["teacher"], expected, atol=2e-3)
            assert found["teacher_is_pad"].tolist() == [t + j >= frames for j in range(Q)]


def test_full_holds_every_step_of_every_window(tmp_path, folder):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    made = make(root, folder, mode="full", stride=2)
    index = read_index(made.folder)
    assert index["window_rows"] == [5, 1, 4]
    teacher = open_teacher(f"embedded:{folder}")
    arrays = {
        name: np.asarray(open_array(next((made.folder / name).glob("part-*"))))
        for name in ("h", "mask", "win_start", "pos", "a_hat")
    }
    assert arrays["win_start"].tolist() == [0, 2, 4, 6, 8, 0, 0, 2, 4, 6]
    assert arrays["pos"].tolist() == [[0, 1, 2]] * 10
    row = 0
    for e, rows in enumerate(index["window_rows"]):
        for w in range(rows):
            expected = direct(teacher, e, 2 * w)
            learnt = arrays["mask"][row].any(axis=-1)
            np.testing.assert_allclose(arrays["h"][row][learnt], expected[learnt], atol=2e-3)
            row += 1
    short = arrays["mask"][5]  # two frames: the third step is padding
    assert short.tolist() == [[True, True, False], [True, False, False], [False] * 3]
    found = open_targets(root, ["teacher"]).take(episode=0, frame=[0, 3, 11])
    np.testing.assert_array_equal(found["teacher"], arrays["h"][[0, 1, 4]])


def test_the_decoder_returns_the_stored_actions_and_is_kept_beside_them(tmp_path, folder):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    made = make(root, folder)
    assert made.report["decoded_within"] < 5e-3
    decoder = load_decoder(made.folder / "decoder.safetensors")
    found = open_targets(root, ["teacher", "teacher:array=a_hat,as=said"]).take(index=[0, 3, 20])
    with torch.no_grad():
        again = decoder.actions(torch.from_numpy(found["teacher"].astype(np.float32))).numpy()
    assert np.abs(again - found["said"].astype(np.float32)).max() < 5e-3
    assert (found["said"][..., 3] > 0).all() and (found["said"][..., 3] < 1).all()  # a probability


def test_a_student_can_be_aligned_without_the_teacher(tmp_path, folder):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    moved = shutil.copytree(folder, tmp_path / "moved" / "policy")
    made = make(root, moved)
    shutil.rmtree(moved)
    targets = open_targets(root, ["teacher"])
    assert targets.take(index=[0, 1])["teacher"].shape == (2, Q, WIDTH)
    contract = targets.contracts["teacher"]
    assert contract.horizon_frames == Q and contract.normaliser == made.report["normaliser"]["digest"]
    assert made.report["augmentation"] == "off" and made.report["causality_error"] <= 1e-4
    assert made.report["variance_per_dim"] > 0


def test_a_teacher_that_sees_the_future_is_refused(tmp_path, folder, monkeypatch):
    from dpipe.models import policies

    def peeking(self, images, state, texts):
        hidden = original(self, images, state, texts)
        return hidden + state.mean(axis=(1, 2))[:, None, None, None]

    original = policies.EmbeddedTeacher.hidden
    monkeypatch.setattr(policies.EmbeddedTeacher, "hidden", peeking)
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    with pytest.raises(DataError, match="not causal"):
        make(root, folder)


def test_a_state_that_is_no_number_is_masked_with_the_windows_that_need_it(tmp_path, folder):
    def broken(seed, frames):
        columns = episode_columns(seed, frames)
        if seed == 0 and frames > 4:
            columns["observation.state"][4] = np.nan
        return columns

    root = write_tiny(tmp_path / "set", EPISODES, camera=True, columns=broken)
    make(root, folder)
    found = open_targets(root, ["teacher"]).take(episode=0, frame=np.arange(12))
    assert np.isfinite(found["teacher"]).all()
    assert found["teacher_is_pad"].all(axis=1).tolist() == [t == 4 for t in range(12)]
    assert (found["teacher"][4] == 0).all()


def test_cameras_by_another_name_are_renamed_or_refused(tmp_path, folder):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    told = json.loads((folder / "policy.json").read_text())
    other = shutil.copytree(folder, tmp_path / "other" / "policy")
    told["config"]["cameras"] = ["observation.images.front"]
    (other / "policy.json").write_text(json.dumps(told))
    with pytest.raises(UsageError, match=r"unknown camera 'observation\.images\.front'"):
        make(root, other)
    made = make(root, other, rename=[f"observation.images.front={CAMERA}"])
    assert made.report["cameras"] == [CAMERA]


def test_changed_weights_stop_a_target_that_was_begun(tmp_path, folder):
    from safetensors.torch import load_file, save_file

    place = shutil.copytree(folder, tmp_path / "t" / "policy")
    root = write_tiny(tmp_path / "set", EPISODES, parts=[1, 1, 1], camera=True)
    made = make(root, place)
    weights = load_file(place / "model.safetensors")
    weights["norm.weight"] = weights["norm.weight"] * 2
    save_file(weights, place / "model.safetensors")
    shutil.rmtree(made.folder / "parts")
    (made.folder / "contract.json").unlink()
    target_parts._OPEN.clear()
    with pytest.raises(DataError, match="teacher's weights have changed"):
        make(root, place)


def test_no_teacher_says_how_to_get_one(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True)
    with pytest.raises(UsageError, match="dpipe train teacher"):
        precompute(root, ["teacher"])
