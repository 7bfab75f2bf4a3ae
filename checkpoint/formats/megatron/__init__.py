"""Megatron's legacy checkpoints: `iter_N/mp_rank_TP[_PP][_EP]/model_optim_rng.pt` and
`distrib_optim.pt`.

iterations  which folder is read
model_order what the ranks have, and the order in which Megatron registers parameters
buckets     the flat buffers of the distributed optimizer
ranks       folders and files of ranks; rank_places, whether each lies in its own
old_names   of Megatron before its core
flat_state  the optimizer of torch_dist as flat buckets
training    arguments, param groups, schedule
reading, writing   both directions

Numbers of layers and experts are local in the files and global here. The shards of tensor ranks are
put together by the layout, as the first dim of every array (`Array.axes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...contents import Contents, Job, Target, Wanted
from .. import Options
from .iterations import iterations
from .ranks import MODEL, RANKS
from .reading import read as _read
from .writing import target as _target

__all__ = ["found", "read", "target"]


def found(root: Path) -> str | None:
    """Folders of ranks, here or in an iteration."""
    for folder in (root, *iterations(root)):
        if any(folder.glob(f"{RANKS}/{MODEL}")):
            return f"{folder.name} holds {RANKS}/{MODEL} of Megatron"
    return None


def read(root: Path, options: Options) -> Contents:
    """All ranks of an iteration (`options.tag`, or the newest).

    The flag `bucket_elements` is the run's ddp_bucket_size, where the arguments in the checkpoint
    do not tell it. Raises CorruptCheckpoint where ranks are missing or of different saves.
    """
    return _read(root, options)


def target(wanted: Sequence[Wanted], job: Job, options: Options) -> Target:
    """The folders of all ranks of `options.mesh` (tp, pp, vpp, ep), data-parallel rank 0 of each.

    Flags: `iteration`, `stages` (layers by pipeline rank, 8-8-7-9), `bucket_elements` and
    `grad_dtype` of the run that is to load it.
    """
    return _target(wanted, job, options)
