"""What fuzzing once found is read again, and a few fresh cases of every target."""

from pathlib import Path

import pytest
from fuzzing import CORPUS, TARGETS, changed, run_case, sound_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*")), ids=lambda path: path.name)
def test_a_file_once_found_is_now_a_message(folder: Path, path: Path):
    target = TARGETS[path.name.rpartition("-")[0]]
    assert run_case(target, folder, path.read_bytes()) == ""


@pytest.mark.parametrize("name", TARGETS)
def test_changed_fields_are_a_message_or_harmless(folder: Path, name: str):
    target = TARGETS[name]
    sound = sound_file(target, folder)
    cases = {changed(target, sound, seed=1, number=number) for number in range(12)}
    assert len(cases - {sound}) > 6, "the target does change its file"
    for data in cases:
        assert run_case(target, folder, data) == ""
    assert run_case(target, folder, sound) == ""
