"""Cross-fitting: which of K models has not seen an episode, from the episode's content alone."""

from collections.abc import Sequence


def fold_of(content: str, folds: int) -> int:
    """0 .. folds - 1, from a content digest (hex): the same in every dataset that holds the episode.

    Model k is trained on the episodes whose fold is not k, and is asked about those whose fold is k.
    """
    if folds < 1:
        raise ValueError(f"at least one fold, not {folds}")
    return int(content[:12], 16) % folds


def seen_in_training(contents: Sequence[str], fold: int, folds: int) -> list[bool]:
    """Which episodes model `fold` of `folds` is trained on; all of them where there is one model."""
    return [folds == 1 or fold_of(content, folds) != fold for content in contents]
