"""Everyday comforts: other trainers' launch lines, pushing, viewing, completing words."""

import ast
import inspect
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from dpipe.cli import cli
from dpipe.commands.completion import WHERE, complete_dataset
from dpipe.commands.export import TRAINERS as OFFERED
from dpipe.commands.view import viewer_words
from dpipe.pipeline.push import licence_says, plan_push, push
from dpipe.pipeline.trainers import TRAINERS, export, in_order, norm_stats, write_export
from dpipe.pipeline.workspace import Workspace
from dpipe.schemas.errors import UsageError
from dpipe.streams.dataset import open_dataset
from small_datasets import write_dataset

# --- export ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two cameras, two splits, and statistics of which each number tells its place."""
    splits = {"train": "0:2", "val": "2:3"}
    cameras = ("wrist", "top")
    root = write_dataset(tmp_path / "lerobot/mine", [4, 6, 4], cameras=cameras, splits=splits)
    stats = {
        name: {
            s: [i + d / 10 for d in range(3)]
            for i, s in enumerate(("min", "max", "mean", "std", "q01", "q99"))
        }
        for name in ("observation.state", "action")
    }
    (root / "meta/stats.json").write_text(json.dumps(stats))
    return root


def test_the_command_offers_every_trainer_there_is():
    assert set(OFFERED) == set(TRAINERS)


@pytest.mark.parametrize("trainer", sorted(TRAINERS))
def test_every_trainer_gets_a_line_with_this_dataset_in_it(dataset: Path, tmp_path: Path, trainer: str):
    made = export(dataset, trainer, tmp_path / "out")
    assert made.problems == ()
    text = "\n".join(made.commands)
    assert "mine" in text and {ours for ours, _ in made.cameras} <= set(open_dataset(dataset).cameras)
    assert len(made.cameras) == 2 and made.chunk > 0
    for path in write_export(made, tmp_path / "out"):
        contents = path.read_text()
        if path.suffix == ".py":
            ast.parse(contents)
        else:
            json.loads(contents)
    write_export(made, tmp_path / "out")  # the same again is no quarrel
    changed = next(iter((tmp_path / "out").rglob("*.*")), None)
    if changed is not None:
        changed.write_text("mine")
        with pytest.raises(UsageError, match="says something else"):
            write_export(made, tmp_path / "out")


def test_only_the_training_split_is_named(dataset: Path, tmp_path: Path):
    (line,) = export(dataset, "pi05", tmp_path).commands
    assert "--dataset.episodes=[0,1]" in shlex.split(line.replace("\\\n", " "))


@pytest.mark.timeout(900)
def test_lerobot_understands_every_word_of_its_lines(dataset: Path, tmp_path: Path):
    draccus = pytest.importorskip("draccus", reason="lerobot is not installed")
    pytest.importorskip("lerobot.policies", reason="lerobot's policies are not installed")
    from lerobot.configs.train import TrainPipelineConfig

    for trainer in ("pi0", "pi05", "smolvla", "xvla", "groot"):
        made = export(dataset, trainer, tmp_path)
        words = shlex.split(made.commands[0].split("# with lerobot\n")[-1].replace("\\\n", " "))
        assert words[0] == "lerobot-train"
        config = draccus.parse(TrainPipelineConfig, args=words[1:])
        assert config.policy.type == trainer and config.policy.chunk_size == made.chunk
        assert config.dataset.root == str(dataset) and config.dataset.episodes == [0, 1]
        mapping = {str(k): v.value for k, v in config.policy.normalization_mapping.items()}
        expected = {"pi05": "QUANTILES", "pi0": "MEAN_STD", "smolvla": "MEAN_STD"}.get(trainer, "IDENTITY")
        assert mapping["ACTION"] == expected


def test_what_does_not_fit_is_said(tmp_path: Path):
    root = write_dataset(tmp_path / "bare", [4], kind="none", stats=False)
    problems = " ".join(export(root, "pi05", tmp_path / "out").problems)
    assert "no camera" in problems and "q01, q99" in problems
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["action"] |= {"shape": [40], "names": [f"a{i}" for i in range(40)]}
    (root / "meta/info.json").write_text(json.dumps(info))
    assert "40 dimensions" in " ".join(export(root, "smolvla", tmp_path / "out").problems)
    assert "40 dimensions" not in " ".join(export(root, "groot", tmp_path / "out").problems)


def test_openpi_gets_the_dataset_s_own_statistics(dataset: Path):
    told = json.loads(norm_stats(open_dataset(dataset)))["norm_stats"]
    assert set(told) == {"state", "actions"}
    assert np.allclose(told["actions"]["q01"], [4.0, 4.1, 4.2]) and np.allclose(
        told["state"]["std"], [3.0, 3.1, 3.2]
    )


def test_cameras_that_move_come_after_those_that_stand(dataset: Path):
    assert in_order(open_dataset(dataset)) == ["observation.images.top", "observation.images.wrist"]


# --- push -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("licence", "free"),
    [("mit", True), ("cc-by-4.0", True), ("cc-by-nc-sa-4.0", True), ("cc-by-nc-nd-4.0", False), ("", False)],
)
def test_a_licence_is_read_before_anything_is_sent(licence: str, free: bool):
    problem, notes = licence_says(licence)
    assert (problem == "") == free
    assert any("commercial" in note for note in notes) == ("nc" in licence and free)


def pushable(tmp_path: Path, licence: str = "mit") -> Path:
    root = write_dataset(tmp_path / "mine", [4, 6])
    (root / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    (root / "dpipe/targets/tokens").mkdir(parents=True)
    (root / "dpipe/targets/tokens/x.bin").write_bytes(b"x")
    (root / ".cache").mkdir()
    (root / ".cache/secret").write_text("s")
    (tmp_path / "elsewhere").write_text("private")
    (root / "meta/link").symlink_to(tmp_path / "elsewhere")
    return root


def test_our_folder_hidden_files_and_links_out_stay_here(tmp_path: Path):
    root = pushable(tmp_path)
    plan = plan_push(root, "me/mine")
    assert "data/chunk-000/file-000.parquet" in plan.files and "README.md" in plan.files
    assert not any(name.startswith(("dpipe", ".")) or name == "meta/link" for name in plan.files)
    assert plan.private and "dpipe/ stays here" in plan.to_text()
    assert "dpipe/targets/tokens/x.bin" in plan_push(root, "me/mine", own=True).files
    assert plan_push(root, "me/mine", own=True).files != plan.files


def test_no_derivatives_is_refused_unless_the_right_is_claimed_by_name(tmp_path: Path):
    root = pushable(tmp_path, "cc-by-nc-nd-4.0")
    with pytest.raises(UsageError, match="no derivatives"):
        plan_push(root, "me/mine", accepted="yes")
    assert plan_push(root, "me/mine", accepted="cc-by-nc-nd-4.0").licence == "cc-by-nc-nd-4.0"
    with pytest.raises(UsageError, match="OWNER/NAME"):
        plan_push(root, "mine")


def test_what_is_sent_is_what_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub that only listens; every call must also fit the installed library's own signature."""
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    from huggingface_hub.utils import filter_repo_objects

    calls: dict[str, dict] = {}
    real = hub.HfApi

    class Listening:
        def __init__(self, endpoint=None):
            calls["hub"] = {"endpoint": endpoint}

        def __getattr__(self, name):
            def call(*args, **kwargs):
                bound = inspect.signature(getattr(real, name)).bind(self, *args, **kwargs)
                calls[name] = {k: v for k, v in bound.arguments.items() if k != "self"}
                return "https://hub.test/datasets/me/mine"

            return call

    monkeypatch.setattr(hub, "HfApi", Listening)
    root = pushable(tmp_path)
    plan = plan_push(root, "me/mine")
    assert push(plan, "http://127.0.0.1:1") == "https://hub.test/datasets/me/mine"
    assert calls["hub"] == {"endpoint": "http://127.0.0.1:1"}
    assert calls["create_repo"]["private"] is True and calls["create_tag"]["tag"] == "v3.0"
    everything = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
    ignored = calls["upload_folder"]["ignore_patterns"]
    assert sorted(filter_repo_objects(everything, ignore_patterns=ignored)) == list(plan.files)


def test_nobody_is_pushed_for_without_a_yes(tmp_path: Path):
    root = pushable(tmp_path)
    words = ["push", str(root), "--repo-id", "me/mine", "--workspace", str(tmp_path)]
    told = CliRunner().invoke(cli, words)
    assert isinstance(told.exception, UsageError) and "--yes" in str(told.exception)
    dry = CliRunner().invoke(cli, [*words, "--dry-run"])
    assert dry.exit_code == 0 and "files would be sent" in dry.output


# --- view, completion, names ----------------------------------------------------------------------------------


def test_a_viewer_that_is_not_there_names_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = write_dataset(tmp_path / "lerobot/mine", [4], kind="none")
    monkeypatch.setattr("dpipe.commands.view.find_spec", lambda name: None)
    told = CliRunner().invoke(cli, ["view", "mine", "0", "--workspace", str(tmp_path)])
    assert isinstance(told.exception, UsageError) and "dpipe picture mine --episode 0" in str(told.exception)
    words = viewer_words(root, 2, tmp_path / "out")
    assert words[words.index("--episode-index") + 1] == "2" and words[words.index("--root") + 1] == str(root)
    missing = CliRunner().invoke(cli, ["view", "mine", "7", "--workspace", str(tmp_path)])
    assert "has episodes 0 to 0" in str(missing.exception)


@pytest.mark.parametrize("shell", sorted(WHERE))
def test_a_shell_gets_its_script(shell: str):
    told = CliRunner().invoke(cli, ["completion", shell])
    assert told.exit_code == 0 and "_DPIPE_COMPLETE" in told.output and WHERE[shell] in told.output


def test_words_are_completed_as_a_shell_would_ask(tmp_path: Path):
    write_dataset(tmp_path / "lerobot/mine", [4], kind="none")
    code = "import sys; sys.argv[0] = 'dpipe'; from dpipe.cli import main; main()"

    def ask(*words: str) -> list[str]:
        line = " ".join(("dpipe", *words))
        environment = {"_DPIPE_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PATH": "/usr/bin:/bin", "DPIPE_WORKSPACE": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [row.split(",")[1] for row in done.stdout.splitlines()]

    assert ask("conv") == ["convert"]
    assert "--where" in ask("select", "mine", "--wh")
    assert ask("push", "mi") == ask("doctor", "mi") == ask("train", "libra", "--dataset", "mi") == ["mine"]
    assert ask("precompute", "fo") == ["foresight"] and ask("train", "li") == ["libra"]


def test_names_are_completed_from_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_dataset(tmp_path / "lerobot/mine", [4], kind="none")
    monkeypatch.setenv("DPIPE_WORKSPACE", str(tmp_path))
    import click

    context = click.Context(click.Command("x"))
    found = complete_dataset(context, click.Argument(["dataset"]), "mi")
    assert [(item.value, item.type) for item in found] == [("mine", "plain")]
    assert complete_dataset(context, click.Argument(["dataset"]), "/tm")[0].type == "file"


def test_a_slip_in_a_dataset_s_name_is_understood(tmp_path: Path):
    write_dataset(tmp_path / "lerobot/libero", [4], kind="none")
    with pytest.raises(UsageError, match="Did you mean 'libero'"):
        Workspace(tmp_path).find_dataset("librero")
