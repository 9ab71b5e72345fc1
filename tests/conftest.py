"""Fixtures every test file shares: where the sample recordings are, and one thread per library."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests already run in parallel
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of real recordings; the test is skipped, saying so, where there is none."""
    folder = Path(os.environ.get("DPIPE_SAMPLE_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no sample recordings at {folder}; set DPIPE_SAMPLE_DATA to their folder")
    return folder
