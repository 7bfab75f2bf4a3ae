"""Megatron's legacy directory read: shards of every rank, with numbers over the whole model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....ir import CorruptCheckpoint, InvalidInput
from ...boxes import Boxes, row_major
from ...contents import (
    BUFFER,
    EXP_AVG,
    EXP_AVG_SQ,
    MASTER,
    WEIGHT,
    Array,
    Contents,
    Key,
    Record,
    with_unread,
)
from ...dtypes import itemsize
from ...paths import sizes
from ...pickles import Tensor, fields_of, open_torch
from .. import Options
from . import training
from .buckets import Parameter, buffer_of
from .iterations import chosen
from .model_order import (
    EMBEDDING,
    OUTPUT,
    expert_of,
    is_expert,
    layer_of,
    with_expert,
    with_layer,
)

MODEL, OPTIMIZER = "model_optim_rng.pt", "distrib_optim.pt"
RANKS = "mp_rank_*"

_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
_STATES = {"param": MASTER, "exp_avg": EXP_AVG, "exp_avg_sq": EXP_AVG_SQ}
_UNTRAINED = ("expert_bias", "local_tokens_per_expert", "inv_freq")


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank's folder, its place, and the parts of the model in it: (chunk, local name, tensor)."""

    folder: str
    tp: int
    pp: int
    ep: int
    common: Mapping[str, Any]
    chunks: Sequence[Mapping[str, Tensor]]


@dataclass
class _Gathered:
    """Boxes of one array, shard by shard."""

    shape: tuple[int, ...]
    dtype: str
    rows: list[tuple[Any, Any, Any, int, int]] = field(default_factory=list)


def read(root: Path, options: Options) -> Contents:
    """As `megatron.read`."""
    root = chosen(root, options.tag, RANKS)
    unread: list[Record] = []
    found = [_rank(root, path.name, unread) for path in sorted(root.glob(RANKS))]
    ranks = _placed(found, root, options)
    mesh = _mesh(ranks, root)
    first = ranks[0]
    facts = training.facts_of(first.common.get("args"))
    offsets = _layer_offsets(ranks)
    experts = max((len(_experts(rank)) for rank in ranks), default=0)
    gathered: dict[Key, _Gathered] = {}
    records: list[Record] = []
    numbers: dict[Record, int] = {}

    def number(record: Record) -> int:
        if record not in numbers:
            numbers[record] = len(records)
            records.append(record)
        return numbers[record]

    whole_names: dict[int, list[dict[str, str]]] = {}
    for place, rank in enumerate(ranks):
        named = []
        for chunk, tensors in enumerate(rank.chunks):
            names = {
                name: _whole(name, offsets[rank.pp, chunk], rank.ep * experts) for name in tensors
            }
            named.append(names)
            for name, tensor in tensors.items():
                state = WEIGHT if tensor.dtype[0] in "FB" and not _untrained(name) else BUFFER
                assert tensor.storage.record is not None
                _add(gathered, (state, names[name]), rank, tensor, number(tensor.storage.record))
        whole_names[place] = named
    notes = []
    if any((root / rank.folder / OPTIMIZER).is_file() for rank in ranks):
        tied = bool(facts.get("tie_word_embeddings"))
        for place, rank in enumerate(ranks):
            names_of = whole_names[place]
            _optimizer(root, rank, names_of, mesh, tied, options, gathered, number, unread)
    elif isinstance(first.common.get("optimizer"), dict) and fields_of(first.common.get("args")):
        notes.append("the optimizer's state is not in distrib_optim.pt: weights only are read")
    arrays = {
        key: Array(*key, (mesh["tp"], *held.shape), held.dtype, _giving(held), axes=("tp",))
        for key, held in gathered.items()
    }
    version = float(first.common.get("checkpoint_version", 0))
    facts |= {"qkv_by_kind": version == 0, "qkv_kind_innermost": version == 1}
    weights = {name for state, name in arrays if state == WEIGHT}
    if any(name.endswith(".input_layernorm.weight") for name in weights):
        facts["transformer_impl"] = "local"
    elif any(name.endswith(".layer_norm_weight") for name in weights):
        facts["transformer_impl"] = "transformer_engine"
    facts.setdefault("num_layers", 1 + max((layer_of(n) or 0 for n in weights), default=-1))
    if "tie_word_embeddings" not in facts:
        facts["tie_word_embeddings"] = OUTPUT not in weights
    job = training.job_of(first.common, arrays)
    held_records = with_unread(records, unread)
    return Contents(
        "megatron", root, sizes(root), held_records, arrays, job, mesh, facts, tuple(notes)
    )


def _giving(held: _Gathered) -> Any:
    return lambda: Boxes.of(held.rows, 1 + len(held.shape))


def _rank(root: Path, folder: str, unread: list[Record]) -> Rank:
    path = root / folder / MODEL
    matched = _FOLDER.fullmatch(folder)
    if matched is None:
        raise CorruptCheckpoint(f"{root / folder}: expected mp_rank_TP[_PP][_EP]")
    with open_torch(path, f"{folder}/{MODEL}") as file:
        unread.extend(file.unread)
        value = file.loaded(file.value, 0)
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path}: expected a dict with `model`, found {type(value)}")
    keys = sorted((k for k in value if re.fullmatch(r"model\d*", str(k))), key=_number)
    if not keys:
        raise CorruptCheckpoint(f"{path}: no `model` in it; it has {', '.join(map(str, value))}")
    chunks = [dict(_tensors(value[key], "")) for key in keys]
    second, third = matched[2], matched[3]
    places = [int(matched[1]), int(second or -1), int(third or -1)]
    common = {k: v for k, v in value.items() if k not in keys}
    return Rank(folder, places[0], places[1], places[2], common, chunks)


def _number(key: str) -> int:
    return int(key.removeprefix("model") or 0)


def _tensors(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts by their joined names."""
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Tensor):
            yield name.removeprefix("module."), item
        elif isinstance(item, dict):
            yield from _tensors(item, f"{name}.")


def _placed(ranks: Sequence[Rank], root: Path, options: Options) -> list[Rank]:
    """Ranks with their places; the one number after tp is a stage, or one of `ep`."""
    if not ranks:
        raise CorruptCheckpoint(f"{root}: no {RANKS}; it is not whole")
    args = fields_of(ranks[0].common.get("args"))
    given = {**options.mesh}
    single = any(r.pp >= 0 and r.ep < 0 for r in ranks)
    is_expert_number = False
    if single:
        pp = given.get("pp", args.get("pipeline_model_parallel_size"))
        ep = given.get("ep", args.get("expert_model_parallel_size"))
        if pp is not None and ep is not None and (pp > 1) != (ep > 1):
            is_expert_number = ep > 1
        else:
            whole = all(
                EMBEDDING in r.chunks[0] and "decoder.final_layernorm.weight" in r.chunks[-1]
                for r in ranks
            )
            several = len({r.pp for r in ranks}) > 1
            if several and whole and not any(_experts(r) for r in ranks):
                raise InvalidInput(
                    f"{root}: in {ranks[-1].folder} the second number may be of a pipeline stage "
                    "or of expert parallelism; say which with --mesh pp=… or --mesh ep=…"
                )
            is_expert_number = whole and several
    found = []
    for rank in ranks:
        pp, ep = rank.pp, rank.ep
        if is_expert_number:
            pp, ep = 0, rank.pp
        found.append(Rank(rank.folder, rank.tp, max(pp, 0), max(ep, 0), rank.common, rank.chunks))
    return found


def _mesh(ranks: Sequence[Rank], root: Path) -> dict[str, int]:
    """The sizes of the axes; raises CorruptCheckpoint where a rank is missing, or of another
    save."""
    mesh = {axis: 1 + max(getattr(rank, axis) for rank in ranks) for axis in ("tp", "pp", "ep")}
    there = {(rank.tp, rank.pp, rank.ep) for rank in ranks}
    for tp in range(mesh["tp"]):
        for pp in range(mesh["pp"]):
            for ep in range(mesh["ep"]):
                if (tp, pp, ep) not in there:
                    raise CorruptCheckpoint(
                        f"{root}: the folder of tp={tp}, pp={pp}, ep={ep} is missing, of a mesh of "
                        f"{mesh}; restore it from another copy"
                    )
    args = fields_of(ranks[0].common.get("args"))
    for axis, name in (("tp", "tensor"), ("pp", "pipeline")):
        said = args.get(f"{name}_model_parallel_size", mesh[axis])
        if said != mesh[axis]:
            raise CorruptCheckpoint(
                f"{root}: folders of {axis}={mesh[axis]}, but {ranks[0].folder} was saved with "
                f"{axis}={said}; ranks are missing, or are of another save"
            )
    for rank in ranks[1:]:
        for key in ("iteration", "checkpoint_version"):
            if rank.common.get(key) != ranks[0].common.get(key):
                raise CorruptCheckpoint(
                    f"{root / rank.folder / MODEL}: {key} {rank.common.get(key)}, "
                    f"{ranks[0].folder} has {ranks[0].common.get(key)}; saves are mixed"
                )
    return {**mesh, "vpp": len(ranks[0].chunks)}


def _layer_offsets(ranks: Sequence[Rank]) -> dict[tuple[int, int], int]:
    """The number of the first layer of every (stage, chunk): chunks go round the stages."""
    held: dict[tuple[int, int], int] = {}
    for rank in ranks:
        for chunk, tensors in enumerate(rank.chunks):
            numbers = {layer_of(name) for name in tensors} - {None}
            held[rank.pp, chunk] = len(numbers)
    found, at = {}, 0
    for place in sorted(held, key=lambda place: (place[1], place[0])):
        found[place] = at
        at += held[place]
    return found


def _experts(rank: Rank) -> set[int]:
    """The numbers of the experts that a rank has."""
    found = (expert_of(name) for tensors in rank.chunks for name in tensors)
    return {number for number in found if number is not None}


def _whole(name: str, first_layer: int, first_expert: int) -> str:
    layer, expert = layer_of(name), expert_of(name)
    if layer is not None:
        name = with_layer(name, layer + first_layer)
    return name if expert is None else with_expert(name, expert + first_expert)


def _untrained(name: str) -> bool:
    return name.endswith(_UNTRAINED)


def _add(gathered: dict[Key, _Gathered], key: Key, rank: Rank, tensor: Tensor, record: int) -> None:
    held = gathered.setdefault(key, _Gathered(tensor.shape, tensor.dtype))
    if (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
        raise CorruptCheckpoint(
            f"{rank.folder}/{MODEL}: {key[1]} is {tensor.dtype} {tensor.shape}, other ranks have "
            f"{held.dtype} {held.shape}"
        )
    zeros = (0,) * len(tensor.shape)
    held.rows.append(
        ((rank.tp, *zeros), (1, *tensor.shape), (0, *tensor.stride), record, tensor.offset)
    )


# -------------------------------------------------------------- the optimizer


def _optimizer(
    root: Path,
    rank: Rank,
    names: Sequence[Mapping[str, str]],
    mesh: Mapping[str, int],
    tied: bool,
    options: Options,
    gathered: dict[Key, _Gathered],
    number: Any,
    unread: list[Record],
) -> None:
    file_name = f"{rank.folder}/{OPTIMIZER}"
    path = root / rank.folder / OPTIMIZER
    if not path.is_file():
        raise CorruptCheckpoint(f"{path}: missing, other ranks have theirs")
    with open_torch(path, file_name) as file:
        unread.extend(file.unread)
        value = file.loaded(file.value, 0)
    parts = value if isinstance(value, list) else [value]
    apart = mesh["ep"] > 1 and len(parts) > 1
    for place, part in enumerate(parts):
        if part is None:  # these parameters are in the file of the first expert rank
            continue
        if not isinstance(part, dict) or not part.get("buckets_coalesced"):
            raise InvalidInput(
                f"{path}: not a file of coalesced buckets (Megatron before 2023-11); load and save "
                "it once with a newer Megatron"
            )
        buffers = [held for key, held in sorted_items(part) if isinstance(key, int)]
        chunks = []
        for tensors in rank.chunks:
            own = [
                name
                for name, tensor in tensors.items()
                if tensor.dtype[0] in "FB"
                and not _untrained(name)
                and (not apart or is_expert(name) == (place == 1))
            ]
            if own:
                chunks.append((tensors, own))
        if len(buffers) != len(chunks):
            raise CorruptCheckpoint(
                f"{path}: {len(buffers)} buffers, the model has {len(chunks)} parts"
            )
        for at, (buffer, (tensors, own)) in enumerate(zip(buffers, chunks, strict=True)):
            which = rank.chunks.index(tensors)
            _buffer(
                path, file_name, buffer, rank, tensors, own, names[which], at, mesh, tied, options,
                gathered, number,
            )  # fmt: skip


def sorted_items(part: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """The entries of a dict, numbers in order first."""
    return sorted(part.items(), key=lambda pair: (not isinstance(pair[0], int), str(pair[0])))


def _buffer(
    path: Path,
    file_name: str,
    buffer: Any,
    rank: Rank,
    tensors: Mapping[str, Tensor],
    own: Sequence[str],
    names: Mapping[str, str],
    chunk: int,
    mesh: Mapping[str, int],
    tied: bool,
    options: Options,
    gathered: dict[Key, _Gathered],
    number: Any,
) -> None:
    if not isinstance(buffer, dict) or len(buffer) != 1:
        raise InvalidInput(f"{path}: parameters of one dtype are expected in a buffer")
    held = next(iter(buffer.values()))
    shared = {EMBEDDING, OUTPUT} if tied and mesh["pp"] > 1 else set()
    parameters = [Parameter(name, tensors[name].numel, name in shared) for name in own]
    args = fields_of(rank.common.get("args"))
    bucket = options.flags.get("bucket_elements", args.get("ddp_bucket_size"))
    overlaps = bool(args.get("overlap_grad_reduce")) or "bucket_elements" in options.flags
    closed = int(bucket) if bucket and overlaps and rank.pp == 0 and chunk == 0 else None
    laid = buffer_of(parameters, closed)
    all_f32 = all(tensors[name].dtype == "F32" for name in own)
    for kind, flat in held.items():
        if not isinstance(flat, Tensor):
            continue
        if flat.numel != laid.elements:
            raise InvalidInput(
                f"{path}: {flat.numel} elements of {kind}, this model's parameters make "
                f"{laid.elements} in buckets of {closed or 'any size'}; say the run's "
                "ddp_bucket_size with the flag bucket_elements"
            )
        state = _STATES.get(str(kind), str(kind))
        if state == MASTER and all_f32:
            continue  # the model's own weights once more
        assert flat.storage.record is not None
        record = number(flat.storage.record)
        if flat.offset or flat.storage.nbytes != flat.numel * itemsize(flat.dtype):
            raise CorruptCheckpoint(f"{path}: {kind} is a view of a larger storage")
        for name in own:
            shape = tensors[name].shape
            key = (state, names[name])
            into = gathered.setdefault(key, _Gathered(shape, flat.dtype))
            zeros = (0,) * len(shape)
            into.rows.append(
                ((rank.tp, *zeros), (1, *shape), (0, *row_major(shape)), record, laid.begin[name])
            )
