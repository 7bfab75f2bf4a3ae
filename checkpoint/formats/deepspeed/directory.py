"""DeepSpeed's directories: the tag, and which file is of which rank."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ....ir import CorruptCheckpoint, InvalidInput
from ...paths import within

LATEST = "latest"

_NAME_BYTES = 255
"""File systems take no longer names."""

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_EXPERTS_OPTIMIZER = re.compile(r"expp_rank_\d+_mp_rank_\d+_optim_states\.pt")
_OLD_EXPERT = re.compile(r"expert_\d+_mp_rank_\d+_model_states\.pt")

Rank = tuple[int, int]
"""(model rank, data rank)."""


@dataclass(frozen=True, slots=True)
class Directory:
    """The files of one step: `model` states by rank (data rank 0 where all share one file),
    `optimizer` states by rank, pipeline `layers` by (layer, tensor rank), `experts` by (MoE layer,
    expert), and `expert_ranks`, optimizer states that are not ZeRO's."""

    path: Path
    model: Mapping[Rank, str]
    optimizer: Mapping[Rank, str]
    layers: Mapping[tuple[int, int], str]
    experts: Mapping[tuple[int, int], str]
    expert_ranks: tuple[str, ...]

    @property
    def model_ranks(self) -> int:
        """Ranks of tensor and pipeline parallelism together."""
        return 1 + max(rank for rank, _ in (*self.model, *self.optimizer))

    @property
    def data_ranks(self) -> int:
        """Ranks among which ZeRO splits."""
        return 1 + max(rank for _, rank in (*self.optimizer, *self.model))


def is_tag(path: Path) -> bool:
    """Whether a directory has the model states of a step."""
    return path.is_dir() and any(_MODEL.fullmatch(p.name) for p in path.glob("*_model_states.pt"))


def tagged(root: Path, tag: str, pointer: str = LATEST) -> Path:
    """The directory of the step that is asked for, or that `latest` names.

    Raises InvalidInput where that is not settled, CorruptCheckpoint where it is not there.
    """
    if not tag and is_tag(root):
        return root
    if not tag and (root / pointer).is_file():
        tag = (root / pointer).read_bytes()[: 2 * _NAME_BYTES].decode(errors="replace").strip()
        is_name = tag.isprintable() and len(tag.encode()) <= _NAME_BYTES
        if not is_name or not is_tag(within(root, tag)):
            raise CorruptCheckpoint(
                f"{root / pointer}: names {tag!r}, which holds no model states; a save was cut "
                "off: choose an earlier step with --tag"
            )
    if not tag:
        there = sorted(path.name for path in root.iterdir() if is_tag(path))
        raise InvalidInput(
            f"{root}: no file {pointer!r}, which a whole checkpoint has, and the steps "
            f"{', '.join(there) or '(none)'}; choose one with --tag"
        )
    path = within(root, tag)
    if not is_tag(path):
        raise InvalidInput(f"{path}: no DeepSpeed step (no *_model_states.pt in it)")
    return path


def listed(path: Path) -> Directory:
    """The files of a step by rank; raises CorruptCheckpoint where ranks are missing or twice."""
    model: dict[Rank, str] = {}
    optimizer: dict[Rank, str] = {}
    layers: dict[tuple[int, int], str] = {}
    experts: dict[tuple[int, int], str] = {}
    expert_ranks: list[str] = []
    for name in sorted(p.name for p in path.iterdir()):
        if _OLD_EXPERT.fullmatch(name):
            raise InvalidInput(
                f"{path / name}: an expert as DeepSpeed wrote them before it numbered MoE layers, "
                "which is not read; load and save it with a newer DeepSpeed (layer_L_expert_E_…)"
            )
        if found := _EXPERT.fullmatch(name):
            if int(found[3]):
                raise InvalidInput(
                    f"{path / name}: experts of a job with tensor or pipeline parallelism, which "
                    "are not read; save them in a job without"
                )
            _put(experts, (int(found[1]), int(found[2])), name, path)
        elif _EXPERTS_OPTIMIZER.fullmatch(name):
            expert_ranks.append(name)
        elif found := _OPTIMIZER.fullmatch(name):
            _put(optimizer, (int(found[2]), int(found[1])), name, path)
        elif found := _MODEL.fullmatch(name):
            _put(model, (int(found[2]), int(found[1] or 0)), name, path)
        elif found := _LAYER.fullmatch(name):
            _put(layers, (int(found[1]), int(found[2] or 0)), name, path)
    directory = Directory(path, model, optimizer, layers, experts, tuple(expert_ranks))
    sharded = any(name.startswith("zero_") for name in model.values())
    for rank in range(directory.model_ranks):
        for data_rank in range(directory.data_ranks):
            if optimizer and (rank, data_rank) not in optimizer:
                raise _missing(path, f"zero_pp_rank_{data_rank}_mp_rank_{rank:02d}_optim_states.pt")
            if (sharded or not data_rank) and (rank, data_rank) not in model:
                raise _missing(path, f"mp_rank_{rank:02d}_model_states.pt of rank {data_rank}")
    return directory


def _put(table: dict[tuple[int, int], str], key: tuple[int, int], name: str, path: Path) -> None:
    if key in table:
        raise CorruptCheckpoint(
            f"{path}: {table[key]} and {name} are both of rank {key[1]}: files of two runs in one "
            "directory; remove those that do not belong"
        )
    table[key] = name


def _missing(path: Path, name: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{path}: {name} is missing, other ranks are there; restore it from another copy, or "
        "choose an earlier step with --tag"
    )
