"""Real backbones through the whole path: folders of the true architectures, `dpipe train`, checkpoint, policy."""

# ruff: noqa: E402 - what needs torch is imported once torch is known to be there
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from dpipe.pipeline.precompute import precompute
from dpipe.schemas.errors import DataError, Interrupted
from test_trainer_run import OPTIONS, make_dataset, quiet
from tiny_dataset import CAMERA

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from dpipe import cli
from dpipe.trainer.run import open_run, train
from safetensors.torch import load_file
from tiny_backbones import save_act, save_internvl, save_qwen, save_siglip

SMALL = {"width": 32, "heads": 2, "points": 2}
FEW = ["--track", "none", "--batch-size", "4", "--log-every", "1", "--width", "32", "--heads", "2"]
CONFIGS = {
    "libra": {"chunk": 3, "slices": 2, "planner_layers": 1, "refiner_layers": 1},
    "vita": {"fingers": 1},
    "dial": {"horizon": 4, "execute": 2, "flow_layers": 2},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A workspace with one dataset, its targets, and backbones beside it."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("workspace")
    make_dataset(root / "lerobot" / "tiny")
    teacher = root / "runs/teacher/tiny"
    train(
        "teacher",
        root / "lerobot/tiny",
        teacher,
        steps=1,
        config=SMALL | {"window": 2},
        options=OPTIONS,
        say=quiet,
    )
    precompute(
        root / "lerobot/tiny",
        ["tokens", "foresight", "teacher"],
        {
            "tokens": {"probe": "none"},
            "foresight": {"pool": 2, "at": 4, "limit": 10.0},
            "teacher": {"teacher": f"embedded:{teacher / 'policy'}"},
        },
    )
    for name, save in {"qwen": save_qwen, "internvl": save_internvl, "siglip": save_siglip}.items():
        save(root / name)
    return root


def dpipe(monkeypatch, capsys, *words: str) -> dict:
    """The command line with --json: what it answered."""
    monkeypatch.setattr(sys, "argv", ["dpipe", *words, "--json"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    captured = capsys.readouterr()
    assert left.value.code == 0, captured.err
    return json.loads(captured.out.splitlines()[-1])  # the lines before tell of targets made first


def acts(run_dir: Path, rows: int = 2) -> np.ndarray:
    opened = open_run(run_dir)
    policy = opened.recipe.policy(opened.model, 0)
    frames = {CAMERA: np.random.default_rng(0).integers(0, 256, (rows, 64, 64, 3), np.uint8)}
    return np.stack([policy.act(frames, np.zeros((rows, 4)), ["task 0", "task 1"][:rows]) for _ in range(4)])


@pytest.mark.parametrize(
    ("recipe", "backbone", "extra"),
    [
        ("libra", "qwen", ["--vision", "siglip"]),
        ("vita", "qwen", ["--lora", "2"]),
        ("dial", "qwen", ["--recompute"]),
        ("libra", "internvl", ["--lora", "2", "--rates", "planner.encoder.vlm=0.1"]),
        ("vita", "internvl", []),
        ("dial", "internvl", ["--freeze", "vision,embeddings,llm[:1]"]),
    ],
)
def test_a_vlm_from_a_folder_trains_through_the_command_line(
    workspace, monkeypatch, capsys, recipe, backbone, extra
):
    given = [
        word
        for name, value in CONFIGS[recipe].items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    extra = [f"hf:{workspace / word}" if word == "siglip" else word for word in extra]
    words = ["--workspace", str(workspace), "--dataset", "tiny", "--name", backbone, "--steps", "2"]
    told = dpipe(
        monkeypatch,
        capsys,
        "train",
        recipe,
        *words,
        "--vlm",
        f"hf:{workspace / backbone}",
        *given,
        *FEW,
        *extra,
    )
    assert told["steps"] == 2 and np.isfinite(told["metrics"]["loss"])
    run_dir = Path(told["run"])
    terms = json.loads((run_dir / "config.json").read_text())["terms"]
    assert all(len(digest) == 32 for digest in terms["backbones"].values())
    assert f"hf:{workspace / backbone}" in terms["backbones"]
    actions = acts(run_dir)
    assert actions.shape == (4, 2, 4) and np.isfinite(actions).all()


def make(workspace: Path, run_dir: Path, **more):
    config = CONFIGS["libra"] | {"width": 32, "heads": 2, "points": 2, "vlm": f"hf:{workspace / 'internvl'}"}
    options = {"batch_size": 4, "log_every": 1, "checkpoint_every": 2, "ema": 0.9, "lr": 1e-2}
    config |= more.pop("config", {})
    return train(
        "libra",
        workspace / "lerobot/tiny",
        run_dir,
        steps=4,
        config=config,
        options=options,
        say=quiet,
        **more,
    )


def test_a_checkpoint_holds_what_trains_and_a_resumed_run_ends_where_an_undisturbed_one_does(
    workspace, tmp_path
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make(workspace, whole)
    with pytest.raises(Interrupted):
        make(workspace, parts, stop_after=3)
    make(workspace, parts)
    name = "checkpoints/step-000004"
    for file in ("model.safetensors", "ema.safetensors"):
        assert (whole / name / file).read_bytes() == (parts / name / file).read_bytes()
    kept = load_file(whole / name / "model.safetensors")
    assert not any("vision_tower" in key for key in kept)
    assert any("language_model" in key for key in kept)
    begun = load_file(workspace / "internvl/model.safetensors")
    opened = open_run(whole).model.planner.encoder.vlm.model
    eyes = {key.partition("vision_tower.")[2]: value for key, value in begun.items() if "vision_tower" in key}
    for key, value in opened.vision_tower.state_dict().items():
        assert torch.equal(value, eyes[key])
    layer = "layers.1.mlp.up_proj.weight"
    before = next(value for key, value in begun.items() if key.endswith(layer) and "language_model" in key)
    assert not torch.equal(opened.language_model.state_dict()[layer], before)


def test_a_backbone_that_changed_under_a_run_is_noticed(workspace, tmp_path):
    other = save_internvl(tmp_path / "other")
    make(workspace, tmp_path / "run", config={"vlm": f"hf:{other}"})
    weights = other / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(DataError, match="no longer the one it was trained with"):
        open_run(tmp_path / "run")


def test_a_lerobot_policy_serves_as_anchor_and_as_teacher(tmp_path):
    """ACT of the true architecture: its chunks refined, its head taken over by a student."""
    root = make_dataset(tmp_path / "set")
    spec = f"lerobot:{save_act(tmp_path / 'act', state=4, action=4)}"
    precompute(
        root, ["residuals", "teacher"], {"residuals": {"anchor": (spec,)}, "teacher": {"teacher": spec}}
    )
    for recipe, config in {
        "anchorrefine": {"heads": 2, "width": 32, "vision": "vit"},
        "vita": {"fingers": 1, **SMALL},
    }.items():
        result = train(recipe, root, tmp_path / recipe, steps=2, config=config, options=OPTIONS, say=quiet)
        assert np.isfinite(result.metrics["loss"])
        assert np.isfinite(acts(tmp_path / recipe)).all()
