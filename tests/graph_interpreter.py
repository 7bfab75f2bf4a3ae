"""Runs a `Model` in plain torch, op by op: what the emitted programs are measured against.

It has no parallelism and no cleverness; `op_semantics` says what each op computes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from op_semantics import SEMANTICS
from torch import Tensor

from shardwright.ir.graph import Binding, Graph, Model, Value


def binding_of(inputs: tuple[Value, ...], given: Mapping[str, Tensor]) -> dict[str, int]:
    """What the symbols stand for, read off the inputs' shapes."""
    binding: dict[str, int] = {}
    for value in inputs:
        for dim, size in zip(value.dims, given[value.name].shape, strict=True):
            if len(dim) == 1 and isinstance(dim[0], str):
                assert binding.setdefault(dim[0], size) == size
    return binding


def run_graph(graph: Graph, values: dict[str, Tensor], binding: Binding) -> dict[str, Tensor]:
    """Values of the graph's results; `values` holds its inputs and parameters."""
    values = dict(values)
    for name, tensor in values.items():
        assert tuple(tensor.shape) == graph.values[name].shape(binding), name
    for op in graph.ops:
        operands = [values[name] for name in op.operands]
        shapes = [graph.values[name].shape(binding) for name in op.results]
        results = SEMANTICS[op.kind](operands, op.attributes, shapes)
        for name, result, shape in zip(op.results, results, shapes, strict=True):
            assert tuple(result.shape) == tuple(shape), (op.name, result.shape, shape)
            values[name] = result
    return values


def run_model(
    model: Model, parameters: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """(sum, count) of the loss; parameters under their logical names."""
    binding = binding_of(model.inputs, inputs)
    known = {value.name: inputs[value.name] for value in model.inputs}
    preamble = run_graph(model.preamble, {n: known[n] for n in model.preamble.inputs}, binding)
    known |= {name: preamble[name] for name in model.preamble.outputs}
    for segment in model.segments:
        graph = model.blocks[segment.block]
        entering = dict(zip(graph.inputs, (known[n] for n in segment.inputs), strict=True))
        entering |= dict(
            zip(graph.parameters, (parameters[n] for n in segment.parameters), strict=True)
        )
        leaving = run_graph(graph, entering, binding)
        for outer, inner in zip(segment.outputs, graph.outputs, strict=True):
            known[outer] = leaving[inner]
    total, count = (known[name] for name in model.loss)
    return total, torch.as_tensor(count, dtype=total.dtype)
