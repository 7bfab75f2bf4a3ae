"""Checkpoints through orbax: parameters, AdamW's state, and the progress of the run.

Every process writes the shards that it has. Without pipeline stages, how arrays are stored depends
on the model alone (but for inner factors that an axis splits), and orbax reads what another
sharding asks for. Where stages stack other layers, relayout.py reads slices.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import model
import orbax.checkpoint as ocp
import reads
import settings
from following import follow
from relayout import Reader, kept_form, places

KEPT = 2  # whole checkpoints that stay in a folder


@dataclass
class Progress:
    """How far a run has come: steps done, samples trained on, and its seed."""

    step: int = 0
    samples: int = 0
    seed: int = 0


def manager(folder: str | Path) -> ocp.CheckpointManager:
    """Of the checkpoints in a folder."""
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT)
    return ocp.CheckpointManager(Path(folder).resolve(), options=options)


def save(kept: ocp.CheckpointManager, params: Any, state: Any, progress: Progress) -> None:
    """Writes `FOLDER/STEP`; it appears under that name only when it is whole."""
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(kept_form(params, progress.step)),
        state=ocp.args.StandardSave(kept_form(state, progress.step)),
        progress=ocp.args.JsonSave(asdict(progress)),
        places=ocp.args.JsonSave(places()),
    )
    kept.save(progress.step, args=items, force=True)


def resume(folder: str | Path, params: Any, state: Any) -> tuple[Any, Any, Progress]:
    """The newest checkpoint of a folder, laid out as `params` and `state` are (arrays, or their
    shapes with shardings); or what a list of reads in the folder says."""
    if (Path(folder) / reads.FILE).exists():
        params, state, known = follow(Path(folder), params, state)
        samples = known["step"] * settings.GLOBAL_BATCH
        return params, state, Progress(**{"samples": samples, **known})
    with manager(folder) as kept:
        newest = kept.latest_step()
        if newest is None:
            raise SystemExit(f"no checkpoint in {folder}: expected {folder}/STEP")
        found = kept.restore(
            newest,
            args=ocp.args.Composite(progress=ocp.args.JsonRestore(), places=ocp.args.JsonRestore()),
        )
        progress = Progress(**found["progress"])
        if model.STAGES or found["places"] != places():
            items = [Path(folder) / str(newest) / item for item in ("params", "state")]
            readers = [Reader(item, found["places"]) for item in items]
            return readers[0].read(params), readers[1].read(state), progress
        wanted = ocp.args.Composite(
            params=ocp.args.StandardRestore(jax.tree.map(_shape, params)),
            state=ocp.args.StandardRestore(jax.tree.map(_shape, state)),
        )
        found = kept.restore(newest, args=wanted)
    return found["params"], found["state"], progress


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
