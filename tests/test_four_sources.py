"""The three commands as typed, for each raw format alone and for all four together: small, but the whole way."""

# ruff: noqa: E402 - what needs torch is imported once torch is known to be there
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dpipe.cli import cli
from dpipe.pipeline.groups import group_datasets
from dpipe.samples import write_sample
from dpipe.schemas.errors import UsageError
from dpipe.schemas.unified import DIM, NAMES, SLOTS
from dpipe.streams.dataset import open_dataset
from dpipe.trainer.loop import load_checkpoint
from dpipe.trainer.mixed import at_rate, merge_facts, mixing_problem, scale
from dpipe.trainer.run import open_run

SMALL: dict[str, dict] = {
    "libero": {"image_size": 32},
    "calvin": {"validation_every": 0},
    "egodex": {"enlarged": 1, "test_every": 0},
    "agibot": {},
}
DATASETS = {"libero": "libero", "calvin": "calvin", "egodex": "egodex", "agibot": "agibot-gripper"}
TINY = ["--width", "32", "--heads", "2", "--batch-size", "8", "--log-every", "1"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for source, options in SMALL.items():
        write_sample(source, folder / source, episodes=1, seed=0, **options)
    return folder


def dpipe(space: Path, *words: str) -> None:
    """A command as typed, in this process."""
    extra = ["--workspace", str(space)]
    extra += ["--workers", "0"] if words[0] in ("convert", "train", "precompute") else []
    # A converter is chosen before its options are read, so those come last.
    cli.main([*words, *extra], standalone_mode=False)


def losses(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("source", SMALL)
def test_a_workspace_of_one_source_alone_gives_a_trained_run(raw: Path, tmp_path: Path, source: str):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / source).symlink_to(raw / source)
    dpipe(tmp_path, "convert", source, "--to", "lerobot")
    dpipe(tmp_path, "precompute", "foresight")
    dpipe(tmp_path, "train", "libra", "--steps", "5", *TINY)
    run = tmp_path / "runs" / "libra" / DATASETS[source]
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 5 and result["recipe"] == "libra"
    assert [row["step"] for row in losses(run)] == [1, 2, 3, 4, 5]
    assert all(
        np.isfinite(value) for row in losses(run) for value in row.values() if isinstance(value, float)
    )
    space = json.loads((run / "config.json").read_text())["terms"]["space"]
    cameras = {"libero": 2, "calvin": 2, "egodex": 1, "agibot": 3}
    assert len(space["cameras"]) == cameras[source]
    grippers = [name for name in space["action_names"] if "gripper" in name]
    assert len(grippers) == {"libero": 1, "calvin": 1, "egodex": 0, "agibot": 2}[source]


@pytest.fixture(scope="module")
def four(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of all four sources, nothing converted."""
    space = tmp_path_factory.mktemp("four")
    (space / "raw").symlink_to(raw)
    return space


def test_libra_stops_before_any_work_and_lists_groups_frames_and_commands(four: Path):
    # First in this file to use `four`: what stops must not have converted anything.
    before = sorted(path.name for path in four.iterdir())
    with pytest.raises(UsageError) as refused:
        dpipe(four, "train", "libra")
    told = str(refused.value)
    assert refused.value.exit_code == 2
    for name in DATASETS.values():
        assert f"dpipe train libra --dataset {name}" in told
    assert told.count(" frames, not converted yet") == 4 and "dpipe train dial" in told
    assert sorted(path.name for path in four.iterdir()) == before


@pytest.fixture(scope="module")
def mixed(four: Path) -> Path:
    dpipe(four, "train", "dial", "--steps", "6", "--horizon", "8", "--checkpoint-every", "2", *TINY)
    return four / "runs" / "dial" / "mixed"


def test_dial_builds_and_mixes_all_four_through_the_unified_vector_and_learns(mixed: Path, four: Path):
    terms = json.loads((mixed / "config.json").read_text())["terms"]
    assert terms["mix"] == "unified"
    assert {each["name"] for each in terms["datasets"]} == set(DATASETS.values())
    assert json.loads((mixed / "result.json").read_text())["steps"] == 6
    masks = {each["name"]: np.array(each["action_mask"]) for each in terms["members"]}
    gripper, tips = SLOTS["right_gripper_open"], SLOTS["left_fingertips"]
    assert [bool(masks[name][gripper].all()) for name in ("libero", "calvin", "agibot-gripper")] == [True] * 3
    assert not masks["egodex"][gripper].any() and masks["egodex"][tips].all()
    assert not masks["libero"][tips].any()
    space = terms["space"]
    assert space["fps"] == 20  # LIBERO's; the others run at 30
    assert space["cameras"] == [f"observation.images.{role}" for role in ("main", "wrist", "wrist_left")]
    assert np.array_equal(space["dims"], np.logical_or.reduce(list(masks.values())))
    # Twelve targets were looked up: each dataset's frames 8 steps of 1/20 s ahead.
    assert set(terms["targets"]) == {f"{name}/foresight" for name in DATASETS.values()}
    weights = load_checkpoint(mixed / "checkpoints")
    assert weights is not None
    trained, fresh = open_run(mixed), _untrained(mixed)
    moved = [
        not torch.equal(a, b) for a, b in zip(trained.model.parameters(), fresh.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2
    assert all(np.isfinite(row["loss"]) for row in losses(mixed))


def _untrained(run: Path):
    """The run's model as it was before its first step."""
    terms = json.loads((run / "config.json").read_text())["terms"]
    from dpipe.trainer import open_recipe
    from dpipe.trainer.recipe import resolve
    from dpipe.trainer.space import Space

    torch.manual_seed(terms["options"]["seed"])
    recipe = open_recipe("dial")
    config = resolve("dial", recipe.config, terms["config"])
    return recipe.build(config, Space.from_json(terms["space"]), terms["facts"])


def test_the_same_command_again_changes_nothing_and_libra_still_stops(mixed: Path, four: Path):
    before = {path: path.stat().st_mtime_ns for path in mixed.rglob("*") if path.is_file()}
    dpipe(four, "train", "dial", "--steps", "6", "--horizon", "8", "--checkpoint-every", "2", *TINY)
    assert before == {path: path.stat().st_mtime_ns for path in mixed.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="learns one embodiment at a time; the workspace holds 4") as refused:
        dpipe(four, "train", "libra")
    assert "not converted yet" not in str(refused.value)


def test_a_mixed_run_stopped_and_started_again_ends_with_the_same_weights(
    mixed: Path, four: Path, tmp_path: Path
):
    from dpipe.schemas.errors import Interrupted
    from dpipe.trainer.mixed import train_mixed

    settings = {
        "steps": 6,
        "config": {"width": 32, "heads": 2, "horizon": 8},
        "options": {"batch_size": 8, "log_every": 1, "checkpoint_every": 2},
        "say": lambda line: None,
    }
    roots = [four / "lerobot" / name for name in sorted(DATASETS.values())]
    with pytest.raises(Interrupted):
        train_mixed("dial", roots, tmp_path / "run", stop_after=3, **settings)
    train_mixed("dial", roots, tmp_path / "run", **settings)
    ours, theirs = (dict(open_run(run).model.state_dict()) for run in (mixed, tmp_path / "run"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("recipe", ["libra", "vita", "anchorrefine", "pfd", "teacher", "anchor", "flow"])
def test_recipes_that_cannot_mix_say_why(four: Path, recipe: str):
    assert mixing_problem(recipe)
    with pytest.raises(UsageError, match="cannot learn from unified vectors: its "):
        dpipe(four, "train", recipe, "--mix", "unified")


def test_datasets_may_be_named_and_one_embodiment_is_trained_alone(mixed: Path, four: Path):
    dpipe(
        four, "train", "dial", "--steps", "2", "--horizon", "8", "--dataset", "egodex", "--name", "one", *TINY
    )
    terms = json.loads((four / "runs/dial/one/config.json").read_text())["terms"]
    assert "mix" not in terms and terms["space"]["fps"] == 30
    words = [word for name in ("egodex", "calvin") for word in ("--dataset", name)]
    dpipe(four, "train", "dial", "--steps", "2", "--horizon", "8", "--name", "two", *words, *TINY)
    terms = json.loads((four / "runs/dial/two/config.json").read_text())["terms"]
    assert [each["name"] for each in terms["members"]] == ["egodex", "calvin"]
    assert terms["space"]["fps"] == 30


def test_weights_are_taken_from_dpipe_toml_and_must_name_what_is_there(
    mixed: Path, four: Path, tmp_path: Path
):
    space = tmp_path / "space"
    space.mkdir()
    (space / "lerobot").symlink_to(four / "lerobot")
    (space / "dpipe.toml").write_text(
        '[train.dial]\ndatasets = ["egodex", "libero"]\nweights = {egodex = 3, libero = 1}\n'
    )
    dpipe(space, "train", "dial", "--steps", "2", "--horizon", "8", *TINY)
    terms = json.loads((space / "runs/dial/mixed/config.json").read_text())["terms"]
    assert {each["name"]: each["weight"] for each in terms["datasets"]} == {"egodex": 3.0, "libero": 1.0}
    (space / "dpipe.toml").write_text(
        '[train.dial]\ndatasets = ["egodex", "libero"]\nweights = {egodx = 3}\n'
    )
    with pytest.raises(UsageError, match="weights name egodx"):
        dpipe(space, "train", "dial", "--name", "other", *TINY)


def test_each_dataset_is_scaled_by_its_own_statistics_and_grippers_by_the_same_ends(mixed: Path, four: Path):
    found = {name: scale(open_dataset(four / "lerobot" / name), "train") for name in DATASETS.values()}
    for name, member in found.items():
        mask = np.array(member.action_mask)
        for d, kind in enumerate(member.action.kinds):
            if not mask[d] or "rot6d" in NAMES[d]:
                assert kind == "raw", (name, NAMES[d])
            elif "gripper" in NAMES[d]:
                assert kind == "bounds" and (member.action.low[d], member.action.high[d]) == (0.0, 1.0)
            else:
                assert kind == "scaled"
    x = SLOTS["right_ee_pos"].start
    assert len({member.action.low[x] for member in found.values()}) == 4
    half_open = np.zeros(DIM)
    half_open[SLOTS["right_gripper_open"]] = 0.5
    for name in ("libero", "calvin", "agibot-gripper"):
        assert found[name].action.normalise(half_open)[SLOTS["right_gripper_open"]] == 0


def test_steps_ahead_are_looked_up_in_each_datasets_own_frames():
    assert at_rate("foresight:at=0|16", 30, 20) == "foresight:at=0|24"
    assert at_rate("foresight:at=0|16,cam=top", 20, 20) == "foresight:cam=top,at=0|16"


def test_scales_of_several_caches_are_those_of_all_their_frames(mixed: Path, four: Path):
    rng = np.random.default_rng(0)
    parts = [rng.normal(1, 2, 300), rng.normal(5, 1, 700)]
    facts = [{"tokens": 1, "channels": 1, "mean": [p.mean()], "std": [p.std()], "arrays": {}} for p in parts]
    datasets = [open_dataset(four / "lerobot" / name) for name in ("libero", "calvin")]
    merged = merge_facts(facts, [300, 700], datasets)
    whole = np.concatenate(parts)
    assert merged["mean"] == pytest.approx([whole.mean()]) and merged["std"] == pytest.approx([whole.std()])
    with pytest.raises(UsageError, match="have 2 tokens"):
        merge_facts([facts[0], {**facts[1], "tokens": 2}], [300, 700], datasets)
    with pytest.raises(UsageError, match="--pca"):
        merge_facts([facts[0], {**facts[1], "arrays": {"basis": [[1.0]]}}], [300, 700], datasets)


def test_datasets_of_one_embodiment_and_convention_are_one_group(mixed: Path, four: Path, tmp_path: Path):
    copy = tmp_path / "again"
    shutil.copytree(four / "lerobot" / "egodex", copy)
    groups = group_datasets([four / "lerobot" / "egodex", copy])
    assert len(groups) == 1 and len(groups[0].datasets) == 2
    manifest = json.loads((copy / "dpipe/manifest.json").read_text())
    manifest["conventions"]["frame"] = "camera"
    (copy / "dpipe/manifest.json").write_text(json.dumps(manifest))
    assert len(group_datasets([four / "lerobot" / "egodex", copy])) == 2
