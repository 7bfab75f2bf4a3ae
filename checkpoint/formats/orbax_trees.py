"""The trees of orbax: their leaves, what they mean, and how a tree is remembered.

An orbax tree is whatever a program saved: a flax TrainState, the parameters alone, items side by
side. Arrays of the parameters are weights; an array that lies under a field of the optimizer by a
parameter's own path (`opt_state/0/mu/…`, `acc_grads/…`, `ema/…`) is a state of that parameter. All
else (counters, keys of random generators, strings, empty containers) is a value. Paths, kinds and
values go along as `Job.others["orbax"]`, so that the same tree can be made again after any number
of hops through other formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...ir import CorruptCheckpoint
from ..contents import BUFFER, EXP_AVG, EXP_AVG_SQ, WEIGHT, Key

TREE, CHECKPOINT, STRINGS = "_METADATA", "_CHECKPOINT_METADATA", "_strings.json"
ORBAX = "orbax"
"""The key of `Job.others` under which trees are remembered."""

MOMENTS = {"mu": EXP_AVG, "nu": EXP_AVG_SQ, "trace": "momentum_buffer"}
"""Fields of optax's states whose content torch keeps under another name."""

EMPTY = ("None", "Dict", "List", "Tuple")
"""Kinds of leaves that hold nothing."""

SEQUENCE, DICT = 1, 2

_PARAMS = ("params", "model")
_VALUE_BYTES = 64 << 10
"""Of an array beside the parameters that is kept as a value; larger ones are buffers."""

Keys = tuple[tuple[str, int], ...]
"""Keys of a path with their kinds."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf of a tree: the item it is in ("" if the checkpoint is one tree), the keys that lead to
    it, and its kind as orbax names it (`jax.Array`, `scalar`, `string`, `None`, …)."""

    item: str
    keys: Keys
    kind: str

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(key for key, _ in self.keys)

    @property
    def stored(self) -> str:
        """The name under which it is stored."""
        return ".".join(self.path)

    @property
    def called_path(self) -> tuple[str, ...]:
        """The path with the item, unique in a checkpoint."""
        return tuple(filter(None, (self.item, *self.path)))


def leaves(tree: Any, item: str) -> Iterator[Leaf]:
    """The leaves of what `_METADATA` says; raises CorruptCheckpoint where it is damaged."""
    described = tree.get("tree_metadata") if isinstance(tree, dict) else None
    if not isinstance(described, dict):
        raise CorruptCheckpoint(f"{item or '.'}/{TREE}: no tree_metadata in it")
    for value in described.values():
        try:
            kind = str(value["value_metadata"]["value_type"])
            keys = tuple((str(key["key"]), int(key["key_type"])) for key in value["key_metadata"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptCheckpoint(f"{item or '.'}/{TREE}: damaged ({error!r})") from None
        if keys:
            yield Leaf(item, keys, kind)


class Meanings:
    """What the leaves of a checkpoint's trees mean, all of them taken together."""

    def __init__(self, every: Sequence[Leaf]) -> None:
        every = [leaf for leaf in every if leaf.kind not in (*EMPTY, "string")]
        nested = {leaf.item for leaf in every if _at_params(leaf.path)}
        self._weights: dict[Leaf, str] = {}
        for leaf in every:
            if _at_params(leaf.path) if leaf.item in nested else leaf.item in _PARAMS:
                self._weights[leaf] = ".".join(_bare(leaf.path))
        if not self._weights:  # parameters alone, under no name
            plain = [leaf for leaf in every if not _of_optax(leaf.path)]
            items = {leaf.item for leaf in plain}
            self._weights = {
                leaf: leaf.stored if len(items) == 1 else ".".join(leaf.called_path)
                for leaf in plain
            }
        self._tails: dict[tuple[str, ...], str] = {}
        for leaf, name in self._weights.items():
            for at in range(len(leaf.path) - len(_bare(leaf.path)) + 1):
                self._tails.setdefault(leaf.path[at:], name)
        self._taken: set[Key] = set()

    def of(self, leaf: Leaf, shape: Sequence[int], nbytes: int) -> Key | None:
        """(state, name) of the array that a leaf is; None where it is a value."""
        if leaf in self._weights:
            return self._free((WEIGHT, self._weights[leaf]), leaf)
        at = self._field(leaf.path)
        if at is not None and shape:
            tail = leaf.path[at + 1 :]
            name = self._tails.get(tail, ".".join(_bare(tail)))
            return self._free((_state(leaf.path, at), name), leaf)
        return (
            self._free((BUFFER, ".".join(leaf.called_path)), leaf)
            if nbytes > _VALUE_BYTES
            else None
        )

    def _free(self, key: Key, leaf: Leaf) -> Key:
        """A key of its own: an optimizer may keep one thing twice (two chains)."""
        if key in self._taken:
            at = self._field(leaf.path)
            key = (".".join(filter(None, (leaf.item, *leaf.path[: (at or 0) + 1]))), key[1])
        self._taken.add(key)
        return key

    def _field(self, path: tuple[str, ...]) -> int | None:
        """The place of the field under which an array of a parameter lies."""
        for at in range(len(path) - 1):
            if path[at + 1 :] in self._tails:
                return at
        return next((at for at, key in enumerate(path[:-1]) if key in MOMENTS), None)


def _state(path: tuple[str, ...], at: int) -> str:
    """The state that a field holds: its name, with what is before a number."""
    if path[at] in MOMENTS:
        return MOMENTS[path[at]]
    first = at
    while first and path[first].isdigit():
        first -= 1
    return ".".join(path[first : at + 1])


def _at_params(path: tuple[str, ...]) -> bool:
    return path[0] in _PARAMS and len(path) > 1


def _bare(path: tuple[str, ...]) -> tuple[str, ...]:
    while _at_params(path):
        path = path[1:]
    return path


def _of_optax(path: tuple[str, ...]) -> bool:
    return path[-1] == "count" or any(key in MOMENTS for key in path[:-1])


def step_of(counters: Mapping[tuple[str, ...], int]) -> int | None:
    """The optimizer's step among counters by their paths: the one beside the moments (`count` of
    scale_by_adam comes first in a chain), else any `count`, else a train state's `step`."""
    for last in ("count", "gradient_step", "step"):
        found = [value for path, value in counters.items() if path[-1] == last]
        if found:
            return max(found) if last == "count" else found[0]
    return None


def hyperparameters(values: Mapping[tuple[str, ...], Any]) -> tuple[dict[str, Any], ...]:
    """Param groups of what optax.inject_hyperparams keeps, under torch's names."""
    found = {path[-1]: v for path, v in values.items() if path[-2:-1] == ("hyperparams",)}
    if "learning_rate" not in found:
        return ()
    group: dict[str, Any] = {"lr": found["learning_rate"]}
    if "b1" in found and "b2" in found:
        group["betas"] = [found["b1"], found["b2"]]
    return ({**group, **{k: found[k] for k in ("eps", "weight_decay") if k in found}},)
