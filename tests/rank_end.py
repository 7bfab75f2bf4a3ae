"""How a rank that has done its work says its losses and ends its process."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn


def say(out: str, losses: Mapping[int, float]) -> Path:
    """Writes the losses of a run by step into its folder, which is made; returns the folder."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "losses.json").write_text(json.dumps(losses))
    return folder


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
