"""What the optimizer states of ZeRO's ranks hold, as tables of boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from ....ir import CorruptCheckpoint, InvalidInput
from ...contents import MASTER
from ...pickles import StandIn, Tensor, mapping_of, scalar, sequence_of
from .experts import Experts
from .flat import Piece, partitions, slices
from .reading import Found, Shapes


def optimizer_state(
    found: Found, ranks: tuple[int, int], data_ranks: int, shapes: list[Shapes],
    state: Mapping[str, Any], file: str, experts: Experts,
) -> None:  # fmt: skip
    """What a file of a (model rank, data rank) of so many `data_ranks` holds; `shapes` are those of
    the model states, by group."""
    held = mapping_of(state.get("optimizer_state_dict"), f"{file}: optimizer_state_dict")
    stage = stage_of(held)
    if stage == 3:
        _stage3(found, ranks, data_ranks, shapes, held, file)
    else:
        _stage2(found, ranks, data_ranks, shapes, held, file, experts)


def stage_of(held: Mapping[str, Any]) -> int:
    """ZeRO's stage: an enum of DeepSpeed's, or a number."""
    value = held.get("zero_stage")
    if isinstance(value, StandIn) and value.args:
        value = value.args[0]
    return value if isinstance(value, int) else 3 if "fp32_flat_groups" in held else 1


def _stage2(
    found: Found, ranks: tuple[int, int], data_ranks: int, groups: list[Shapes],
    held: Mapping[str, Any], file: str, experts: Experts,
) -> None:  # fmt: skip
    rank, data_rank = ranks
    masters = sequence_of(held.get("single_partition_of_fp32_groups"), f"{file}: fp32 groups")
    counts = held.get("partition_count", [data_ranks] * len(masters))
    counts = counts if isinstance(counts, list) else [counts] * len(masters)
    paddings = held.get("group_paddings") or [0] * len(masters)
    inner = held.get("param_alignment_paddings") or [[0] * len(shapes) for shapes in groups]
    if not len(masters) == len(groups) == len(paddings) == len(inner) == len(counts):
        raise CorruptCheckpoint(
            f"{file}: {len(masters)} groups, the model states have {len(groups)}; files of "
            "different runs are mixed"
        )
    for g, (shapes, master) in enumerate(zip(groups, masters, strict=True)):
        states, step = _base_state(held, g, file)
        each = master.numel + paddings[g]
        for tensor in states.values():
            each = max(each, tensor.numel)
        total = sum(map(prod, shapes.values())) + sum(inner[g])
        if not total <= each * counts[g] or master.numel > each:
            raise CorruptCheckpoint(
                f"{file}: a slice of {each} elements on {counts[g]} ranks, the parameters of "
                f"group {g} have {total}; files of different runs are mixed"
            )
        share = experts.share(shapes, counts[g], data_rank, data_ranks, file)
        pieces = slices(shapes, inner[g], share.part, each)
        _check_mapping(held, g, pieces, file)
        for name, whole in share.names.items():
            found.experts.setdefault(name, {})[whole] = None
        shapes = {share.names.get(name, name): shape for name, shape in shapes.items()}
        pieces = [replace(one, name=share.names.get(one.name, one.name)) for one in pieces]
        found.flat(MASTER, rank, shapes, pieces, [master], file)
        for key, tensor in states.items():
            found.flat(key, rank, shapes, pieces, [tensor], file)
        if step is not None:
            found.steps.setdefault(file, {})[g] = step


def _base_state(
    held: Mapping[str, Any], group: int, file: str
) -> tuple[dict[str, Tensor], float | None]:
    """The moments of a group, and its step."""
    base = held.get("base_optimizer_state")
    step = scalar(held.get("base_optimizer_state_step"))
    if isinstance(base, list):  # DeepSpeed's elastic form
        states = base[group] if group < len(base) else {}
    else:
        states = mapping_of(base, f"{file}: base_optimizer_state").get("state", {}).get(group, {})
        entries = base["param_groups"] if isinstance(base, dict) else []
        if group < len(entries) and "step" in entries[group]:  # where fused optimizers keep it
            step = scalar(entries[group]["step"])
    if "step" in states:
        step = scalar(states["step"])
    tensors = {
        key: value
        for key, value in states.items()
        if isinstance(value, Tensor) and key != "step" and len(value.shape) == 1
    }
    return tensors, None if step is None else float(step)


def _check_mapping(held: Mapping[str, Any], group: int, pieces: list[Piece], file: str) -> None:
    """DeepSpeed's own account of a slice (`param_slice_mappings`) says the same as ours."""
    mappings = held.get("param_slice_mappings")
    if not mappings:
        return
    said = {
        name: (address.state["start"], address.state["numel"])
        for name, address in mappings[group].items()
        if isinstance(address, StandIn) and isinstance(address.state, dict)
    }
    found = {piece.name: (piece.offset, piece.end - piece.begin) for piece in pieces}
    for name in said.keys() | found.keys():
        if said.get(name, (0, 0)) != found.get(name, (0, 0)) and said.get(name, (0, 0))[1]:
            raise CorruptCheckpoint(
                f"{file}: {name} lies at {said.get(name)} by param_slice_mappings, at "
                f"{found.get(name)} by the shapes of the model states; the files do not belong "
                "together, or the parameters' order was changed"
            )


def _stage3(
    found: Found, ranks: tuple[int, int], data_ranks: int, groups: list[Shapes],
    held: Mapping[str, Any], file: str,
) -> None:  # fmt: skip
    rank, data_rank = ranks
    if held.get("partition_count", data_ranks) not in (data_ranks, [data_ranks]):
        raise InvalidInput(
            f"{file}: partitioned among {held['partition_count']} of {data_ranks} ranks (MiCS or "
            "experts of their own data parallelism), which is not read"
        )
    for group in sequence_of(held.get("ds_zero_partition_groups") or (), f"{file}: groups"):
        known = isinstance(group, dict) and group.get("partition_count") == data_ranks
        said = group.get("partition_rank", data_rank) if known else data_rank
        if said != data_rank:
            raise CorruptCheckpoint(
                f"{file}: says that it is of data rank {said}: files have been swapped or renamed; "
                "give them their names back"
            )
    shapes = {name: shape for group in groups for name, shape in group.items()}
    masters = list(sequence_of(held.get("fp32_flat_groups"), f"{file}: fp32_flat_groups"))
    sizes = [tensor.numel for tensor in masters]
    total = sum(-(-prod(shape) // data_ranks) for shape in shapes.values())
    if sum(sizes) != total:
        raise CorruptCheckpoint(
            f"{file}: {sum(sizes)} elements, the model states' parameters on {data_ranks} ranks "
            f"make {total}; files of different runs are mixed"
        )
    pieces = partitions(shapes, data_rank, data_ranks, sizes)
    found.flat(MASTER, rank, shapes, pieces, masters, file)
    base = mapping_of(held.get("optimizer_state_dict"), f"{file}: optimizer_state_dict")
    states = base.get("state", {})
    keys = {
        key for entry in states.values() for key, value in entry.items()
        if isinstance(value, Tensor) and key != "step" and len(value.shape) == 1
    }  # fmt: skip
    for key in sorted(keys):
        tensors = [states.get(k, {}).get(key) for k in range(len(masters))]
        bad = [k for k, t in enumerate(tensors) if t is None or t.numel != sizes[k]]
        if bad:
            raise CorruptCheckpoint(
                f"{file}: {key} of sub-group {bad[0]} is missing or of another "
                "size than its weights"
            )
        found.flat(key, rank, shapes, pieces, tensors, file)
    entries = base.get("param_groups", [])
    for k in range(len(masters)):
        step = scalar(states.get(k, {}).get("step"))
        if step is None and entries and "step" in entries[0]:
            step = scalar(entries[0]["step"])
        if step is not None:
            found.steps.setdefault(file, {})[k] = float(step)
