"""What Megatron keeps beside its arrays: arguments, the optimizer's groups, schedule, progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...boxes import Boxes
from ...contents import WEIGHT, Array, Job, Key
from ...pickles import StandIn, decode, encode, fields_of, named
from .. import Options

_OWN = "megatron"
_GROUP = {
    "wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False,
    "default_config": True, "max_lr": None, "min_lr": None,
}  # fmt: skip
_ADAM = {
    "amsgrad": False, "maximize": False, "foreach": None, "capturable": False,
    "differentiable": False, "fused": None, "decoupled_weight_decay": True, "eps": 1e-8,
    "betas": (0.9, 0.999), "weight_decay": 0.0, "lr": 0.0,
}  # fmt: skip


def facts_of(args: Any) -> dict[str, Any]:
    """Sizes and switches of a run's arguments, and what layouts ask for by other names."""
    given = fields_of(args)
    found: dict[str, Any] = {
        name: value for name, value in given.items() if isinstance(value, (bool, int, str))
    }
    if "untie_embeddings_and_output_weights" in given:
        found["tie_word_embeddings"] = not given["untie_embeddings_and_output_weights"]
    if given.get("group_query_attention") is False or not found.get("num_query_groups", 1):
        found["num_query_groups"] = found.get("num_attention_heads", 0)
    return {name: value for name, value in found.items() if not (_is_zero(name, value))}


def notes_of(facts: Mapping[str, Any]) -> list[str]:
    """What a user has to know of a run's weights to compute with them elsewhere."""
    if not facts.get("apply_layernorm_1p"):
        return []
    return [
        "norms hold their weights less one (apply_layernorm_1p), as Gemma does; other models of "
        "Hugging Face need one added"
    ]


def _is_zero(name: str, value: Any) -> bool:
    # Sizes that Megatron fills in later (`padded_vocab_size`) say nothing while they are zero.
    return value == 0 and not isinstance(value, bool) and name.endswith(("size", "groups", "heads"))


def job_of(common: Mapping[str, Any], arrays: Mapping[Key, Array]) -> Job:
    """What a run keeps, from `common.pt` or the first rank's file."""
    groups = _groups(common.get("optimizer"))
    steps = [group["step"] for group in groups if isinstance(group.get("step"), (int, float))]
    step = int(steps[0]) if steps else None
    names = {name: array for (state, name), array in arrays.items() if state == WEIGHT}
    made = []
    for group in groups:
        members = [name for name, array in names.items() if _is_in(group, name, array, groups)]
        kept = {key: encode(value) for key, value in group.items() if key != "params"}
        made.append({**kept, "params": members})
    others = {
        key: encode(value)
        for key, value in common.items()
        if key not in ("optimizer", "opt_param_scheduler", "rng_state", "content_metadata")
    }
    rng = {"megatron": encode(common["rng_state"])} if "rng_state" in common else {}
    schedule = common.get("opt_param_scheduler")
    scheduler = encode(schedule) if isinstance(schedule, dict) else {}
    return Job(step, tuple(made), scheduler, rng, {_OWN: others})


def _is_in(
    group: Mapping[str, Any], name: str, array: Array, groups: Sequence[Mapping[str, Any]]
) -> bool:
    """Megatron decays neither biases nor vectors, and has groups for experts of other ranks."""
    stacked = name.startswith("decoder.layers.") and not name.split(".")[2].isdigit()
    dims = len(array.shape) - len(array.axes) - stacked
    vector = dims <= 1 or name.endswith(".bias")
    apart = any(one.get("is_expert_parallel") for one in groups)
    expert = apart and ".experts." in name
    both = len({one.get("wd_mult", 1.0) for one in groups}) > 1
    decayed = not both or vector == (group.get("wd_mult", 1.0) == 0.0)
    return bool(decayed and expert == bool(group.get("is_expert_parallel")))


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    if isinstance(optimizer, list):
        listed = optimizer
    elif isinstance(optimizer, dict) and optimizer and all(isinstance(k, int) for k in optimizer):
        listed = list(optimizer.values())
    else:
        listed = [optimizer]
    found: list[dict[str, Any]] = []
    for one in listed:
        inner = one.get("optimizer", one) if isinstance(one, dict) else None
        groups = inner.get("param_groups") if isinstance(inner, dict) else None
        found.extend(dict(group) for group in groups or () if isinstance(group, dict))
    return found


def common_of(job: Job, options: Options) -> dict[str, Any]:
    """What every file says of the run: arguments with the sizes of the target's mesh, progress."""
    own = {key: decode(value) for key, value in job.others.get(_OWN, {}).items()}
    iteration = options.flags.get("iteration", own.get("iteration", job.step or 0))
    made = {**own, "checkpoint_version": 3.0, "iteration": int(iteration)}
    made["args"] = _arguments(own.get("args"), options)
    if job.scheduler:
        made["opt_param_scheduler"] = {k: decode(v) for k, v in job.scheduler.items()}
    if "megatron" in job.rng:
        made["rng_state"] = decode(job.rng["megatron"])
    return made


def _arguments(args: Any, options: Options) -> StandIn:
    facts = options.flags.get("facts", {})
    said = dict(fields_of(args)) or {
        key: value for key, value in facts.items() if isinstance(value, (bool, int, float, str))
    }
    for name in ("rank", "local_rank", "world_size", "data_parallel_size"):
        said.pop(name, None)  # of the rank that saved the source
    mesh = options.mesh
    said |= {
        "tensor_model_parallel_size": mesh.get("tp", 1),
        "pipeline_model_parallel_size": mesh.get("pp", 1),
        "expert_model_parallel_size": mesh.get("ep", 1),
        "expert_tensor_parallel_size": mesh.get("etp", mesh.get("tp", 1)),
        "virtual_pipeline_model_parallel_size": mesh["vpp"] if mesh.get("vpp", 1) > 1 else None,
    }
    made = StandIn.__new__(named("argparse", "Namespace"))
    made.state = said
    return made


def param_groups(job: Job) -> list[dict[str, Any]]:
    """Groups as Megatron has them: with weight decay and, for vectors and biases, without."""
    given = [{k: decode(v) for k, v in g.items() if k != "params"} for g in job.param_groups]
    step = float(job.step or 0)
    if given and all("wd_mult" in group for group in given):
        return [{**group, "step": group.get("step", step)} for group in given]
    decay = max((group.get("weight_decay", 0.0) for group in given), default=0.0)
    base = {**_GROUP, **_ADAM, **(given[0] if given else {}), "weight_decay": decay, "step": step}
    base["betas"] = tuple(base["betas"])
    base["max_lr"] = base["max_lr"] or base["lr"]
    return [{**base, "wd_mult": 1.0}, {**base, "wd_mult": 0.0}]


def optimizers(job: Job, apart: bool) -> list[list[dict[str, Any]]]:
    """The param groups of each optimizer: where ranks have experts of their own (`apart`), these
    have one of their own, whose only group decays."""
    groups = param_groups(job)
    dense = [group for group in groups if not group.get("is_expert_parallel")]
    if not apart:
        return [dense]
    experts = [group for group in groups if group.get("is_expert_parallel")]
    return [dense, experts or [{**dense[0], "is_expert_parallel": True}]]


def merged(arrays: Mapping[Key, Array], twice: Mapping[Key, Key]) -> dict[Key, Array]:
    """Arrays of a target, of which some are also where another's are: each key of `twice` is laid
    out, and is filled by the array that it is mapped to."""
    found = {key: array for key, array in arrays.items() if key not in twice}
    for copy, key in twice.items():
        found[key] = replace(found[key], where=_both(found[key].where, arrays[copy].where))
    return found


def _both(one: Callable[[], Boxes], other: Callable[[], Boxes]) -> Callable[[], Boxes]:
    def where() -> Boxes:
        first = one()
        return Boxes.joined([first, other()], first.dims)

    return where
