"""The arrays of each target take the bytes its definition gives: what a plan promises is what a disk must hold."""

import pytest
from dpipe.stages import DatasetInfo, Prepared, load_stage

ACTION = ("x", "y", "z", "rx", "ry", "rz", "gripper")
INFO = DatasetInfo(
    name="set",
    fps=20,
    episodes=1,
    frames=1000,
    features={"action": {"dtype": "float32", "shape": [7], "names": list(ACTION)}},
    cameras={"observation.images.image": (224, 224)},
)


def bytes_a_frame(stage: str, facts: dict, **options) -> dict[str, int]:
    made = load_stage(stage)
    specs = made.makes(made.Params(**options), INFO, Prepared(facts))
    return {spec.name: spec.row_bytes for spec in specs}


def test_a_token_is_a_byte_a_dimension():
    assert bytes_a_frame("tokens", {}) == {"tok_N10": 7, "valid": 1}
    both = bytes_a_frame("tokens", {}, bins=(10, 256), residual=True)
    assert both == {"tok_N10": 7, "resid_N10": 14, "tok_N256": 14, "resid_N256": 14, "valid": 1}
    # expanded to 10 and 40 steps where the chunk's start matters: 70 and 280 bytes
    assert bytes_a_frame("tokens", {}, relative=True, chunk=10)["tok_N10"] == 70
    assert bytes_a_frame("tokens", {}, relative=True, chunk=40)["tok_N10"] == 280


@pytest.mark.parametrize(
    ("width", "window", "last", "full"), [(1024, 10, 6_144, 61_440), (384, 7, 2_304, 16_128)]
)
def test_a_teachers_states_are_three_tokens_a_step(width, window, last, full):
    facts = {"queries": 3, "width": width, "window": window, "decodes": True, "normaliser": {"low": [0] * 7}}
    assert bytes_a_frame("teacher", facts)["h"] == last
    assert bytes_a_frame("teacher", facts, mode="full")["h"] == full


@pytest.mark.parametrize(
    ("grid", "width", "expected"),
    [
        ((7, 7), 2048, 200_704),  # Qwen2.5-VL-3B merged at 200 px
        ((8, 8), 2048, 262_144),
        ((9, 9), 2048, 331_776),
        ((16, 16), 2048, 1_048_576),
        ((16, 16), 1280, 655_360),  # before merging
        ((14, 14), 4096, 1_605_632),  # Qwen3-VL-8B at 448 px
        ((27, 27), 1152, 1_679_616),  # SigLIP so400m at 384 px
        ((16, 16), 768, 393_216),  # DINOv2-B
        ((8, 8), 768, 98_304),  # pooled 2 x 2
    ],
)
def test_a_frames_features_are_its_tokens_in_half_precision(grid, width, expected):
    facts = {"stored_grid": list(grid), "stored_width": width, "storage": "float16", "read_size": None}
    assert bytes_a_frame("foresight", facts) == {"feat": expected}
    # all of LIBERO, one camera, at 224 px: 71.7 GB
    if expected == 262_144:
        assert 273_465 * expected == pytest.approx(71.7e9, rel=1e-3)
    assert bytes_a_frame("foresight", facts, in_loop=True) == {"feat": 2 * expected}  # float32, never stored
    spec = load_stage("foresight").makes(load_stage("foresight").Params(in_loop=True), INFO, Prepared(facts))
    assert spec[0].every == 0


def test_an_anchors_chunk_and_its_residual():
    facts = {"chunk": 10, "arm_dims": list(range(6)), "gripper_dims": [6]}
    found = bytes_a_frame("residuals", facts)
    assert (found["arm"], found["grip_logit"], found["delta"], found["grip_target"]) == (120, 40, 240, 40)


def test_eight_draws_of_a_velocity_and_its_residual():
    facts = {"chunk": 32, "normaliser": {"low": [0] * 7}}
    found = bytes_a_frame("privileged", facts, draws=8)
    assert found["v_base"] + found["resid"] == 2 * 448 * 8
    assert found["seed"] + found["t_act"] + found["t_vid"] == 128
    assert sum(found.values()) - found["is_pad"] == 7_296  # 7.3 MB a thousand frames
