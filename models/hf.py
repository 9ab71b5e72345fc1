"""Towers of transformers checkpoints: the right tensor, in the right order, read from the weights alone.

    family      tensors (default first)        rule of the frame's size
    qwen2_5_vl  merged | premerge              multiple of 28 px, area within the checkpoint's bounds
    qwen3_vl    merged | deepstack             multiple of 32 px, likewise
    siglip      patches                        the checkpoint's image size, square
    internvl    projector | shuffled | raw     the checkpoint's image size, square, one tile
    dinov2      patches (CLS, registers off)   224 px, square

Facts this file turns on (checked against transformers 5.5):
- Qwen's merged tokens (`pooler_output`) are in raster order. `last_hidden_state` of Qwen2.5-VL is unmerged
  AND in the order of its attention windows; `premerge` undoes that.
- Deepstack is three more tensors of the merged size, concatenated along the width after the merged one.
- Only the tower's own weights are read from a VLM's checkpoint, and every one of them must be there.
Preprocessing is the checkpoint's (mean, std, resampling, area), on the device; a test holds it equal to the
processor's own.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..schemas.errors import DataError, UsageError, unknown_name

if TYPE_CHECKING:
    import torch

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Family:
    """What we must know of an architecture before opening it; `prefixes` are where its weights may stand."""

    tensors: tuple[str, ...]
    prefixes: Mapping[str, tuple[str, ...]]  # module name here -> names in checkpoints
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 3  # PIL's number: 2 bilinear, 3 bicubic


_VISUAL = {"visual": ("model.visual.", "visual.")}
FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(("merged", "premerge"), _VISUAL, CLIP_MEAN, CLIP_STD),
    "qwen3_vl": Family(("merged", "deepstack"), _VISUAL, HALF, HALF),
    # SigLIP's own processor resizes bicubic too.
    "siglip": Family(("patches",), {"visual": ("",)}, HALF, HALF),
    "internvl": Family(
        ("projector", "shuffled", "raw"),
        {
            "visual": ("model.vision_tower.", "vision_tower."),
            "projector": ("model.multi_modal_projector.", "multi_modal_projector."),
        },
        IMAGENET_MEAN,
        IMAGENET_STD,
    ),
    "dinov2": Family(("patches",), {"visual": ("", "dinov2.")}, IMAGENET_MEAN, IMAGENET_STD),
}
# `model_type` of config.json -> family
MODEL_TYPES = {
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "internvl": "internvl",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
}


def open_hf_tower(
    source: str, *, image_size: int | None, tensor: str | None, device: str, dtype: str
) -> "HfTower":
    """`source` is a folder with config.json and safetensors, or a Hugging Face id to fetch it from."""
    folder = checkpoint_folder(source)
    config = _json(folder / "config.json")
    model_type = config.get("model_type", "")
    if model_type not in MODEL_TYPES:
        raise unknown_name("vision tower architecture", model_type, MODEL_TYPES)
    family = MODEL_TYPES[model_type]
    tensor = tensor or FAMILIES[family].tensors[0]
    if tensor not in FAMILIES[family].tensors:
        raise unknown_name(f"tensor of {family}", tensor, FAMILIES[family].tensors)
    return HfTower(folder, family, config, tensor, image_size, device, dtype)


def checkpoint_folder(source: str) -> Path:
    """A local folder as it is; anything else is fetched from the Hub (weights and configs only)."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise DataError(f"no config.json in {folder}\n  expected a transformers checkpoint folder")
        return folder
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UsageError(
            f"no folder {folder}\n  expected a checkpoint folder or a Hugging Face id like owner/name"
        )
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))


class Frames:
    """Camera frames as an architecture wants them: its size, its mean and deviation.

    `config` is the vision tower's; InternVL's is that of the whole model, which knows how tokens are merged.
    """

    def __init__(
        self, folder: Path | None, family: str, config: Any, image_size: int | None, dtype: "torch.dtype"
    ) -> None:
        self.family, self.config, self.image_size, self.dtype = family, config, image_size, dtype
        self.preprocess = _preprocessing(folder, FAMILIES[family])

    def grid(self, height: int, width: int, unmerged: bool = False) -> tuple[int, int]:
        """(gh, gw) of the tokens of a frame, or of its patches before neighbours are merged."""
        rows, columns = self.size(height, width)
        unit = self._token_pixels(unmerged)
        return rows // unit, columns // unit

    def _token_pixels(self, unmerged: bool) -> int:
        """Pixels per token and side."""
        if self.family.startswith("qwen"):
            return self.config.patch_size * (1 if unmerged else self.config.spatial_merge_size)
        if self.family == "internvl":
            patch = self.config.vision_config.patch_size[0]
            return patch if unmerged else round(patch / self.config.downsample_ratio)
        return self.config.patch_size

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels (rows, columns) a frame is resized to."""
        if self.family.startswith("qwen"):
            factor = self.config.patch_size * self.config.spatial_merge_size
            if self.image_size is not None:
                side = max(factor, round(self.image_size / factor) * factor)
                return side, side
            return fit_area(height, width, factor, *self.preprocess["area"])
        if self.image_size is not None:
            return self.image_size, self.image_size
        if self.family == "internvl":
            rows, columns = self.config.vision_config.image_size
            return rows, columns
        side = 224 if self.family == "dinov2" else self.config.image_size
        return side, side

    def pixels(self, images: "torch.Tensor") -> "torch.Tensor":
        """uint8 [B, H, W, 3] -> normalised float [B, 3, rows, columns], on their device."""
        import torch
        import torch.nn.functional as F

        frames = images.permute(0, 3, 1, 2)
        size = self.size(images.shape[1], images.shape[2])
        if frames.shape[-2:] != size:
            mode = "bilinear" if self.preprocess["resample"] == 2 else "bicubic"
            if frames.device.type == "cpu":  # uint8 in and out, rounded as the processors do
                frames = F.interpolate(frames, size=size, mode=mode, antialias=True)
            else:
                frames = (
                    F.interpolate(frames.float(), size=size, mode=mode, antialias=True)
                    .round_()
                    .clamp_(0, 255)
                )
        mean = torch.tensor(self.preprocess["mean"], device=frames.device).view(3, 1, 1)
        std = torch.tensor(self.preprocess["std"], device=frames.device).view(3, 1, 1)
        return ((frames.float() / 255 - mean) / std).to(self.dtype)


class HfTower:
    """One frozen tower on one device. See the table at the head of this file for tensors and sizes."""

    def __init__(
        self,
        folder: Path | None,
        family: str,
        config: dict[str, Any],
        tensor: str,
        image_size: int | None,
        device: str,
        dtype: str,
    ) -> None:
        import torch

        self.family, self.tensor = family, tensor
        self._device, self._dtype, self._dtype_name = torch.device(device), getattr(torch, dtype), dtype
        self.modules, self._config = _build(family, config)
        self.frames = Frames(folder, family, self._config, image_size, self._dtype)
        self._weights = self._load(folder) if folder is not None else ""
        for module in self.modules.values():
            module.to(self._device).eval().requires_grad_(False)
            for parameter in module.parameters():  # not the buffers: rotary frequencies stay float32
                parameter.data = parameter.data.to(self._dtype)

    @classmethod
    def blueprint(cls, config: dict[str, Any], image_size: int | None = None) -> "HfTower":
        """The architecture alone, on whatever device is the default: `models/backbones.py` counts with it."""
        import torch

        family = MODEL_TYPES[config["model_type"]]
        device = str(torch.get_default_device())
        return cls(None, family, config, FAMILIES[family].tensors[0], image_size, device, "float32")

    # -- what it is ---------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        vision = self._config.vision_config if self.family == "internvl" else self._config
        if self.family == "qwen2_5_vl":
            return vision.out_hidden_size if self.tensor == "merged" else vision.hidden_size
        if self.family == "qwen3_vl":
            extra = len(vision.deepstack_visual_indexes) if self.tensor == "deepstack" else 0
            return vision.out_hidden_size * (1 + extra)
        if self.tensor == "projector":
            return self._config.text_config.hidden_size
        if self.tensor == "shuffled":
            return round(vision.hidden_size / self._config.downsample_ratio**2)
        return vision.hidden_size

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps(self.describe(), sort_keys=True).encode())

    def describe(self) -> dict[str, Any]:
        return {
            "tower": "hf",
            "family": self.family,
            "tensor": self.tensor,
            "width": self.width,
            "weights": self._weights,
            "dtype": self._dtype_name,
            "preprocess": {**self.frames.preprocess, "image_size": self.frames.image_size},
        }

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.frames.grid(height, width, self.tensor in ("premerge", "raw"))

    # -- what it does -------------------------------------------------------------------------------------

    def encode(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], tuple[int, int]]:
        import torch

        features, grid = self.encode_torch(torch.from_numpy(np.ascontiguousarray(images)))
        return features.float().cpu().numpy(), grid

    def encode_torch(self, images: "torch.Tensor") -> "tuple[torch.Tensor, tuple[int, int]]":
        """uint8 [B, H, W, 3] on any device -> ([B, N, d] in the compute dtype, grid), kept there."""
        import torch

        with torch.inference_mode():
            features = self.features(self.frames.pixels(images.to(self._device)))
        return features, self.grid(images.shape[1], images.shape[2])

    def features(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """Normalised pixels [B, 3, rows, columns] -> tokens [B, N, d], with gradients where they are asked for."""
        import torch

        visual = self.modules["visual"]
        batch = pixels.shape[0]
        if self.family.startswith("qwen"):
            patches, thw = qwen_patches(pixels, self._config)
            out = visual(patches, grid_thw=thw)
            if self.tensor == "premerge":
                return _unwindow(visual, out.last_hidden_state, thw).reshape(
                    batch, -1, self._config.hidden_size
                )
            tokens = [out.pooler_output]
            if self.tensor == "deepstack":
                tokens += list(out.deepstack_features)
            return torch.cat(tokens, dim=-1).reshape(batch, -1, self.width)
        if self.family == "siglip":
            return visual(
                pixel_values=pixels, interpolate_pos_encoding=self.frames.image_size is not None
            ).last_hidden_state
        if self.family == "dinov2":  # interpolates its positions by itself
            skip = 1 + getattr(self._config, "num_register_tokens", 0)
            return visual(pixel_values=pixels).last_hidden_state[:, skip:]
        return self._internvl(visual, pixels)

    def _internvl(self, visual: Any, pixels: "torch.Tensor") -> "torch.Tensor":
        layer = self._config.vision_feature_layer
        out = visual(pixel_values=pixels, output_hidden_states=layer != -1)
        tokens = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        tokens = tokens[:, 1:]  # CLS
        if self.tensor == "raw":
            return tokens
        gh, gw = (side // self._config.vision_config.patch_size[0] for side in pixels.shape[-2:])
        shuffled = pixel_shuffle(tokens, gh, gw, round(1 / self._config.downsample_ratio))
        return shuffled if self.tensor == "shuffled" else self.modules["projector"](shuffled)

    # -- weights ------------------------------------------------------------------------------------------

    def _load(self, folder: Path) -> str:
        """Load every tensor of every module, strictly; returns their digest (xxh3-128)."""
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise DataError(
                f"no *.safetensors in {folder}\n  Save the checkpoint with safe_serialization=True."
            )
        hasher = xxhash.xxh3_128()
        for name, prefixes in FAMILIES[self.family].prefixes.items():
            module = self.modules[name]
            _load_strictly(module, files, prefixes, folder)
            for key, value in sorted(module.state_dict().items()):
                hasher.update(f"{name}.{key} {value.dtype} {tuple(value.shape)}".encode())
                hasher.update(value.contiguous().view(-1).view(_bytes_dtype()).numpy())
        return hasher.hexdigest()


def _bytes_dtype() -> Any:
    import torch

    return torch.uint8


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _preprocessing(folder: Path | None, family: Family) -> dict[str, Any]:
    """Mean, std, resampling and (Qwen) area bounds in pixels: the checkpoint's, else the family's."""
    path = folder / "preprocessor_config.json" if folder else None
    stored = _json(path) if path and path.is_file() else {}
    size = stored.get("size") or {}
    # Without bounds in the checkpoint: Qwen3-VL 256^2 .. 4096^2, Qwen2.5-VL 56^2 .. 28^2 * 1280.
    low, high = (65_536, 16_777_216) if family.mean == HALF else (3_136, 1_003_520)
    return {
        "mean": list(stored.get("image_mean") or family.mean),
        "std": list(stored.get("image_std") or family.std),
        "resample": stored.get("resample", family.resample),
        "area": [
            stored.get("min_pixels") or size.get("shortest_edge") or low,
            stored.get("max_pixels") or size.get("longest_edge") or high,
        ],
    }


def _build(family: str, config: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """(modules on the CPU, the config the tower reads its sizes from); random weights, to be overwritten."""
    import transformers as hf
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    model_type = config["model_type"]
    full = hf.AutoConfig.for_model(**config)
    if family == "qwen2_5_vl":
        return {
            "visual": Qwen2_5_VisionTransformerPretrainedModel._from_config(full.vision_config)
        }, full.vision_config
    if family == "qwen3_vl":
        return {"visual": Qwen3VLVisionModel._from_config(full.vision_config)}, full.vision_config
    if family == "siglip":
        vision = full.vision_config if model_type == "siglip" else full
        return {"visual": hf.SiglipVisionModel._from_config(vision)}, vision
    if family == "dinov2":
        return {"visual": hf.AutoModel.from_config(full)}, full
    return {
        "visual": hf.AutoModel.from_config(full.vision_config),
        "projector": InternVLMultiModalProjector(full),  # pyright: ignore[reportArgumentType] - as model_type says
    }, full


def _load_strictly(module: Any, files: list[Path], prefixes: tuple[str, ...], folder: Path) -> None:
    """Copy the module's tensors from the files; a tensor that is missing or of another shape is an error."""
    from safetensors import safe_open

    wanted = module.state_dict()
    found: dict[str, Any] = {}
    for path in files:
        with safe_open(path, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - not a dict
                for prefix in prefixes:
                    name = key.removeprefix(prefix)
                    if key.startswith(prefix) and name in wanted:
                        found[name] = stored.get_tensor(key)
    missing = sorted(set(wanted) - set(found))
    unlike = sorted(name for name in found if found[name].shape != wanted[name].shape)
    if missing or unlike:
        raise DataError(
            f"{folder} does not hold the tower its config.json describes\n"
            f"  missing {len(missing)} of {len(wanted)} tensors: {', '.join(missing[:3]) or '-'}\n"
            f"  of another shape: {', '.join(unlike[:3]) or '-'}\n"
            "  A checkpoint in transformers' own layout is needed (for InternVL, one whose name ends in -hf)."
        )
    module.load_state_dict(found, strict=True, assign=True)


# -- orders and sizes, on paper ---------------------------------------------------------------------------


def fit_area(height: int, width: int, factor: int, low: int, high: int) -> tuple[int, int]:
    """Sides as multiples of `factor` near the frame's own, area within [low, high]: Qwen's rule.

    Python's round goes to the even neighbour, as upstream's does: 256 / 28 = 9.14 -> 9 -> 252 px.
    """
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > high:
        scale = (height * width / high) ** 0.5
        return max(factor, int(height / scale / factor) * factor), max(
            factor, int(width / scale / factor) * factor
        )
    if rows * columns < low:
        scale = (low / (height * width)) ** 0.5
        return -int(-height * scale // factor) * factor, -int(-width * scale // factor) * factor
    return rows, columns


def qwen_patches(pixels: "torch.Tensor", config: Any) -> "tuple[torch.Tensor, torch.Tensor]":
    """[B, 3, rows, columns] -> (patches [B * n, 3 * 2 * p * p], grid_thw [B, 3]).

    A still image is two equal frames in time. Patches of a merged cell stand together, cells in raster order.
    """
    import torch

    batch, channels, rows, columns = pixels.shape
    p, m, t = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    gh, gw = rows // p, columns // p
    cut = pixels.view(batch, channels, gh // m, m, p, gw // m, m, p)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [B, cell row, cell column, m, m, C, p, p]
    cut = cut.unsqueeze(6).expand(*cut.shape[:6], t, p, p)
    grid = torch.tensor([[1, gh, gw]] * batch, device=pixels.device)
    return cut.reshape(batch * gh * gw, channels * t * p * p), grid


def _unwindow(visual: Any, hidden: "torch.Tensor", thw: "torch.Tensor") -> "torch.Tensor":
    """Qwen2.5-VL's unmerged tokens from attention-window order back to raster order of single patches."""
    import torch

    index, _ = visual.get_window_index(thw)
    unit = visual.spatial_merge_unit
    cells = hidden.reshape(-1, unit, hidden.shape[-1])[torch.argsort(index.to(hidden.device))]
    m = visual.spatial_merge_size
    batch, gh, gw = thw.shape[0], int(thw[0, 1]), int(thw[0, 2])
    cells = cells.reshape(batch, gh // m, gw // m, m, m, -1).transpose(2, 3)
    return cells.reshape(batch, gh * gw, -1)


def pixel_shuffle(tokens: "torch.Tensor", gh: int, gw: int, r: int) -> "torch.Tensor":
    """[B, gh * gw, C] -> [B, gh/r * gw/r, r * r * C]: r x r neighbours into one token, raster order kept."""
    batch, _, channels = tokens.shape
    cut = tokens.reshape(batch, gh // r, r, gw // r, r, channels)
    return cut.permute(0, 1, 3, 2, 4, 5).reshape(batch, (gh // r) * (gw // r), r * r * channels)
