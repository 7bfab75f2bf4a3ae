"""Models by name, from `presets.yaml`."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..errors import InvalidInput

_FILE = Path(__file__).with_name("presets.yaml")


@cache
def _presets() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(_FILE.read_text())
    return loaded


def preset_names() -> tuple[str, ...]:
    """Names of all presets, sorted."""
    return tuple(sorted(_presets()))


def preset_config(name: str) -> dict[str, Any]:
    """The Hugging Face config of a preset. Raises InvalidInput with the nearest names."""
    if name not in _presets():
        raise InvalidInput(f"model {name!r}: no such preset; {nearest(name)}")
    return dict(_presets()[name])


def nearest(name: str) -> str:
    """What to say about a name that is none."""
    close = difflib.get_close_matches(name.lower(), preset_names(), n=3, cutoff=0.4)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known are {', '.join(preset_names())}"
