"""LeRobot's processors around an exported policy: names, batch axis and device; nothing is normalised."""

from typing import Any

from lerobot.processor.factory import make_default_pre_post_processors

from .configuration_dpipe import DpipeConfig


def make_dpipe_pre_post_processors(config: DpipeConfig, dataset_stats: Any = None) -> tuple[Any, Any]:
    """(before, after). Every normalisation mode of the config is IDENTITY, so statistics are not used."""
    return make_default_pre_post_processors(config, dataset_stats, normalizer_device=config.device)
