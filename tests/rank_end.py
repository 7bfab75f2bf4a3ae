"""How a rank that has done its work ends its process."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def end() -> NoReturn:
    """Runs what was to run at exit, then ends without taking the interpreter down.

    Threads of gloo may abort an interpreter that goes down (pytorch issue 190489). Processes that
    the rank has started (Megatron's queue of written files is one) end by exit hooks; left alone,
    they would hold the rank's output open for good.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
