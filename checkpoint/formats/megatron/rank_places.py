"""Whether the files of ranks lie in their own folders: only a folder's name says whose it is.

What in a file knows its rank: the arguments (`rank`, of `world_size`), and the seeds of the random
number trackers, which Megatron counts up by rank. Without these, files tell by their contents, of
which the zips' checksums are enough: no two tensor ranks have all shards alike, and where copies of
norms agree with those of another stage alone, a file is of that stage.
Sources: megatron.core.parallel_state (order of ranks) and tensor_parallel.random
(model_parallel_cuda_manual_seed), megatron.training.initialize (_set_random_seed).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ....ir import CorruptCheckpoint
from ...pickles import Tensor, fields_of
from .ranks import Rank

_TRACKER = "model-parallel-rng"
_STATE_BYTES = 16  # of a CUDA generator: its seed and its offset, eight bytes each
_STAGE_SEEDS = 100
_COPIED = ("norm.weight", "norm.bias", "norm_weight", "norm_bias", "router.weight")


def reseeded(common: Mapping[str, Any], tp: int, pp: int) -> dict[str, Any]:
    """What the first rank keeps, as another one has it: its random number tracker as Megatron seeds
    it there, which draws other numbers."""
    listed: Any = common.get("rng_state")
    state = _state(listed)
    if state is None:
        return dict(common)
    data = state.storage.data or b""
    (seed,) = struct.unpack("<q", data[:8])
    moved = struct.pack("<q", seed + _STAGE_SEEDS * pp + tp) + data[8:]
    own = replace(state, storage=replace(state.storage, record=None, data=moved))
    first = listed[0] if isinstance(listed, list) else listed
    trackers = {**first["rng_tracker_states"], _TRACKER: own}
    changed = {**first, "rng_tracker_states": trackers}
    return {**common, "rng_state": [changed] if isinstance(listed, list) else changed}


def check_places(root: object, ranks: Sequence[Rank], mesh: Mapping[str, int]) -> None:
    """Raises CorruptCheckpoint where a file is known to be in another rank's folder."""
    for rank in ranks:
        _check_argument(root, rank, mesh)
    _check_seeds(root, ranks)
    _check_contents(root, ranks)


def _check_argument(root: object, rank: Rank, mesh: Mapping[str, int]) -> None:
    args = fields_of(rank.common.get("args"))
    number, world = args.get("rank"), args.get("world_size")
    if not isinstance(number, int) or args.get("use_tp_pp_dp_mapping"):
        return
    found = {"tp": number % mesh["tp"]}
    if isinstance(world, int) and world % mesh["pp"] == 0 and 0 <= number < world:
        found["pp"] = number // (world // mesh["pp"])
    for axis, place in found.items():
        if place != getattr(rank, axis):
            raise CorruptCheckpoint(
                f"{root}: {rank.folder} was saved by rank {number} of {world}, which is "
                f"{axis}={place}; files of ranks are swapped, or are of another save"
            )


def _check_seeds(root: object, ranks: Sequence[Rank]) -> None:
    bases: dict[str, int] = {}  # by folder: the seed less what its place adds
    for rank in ranks:
        state = _state(rank.common.get("rng_state"))
        if state is not None:
            (seed,) = struct.unpack("<q", (state.storage.data or b"")[:8])
            bases[rank.folder] = seed - _STAGE_SEEDS * rank.pp - rank.tp
    usual = Counter(bases.values()).most_common(1)
    for folder, base in bases.items():
        if base != usual[0][0]:
            raise CorruptCheckpoint(
                f"{root}: {folder} has the random numbers of another rank (a seed "
                f"{base - usual[0][0]:+d} from what its place makes it); files of ranks are "
                "swapped, or are of another save"
            )


def _state(rng_state: Any) -> Tensor | None:
    """The model-parallel generator's state, where it is a CUDA generator's."""
    first = rng_state[0] if isinstance(rng_state, list) and rng_state else rng_state
    trackers = first.get("rng_tracker_states") if isinstance(first, dict) else None
    state = trackers.get(_TRACKER) if isinstance(trackers, dict) else None
    data = state.storage.data if isinstance(state, Tensor) else None
    return state if isinstance(state, Tensor) and data and len(data) == _STATE_BYTES else None


def _check_contents(root: object, ranks: Sequence[Rank]) -> None:
    every = [_digests(rank, _is_any) for rank in ranks]
    copies = [_digests(rank, _is_copied) for rank in ranks]
    for k, rank in enumerate(ranks):
        others = [n for n, other in enumerate(ranks) if other.tp != rank.tp]
        for n in others:
            if every[n] and every[n] == every[k]:
                raise CorruptCheckpoint(
                    f"{root}: {rank.folder} and {ranks[n].folder} hold the same shards; one is a "
                    "copy of the other: restore it"
                )
        peers = [n for n in others if (ranks[n].pp, ranks[n].ep) == (rank.pp, rank.ep)]
        strangers = [n for n in others if ranks[n].pp != rank.pp]
        alike = [n for n in strangers if copies[n] and copies[n] == copies[k]]
        if peers and alike and all(copies[n] != copies[k] for n in peers):
            raise CorruptCheckpoint(
                f"{root}: the norms of {rank.folder} are those of {ranks[alike[0]].folder} and not "
                f"those of {ranks[peers[0]].folder}, which is of its stage; files are swapped"
            )


def _is_any(name: str) -> bool:
    return not name.endswith("_extra_state")


def _is_copied(name: str) -> bool:
    return name.endswith(_COPIED)


def _digests(rank: Rank, of: Callable[[str], bool]) -> dict[tuple[int, str], str]:
    """The checksums of a file's tensors, by chunk and name; empty where one has none."""
    found = {}
    for chunk, tensors in enumerate(rank.chunks):
        for name, tensor in tensors.items():
            if not of(name):
                continue
            record = tensor.storage.record
            if record is None or record.digest is None:
                return {}
            found[chunk, name] = f"{record.digest.value} {tensor.offset} {tensor.shape}"
    return found
