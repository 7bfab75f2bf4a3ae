"""Names that torch has for the parameters of a JAX function: `layers.wq[3]` becomes `layers.3.wq`.

A scan runs over slices of stacked arrays; a torch module holds one module per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from ...ir.errors import InvalidInput
from ...ir.graph import Model
from ...ir.paths import inner_name, owns, unstacked
from ..emission.weights import by_name

T = TypeVar("T")

_TAKEN = frozenset(
    {
        "T_destination", "add_module", "apply", "bfloat16", "buffers", "call_super_init",
        "children", "compile", "cpu", "cuda", "double", "dump_patches", "eval", "extra_repr",
        "float", "forward", "get_buffer", "get_extra_state", "get_parameter", "get_submodule",
        "half", "ipu", "load_state_dict", "modules", "mtia", "named_buffers", "named_children",
        "named_modules", "named_parameters", "parameters", "register_backward_hook",
        "register_buffer", "register_forward_hook", "register_forward_pre_hook",
        "register_full_backward_hook", "register_full_backward_pre_hook",
        "register_load_state_dict_post_hook", "register_load_state_dict_pre_hook",
        "register_module", "register_parameter", "register_state_dict_post_hook",
        "register_state_dict_pre_hook", "requires_grad_", "set_extra_state", "set_submodule",
        "share_memory", "state_dict", "to", "to_empty", "train", "training", "type", "xpu",
        "zero_grad",
    }
)  # fmt: skip
"""What `torch.nn.Module` calls its own attributes."""


def torch_names(model: Model) -> dict[str, str]:
    """Every parameter's name in the emitted program.

    Raises InvalidInput where two would be called alike, or one as torch calls something of its own.
    """
    found = {name: name for name in model.parameters}
    for segment in model.segments:
        module = unstacked(segment.module)
        if module == segment.module:
            continue
        for name in segment.parameters:
            if owns(segment.module, name):
                found[name] = f"{module}.{inner_name(name, segment.module)}"
    taken: dict[str, str] = {}
    for name, new in found.items():
        if own := [part for part in new.split(".") if part in _TAKEN]:
            raise InvalidInput(
                f"parameter {name}: {own[0]!r} is an attribute of torch.nn.Module, so that a torch "
                "program cannot hold it under this name; rename it, or emit for jax"
            )
        if new in taken:
            raise InvalidInput(
                f"parameters {taken[new]} and {name}: both would be {new} in torch; rename one"
            )
        taken[new] = name
    return found


def for_torch(model: Model) -> Model:
    """The model under these names."""
    names = torch_names(model)
    if all(name == new for name, new in names.items()):
        return model
    segments = tuple(
        replace(
            segment,
            module=unstacked(segment.module),
            parameters=tuple(names[name] for name in segment.parameters),
        )
        for segment in model.segments
    )
    parameters = {names[n]: replace(p, name=names[n]) for n, p in model.parameters.items()}
    pins = tuple(
        replace(pin, name=names[pin.name]) if pin.target == "parameter" else pin
        for pin in model.pins
    )
    return replace(model, segments=segments, parameters=parameters, pins=pins)


def renamed_weights(model: Model, weights: Mapping[str, T]) -> dict[str, T]:
    """Weights by the names of the emitted program; others keep theirs."""
    names = torch_names(model)
    if all(name == new for name, new in names.items()):
        return dict(weights)
    return {names[name]: tensor for name, tensor in by_name(weights, names).items()}
