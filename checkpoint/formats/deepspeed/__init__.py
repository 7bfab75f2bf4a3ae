"""DeepSpeed's own checkpoints: ZeRO stages 1, 2 and 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....ir import CorruptCheckpoint, InvalidInput
from ...contents import Contents, Given, Job, Target, Wanted, with_unread
from ...paths import sizes
from .. import Options
from .assembling import arrays_of
from .description import agreed, job_of, left_out
from .directory import LATEST, Directory, is_tag, listed, tagged
from .layers import layer_states
from .model_states import expert_files, model_files
from .optimizer_states import optimizer_file
from .planning import Files, finished, plan_of
from .reading import Found
from .states import states_of
from .tensor_ranks import info_of
from .trainer_files import trainer_files, with_trainer_files
from .zero_states import stage_of

__all__ = ["found", "read", "target"]


def found(root: Path) -> str | None:
    """A directory with DeepSpeed's model states, or with steps that have them."""
    if (root / "zero").is_dir() or (root / "latest_universal").is_file():
        return None
    if is_tag(root):
        return "holds *_model_states.pt of DeepSpeed"
    inside = root.is_dir() and any(
        is_tag(path) and not (path / "zero").is_dir() for path in root.iterdir()
    )
    return "holds steps of DeepSpeed" if inside else None


def read(root: Path, options: Options) -> Contents:
    """What a step holds. Shards of tensor parallelism are put together as the files'
    `universal_checkpoint_info` says; without it (or with the flag `info=false`) they have the axis
    `tp`, and the layout says how they make a whole.

    Raises CorruptCheckpoint for missing ranks and for files of different steps or runs in one
    directory; the flag `mixed_steps` lets an optimizer's step differ from the model's.
    """
    directory = listed(tagged(root, options.tag))
    made = Found(tag=directory.path.name)
    models: dict[str, Mapping[str, Any]] = {}
    optimizers: dict[str, Mapping[str, Any]] = {}
    for name, state in states_of(directory, made):
        (models if name in set(directory.model.values()) else optimizers)[name] = state
    first = next(iter(models.values()))
    tp, pp = _degrees(directory, first)
    by_rank = {rank: (name, models[name]) for rank, name in directory.model.items()}
    layer_states(directory, made, by_rank)
    step = agreed(_steps(made), models, bool(options.flags.get("mixed_steps")))
    info = None if tp == 1 or options.flags.get("info") is False else info_of(models)
    arrays = arrays_of(made, tp, info)
    mesh = {"dp": directory.data_ranks, "tp": tp, "pp": pp}
    job = job_of(made, step, models, *_optimizer(optimizers))
    if directory.path != root:
        job = with_trainer_files(job, root)
    facts = {"zero_stage": _stage(optimizers)} if optimizers else {}
    said = f"ZeRO stage {facts['zero_stage']}" if facts else "without optimizer state"
    notes = (said, *left_out(models))
    files = sizes(directory.path, "*")
    records = with_unread(made.records, made.unread)
    return Contents("deepspeed", directory.path, files, records, arrays, job, mesh, facts, notes)


def target(wanted: Sequence[Wanted], job: Job, options: Options) -> Target:
    """The files of every rank of `options.mesh` (`dp`, `tp`, and `ep`: of the data ranks, how many
    share the experts of DeepSpeed-MoE).

    Flags: `stage` (1, 2 or 3; the source's, else 2), `order`, the names of the parameters in the
    order of the engine's optimizer (else as the source has them).
    """
    plan = plan_of(wanted, job, options)
    split = any(axis.partition(":")[0] == "tp" for one in wanted for axis, _ in one.splits)
    if plan.mesh.get("tp", 1) > 1 and not split:
        raise InvalidInput(
            f"mesh tp={plan.mesh['tp']}: nothing says which dims of which parameters tensor ranks "
            "split; give a layout with types for tp as --target-spec (autotp-llama, or a file)"
        )
    files = Files()
    for rank in range(plan.mesh.get("tp", 1)):
        model_files(plan, rank, files)
        for data_rank in range(plan.data_ranks):
            optimizer_file(plan, rank, data_rank, files)
    expert_files(plan, files)
    trainer_files(job, files)
    return finished(files, plan.wants, "deepspeed", [Given(LATEST, 0, plan.tag.encode())])


def _degrees(directory: Directory, state: Mapping[str, Any]) -> tuple[int, int]:
    """(tensor, pipeline) ranks, which together are the model ranks."""
    said = state.get("checkpoint_parallel_dimensions") or {}
    pp = int(said.get("pp_degree") or 1)
    tp = int(said.get("tp_degree") or directory.model_ranks // pp)
    if tp * pp != directory.model_ranks:
        raise CorruptCheckpoint(
            f"{directory.path}: files of {directory.model_ranks} model ranks, the checkpoint has "
            f"tp={tp} pp={pp}; files of different runs are mixed"
        )
    return tp, pp


def _stage(optimizers: Mapping[str, Mapping[str, Any]]) -> int:
    return stage_of(next(iter(optimizers.values()))["optimizer_state_dict"])


def _steps(made: Found) -> dict[str, float]:
    """The step of each file, whose groups agree."""
    said: dict[str, float] = {}
    for file, groups in made.steps.items():
        for step in groups.values():
            if step != said.setdefault(file, step):
                raise CorruptCheckpoint(f"{file}: groups of the steps {said[file]:g} and {step:g}")
    return said


def _optimizer(
    optimizers: Mapping[str, Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], Mapping[str, Any]]:
    """(param groups as torch's optimizer has them, what ZeRO holds beside it)."""
    if not optimizers:
        return [], {}
    held = next(iter(optimizers.values()))["optimizer_state_dict"]
    base = held.get("base_optimizer_state") or held.get("optimizer_state_dict") or {}
    return list(base.get("param_groups", [])) if isinstance(base, dict) else [], held
