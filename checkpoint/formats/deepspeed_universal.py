"""DeepSpeed's universal checkpoints: one folder per parameter, whatever ranks there were.

`zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt` is a dict with the whole tensor as `param` and `step.pt` a
number for engines of the stages 1 and 2; for those of stage 3 it is a flat tensor without a shape,
and the step is in `zero/optimizer_state.pt`. Beside them are the model states, as DeepSpeed's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from ...ir import CorruptCheckpoint
from ..boxes import Boxes, row_major
from ..contents import BUFFER, MASTER, Contents, Given, Job, Key, Target, Wanted, with_unread
from ..factor_boxes import shard
from ..paths import sizes
from ..pickles import Tensor, decode, hole, open_torch, scalar, small
from . import Options
from .deepspeed.assembling import arrays_of
from .deepspeed.description import agreed, job_of
from .deepspeed.directory import is_tag, tagged
from .deepspeed.model_states import model_files
from .deepspeed.optimizer_states import param_groups, scaling, stage_enum
from .deepspeed.planning import Files, Place, Plan, beside, finished, flat_groups, plan_of
from .deepspeed.reading import Found, loaded_file, model_state, shapes_of

LATEST = "latest_universal"
_STATES = {"fp32": MASTER}
_COMMON = "optimizer_state.pt"


def found(root: Path) -> str | None:
    """A directory with `zero/`, or the root of one."""
    if (root / "zero").is_dir() and is_tag(root):
        return "holds zero/ of DeepSpeed's universal form"
    if not root.is_dir():
        return None
    inside = any((path / "zero").is_dir() and is_tag(path) for path in root.iterdir())
    return "holds universal checkpoints of DeepSpeed" if inside else None


def read(root: Path, options: Options) -> Contents:
    """What a universal checkpoint holds; raises CorruptCheckpoint for missing or mixed files."""
    path = tagged(root, options.tag, LATEST)
    made = Found(tag=path.name)
    models = {
        file.name: loaded_file(path, file.name, made.unread)
        for file in sorted(path.glob("*_model_states.pt"))
    }
    first_name, first = next(iter(models.items()))
    alone = int(first.get("mp_world_size") or 1) == 1
    if alone:
        parts = len(models) if first_name.startswith("zero_") else 0
        for data_rank, (name, state) in enumerate(models.items()):
            model_state(made, 0, data_rank, state, name, parts)
    if not alone and isinstance(first.get("module"), dict):
        for name in first.get("buffer_names") or ():
            if isinstance(tensor := first["module"].get(name), Tensor):
                made.tensor((BUFFER, name), 0, tensor, first_name)
    shapes = dict(item for group in shapes_of(first, first_name) for item in group.items())
    shared = first.get("shared_params") or {}
    buffers = set(first.get("buffer_names") or ())  # of the model states, as they are
    skipped = {*shared, *buffers}
    folders = [f for f in sorted((path / "zero").iterdir()) if f.is_dir() and f.name not in skipped]
    names = {folder.name for folder in folders}
    order = [*(name for name in shapes if name in names), *sorted(names - shapes.keys())]
    if missing := sorted(shapes.keys() - names):
        raise CorruptCheckpoint(f"{path / 'zero' / missing[0]}: missing; the model states name it")
    steps: dict[str, float] = {}
    there = {name: _parameter(made, path, name, shapes.get(name), alone, steps) for name in order}
    states = set[str]().union(*there.values())
    for name, own in there.items():
        if len(own) > 1 and own != states:  # a frozen one has its weights alone
            lost = min(states - own)
            raise CorruptCheckpoint(
                f"{path / 'zero' / name / lost}.pt: missing, other parameters have it"
            )
    common_name = f"zero/{_COMMON}"
    common = loaded_file(path, common_name, made.unread, ("",))
    inner = common.get("optimizer_state_dict") or {}
    for entry in (inner.get("state") or {}).values():
        if (step := scalar(entry.get("step"))) is not None:
            steps[common_name] = float(step)
    step = agreed(steps, models, bool(options.flags.get("mixed_steps")))
    groups = common.get("param_groups") or inner.get("param_groups") or []
    job = job_of(made, step, models, groups, common)
    arrays = arrays_of(made, 1)
    return Contents(
        "deepspeed-universal",
        path,
        sizes(path),
        with_unread(made.records, made.unread),
        arrays,
        job,
    )


def _parameter(
    made: Found,
    root: Path,
    name: str,
    shape: tuple[int, ...] | None,
    is_whole: bool,
    steps: dict[str, float],
) -> set[str]:
    """The files of one parameter; returns the states in them.

    `shape` as the model states say it, of the whole parameter if `is_whole` (and not of a shard).
    """
    there = set()
    for file in sorted((root / "zero" / name).glob("*.pt")):
        said = file.relative_to(root).as_posix()
        with open_torch(file, said) as opened:
            opened.check_name(file.stem)
            made.unread.extend(opened.unread)
            value = opened.loaded(opened.value, 64)
        if file.stem == "step":
            number = scalar(value)
            if number is None:
                raise CorruptCheckpoint(f"{said}: expected a number")
            steps[said] = float(number)
            continue
        tensor = value.get("param") if isinstance(value, dict) else value
        if isinstance(value, dict) and file.stem == "fp32":
            made.keys[name] = {key: said for key, said in value.items() if key != "param"}
        if not isinstance(tensor, Tensor):
            raise CorruptCheckpoint(f"{said}: holds no tensor")
        whole = tensor.shape
        if not isinstance(value, dict) and shape is not None:  # stage 3 keeps it flat
            whole = shape
        cut = isinstance(value, dict) and value.get("vocab_tensor")  # its padding is left out
        if is_whole and shape is not None and whole != shape and not cut:
            raise CorruptCheckpoint(
                f"{said}: has the shape {whole}, the model states say {shape}; it is of another "
                "parameter or model"
            )
        if prod(whole) != tensor.numel:
            raise CorruptCheckpoint(f"{said}: {tensor.numel} elements, expected the shape {whole}")
        strides = tensor.stride if whole == tensor.shape else row_major(whole)
        row = ((0,) * len(whole), whole, strides, made.record(tensor.storage), tensor.offset)
        key = (_STATES.get(file.stem, file.stem), name)
        made.add(key, 0, whole, tensor.dtype, Boxes.of([row], len(whole)), said)
        there.add(file.stem)
    if "fp32" not in there:
        raise CorruptCheckpoint(f"{root / 'zero' / name}: fp32.pt is missing")
    return there


def target(wanted: Sequence[Wanted], job: Job, options: Options) -> Target:
    """A universal checkpoint for engines of the flag `stage` (1, 2 or 3; the source's, else 2),
    which may have any number of ranks."""
    plan = plan_of(wanted, job, options, universal=True)
    files = Files()
    model_files(plan, 0, files)
    for name in plan.order:
        for state in (MASTER, *plan.moments):
            _state_file(plan, (state, name), files)
        if plan.stage < 3 and job.step is not None and plan.moments:
            files.add(f"{plan.tag}/zero/{name}/step.pt", small("F32", float(job.step)), [])
    files.add(f"{plan.tag}/zero/{_COMMON}", _common(plan), [])
    return finished(files, plan.wants, "deepspeed-universal", [Given(LATEST, 0, plan.tag.encode())])


def _state_file(plan: Plan, key: Key, files: Files) -> None:
    wanted = plan.wants[key]
    tensor = hole("F32", wanted.shape if plan.stage < 3 else (prod(wanted.shape),))
    keys = beside(plan.job, "parameters").get(key[1], {"cat_dim": 0})
    value = {**decode(keys), "param": tensor} if plan.stage < 3 else tensor
    stem = "fp32" if key[0] == MASTER else key[0]
    place = Place(key, tensor, partial(shard, wanted.dims, wanted.sizes, ()))
    files.add(f"{plan.tag}/zero/{key[1]}/{stem}.pt", value, [place])


def _common(plan: Plan) -> dict[str, Any]:
    """What is not of a parameter, as both kinds of engines look for it."""
    flat, members = flat_groups(plan, 0)
    groups = param_groups(plan.entries, members)
    step = {} if plan.job.step is None else {"step": small("F32", float(plan.job.step))}
    return {
        **scaling(plan.job),
        "zero_stage": stage_enum(plan.stage),
        "partition_count": 1 if plan.stage == 3 else [1] * len(plan.groups),
        "ds_version": plan.version,
        "param_groups": groups,
        "optimizer_state_dict": {
            "state": dict.fromkeys(range(len(flat)), step),
            "param_groups": groups,
        },
    }
