"""The judge of a JAX function's programs: the function itself on one device.

Parameters that are shapes get values; those that have values are perturbed, so that a bias that is
zero, or a norm's weight that is one, hides nothing. In float64 the function's own casts to float32
are widened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ...ir.errors import InvalidInput
from ...ir.from_jax import widen
from ...ir.from_jax.trees import named_inputs, named_leaves
from ...ir.plan import Plan
from ..emission.batch import batch_entries, drawn_batch
from ..emission.weights import save

PERTURBATION = 0.02
IGNORED = -100

# More is no model to run beside a test: float64 weights and gradients of it take gigabytes.
MOST_ELEMENTS = 200_000_000

_SLICE = re.compile(r"(.*)\[(\d+)\]")


class FunctionReference:
    """A function `(params, *inputs) -> loss` with values for its parameters."""

    def __init__(
        self,
        function: Callable[..., Any],
        params: Any,
        example_inputs: Mapping[str, Any] | Sequence[Any],
        used: Collection[str],
        dtype: str = "float64",
    ) -> None:
        """`used` names the parameters that the model trains, slices of stacks one by one.

        Raises InvalidInput for a function that is too large to run here.
        """
        leaves, self.structure = named_leaves(params, "params")
        if (count := sum(prod(np.shape(leaf)) for leaf in leaves.values())) > MOST_ELEMENTS:
            raise InvalidInput(
                f"this function has {count:,} parameters and cannot be made smaller from outside: "
                f"verify one of the same structure with at most {MOST_ELEMENTS:,}"
            )
        generator = np.random.default_rng(7)
        self.dtype = np.dtype(dtype)
        self.values = {name: self._value(leaf, generator) for name, leaf in leaves.items()}
        self.model_names = tuple(used)
        self.used = [name for name in used if self._is_trained(name)]
        self.function = function
        inputs, _, _, self.inputs = named_inputs(function, example_inputs)
        self.names = {name: leaf.dtype for name, leaf in inputs.items()}
        self.examples = inputs
        self.wide = dtype == "float64"
        loss = widen(self._loss) if self.wide else self._loss
        self.gradients = jax.jit(jax.value_and_grad(loss))

    def _value(self, leaf: Any, generator: np.random.Generator) -> np.ndarray:
        if hasattr(leaf, "dtype") and not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise InvalidInput(
                    f"params hold a {leaf.dtype} array without values: verification needs them; "
                    "give the array itself"
                )
            return np.asarray(leaf)
        noise = generator.standard_normal(np.shape(leaf))
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return np.asarray(0.3 * noise + (len(leaf.shape) < 2), self.dtype)
        return np.asarray(np.asarray(leaf, np.float64) + PERTURBATION * noise, self.dtype)

    def _is_trained(self, name: str) -> bool:
        return _is_float(self._entry(self.values, name))

    def _entry(self, values: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        """A parameter of the model among the leaves of the tree: `wq[3]` is a part of `wq`."""
        if name in values:
            return values[name]
        found = _SLICE.fullmatch(name)
        assert found is not None, name
        whole: np.ndarray = values[found[1]]
        return np.asarray(whole[int(found[2])])

    def weights(self) -> dict[str, np.ndarray]:
        """The weights by the model's names."""
        return {name: self._entry(self.values, name) for name in self.model_names}

    def save(self, path: Path) -> None:
        """Writes the leaves of the tree as plain safetensors; stacks are whole."""
        save(self.values, path)

    def batch(self, plan: Plan) -> dict[str, np.ndarray]:
        """A global batch for a plan, with ignored labels where the function leaves -100 out."""
        samples, length = (int(plan.workload[name]) for name in ("global_batch", "seq_len"))
        drawn = drawn_batch(batch_entries(plan), samples, length, str(self.dtype))
        labels = drawn.get("labels")
        if labels is None or labels.ndim < 2 or not self._ignores(drawn):
            return drawn
        ignored = labels.copy()
        for sample in range(samples):  # ever more of them, so that ranks have different counts
            ignored[sample, length - sample * length // (2 * samples) :] = IGNORED
        return drawn | {"labels": ignored}

    def _ignores(self, batch: Mapping[str, np.ndarray]) -> bool:
        """Whether a label of -100 counts otherwise than one that is just out of range."""
        losses = []
        for label in (IGNORED, IGNORED - 1):
            changed = batch["labels"].copy()
            changed.flat[0] = label
            losses.append(self.run({**batch, "labels": changed})[0])
        return bool(np.isfinite(losses[0])) and losses[0] != losses[1]

    def run(self, batch: Mapping[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
        """The loss of a batch, and the gradient of each parameter by the model's names."""
        with jax.enable_x64(True) if self.wide else nullcontext(), jax.default_device(_cpu()):
            given = [self._input(name, batch) for name in self.names]
            floats = {n: v for n, v in self.values.items() if _is_float(v)}
            value, gradients = self.gradients(floats, given)
            found = {name: np.asarray(gradient) for name, gradient in gradients.items()}
        return float(value), {name: self._entry(found, name) for name in self.used}

    def _loss(self, trained: Mapping[str, Any], given: Sequence[Any]) -> Any:
        """The function of parameters by name and inputs in order."""
        held = {**self.values, **trained}
        params = jax.tree.unflatten(self.structure, [held[name] for name in self.values])
        positional, keywords = jax.tree.unflatten(self.inputs, given)
        found = self.function(params, *positional, **keywords)
        return found[0] if isinstance(found, tuple) else found

    def _input(self, name: str, batch: Mapping[str, np.ndarray]) -> Any:
        if name not in batch:  # the model does not read it: a key of random numbers
            if jax.numpy.issubdtype(self.names[name], jax.dtypes.prng_key):
                return jax.random.key(0)
            return jax.numpy.zeros(self.examples[name].shape, self.names[name])
        kind = np.dtype(self.names[name])
        return jax.numpy.asarray(batch[name], self.dtype if kind.kind == "f" else kind)


def _is_float(array: np.ndarray) -> bool:
    return bool(np.issubdtype(array.dtype, np.floating))


def _cpu() -> Any:
    return jax.devices("cpu")[0]
