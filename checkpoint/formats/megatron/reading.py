"""Megatron's legacy directory read: shards of every rank, with numbers over the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    is_trained,
    layer_of,
    with_expert,
    with_layer,
)
from .rank_places import check_places
from .ranks import (
    MODEL,
    OPTIMIZER,
    RANKS,
    Rank,
    experts_of,
    mesh_of,
    open_rank,
    placed,
    whole_experts,
)

GROUPED = (".experts.weight1", ".experts.weight2")
_STATES = {"param": MASTER, "exp_avg": EXP_AVG, "exp_avg_sq": EXP_AVG_SQ}


@dataclass
class _Gathered:
    """Boxes of one array, shard by shard."""

    shape: tuple[int, ...]
    dtype: str
    rows: list[tuple[Any, Any, Any, int, int]] = field(default_factory=list)

    def array(self, key: Key, tensor_ranks: int) -> Array:
        """Of so many shards; of none, what every tensor rank that has it has whole."""
        if tensor_ranks:
            shape = (tensor_ranks, *self.shape)
            return Array(*key, shape, self.dtype, lambda: Boxes.of(self.rows, 1 + len(self.shape)),
                         axes=("tp",))  # fmt: skip
        bare = [(b[1:], s[1:], t[1:], r, o) for b, s, t, r, o in self.rows]
        return Array(*key, self.shape, self.dtype, lambda: Boxes.of(bare, len(self.shape)))


def read(root: Path, options: Options) -> Contents:
    """As `megatron.read`."""
    root = chosen(root, options.tag, RANKS)
    unread: list[Record] = []
    found = [open_rank(root, path.name, unread) for path in sorted(root.glob(RANKS))]
    ranks = placed(found, root, options)
    mesh = mesh_of(ranks, root)
    check_places(root, ranks, mesh)
    first = ranks[0]
    facts = training.facts_of(first.common.get("args"))
    offsets = _layer_offsets(ranks)
    experts = max((len(experts_of(rank)) for rank in ranks), default=0)
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
                state = WEIGHT if tensor.dtype[0] in "FB" and is_trained(name) else BUFFER
                assert tensor.storage.record is not None
                key = (state, names[name])
                _add(gathered, key, rank, tensor, number(tensor.storage.record), mesh["ep"])
        whole_names[place] = named
    notes = training.notes_of(facts)
    if any((root / rank.folder / OPTIMIZER).is_file() for rank in ranks):
        tied = bool(facts.get("tie_word_embeddings"))
        for place, rank in enumerate(ranks):
            names_of = whole_names[place]
            _optimizer(root, rank, names_of, mesh, tied, options, gathered, number, unread)
    elif isinstance(first.common.get("optimizer"), dict) and fields_of(first.common.get("args")):
        notes.append("the optimizer's state is not in distrib_optim.pt: weights only are read")
    not_split = whole_experts(first, mesh)
    arrays = {
        key: held.array(key, 0 if not_split and is_expert(key[1]) else mesh["tp"])
        for key, held in gathered.items()
    }
    version = float(first.common.get("checkpoint_version", 0))
    conventions = {"qkv_by_kind": version < 1, "qkv_kind_innermost": 1 <= version < 2}
    weights = {name for state, name in arrays if state == WEIGHT}
    if any(name.endswith(".input_layernorm.weight") for name in weights):
        facts["transformer_impl"] = "local"
    elif any(name.endswith(".layer_norm_weight") for name in weights):
        facts["transformer_impl"] = "transformer_engine"
    facts.setdefault("num_layers", 1 + max((layer_of(n) or 0 for n in weights), default=-1))
    if "tie_word_embeddings" not in facts:
        facts["tie_word_embeddings"] = OUTPUT not in weights
    job = training.job_of(first.common, arrays)
    return Contents(
        "megatron", root, sizes(root), with_unread(records, unread), arrays, job, mesh, facts,
        tuple(notes), conventions,
    )  # fmt: skip


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


def _whole(name: str, first_layer: int, first_expert: int) -> str:
    layer, expert = layer_of(name), expert_of(name)
    if layer is not None:
        name = with_layer(name, layer + first_layer)
    return name if expert is None else with_expert(name, expert + first_expert)


def _place(
    name: str, shape: tuple[int, ...], rank: Rank, groups: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(where a rank's parameter begins, its shape), as an array of the whole model has it.

    GroupedMLP keeps the experts of a rank in two matrices that it views by expert: `weight1` of
    (hidden, experts · ffn) as (experts, hidden, ffn), `weight2` of (experts · ffn, hidden) as
    (experts, ffn, hidden).
    """
    if not name.endswith(GROUPED):
        return (0,) * len(shape), shape
    args = fields_of(rank.common.get("args"))
    count = int(args.get("num_experts") or 0) // groups
    if len(shape) != 2 or not count or shape[name.endswith(GROUPED[0])] % count:
        raise InvalidInput(
            f"{rank.folder}: {name} of {shape} is of several experts, and args.num_experts="
            f"{args.get('num_experts')} does not say how many"
        )
    rows, columns = shape
    if name.endswith(GROUPED[0]):
        return (rank.ep * count, 0, 0), (count, rows, columns // count)
    return (rank.ep * count, 0, 0), (count, rows // count, columns)


def _add(
    gathered: dict[Key, _Gathered], key: Key, rank: Rank, tensor: Tensor, record: int, groups: int
) -> None:
    begin, shape = _place(key[1], tensor.shape, rank, groups)
    whole = (shape[0] * groups, *shape[1:]) if key[1].endswith(GROUPED) else shape
    held = gathered.setdefault(key, _Gathered(whole, tensor.dtype))
    if (held.shape, held.dtype) != (whole, tensor.dtype):
        raise CorruptCheckpoint(
            f"{rank.folder}/{MODEL}: {key[1]} is {tensor.dtype} {tensor.shape}, other ranks have "
            f"{held.dtype} {held.shape}"
        )
    stride = tensor.stride if shape == tensor.shape else row_major(shape)
    held.rows.append(((rank.tp, *begin), (1, *shape), (0, *stride), record, tensor.offset))


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
                and is_trained(name)
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
            begin, shape = _place(name, tensors[name].shape, rank, mesh["ep"])
            key = (state, names[name])
            whole = (shape[0] * mesh["ep"], *shape[1:]) if name.endswith(GROUPED) else shape
            into = gathered.setdefault(key, _Gathered(whole, flat.dtype))
            stride = (0, *row_major(shape))
            into.rows.append(((rank.tp, *begin), (1, *shape), stride, record, laid.begin[name]))
