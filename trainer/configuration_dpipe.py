"""LeRobot's view of an exported policy: its configuration, registered as policy type `dpipe`.

The names of this file and its two neighbours are LeRobot's rule: from the module `configuration_<x>` it finds
`modeling_<x>.<X>Policy` and `processor_<x>`. Importing any of them registers the type, which is what
`--policy.discover_packages_path=dpipe.trainer.modeling_dpipe` does for LeRobot's own commands.
"""

from dataclasses import dataclass, field

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import LRSchedulerConfig


@PreTrainedConfig.register_subclass("dpipe")
@dataclass
class DpipeConfig(PreTrainedConfig):
    """`terms` is JSON: the recipe, its config, the space and the facts of the run that was exported."""

    terms: str = "{}"
    seed: int = 0  # of the noise that flow and diffusion policies start from
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )
    push_to_hub: bool = False  # type: ignore[assignment] # as in the base class

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig()

    def get_scheduler_preset(self) -> LRSchedulerConfig | None:
        return None

    def validate_features(self) -> None:
        """Features come from the run's own space; there is nothing a user could have got wrong."""
