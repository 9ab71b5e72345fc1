"""Fixtures every test file shares: where the sample recordings are, and one thread per library."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from dpipe.video.encode import kept_schedule

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests already run in parallel
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def schedule_kept() -> Iterator[None]:
    """Tests that encode AV1 with lerobot or PyAV directly leave the process real-time where they run as root."""
    with kept_schedule():
        yield


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of real recordings; the test is skipped, saying so, where there is none."""
    folder = Path(os.environ.get("DPIPE_SAMPLE_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no sample recordings at {folder}; set DPIPE_SAMPLE_DATA to their folder")
    return folder
