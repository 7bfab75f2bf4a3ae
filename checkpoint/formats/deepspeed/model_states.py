"""The model states of DeepSpeed's ranks, laid out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ....ir import InvalidInput
from ...contents import (
    BUFFER,
    MASTER,
    WEIGHT,
    Key,
)
from ...pickles import (
    Ordered,
    Size,
    Tensor,
    decode,
    dumps,
    encode,
    hole,
)
from ...placement import shard_of, shard_shape
from .expert_names import split_name
from .flat import partition_elements, partitions
from .planning import (
    Files,
    Place,
    Plan,
    flat_groups,
    place_of,
)
from .splitting import split_info
from .tensor_ranks import INFO


def model_files(plan: Plan, rank: int, files: Files) -> None:
    """The model states of a tensor rank."""
    at = {"tp": rank}
    flat, _ = flat_groups(plan, rank)
    named = _own_names(plan)
    shapes = [
        Ordered({named[name]: Size(plan.shape(name, rank)) for name in group if name in named})
        for group in flat
    ]
    buffers = plan.buffers
    frozen = [
        name
        for state, name in plan.wants
        if state == WEIGHT and (MASTER, name) not in plan.wants and name not in buffers
    ]
    shared = {
        alias: name
        for alias, name in plan.job.others.get("shared_params", {}).items()
        if (MASTER, name) in plan.wants and (WEIGHT, alias) not in plan.wants
    }
    sharded = plan.stage == 3
    info = split_info(plan) if plan.mesh.get("tp", 1) > 1 else None
    for data_rank in range(plan.data_ranks if sharded else 1):
        module = Ordered()
        places: list[Place] = []
        for name in (*plan.order, *frozen):
            key = (WEIGHT, name)
            if split_name(name)[0]:  # has a file of its own
                continue
            if sharded or key not in plan.wants:
                dtype = plan.wants[key].dtype if key in plan.wants else "F32"
                module[name] = hole(dtype, (0,))
                continue
            module[name] = _whole(plan, key, at, places)
        for name in buffers:
            if not split_name(name)[0]:
                module[name] = _whole(plan, _buffer(plan, name), at, places)
        for alias, name in shared.items():
            module[alias] = module[name]
        module.attributes = {"_metadata": Ordered()}
        fragments: Any = Ordered()
        for name in frozen:
            key = (WEIGHT, name)
            if sharded:
                local = shard_shape(plan.wants[key], plan.mesh, at)
                fragments[name] = hole(
                    plan.wants[key].dtype, (partition_elements(local, plan.data_ranks),)
                )
                pieces = partitions(
                    {name: local}, data_rank, plan.data_ranks, [fragments[name].numel]
                )
                places += [place_of(plan, key, at, fragments[name], piece) for piece in pieces]
            elif name in module:
                fragments[name] = module[name]
            elif name in named:
                fragments[named[name]] = _whole(plan, key, at, places)
        state = {
            "module": module,
            "buffer_names": [named[name] for name in buffers if name in named],
            "optimizer": None,
            "param_shapes": shapes,
            "frozen_param_shapes": Ordered(
                {
                    named[n]: Size(shard_shape(plan.wants[WEIGHT, n], plan.mesh, at))
                    for n in frozen
                    if n in named
                }
            ),
            "shared_params": shared,
            "frozen_param_fragments": fragments,
            "lr_scheduler": decode(dict(plan.job.scheduler)) or None,
            **counted(plan),
            **({INFO: info} if info is not None else {}),
        }
        name = f"mp_rank_{rank:02d}_model_states.pt"
        if sharded:
            name = f"zero_pp_rank_{data_rank}_{name}"
        files.add(f"{plan.tag}/{name}", state, places)


def expert_files(plan: Plan, files: Files) -> None:
    """The weights and buffers of all experts, each in a file of its own."""
    held: dict[str, list[Key]] = {}
    numbers = {layer: number for number, layer in enumerate(plan.sharing.counts)}
    for state, name in plan.wants:
        layer, expert, _ = split_name(name)
        if layer and state in (WEIGHT, BUFFER):
            file = f"layer_{numbers[layer]}_expert_{expert}_mp_rank_00_model_states.pt"
            held.setdefault(file, []).append((state, name))
    for file, keys in held.items():
        places: list[Place] = []
        value = {key[1]: _whole(plan, key, {}, places) for key in keys}
        files.add(f"{plan.tag}/{file}", value, places)


def _own_names(plan: Plan) -> dict[str, str]:
    """What the first rank, which writes model states, calls parameters and buffers that it has."""
    called = {name: plan.sharing.called(name, 0) for _, name in plan.wants}
    return {name: own for name, own in called.items() if own is not None}


def _buffer(plan: Plan, name: str) -> Key:
    return (BUFFER, name) if (BUFFER, name) in plan.wants else (WEIGHT, name)


def counted(plan: Plan) -> dict[str, Any]:
    """Counters, sizes and what a DeepSpeed source held beside them."""
    kept = {
        key: _client_state(plan, key, decode(value))
        for key, value in plan.kept.items()
        if key not in ("ds_config", "param_shapes", INFO, "num_experts")
    }
    step = plan.job.step or 0
    config = decode(plan.kept.get("ds_config")) or {}
    zero = {**(config.get("zero_optimization") or {}), "stage": plan.stage}
    skipped = kept.get("skipped_steps", 0)
    if kept.get("global_steps", 0) - skipped != step:
        skipped, kept = 0, {**kept, "global_steps": step}
    tp = plan.mesh.get("tp", 1)
    return {
        "data_sampler": None,
        "random_ltd": None,
        "global_samples": step,
        "ds_version": plan.version,
        **kept,
        **({"num_experts": list(plan.sharing.counts.values())} if plan.sharing.counts else {}),
        "skipped_steps": skipped,
        "global_steps": step + skipped,
        "dp_world_size": plan.data_ranks,
        "mp_world_size": tp,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": tp},
        "ds_config": {**config, "zero_optimization": zero},
    }


def _client_state(plan: Plan, key: str, value: Any) -> Any:
    """A user's value as it was, or, where loading it would call what is no class of a library that
    is known, as plain values that say what it was (`encode`), if that is asked for."""
    try:
        dumps(value)
    except InvalidInput as error:
        if plan.inert:
            return encode(value)
        raise InvalidInput(
            f"client state {key}: {error}. With --set foreign=data it is written as plain values "
            "that say what it was"
        ) from None
    return value


def _whole(plan: Plan, key: Key, at: Mapping[str, int], places: list[Place]) -> Tensor:
    """The shard of a rank as a tensor of its own."""
    wanted = plan.wants[key]
    tensor = hole(wanted.dtype, shard_shape(wanted, plan.mesh, at))
    places.append(Place(key, tensor, partial(shard_of, wanted, plan.mesh, at)))
    return tensor
