"""The table of docs/doctor.md is that of the defects there are."""

import re
from collections import Counter
from pathlib import Path

import pytest
from defects import DEFECTS

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def kind_of():
    """The bench's grouping, read without running it: it imports lerobot's helpers only when it measures."""
    import sys

    sys.path.insert(0, str(REPOSITORY / "bench"))
    try:
        from doctor_defects import KINDS, kind_of
    finally:
        sys.path.remove(str(REPOSITORY / "bench"))
    assert not [
        p for text in KINDS.values() for p in text.split() if sum(p in t.split() for t in KINDS.values()) > 1
    ]
    return kind_of


def test_the_page_counts_the_defects_there_are(kind_of):
    page = (REPOSITORY / "docs/doctor.md").read_text()
    rows = re.findall(r"^\| \**([^|*`]+?)\** \| (\d+) of (\d+) \|", page, re.M)
    told = {name: (int(found), int(total)) for name, found, total in rows}
    counts = Counter(kind_of(one.base, one.problem) for one in DEFECTS)
    assert told == {**{kind: (n, n) for kind, n in counts.items()}, "all": (len(DEFECTS), len(DEFECTS))}
