"""`python -m shardwright`, and the command `shardwright`."""

from __future__ import annotations

import sys

from .terminal import command_line, guarded, run


def main() -> None:
    """Runs the command line. Conversions start without the planner and its libraries."""
    if sys.argv[1:2] in (["convert"], ["inspect"]):
        from .checkpoint.command import register

        app = command_line()
        register(app, guarded)
    else:
        from .cli import app
    run(app)


if __name__ == "__main__":
    main()
