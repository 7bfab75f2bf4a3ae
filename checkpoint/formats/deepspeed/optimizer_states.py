"""The optimizer states of DeepSpeed's ranks, laid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...contents import (
    MASTER,
    Job,
)
from ...pickles import (
    Ordered,
    Tensor,
    decode,
    hole,
    small,
    stand_in,
)
from .flat import Piece, group_total, partition_elements, partitions, slices
from .model_states import counted
from .planning import (
    Files,
    Place,
    Plan,
    beside,
    flat_groups,
    place_of,
)


def optimizer_file(plan: Plan, rank: int, data_rank: int, files: Files) -> None:
    """The optimizer states of a rank."""
    places: list[Place] = []
    make = _stage3 if plan.stage == 3 else _stage2
    state = {
        "optimizer_state_dict": make(plan, rank, data_rank, places),
        "ds_config": counted(plan)["ds_config"],
        "ds_version": counted(plan)["ds_version"],
    }
    name = f"{plan.prefix}zero_pp_rank_{data_rank}_mp_rank_{rank:02d}_optim_states.pt"
    files.add(f"{plan.tag}/{name}", state, places)


def scaling(job: Job) -> dict[str, Any]:
    """The loss scaler's state: the source's, or none."""
    said = {key: decode(value) for key, value in beside(job, "optimizer").items()}
    scaler = stand_in(
        "deepspeed.runtime.fp16.loss_scaler",
        "LossScaler",
        state={"cur_scale": 1.0, "dynamic": False},
    )
    return {"loss_scaler": scaler, "dynamic_loss_scale": False, "overflow": False, **said}


def stage_enum(stage: int) -> Any:
    """A stage as DeepSpeed writes it."""
    return stand_in("deepspeed.runtime.zero.config", "ZeroStageEnum", stage, called=True)


def param_groups(plan_entries: Sequence[Mapping[str, Any]], members: Sequence[list[int]]) -> Any:
    """Param groups as torch's optimizers write them."""
    return [{**entry, "params": held} for entry, held in zip(plan_entries, members, strict=True)]


def _stage2(plan: Plan, rank: int, data_rank: int, places: list[Place]) -> dict[str, Any]:
    at = {"tp": rank}
    states: dict[int, Any] = {}
    masters: list[Tensor] = []
    paddings, inner, mappings, counts = [], [], [], []
    for g, group in enumerate(plan.groups):
        own = plan.sharing.own(group, data_rank, plan.data_ranks)
        shapes = {name: plan.shape(name, rank) for name in own.names}
        none = [0] * len(shapes)
        held, total = group_total(list(shapes.values()), none, own.parts)
        each = total // own.parts
        filled = min(max(held - own.part * each, 0), each)
        pieces = slices(shapes, none, own.part, each)
        counts.append(own.parts)
        # DeepSpeed strips the padding from the master weights, and not from the moments.
        master = hole("F32", (filled,))
        masters.append(master)
        paddings.append(each - filled)
        inner.append(none)
        places += [place_of(plan, (MASTER, p.name), at, master, p) for p in pieces]
        if plan.moments:
            states[g] = _moments(plan, at, each, pieces, places)
        address = [
            stand_in(
                "deepspeed.utils.tensor_fragment",
                "fragment_address",
                state={"numel": p.end - p.begin, "start": p.offset},
            )
            for p in pieces
        ]
        mappings.append(Ordered(zip((own.names[p.name] for p in pieces), address, strict=True)))
    base = {
        "state": states,
        "param_groups": param_groups(plan.entries, [[g] for g in range(len(plan.groups))]),
    }
    return {
        **scaling(plan.job),
        "base_optimizer_state": base,
        "single_partition_of_fp32_groups": masters,
        "zero_stage": stage_enum(plan.stage),
        "group_paddings": paddings,
        "param_alignment_paddings": inner,
        "partition_count": counts,
        "ds_version": plan.version,
        "param_slice_mappings": mappings,
    }


def _moments(
    plan: Plan, at: Mapping[str, int], elements: int, pieces: Sequence[Piece], places: list[Place]
) -> dict[str, Any]:
    """The step and the moments of a flat partition of so many elements; adds their places."""
    state: dict[str, Any] = {}
    if plan.job.step is not None:
        state["step"] = small("F32", float(plan.job.step))
    for moment in plan.moments:
        state[moment] = hole("F32", (elements,))
        places += [place_of(plan, (moment, p.name), at, state[moment], p) for p in pieces]
    return state


def _stage3(plan: Plan, rank: int, data_rank: int, places: list[Place]) -> dict[str, Any]:
    at = {"tp": rank}
    states: dict[int, Any] = {}
    masters: list[Tensor] = []
    flat, members = flat_groups(plan, rank)
    for part in flat:
        shapes = {name: plan.shape(name, rank) for name in part}
        elements = sum(partition_elements(s, plan.data_ranks) for s in shapes.values())
        pieces = partitions(shapes, data_rank, plan.data_ranks, [elements])
        master = hole("F32", (elements,))
        places += [place_of(plan, (MASTER, p.name), at, master, p) for p in pieces]
        if plan.moments:
            states[len(masters)] = _moments(plan, at, elements, pieces, places)
        masters.append(master)
    said = scaling(plan.job)
    return {
        "zero_stage": stage_enum(3),
        **said,
        "partition_count": plan.data_ranks,
        "optimizer_state_dict": {
            "state": states,
            "param_groups": param_groups(plan.entries, members),
        },
        "fp32_flat_groups": masters,
    }
