"""An exported policy behind LeRobot's interface: `select_action(batch)`, `predict_action_chunk(batch)`, `reset()`.

    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    import dpipe.trainer.modeling_dpipe                      # registers the type
    policy = get_policy_class("dpipe").from_pretrained("exported")
    before, after = make_pre_post_processors(policy.config, pretrained_path="exported")
    action = after(policy.select_action(before(observation)))

The batch holds what LeRobot's preprocessor makes of an observation: every camera [B, 3, H, W] float in [0, 1],
`observation.state` [B, D], `task` a list of B instructions, under the dataset's own feature names. Frames are
fitted to the policy's size as they were in training, and states and actions are native: the policy scales both
itself, so that LeRobot's normalisers have nothing to do. It acts as it does in `dpipe evaluate`, Libra's intent
buffer and DIAL's foresight included.
"""

import json
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from ..schemas.errors import UsageError
from ..streams.rows import Fit
from .configuration_dpipe import DpipeConfig
from .recipe import resolve
from .space import STATE, Space


class DpipePolicy(PreTrainedPolicy):
    """The recipe's model, rebuilt from the config's terms, and its policy."""

    config_class = DpipeConfig  # type: ignore[assignment] # declared None in the base class
    name = "dpipe"  # type: ignore[assignment]

    def __init__(self, config: DpipeConfig, **_: Any) -> None:
        from . import open_recipe

        super().__init__(config)
        terms = json.loads(config.terms)
        recipe = open_recipe(terms["recipe"])
        settings = resolve(terms["recipe"], recipe.config, terms["config"])
        space = Space.from_json(terms["space"])
        self.model = recipe.build(settings, space, terms["facts"])
        if hasattr(self.model, "restore"):
            self.model.restore(terms["progress"])
        spec = recipe.spec(settings, space, terms["facts"])
        self._space, self._fit = space, Fit(spec.size, spec.fit)
        # Not a submodule's attribute: the policy holds the model, and the model must be registered once.
        self._make = lambda: recipe.policy(self.model, config.seed)
        self._policy: Any = None

    def reset(self) -> None:
        """An episode begins: plans and actions left over are forgotten; noise goes on as in a rollout."""
        self._acting().reset()

    def _acting(self) -> Any:
        if self._policy is None:
            self._policy = self._make()
        return self._policy

    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:  # type: ignore[override]
        """Native actions [B, A] of the next step."""
        with torch.no_grad():
            return torch.from_numpy(self._acting().act(*self._observation(batch))).float()

    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:  # type: ignore[override]
        """The actions that would be executed before the policy looks again, [B, n, A], made from this moment."""
        policy = self._acting()
        policy.actions.clear()
        with torch.no_grad():
            first = policy.act(*self._observation(batch))
        steps = [first, *policy.actions]
        policy.actions.clear()
        return torch.from_numpy(np.stack(steps, axis=1)).float()

    def _observation(self, batch: dict[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
        state = batch[STATE]
        missing = [name for name in self._space.cameras if name not in batch]
        if missing:
            raise UsageError(
                f"the policy looks through {', '.join(self._space.cameras)}; not there: {missing}"
            )
        texts = batch.get("task") or [""] * len(state)
        return (
            {name: self._frames(batch[name]) for name in self._space.cameras},
            state.float().cpu().numpy(),
            [texts] * len(state) if isinstance(texts, str) else list(texts),
        )

    def _frames(self, pixels: Tensor) -> np.ndarray:
        """[B, 3, H, W] in [0, 1] -> uint8 [B, h, w, 3] of the policy's size."""
        frames = (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        size = self._fit.size or frames.shape[1:3]
        out = np.empty((len(frames), *size, 3), np.uint8)
        for frame, fitted in zip(frames, out, strict=True):
            self._fit.apply(np.ascontiguousarray(frame), fitted)
        return out

    def get_optim_params(self) -> Any:
        return self.parameters()

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict | None]:
        raise UsageError("an exported policy acts; it is trained by  dpipe train, from its targets")
