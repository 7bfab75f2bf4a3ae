"""Plain weights (one full tensor per name) into this rank's shards, reading only what it needs.

Reads a state dict, a `.pt` file of one, a `.safetensors` file, or a folder of either as Hugging
Face writes it, with or without an index.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import parameters
import torch
from parallel import rectangles, shard
from parameters import PARAMETERS
from safetensors import safe_open
from torch import Tensor, nn

FILES = ("model.safetensors", "pytorch_model.bin", "model.pt")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

# Tensors in Hugging Face files that are no parameters.
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


class Source:
    """Named full tensors of which slices can be read."""

    def __init__(self, origin: str | Path | Mapping[str, Tensor], stack: ExitStack) -> None:
        self.tensors: dict[str, Any] = {}
        if isinstance(origin, Mapping):
            self.tensors.update(origin)
            return
        for path in _files(Path(origin)):
            if path.suffix == ".safetensors":
                opened = stack.enter_context(safe_open(path, framework="pt"))
                self.tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            else:
                self.tensors |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def shape(self, name: str) -> tuple[int, ...]:
        """The full shape."""
        tensor = self.tensors[name]
        return tuple(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """One box of a tensor."""
        box: Tensor = self.tensors[name][slices if slices else ...]
        return box


def _files(path: Path) -> list[Path]:
    """The files that a path stands for."""
    if path.is_file() and path.name.endswith(".index.json"):
        names = json.loads(path.read_text())["weight_map"].values()
        return [path.parent / name for name in sorted(set(names))]
    if path.is_file():
        return [path]
    for name in (*INDEXES, *FILES):
        if (path / name).is_file():
            return _files(path / name)
    raise SystemExit(f"weights {path}: expected a .safetensors or .pt file, or a folder with one")


@torch.no_grad()
def load_weights(stage: nn.Module, origin: str | Path | Mapping[str, Tensor]) -> None:
    """Fills a stage's parameters; ValueError names all that is missing, left over or ill-shaped."""
    with ExitStack() as stack:
        source = Source(origin, stack)
        names = _match(source)
        for name, parameter in stage.named_parameters():
            here = shard(parameter)
            for box in rectangles(name):
                here[box.in_local()].copy_(source.read(names[name], box.in_full()))


def _match(source: Source) -> dict[str, str]:
    """Our name → the source's, for every parameter of the model, of all stages."""
    tied: Mapping[str, str] = getattr(parameters, "TIED", {})  # other name → ours
    theirs = [name for name in source.tensors if not name.endswith(NOT_WEIGHTS)]
    # A file of the base model alone lacks the first part of our names (GPT-2's `transformer.`).
    prefix = ""
    if not set(theirs) & set(PARAMETERS):
        prefix = next(iter(PARAMETERS)).partition(".")[0] + "."
    ours = {tied.get(prefix + name, prefix + name): name for name in reversed(theirs)}
    ours |= {prefix + name: name for name in theirs}
    missing = [name for name in PARAMETERS if name not in ours]
    unknown = [name for name in theirs if prefix + name not in PARAMETERS]
    unknown = [name for name in unknown if not _is_copy(name, prefix, source, tied)]
    wrong = [
        f"{ours[name]} {source.shape(ours[name])}, expected {tuple(spec.shape)}"
        for name, spec in PARAMETERS.items()
        if name in ours and source.shape(ours[name]) != tuple(spec.shape)
    ]
    found = {"missing": missing, "not in the model": unknown, "of another shape": wrong}
    if any(found.values()):
        said = [f"{what}: {_some(names)}" for what, names in found.items() if names]
        raise ValueError("the weights do not fit the model; " + "; ".join(said))
    return {name: ours[name] for name in PARAMETERS}


def _is_copy(name: str, prefix: str, source: Source, tied: Mapping[str, str]) -> bool:
    """Whether a tensor without a parameter of its own is a second copy of a tied one."""
    if prefix + name in tied:
        return True
    shape = source.shape(name)
    same = [
        n for n, spec in PARAMETERS.items() if tuple(spec.shape) == shape and n in source.tensors
    ]
    row = (slice(0, 1),) * len(shape)
    for other in same:
        if torch.equal(source.read(name, row), source.read(other, row)) and all(
            torch.equal(source.read(name, box.in_full()), source.read(other, box.in_full()))
            for box in rectangles(other)
        ):
            return True
    return False


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
