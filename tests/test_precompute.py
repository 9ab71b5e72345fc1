"""Precompute: parts, resume, appended episodes, refusals. Stages themselves are tested in test_stage_*.py."""

import json
import shutil

import numpy as np
import pytest
from dpipe.pipeline import precompute as module
from dpipe.pipeline import target_parts
from dpipe.pipeline.costs import stage_costs
from dpipe.pipeline.precompute import precompute, read_index
from dpipe.schemas.bins import encode
from dpipe.schemas.errors import DataError, Interrupted, UsageError
from dpipe.schemas.normalisers import Normaliser
from dpipe.streams.arrays import open_array
from tiny_dataset import episode_columns, write_tiny
from trees import tree_digest

EPISODES = [(0, 30), (1, 45), (2, 20), (3, 25)]
QUIET = {"tokens": {"probe": "none"}}


@pytest.fixture(autouse=True)
def _a_target_part_a_data_part(monkeypatch):
    monkeypatch.setattr(target_parts, "POINTWISE_FRAMES", 0)


def run(root, **changes):
    (made,) = precompute(root, ["tokens"], QUIET, **changes)
    return made


def rows_of(folder, position, array="tok_N10"):
    index = read_index(folder)
    place = folder / array / f"part-{index['part'][position]:05d}-{index['key'][position]}"
    start = index["frame_start"][position]
    return open_array(place)[start : start + index["frame_rows"][position]]


def test_each_episode_gets_its_own_tokens_whatever_part_it_lies_in(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES, parts=[2, 1, 1])
    made = run(root)
    assert made.folder == root / "dpipe/targets/tokens/N10-q01q99"
    assert (made.episodes, made.frames, made.computed_episodes) == (4, 120, 4)
    saved = json.loads((made.folder / "prepared.json").read_text())
    normaliser = Normaliser.from_json(saved["facts"]["normaliser"])
    for position, (seed, frames) in enumerate(EPISODES):
        expected = encode(normaliser.normalise(episode_columns(seed, frames)["action"]), 10)
        np.testing.assert_array_equal(rows_of(made.folder, position), expected)


def test_the_same_command_again_does_nothing(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES, parts=[2, 2])
    first = run(root)
    before = tree_digest(first.folder)
    again = run(root)
    assert again.computed_episodes == 0 and again.kept_parts == 2
    assert tree_digest(first.folder) == before


def test_pointwise_work_takes_small_data_parts_together(tmp_path, monkeypatch):
    root = write_tiny(tmp_path / "set", EPISODES, parts=[1, 1, 1, 1])
    each = run(root)
    rows = [np.array(rows_of(each.folder, e)) for e in range(4)]
    shutil.rmtree(each.folder)
    monkeypatch.setattr(target_parts, "POINTWISE_FRAMES", 95)  # the first three have 95 frames
    together = run(root)
    index = read_index(together.folder)
    assert index["part"] == [0, 0, 0, 1] and index["frame_start"] == [0, 30, 75, 0]
    for e in range(4):
        np.testing.assert_array_equal(rows_of(together.folder, e), rows[e])


def test_killed_and_resumed_gives_the_same_bytes(tmp_path, monkeypatch):
    root = write_tiny(tmp_path / "set", EPISODES, parts=[1, 1, 1, 1])
    whole = run(root)
    expected = tree_digest(whole.folder)
    for stop_after in range(4):
        shutil.rmtree(whole.folder)
        with monkeypatch.context() as patch:
            made = []
            make_part = module.make_part

            def dying(job, make_part=make_part, made=made, stop_after=stop_after):
                if len(made) == stop_after:
                    raise KeyboardInterrupt
                made.append(job)
                return make_part(job)

            patch.setattr(module, "make_part", dying)
            with pytest.raises((KeyboardInterrupt, Interrupted)):
                run(root)
        resumed = run(root)
        assert resumed.kept_parts == stop_after
        assert tree_digest(whole.folder) == expected


def test_a_part_cut_off_before_its_receipt_is_made_again(tmp_path, monkeypatch):
    root = write_tiny(tmp_path / "set", EPISODES, parts=[2, 2])
    whole = run(root)
    expected = tree_digest(whole.folder)
    shutil.rmtree(whole.folder)
    with monkeypatch.context() as patch:
        patch.setattr(module, "receipt_path", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(root)
    assert run(root).kept_parts == 0
    assert tree_digest(whole.folder) == expected


def test_workers_do_not_change_a_byte(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES, parts=[1, 2, 1])
    expected = tree_digest(run(root).folder)
    shutil.rmtree(root / "dpipe/targets")
    assert tree_digest(run(root, workers=2).folder) == expected


@pytest.mark.parametrize("parts", [[4, 1], [5]])
def test_adding_one_episode_computes_one_episode(tmp_path, parts):
    root = write_tiny(tmp_path / "set", EPISODES)
    old = run(root)
    kept = [np.array(rows_of(old.folder, e)) for e in range(4)]
    shutil.rmtree(root / "data")
    write_tiny(root, [*EPISODES, (9, 33)], parts=parts)
    new = run(root)
    assert (new.computed_episodes, new.copied_episodes) == (1, 0 if parts == [4, 1] else 4)
    for e in range(4):
        np.testing.assert_array_equal(rows_of(new.folder, e), kept[e])
    assert len(rows_of(new.folder, 4)) == 33
    assert len(list((new.folder / "tok_N10").glob("part-*"))) == len(parts)  # the older form is gone
    settled = json.loads((new.folder / "prepared.json").read_text())
    assert len(settled["fitted_on"]) == 4  # the normaliser is the one the old tokens were made with


def test_episodes_that_move_are_copied_not_computed(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES)
    run(root)
    shutil.rmtree(root / "data")
    write_tiny(root, [EPISODES[2], EPISODES[0]], parts=[1, 1])
    made = run(root)
    assert (made.computed_episodes, made.copied_episodes) == (0, 2)
    assert len(rows_of(made.folder, 0)) == 20 and len(rows_of(made.folder, 1)) == 30


def test_refitting_settles_the_normaliser_anew_and_makes_all_of_it(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES[:2])
    run(root)
    shutil.rmtree(root / "data")
    write_tiny(root, EPISODES)
    made = run(root, refit=True)
    assert (made.computed_episodes, made.copied_episodes) == (4, 0)
    assert len(json.loads((made.folder / "prepared.json").read_text())["fitted_on"]) == 4


def test_a_dataset_of_other_episodes_is_fitted_anew(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES[:2])
    run(root)
    shutil.rmtree(root / "data")
    write_tiny(root, EPISODES[2:])
    made = run(root)
    assert made.computed_episodes == 2
    contract = json.loads((made.folder / "contract.json").read_text())
    assert contract["episodes"] == 2


def test_another_option_under_the_same_name_is_refused_by_its_name(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES)
    run(root)
    with pytest.raises(UsageError, match=r"--residual: false there, true now") as error:
        precompute(root, ["tokens"], {"tokens": {"probe": "none", "residual": True}})
    assert "--name" in str(error.value)
    (made,) = precompute(root, ["tokens"], {"tokens": {"probe": "none", "residual": True}}, name="mine")
    assert made.folder.name == "mine"


def test_a_dataset_that_is_not_ours_needs_a_folder_for_its_targets(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES, ours=False)
    with pytest.raises(UsageError, match="was not written by dpipe"):
        run(root)
    made = run(root, out=tmp_path / "targets" / "set")
    assert made.folder == tmp_path / "targets/set/tokens/N10-q01q99"
    assert not (root / "dpipe").exists()


def test_a_part_that_fails_says_which_and_keeps_the_others(tmp_path, monkeypatch):
    root = write_tiny(tmp_path / "set", EPISODES, parts=[2, 2])
    make_part = module.make_part

    def failing(job):
        if job.part == 1:
            raise DataError("episode 2: its rows are damaged")
        return make_part(job)

    with monkeypatch.context() as patch:
        patch.setattr(module, "make_part", failing)
        with pytest.raises(
            DataError, match=r"part 1 \(episodes 2 to 3\).*\n  episode 2: its rows are damaged"
        ):
            run(root)
    assert run(root).kept_parts == 1


def test_unknown_options_and_stages_are_named(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES)
    with pytest.raises(UsageError, match="Did you mean 'tokens'"):
        precompute(root, ["token"])
    with pytest.raises(UsageError, match="Did you mean 'bins'"):
        precompute(root, ["tokens"], {"tokens": {"bin": 10}})
    with pytest.raises(UsageError, match=r"--bins takes a value of type int, not 'ten'"):
        precompute(root, ["tokens"], {"tokens": {"bins": "ten"}})


def test_options_may_be_words_of_a_command_line(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES)
    words = {"bins": "2,10 50", "residual": "true", "probe": "none"}
    (made,) = precompute(root, ["tokens"], {"tokens": words})
    assert made.variant == "N2-10-50-q01q99"
    assert sorted(p.name for p in made.folder.iterdir() if (p / "zarr.json").exists()) == sorted(
        ["valid", *(f"{kind}_N{n}" for n in (2, 10, 50) for kind in ("tok", "resid"))]
    )


def test_zarrs_own_reader_opens_the_whole_target(tmp_path):
    zarr = pytest.importorskip("zarr")
    root = write_tiny(tmp_path / "set", EPISODES, parts=[2, 2])
    made = run(root)
    group = zarr.open_group(made.folder, mode="r")
    part = sorted((made.folder / "tok_N10").glob("part-*"))[1].name
    np.testing.assert_array_equal(group[f"tok_N10/{part}"][20:], rows_of(made.folder, 3))


def test_every_stage_says_what_it_would_cost_and_what_it_needs(tmp_path):
    root = write_tiny(tmp_path / "set", [(seed, 40) for seed in range(20)], camera=True)
    run(root)
    costs = {cost.stage: cost for cost in stage_costs(root)}
    assert costs["tokens"].bytes == 800 * (4 + 1) and costs["tokens"].made == ("N10-q01q99",)
    assert costs["tokens"].recipes == ("libra",)
    assert costs["foresight"].bytes == 800 * 64 * 32 * 2 and costs["foresight"].seconds > 0
    assert costs["fast"].bytes > 800 * (8 + 4 + 16)
    assert "dpipe train teacher" in costs["teacher"].needs and costs["teacher"].bytes == 0
    assert sorted(p.name for p in (root / "dpipe/targets").iterdir()) == ["tokens"]  # nothing was kept
