"""Repeated modules: found before tracing, so that each distinct one is traced twice and no more.

A list of modules whose children are structurally equal is cut to its shortest prefix that holds two
of each kind. It must be a prefix: models look up settings of a layer by its position. That the two
traces are equal is checked afterwards; where they are not, the model is traced in full.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import InvalidInput
from ..graph import Init, Parameter, Pin
from ..lift.pieces import Run
from .export import MODEL_DTYPE

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def find_runs(module: nn.Module, path: str = "") -> list[Run]:
    """The outermost lists of modules, in order; lists whose children all differ are looked into."""
    runs: list[Run] = []
    if isinstance(module, LISTS) and len(module):
        run = _run(module, path)
        if len(set(run.alike)) < len(run.alike) or len(run.alike) == 1 or not _lists(module):
            return [run]
    for name, child in module.named_children():
        runs += find_runs(child, f"{path}.{name}" if path else name)
    return runs


def _lists(module: nn.Module) -> bool:
    return any(isinstance(m, LISTS) for m in module.modules() if m is not module)


def _run(module: nn.Module, path: str) -> Run:
    children = dict(module.named_children())
    kinds: dict[Any, int] = {}
    alike = [kinds.setdefault(_signature(child), len(kinds)) for child in children.values()]
    kept, seen = len(alike), [0] * len(kinds)
    want = [min(2, alike.count(kind)) for kind in range(len(kinds))]
    for i, kind in enumerate(alike):
        seen[kind] += 1
        if all(have >= need for have, need in zip(seen, want, strict=True)):
            kept = i + 1
            break
    if any(next(child.parameters(), None) is None for child in children.values()):
        kept = len(alike)
    return Run(path, tuple(children), tuple(alike), kept)


def _signature(module: nn.Module) -> tuple[Any, ...]:
    """What makes two modules alike: classes, parameters, buffers and plain settings throughout."""
    parts: list[Any] = []
    for name, child in module.named_modules(remove_duplicate=False):
        own = [
            (n, tuple(p.shape), p.dtype, p.requires_grad)
            for n, p in child._parameters.items()
            if p is not None
        ]
        buffers = [(n, tuple(b.shape), b.dtype) for n, b in child._buffers.items() if b is not None]
        plain = sorted(
            (n, repr(v)) for n, v in vars(child).items() if not _is_index(n) and _is_plain(v)
        )
        parts.append((name, type(child), tuple(own), tuple(buffers), tuple(plain)))
    return tuple(parts)


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, Pin))


@lru_cache(maxsize=4096)
def _is_index(name: str) -> bool:
    """Attributes that number a layer: alike layers differ in them."""
    lower = name.lower()
    return any(part in lower for part in ("idx", "index", "layer_id", "layer_number", "layer_num"))


def without_values(
    module: nn.Module, runs: Sequence[Run], fake: FakeTensorMode
) -> tuple[nn.Module, dict[nn.Parameter, nn.Parameter]]:
    """A copy without values, every run cut to its prefix, and its parameters → the originals.

    The user's module is not touched. Raises InvalidInput where it cannot be copied.
    """
    memo: dict[int, Any] = {}
    cut = {run.child(i) for run in runs for i in range(run.kept, len(run.children))}
    originals: dict[nn.Parameter, nn.Parameter] = {}
    for path, child in _outside(module, cut):
        if path in cut:
            memo[id(child)] = nn.Identity()
            continue
        for parameter in child.parameters(recurse=False):
            if id(parameter) not in memo:
                twin = nn.Parameter(_fake(parameter, fake), requires_grad=parameter.requires_grad)
                memo[id(parameter)] = twin
                originals[twin] = parameter
    for buffer in module.buffers():
        memo[id(buffer)] = _fake(buffer, fake)
    try:
        twin_module = copy.deepcopy(module, memo)
    except Exception as error:
        raise InvalidInput(f"{type(module).__name__} cannot be copied: {error}") from error
    for run in runs:
        inner = twin_module.get_submodule(run.path)
        for name in run.children[run.kept :]:
            del inner._modules[name]
    return twin_module, originals


def _outside(
    module: nn.Module, cut: Collection[str], path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their paths, and those that are cut without what is in them."""
    yield path, module
    if path not in cut:
        for name, child in module.named_children():
            yield from _outside(child, cut, f"{path}.{name}" if path else name)


def _fake(tensor: Tensor, fake: FakeTensorMode) -> Tensor:
    """A tensor that says it is on the CPU and holds nothing.

    On meta, what forward makes without naming a device would be elsewhere than the parameters, and
    the numbers that it makes tensors of would be lost.
    """
    dtype = MODEL_DTYPE if tensor.is_floating_point() else tensor.dtype
    with fake:
        return torch.empty(tensor.shape, dtype=dtype, device="cpu")


def logical_names(
    module: nn.Module, originals: Mapping[nn.Parameter, nn.Parameter]
) -> dict[nn.Parameter, str]:
    """Parameter of the copy → its logical name: the first that the original has for it."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {twin: names[original] for twin, original in originals.items()}


def parameters_of(
    module: nn.Module, inits: Mapping[str, Init], runs: Sequence[Run]
) -> dict[str, Parameter]:
    """All logical parameters in the module's order; those that were not traced start as the ones
    that they are like."""
    like = {run.child(i): run.child(run.alike.index(run.alike[i]))
            for run in runs for i in range(len(run.children))}  # fmt: skip
    return {
        name: Parameter(
            name,
            tuple(parameter.shape),
            inits.get(name) or inits[_like(name, like)],
            parameter.requires_grad,
        )
        for name, parameter in module.named_parameters()
    }


def _like(name: str, like: Mapping[str, str]) -> str:
    """The parameter of the traced module that the one of this name is like."""
    unit = name
    while unit not in like:
        unit = unit.rpartition(".")[0]
    return like[unit] + name.removeprefix(unit)
