"""Megatron's legacy directory laid out: the files of every tensor, pipeline and expert rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

from ....ir import InvalidInput
from ...boxes import Boxes
from ...contents import (
    BUFFER,
    EXP_AVG,
    EXP_AVG_SQ,
    MASTER,
    WEIGHT,
    Array,
    Digest,
    Given,
    Job,
    Key,
    Record,
    Target,
    Wanted,
)
from ...pickles import Ordered, Tensor, TorchLayout, hole, lay_out
from ...pickles.foreign import torch_name
from ...placement import shard_of, shard_shape
from .. import Options
from . import training
from .buckets import Buffer, Parameter, buffer_of
from .iterations import TRACKER
from .model_order import (
    EMBEDDING,
    OUTPUT,
    chunks_of,
    expert_of,
    is_expert,
    is_trained,
    layer_of,
    ordered,
    stage_names,
    with_expert,
)
from .rank_places import reseeded
from .ranks import MODEL, OPTIMIZER

_KINDS = {"param": MASTER, "exp_avg": EXP_AVG, "exp_avg_sq": EXP_AVG_SQ}


@dataclass
class _Laid:
    """Files laid out so far, and the boxes of every array in them."""

    records: list[Record] = field(default_factory=list)
    layouts: list[TorchLayout] = field(default_factory=list)
    rows: dict[Key, list[Boxes]] = field(default_factory=dict)

    def add(self, layout: TorchLayout) -> dict[int, int]:
        """Takes a file; returns the records' numbers by the ids of their storages."""
        numbers = {}
        for storage, record in layout.records.items():
            numbers[id(storage)] = len(self.records)
            self.records.append(record)
        self.layouts.append(layout)
        return numbers


@dataclass(frozen=True, slots=True)
class _Model:
    """What is wanted, and how the target cuts it."""

    wanted: Mapping[Key, Wanted]
    mesh: Mapping[str, int]
    experts: int
    tied: bool
    order: tuple[str, ...]

    def local(self, name: str, ep: int) -> str | None:
        """A name as an expert rank has it; None if it has not."""
        number = expert_of(name)
        if number is None:
            return name
        each = self.experts // self.mesh["ep"]
        return with_expert(name, number - ep * each) if number // each == ep else None


def target(wanted: Sequence[Wanted], job: Job, options: Options) -> Target:
    """As `megatron.target`."""
    mesh = {axis: options.mesh.get(axis, 1) for axis in ("tp", "pp", "ep", "vpp")}
    if options.mesh.get("etp", mesh["tp"]) != mesh["tp"]:
        raise InvalidInput(
            f"etp={options.mesh['etp']}, tp={mesh['tp']}: the legacy format is written with "
            "experts on as many tensor ranks as the rest; write megatron-dist, which has any etp"
        )
    by_key = {one.key: one for one in wanted}
    weights = [name for state, name in by_key if state in (WEIGHT, BUFFER)]
    moments = {name for state, name in by_key if state == EXP_AVG}
    _check(wanted, by_key, moments, mesh)
    experts = 1 + max((expert_of(name) or -1 for name in weights), default=-1)
    if experts % mesh["ep"]:
        raise InvalidInput(f"{experts} experts do not divide among ep={mesh['ep']}")
    numbers = [layer_of(name) for name in weights]
    layers = 1 + max((number for number in numbers if number is not None), default=-1)
    counts = [int(n) for n in str(options.flags.get("stages", "")).split("-") if n]
    chunks = chunks_of(layers, mesh["pp"], mesh["vpp"], counts)
    tied = OUTPUT not in weights and EMBEDDING in weights
    order = tuple(ordered(weights) if moments else sorted(weights, key=lambda n: layer_of(n) or -1))
    model = _Model(by_key, mesh, experts, tied and mesh["pp"] > 1, order)
    common = training.common_of(job, options)
    iteration = int(common["iteration"])
    laid = _Laid()
    for pp in range(mesh["pp"]):
        mine = [chunk for chunk in chunks if chunk.stage == pp]
        held = [stage_names(order, c, c is chunks[-1], c is chunks[0], model.tied) for c in mine]
        for tp in range(mesh["tp"]):
            for ep in range(mesh["ep"]):
                folder = _folder(iteration, tp, pp, ep, mesh)
                own = reseeded(common, tp, pp)
                _model_file(laid, model, held, {"tp": tp, "ep": ep}, folder, own, job, moments)
                if moments:
                    _optimizer_file(laid, model, held, {"tp": tp, "ep": ep}, folder, options)
    tracker = Given(TRACKER, 0, str(iteration).encode())
    files = {layout.file: layout.nbytes for layout in laid.layouts}

    def finish(digests: Sequence[Digest | None]) -> list[Given]:
        found: list[Given] = []
        done = 0
        for layout in laid.layouts:
            found.extend(layout.ending(digests[done : done + len(layout.records)]))
            done += len(layout.records)
        return [*found, tracker]

    arrays = {
        one.key: Array(*one.key, one.shape, one.dtype, partial(_table, laid, one)) for one in wanted
    }
    return Target(
        "megatron",
        {**files, TRACKER: len(tracker.data)},
        laid.records,
        ["crc32"] * len(laid.records),
        arrays,
        [given for layout in laid.layouts for given in layout.literals],
        finish,
    )


def _table(laid: _Laid, one: Wanted) -> Boxes:
    return Boxes.joined(laid.rows.get(one.key, []), len(one.dims))


def _check(
    wanted: Sequence[Wanted],
    by_key: Mapping[Key, Wanted],
    moments: set[str],
    mesh: Mapping[str, int],
) -> None:
    for one in wanted:
        if one.state not in (WEIGHT, BUFFER, *_KINDS.values()):
            raise InvalidInput(
                f"{one.state} of {one.name}: Megatron keeps master, exp_avg and exp_avg_sq"
            )
        if one.state == WEIGHT and moments and one.name not in moments and is_trained(one.name):
            raise InvalidInput(
                f"{one.name} has no exp_avg, other parameters have one: the optimizer's flat "
                "buffer holds every parameter; convert the weights only (--states weight)"
            )
        for axis, factor in one.splits:
            pieces = mesh.get(axis.partition(":")[0], 1) if ":" not in axis else 1
            if one.sizes[factor] % pieces:
                raise InvalidInput(
                    f"{one.name}: {one.sizes[factor]} does not divide among {axis}={pieces}; "
                    "Megatron needs equal shards"
                )
    if moments:
        for name in moments:
            weight = by_key.get((WEIGHT, name))
            lacks_master = (MASTER, name) not in by_key and weight is not None
            if lacks_master and weight is not None and weight.dtype != "F32":
                raise InvalidInput(
                    f"{name}: Megatron's optimizer keeps a float32 copy, and the source has only "
                    f"{weight.dtype} and no master weights; convert with --dtype F32"
                )


def _folder(iteration: int, tp: int, pp: int, ep: int, mesh: Mapping[str, int]) -> str:
    stage = f"_{pp:03d}" if mesh["pp"] > 1 else ""
    expert = f"_{ep:03d}" if mesh["ep"] > 1 else ""
    return f"iter_{iteration:07d}/mp_rank_{tp:02d}{stage}{expert}"


def _model_file(
    laid: _Laid,
    model: _Model,
    held: Sequence[Mapping[str, str]],
    at: Mapping[str, int],
    folder: str,
    common: Mapping[str, Any],
    job: Job,
    moments: set[str],
) -> None:
    placed: list[tuple[Wanted, Tensor]] = []
    chunks: list[Ordered] = []
    for names in held:
        tensors = Ordered()
        for local, name in names.items():
            own = model.local(local, at["ep"])
            if own is None:
                continue
            key = (WEIGHT, name) if (WEIGHT, name) in model.wanted else (BUFFER, name)
            one = model.wanted[key]
            tensors[own] = hole(one.dtype, shard_shape(one, model.mesh, at))
            placed.append((one, tensors[own]))
        chunks.append(tensors)
    value: dict[str, Any] = dict(common)
    for number, tensors in enumerate(chunks):
        value["model" if len(chunks) == 1 else f"model{number}"] = tensors
    if moments:
        apart = model.mesh["ep"] > 1
        kept = [{"optimizer": {"param_groups": g}} for g in training.optimizers(job, apart)]
        value["optimizer"] = kept if apart else kept[0]
    numbers = laid.add(lay_out(f"{folder}/{MODEL}", value))
    for one, tensor in placed:
        record = numbers.get(id(tensor.storage))
        if record is not None:
            boxes = shard_of(one, model.mesh, at, record)
            laid.rows.setdefault(one.key, []).append(boxes)


def _optimizer_file(
    laid: _Laid,
    model: _Model,
    held: Sequence[Mapping[str, str]],
    at: Mapping[str, int],
    folder: str,
    options: Options,
) -> None:
    apart = model.mesh["ep"] > 1
    parts: list[Any] = []
    placed: list[tuple[str, str, Tensor, int]] = []
    for experts in (False, True) if apart else (None,):
        if experts is False and at["ep"] > 0:
            parts.append(None)
            continue
        part: dict[Any, Any] = {"buckets_coalesced": True}
        for number, names in enumerate(held):
            mine = {
                local: name
                for local, name in names.items()
                if (WEIGHT, name) in model.wanted
                and is_trained(name)
                and model.local(local, at["ep"]) is not None
                and (experts is None or is_expert(name) == experts)
            }
            if not mine:
                continue
            buffer = _buffer(model, mine, at, options, first=number == 0 and _is_first(names))
            dtypes = {model.wanted[WEIGHT, name].dtype for name in mine.values()}
            if len(dtypes) > 1:
                raise InvalidInput(
                    f"weights of {', '.join(sorted(dtypes))}: Megatron's buffers hold one dtype; "
                    "convert with --dtype"
                )
            kinds = {kind: hole("F32", (buffer.elements,)) for kind in _KINDS}
            dtype = dtypes.pop()
            grads = options.flags.get("grad_dtype", "F32")
            part[len(part) - 1] = {
                (torch_name(dtype), torch_name(grads)): {
                    **kinds,
                    "numel_unpadded": buffer.elements,
                }
            }
            for kind, tensor in kinds.items():
                for local, name in mine.items():
                    placed.append((kind, name, tensor, buffer.begin[local]))
        parts.append(part)
    value = parts if apart else parts[0]
    numbers = laid.add(lay_out(f"{folder}/{OPTIMIZER}", value))
    for kind, name, tensor, begin in placed:
        state = _KINDS[kind]
        key = (state, name) if (state, name) in model.wanted else (WEIGHT, name)
        boxes = shard_of(model.wanted[key], model.mesh, at, numbers[id(tensor.storage)], begin)
        laid.rows.setdefault(key, []).append(boxes)


def _is_first(names: Mapping[str, str]) -> bool:
    return EMBEDDING in names


def _buffer(
    model: _Model, names: Mapping[str, str], at: Mapping[str, int], options: Options, first: bool
) -> Buffer:
    parameters = [
        Parameter(
            local,
            prod(shard_shape(model.wanted[WEIGHT, name], model.mesh, at)),
            model.tied and name == EMBEDDING,
        )
        for local, name in names.items()
    ]
    bucket = options.flags.get("bucket_elements")
    return buffer_of(parameters, int(bucket) if bucket and first else None)
