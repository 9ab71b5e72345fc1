"""A pretrained vision-language model inside a policy, of transformers' true layout.

    --vlm hf:FOLDER       Qwen2.5-VL, or InternVL in transformers' layout (checkpoints whose name ends in -hf)
    --freeze GROUPS       what does not train: vision, merger, embeddings, llm, llm[:12], llm[12:], llm[4:8]
    --lora RANK           adapters of that rank (peft) in the language model, whose own weights then stay

One sequence a sample: per camera its image tokens between the model's own marks, the instruction, then whatever
a recipe adds as vectors (queries, a state token). Such queries are parameters of their own, not rows of the
vocabulary: nothing of the embedding needs masking, and weight decay finds nothing to shrink. The instruction goes
in as it is, without a chat template [ours].

Legend: B batch, N image tokens, P = TEXT_TOKENS, Q vectors added, e width of the language model, d of the policy.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..schemas.errors import DataError, UsageError, unknown_name
from .backbones import Held, is_blueprint, locate, source_of
from .blocks import TEXT_LENGTH, StateScale, mlp, text_ids
from .hf import Frames

TEXT_TOKENS = 64  # tokens read of an instruction; the same for every sample: none depends on its batch
LAYOUTS: dict[str, dict[str, str]] = {  # where the parts stand in transformers' modules
    "qwen2_5_vl": {"vision": "visual", "merger": "visual.merger"},
    "internvl": {"vision": "vision_tower", "merger": "multi_modal_projector"},
}
GROUPS = ("vision", "merger", "embeddings", "llm", "llm[i:j]")
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def words_of(model: nn.Module) -> Callable[[Sequence[str]], Tensor]:
    """How this model reads instructions: hashed words, and after them its language model's tokens."""
    reader = next((module for module in model.modules() if isinstance(module, Vlm)), None)
    if reader is None:
        return text_ids
    return lambda texts: torch.cat([text_ids(texts), reader.tokens(texts)], dim=1)


# -- a vision-language model ------------------------------------------------------------------------------


class Vlm(Held):
    """Images, words and added vectors through one language model; `width` is e."""

    def __init__(
        self, spec: str, freeze: Sequence[str] = ("vision",), lora: int = 0, image_size: int | None = None
    ) -> None:
        import transformers

        super().__init__()
        folder, told = locate(source_of(spec, "vlm"))
        family = told.get("model_type", "")
        if family not in LAYOUTS:
            raise unknown_name("vision-language architecture", family, LAYOUTS)
        self.family, self.layout, self.config = (
            family,
            LAYOUTS[family],
            transformers.AutoConfig.for_model(**told),
        )
        self.model = _open(folder, self.config)
        self.width: int = self.config.text_config.hidden_size
        eyes = self.config.vision_config if family.startswith("qwen") else self.config
        self.frames = Frames(folder, family, eyes, image_size, torch.float32)
        self._tokenizer = _tokenizer(folder)
        self._marks = self._image_marks()
        self._frozen = self._parameters_of(freeze)
        if lora:
            self._add_lora(lora)
        self.hold()

    # what trains

    def _parameters_of(self, groups: Sequence[str]) -> set[nn.Parameter]:
        found: set[nn.Parameter] = set()
        language = self.model.language_model
        merger = set(self.model.get_submodule(self.layout["merger"]).parameters())
        for group in groups:
            layers = re.fullmatch(r"llm\[(\d*):(\d*)\]", group)
            if layers:
                first, last = (int(n) if n else None for n in layers.groups())
                found |= {p for layer in language.layers[first:last] for p in layer.parameters()}
            elif group == "llm":
                found |= {p for n, p in language.named_parameters() if not n.startswith("embed_tokens")}
            elif group == "embeddings":
                found |= set(language.embed_tokens.parameters())
            elif group == "vision":
                found |= set(self.model.get_submodule(self.layout["vision"]).parameters()) - merger
            elif group == "merger":
                found |= merger
            else:
                raise unknown_name("freeze group", group, GROUPS)
        return found

    def _add_lora(self, rank: int) -> None:
        """Adapters beside every linear map of the language model; alpha is twice the rank."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise UsageError('LoRA needs peft\n  Install it:  pip install "dpipe[train]"') from None
        language = self.model.language_model
        self._frozen |= set(language.parameters())
        trainable = {p for p in self.model.parameters() if p not in self._frozen}
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS)
        inject_adapter_in_model(config, language)
        for parameter in trainable:  # peft freezes whatever is no adapter
            parameter.requires_grad_(True)

    def held(self) -> Iterable[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.named_parameters() if p in self._frozen]

    def recompute(self) -> None:
        """Gradient checkpointing, layer by layer."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # what it reads

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """B instructions -> int64 [B, P], padded with -1."""
        if self._tokenizer is None:
            raise DataError(
                f"no tokenizer beside the weights of the {self.family} model\n"
                "  expected tokenizer.json, as save_pretrained of its processor writes it"
            )
        rows = torch.full((len(texts), TEXT_TOKENS), -1, dtype=torch.int64)
        for i, text in enumerate(texts):
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) > TEXT_TOKENS:
                raise DataError(
                    f"an instruction of {len(ids)} tokens; at most {TEXT_TOKENS} are read\n  {text}"
                )
            rows[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return rows

    def _image_marks(self) -> tuple[list[int], list[int]]:
        """Tokens before and after an image."""
        if self.family == "qwen2_5_vl":
            return [self.config.vision_start_token_id], [self.config.vision_end_token_id]
        known = self._tokenizer.get_vocab() if self._tokenizer is not None else {}
        return [known[w] for w in ("<img>",) if w in known], [known[w] for w in ("</img>",) if w in known]

    def tokens_of_image(self, height: int, width: int) -> int:
        """Tokens of one camera's frame, its marks included."""
        rows, columns = self.frames.grid(height, width)
        return rows * columns + len(self._marks[0]) + len(self._marks[1])

    def look(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> image tokens [B, N, e] as the language model reads them."""
        pixels = self.frames.pixels(images)
        if self.family == "qwen2_5_vl":
            from .hf import qwen_patches

            patches, grid = qwen_patches(pixels, self.config.vision_config)
            found = self.model.visual(patches, grid_thw=grid).pooler_output
            return found.reshape(len(images), -1, self.width)
        return self.model.get_image_features(
            pixels,
            vision_feature_layer=self.config.vision_feature_layer,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
        ).pooler_output

    def forward(
        self, images: Sequence[Tensor], text: Tensor, extra: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 [B, H, W, 3] per camera, tokens [B, P] (-1 padding), vectors [B, Q, e]
        -> (hidden [B, n, e] of images and words, which of them are there [B, n] bool, hidden [B, Q, e])."""
        if text.is_meta:  # a blueprint: what comes out, without how
            count = sum(self.tokens_of_image(*image.shape[1:3]) for image in images) + text.shape[1]
            there = text.new_ones(len(text), count, dtype=torch.bool)
            asked = text.new_empty(
                len(text), 0 if extra is None else extra.shape[1], self.width, dtype=torch.float32
            )
            return asked.new_empty(len(text), count, self.width), there, asked
        embed, device = self.model.language_model.embed_tokens, text.device
        parts: list[Tensor] = []
        cells: list[Tensor] = []  # positions [3, n] within a part: time, row, column
        spans: list[int] = []  # how far a part moves the next one on
        for frames in images:
            rows, columns = self.frames.grid(frames.shape[1], frames.shape[2])
            before, after = (torch.tensor(mark, dtype=torch.int64, device=device) for mark in self._marks)
            for mark in (before, None, after):
                if mark is None:
                    parts.append(self.look(frames))
                    cells.append(self._image_positions(rows, columns, device))
                    spans.append(max(rows, columns) if self.family == "qwen2_5_vl" else rows * columns)
                elif len(mark):
                    parts.append(embed(mark).expand(len(text), -1, -1))
                    cells.append(torch.arange(len(mark), device=device).expand(3, -1))
                    spans.append(len(mark))
        begin = np.cumsum([0, *spans])
        seen = torch.cat([cell + int(at) for cell, at in zip(cells, begin, strict=False)], dim=1)
        # Padding stands between the words and the added vectors; it is not attended and takes no position.
        there = text >= 0
        words = int(begin[-1]) + torch.arange(text.shape[1], device=device)
        parts.append(embed(text.clamp(min=0)))
        count = 0 if extra is None else extra.shape[1]
        length = there.sum(1, keepdim=True)
        places = [seen[:, None].expand(-1, len(text), -1), words.expand(3, len(text), -1)]
        if extra is not None:
            parts.append(extra.to(parts[-1].dtype))
            added = int(begin[-1]) + length + torch.arange(count, device=device)
            places.append(added.expand(3, -1, -1))
        inputs = torch.cat([part.to(parts[-1].dtype) for part in parts], dim=1)
        present = torch.cat([there.new_ones(len(text), seen.shape[1]), there], dim=1)
        mask = torch.cat([present, there.new_ones(len(text), count)], dim=1)
        position = torch.cat(places, dim=2)
        hidden = self.model.language_model(
            inputs_embeds=inputs,
            attention_mask=mask.long(),
            position_ids=position if self.family == "qwen2_5_vl" else position[0],
            use_cache=False,
        ).last_hidden_state
        read = present.shape[1]
        return hidden[:, :read], present, hidden[:, read:]

    def _image_positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """[3, rows * columns]: Qwen2.5-VL turns time, row and column apart; the others count tokens."""
        if self.family != "qwen2_5_vl":
            return torch.arange(rows * columns, device=device).expand(3, -1)
        row = torch.arange(rows, device=device).repeat_interleave(columns)
        column = torch.arange(columns, device=device).repeat(rows)
        return torch.stack([torch.zeros_like(row), row, column])


def _open(folder: Path | None, config: Any) -> Any:
    """The model without its language head; every weight comes from the folder."""
    import transformers

    if folder is None or is_blueprint():
        return transformers.AutoModel.from_config(config)
    said = transformers.logging.get_verbosity()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # the language head is not wanted, and that is no news
    try:
        model, told = transformers.AutoModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    finally:
        transformers.logging.set_verbosity(said)
        transformers.logging.enable_progress_bar()
    missing = sorted(told["missing_keys"]) + sorted(str(key) for key in told["mismatched_keys"])
    if missing:
        raise DataError(
            f"{folder} does not hold the model its config.json describes\n"
            f"  missing or of another shape: {len(missing)} tensors, {', '.join(missing[:3])}"
        )
    return model


def _tokenizer(folder: Path | None) -> Any:
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


class VlmEncoder(nn.Module):
    """`blocks.ObservationEncoder` with a vision-language model in it: one moment -> tokens [B, N, d]."""

    def __init__(
        self,
        vlm: Vlm,
        cameras: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        width: int,
    ) -> None:
        super().__init__()
        self.cameras, self.vlm = tuple(cameras), vlm
        self.enter = nn.Linear(vlm.width, width)
        self.state = nn.Sequential(StateScale(mean, std), mlp(len(mean), width, width))

    def forward(self, images: Sequence[Tensor], state: Tensor, text: Tensor) -> Tensor:
        hidden, present, _ = self.vlm(images, text[:, TEXT_LENGTH:])
        # A padded place holds the same vector whatever the words: nothing of the batch leaks into a sample.
        tokens = self.enter(torch.where(present[..., None], hidden, 0.0))
        return torch.cat([tokens, self.state(state)[:, None]], dim=1)
