"""The devices of a verification: runs emitted folders, one after another, on host CPU devices.

A script, not a part of the package: `python verify_worker.py JOB.json` imports jax once and, for
every case, the modules of its folder as the folder's train.py does. Per case it leaves in the
case's `out` folder:

    result.safetensors        loss, and every gradient under the model's own names
    error                     instead, if it failed: the traceback
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file


def main(job_file: str) -> int:
    """Runs the cases; returns the exit status."""
    for case in json.loads(Path(job_file).read_text()):
        out = Path(case["out"])
        try:
            _run(case, out)
        except BaseException as failure:
            said = str(failure).strip().splitlines()
            last = f"{type(failure).__name__}: {said[0]}" if said else type(failure).__name__
            (out / "error").write_text(f"{traceback.format_exc()}\n{last}\n")
    return 0


def _run(case: dict[str, Any], out: Path) -> None:
    """One emitted program's gradients on the batch that is given."""
    folder = case["folder"]
    before = set(sys.modules)
    sys.path.insert(0, folder)
    try:
        _gradients(case, out)
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                del sys.modules[name]
        jax.clear_caches()


def _gradients(case: dict[str, Any], out: Path) -> None:
    import settings  # type: ignore[import-not-found]  # the emitted folder's, as all imports here

    settings.PRECISION = case["precision"]
    import model  # type: ignore[import-not-found]
    import parallel  # type: ignore[import-not-found]
    import weights  # type: ignore[import-not-found]

    step = importlib.import_module("pipeline" if model.STAGES else "step")

    params = weights.load_weights(case["weights"])
    specs = parallel.batch_specs()
    batch = {
        name: jax.device_put(rows, parallel.sharding(specs[name]))
        for name, rows in load_file(case["batch"]).items()
    }
    loss, gradients = step.gradients()(params, batch, None)
    found = {name: np.ascontiguousarray(g) for name, g in parallel.by_name(gradients).items()}
    save_file({"loss": np.asarray(loss), **found}, out / "result.safetensors")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
