"""Tracing a module: copy → export → draft → lifting → segments → model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..errors import InvalidInput
from ..graph import Model
from ..lift.assemble import Unlike, assemble
from ..lift.draft import Draft
from ..lift.lifting import lift
from ..lift.pieces import Run
from .annotate import mark_outputs, pins_of
from .buffers import real_buffers
from .evaluate import Evaluations
from .export import Example, Exported, Inputs, example_of, run_export, token_inputs
from .inits import initialised, inits_of
from .normalise import check, normalise
from .prefix import find_runs, logical_names, parameters_of, without_values
from .segments import block_name, cut


def trace(
    module: nn.Module,
    example_inputs: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    *,
    loss: Callable[..., Any] | None = None,
    name: str = "",
) -> Model:
    """Traces a module and its loss into a `Model`.

    Arguments:
        module: on meta or with real values; it is not changed. Its training mode is kept.
        example_inputs: by name, or in forward's order. Their values do not matter, only rank, dtype
            and which dims agree: dim 0 is the batch `b`; dim 1 of token ids [b, s] and of features
            [b, s, h] is the sequence `s`. Inputs that forward does not take go to the loss. None
            will do for a Hugging Face causal language model.
        loss: called with the module's output and the inputs that forward does not take, in order;
            for a module that does not return the scalar itself (as it is, or as `.loss`).
        name: what to call the model; its class by default.

    Raises InvalidInput for a module that cannot be traced and UnsupportedOp for an operation
    without a rule, each in one line that names the place.
    """
    if not isinstance(module, nn.Module):
        raise InvalidInput(
            f"model: got {type(module).__name__}, expected a torch module, a preset name, a "
            "Hugging Face config file or package.module:callable"
        )
    example = example_of(module, _given(module, example_inputs), loss)
    name = name or type(module).__name__
    runs = find_runs(module)
    if any(run.kept < len(run.children) for run in runs):
        try:
            return _traced(module, example, loss, name, runs)
        except (Unlike, InvalidInput):
            pass  # layers that are not alike after all, or that are looked up by number
    whole = [replace(run, kept=len(run.children)) for run in runs]
    try:
        return _traced(module, example, loss, name, whole)
    except Unlike as error:
        raise AssertionError(f"a full trace has nothing to compare: {error}") from error


def _given(module: nn.Module, inputs: Inputs | None) -> Inputs:
    if inputs is not None:
        return inputs
    if hasattr(getattr(module, "config", None), "model_type"):
        return token_inputs()
    raise InvalidInput(
        f"{type(module).__name__}: give example_inputs, tensors by name or in forward's order"
    )


def _traced(
    module: nn.Module,
    example: Example,
    loss: Callable[..., Any] | None,
    name: str,
    runs: Sequence[Run],
) -> Model:
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    twin, originals = without_values(module, runs, fake)
    recorded = initialised(twin)
    mark_outputs(twin)
    names = logical_names(module, originals)
    exported = run_export(twin, example, loss, real_buffers(module, twin), fake)
    frozen = frozenset(n for n, p in module.named_parameters() if not p.requires_grad)
    draft = lifted(exported, names, frozen)
    present = {parameter: names[parameter] for parameter in twin.parameters()}
    inits = inits_of(module, twin, present, recorded)
    model = assemble(
        draft,
        cut(draft, twin, runs),
        runs,
        parameters_of(module, inits, runs),
        lambda piece, index, count: block_name(piece, index, count, twin),
        name,
    )
    return replace(model, pins=(*pins_of(module), *model.pins))


def lifted(exported: Exported, names: Mapping[nn.Parameter, str], frozen: frozenset[str]) -> Draft:
    """The draft in kinds of the op table only. Raises UnsupportedOp for what has none."""
    draft, _ = normalise(exported, names, frozen)
    lift(draft, Evaluations(exported))
    check(draft)
    return draft
