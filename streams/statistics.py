"""Statistics of a column: the dataset's own where they are complete, else exact ones, computed when asked for.

Datasets that others wrote may lack meta/stats.json, or quantiles, or a feature in it; nothing that reads them
should have to care.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.statistics import exact_statistics
from .dataset import Dataset

NEEDED = ("min", "max", "mean", "std", "q01", "q99")


def statistics_of(dataset: Dataset, column: str) -> Mapping[str, Any]:
    """Per-dimension statistics of a numeric column, by name."""
    told = dataset.stats.get(column) or {}
    if all(told.get(name) is not None for name in NEEDED):
        return told

    def blocks() -> Any:
        for part in dataset.parts():
            values: NDArray[Any] = dataset.all_columns([column], part)[column]
            yield values.reshape(len(values), -1).astype(np.float32)

    return exact_statistics(blocks)[0]
