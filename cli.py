"""The command line, on top of everything: finds the command, turns what it raises into a message and an exit code.

Results go to stdout, progress to stderr. Exit codes: 0 done; 1 the data or the run failed; 2 wrong usage;
3 finished, but episodes were left out; 75 stopped on request, run the same command again.
"""

from __future__ import annotations

import json
import os
import sys
from typing import NoReturn

import click

from .commands import COMMANDS, load_command
from .schemas.errors import DpipeError

# Before numpy is imported anywhere: workers are processes, and idle BLAS threads spin beside them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class Commands(click.Group):
    """Every command of the table, none imported before it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for section in COMMANDS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return load_command(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, section in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl(list(section.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dpipe")
def cli() -> None:
    """From raw robot logs to a trained policy.

    \b
    dpipe convert libero --to lerobot     raw recordings -> LeRobot v3.0 dataset
    dpipe precompute tokens               dataset -> supervision targets
    dpipe train libra                     targets -> policy (builds what is missing)

    Without data of your own:  dpipe sample libero
    """


def main() -> None:
    """Entry point: every error of the user's becomes one message and an exit code."""
    debug = "--debug" in sys.argv
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        _end("stopped", 75)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        usage = error.ctx.get_usage() + "\n" if isinstance(error, click.UsageError) and error.ctx else ""
        _end(f"{usage}error: {error.format_message()}", 2)
    except DpipeError as error:
        if debug:
            raise
        _end(f"error: {error}", error.exit_code)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        _end(
            f"error: {type(error).__name__}: {error}\n"
            "  This is a fault of dpipe; run again with --debug for the traceback.",
            1,
        )


def _end(text: str, code: int) -> NoReturn:
    """The last word on stderr: a line of text, or with --json the last event."""
    if "--json" in sys.argv:
        text = json.dumps({"event": "end of run", "text": text, "exit_code": code}, ensure_ascii=False)
    click.echo(text, err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
