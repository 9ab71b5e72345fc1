"""Building blocks of the tiny policies: images, words and numbers become tokens; transformers mix them.

Sized for a CPU: 64 x 64 images, a three-layer convolution whose features are read at a few places, width 128.
A real backbone takes the place of `ObservationEncoder` (see `vlm.py`), nothing else changes.

Legend: B batch, N tokens, d width, h x w pixels, H action steps, A action dimensions.
"""

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import pairwise

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from ..schemas.errors import unknown_name

WORD_BUCKETS = 4096
TEXT_LENGTH = 48  # words and word pairs kept of an instruction

# -- words ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=65536)
def word_ids(text: str) -> tuple[int, ...]:
    """An instruction's words and neighbouring pairs as hashed buckets 1 .. 4095; 0 is padding.

    Pairs keep a little of the order ("red cube" and "blue tray" against "blue cube" and "red tray").
    """
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    terms = words + [f"{a} {b}" for a, b in pairwise(words)]
    return tuple(
        1 + xxhash.xxh32_intdigest(term.encode()) % (WORD_BUCKETS - 1) for term in terms[:TEXT_LENGTH]
    )


def text_ids(texts: Sequence[str]) -> Tensor:
    """B instructions -> int64 [B, TEXT_LENGTH], padded with 0."""
    rows = torch.zeros(len(texts), TEXT_LENGTH, dtype=torch.int64)
    for i, text in enumerate(texts):
        ids = word_ids(text)
        rows[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return rows


class TextEncoder(nn.Module):
    """int64 [B, L] -> [B, d]: the mean of the words' vectors, through one hidden layer.

    Only the first TEXT_LENGTH ids are hashed words; a language model's own tokens may follow them.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(WORD_BUCKETS, width, mode="sum", padding_idx=0)
        self.mix = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.mix(self.words(ids[:, :TEXT_LENGTH]))


SHARPNESS = 8.0  # of a keypoint's softmax at first: learnt slowly, and blunt keypoints all lie in the middle


# -- images -----------------------------------------------------------------------------------------------


def to_pixels(images: Tensor, size: int) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, size, size] about 0; larger frames are averaged down."""
    pixels = images.permute(0, 3, 1, 2).float() / 255 - 0.5
    if pixels.shape[-2:] == (size, size):
        return pixels
    if pixels.shape[-2] % size == 0 and pixels.shape[-1] % size == 0:
        return F.avg_pool2d(pixels, (pixels.shape[-2] // size, pixels.shape[-1] // size))
    return F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


class ConvEncoder(nn.Module):
    """[B, 3, size, size] and a condition [B, d] -> `points` tokens [B, points, d].

    Keypoints first, words second. Every channel of a patch convolution, and its negative, is a map over the
    image; a sharp softmax over the map says where it is strongest (a soft keypoint: Finn et al., 2016) and how
    strong. Then each point, asked by the instruction, chooses among the keypoints and reports where the chosen
    one is. The other order, attention whose queries come from the words, has to learn what red looks like and
    which word means it at once, and takes several times as long to find the named thing.

    Patches of 4 x 4 pixels by one matrix product: on a CPU a convolution that sees its neighbours would cost more
    than everything else together.
    """

    grid: Tensor  # [cells, 2]: x and y of each patch's middle, -1 .. 1

    def __init__(
        self, width: int, size: int = 64, points: int = 8, channels: int = 16, patch: int = 4
    ) -> None:
        super().__init__()
        self.size, self.points, self.patch = size, points, patch
        cells, maps = size // patch, 2 * channels
        self.enter = nn.Linear(3 * patch * patch, channels)
        self.norm = nn.LayerNorm(channels)
        self.sharpness = nn.Parameter(torch.full((maps, 1), SHARPNESS))
        self.ask = nn.Linear(width, points * maps)
        self.by_strength = nn.Linear(maps, maps)
        self.out = nn.Linear(3 + maps, width)
        self.name = nn.Parameter(torch.randn(points, width) * 0.02)
        line = (torch.arange(cells) + 0.5) / cells * 2 - 1
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)
        self.register_buffer("grid", grid, persistent=False)

    def forward(self, pixels: Tensor, condition: Tensor) -> Tensor:
        b, p, n = len(pixels), self.patch, self.size // self.patch
        cells = pixels.permute(0, 2, 3, 1).reshape(b, n, p, n, 3 * p).transpose(2, 3).reshape(b, n * n, -1)
        seen = self.norm(self.enter(cells)).transpose(1, 2)
        maps = torch.cat([seen, -seen], dim=1)  # [B, maps, cells]
        weight = (maps * self.sharpness).softmax(dim=-1)
        place = weight @ self.grid.to(weight.dtype)
        strength = (weight * maps).sum(-1) - 3  # about 0: a map's peak stands some 3 deviations out
        asked = self.ask(condition).unflatten(-1, (self.points, -1)) + self.by_strength(strength)[:, None]
        choice = asked.softmax(dim=-1)  # [B, points, maps]
        told = choice @ torch.cat([place, strength[..., None]], dim=-1)
        return self.out(torch.cat([told, choice], dim=-1)) + self.name


class ViTEncoder(nn.Module):
    """[B, 3, size, size] and a condition [B, d] -> one token per patch [B, (size / patch)^2, d]."""

    def __init__(self, width: int, size: int = 64, patch: int = 8, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.size = size
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.place = nn.Parameter(torch.randn((size // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, pixels: Tensor, condition: Tensor) -> Tensor:
        tokens = self.patches(pixels).flatten(2).transpose(1, 2) + self.place + condition[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class StateScale(nn.Module):
    """[B, D] native state -> standardised; a dimension that never changes is left at 0."""

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        spread = torch.tensor(std, dtype=torch.float32)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("inverse_std", torch.where(spread > 1e-6, 1 / spread.clamp(min=1e-6), 0.0))

    def forward(self, state: Tensor) -> Tensor:
        return (state - self.mean) * self.inverse_std


class ObservationEncoder(nn.Module):
    """One moment -> tokens [B, N, d]: each camera's, one of the state (`with_state`), one of the instruction.

    `vision` is conv, vit, or `hf:<folder>`: a pretrained tower that all cameras share, and `freeze` for good.
    """

    def __init__(
        self,
        cameras: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        width: int,
        vision: str = "conv",
        size: int = 64,
        points: int = 8,
        with_state: bool = True,
        freeze: bool = True,
    ) -> None:
        super().__init__()
        self.cameras, self.size = tuple(cameras), size
        self.text = TextEncoder(width)
        self.state = (
            nn.Sequential(StateScale(mean, std), mlp(len(mean), width, width)) if with_state else None
        )
        make = {"conv": partial(ConvEncoder, width, size, points), "vit": partial(ViTEncoder, width, size)}
        self.tower = None
        if ":" in vision:
            from .backbones import TowerEye

            self.tower = TowerEye(vision, width, freeze)
            self.names = nn.Parameter(torch.randn(len(self.cameras), 1, width) * 0.02)
        elif vision not in make:
            raise unknown_name("vision", vision, [*make, "hf:<folder>"])
        self.eyes = nn.ModuleList(make[vision]() for _ in self.cameras if self.tower is None)

    def forward(self, images: Sequence[Tensor], state: Tensor, text: Tensor) -> Tensor:
        """`images` uint8 [B, h, w, 3] in the order of `cameras`; state [B, D]; text ids [B, L]."""
        words = self.text(text)
        if self.tower is not None:
            tokens = [self.tower(image) + name for image, name in zip(images, self.names, strict=True)]
        else:
            tokens = [
                eye(to_pixels(image, self.size), words) for eye, image in zip(self.eyes, images, strict=True)
            ]
        if self.state is not None:
            tokens.append(self.state(state)[:, None])
        return torch.cat([*tokens, words[:, None]], dim=1)


# -- transformers -----------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention of [B, N, d] queries over [B, M, d] context (itself when none is given)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`mask` bool [N, M] or [B, 1, N, M]: True where attention may look."""
        context = tokens if context is None else context
        q = self._split(self.query(tokens))
        k, v = (self._split(part) for part in self.key_value(context).chunk(2, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Block(nn.Module):
    """Pre-norm transformer block: attention among the tokens, then a feed-forward layer."""

    recomputable = True  # its activations may be made again in the backward pass

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = Attention(width, heads), feed_forward(width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = tokens + self.attention(self.norm_attention(tokens), mask=mask)
        return tokens + self.mlp(self.norm_mlp(tokens))


class DiTBlock(nn.Module):
    """Block of a diffusion transformer: a condition vector scales, shifts and gates each branch (adaLN-zero).

    Gates start at 0, so that a fresh block passes its tokens on unchanged (Peebles and Xie, 2023). Context
    tokens, where given, are read by cross-attention between the two branches.
    """

    recomputable = True

    def __init__(self, width: int, heads: int, cross: bool = True) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attention, self.mlp = Attention(width, heads), feed_forward(width)
        self.norm_cross = nn.LayerNorm(width) if cross else None
        self.cross = Attention(width, heads) if cross else None
        self.modulate = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, tokens: Tensor, condition: Tensor, context: Tensor | None = None) -> Tensor:
        a1, b1, g1, a2, b2, g2 = self.modulate(F.silu(condition))[:, None].chunk(6, dim=-1)
        tokens = tokens + g1 * self.attention(self.norms[0](tokens) * (1 + a1) + b1)
        if self.cross is not None and self.norm_cross is not None:
            # Several sets of tokens may share one context: [B * K, N, d] read [B, M, d] side by side.
            rows = len(tokens) if context is None else len(context)
            queries = self.norm_cross(tokens).reshape(rows, -1, tokens.shape[-1])
            tokens = tokens + self.cross(queries, context).reshape(tokens.shape)
        return tokens + g2 * self.mlp(self.norms[1](tokens) * (1 + a2) + b2)


def sinusoids(values: Tensor, width: int, longest: float = 10_000.0) -> Tensor:
    """[B] -> [B, width] sines and cosines over a geometric range of periods; `values` of the order of 1 000."""
    half = width // 2
    rates = torch.exp(-math.log(longest) * torch.arange(half, device=values.device) / half)
    angle = values.float()[:, None] * rates
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class TimeEmbedding(nn.Module):
    """Times in [0, 1], [B] -> [B, d]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mix = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: Tensor) -> Tensor:
        return self.mix(sinusoids(times * 1000, self.width))


def mlp(inner: int, hidden: int, out: int, layers: int = 2) -> nn.Sequential:
    """`layers` linear maps with GELU between them."""
    sizes = [inner] + [hidden] * (layers - 1) + [out]
    parts: list[nn.Module] = []
    for a, b in pairwise(sizes):
        parts += [nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*parts[:-1])
