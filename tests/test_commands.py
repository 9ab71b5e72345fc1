"""The command line as a whole: every command is there, explains itself, and a slip of the finger is understood."""

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from dpipe.cli import cli
from dpipe.commands import COMMANDS, load_command
from dpipe.schemas.errors import UsageError

NAMES = [name for section in COMMANDS.values() for name in section]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_explains_itself_with_an_example(name: str):
    told = CliRunner().invoke(cli, [name, "--help"])
    assert told.exit_code == 0, told.output
    assert re.search(rf"^\s+dpipe .*\b{name}\b", told.output, re.M), f"no example in `dpipe {name} --help`"


@pytest.mark.parametrize("name", NAMES)
def test_the_table_names_the_command_and_its_line_fits_a_terminal(name: str):
    assert load_command(name).name == name
    summary = next(section[name] for section in COMMANDS.values() if name in section)
    assert summary.endswith(".") and len(summary) <= 80 - 16


def test_an_unknown_command_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'convert'"):
        cli.main(["convrt"], standalone_mode=False)


def test_every_option_says_what_it_is_for():
    """Also a guard that no option is called differently from one command to the next."""
    silent: list[str] = []
    for name in NAMES:
        command = load_command(name)
        if isinstance(command, click.Group):
            continue
        for option in command.params:
            if isinstance(option, click.Option) and not option.help and option.type.name != "choice":
                silent.append(f"{name} {option.opts[0]}")
    assert silent == []


def test_no_module_of_the_commands_is_without_a_command():
    modules = {path.stem for path in (Path(__file__).parent.parent / "commands").glob("*.py")}
    assert modules - {"__init__", "options", "datasets"} <= {name.replace("-", "_") for name in NAMES}
