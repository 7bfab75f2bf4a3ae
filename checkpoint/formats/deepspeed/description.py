"""What DeepSpeed's files say beside arrays: the step, on which all agree, and the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....ir import CorruptCheckpoint
from ...contents import BUFFER, Job
from ...pickles import Tensor, encode
from .expert_names import in_all_experts
from .reading import Found, shapes_of
from .sharing import LAYERS

_TENSORS = {
    "module", "optimizer", "param_shapes", "frozen_param_shapes",
    "frozen_param_fragments", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions",
    "optimizer_state_dict", "lr_scheduler",
}  # fmt: skip
"""What arrays and mesh say already."""


def agreed(
    said: Mapping[str, float], models: Mapping[str, Mapping[str, Any]], lenient: bool
) -> int | None:
    """The step, which is the same in all files: `said` by those with optimizer states, and counted
    in the model states. Raises CorruptCheckpoint naming two that differ."""
    _agree(said, "optimizer step")
    counted = {
        file: float(state["global_steps"] - (state.get("skipped_steps") or 0))
        for file, state in models.items()
        if isinstance(state.get("global_steps"), int)
    }
    _agree(counted, "step")
    if said and counted and not lenient:
        file, step = next(iter(said.items()))
        model, count = next(iter(counted.items()))
        if step != count:
            raise CorruptCheckpoint(
                f"{file} is of step {step:g}, {model} of step {count:g}: files of different saves "
                "are mixed. If the optimizer was begun anew in this run, pass mixed_steps=true"
            )
    every = [*said.values(), *counted.values()]
    return int(every[0]) if every else None


def _agree(steps: Mapping[str, float], what: str) -> None:
    if len(set(steps.values())) > 1:
        (one, first), *others = steps.items()
        other, second = next((f, s) for f, s in others if s != first)
        raise CorruptCheckpoint(
            f"{other}: {what} {second:g}, but {one} is of {first:g}: files of different saves in "
            "one directory; restore those that belong together"
        )


def left_out(models: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Notes on what of the model states is not kept, as its tensors are too large for a job."""
    return tuple(
        f"{file}: {key} is left out, its tensors are larger than 64 MiB"
        for file, state in models.items()
        for key, value in state.items()
        if key not in _TENSORS and not _small(value)
    )


def job_of(
    found: Found,
    step: int | None,
    models: Mapping[str, Mapping[str, Any]],
    entries: Sequence[Mapping[str, Any]],
    held: Mapping[str, Any],
) -> Job:
    """The job, of the model states by file, torch's param groups and what ZeRO holds beside."""
    model = next(iter(models.values()))
    shapes: list[dict[str, None]] = []
    for file, state in models.items():  # pipeline stages have parameters of their own
        for k, group in enumerate(shapes_of(state, file)):
            shapes += [{}] if k == len(shapes) else []
            shapes[k] |= dict.fromkeys(group)
    groups: list[dict[str, Any]] = []
    for number, entry in enumerate(entries):
        made = {n: encode(v) for n, v in entry.items() if n not in ("params", "step")}
        # Each of torch's parameters is a flat buffer, for which there are shapes.
        flat = entry.get("params", [number])
        known = all(isinstance(i, int) and i < len(shapes) for i in flat)
        made["params"] = (
            [name for i in flat for name in in_all_experts(shapes[i], found.experts)]
            if known
            else []
        )
        groups.append(made)
    scaling = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
    beside = {key: encode(held[key]) for key in scaling if key in held}
    scheduler = model.get("lr_scheduler")
    kept = {k: encode(v) for k, v in model.items() if k not in _TENSORS and _small(v)}
    if "buffer_names" in kept:  # of all stages and experts, and not those of one rank
        kept["buffer_names"] = [name for state, name in found.pieces if state == BUFFER]
    others: dict[str, Any] = {"deepspeed": {"model": kept, "optimizer": beside, "tag": found.tag}}
    if found.moe_layers:
        others["deepspeed"][LAYERS] = found.moe_layers
    if found.keys:
        others["deepspeed"]["parameters"] = {n: encode(said) for n, said in found.keys.items()}
    shared = model.get("shared_params")
    if shared:
        others["shared_params"] = dict(shared)
    return Job(
        step, tuple(groups), encode(scheduler) if isinstance(scheduler, dict) else {}, {}, others
    )


def _small(value: Any) -> bool:
    """No tensor in it lies in the file still."""
    if isinstance(value, Tensor):
        return value.storage.data is not None
    if isinstance(value, dict):
        return all(map(_small, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_small, value))
    return True
