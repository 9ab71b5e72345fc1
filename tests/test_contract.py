"""Contracts: each field that differs is refused by name."""

from dataclasses import fields, replace

import pytest
from dpipe.schemas.contract import FIXED_VIEW, NO_PIXELS, Contract
from dpipe.schemas.errors import DataError

CONTRACT = Contract(
    stage="foresight",
    variant="dct",
    stage_version=1,
    source="a" * 32,
    fps=20,
    params={"pool": 2, "dtype": "float16"},
    model="dct",
    weights="b" * 32,
    layer="merged",
    preprocessing="c" * 32,
    camera="image",
    dtype="float16",
    horizon_frames=16,
    horizon_seconds=0.8,
    normaliser="d" * 32,
    augmentation=FIXED_VIEW,
    seed=7,
)


@pytest.mark.parametrize("name", [entry.name for entry in fields(Contract) if entry.name != "params"])
def test_each_field_that_differs_is_refused_by_its_name(name: str):
    found = getattr(CONTRACT, name)
    CONTRACT.check(**{name: found})
    wrong = f"{found}x" if isinstance(found, str) else found + 1
    with pytest.raises(DataError, match=rf"\b{name}: expected"):
        CONTRACT.check(**{name: wrong})


def test_all_differences_are_listed_together_with_the_remedy():
    with pytest.raises(DataError) as error:
        CONTRACT.check(camera="image2", params={"pool": 4, "dtype": "float16"})
    text = str(error.value)
    assert "camera" in text and "params.pool: expected 4, found 2" in text and "dtype" not in text
    assert "dpipe precompute foresight" in text


def test_a_field_nobody_has_is_our_mistake():
    with pytest.raises(KeyError):
        CONTRACT.check(colour="red")


def test_a_contract_survives_json_and_tuples_equal_lists():
    again = Contract.from_json(CONTRACT.to_json())
    assert again == CONTRACT and again.digest == CONTRACT.digest
    assert (
        replace(CONTRACT, params={"bins": (2, 10)}).digest
        == replace(CONTRACT, params={"bins": [2, 10]}).digest
    )
    replace(CONTRACT, params={"bins": (2, 10)}).check(params={"bins": [2, 10]})
    with pytest.raises(DataError, match="version 2"):
        Contract.from_json({**CONTRACT.to_json(), "version": 2})


def test_a_flip_of_a_cached_view_is_refused_but_not_where_no_pixel_is_held():
    with pytest.raises(DataError, match="'flip'"):
        CONTRACT.check_augmentation("flip")
    CONTRACT.check_augmentation("none")
    replace(CONTRACT, augmentation=NO_PIXELS).check_augmentation("flip")
    views = replace(CONTRACT, augmentation="views:identity,flip")
    views.check_augmentation("flip")
    with pytest.raises(DataError, match="'crop'"):
        views.check_augmentation("crop")
