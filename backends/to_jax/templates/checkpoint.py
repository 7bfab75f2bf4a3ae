"""Checkpoints through orbax: parameters, AdamW's state, and the progress of the run.

Every process writes the shards that it has. How arrays are stored depends on the model alone (but
for inner factors that an axis splits), so that another layout restores them: orbax reads what the
new sharding asks for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

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
        params=ocp.args.StandardSave(params),
        state=ocp.args.StandardSave(state),
        progress=ocp.args.JsonSave(asdict(progress)),
    )
    kept.save(progress.step, args=items, force=True)


def resume(folder: str | Path, params: Any, state: Any) -> tuple[Any, Any, Progress]:
    """The newest checkpoint of a folder, laid out as `params` and `state` are (arrays, or their
    shapes with shardings)."""
    with manager(folder) as kept:
        newest = kept.latest_step()
        if newest is None:
            raise SystemExit(f"no checkpoint in {folder}: expected {folder}/STEP")
        wanted = ocp.args.Composite(
            params=ocp.args.StandardRestore(jax.tree.map(_shape, params)),
            state=ocp.args.StandardRestore(jax.tree.map(_shape, state)),
            progress=ocp.args.JsonRestore(),
        )
        found = kept.restore(newest, args=wanted)
    return found["params"], found["state"], Progress(**found["progress"])


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
