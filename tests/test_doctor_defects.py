"""Every single defect is found under its own name, and nothing sound is complained about."""

from pathlib import Path

import pytest
from defects import DEFECTS, FAST, FULL, SAMPLED, SOUND, Defect, broken, keep_sound_things_in, sound
from dpipe.pipeline.doctor import examine


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The sound things, each built once by the process that first asks for it."""
    keep_sound_things_in(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("name", SOUND)
def test_what_is_sound_is_called_sound(name: str):
    for level in (FAST, SAMPLED, FULL):
        report = examine(sound(name), level)
        told = [
            f"{f.severity} {f.problem} {f.where}: {f.what}" for f in report.findings if f.severity != "note"
        ]
        assert told == [], level
        assert report.episodes > 0


@pytest.mark.parametrize("one", DEFECTS, ids=lambda one: f"{one.base}: {one.name}".replace(" ", "-"))
def test_a_single_defect_is_found_by_its_name(one: Defect, tmp_path: Path):
    report = examine(broken(one, tmp_path), one.level)
    told = [f"{f.problem} at {f.where}: {f.what}" for f in report.findings]
    assert one.problem in report.problems, told
    assert report.problems <= {one.problem} | one.also, told


def test_there_are_enough_of_them_and_each_problem_is_seeded():
    assert len(DEFECTS) >= 60
    assert len({one.name for one in DEFECTS}) == len(DEFECTS)
