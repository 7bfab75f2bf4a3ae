"""The optimizer's state of `torch_dist` as dp_reshardable: flat buckets without names.

`optimizer.distributed.dp_group_idx_R.gbuf_idx_C.dtype_(…).bucket_idx_B.KIND` is bucket B of chunk C
(of virtual stages) of model-parallel rank R = tp + TP·pp, over all data-parallel ranks; where ranks
have experts of their own, `chained_0.` is before it, and `chained_1.` is of the experts, with
R = etp + ETP·(ep + EP·pp). A bucket holds parameters in reverse order of the model, each on a
multiple of 64 elements (`buckets.py`), and ends with one.

What is not said is found and checked: every parameter and every gap before one was saved as a chunk
of its own, so that an order of the model, and layers of each stage, fit the chunks or do not.
Source: DistributedOptimizer.sharded_param_state_dp_reshardable of megatron-core 0.16.1.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from ....ir import CorruptCheckpoint, InvalidInput
from ...boxes import Boxes, flat_range, row_major
from ...contents import EXP_AVG, EXP_AVG_SQ, MASTER, Array, Key
from ..dcp.items import Files
from ..dcp.metadata import Metadata, StoredTensor
from .buckets import ALIGNMENT
from .model_order import EMBEDDING, OUTPUT, is_expert, is_trained, layer_of, ordered

_FLAT = re.compile(
    r"(?:chained_(?P<chain>\d+)\.)?optimizer\.distributed\.dp_group_idx_(?P<rank>\d+)"
    r"\.gbuf_idx_(?P<chunk>\d+)\.dtype_(?P<dtype>.+)\.bucket_idx_(?P<bucket>\d+)\.(?P<kind>\w+)"
)
_OBJECT = re.compile(
    r"(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_0\.optimizer/shard_.*"
)
_STATES = {"param": MASTER, "exp_avg": EXP_AVG, "exp_avg_sq": EXP_AVG_SQ}
_EXPERTS = ".mlp.experts.experts."
_FUSED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
}
"""Norms that are stored in a linear layer's name, and what they are called where they are not."""


@dataclass(frozen=True, slots=True)
class _Parameter:
    """Of one rank: the stored array that it is of, its place along that array's leading dims
    (layer, expert), and the shape of its shard."""

    array: str
    lead: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(slots=True)
class _Buffer:
    """The tensors of a chunk of a rank, and their names, by (bucket, kind)."""

    tensors: dict[tuple[int, str], StoredTensor] = field(default_factory=dict)
    names: dict[tuple[int, str], str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return 1 + max(bucket for bucket, _ in self.tensors)

    @property
    def kinds(self) -> list[str]:
        return sorted({kind for _, kind in self.tensors})


Chains = Sequence[Mapping[tuple[int, int], _Buffer]]


@dataclass(frozen=True, slots=True)
class _Run:
    """Elements `begin … begin + elements - 1` of a bucket, at `offset` of a record."""

    begin: int
    elements: int
    record: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Stored:
    """An array of the model: its whole shape, how many leading dims are layers and experts, and
    the shape of a tensor rank's shard of the others."""

    shape: tuple[int, ...]
    lead: int
    shard: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """In which order modules register parameters: `fused`, the norms in the linear layers after
    them (Transformer Engine); `grouped`, the first projections of all experts before the second."""

    fused: bool
    grouped: bool

    def registered(self, name: str) -> str:
        """The name by which a module has a parameter."""
        if not self.fused:
            for stored, own in _FUSED.items():
                name = name.replace(stored, own)
        return name

    def of_expert(self, name: str, expert: int) -> str:
        """That of one expert of those in an array."""
        if self.grouped:
            return f"{name.replace('.experts.experts.', '.experts.')}{expert}"
        return name.replace(".experts.experts.", f".experts.local_experts.{expert}.")


@dataclass(frozen=True, slots=True)
class Flat:
    """What flat buckets hold: arrays by key, their mesh, and the optimizers' own values."""

    arrays: Mapping[Key, Array]
    mesh: Mapping[str, int]
    optimizers: Sequence[Any]


def is_flat(name: str) -> bool:
    """Whether an array is a flat bucket."""
    return _FLAT.fullmatch(name) is not None


def read_flat(metadata: Metadata, files: Files, args: Mapping[str, Any]) -> Flat:
    """The state of every parameter in the flat buckets of a checkpoint; `args` of its run.

    Raises InvalidInput where the model's order does not explain the buckets, CorruptCheckpoint
    where some of them are missing.
    """
    root = files.root
    chains = _chains(metadata, root)
    tensors = {n: t for n, t in metadata.tensors.items() if not is_flat(n) and is_trained(n)}
    if EMBEDDING not in tensors:
        raise InvalidInput(f"{root}: flat buckets of a model without {EMBEDDING}")
    tp, etp = _cuts(EMBEDDING, tensors[EMBEDDING]), 1
    for name, tensor in tensors.items():
        if _EXPERTS in name and name.endswith("linear_fc2.weight"):
            etp = _cuts(name, tensor)
    stored = {
        name: _stored(name, tensor, etp if is_expert(name) else tp)
        for name, tensor in tensors.items()
    }
    said = args.get("tensor_model_parallel_size", tp)
    ranks = 1 + max(rank for rank, _ in chains[0])
    if said != tp or ranks % tp:
        raise CorruptCheckpoint(
            f"{root}: {EMBEDDING} lies on {tp} tensor ranks, of tp={said} and {ranks} model-"
            "parallel ranks; ranks are missing, or are of another save"
        )
    if etp not in (1, tp):
        raise InvalidInput(
            f"{root}: experts on {etp} tensor ranks, the rest on {tp}: flat buckets are read where "
            "they are on as many or on one; save once more with --dist-ckpt-optim-fully-reshardable"
        )
    virtual = 1 + max(chunk for _, chunk in chains[0])
    model = _Model(root, stored, tp, etp, ranks // tp, virtual, len(chains) > 1)
    rows: dict[tuple[str, str], list[Any]] = {}
    dtypes: dict[str, str] = {}
    for chain, rank, chunk, parameters in model.placed(chains, *model.order(chains)):
        buffer = chains[chain][rank, chunk]
        where = {key: _chunks(files, buffer.names[key], t) for key, t in buffer.tensors.items()}
        places = fits(buffer, parameters)
        assert places is not None
        for parameter, (bucket, begin) in zip(parameters, places, strict=True):
            tensor_ranks = etp if is_expert(parameter.array) else tp
            for kind in buffer.kinds:
                dtypes[kind] = buffer.tensors[bucket, kind].dtype
                rows.setdefault((kind, parameter.array), []).extend(
                    _rows(where[bucket, kind], parameter, begin, rank % tensor_ranks)
                )
    arrays: dict[Key, Array] = {}
    for (kind, name), held in rows.items():
        one = stored[name]
        axes = () if is_expert(name) and etp < tp else ("tp",)
        whole = (*((tp,) if axes else ()), *one.shape[: one.lead], *one.shard)
        made = held if axes else [(b[1:], s[1:], t[1:], r, o) for b, s, t, r, o in held]
        state = _STATES.get(kind, kind)
        where_of = _giving(made, len(whole))
        arrays[state, name] = Array(state, name, whole, dtypes[kind], where_of, axes=axes)
    optimizers = [
        value[0] if isinstance(value, list) else value
        for name, item in sorted(metadata.objects.items())
        if _OBJECT.fullmatch(name)
        for value in [files.object(item)]
    ]
    return Flat(arrays, {"tp": tp, "pp": model.pp, "vpp": virtual}, optimizers)


def _giving(rows: Sequence[Any], dims: int) -> Any:
    return lambda: Boxes.of(rows, dims)


def _chains(metadata: Metadata, root: Path) -> list[dict[tuple[int, int], _Buffer]]:
    """For every optimizer: the buffers by (model-parallel rank, chunk)."""
    found: dict[int, dict[tuple[int, int], _Buffer]] = {}
    dtypes: dict[tuple[int, int, int], str] = {}
    for name, tensor in metadata.tensors.items():
        said = _FLAT.fullmatch(name)
        if said is None:
            continue
        chain, rank, chunk = int(said["chain"] or 0), int(said["rank"]), int(said["chunk"])
        if dtypes.setdefault((chain, rank, chunk), said["dtype"]) != said["dtype"]:
            raise InvalidInput(
                f"{root}: {name} beside one of {dtypes[chain, rank, chunk]}: parameters of one "
                "dtype are expected in a buffer"
            )
        buffer = found.setdefault(chain, {}).setdefault((rank, chunk), _Buffer())
        buffer.tensors[int(said["bucket"]), said["kind"]] = tensor
        buffer.names[int(said["bucket"]), said["kind"]] = name
    for buffers in found.values():
        for place, buffer in buffers.items():
            wanted = {(b, kind) for b in range(buffer.count) for kind in buffer.kinds}
            if missing := sorted(wanted - buffer.tensors.keys()):
                raise CorruptCheckpoint(
                    f"{root}: model-parallel rank {place[0]}, buffer {place[1]}: {missing[0][1]} "
                    f"of bucket {missing[0][0]} is missing; load an earlier checkpoint"
                )
    return [found[number] for number in sorted(found)]


def _cuts(name: str, tensor: StoredTensor) -> int:
    """Into how many chunks an array is cut along one of its own dims."""
    size, lead = tensor.chunks[0].size, _lead(name)
    cuts = [w // n for n, w in zip(size[lead:], tensor.shape[lead:], strict=True)]
    return max(cuts, default=1)


def _lead(name: str) -> int:
    stacked = layer_of(name) is None and name.startswith("decoder.layers.")
    return int(stacked) + (_EXPERTS in name)


def _stored(name: str, tensor: StoredTensor, ranks: int) -> _Stored:
    """The shard of each of `ranks`: a gated projection has two chunks per rank, as one shard."""
    lead = _lead(name)
    size, whole = tensor.chunks[0].size[lead:], list(tensor.shape[lead:])
    cut = next((k for k, (n, w) in enumerate(zip(size, whole, strict=True)) if n < w), None)
    if cut is not None:
        whole[cut] //= ranks
    return _Stored(tensor.shape, lead, tuple(whole))


@dataclass(frozen=True, slots=True)
class _Model:
    """The arrays of the model, and how many ranks it is cut into; `apart`: experts have an
    optimizer of their own."""

    root: Path
    stored: Mapping[str, _Stored]
    tp: int
    etp: int
    pp: int
    virtual: int
    apart: bool

    @property
    def layers(self) -> int:
        numbers = (layer_of(name) for name in self.stored)
        stacked = [s.shape[0] for n, s in self.stored.items() if s.lead and layer_of(n) is None]
        return max([*(n + 1 for n in numbers if n is not None), *stacked], default=0)

    def order(self, chains: Chains) -> tuple[Order, list[int]]:
        """The order, and the layers of each chunk, that explain all buckets."""
        for order in (Order(*said) for said in product((False, True), repeat=2)):
            counts = self._counts(chains[0], order)
            if counts is None:
                continue
            placed = self.placed(chains, order, counts)
            if all(fits(chains[chain][r, k], found) is not None for chain, r, k, found in placed):
                return order, counts
        raise InvalidInput(
            f"{self.root}: the optimizer's flat buckets (dp_reshardable) are not those of this "
            "model's parameters in Megatron's order; save once more with "
            "--dist-ckpt-optim-fully-reshardable"
        )

    def _counts(self, chain: Mapping[tuple[int, int], _Buffer], order: Order) -> list[int] | None:
        """The layers of each chunk (they go round the stages); None if no numbers of them fit."""
        pieces = self.pp * self.virtual
        counts: list[int] = []
        for number in range(pieces):
            first = sum(counts)
            buffer = chain.get((number % self.pp * self.tp, number // self.pp))
            even = (self.layers - first) // (pieces - number)
            tried = sorted(range(self.layers - first + 1), key=lambda n: abs(n - even))
            fitting = (
                n
                for n in tried
                if buffer is not None
                and fits(buffer, self._parameters(order, range(first, first + n), number))
            )
            count = next(fitting, None)
            if count is None:
                return None
            counts.append(count)
        return counts if sum(counts) == self.layers else None

    def placed(
        self, chains: Chains, order: Order, counts: Sequence[int]
    ) -> Iterator[tuple[int, int, int, list[_Parameter]]]:
        """(optimizer, rank, buffer, parameters) of all buffers."""
        firsts = [sum(counts[:number]) for number in range(len(counts))]
        for chain, buffers in enumerate(chains):
            tensor_ranks = self.etp if chain else self.tp
            groups = (1 + max(rank for rank, _ in buffers)) // (tensor_ranks * self.pp)
            for rank in range(tensor_ranks * groups * self.pp):
                part = (rank // tensor_ranks % groups, groups)
                at = 0
                for chunk in range(self.virtual):
                    number = chunk * self.pp + rank // (tensor_ranks * groups)
                    layers = range(firsts[number], firsts[number] + counts[number])
                    found = self._parameters(order, layers, number, part if chain else None)
                    if not found:
                        continue  # such a chunk has no buffer
                    if (rank, at) not in buffers:
                        raise CorruptCheckpoint(
                            f"{self.root}: the flat buckets of model-parallel rank {rank}, buffer "
                            f"{at} are missing; load an earlier checkpoint"
                        )
                    yield chain, rank, at, found
                    at += 1

    def _parameters(
        self, order: Order, layers: range, number: int, part: tuple[int, int] | None = None
    ) -> list[_Parameter]:
        """The parameters of chunk `number`, in the order of the model; `part` (which of how many):
        experts alone, of one group of them."""
        first, last = number == 0, number == self.pp * self.virtual - 1
        found: dict[str, _Parameter] = {}
        for name, one in self.stored.items():
            if self.apart and is_expert(name) != (part is not None):
                continue
            if not name.startswith("decoder.layers."):
                if first if name.startswith("embedding.") else last:
                    found[name] = _Parameter(name, (), one.shard)
                continue
            own = layer_of(name)
            for layer in layers if own is None else {own} & {*layers}:
                lead = (layer,) if own is None else ()
                full = order.registered(name if own is not None else _numbered(name, layer))
                if _EXPERTS not in name:
                    found[full] = _Parameter(name, lead, one.shard)
                    continue
                which, groups = part or (0, 1)
                each = one.shape[one.lead - 1] // groups
                for expert in range(which * each, (which + 1) * each):
                    place = order.of_expert(full, expert)
                    found[place] = _Parameter(name, (*lead, expert), one.shard)
        if last and not first and part is None and OUTPUT not in self.stored:
            found[OUTPUT] = _Parameter(EMBEDDING, (), self.stored[EMBEDDING].shard)
        return [found[name] for name in ordered(list(found))]


def fits(buffer: _Buffer, parameters: Sequence[_Parameter]) -> list[tuple[int, int]] | None:
    """(bucket, first element) of every parameter, or None where the chunks are others."""
    kind = buffer.kinds[0]
    tensors = [buffer.tensors[bucket, kind] for bucket in range(buffer.count)]
    edges = [{0, *(c.begin[0] + c.size[0] for c in tensor.chunks)} for tensor in tensors]
    found: list[tuple[int, int]] = []
    bucket = end = 0
    for one in reversed(parameters):
        if found and end == tensors[bucket].shape[0]:
            bucket, end = bucket + 1, 0
        begin = -(-end // ALIGNMENT) * ALIGNMENT
        end = begin + prod(one.shape)
        if bucket >= buffer.count or not edges[bucket].issuperset((begin, end)):
            return None
        found.append((bucket, begin))
    whole = found and bucket == buffer.count - 1 and end == tensors[bucket].shape[0]
    return found[::-1] if whole else None


def _numbered(name: str, layer: int) -> str:
    return name.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)


def _chunks(files: Files, name: str, tensor: StoredTensor) -> list[_Run]:
    """The chunks of a bucket in order, all of them opened: their checksums count."""
    found = []
    for chunk in sorted(tensor.chunks, key=lambda chunk: chunk.begin):
        view = files.view(name, tensor, chunk.size, chunk.item)
        assert view.storage.record is not None
        found.append(_Run(chunk.begin[0], chunk.size[0], len(files.records), view.offset))
        files.records.append(view.storage.record)
    return found


def _rows(runs: Sequence[_Run], parameter: _Parameter, begin: int, tp: int) -> list[Any]:
    """The boxes of a parameter's shard, which data-parallel ranks cut anywhere."""
    end = begin + prod(parameter.shape)
    lead = (tp, *parameter.lead)
    ones, zeros = (1,) * len(lead), (0,) * len(lead)
    stride = (*zeros, *row_major(parameter.shape))
    rows: list[Any] = []
    for run in runs[bisect_right(runs, begin, key=lambda run: run.begin) - 1 :]:
        low, high = max(begin, run.begin), min(end, run.begin + run.elements)
        if low >= high:
            break
        at = run.offset + low - run.begin
        for offsets, sizes in flat_range(parameter.shape, low - begin, high - begin):
            rows.append(((*lead, *offsets), (*ones, *sizes), stride, run.record, at))
            at += prod(sizes)
    return rows
