"""How large a run is, before anything is made: parameters, memory, tokens per step.

    sizes = size_up("libra", preset="paper")
    print(sizes.table)

The policy is built as a blueprint (`models/backbones.py`): shapes without storage, so that billions of parameters are
counted in seconds on a laptop. One sample goes through it the same way, and every transformer layer says how many
tokens it was given.

Memory of one process that holds the whole policy, in bytes
    weights        4 x parameters                    float32, as the loop keeps them whatever it computes in
    gradients      4 x trainable
    optimiser      8 x trainable                     AdamW: two moments
    average        4 x state of a checkpoint         with `ema`
    activations    34 x tokens x width a layer       16-bit, attention without its matrix (Korthikanti et al.,
                                                     2022, Sec 4); 68 in float32; 2 (or 4) with `recompute`, and
                                                     one layer's worth. Layers without gradients keep none
Activations are rough: they leave out convolutions, heads and the allocator.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..models.backbones import Held, TowerEye, blueprint, hold_backbones, left_out
from ..models.blocks import TEXT_LENGTH
from ..models.vlm import TEXT_TOKENS, Vlm
from . import open_recipe
from .draws import Draws
from .loop import Options
from .presets import assumed_facts, libero_space, preset_of
from .recipe import Recipe, resolve
from .space import STATE, Space


@dataclass(frozen=True)
class Module:
    """One line of the table; `trainable` has an entry per phase."""

    name: str
    parameters: int
    trainable: Mapping[str, int]


@dataclass(frozen=True)
class Stack:
    """Transformer layers of one width in a row: tokens of one sample, and whether they keep activations."""

    name: str
    layers: int
    width: int
    tokens: int
    kept: bool


@dataclass(frozen=True)
class Sizes:
    """`memory` in bytes by part, for the phase that needs most; `batch` is what one process computes at a time."""

    recipe: str
    preset: str
    steps: int
    batch_size: int
    batch: int
    modules: tuple[Module, ...]
    stacks: tuple[Stack, ...]
    memory: Mapping[str, int]
    half: bool
    ours: str = ""

    @property
    def parameters(self) -> int:
        return sum(module.parameters for module in self.modules)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that enter a transformer, all stacks and the whole batch together."""
        return self.batch_size * sum(stack.tokens for stack in self.stacks)

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "parameters": self.parameters,
            "tokens_per_step": self.tokens_per_step,
            "memory_total": sum(self.memory.values()),
        }

    @property
    def table(self) -> str:
        phases = list(self.modules[0].trainable)
        heads = ["trainable"] if len(phases) == 1 else [f"in {phase}" for phase in phases]
        rows = [["module", "parameters", *heads]]
        rows += [
            [m.name, f"{m.parameters:,}", *(f"{m.trainable[p]:,}" for p in phases)] for m in self.modules
        ]
        sums = [sum(m.trainable[p] for m in self.modules) for p in phases]
        rows.append(["total", f"{self.parameters:,}", *(f"{n:,}" for n in sums)])
        lines = _aligned(rows)
        rows = [["transformer", "layers", "width", "tokens a sample"]]
        rows += [[s.name, str(s.layers), f"{s.width:,}", f"{s.tokens:,}"] for s in self.stacks]
        lines += ["", *_aligned(rows)]
        lines += [
            f"tokens per step {self.tokens_per_step:,}: {self.batch_size} samples; {self.steps:,} steps",
            "",
            *_aligned([["memory of one process", ""], *([n, _bytes(v)] for n, v in self.memory.items())]),
            f"total {_bytes(sum(self.memory.values()))}; activations are rough, of {self.batch} samples at a time "
            f"in {'16' if self.half else '32'} bits",
        ]
        if self.ours:
            lines += ["", f"not the paper's: {self.ours}"]
        return "\n".join(lines)


def size_up(
    recipe: str,
    config: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    steps: int | None = None,
    preset: str = "",
    space: Space | None = None,
    half: bool | None = None,
) -> Sizes:
    """Sizes of a run as `train` would start it; without a `space`, for LIBERO's cameras, state and action.

    Targets are taken to be of the preset's sizes (`presets.SUPERVISION`). `half`: computed in 16 bits; by
    default as `precision` says, where `auto` counts on a GPU.
    """
    made, named = open_recipe(recipe), preset_of(recipe, preset)
    resolved = resolve(recipe, made.config, {**named.config, **(config or {})})
    base = {entry.name: getattr(made.options, entry.name) for entry in fields(Options)}
    chosen = resolve("train", Options, {**base, **named.options, **(options or {})})
    count = steps or named.steps or made.steps
    space = space or libero_space()
    facts = assumed_facts(recipe, preset, space)
    with blueprint():
        model = made.build(resolved, space, facts)
    phases = made.phases(resolved, count)
    trainable: dict[str, set[str]] = {}
    for phase in phases:
        model.begin(phase)
        hold_backbones(model)
        trainable[phase.name] = {name for name, p in model.named_parameters() if p.requires_grad}
    stacks = measure(made, resolved, model, space, facts)
    short: bool = chosen.precision != "float32" if half is None else half
    batch = chosen.batch_size // chosen.accumulate
    return Sizes(
        recipe=recipe,
        preset=preset,
        steps=count,
        batch_size=chosen.batch_size,
        batch=batch,
        modules=_modules(model, trainable),
        stacks=stacks,
        memory=_memory(model, trainable, stacks, chosen, batch, short),
        half=short,
        ours=named.ours,
    )


def _modules(model: nn.Module, trainable: Mapping[str, set[str]]) -> tuple[Module, ...]:
    """Parameters by module, two levels down; a backbone is a line of its own, its parts apart."""
    held = [name for name, module in model.named_modules() if isinstance(module, Held)]
    lines: dict[str, list[tuple[str, int]]] = {}
    for name, parameter in model.named_parameters():
        within = next((prefix for prefix in held if name.startswith(prefix + ".")), None)
        if within is None:
            path = [part for part in name.split(".")[:-1] if not part.isdigit()]
            alone = len(path) == 1 and any(model.get_submodule(path[0]).children())  # planner.queries
            line = ".".join(path[:2]) if path and not alone else name
        else:
            line = f"{within}.{name.removeprefix(within + '.').removeprefix('model.').split('.')[0]}"
        lines.setdefault(line, []).append((name, parameter.numel()))
    return tuple(
        Module(
            line,
            sum(count for _, count in members),
            {phase: sum(n for name, n in members if name in free) for phase, free in trainable.items()},
        )
        for line, members in lines.items()
    )


def _memory(
    model: nn.Module,
    trainable: Mapping[str, set[str]],
    stacks: tuple[Stack, ...],
    options: Options,
    batch: int,
    half: bool,
) -> dict[str, int]:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    moving = max(sum(sizes[name] for name in free) for free in trainable.values())
    elsewhere = left_out(model)
    per = 34 if half else 68
    whole = [batch * s.tokens * s.width for s in stacks if s.kept]
    layers = [s.layers for s in stacks if s.kept]
    activations = sum(per * n * size for n, size in zip(layers, whole, strict=True))
    if options.recompute:
        inputs = sum(per // 17 * n * size for n, size in zip(layers, whole, strict=True))
        activations = inputs + per * max(whole, default=0)
    found = {
        "weights": 4 * sum(sizes.values()),
        "gradients": 4 * moving,
        "optimiser": 8 * moving,
        "average": 4 * sum(n for name, n in sizes.items() if name not in elsewhere) if options.ema else 0,
        "activations": activations,
    }
    return {name: value for name, value in found.items() if value}


# -- one sample through the blueprint ---------------------------------------------------------------------


def measure(
    recipe: Recipe, config: Any, model: Any, space: Space, facts: Mapping[str, Any]
) -> tuple[Stack, ...]:
    """Every stack of transformer layers that one sample passes in a training step."""
    seen: dict[tuple[str, int], list[Any]] = {}
    names = {module: name for name, module in model.named_modules()}

    def count(stack: str, width: int, tokens: int, kept: bool) -> None:
        entry = seen.setdefault((stack, width), [0, tokens, kept])
        entry[0] += 1

    def layer(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        tokens = given[0]
        kept = any(p.requires_grad for p in module.parameters())
        count(names[module].rpartition(".")[0], tokens.shape[-1], tokens.numel() // tokens.shape[-1], kept)

    hooks = [m.register_forward_hook(layer) for m in model.modules() if getattr(m, "recomputable", False)]
    model.eval()
    batch, side = sample(recipe, config, space, facts)
    try:
        if recipe.name != "pfd":  # no transformer trains there; its adapter takes rows of the cache
            with torch.no_grad():
                model(batch, Draws.of_step(0, 0, 0, 1, "meta"))
    finally:
        for hook in hooks:
            hook.remove()
    stacks = [Stack(name, *_row(width, entry)) for (name, width), entry in seen.items()]
    for name, module in model.named_modules():
        if isinstance(module, Vlm):
            stacks += _of_vlm(name, module, model, len(space.cameras), side, facts)
        elif isinstance(module, TowerEye):
            stacks.append(_of_tower(name, module, len(space.cameras), side))
    if recipe.name == "pfd":
        from .presets import SUPERVISION

        draws = SUPERVISION["paper"].draws
        stacks.append(Stack("adapter", 3, config.width, draws * facts["base"]["chunk"], True))
    return tuple(stacks)


def _row(width: int, entry: list[Any]) -> tuple[int, int, int, bool]:
    layers, tokens, kept = entry
    return layers, width, tokens, kept


def _of_vlm(
    name: str, vlm: Vlm, model: Any, cameras: int, side: tuple[int, int], facts: Mapping[str, Any]
) -> list[Stack]:
    """Its eyes and its language model, the vectors a recipe adds included."""
    added = {"student.vlm": 4, "foresee.vlm": facts.get("tokens", 0)}.get(
        name, 0
    )  # state and actions; queries
    language = vlm.config.text_config
    tokens = cameras * vlm.tokens_of_image(*side) + TEXT_TOKENS + added
    rows, columns = vlm.frames.grid(*side, unmerged=True)
    eyes = vlm.config.vision_config
    depth = getattr(eyes, "depth", None) or eyes.num_hidden_layers
    free = any(p.requires_grad for p in vlm.model.get_submodule(vlm.layout["vision"]).parameters())
    return [
        Stack(f"{name}.vision", depth, eyes.hidden_size, cameras * rows * columns, free),
        Stack(f"{name}.language_model", language.num_hidden_layers, language.hidden_size, tokens, True),
    ]


def _of_tower(name: str, eye: TowerEye, cameras: int, side: tuple[int, int]) -> Stack:
    config = eye.tower.frames.config
    config = getattr(config, "vision_config", config)
    rows, columns = eye.tower.frames.grid(*side, unmerged=True)
    depth = getattr(config, "depth", None) or config.num_hidden_layers
    return Stack(name, depth, config.hidden_size, cameras * rows * columns, not eye.frozen)


def sample(
    recipe: Recipe, config: Any, space: Space, facts: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[int, int]]:
    """(a batch of one sample on the meta device, as `to_tensors` and the targets would give it, frames' size)."""
    spec = recipe.spec(config, space, facts)
    steps = next(iter(spec.chunks.values()), 1)
    side = spec.size or (64, 64)
    dims = space.action_dim

    def of(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(1, *shape, dtype=kind, device="meta")

    cameras = space.cameras if spec.cameras is None else spec.cameras
    frames = {name: len(spec.at.get(name, spec.offsets)) for name in cameras}
    reads = any(getattr(config, name, "") for name in ("vlm",))
    batch: dict[str, Any] = {
        "state": of(len(spec.at.get(STATE, spec.offsets)), space.state_dim),
        "images": [of(frames[name], *side, 3, kind=torch.uint8) for name in cameras],
        "text": of(TEXT_LENGTH + TEXT_TOKENS * reads, kind=torch.int64),
        "action": of(steps, dims),
        "is_pad": of(steps, kind=torch.bool),
        "dims": torch.empty(dims, dtype=torch.bool, device="meta"),
    }
    if recipe.name == "libra":
        batch["tokens"] = of(recipe.targets(config)[1], dims, kind=torch.int64)
    elif recipe.name == "vita":
        batch["teacher"] = of(3, facts["width"])
    elif recipe.name == "dial":
        batch["foresight"] = of(2, facts["tokens"], facts["channels"])
    elif recipe.name == "anchorrefine":
        arm, grippers = len(facts["arm_dims"]), len(facts["gripper_dims"])
        batch["residuals_arm"], batch["residuals_delta"] = of(steps, arm), of(steps, arm)
        batch["residuals_grip_logit"] = batch["residuals_grip_target"] = of(steps, grippers)
        batch["residuals_is_pad"] = of(steps, kind=torch.bool)
    elif recipe.name == "flow":
        from ..models.flow_policy import FlowConfig

        shape = FlowConfig(space.cameras, (), (), dims, future=config.future).latent_shape
        batch["latents"] = of(*shape)
    return batch, (side[0], side[1])


# -- words ------------------------------------------------------------------------------------------------


def _aligned(rows: list[list[str]]) -> list[str]:
    """First column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.1f} GB"
