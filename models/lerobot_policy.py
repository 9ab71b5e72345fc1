"""LeRobot policies as anchors and teachers: their normalised chunks, and hidden states by a forward pre-hook.

Where the hidden states of the action tokens enter the last layer (checked against lerobot 0.6.1):

    act               model.action_head                    one pass, LayerNormed: the only clean VITA teacher
    smolvla, pi0      model.action_out_proj                after state and time were fused, once per denoise step
    xvla              model.transformer.action_decoder     post-norm, clean action at every step
    groot             action_head.action_decoder

An iterative policy runs its layer once per denoise step: the last step's input is taken, at noise fixed by the
seed, so its hidden state is a function of that noise. ACT uses its zero latent in eval mode. A diffusion policy
has no token state and can be an anchor only.

`predict_action_chunk` returns the normalised chunk; its normaliser is read from the checkpoint's own
postprocessor. Weights are loaded strictly: lerobot's default would leave a missing tensor at random.
"""

import contextlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..schemas.errors import DataError, UsageError, unknown_name
from ..schemas.normalisers import Normaliser, make_normaliser
from .action_decoder import ActionDecoder, save_decoder

if TYPE_CHECKING:
    import torch

HOOKS = {
    "act": "model.action_head",
    "smolvla": "model.action_out_proj",
    "pi0": "model.action_out_proj",
    "xvla": "model.transformer.action_decoder",
    "groot": "action_head.action_decoder",
}
DETERMINISTIC = {"act"}
_NOT_LOADED = re.compile("could not load|missing keys|unexpected keys|could not remap", re.IGNORECASE)
# lerobot's names of normalisation modes -> ours
MODES = {
    "MEAN_STD": "lerobot_meanstd",
    "MIN_MAX": "lerobot_minmax",
    "QUANTILES": "lerobot_quantiles",
    "IDENTITY": "identity",
}


class LeRobotPolicy:
    """A LeRobot checkpoint, frozen, fed with uint8 frames and native states."""

    def __init__(self, source: str, device: str = "cpu") -> None:
        try:
            from lerobot.configs.policies import PreTrainedConfig
            from lerobot.policies.factory import get_policy_class, make_pre_post_processors
        except ImportError as error:
            raise UsageError(
                f"lerobot: policies need lerobot, which is not installed ({error.name})\n"
                '  Install it:  pip install "dpipe[lerobot]"'
            ) from None
        self.source, self.device = source, device
        config = PreTrainedConfig.from_pretrained(source)
        config.device = device
        self.type: str = config.type
        said, problem = io.StringIO(), ""
        try:
            with contextlib.redirect_stdout(said):
                self.policy = get_policy_class(self.type).from_pretrained(source, config=config, strict=True)
            # pi0 and its relatives print what went wrong and go on with random weights.
            problem = next((line for line in said.getvalue().splitlines() if _NOT_LOADED.search(line)), "")
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
        if problem:
            raise DataError(f"lerobot:{source}: its weights do not fit its config\n  {problem.strip()}")
        if getattr(config, "use_relative_actions", False):
            raise UsageError(
                f"lerobot:{source} acts relative to the state, which residuals and states are not measured in\n"
                "  Use a policy trained on the dataset's own actions (use_relative_actions false)."
            )
        self.policy.requires_grad_(False)
        overrides = {"device_processor": {"device": device}}
        self.before, self.after = make_pre_post_processors(
            config, pretrained_path=source, preprocessor_overrides=overrides
        )
        self.cameras = tuple(config.image_features)
        self.state_key = "observation.state"
        self.chunk = int(getattr(config, "chunk_size", None) or getattr(config, "n_action_steps", 1))
        self.window = int(config.n_obs_steps)
        self.action_dim = int((config.output_features or {})["action"].shape[0])
        self.grippers: tuple[int, ...] = ()  # lerobot regresses grippers as it does the rest
        self.frame_size: tuple[int, int] | None = None  # its own preprocessor resizes
        self.action = self._normaliser(config)

    @property
    def stochastic(self) -> bool:
        return self.type not in DETERMINISTIC

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps(self.describe(), sort_keys=True).encode())

    def describe(self) -> dict[str, Any]:
        return {
            "policy": "lerobot",
            "type": self.type,
            "weights": self._weights(),
            "action_normaliser": self.action.digest,
            "cameras": list(self.cameras),
            "augmentation": "off",
            "stochastic": self.stochastic,
        }

    def _weights(self) -> str:
        hasher = xxhash.xxh3_128()
        for name, value in sorted(self.policy.state_dict().items()):
            hasher.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            hasher.update(value.detach().cpu().contiguous().view(-1).numpy().tobytes())
        return hasher.hexdigest()

    def _normaliser(self, config: Any) -> Normaliser:
        mapping = {
            str(kind): getattr(mode, "value", mode) for kind, mode in config.normalization_mapping.items()
        }
        mode = MODES.get(mapping.get("ACTION", "IDENTITY"))
        if mode is None:
            raise unknown_name("normalisation of a LeRobot policy's action", mapping["ACTION"], MODES)
        found: Any = (getattr(step, "stats", None) for step in self.after.steps)
        stats = next((stats for stats in found if stats), {})
        table = {
            name: np.asarray(value, dtype=np.float64).ravel()
            for name, value in stats.get("action", {}).items()
        }
        if mode == "identity":
            table = {"mean": np.zeros(self.action_dim)}
        elif not table:
            raise DataError(
                f"lerobot:{self.source}: its postprocessor holds no statistics of 'action', so nobody can say "
                "what its chunks mean\n  Save it with make_pre_post_processors(config, dataset_stats=...)."
            )
        kinds = ["scaled"] * self.action_dim
        return make_normaliser(mode, table, kinds=kinds, source=f"lerobot:{self.type}")

    def _batch(
        self, images: Mapping[str, NDArray[np.uint8]], state: NDArray[Any], texts: Sequence[str]
    ) -> dict[str, Any]:
        """What the policy's own preprocessor makes of one moment: float frames in [0, 1], channels first."""
        import torch

        missing = [name for name in self.cameras if name not in images]
        if missing:
            raise DataError(
                f"lerobot:{self.source} looks through {', '.join(self.cameras)}; not there: {', '.join(missing)}"
            )
        batch: dict[str, Any] = {self.state_key: torch.from_numpy(np.asarray(state, dtype=np.float32))}
        for name in self.cameras:
            frames = torch.from_numpy(np.ascontiguousarray(images[name]))
            if frames.ndim != (4 if self.window == 1 else 5):
                raise UsageError(f"lerobot:{self.source} looks at {self.window} frames at once")
            batch[name] = frames.movedim(-1, -3).float() / 255
        batch["task"] = list(texts)
        return self.before(batch)

    def _chunks(
        self,
        images: Mapping[str, NDArray[np.uint8]],
        state: NDArray[Any],
        texts: Sequence[str],
        seeds: NDArray[np.int64],
    ) -> "torch.Tensor":
        """Normalised chunks [B, K, A]. A stochastic policy runs sample by sample, each from its own seed."""
        import torch

        with torch.inference_mode():
            if not self.stochastic:
                return self.policy.predict_action_chunk(self._batch(images, state, texts)).float().cpu()
            chunks = []
            for i, seed in enumerate(np.asarray(seeds).tolist()):
                one = {name: images[name][i : i + 1] for name in self.cameras}
                batch = self._batch(one, np.asarray(state)[i : i + 1], texts[i : i + 1])
                with torch.random.fork_rng():
                    torch.manual_seed(seed)
                    chunks.append(self.policy.predict_action_chunk(batch).float().cpu())
            return torch.cat(chunks)


class LeRobotAnchor(LeRobotPolicy):
    """`AnchorPolicy`. Grippers are part of the arm's regression, so there are no logits (G = 0)."""

    def act(
        self,
        images: Mapping[str, NDArray[np.uint8]],
        state: NDArray[Any],
        texts: Sequence[str],
        seeds: NDArray[np.int64],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        arm = self._chunks(images, state, texts, seeds).numpy()
        return arm, np.zeros((*arm.shape[:2], 0), np.float32)


class LeRobotTeacher(LeRobotPolicy):
    """`Teacher`: hidden states of the first three action tokens, from one frame."""

    def __init__(self, source: str, device: str = "cpu", queries: int = 3, seed: int = 0) -> None:
        super().__init__(source, device)
        if self.type not in HOOKS:
            raise UsageError(
                f"lerobot:{source} is a '{self.type}' policy, which has no hidden state per action token\n"
                f"  known: {', '.join(HOOKS)}.  It can be an anchor:  dpipe precompute residuals --anchor ..."
            )
        self.queries, self.seed = queries, seed
        self._layer = self.policy.get_submodule(HOOKS[self.type])
        self.width = int(getattr(self._layer, "in_features", 0)) or int(self._probe_width())

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "layer": HOOKS[self.type], "queries": self.queries, "seed": self.seed}

    def _probe_width(self) -> int:
        """Width of a layer that is no Linear: what its weight's last axis says."""
        return next(p.shape[-1] for p in self._layer.parameters() if p.ndim >= 2)

    def hidden(
        self, images: Mapping[str, NDArray[np.uint8]], state: NDArray[Any], texts: Sequence[str]
    ) -> NDArray[np.float32]:
        """uint8 [B, 1, H, W, 3] per camera, [B, 1, D] -> [B, 1, Q, h]."""
        import torch

        caught: list[torch.Tensor] = []
        hook = self._layer.register_forward_pre_hook(lambda layer, given: caught.append(given[0].detach()))
        now = {name: np.asarray(images[name])[:, -1] for name in self.cameras}
        rows: list[torch.Tensor] = []
        try:
            state = np.asarray(state)[:, -1]
            count = len(state)
            for part in [slice(0, count)] if not self.stochastic else [slice(i, i + 1) for i in range(count)]:
                caught.clear()
                one = {name: frames[part] for name, frames in now.items()}
                seeds = np.full(len(state[part]), self.seed, dtype=np.int64)
                self._chunks(one, state[part], list(texts)[part], seeds)
                rows.append(caught[-1][:, -self.chunk :][:, : self.queries].float().cpu())
        finally:
            hook.remove()
        return torch.cat(rows)[:, None].numpy()

    def decoder(self) -> ActionDecoder:
        """The policy's last layer as a decoder: a single linear map that says the action itself."""
        import torch

        if self.stochastic or not isinstance(self._layer, torch.nn.Linear):
            why = "says a step of denoising, not an action" if self.stochastic else "is no linear map"
            raise UsageError(
                f"lerobot:{self.source}: the last layer of '{self.type}' {why}, so it cannot be reused\n"
                "  Use an ACT policy or the embedded teacher for VITA."
            )
        decoder = ActionDecoder(self.width, self.action_dim, (), trunk=False, bounded=False)
        decoder.arm.load_state_dict(self._layer.state_dict())
        return decoder

    def decode(self, hidden: NDArray[Any]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            return self.decoder().actions(torch.from_numpy(np.asarray(hidden, dtype=np.float32))).numpy()

    def save_decoder(self, path: Path) -> None:
        save_decoder(self.decoder(), path)
