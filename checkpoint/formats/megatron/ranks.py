"""The ranks of a legacy directory: their folders and files, their places, what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

from ....ir import CorruptCheckpoint, InvalidInput
from ...contents import Record
from ...pickles import Tensor, fields_of, open_torch
from .. import Options
from .model_order import EMBEDDING, expert_of
from .old_names import core_name

MODEL, OPTIMIZER = "model_optim_rng.pt", "distrib_optim.pt"
RANKS = "mp_rank_*"

_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank's folder, its place, and the parts of the model in it: (chunk, local name, tensor)."""

    folder: str
    tp: int
    pp: int
    ep: int
    common: Mapping[str, Any]
    chunks: Sequence[Mapping[str, Tensor]]


def open_rank(root: Path, folder: str, unread: list[Record]) -> Rank:
    """A rank by its folder's name, whose number after tp is taken for a stage; storages that no
    array uses are added to `unread`."""
    path = root / folder / MODEL
    matched = _FOLDER.fullmatch(folder)
    if matched is None:
        raise CorruptCheckpoint(f"{root / folder}: expected mp_rank_TP[_PP][_EP]")
    with open_torch(path, f"{folder}/{MODEL}") as file:
        unread.extend(file.unread)
        value = file.value
        if isinstance(value, dict):
            value = {k: v if _is_model(k) else file.loaded(v) for k, v in value.items()}
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path}: expected a dict with `model`, found {type(value)}")
    keys = sorted((k for k in value if _is_model(k)), key=_number)
    if not keys:
        raise CorruptCheckpoint(f"{path}: no `model` in it; it has {', '.join(map(str, value))}")
    chunks = [dict(_tensors(value[key], "")) for key in keys]
    second, third = matched[2], matched[3]
    places = [int(matched[1]), int(second or -1), int(third or -1)]
    common = {k: v for k, v in value.items() if k not in keys}
    return Rank(folder, places[0], places[1], places[2], common, chunks)


def _is_model(key: Any) -> bool:
    return re.fullmatch(r"model\d*", str(key)) is not None


def _number(key: str) -> int:
    return int(key.removeprefix("model") or 0)


def _tensors(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts by their joined names."""
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Tensor):
            yield core_name(name.removeprefix("module.")), item
        elif isinstance(item, dict):
            yield from _tensors(item, f"{name}.")


def placed(ranks: Sequence[Rank], root: Path, options: Options) -> list[Rank]:
    """Ranks with their places; the one number after tp is a stage, or one of `ep`."""
    if not ranks:
        raise CorruptCheckpoint(f"{root}: no {RANKS}; it is not whole")
    args = fields_of(ranks[0].common.get("args"))
    given = {**options.mesh}
    single = any(r.pp >= 0 and r.ep < 0 for r in ranks)
    is_expert_number = False
    if single:
        pp = given.get("pp", args.get("pipeline_model_parallel_size"))
        ep = given.get("ep", args.get("expert_model_parallel_size"))
        if pp is not None and ep is not None and (pp > 1) != (ep > 1):
            is_expert_number = ep > 1
        else:
            whole = all(
                EMBEDDING in r.chunks[0] and "decoder.final_layernorm.weight" in r.chunks[-1]
                for r in ranks
            )
            several = len({r.pp for r in ranks}) > 1
            if several and whole and not any(experts_of(r) for r in ranks):
                raise InvalidInput(
                    f"{root}: in {ranks[-1].folder} the second number may be of a pipeline stage "
                    "or of expert parallelism; say which with --mesh pp=… or --mesh ep=…"
                )
            is_expert_number = whole and several
    found = []
    for rank in ranks:
        pp, ep = rank.pp, rank.ep
        if is_expert_number:
            pp, ep = 0, rank.pp
        found.append(Rank(rank.folder, rank.tp, max(pp, 0), max(ep, 0), rank.common, rank.chunks))
    return found


def mesh_of(ranks: Sequence[Rank], root: Path) -> dict[str, int]:
    """The sizes of the axes; raises CorruptCheckpoint where a rank is missing, or of another
    save."""
    mesh = {axis: 1 + max(getattr(rank, axis) for rank in ranks) for axis in ("tp", "pp", "ep")}
    there = {(rank.tp, rank.pp, rank.ep) for rank in ranks}
    # Where an expert has no tensor ranks, those of `ep` are counted through the others': rank R
    # of a stage is R modulo tp and R modulo ep.
    apart = gcd(mesh["tp"], mesh["ep"]) if whole_experts(ranks[0], mesh) else 1
    for tp in range(mesh["tp"]):
        for pp in range(mesh["pp"]):
            for ep in range(mesh["ep"]):
                if (tp - ep) % apart == 0 and (tp, pp, ep) not in there:
                    raise CorruptCheckpoint(
                        f"{root}: the folder of tp={tp}, pp={pp}, ep={ep} is missing, of a mesh of "
                        f"{mesh}; restore it from another copy"
                    )
    args = fields_of(ranks[0].common.get("args"))
    for axis, name in (("tp", "tensor"), ("pp", "pipeline")):
        said = args.get(f"{name}_model_parallel_size", mesh[axis])
        if said != mesh[axis]:
            raise CorruptCheckpoint(
                f"{root}: folders of {axis}={mesh[axis]}, but {ranks[0].folder} was saved with "
                f"{axis}={said}; ranks are missing, or are of another save"
            )
    for rank in ranks[1:]:
        for key in ("iteration", "checkpoint_version"):
            if rank.common.get(key) != ranks[0].common.get(key):
                raise CorruptCheckpoint(
                    f"{root / rank.folder / MODEL}: {key} {rank.common.get(key)}, "
                    f"{ranks[0].folder} has {ranks[0].common.get(key)}; saves are mixed"
                )
    return {**mesh, "vpp": len(ranks[0].chunks)}


def whole_experts(rank: Rank, mesh: Mapping[str, int]) -> bool:
    """Whether experts are not split among tensor ranks that split the rest."""
    said = fields_of(rank.common.get("args")).get("expert_tensor_parallel_size")
    etp = said if isinstance(said, int) else mesh["tp"]
    if etp not in (1, mesh["tp"]) and experts_of(rank):
        raise InvalidInput(
            f"{rank.folder}: experts on {etp} tensor ranks, the rest on {mesh['tp']}: legacy "
            "checkpoints are read where they are on as many or on one; save as torch_dist"
        )
    return etp == 1 < mesh["tp"]


def experts_of(rank: Rank) -> set[int]:
    """The numbers of the experts that a rank has."""
    found = (expert_of(name) for tensors in rank.chunks for name in tensors)
    return {number for number in found if number is not None}
