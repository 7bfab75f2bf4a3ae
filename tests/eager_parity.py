"""A traced JAX function against the function itself: the graph, run op by op in torch, gives the
same loss and the same gradients."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from graph_interpreter import run_model

from shardwright.ir import Model
from shardwright.ir.from_jax import widen
from shardwright.ir.from_jax.trees import named_inputs, named_leaves


def entry(values: dict[str, Any], name: str) -> Any:
    """A parameter of the model among the leaves of the tree: `wq[3]` is a part of `wq`."""
    found = re.fullmatch(r"(.*)\[(\d+)\]", name)
    return values[found[1]][int(found[2])] if found else values[name]


def compare(function: Any, params: Any, inputs: Any, model: Model) -> None:
    """Asserts it to 1e-12 for the loss and 1e-10 for gradients; with 64 bits enabled in JAX, and on
    other batch and sequence sizes than the example inputs have."""
    generator = np.random.default_rng(0)
    names = list(named_leaves(params, "params")[0])
    values = {n: generator.normal(size=leaf.shape) * 0.3
              for n, leaf in zip(names, jax.tree.leaves(params), strict=True)}  # fmt: skip
    stored = {n: torch.tensor(entry(values, n)).requires_grad_() for n in model.parameters}
    given, _, _, structure = named_inputs(function, inputs)
    batch = {n: drawn(leaf, generator) for n, leaf in given.items()}  # other sizes than traced
    arguments, _ = jax.tree.unflatten(structure, list(map(jnp.asarray, batch.values())))
    tree = jax.tree.unflatten(jax.tree.structure(params), list(map(jnp.asarray, values.values())))

    want, gradients = jax.value_and_grad(widen(lambda p, a: function(p, *a)))(tree, arguments)
    total, count = run_model(model, stored, {n: torch.tensor(v) for n, v in batch.items()})
    (total / count).backward()

    assert float((total / count).detach()) == pytest.approx(float(want), rel=1e-12)
    by_name = dict(zip(names, map(np.asarray, jax.tree.leaves(gradients)), strict=True))
    largest = max(float(np.abs(g).max()) for g in by_name.values())
    assert {n.partition("[")[0] for n in stored} == set(names)
    for n, parameter in stored.items():
        right = entry(by_name, n)
        mine = np.zeros(1) if parameter.grad is None else parameter.grad.numpy()  # a choice's
        apart = float(np.abs(mine - right).max())
        assert apart <= 1e-10 * max(float(np.abs(right).max()), 1e-6 * largest), n


def drawn(leaf: Any, generator: Any) -> Any:
    shape = [3, *leaf.shape[1:]]
    if leaf.dtype.kind == "i" and len(shape) == 2:
        shape[1] = 20
    if leaf.dtype.kind != "i":
        return generator.normal(size=shape)
    return generator.integers(0, 10, shape)
