"""Pretrained weights inside a model that trains: where they come from, which of them stay as they are, and eyes.

    --vlm hf:FOLDER       a vision-language model: `vlm.py`
    --vision hf:FOLDER    a tower of `hf.py` as the eyes of a recipe's own encoder: SigLIP, DINOv2, or those of a VLM

Frozen weights stay in their folder: a checkpoint holds what training may change, and `left_out` names the rest.
Inside `blueprint()` modules have sizes and no storage, nothing but config.json is read, and the papers' backbones
are known by name.

Legend: B batch, H x W pixels, N tokens of an image, d width of the policy.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..schemas.errors import UsageError
from .architectures import ARCHITECTURES
from .hf import HfTower, checkpoint_folder, open_hf_tower


@contextmanager
def blueprint() -> Iterator[None]:
    """Modules built inside have shapes and no storage; checkpoints are not opened."""
    with torch.device("meta"):
        yield


def is_blueprint() -> bool:
    return torch.get_default_device().type == "meta"


def source_of(spec: str, option: str) -> str:
    """`hf:<folder or id>` -> the folder or id."""
    kind, _, rest = spec.partition(":")
    if kind != "hf" or not rest:
        raise UsageError(f"--{option} '{spec}'\n  expected hf:<folder or Hugging Face id>")
    return rest


def locate(source: str) -> tuple[Path | None, dict[str, Any]]:
    """(folder, its config.json). In a blueprint the papers' backbones need no folder."""
    import json

    if is_blueprint() and source in ARCHITECTURES and not Path(source).is_dir():
        return None, dict(ARCHITECTURES[source])
    folder = checkpoint_folder(source)
    return folder, json.loads((folder / "config.json").read_text())


class Held(nn.Module):
    """A backbone some of whose weights never train: they are frozen for good and stay out of checkpoints."""

    def held(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Names within this module, and parameters."""
        raise NotImplementedError

    def recompute(self) -> None:
        """Gradient checkpointing, where the backbone trains."""

    def hold(self) -> None:
        """Freeze them, whatever a recipe's phase has just unfrozen."""
        for _, parameter in self.held():
            parameter.requires_grad_(False)


def hold_backbones(model: nn.Module) -> None:
    """To be called after a recipe has entered a phase."""
    for module in model.modules():
        if isinstance(module, Held):
            module.hold()


def left_out(model: nn.Module) -> set[str]:
    """Names of `model`'s state that its checkpoints leave to the backbones' own folders."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, Held)
        for name, _ in module.held()
    }


class TowerEye(Held):
    """A transformers tower shared by all cameras, and a linear map to the policy's width."""

    def __init__(self, spec: str, width: int, freeze: bool = True, image_size: int | None = None) -> None:
        super().__init__()
        folder, told = locate(source_of(spec, "vision"))
        if folder is None:
            self.tower = HfTower.blueprint(told, image_size)
        else:
            self.tower = open_hf_tower(
                str(folder), image_size=image_size, tensor=None, device="cpu", dtype="float32"
            )
        self.parts = nn.ModuleDict(self.tower.modules)
        self.parts.requires_grad_(not freeze)
        self.frozen = freeze
        self.enter = nn.Linear(self.tower.width, width)
        self.hold()

    def held(self) -> Iterable[tuple[str, nn.Parameter]]:
        return [(f"parts.{name}", p) for name, p in self.parts.named_parameters()] if self.frozen else []

    def recompute(self) -> None:
        parts: list[Any] = [] if self.frozen else list(self.parts.values())
        for part in parts:
            if getattr(part, "supports_gradient_checkpointing", False):
                part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> [B, N, d]."""
        if images.is_meta:  # a blueprint
            rows, columns = self.tower.grid(*images.shape[1:3])
            return self.enter(
                images.new_empty(len(images), rows * columns, self.tower.width, dtype=torch.float32)
            )
        return self.enter(self.tower.features(self.tower.frames.pixels(images)))


def checkpoint_digests(config: Mapping[str, Any]) -> dict[str, str]:
    """What a run's backbones were: a digest of config and weights for every `hf:` among its options."""
    import xxhash

    found: dict[str, str] = {}
    for value in config.values():
        if isinstance(value, str) and value.startswith("hf:"):
            hasher = xxhash.xxh3_128()
            folder = checkpoint_folder(value[3:])
            for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
                hasher.update(path.name.encode())
                with path.open("rb") as file:
                    while block := file.read(1 << 24):
                        hasher.update(block)
            found[value] = hasher.hexdigest()
    return found
