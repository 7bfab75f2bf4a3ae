"""Megatron's `torch_dist`: a DCP directory, with `common.pt` for what is no tensor, and
`metadata.json`, which is written last and says that the checkpoint is whole.

The optimizer's state is written as `fully_reshardable`, under `optimizer.state.KIND.NAME` in the
shapes of the model, and read as that or as `dp_reshardable`, which keeps the flat buckets of each
model-parallel rank without names (`megatron/flat_state.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...ir import CorruptCheckpoint, InvalidInput
from ..boxes import Boxes
from ..contents import (
    BUFFER,
    EXP_AVG,
    EXP_AVG_SQ,
    MASTER,
    WEIGHT,
    Array,
    Contents,
    Digest,
    Given,
    Job,
    Key,
    Record,
    Target,
    Wanted,
    with_unread,
)
from ..paths import sizes, within
from ..pickles import decode, encode, fields_of, lay_out, read_torch
from . import Options
from .dcp.items import Files
from .dcp.metadata import FILE, Metadata, load
from .dcp.writing import Entry, Thing, lay_out_directory, pieces
from .megatron import training
from .megatron.flat_state import is_flat, read_flat
from .megatron.iterations import chosen, iterations
from .megatron.model_order import is_trained

COMMON, MARKER = "common.pt", "metadata.json"

_STATES = {"param": MASTER, "fp32_param": MASTER, "exp_avg": EXP_AVG, "exp_avg_sq": EXP_AVG_SQ}
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.+)")
_EXTRA = "._extra_state"
_KEPT = "extra_state"
_LINEAR = re.compile(
    r"(decoder\.layers\.(?:\d+\.)?.*linear_(?:(?:(?:q|kv)_)?(?:(?:up|down)_)?proj|qkv|fc1|fc2))"
    r"\.weight"
)


def found(root: Path) -> str | None:
    """Megatron's marker beside DCP's index, here or in the iteration that the tracker names."""
    for folder in (root, *iterations(root)):
        if (folder / FILE).is_file() and (folder / MARKER).is_file():
            return f"holds {MARKER} of Megatron's torch_dist and {FILE}"
    return None


def read(root: Path, options: Options) -> Contents:
    """Index, objects and `common.pt` of a checkpoint (of `options.tag`, or the newest)."""
    root = chosen(root, options.tag, MARKER)
    _check_marker(root)
    metadata = load(root)
    common = read_torch(within(root, COMMON), COMMON) if (root / COMMON).is_file() else {}
    mesh: dict[str, int] = {}
    with Files(root) as files:
        files.check(metadata.items)
        arrays, extra = _sorted_out(metadata, files)
        if any(is_flat(name) for name in metadata.tensors):
            flat = read_flat(metadata, files, fields_of(common.get("args")))
            same = all(a.dtype == "F32" for (state, _), a in arrays.items() if state == WEIGHT)
            arrays |= {k: a for k, a in flat.arrays.items() if not (same and k[0] == MASTER)}
            mesh |= flat.mesh
            common = {**common, "optimizer": flat.optimizers}
        records: tuple[Record, ...] = with_unread(files.records, files.unread)
    job = training.job_of(common, arrays)
    others = dict(job.others)
    if extra:
        others[_KEPT] = extra
    facts = training.facts_of(common.get("args"))
    if "num_layers" not in facts and (layers := _layers(arrays)):
        facts["num_layers"] = layers
    return Contents(
        "megatron-dist",
        root,
        sizes(root),
        records,
        arrays,
        replace(job, others=others),
        mesh,
        facts,
        tuple(training.notes_of(facts)),
    )


def _check_marker(root: Path) -> None:
    path = root / MARKER
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        backend = said["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CorruptCheckpoint(
            f"{path}: missing or no JSON with sharded_backend; the save was cut off, or the file "
            "is damaged: load an earlier checkpoint"
        ) from None
    if backend != "torch_dist":
        raise InvalidInput(f"{path}: backend {backend!r}; torch_dist is the one that is read")


def _sorted_out(metadata: Metadata, files: Files) -> tuple[dict[Key, Array], dict[str, Any]]:
    model = {n: t for n, t in metadata.tensors.items() if not _OPTIMIZER.match(n)}
    weights = [t for n, t in model.items() if is_trained(n) and not is_flat(n)]
    weights_are_f32 = all(tensor.dtype == "F32" for tensor in weights)
    arrays: dict[Key, Array] = {}
    extra: dict[str, Any] = {}
    for fqn, tensor in metadata.tensors.items():
        if is_flat(fqn):
            continue
        state, name = WEIGHT if is_trained(fqn) else BUFFER, fqn
        if matched := _OPTIMIZER.match(fqn):
            state, name = _STATES.get(matched[1], matched[1]), matched[2]
        if state == MASTER and weights_are_f32 and name in model:
            continue  # the model's own weights once more
        boxes = files.boxes(fqn, tensor)
        array = Array(state, name, tensor.shape, tensor.dtype, _giving(boxes))
        if array.key in arrays:
            raise CorruptCheckpoint(f"{files.root / FILE}: {state} of {name} twice")
        arrays[array.key] = array
    for fqn, item in metadata.objects.items():
        if _EXTRA in fqn:
            extra[fqn] = encode(files.object(item))
    return arrays, extra


def _giving(boxes: Boxes) -> Any:
    return lambda: boxes


def _layers(arrays: Mapping[Key, Array]) -> int:
    stacked = [a for (_, name), a in arrays.items() if re.match(r"decoder\.layers\.\D", name)]
    return stacked[0].shape[0] if stacked else 0


# --------------------------------------------------------------------- writing


def target(wanted: Sequence[Wanted], job: Job, options: Options) -> Target:
    """A `torch_dist` directory: each rank of `options.mesh` writes its boxes into a file of its
    own. With moments there are master weights too, made of float32 weights where none are given.

    The flag `iteration` (the optimizer's step, if it is not given).
    """
    ranks = 1
    for size in options.mesh.values():
        ranks *= size
    loads = [0] * ranks
    moments = {one.name for one in wanted if one.state == EXP_AVG}
    masters = {one.name for one in wanted if one.state == MASTER}
    entries = []
    twice: dict[Key, Key] = {}
    for one in wanted:
        entries.append(_entry(one, options, loads))
        if one.state == WEIGHT and one.name in moments - masters:
            if one.dtype != "F32":
                raise InvalidInput(
                    f"{one.name}: Megatron's optimizer keeps a float32 copy, and the source has "
                    f"only {one.dtype} and no master weights; convert with --dtype F32"
                )
            copy = replace(one, state=MASTER)
            entries.append(_entry(copy, options, loads))
            twice[copy.key] = one.key
    made = lay_out_directory(entries, _extra_states(wanted, job), "megatron-dist")
    common = lay_out(COMMON, _common(job, bool(moments), options))
    if common.records:
        raise InvalidInput(f"{COMMON} holds large tensors: they are not carried over")
    ending = [*common.literals, *common.ending(())]
    marker = json.dumps(
        {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
    ).encode()

    def finish(digests: Sequence[Digest | None]) -> list[Given]:
        return [*made.finish(digests), Given(MARKER, 0, marker)]

    return replace(
        made,
        files={**made.files, COMMON: common.nbytes, MARKER: len(marker)},
        literals=[*made.literals, *ending],
        arrays=training.merged(made.arrays, twice),
        finish=finish,
    )


def _entry(wanted: Wanted, options: Options, loads: list[int]) -> Entry:
    key = wanted.name
    if wanted.state != WEIGHT:
        kinds = {MASTER: "param", EXP_AVG: "exp_avg", EXP_AVG_SQ: "exp_avg_sq"}
        if wanted.state == BUFFER:
            pass
        elif wanted.state not in kinds:
            raise InvalidInput(
                f"{wanted.state} of {wanted.name}: Megatron keeps master, exp_avg and exp_avg_sq"
            )
        else:
            key = f"optimizer.state.{kinds[wanted.state]}.{wanted.name}"
    mesh = {axis: size for axis, size in options.mesh.items() if axis not in ("pp", "vpp")}
    return Entry(key, (key,), wanted, pieces(wanted, mesh, loads))


def _extra_states(wanted: Sequence[Wanted], job: Job) -> list[Thing]:
    """The empty `_extra_state` of every linear layer, which Megatron wants to be there."""
    kept = {name: decode(value) for name, value in job.others.get(_KEPT, {}).items()}
    if not kept:
        for one in wanted:
            matched = _LINEAR.fullmatch(one.name)
            if matched is None or one.state != WEIGHT:
                continue
            stacked = re.match(r"decoder\.layers\.\D", one.name) is not None
            counts = one.shape[: stacked + (".experts.experts." in one.name)]
            for name in _shards(matched[1] + _EXTRA, counts):
                kept[name] = [None]  # as Megatron says that a layer has none
    return [Thing(name, (name,), value) for name, value in kept.items()]


def _shards(name: str, counts: Sequence[int]) -> list[str]:
    if not counts:
        return [f"{name}/shard_0_1"]
    whole = ".".join(str(n) for n in counts)
    places: list[tuple[int, ...]] = [()]
    for count in counts:
        places = [(*place, k) for place in places for k in range(count)]
    return [f"{name}/shard_{'.'.join(str(k) for k in place)}_{whole}" for place in places]


def _common(job: Job, with_optimizer: bool, options: Options) -> dict[str, Any]:
    common = training.common_of(job, options)
    common["content_metadata"] = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }
    if with_optimizer:
        apart = options.mesh.get("ep", 1) > 1
        kept = [
            {"optimizer": {"param_groups": g}, "param_state_sharding_type": "fully_reshardable"}
            for g in training.optimizers(job, apart)
        ]
        common["optimizer"] = dict(enumerate(kept)) if apart else kept[0]
    return common
