"""Ablations: rows that train alike share a run, what is done is read, and the verdict claims no more than the seeds."""

import json
from pathlib import Path

import pytest
from dpipe.schemas.errors import UsageError

pytest.importorskip("torch")

from dpipe.trainer import compare as compare_module
from dpipe.trainer.compare import (
    ABLATIONS,
    Ablation,
    Cell,
    Comparison,
    Row,
    ablation_named,
    apart,
    compare,
    draw_comparison,
    run_name,
    vary,
)


def cell(label: str, *successes: int, episodes: int = 10) -> Cell:
    return Cell(label, successes, episodes, 4.0)


def comparison(*cells: Cell) -> Comparison:
    rows = tuple(Row(c.label) for c in cells)
    ablation = Ablation("toy", "libra", "what it does", rows, cells[0].label, "the first wins.", "nowhere")
    return Comparison(ablation, cells, 100, (0, 1, 2))


def test_rows_are_told_apart_only_where_their_ranges_leave_a_gap():
    assert apart(cell("a", 5, 6), cell("b", 3, 4))
    assert not apart(cell("a", 4, 6), cell("b", 3, 4))  # 4 of 10 was reached by both
    assert not apart(cell("a", 9), cell("b", 0))  # one seed each says nothing of the spread


def test_the_verdict_names_what_is_beaten_what_beats_and_what_stays_open():
    found = comparison(cell("a", 5, 6, 5), cell("b", 1, 2, 1), cell("c", 9, 8, 9), cell("d", 4, 6, 5))
    assert "a beats b." in found.verdict
    assert "a loses to c: this small scale does not show the claim." in found.verdict
    assert "Between a and d, 3 seeds of 10 episodes do not decide." in found.verdict
    assert found.verdict.startswith("The paper: the first wins.")


def test_the_table_has_mean_and_range_of_each_row_and_its_source():
    table = comparison(cell("a", 5, 6, 7), cell("b", 1, 2, 0)).table()
    assert "| a | 60.0% (50.0% to 70.0%) | 4.0 |  |" in table
    assert "| b | 10.0% (0.0% to 20.0%) | 4.0 |  |" in table
    assert table.endswith("Source of the paper's column: nowhere")


def test_the_picture_has_a_bar_as_long_as_the_mean(tmp_path):
    import numpy as np
    from PIL import Image

    draw_comparison(comparison(cell("a", 10, 10, 10), cell("b", 5, 5, 5)), tmp_path / "bars.png")
    image = np.asarray(Image.open(tmp_path / "bars.png").convert("RGB"))
    blue = (image == (0x00, 0x72, 0xB2)).all(-1).sum(1)
    first, second = (blue[top + 2] for top in (42, 72))  # a line of each bar above its dots
    assert first == pytest.approx(460, abs=2) and second == pytest.approx(230, abs=2)


def test_rows_that_differ_only_at_work_share_their_runs():
    refine = ABLATIONS["libra-refine"]
    names = [run_name(refine, row, 1) for row in refine.rows]
    assert names == ["libra-refine-plan-and-refine-s1"] * 2 + ["libra-refine-no-intent-s1"]


def test_finished_runs_and_judgements_are_read_and_missing_ones_made(tmp_path, monkeypatch):
    import dpipe.trainer.evaluate as evaluate_module
    import dpipe.trainer.run as run_module

    trained, judged = [], []

    def train(recipe, root, run_dir, *, config, options, **_):
        trained.append((config, options["seed"]))
        run_dir.mkdir(parents=True, exist_ok=True)

    class Told:
        def __init__(self, successes: int):
            self.successes, self.latency = successes, {"plan": {"median": 2.0}, "refine": {"median": 3.0}}

    def evaluate(run_dir: Path, *, episodes, options, say):
        judged.append((run_dir.name, dict(options)))
        return Told(4 if options else 6)

    monkeypatch.setattr(run_module, "train", train)
    monkeypatch.setattr(evaluate_module, "evaluate", evaluate)
    two = Ablation(
        "toy", "libra", "?", (Row("with"), Row("without", policy={"refine": False})), "with", "it helps.", "-"
    )
    arguments = {"seeds": (0, 1), "steps": 10, "episodes": 8, "say": lambda text: None}
    found = compare(two, tmp_path / "data", tmp_path / "runs", **arguments)
    assert [c.mean for c in found.cells] == [0.75, 0.5]
    assert found.cells[0].latency_ms == 5.0
    assert len(judged) == 4 and {name for name, _ in judged} == {"toy-with-s0", "toy-with-s1"}
    again = compare(two, tmp_path / "data", tmp_path / "runs", **arguments)
    assert again == found and len(judged) == 4
    assert json.loads(json.dumps(found.to_json()))["rows"][1]["successes"] == [4, 4]


def test_a_grid_of_ones_own_has_every_combination():
    grid = vary("libra", ["bins=5,10", "slices=1,2"])
    assert [row.label for row in grid.rows] == [f"bins {n} slices {m}" for n in (5, 10) for m in (1, 2)]
    assert grid.rows[3].config == {"bins": "10", "slices": "2"}
    with pytest.raises(UsageError, match=r"expected NAME=VALUE,VALUE"):
        vary("libra", ["bins"])


def test_every_ablation_has_rows_its_recipe_understands_and_names_its_best():
    from dpipe.trainer import open_recipe
    from dpipe.trainer.recipe import resolve

    for ablation in ABLATIONS.values():
        config = open_recipe(ablation.recipe).config
        for row in ablation.rows:
            resolve(ablation.recipe, config, row.config)
        assert ablation.best in [row.label for row in ablation.rows]
    with pytest.raises(UsageError, match="libra-bins"):
        ablation_named("libra-bin")


def test_policy_options_of_ablations_exist():
    import inspect

    from dpipe.trainer import open_recipe

    for ablation in compare_module.ABLATIONS.values():
        known = set(inspect.signature(open_recipe(ablation.recipe).policy).parameters)
        for row in ablation.rows:
            assert set(row.policy) <= known, (ablation.name, row.label)
