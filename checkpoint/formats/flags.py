"""What `--set`, `--tag` and `--mesh` can say of each format: all else is refused, not ignored."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any

from ...ir import InvalidInput
from ..dtypes import named

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def byte_count(said: Any) -> int | None:
    """Bytes of a number or of a text as `512M`; None for what is neither."""
    if type(said) is int:
        return said
    match = _SIZE.fullmatch(said.strip()) if isinstance(said, str) else None
    return int(float(match[1]) * _UNITS[match[2].upper()]) if match is not None else None


def _at_least(least: int) -> Callable[[Any], int | None]:
    return lambda said: said if type(said) is int and said >= least else None


def _some_bytes(said: Any) -> int | None:
    found = byte_count(said)
    return found if found else None


def _one_of(*words: Any) -> Callable[[Any], Any]:
    return lambda said: said if type(said) is not bool and said in words else None


def _yes_or_no(said: Any) -> bool | None:
    return said if type(said) is bool else None


def _number(said: Any) -> float | None:
    try:
        found = float(said) if type(said) is not bool else nan
    except (TypeError, ValueError):
        return None
    return found if isfinite(found) else None


def _layers(said: Any) -> str | None:
    return str(said) if re.fullmatch(r"\d+(-\d+)*", str(said)) else None


def _dtype(said: Any) -> str | None:
    try:
        return named(str(said))
    except InvalidInput:
        return None


def _name(said: Any) -> str | None:
    return str(said) if isinstance(said, str | int) and str(said) else None


def _names(said: Any) -> list[str] | None:
    """A list of names, or those in a file (`@names.txt`)."""
    if isinstance(said, str) and said.startswith("@"):
        try:
            return Path(said[1:]).read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"--set order={said}: cannot read the file: {error}") from None
    if isinstance(said, str | int):
        said = [said]
    return [str(name) for name in said] if isinstance(said, list) else None


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag of a format: what may be said (`expected`, in words; `value` makes None of what may
    not), what it does, and on which side: `read` of a source, `written` of a target."""

    name: str
    expected: str
    value: Callable[[Any], Any]
    about: str
    read: bool = False
    written: bool = True


_ZERO = (
    Flag("stage", "1, 2 or 3", _one_of(1, 2, 3), "ZeRO stage (the source's, or 2)"),
    Flag(
        "order", "names separated by commas, or @FILE with them", _names,
        "the parameters in the order of the engine's optimizer",
    ),
    Flag(
        "mixed_steps", "true or false", _yes_or_no, "read ranks that are of different steps",
        read=True, written=False,
    ),
    Flag("tag", "a name", _name, "of the folder written (the source's, or global_stepN)"),
    Flag(
        "foreign", "data", _one_of("data"),
        "what would call functions of a user's when loaded is written as plain values",
    ),
)  # fmt: skip
_INFO = Flag(
    "info", "true or false", _yes_or_no, "take universal_checkpoint_info for the layout (true)",
    read=True, written=False,
)  # fmt: skip
_ITERATION = Flag("iteration", "a whole number", _at_least(0), "of the folder (the step)")

FLAGS: Mapping[str, tuple[Flag, ...]] = {
    "safetensors": (
        Flag("shard_bytes", "bytes, as 5G, at least 1", _some_bytes, "of a file (5 GB)"),
    ),
    "dcp": (
        Flag(
            "names", "state_dict or emitted", _one_of("state_dict", "emitted"),
            "keys as get_state_dict has them, or as our programs",
        ),
        Flag("lr", "a number, as 3e-4", _number, "where the source tells none (torch's: 1e-3)"),
    ),
    "deepspeed": (*_ZERO, _INFO),
    "deepspeed-universal": _ZERO,
    "megatron": (
        Flag("stages", "layers of each stage, as 8-8-7-9", _layers, "where they differ"),
        _ITERATION,
        Flag("grad_dtype", "a dtype, as bf16", _dtype, "of the gradients' buffers (F32)"),
        Flag(
            "bucket_elements", "a whole number from 1", _at_least(1),
            "ddp_bucket_size of the run that wrote or reads it", read=True,
        ),
    ),
    "megatron-dist": (_ITERATION,),
    "orbax": (
        Flag(
            "tree", "emitted, standard, train_state or source",
            _one_of("emitted", "standard", "train_state", "source"),
            "items of our programs, one tree, one as flax's TrainState, or as an orbax source had",
        ),
        Flag("nested", "true or false", _yes_or_no, "nested dicts of names with dots"),
        Flag("schedule", "true or false", _yes_or_no, "a learning rate that is a schedule"),
        Flag("chunk_bytes", "bytes, as 128M, at least 1", _some_bytes, "of a chunk at most"),
    ),
}  # fmt: skip
"""The flags (`--set`) of formats that have any."""

TAGGED = ("deepspeed", "deepspeed-universal", "megatron", "megatron-dist", "orbax")
"""Formats that keep several saves in a directory, of which `--tag` names one."""

WHOLE = ("universal", "safetensors", "orbax")
"""Formats whose files do not depend on ranks: a mesh says something to a layout only."""


def checked(
    said: Mapping[str, Any], source: str, target: str = "", tag: str = ""
) -> dict[str, Any]:
    """The flags of a conversion (or of reading alone, without a `target`), as their formats take
    them. Raises InvalidInput for a flag or a tag that neither format would look at, and for a value
    that is none of what is expected."""
    if tag and source not in TAGGED:
        raise InvalidInput(
            f"--tag {tag}: a {source} directory is one save; leave it out, or name the directory"
        )
    known = {flag.name: flag for flag in FLAGS.get(source, ()) if flag.read}
    known |= {flag.name: flag for flag in FLAGS.get(target, ()) if flag.written}
    found = {}
    for name, value in said.items():
        if name not in known:
            sides = (
                f"neither reading {source} nor writing {target} has"
                if target
                else (f"reading {source} has not")
            )
            raise InvalidInput(
                f"--set {name}: {sides} such a flag; expected {', '.join(sorted(known)) or 'none'}"
            )
        made = known[name].value(value)
        if made is None:
            shown = ",".join(map(str, value)) if isinstance(value, list) else value
            raise InvalidInput(f"--set {name}={shown}: expected {known[name].expected}")
        found[name] = made
    return found


def described() -> str:
    """All flags, for `--help`."""
    forms: dict[tuple[Flag, ...], list[str]] = {}
    for form, flags in FLAGS.items():
        forms.setdefault(flags, []).append(form)
    return ". ".join(
        f"{', '.join(names)}: "
        + "; ".join(f"{flag.name} ({flag.expected}): {flag.about}" for flag in flags)
        for flags, names in forms.items()
    )
