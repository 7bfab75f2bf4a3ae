"""How parameters start: read off what the model's own initialisation does to them.

The initialisation is run on a copy without values, and the in-place calls it makes are written
down. Where it cannot be run, values that are there are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph import Init

_FALLBACK = Init("normal", 0.02)
"""Of a parameter of which nothing is known; GPT-2's standard deviation."""

_SAMPLE = 65536
"""Elements that are looked at when values are measured."""


class Recorder(TorchDispatchMode):
    """Writes down what in-place initialisation does to tensors, by id."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[int, Init] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = str(func).removeprefix("aten.").split(".")[0]
        if name in _CALLS:
            numbers = [float(a) for a in args[1:] if isinstance(a, (int, float))]
            before = self.found.get(id(args[0]))
            if (init := _CALLS[name](before, numbers)) is not None:
                self.found[id(args[0])] = init
        return func(*args, **(kwargs or {}))


Step = Callable[[Init | None, Sequence[float]], Init | None]


def _normal(_: Init | None, numbers: Sequence[float]) -> Init:
    return Init("normal", (*numbers, *(0.0, 1.0)[len(numbers) :])[1])


def _uniform(_: Init | None, numbers: Sequence[float]) -> Init:
    low, high = (*numbers, *(0.0, 1.0)[len(numbers) :])
    return Init("uniform", max(abs(low), abs(high)))


def _erfinv(_: Init | None, __: Sequence[float]) -> Init:
    return Init("normal", 1 / sqrt(2))  # of uniform numbers: how truncated normals begin


def _scaled(before: Init | None, numbers: Sequence[float]) -> Init | None:
    return Init(before.kind, before.value * numbers[0]) if before and numbers else None


def _constant(_: Init | None, numbers: Sequence[float]) -> Init:
    return Init("constant", numbers[0] if numbers else 0.0)


_CALLS: dict[str, Step] = {
    "normal_": _normal,
    "uniform_": _uniform,
    "erfinv_": _erfinv,
    "mul_": _scaled,
    "zero_": _constant,
    "fill_": _constant,
}


def initialised(module: nn.Module) -> dict[int, Init]:
    """Runs the initialisation of a module without values; id of a parameter → how it starts.

    Buffers that lie on the CPU get their values by it, where the model's class does that.
    """
    pretrained = getattr(module, "_init_weights", None)
    recorder = Recorder()
    with recorder, torch.no_grad():
        for child in reversed(list(module.modules())):  # children before their parents
            reset = pretrained or getattr(child, "reset_parameters", None)
            reset = reset or getattr(child, "_reset_parameters", None)
            if callable(reset):
                try:
                    reset(child) if pretrained else reset()
                except Exception:
                    continue
    return recorder.found


def measured(parameter: Tensor) -> Init:
    """The distribution of real values: constant, uniform or normal."""
    sample = parameter.detach().flatten()[:_SAMPLE].double()
    largest, deviation = float(sample.abs().max()), float(sample.std(correction=0))
    if deviation < 1e-12 * max(largest, 1.0):
        return Init("constant", float(sample[0]))
    if sample.numel() >= 64 and largest < 1.78 * float(sample.pow(2).mean().sqrt()):
        return Init("uniform", largest)  # a uniform's largest value is √3 deviations
    return Init("normal", deviation)


def inits_of(
    module: nn.Module,
    twin: nn.Module,
    names: Mapping[nn.Parameter, str],
    recorded: Mapping[int, Init],
) -> dict[str, Init]:
    """Logical name → init. `twin` is the copy without values, `names` its parameters' names,
    `recorded` what `initialised(twin)` found."""
    own = dict(module.named_parameters())
    is_pretrained = hasattr(module, "_init_weights")
    found: dict[str, Init] = {}
    for parameter, name in names.items():
        noted = getattr(own[name], "_shardwright_init", None)
        known = recorded.get(id(parameter))
        if noted is None and not is_pretrained and not own[name].is_meta:
            noted = measured(own[name])
            if known and known.kind == "uniform" == noted.kind:
                noted = known  # the bound that the values were drawn from
        found[name] = noted or known or _FALLBACK
    return found


@contextmanager
def skeleton() -> Iterator[None]:
    """Modules made inside have parameters on meta that remember how they start, and real buffers.

    So a model of any size is built in little memory, and masks and tables keep their values.
    """
    recorder = Recorder()
    noted: dict[int, tuple[nn.Parameter, Tensor]] = {}
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            twin = nn.Parameter(
                parameter.detach().to("meta"), requires_grad=parameter.requires_grad
            )
            if id(parameter) in noted:  # registered twice: tied
                twin = noted[id(parameter)][0]
            elif parameter.numel():
                recorder.found[id(twin)] = measured(parameter)
            noted[id(parameter)] = (twin, parameter)
            parameter = twin
        elif parameter is not None:
            noted.setdefault(id(parameter), (parameter, parameter))
        register(self, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        with _EmptyOnMeta(), recorder:
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        for twin, _ in noted.values():
            if id(twin) in recorder.found:
                twin._shardwright_init = recorder.found[id(twin)]  # type: ignore[attr-defined]


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty`, with which layers make their weights, takes no memory."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
