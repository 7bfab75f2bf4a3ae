"""How the shards of tensor ranks make a whole: DeepSpeed's `universal_checkpoint_info`.

The model states carry it where automatic tensor parallelism, Megatron-DeepSpeed or a user's client
state put it: lists of patterns (matched at the beginning of names) by what a parameter is, and from
version 0.4 on geometric maps (`affine.py`), which go first. The order in which lists are asked is
that of deepspeed/checkpoint/ds_to_universal.py, `merge_tp_slices`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from ....ir import CorruptCheckpoint, InvalidInput
from ...pickles import mapping_of, same, scalar, sequence_of, stand_in
from .affine import VERSION, Block, Shape, blocks_of

INFO = "universal_checkpoint_info"
AFFINE = "affine_map"
REPLICATED = "tp_replicated_parameter_patterns"
AVERAGED = "parameter_to_average_patterns"
TWO_PARTS = "parameter_with_2_sub_params_cat_dim_0"
PARTS = "parameter_with_sub_params"
WIDTHS = "sub_param_shard_widths"
ROW = "parameter_with_row_parallelism_patterns"
VOCABULARY = "vocabulary_parameter_patterns"
VOCABULARY_SIZE = "original_vocab_size"
UNSUPPORTED = "autotp_unsupported_parameter_patterns"
INFO_VERSION = "universal_checkpoint_version"

_LISTS = (REPLICATED, AVERAGED, TWO_PARTS, ROW, VOCABULARY)
_WIDTHS_SINCE = 0.4
"""Version from which on widths of parts are recorded; before, all parts were cut evenly."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A parameter put together: by tensor rank, which blocks of it the shard has.

    What several ranks have is the same on all (`equal`), or to be averaged (`mean`). `keys` are
    what DeepSpeed's universal form says of it, for engines that split it again.
    """

    shape: Shape
    blocks: tuple[tuple[Block, ...], ...]
    combine: Literal["copy", "mean", "equal"]
    keys: Mapping[str, Any] = field(default_factory=dict)


def copies(shards: Sequence[Shape], combine: Literal["mean", "equal"] = "equal") -> Whole:
    """A parameter that all ranks have."""
    zeros = (0,) * len(shards[0])
    block = (Block(zeros, zeros, shards[0]),)
    return Whole(shards[0], (block,) * len(shards), combine)


class Info:
    """A `universal_checkpoint_info`, checked."""

    def __init__(self, said: Mapping[str, Any], file: str) -> None:
        self._file = file
        self._lists = {key: self._patterns(said.get(key) or (), key) for key in _LISTS}
        self._parts = [
            self._part(one) for one in sequence_of(said.get(PARTS) or (), self._at(PARTS))
        ]
        self._widths = dict(mapping_of(said.get(WIDTHS) or {}, self._at(WIDTHS)))
        self._unsupported = dict(mapping_of(said.get(UNSUPPORTED) or {}, self._at(UNSUPPORTED)))
        self._version = float(scalar(said.get(INFO_VERSION)) or 0.0)
        self._rows = scalar(said.get(VOCABULARY_SIZE))
        maps = mapping_of(said.get(AFFINE) or {}, self._at(AFFINE))
        if (scalar(maps.get("version")) or VERSION) > VERSION:
            raise InvalidInput(
                f"{file}: affine maps of version {maps['version']}, known are those up to {VERSION}"
            )
        self._maps = dict(mapping_of(maps.get("params") or {}, self._at(AFFINE)))
        for pattern in (*self._maps, *self._unsupported):
            self._patterns((pattern,), AFFINE)

    @property
    def says_something(self) -> bool:
        """Whether any parameter is described: what is left out of empty lists is not known."""
        return bool(any(self._lists.values()) or self._parts or self._maps)

    def describes(self, name: str) -> bool:
        """Whether a pattern is for this name (without one it is cut along dim 0)."""
        listed = [p for patterns in self._lists.values() for p in patterns]
        listed += [p for part in self._parts for p in part.patterns]
        return any(re.match(p, name) for p in (*listed, *self._maps, *self._unsupported))

    def whole(self, name: str, shards: Sequence[Shape]) -> Whole:
        """How the shards of a parameter, by tensor rank, make it.

        Raises InvalidInput where that cannot be said, CorruptCheckpoint where shapes contradict it.
        """
        for pattern, reason in self._unsupported.items():
            if re.match(pattern, name):
                raise InvalidInput(
                    f"{name}: DeepSpeed cannot say how its shards make a whole ({reason}); give "
                    "its layout as --spec, with --set info=false"
                )
        found = self._by_map(name, shards) or self._by_lists(name, shards)
        if self._one(VOCABULARY, name) is None:
            return found
        if not isinstance(self._rows, int) or not 0 < self._rows <= found.shape[0]:
            raise CorruptCheckpoint(
                f"{self._file}: {VOCABULARY_SIZE} is {self._rows}, {name} has {found.shape[0]} rows"
            )
        keys = {**found.keys, "vocab_tensor": True}
        return replace(found, shape=(self._rows, *found.shape[1:]), keys=keys)

    def _by_map(self, name: str, shards: Sequence[Shape]) -> Whole | None:
        pattern = self._alone([p for p in self._maps if re.match(p, name)], AFFINE, name)
        if pattern is None:
            return None
        entry = mapping_of(self._maps[pattern], self._at(AFFINE))
        blocks = tuple(
            tuple(blocks_of(entry, rank, shard, name)) for rank, shard in enumerate(shards)
        )
        shape = tuple(int(n) for n in entry["logical_shape"])
        held = sum(prod(block.size) for own in blocks for block in own)
        return Whole(shape, blocks, "equal" if held > prod(shape) else "copy")

    def _by_lists(self, name: str, shards: Sequence[Shape]) -> Whole:
        parts = next(
            ((part, p) for part in self._parts for p in part.patterns if re.match(p, name)), None
        )
        replicated, averaged = self._one(REPLICATED, name), self._one(AVERAGED, name)
        if replicated is not None or averaged is not None:
            if len(set(shards)) > 1:
                raise self._odd(name, shards, "copies")
            return copies(shards, "equal" if replicated is not None else "mean")
        if self._one(TWO_PARTS, name) is not None:
            # torch.chunk(2) gives the larger half first.
            halves = [(-(-s[0] // 2), s[0] // 2) for s in shards]
            widths = [list(half) for half in zip(*halves, strict=True)]
            keys = {"cat_dim": 0, "param_n_sub_params": 2}
            return replace(self._joined(name, shards, 0, widths), keys=keys)
        if parts is not None:
            return self._of_parts(name, shards, *parts)
        dim = 0 if self._one(ROW, name) is None else 1
        if any(len(shard) <= dim for shard in shards):
            raise self._odd(name, shards, f"pieces along dim {dim}")
        whole = self._joined(name, shards, dim, [[shard[dim] for shard in shards]])
        return replace(whole, keys={"cat_dim": dim})

    def _of_parts(self, name: str, shards: Sequence[Shape], part: _Parts, pattern: str) -> Whole:
        """Several matrices in one (q, k and v), each cut among the ranks."""
        dim, said = part.dim, part.sizes
        if any(len(shard) <= dim for shard in shards):
            raise self._odd(name, shards, f"pieces along dim {dim}")
        total = sum(shard[dim] for shard in shards)
        if self._version >= _WIDTHS_SINCE:
            if pattern not in self._widths:
                raise CorruptCheckpoint(f"{self._file}: {WIDTHS} does not name {pattern}")
            listed = sequence_of(self._widths[pattern], self._at(WIDTHS))
            widths = [[int(n) for n in sequence_of(w, self._at(WIDTHS))] for w in listed]
        else:
            sizes = said
            if isinstance(said, int):  # how many there are, all of one size
                if said < 1 or total % said:
                    raise self._odd(name, shards, f"{said} equal parts")
                sizes = (total // said,) * said
            assert not isinstance(sizes, int)
            if uneven := [size for size in sizes if size % len(shards)]:
                raise InvalidInput(
                    f"{name}: a part of {uneven[0]} cut among {len(shards)} tensor ranks, and "
                    f"{INFO} of version {self._version:g} does not say how; give its layout as "
                    "--spec, with --set info=false"
                )
            widths = [[size // len(shards)] * len(shards) for size in sizes]
        ranks = list(zip(*widths, strict=True)) if len({len(w) for w in widths}) == 1 else []
        named = said if isinstance(said, int) else tuple(sum(part) for part in widths)
        if named != said or [sum(own) for own in ranks] != [shard[dim] for shard in shards]:
            raise self._odd(name, shards, f"parts of the widths {widths}")
        whole = self._joined(name, shards, dim, widths)
        spans = list[Any](whole.shape)
        spans[dim] = tuple(sum(own) for own in widths)
        state = {"patterns": list(part.patterns), "shape": tuple(spans), "partition_dim": dim}
        said_again = stand_in(
            "deepspeed.checkpoint.universal_checkpoint", "SubparamShape", state=state
        )
        return replace(whole, keys={"sub_param_shape": said_again})

    def _joined(
        self, name: str, shards: Sequence[Shape], dim: int, widths: Sequence[Sequence[int]]
    ) -> Whole:
        """Parts one after the other along a dim, in a piece per rank (widths[part][rank])."""
        rests = {(*shard[:dim], *shard[dim + 1 :]) for shard in shards}
        if len(rests) > 1:
            raise self._odd(name, shards, f"pieces along dim {dim}")
        shape = list(shards[0])
        shape[dim] = sum(shard[dim] for shard in shards)
        blocks: list[list[Block]] = [[] for _ in shards]
        begins, at = [0] * len(shards), 0
        for part in widths:
            for rank, width in enumerate(part):
                size = list(shape)
                size[dim] = width
                if prod(size):
                    begin, whole = [0] * len(shape), [0] * len(shape)
                    begin[dim], whole[dim] = begins[rank], at
                    blocks[rank].append(Block(tuple(begin), tuple(whole), tuple(size)))
                begins[rank] += width
                at += width
        return Whole(tuple(shape), tuple(map(tuple, blocks)), "copy")

    def _one(self, key: str, name: str) -> str | None:
        return self._alone([p for p in self._lists[key] if re.match(p, name)], key, name)

    def _alone(self, matching: Sequence[str], key: str, name: str) -> str | None:
        if len(matching) > 1:
            raise InvalidInput(
                f"{self._file}: {name} matches {matching[0]} and {matching[1]} of {key}, one at "
                "most is expected; give its layout as --spec, with --set info=false"
            )
        return matching[0] if matching else None

    def _patterns(self, said: Any, key: str) -> tuple[str, ...]:
        found = tuple(sequence_of(said, self._at(key)))
        for one in found:
            try:
                re.compile(one)
            except (TypeError, re.error) as error:
                raise CorruptCheckpoint(
                    f"{self._at(key)}: {one!r} is no pattern: {error}"
                ) from None
        return found

    def _part(self, said: Any) -> _Parts:
        held = mapping_of(said, self._at(PARTS))
        patterns = self._patterns(held.get("patterns") or (), PARTS)
        shape, dim = held.get("shape"), held.get("partition_dim")
        if isinstance(shape, (list, tuple)) and type(dim) is int and 0 <= dim < len(shape):
            sizes = shape[dim]
            if type(sizes) is int:
                return _Parts(patterns, sizes, dim)
            if isinstance(sizes, (list, tuple)) and all(type(n) is int for n in sizes):
                return _Parts(patterns, tuple(sizes), dim)
        raise CorruptCheckpoint(f"{self._at(PARTS)}: {shape!r}, {dim!r} is no shape with a dim")

    def _at(self, key: str) -> str:
        return f"{self._file}: {INFO}.{key}"

    def _odd(self, name: str, shards: Sequence[Shape], what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            f"{self._file}: {INFO} makes {name} of {what}, its shards are {list(shards)}; files of "
            "different runs are mixed, or it is wrong: then give a --spec, with --set info=false"
        )


@dataclass(frozen=True, slots=True)
class _Parts:
    """`parameter_with_sub_params`: `sizes` of the parts along a dim, or how many equal ones."""

    patterns: tuple[str, ...]
    sizes: tuple[int, ...] | int
    dim: int


def info_of(models: Mapping[str, Mapping[str, Any]]) -> Info | None:
    """That of model states by file, on which all agree; None where there is none, or an empty one.

    Raises CorruptCheckpoint where two files differ.
    """
    said = {file: state.get(INFO) for file, state in models.items()}
    (first, info), *others = said.items()
    for file, other in others:
        if not same(other, info):
            raise CorruptCheckpoint(
                f"{file}: its {INFO} differs from that of {first}; files of different runs "
                "are mixed"
            )
    if not info:
        return None
    made = Info(mapping_of(info, f"{first}: {INFO}"), first)
    return made if made.says_something else None
