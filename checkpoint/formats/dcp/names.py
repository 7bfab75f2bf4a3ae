"""What the keys of a DCP checkpoint mean: weights, moments, step, param groups, and the rest.

Known are the names of `get_state_dict` (nested, and with a flattened optimizer), of FSDP1's
`optim_state_dict`, of training loops that nest them under names of their own, and those of the
programs that we emit (`optimizer.exp_avg.NAME`, `train.step`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...contents import BUFFER, MASTER, WEIGHT

STATES = {
    "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "max_exp_avg_sq": "max_exp_avg_sq",
    "momentum_buffer": "momentum_buffer", "exp_inf": "exp_inf", "sum": "sum",
    "square_avg": "square_avg", "master": MASTER, "master_param": MASTER, "fp32_param": MASTER,
}  # fmt: skip
"""Optimizer state that is of its parameter's shape: key → state."""

_MODEL = ("model", "module", "state_dict", "model_state_dict")
_OPTIMIZER = re.compile(r"optim", re.IGNORECASE)
_EMITTED = re.compile(r"optimizer\.(exp_avg|exp_avg_sq)\.(.+)")

Kind = Literal["array", "step", "group", "other"]


@dataclass(frozen=True, slots=True)
class Meaning:
    """Of a key: an array (`state`, `name`), the step of parameter `name`, an entry `key` of a
    param group (`name` of the group, or of its one parameter), or something else at `path`."""

    kind: Kind
    state: str = ""
    name: str = ""
    key: str = ""
    path: tuple[Any, ...] = ()


def meaning(fqn: str, path: Sequence[Any], floating: bool | None, nested: bool) -> Meaning:
    """The meaning of a key.

    `path` as DCP flattened it, `floating` whether it is a floating tensor (None: an object),
    `nested` whether the checkpoint has the model under a key of its own.
    """
    parts = tuple(path) if path else (fqn,)
    if found := _of_optimizer(fqn, parts):
        return found
    if floating is not None and not (parts[0] == "train" or fqn.startswith("train.")):
        at = _model_at(parts)
        if at is not None:
            name = ".".join(map(str, parts[at + 1 :]))
            return Meaning("array", WEIGHT if floating else BUFFER, name)
        if not nested:
            return Meaning("array", WEIGHT if floating else BUFFER, fqn)
    if parts == (fqn,) and fqn.startswith("train."):
        parts = ("train", fqn.removeprefix("train."))
    return Meaning("other", path=parts)


def is_nested(paths: Sequence[tuple[Any, ...]]) -> bool:
    """Whether the model stands under a key of its own (`model`), in any of the paths."""
    return any(_model_at(path) is not None for path in paths)


def _model_at(path: tuple[Any, ...]) -> int | None:
    places = [k for k, part in enumerate(path[:-1]) if part in _MODEL]
    return places[0] if places else None


def _of_optimizer(fqn: str, parts: tuple[Any, ...]) -> Meaning | None:
    if emitted := _EMITTED.fullmatch(fqn):
        return Meaning("array", emitted[1], emitted[2])
    under = [k for k, part in enumerate(parts) if part in ("state", "param_groups")]
    if under and (under[0] == 0 or _OPTIMIZER.search(str(parts[under[0] - 1]))):
        at = under[0]
        rest = parts[at + 1 :]
        if parts[at] == "state" and len(rest) >= 2:
            return _state(".".join(map(str, rest[:-1])), str(rest[-1]))
        if parts[at] == "param_groups" and len(rest) >= 2:
            return Meaning("group", name=".".join(map(str, rest[:-1])), key=str(rest[-1]))
    # A flattened optimizer has one key for all: `state.NAME.exp_avg`, `param_groups.NAME.lr`;
    # without the planner's paths every key is such.
    found = re.fullmatch(r"(?:(.+?)\.)?(state|param_groups)\.(.+)\.(\w+)", fqn)
    if found is None:
        return None
    before, kind, name, key = found.groups()
    if before is not None and not _OPTIMIZER.search(before.split(".")[-1]):
        return None
    if kind == "param_groups":
        return Meaning("group", name=name, key=key)
    return _state(name, key) if key == "step" or key in STATES else None


def _state(name: str, key: str) -> Meaning | None:
    if key == "step":
        return Meaning("step", name=name)
    if key in STATES:
        return Meaning("array", STATES[key], name)
    return None
