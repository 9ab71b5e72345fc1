"""The papers' sizes, built without storage: counts that were published, a table, memory by its formula."""

# ruff: noqa: E402 - what needs torch is imported once torch is known to be there
import json
import sys

import pytest
from dpipe.schemas.errors import UsageError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dpipe import cli
from dpipe.models.architectures import ARCHITECTURES
from dpipe.models.backbones import blueprint
from dpipe.models.hf import HfTower
from dpipe.models.vlm import Vlm
from dpipe.trainer import RECIPES, open_recipe
from dpipe.trainer.presets import PAPER, preset_of
from dpipe.trainer.recipe import resolve
from dpipe.trainer.sizes import size_up

PLAIN = {"width": 128, "points": 8, "eyes": "two", "waypoint": 0}  # a Libra whose tokens are counted by hand


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_papers_backbones_have_their_published_sizes():
    """As the checkpoints' own indices count them: 3,754,622,976 and 2,205,754,368 (with its language head)."""
    with blueprint():
        assert parameters(Vlm("hf:Qwen/Qwen2.5-VL-3B-Instruct")) == 3_754_622_976
        intern = Vlm("hf:OpenGVLab/InternVL2_5-2B")
        head = intern.config.text_config.vocab_size * intern.width
        assert parameters(intern) + head == 2_205_754_368
        siglip = HfTower.blueprint(ARCHITECTURES["google/siglip-so400m-patch14-384"])
        assert parameters(siglip.modules["visual"]) == 428_225_600


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("preset", ["", "paper"])
def test_every_recipe_can_be_sized_up_without_data(recipe, preset):
    sizes = size_up(recipe, preset=preset)
    assert sizes.parameters > 0 and sizes.tokens_per_step > 0
    made = open_recipe(recipe)
    phases = made.phases(resolve(recipe, made.config, preset_of(recipe, preset).config), 10)
    assert all(set(m.trainable) == {phase.name for phase in phases} for m in sizes.modules)
    assert any(count for m in sizes.modules for count in m.trainable.values())
    assert f"{sizes.parameters:,}" in sizes.table and f"{sizes.tokens_per_step:,}" in sizes.table
    json.dumps(sizes.to_json())


def test_sizes_are_those_of_the_model_that_trains():
    """The tiny Libra, built for good: the same parameters; its tokens counted by hand."""
    from dpipe.trainer.presets import libero_space

    recipe = open_recipe("libra")
    built = recipe.build(recipe.config(**PLAIN), libero_space(), {})
    sizes = size_up("libra", PLAIN)
    assert sizes.parameters == parameters(built)
    # Two cameras of 8 points, the state, the words; 10 queries to plan; 4 draws of 5 noisy steps to refine.
    assert {stack.name: stack.tokens for stack in sizes.stacks} == {
        "planner.blocks": 2 * 8 + 2 + 10,
        "refiner.blocks": 4 * 5,
    }
    assert sizes.tokens_per_step == 64 * (28 + 20)


def test_memory_follows_its_formula_with_and_without_frozen_parts_averages_and_recomputing():
    plain = size_up("libra", PLAIN, {"ema": 0.0})
    count = plain.parameters
    assert plain.memory["weights"] == plain.memory["gradients"] == 4 * count
    assert plain.memory["optimiser"] == 8 * count
    # 34 bytes x 64 samples x tokens x width 128 x 2 layers, for each of the two.
    assert plain.memory["activations"] == 34 * 64 * 128 * 2 * (28 + 20)
    full = size_up("libra", PLAIN, {"precision": "float32", "ema": 0.99, "accumulate": 2})
    assert full.memory["activations"] == plain.memory["activations"]  # half the samples, twice the bytes
    assert full.memory["average"] == 4 * count
    again = size_up("libra", PLAIN, {"recompute": True, "ema": 0.0})
    assert again.memory["activations"] == 64 * 128 * (2 * 2 * (28 + 20) + 34 * 28)
    paper = size_up("libra", preset="paper")
    rows = {m.name: m for m in paper.modules}
    assert rows["planner.encoder.vlm.vision_tower"].trainable == {"train": 0}
    frozen = sum(m.parameters - m.trainable["train"] for m in paper.modules)
    assert frozen == 304_012_288 + 428_225_600
    assert paper.memory["gradients"] == 4 * (paper.parameters - frozen)


def test_what_is_given_goes_before_the_preset_and_unknown_ones_are_named():
    assert size_up("libra", {"width": 512}, {"batch_size": 8}, 7, "paper").steps == 7
    assert size_up("libra", {"width": 512}, preset="paper").stacks[0].width == 512
    assert set(PAPER) == set(RECIPES)
    with pytest.raises(UsageError, match=r"unknown preset 'papers'.*Did you mean 'paper'"):
        preset_of("libra", "papers")


def test_the_command_prints_the_table_where_there_is_no_data(tmp_path, monkeypatch, capsys):
    words = ["dpipe", "train", "dial", "--preset", "paper", "--dry-run", "--workspace", str(tmp_path)]
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        assert left.value.code in (0, None), err
        if more:
            assert json.loads(out)["sizes"]["parameters"] > 4e9
        else:
            assert "foresee.vlm.language_model" in out and "tokens per step" in out
    assert not list(tmp_path.iterdir())
