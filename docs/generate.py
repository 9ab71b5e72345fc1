"""Writes docs/{sources,stages,recipes}/*.md and docs/commands.md from the code's own docstrings and options.

    python docs/generate.py [--into FOLDER]

A page is a module's docstring, an example that the tests run, and a table of its options. To change what a page
says, change the code: a test compares the pages with what this program would write.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from dpipe.cli import cli
from dpipe.commands import COMMANDS, load_command
from dpipe.commands.options import field_comments
from dpipe.converters import MAPPED, SOURCES, load_converter
from dpipe.schemas.features import Feature
from dpipe.stages import STAGES, load_stage
from dpipe.trainer import RECIPES, open_recipe
from dpipe.trainer.loop import Options

NOTE = "<!-- Written by docs/generate.py from the code; `make docs` writes it anew. -->\n"

SOURCE_EXAMPLES = {
    "lerobot": "dpipe sample libero --episodes 2\ndpipe convert libero --to lerobot\n"
    "dpipe convert lerobot --raw lerobot/libero --name copy",
}

# Stages and recipes that stand on a small policy train it first, for minutes; the examples ask for less.
BASES = {
    "teacher": "teacher",
    "residuals": "anchor",
    "privileged": "flow",
    "vita": "teacher",
    "anchorrefine": "anchor",
    "pfd": "flow",
}


def pages() -> dict[str, str]:
    """Every generated page by its path below docs/."""
    found = {f"sources/{name}.md": source_page(name) for name in SOURCES}
    found["sources/own-files.md"] = own_files_page()
    found |= {f"stages/{name}.md": stage_page(name) for name in STAGES}
    found |= {f"recipes/{name}.md": recipe_page(name) for name in RECIPES}
    found["commands.md"] = commands_page()
    found["README.md"] = index_page()
    return found


def source_page(name: str) -> str:
    converter = load_converter(name)
    example = SOURCE_EXAMPLES.get(
        name, f"dpipe sample {name} --episodes 2\ndpipe convert {name} --to lerobot"
    )
    parts = opening(name, import_module(converter.Options.__module__))
    parts.append(f"Expected below `raw/{name}/` or `--raw`:\n\n```text\n{converter.expects}\n```\n")
    parts.append(shell(example))
    if converter.embodiment is not None:
        embodiment = converter.embodiment(converter.Options(), "")
        parts.append("## Features\n\nAs the default options make them.\n")
        parts.append(feature_table(embodiment.features, embodiment.sidecar))
    parts.append(
        "## Options\n\nBeside those of every conversion ([commands](../commands.md#dpipe-convert)).\n"
    )
    parts.append(option_table(converter.Options))
    return "\n".join(parts)


def own_files_page() -> str:
    converter = load_converter(MAPPED)
    parts = opening("own files", import_module(converter.Options.__module__))
    parts.append("How to use it is told step by step in [your own HDF5 logs](../tutorial-own-files.md).\n")
    return "\n".join(parts)


def stage_page(name: str) -> str:
    stage = load_stage(name)
    parts = opening(name, import_module(stage.Params.__module__))
    parts.append(shell(example(name, f"dpipe precompute {name}")))
    if stage.recipes:
        links = ", ".join(f"[{recipe}](../recipes/{recipe}.md)" for recipe in stage.recipes)
        parts.append(f"Trained on by {links}.\n")
    parts.append("## Options\n")
    parts.append(option_table(stage.Params))
    return "\n".join(parts)


def recipe_page(name: str) -> str:
    recipe = open_recipe(name)
    module = import_module(recipe.config.__module__)
    parts = opening(name, module)
    is_base = name in BASES.values()
    parts.append(
        shell(example("", train_base(name)) if is_base else example(name, f"dpipe train {name} --steps 8"))
    )
    parts.append(
        f"`--steps` is {recipe.steps} unless given; datasets and targets that are missing are made first.\n"
    )
    parts.append("## Options of the recipe\n")
    parts.append(option_table(recipe.config))
    parts.append("## Options of the run\n")
    parts.append(option_table(Options, recipe.options))
    return "\n".join(parts)


def commands_page() -> str:
    parts = ["# Commands\n", NOTE]
    # Below the program itself, as a user's call is: a command keeps the first help option that it is asked for.
    top = click.Context(cli, info_name="dpipe", **{**cli.context_settings, "max_content_width": 100})
    for title, section in COMMANDS.items():
        parts.append(f"## {title}\n")
        for name in section:
            command = load_command(name)
            context = click.Context(command, info_name=name, parent=top, terminal_width=100)
            parts.append(f"### dpipe {name}\n\n```text\n{command.get_help(context).rstrip()}\n```\n")
            if name == "convert":  # the group's help lists sources; the options stand at each
                source = command.get_command(context, "libero")
                assert source is not None
                inner = click.Context(source, info_name="libero", parent=context, terminal_width=100)
                parts.append(f"```text\n{source.get_help(inner).rstrip()}\n```\n")
    return "\n".join(parts)


def index_page() -> str:
    def listed(folder: str, table: dict[str, str]) -> str:
        return "\n".join(f"- [{name}]({folder}/{name}.md): {text}" for name, text in table.items()) + "\n"

    return "\n".join(
        [
            "# Documents\n",
            NOTE,
            "- [Your own HDF5 logs](tutorial-own-files.md): from files dpipe has never seen to a dataset",
            "- [On a cluster](clusters.md): job arrays, SLURM, Dask",
            "- [Is it sound?](doctor.md): what `dpipe doctor` finds, and how it keeps from crying wolf",
            "- [Real models](real-models.md): vision towers, vision-language models and policies from elsewhere",
            "- [Targets in any trainer](targets.md): lerobot, openpi, starVLA, or a loop of your own",
            "- [Commands](commands.md): the whole command line\n",
            "## Sources\n",
            listed("sources", SOURCES | {"own-files": "HDF5 files of an unknown kind, by a map"}),
            "## Stages\n",
            listed("stages", STAGES),
            "## Recipes\n",
            listed("recipes", RECIPES),
        ]
    )


# --- pieces -------------------------------------------------------------------------------------------------


def opening(name: str, module: Any) -> list[str]:
    """Title, the docstring's first paragraph as text and the rest as it stands in the code."""
    text = inspect.getdoc(module) or ""
    first, _, rest = text.partition("\n\n")
    where = Path(str(module.__file__)).resolve().relative_to(Path(__file__).resolve().parent.parent)
    parts = [f"# {name}\n", NOTE, " ".join(first.split()) + f" ([code](../../{where}))\n"]
    return [*parts, f"```text\n{rest}\n```\n"] if rest else parts


def example(name: str, command: str) -> str:
    """A command after some recordings, and after a base policy trained for a few steps where it needs one."""
    base = f"{train_base(BASES[name])}\n" if name in BASES else ""
    return f"dpipe sample libero --episodes 4\n{base}{command}"


def train_base(recipe: str) -> str:
    """One wording on every page, so that whoever follows several in one workspace trains it once."""
    return f"dpipe train {recipe} --steps 20"


def shell(commands: str) -> str:
    return f"```sh\n{commands}\n```\n"


def feature_table(features: Iterable[Feature], sidecar: Iterable[Feature]) -> str:
    rows = [(f.name, f, "") for f in features] + [
        (f.name, f, "beside the dataset, in dpipe/columns") for f in sidecar
    ]
    lines = ["| feature | dimensions | unit | frame | |", "|---|---|---|---|---|"]
    for name, feature, place in rows:
        names = ", ".join(feature.names[:8]) + (f", ... {feature.names[-1]}" if feature.dim > 8 else "")
        lines.append(f"| `{name}` | {feature.dim}: {names} | {feature.unit} | {feature.frame} | {place} |")
    return "\n".join(lines) + "\n"


def option_table(kind: type, values: Any = None) -> str:
    """Flag, default, and what it is for; `values`: an instance whose values stand for the defaults."""
    told = field_comments(kind)
    lines = ["| option | default | |", "|---|---|---|"]
    for item in fields(kind):
        default = item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc]
        default = default if values is None else getattr(values, item.name)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        text = str(item.metadata.get("help", "")) or told.get(item.name, "")
        choices = item.metadata.get("choices")
        text += f" ({', '.join(map(str, choices))})" if choices else ""
        value = f"`{shown}`" if shown not in ("", "None") else ""
        text = text.replace("|", "\\|")
        lines.append(f"| `--{item.name.replace('_', '-')}` | {value} | {text} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "None.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--into", type=Path, default=Path(__file__).resolve().parent)
    into = parser.parse_args().into
    for name, text in pages().items():
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (into / name).write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
