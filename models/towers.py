"""Vision towers: a frame in, a grid of feature tokens out. One interface, opened by name.

    embedded            a fixed patch DCT (`dct.py`): real features, nothing to download, numpy alone
    hf:<folder or id>   a transformers tower or VLM (`hf.py`): Qwen2.5-VL, Qwen3-VL, SigLIP, InternVL, DINOv2

Legend: B images, H x W pixels, N = gh * gw tokens in raster order (row 0 at the top), d width of a token.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import UsageError

TOWERS = ("embedded", "hf:<folder or Hugging Face id>")


class VisionTower(Protocol):
    """Frozen: the same image gives the same features; `digest` changes whenever they would.

    The digest covers weights, preprocessing and which tensor is taken, so that a cache made with one tower
    refuses to be read as another's. `encode_torch` is the same on a tensor (uint8 [B, H, W, 3]) and stays on
    the tower's device; towers without torch do not offer it. A tower that would average frames down anyway
    says to what by `frame_size(height, width)`, so that they are never decoded any larger.
    """

    @property
    def digest(self) -> str: ...

    @property
    def width(self) -> int: ...

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(gh, gw) of the tokens of a height x width image."""
        ...

    def encode(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], tuple[int, int]]:
        """uint8 [B, H, W, 3] RGB -> (float32 [B, gh * gw, d], (gh, gw))."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON for a target's contract: family, tensor, preprocessing, weights, width."""
        ...


def open_tower(
    spec: str,
    *,
    image_size: int | None = None,
    tensor: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> VisionTower:
    """Open the tower `spec` names.

    `image_size` resizes every frame to that many pixels square first (a tower's own rule otherwise);
    `tensor` picks another of the tensors the family offers; `dtype` is the compute type of the weights.
    """
    kind, _, rest = spec.partition(":")
    if kind == "embedded" and not rest:
        from .dct import DctTower

        if image_size is not None or tensor is not None:
            raise UsageError(
                "the embedded tower takes no image size and no tensor: its patches fit any size\n"
                "  Leave both out, or name a real tower:  --tower hf:google/siglip-so400m-patch14-384"
            )
        return DctTower()
    if kind == "hf" and rest:
        from .hf import open_hf_tower

        return open_hf_tower(rest, image_size=image_size, tensor=tensor, device=device, dtype=dtype)
    raise UsageError(f"unknown vision tower '{spec}'\n  known: {', '.join(TOWERS)}")
