"""The formats: how each says what lies where.

A format is a module with

    def found(root: Path) -> str | None       why this directory is one of its kind, or None
    def read(root: Path, options: Options) -> Contents
    def target(wanted: Sequence[Wanted], job: Job, options: Options) -> Target

`read` touches headers only, and raises CorruptCheckpoint (what, in which file) where they
contradict themselves; `target` raises InvalidInput where the format cannot express what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from ...ir import InvalidInput
from ..contents import Contents, Given, Job, Target, Wanted


@dataclass(frozen=True, slots=True)
class Options:
    """What a user says about a checkpoint that it does not say itself.

    `mesh` of the target (`{"tp": 2, "pp": 2, "dp": 4}`); `tag` or step where a directory holds
    several; `flags` of single formats (`stage` of DeepSpeed, `shard_bytes` of safetensors, …), as
    `flags.checked` makes them. `companions`: files that are written beside the target's own.
    """

    mesh: Mapping[str, int] = field(default_factory=dict)
    tag: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)
    companions: Sequence[Given] = ()


class Format(Protocol):
    """What a module of this folder offers."""

    found: Callable[[Path], str | None]
    read: Callable[[Path, Options], Contents]
    target: Callable[[Sequence[Wanted], Job, Options], Target]


MODULES = {
    "universal": "universal",
    "safetensors": "safetensors",
    "megatron-dist": "megatron_dist",
    "dcp": "dcp",
    "deepspeed-universal": "deepspeed_universal",
    "deepspeed": "deepspeed",
    "megatron": "megatron",
    "orbax": "orbax",
}
"""`--to` name → module, in the order in which a directory is asked (the more specific first)."""


def load(name: str) -> Format:
    """The format of that name; raises InvalidInput with the names there are."""
    if name not in MODULES:
        raise InvalidInput(f"format {name!r}: expected one of {', '.join(MODULES)}")
    return cast(Format, import_module(f".{MODULES[name]}", __name__))


def detect(root: Path) -> str:
    """The format of a checkpoint; raises InvalidInput with what was looked for if it is none."""
    if not root.exists():
        raise InvalidInput(f"no checkpoint at {root}: it does not exist")
    for name in MODULES:
        if load(name).found(root) is not None:
            return name
    raise InvalidInput(f"{root} is no checkpoint of a known format ({', '.join(MODULES)})")
