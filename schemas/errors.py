"""The two ways a user hears no: their data is not what it should be, or their words are not.

Both carry one finished message: what was expected, what was found, where, what to do next.
`cli` prints the message alone and exits 1 or 2; anything else that escapes is our own fault.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class DpipeError(Exception):
    """Base of every error whose message is written for the user."""

    exit_code = 1


class DataError(DpipeError):
    """A recording, dataset or target is not what its format promises. Exit code 1."""


class UsageError(DpipeError):
    """The command's words cannot be acted on. Exit code 2."""

    exit_code = 2


class Interrupted(DpipeError):
    """Stopped on request or out of time; the same command goes on. Exit code 75 (EX_TEMPFAIL)."""

    exit_code = 75


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not in `known`: lists what is, nearest first."""
    names = sorted(known)
    nearest = get_close_matches(name, names, n=1)
    hint = f"  Did you mean '{nearest[0]}'?" if nearest else ""
    return UsageError(f"unknown {kind} '{name}'.{hint}\n  known: {', '.join(names) or '(none)'}")


# What reading a file whose parts are of other kinds than its format says raises in the code that reads it.
MALFORMED = (
    *(KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError),
    OSError,
)


@contextmanager
def malformed_as(where: object, remedy: str) -> Iterator[None]:
    """Metadata from strangers, parsed within: whatever is wrong with it is one message, not a traceback."""
    try:
        yield
    except DpipeError:
        raise
    except MALFORMED as error:
        words = " ".join(str(error).split())[:200]
        raise DataError(
            f"{where} is damaged\n  found: {type(error).__name__}: {words}\n  {remedy}"
        ) from error
