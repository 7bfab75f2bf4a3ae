"""orbax (JAX): PyTree and Standard checkpoints, alone or as items of a CheckpointManager's step.

Arrays are zarr. What orbax writes is compressed and, by default, in OCDBT files that only
tensorstore can read: then an array's chunks are records whose bytes tensorstore makes when they are
asked for. What we write is plain zarr without compression, which orbax restores as its own, and
whose chunks are byte ranges of files like everything else here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..contents import Contents, Job, Target, Wanted
from . import Options
from .orbax_reading import items_of, steps_of
from .orbax_reading import read as _read
from .orbax_writing import target as _target


def found(root: Path) -> str | None:
    """The description of a tree, here, in an item, or in a step of a CheckpointManager."""
    if items_of(root):
        return "holds _METADATA of orbax"
    steps = steps_of(root)
    return f"holds step {steps[0].name} of an orbax CheckpointManager" if steps else None


def read(root: Path, options: Options) -> Contents:
    """The arrays of a checkpoint (of step `options.tag`, or the newest).

    optax's `mu`, `nu` and `count` become exp_avg, exp_avg_sq and the step, other arrays that it
    keeps by parameter states under their own names; what is no array goes along (`orbax_trees.py`).
    Raises InvalidInput where tensorstore is needed and not installed.
    """
    return _read(root, options)


def target(wanted: Sequence[Wanted], job: Job, options: Options) -> Target:
    """A step of a CheckpointManager as our JAX programs write it (`STEP/params`, `STEP/state` with
    the state of optax.adamw, `STEP/progress`), or, with the flag `tree`: `standard`, one tree for
    StandardCheckpointer (that of an orbax source, if it was one, else {"params": …, "opt_state":
    …}); `train_state`, one with the `step` of flax's TrainState beside these; `source`, the trees
    that an orbax source had, with all that was in them.

    The flag `nested` (false) makes nested dicts of names with dots; `chunk_bytes` bounds chunks.
    Raises InvalidInput for states that the tree has no place for.
    """
    return _target(wanted, job, options)
