"""torch.export of a module and its loss without values, flattened to one list of nodes."""

from __future__ import annotations

import inspect
import io
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export

from ..errors import InvalidInput

Inputs = Mapping[str, Tensor] | Sequence[Tensor]

MODEL_DTYPE = torch.bfloat16
"""Parameters are traced in a dtype below float32, so that casts to float32 are seen."""


@dataclass(frozen=True, slots=True)
class Example:
    """Inputs of a training step by name: those of forward, and those that only the loss takes.

    `sequence` names the inputs whose dim 1 is the sequence.
    """

    forward: Mapping[str, Tensor]
    loss: Mapping[str, Tensor]
    sequence: frozenset[str]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All inputs by name, forward's first."""
        return {**self.forward, **self.loss}


@dataclass(frozen=True, slots=True)
class Exported:
    """Nodes in order; what the placeholders are; the node of the loss; symbol → `b` or `s`."""

    nodes: tuple[fx.Node, ...]
    parameters: Mapping[fx.Node, nn.Parameter]
    constants: Mapping[fx.Node, tuple[str, Tensor]]
    inputs: Mapping[fx.Node, str]
    loss: fx.Node
    symbols: Mapping[str, str]


_BATCH, _SEQUENCE = 2, 16


def token_inputs() -> dict[str, Tensor]:
    """Token ids and labels: two tensors, as one would be traced as one input."""
    return {
        name: torch.zeros(_BATCH, _SEQUENCE, dtype=torch.long, device="meta")
        for name in ("input_ids", "labels")
    }


def example_of(module: nn.Module, inputs: Inputs, loss: Callable[..., Any] | None) -> Example:
    """Names the inputs, and deals them to the module's forward and to the loss.

    The last of a sequence go to the loss, as many as it needs beside the module's output; of a
    mapping, those that forward does not take, in order.
    Raises InvalidInput for inputs that nobody takes.
    """
    parameters = inspect.signature(module.forward).parameters
    named = [p for p in parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if isinstance(inputs, Mapping):
        given: dict[str, Any] = dict(inputs)
    else:
        of_loss = _loss_names(loss) if loss else []
        names = [p.name for p in named][: max(0, len(inputs) - len(of_loss))] + of_loss
        if len(inputs) > len(names):
            raise InvalidInput(
                f"example_inputs: {len(inputs)} given, {type(module).__name__}.forward"
                f"{' and the loss' if loss else ''} take {len(names)} ({', '.join(names)})"
            )
        given = dict(zip(names, inputs, strict=False))
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.shape:
            raise InvalidInput(
                f"example input {name!r}: expected a tensor with a batch dim, got {value!r}"
            )
    if not given:
        raise InvalidInput("example_inputs: none given, expected at least one tensor")
    known = {p.name for p in named}
    forward = {n: t for n, t in given.items() if n in known or (takes_any and loss is None)}
    rest = {n: t for n, t in given.items() if n not in forward}
    if rest and loss is None:
        raise InvalidInput(
            f"example inputs {', '.join(rest)}: {type(module).__name__}.forward does not take "
            "them; give loss= a function of (output, ...) that does, or drop them"
        )
    return Example(forward, rest, _sequence_inputs(given))


def _loss_names(loss: Callable[..., Any]) -> list[str]:
    """What a loss must be given beside the module's output."""
    parameters = list(inspect.signature(loss).parameters.values())[1:]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in plain and p.default is p.empty]


def _sequence_inputs(inputs: Mapping[str, Tensor]) -> frozenset[str]:
    """Inputs whose dim 1 is the sequence: token ids [b, s], features [b, s, h], and what agrees."""
    lengths = [t.shape[1] for t in inputs.values() if t.dim() >= 2 and not t.is_floating_point()]
    lengths = lengths or [t.shape[1] for t in inputs.values() if t.dim() == 3]
    if not lengths:
        return frozenset()
    return frozenset(n for n, t in inputs.items() if t.dim() >= 2 and t.shape[1] == lengths[0])


class _Training(nn.Module):
    """The model with its loss, as one module that returns the scalar."""

    def __init__(self, model: nn.Module, example: Example, loss: Callable[..., Any] | None) -> None:
        super().__init__()
        self.model: nn.Module = model
        self._names = frozenset(example.forward)
        self._loss = loss

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        output = self.model(**{n: t for n, t in inputs.items() if n in self._names})
        if self._loss is not None:
            return self._loss(output, *(t for n, t in inputs.items() if n not in self._names))
        found = getattr(output, "loss", None)
        if found is None and isinstance(output, Mapping):
            found = output.get("loss")
        return output if found is None else found


def run_export(
    model: nn.Module,
    example: Example,
    loss: Callable[..., Any] | None,
    buffers: Mapping[str, Tensor],
    fake: FakeTensorMode,
) -> Exported:
    """Exports a module of fake tensors, in training mode as given; `buffers` have real values.

    Raises InvalidInput, in one line, where the module cannot be traced, where its batch dim is not
    symbolic, or where it returns no scalar.
    """
    training = _Training(model, example, loss)
    training.train(model.training)
    inputs, shapes = {}, {}
    lengths = [example.tensors[n].shape[1] for n in example.sequence]
    for name, tensor in example.tensors.items():
        shape, dynamic = list(tensor.shape), {0: Dim.AUTO}
        shape[0] = max(2, max(t.shape[0] for t in example.tensors.values()))
        if name in example.sequence:
            shape[1], dynamic[1] = max(2, lengths[0]), Dim.AUTO
        dtype = MODEL_DTYPE if tensor.is_floating_point() else tensor.dtype
        with fake:
            inputs[name] = torch.empty(shape, dtype=dtype, device="cpu")
        shapes[name] = dynamic
    title = type(model).__name__
    with _where(model) as path, _quiet():
        try:
            program = export(training, (inputs,), dynamic_shapes=(shapes,), strict=False)
        except Exception as error:
            place = f"{title}.{path[-1]}" if path and path[-1] else title
            raise InvalidInput(f"{place} cannot be traced: {_reason(error)}") from error
    return _flattened(program, training, example, buffers, title)


@contextmanager
def _where(model: nn.Module) -> Iterator[list[str]]:
    """Keeps the path of the module that runs; after an error, of the one it came from."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():

        def enter(_: nn.Module, __: Any, name: str = name) -> None:
            stack.append(name)

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            stack.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's log, and its print, of what fails: the error says it in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _reason(error: Exception) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    if "data-dependent" in str(error) or "GuardOnDataDependent" in type(error).__name__:
        return f"its control flow depends on the values of tensors ({reason[:160]})"
    return f"{type(error).__name__}: {reason[:240]}"


def _flattened(
    program: Any, training: _Training, example: Example, buffers: Mapping[str, Tensor], title: str
) -> Exported:
    module = program.graph_module
    _inline(module)
    signature = program.graph_signature
    parameters: dict[fx.Node, nn.Parameter] = {}
    constants: dict[fx.Node, tuple[str, Tensor]] = {}
    inputs: dict[fx.Node, str] = {}
    for node in module.graph.nodes:
        if node.op != "placeholder":
            continue
        if path := signature.inputs_to_parameters.get(node.name):
            parameters[node] = training.get_parameter(path)
        elif path := signature.inputs_to_buffers.get(node.name):
            path = path.removeprefix("model.")
            constants[node] = path, buffers[path]
        elif path := signature.inputs_to_lifted_tensor_constants.get(node.name):
            constants[node] = path, program.constants[path]
        else:
            inputs[node] = node.name
    # the placeholders of a dict come in its order
    inputs = dict(zip(inputs, example.tensors, strict=True))
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    loss = output.args[0][0]
    mutated = set(signature.buffers_to_mutate) & {str(a) for a in output.args[0]}
    if mutated:
        name = signature.buffers_to_mutate[min(mutated)]
        raise InvalidInput(f"{title} changes its buffer {name.removeprefix('model.')} in forward")
    value = loss.meta.get("val") if isinstance(loss, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = (
            f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "no tensor"
        )
        raise InvalidInput(
            f"{title} returns {got}: give loss= a function of its output to a scalar"
        )
    nodes = tuple(n for n in module.graph.nodes if n.op in ("placeholder", "call_function"))
    return Exported(nodes, parameters, constants, inputs, loss, _symbols(inputs, example, title))


def _symbols(inputs: Mapping[fx.Node, str], example: Example, title: str) -> dict[str, str]:
    """Traced symbol → `b` or `s`. The batch must have stayed symbolic; the sequence may not."""
    symbols: dict[str, str] = {}
    for node, name in inputs.items():
        shape = node.meta["val"].shape
        if not _is_symbol(shape[0]):
            raise InvalidInput(
                f"{title} works for a batch of {shape[0]} only (dim 0 of {name!r}): the batch dim "
                "must stay symbolic, so no number in the model may depend on it"
            )
        symbols[str(shape[0].node.expr)] = "b"
        if name in example.sequence and _is_symbol(shape[1]):
            symbols[str(shape[1].node.expr)] = "s"
    return symbols


def _is_symbol(size: Any) -> bool:
    return not isinstance(size, int) and bool(size.node.expr.is_Symbol)


def _inline(module: fx.GraphModule) -> None:
    """Replaces calls of regions (no_grad, autocast) by their contents."""
    graph = module.graph
    for node in list(graph.nodes):
        target = getattr(node.target, "__name__", str(node.target))
        if node.op != "call_function" or target not in _REGIONS:
            continue
        region, operands = node.args[_REGIONS[target]], node.args[_REGIONS[target] + 1 :]
        body = getattr(module, region.target)
        _inline(body)
        inner = [n for n in body.graph.nodes if n.op == "placeholder"]
        values: dict[fx.Node, Any] = dict(zip(inner, operands, strict=True))
        no_grad = target == "wrap_with_set_grad_enabled" and node.args[0] is False
        with graph.inserting_before(node):
            results: Any = graph.graph_copy(body.graph, values)
        for copied in values.values():
            if isinstance(copied, fx.Node) and copied not in operands:
                copied.meta["no_grad"] = no_grad or copied.meta.get("no_grad", False)
                copied.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack"))
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(results[int(str(user.args[1]))])
            graph.erase_node(user)
        graph.erase_node(node)


_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Higher-order op → the position of the region among its arguments."""
