"""How the commands end: errors that a user can cause are one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

import typer
from rich.console import Console

from .ir import InvalidInput, ShardwrightError

_ClickException: type[Exception] = typer.BadParameter.__mro__[2]
"""What the arguments of a command line raise: typer brings its own click, or uses the installed."""
errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def command_line() -> typer.Typer:
    """A command line without commands."""
    return typer.Typer(
        add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
        help="Plans and compiles parallel training.",
    )  # fmt: skip


def run(app: typer.Typer) -> None:
    """Runs a command line; errors a user can cause are one line and an exit code."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except _ClickException as error:  # an unknown flag, a number that is none
        message = getattr(error, "format_message", error.__str__)()
        errors.print(f"shardwright: {' '.join(message.split())}")
        code = InvalidInput.exit_code
    except typer.Abort:
        code = 130
    sys.exit(code)


def guarded(action: Callable[[], None], debug: bool) -> None:
    """Runs a command; `debug` leaves tracebacks as they are."""
    try:
        action()
    except ShardwrightError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        _fail("the reader of the output went away", 1)
    except (OSError, MemoryError) as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {error}", InvalidInput.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except typer.Exit:
        raise
    except Exception as error:
        if debug:
            raise
        _fail(f"internal error, please report it (--debug shows where): {error!r}", 1)


def _fail(message: str, code: int) -> NoReturn:
    errors.print(f"shardwright: {' '.join(message.split())}")
    raise typer.Exit(code)
