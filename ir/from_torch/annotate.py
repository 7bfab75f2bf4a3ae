"""`sw.annotate`: pins on parameters, activations, modules' outputs and stages.

A pin on a parameter or a module is an attribute of it, read when the model is traced. A pin on an
activation inside `forward` is an identity op that the trace shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidInput
from ..graph import Pin
from ..types import AxisType

_PINS = "_shardwright_pins"
_OUTPUT = "output"
PIN_OP = "shardwright.pin"
"""How the identity op is called in a trace."""


@torch.library.custom_op("shardwright::pin", mutates_args=())
def pin(x: Tensor, types: str) -> Tensor:
    """The identity; `types` is JSON of axis → SBP type."""
    return x.clone()


@pin.register_fake
def _(x: Tensor, types: str) -> Tensor:
    return torch.empty_like(x)


pin.register_autograd(lambda context, gradient: (gradient, None))


def annotate(target: Any, *, params: str | None, stage: int | None, axes: Mapping[str, str]) -> Any:
    """See `shardwright.annotate`. Raises InvalidInput for types that are none."""
    for axis, kind in axes.items():
        if not isinstance(kind, str):
            raise InvalidInput(f'sw.annotate: {axis}={kind!r}, expected a type such as "S(0)"')
    types = {axis: str(AxisType.parse(kind)) for axis, kind in axes.items()}
    if isinstance(target, nn.Module):
        _annotate_module(target, params, stage, types)
        return target
    if stage is not None or params is not None:
        raise InvalidInput("sw.annotate: stage= and params= are for modules")
    if not types:
        raise InvalidInput('sw.annotate: expected an axis and a type, such as tp="S(0)"')
    if isinstance(target, nn.Parameter):
        _add(target, Pin("parameter", "", types))
        return target
    if isinstance(target, Tensor):
        return pin(target, json.dumps(types)) if torch.compiler.is_exporting() else target
    raise InvalidInput(
        f"sw.annotate: {type(target).__name__}, expected a parameter, a tensor or a module"
    )


def _annotate_module(
    module: nn.Module, params: str | None, stage: int | None, types: Mapping[str, str]
) -> None:
    if stage is not None:
        if type(stage) is not int or stage < 0:
            raise InvalidInput(f"sw.annotate: stage={stage!r}, expected a number from 0 on")
        _add(module, Pin("stage", "", stage=stage))
    if params is not None:
        if not types:
            raise InvalidInput(f'sw.annotate: params={params!r} without a type such as tp="S(0)"')
        matching = [p for name, p in module.named_parameters() if fnmatch(name, params)]
        if not matching:
            raise InvalidInput(
                f"sw.annotate: no parameter of {type(module).__name__} matches {params!r}"
            )
        for parameter in matching:
            _add(parameter, Pin("parameter", "", types))
    elif types:
        _add(module, Pin("activation", _OUTPUT, types))
    elif stage is None:
        raise InvalidInput('sw.annotate: expected an axis and a type, or stage=, such as tp="S(0)"')


def _add(target: Any, new: Pin) -> None:
    setattr(target, _PINS, (*getattr(target, _PINS, ()), new))


def pins_of(module: nn.Module) -> tuple[Pin, ...]:
    """Pins on parameters and stages of a module, under their names and paths."""
    return tuple(_parameter_pins(module)) + tuple(_stage_pins(module))


def _parameter_pins(module: nn.Module) -> Iterator[Pin]:
    for name, parameter in module.named_parameters():
        for mark in getattr(parameter, _PINS, ()):
            yield Pin("parameter", name, mark.types)


def _stage_pins(module: nn.Module) -> Iterator[Pin]:
    for path, child in module.named_modules():
        for mark in getattr(child, _PINS, ()):
            if mark.target == "stage":
                yield Pin("stage", path, stage=mark.stage)


def mark_outputs(module: nn.Module) -> None:
    """Makes pinned outputs of modules show in a trace: hooks on a copy that is about to be
    exported."""
    for child in module.modules():
        for mark in getattr(child, _PINS, ()):
            if mark.target == "activation":
                child.register_forward_hook(_hook(json.dumps(dict(mark.types))))


def _hook(types: str) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return pin(output, types)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (pin(output[0], types), *output[1:])
        raise InvalidInput(
            f"sw.annotate: the output of a pinned module is {type(output).__name__}, expected a "
            "tensor"
        )

    return hook
