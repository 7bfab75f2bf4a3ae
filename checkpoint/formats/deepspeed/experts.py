"""Experts of DeepSpeed-MoE: in files of their own, and on fewer ranks than the rest of a model.

`layer_L_expert_E_mp_rank_00_model_states.pt` is the state dict of expert E of the L-th MoE layer,
where E counts the experts of all ranks. Each of `ep_size` ranks has its share of them, and ZeRO
partitions a param group of experts among the ranks that have the same ones; what these ranks say of
their parameters (shapes, mappings) numbers the experts of the own rank from 0 on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ....ir import CorruptCheckpoint, InvalidInput
from ...contents import BUFFER, WEIGHT
from ...pickles import Tensor
from .directory import Directory
from .expert_names import DATA_FIRST, split_name
from .reading import Found, loaded_file


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank has of a param group: which part, and what the `names` of its experts'
    parameters are among those of all ranks."""

    part: int
    names: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Experts:
    """How many experts the MoE layers have, by what their names begin with."""

    counts: Mapping[str, int] = field(default_factory=dict)
    data_first: bool = False

    def share(
        self, names: Collection[str], parts: Any, data_rank: int, data_ranks: int, file: str
    ) -> Share:
        """A rank's share of a group of these names, which is partitioned among `parts` ranks.

        Raises InvalidInput where fewer than all ranks have it and it is not of experts,
        CorruptCheckpoint where ranks and experts do not fit together.
        """
        if parts == data_ranks:
            return Share(data_rank, {})
        if not all(split_name(name)[0] for name in names):
            raise InvalidInput(
                f"{file}: a group of {', '.join(sorted(names)[:2])}, … is partitioned among "
                f"{parts} of {data_ranks} ranks, which is read of DeepSpeed-MoE's experts only"
            )
        if type(parts) is not int or not 0 < parts < data_ranks or data_ranks % parts:
            raise CorruptCheckpoint(
                f"{file}: a group of experts is partitioned among {parts} of {data_ranks} ranks; "
                "files of different runs are mixed"
            )
        expert_ranks = data_ranks // parts
        rank, part = data_rank % expert_ranks, data_rank // expert_ranks
        if self.data_first:
            rank, part = data_rank // parts, data_rank % parts
        return Share(part, {name: self._whole(name, rank, expert_ranks, file) for name in names})

    def _whole(self, name: str, rank: int, expert_ranks: int, file: str) -> str:
        """The name among the experts of all ranks, of one among those of an expert rank."""
        layer, number, attribute = split_name(name)
        count = self.counts.get(layer, 0)
        own = count // expert_ranks
        if count % expert_ranks or number >= own:
            raise CorruptCheckpoint(
                f"{file}: {name} on {expert_ranks} expert ranks, of {count} experts in files of "
                "their own; files of different runs are mixed"
            )
        return f"{layer}{rank * own + number}{attribute}"


def expert_states(
    directory: Directory, found: Found, models: Mapping[str, Mapping[str, Any]]
) -> Experts:
    """Reads the files of all experts; `models` are the model states by file.

    Raises CorruptCheckpoint where one is missing or holds another expert, InvalidInput for experts
    that DeepSpeed has put together itself (AutoEP).
    """
    file, state = next(iter(models.items()))
    said = state.get("num_experts")
    if state.get("ds_autoep_layers"):
        raise InvalidInput(
            f"{file}: experts of DeepSpeed's automatic expert parallelism (AutoEP), which are not "
            "read; give a checkpoint of DeepSpeed-MoE, or one in the names of transformers"
        )
    if not directory.experts and not isinstance(said, list):
        return Experts()
    if len(directory.model) > 1 or directory.layers:
        raise InvalidInput(
            f"{directory.path}: experts of a job with tensor or pipeline parallelism, or with "
            "ZeRO stage 3, which are not read; save them in a job without"
        )
    counts = _checked(directory, said, file)
    buffers = set(state.get("buffer_names") or ())
    layers: dict[int, str] = {}
    for (layer, expert), name in sorted(directory.experts.items()):
        tensors = loaded_file(directory.path, name, found.unread, None)
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                continue
            begin, number, attribute = split_name(key)
            if number != expert or layers.setdefault(layer, begin) != begin or not begin:
                raise CorruptCheckpoint(
                    f"{name}: holds {key}: files have been swapped or renamed; give them their "
                    "names back"
                )
            is_buffer = f"{begin}0{attribute}" in buffers  # as rank 0 numbers its own
            found.tensor((BUFFER if is_buffer else WEIGHT, key), 0, tensor, name)
    if len(set(layers.values())) < len(layers):
        raise CorruptCheckpoint(
            f"{directory.path}: two of {len(layers)} MoE layers have the same names; files of "
            "different runs are mixed"
        )
    for name in directory.expert_ranks:
        loaded_file(directory.path, name, found.unread)  # its checksums
    config = state.get("ds_config")
    data_first = isinstance(config, dict) and bool(config.get(DATA_FIRST))
    found.moe_layers = list(layers.values())
    return Experts({begin: counts[layer] for layer, begin in layers.items()}, data_first)


def _checked(directory: Directory, said: Any, file: str) -> list[int]:
    """The experts of each layer: those are there of which the model states speak, and no others."""
    counts: list[int] = said if isinstance(said, list) else []
    if any(type(count) is not int for count in counts):
        raise CorruptCheckpoint(f"{file}: num_experts is {said}, expected numbers")
    every = ((layer, e) for layer, count in enumerate(counts) for e in range(count))
    missing = next((one for one in every if one not in directory.experts), None)
    if missing is not None:
        layer, expert = missing
        raise CorruptCheckpoint(
            f"{directory.path}: layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt is "
            f"missing, {file} says that layer {layer} has {counts[layer]} experts; restore it from "
            "another copy, or choose an earlier step with --tag"
        )
    odd = [
        name
        for (layer, expert), name in directory.experts.items()
        if layer >= len(counts) or expert >= counts[layer]
    ]
    if odd:
        raise CorruptCheckpoint(
            f"{directory.path}: {odd[0]} is an expert of which {file} does not "
            f"speak (num_experts: {said}); files of different runs are mixed"
        )
    return counts
