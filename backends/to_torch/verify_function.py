"""Verification of a JAX function's torch programs: the judge is the function."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...ir.plan import Plan
from . import emit
from .names import torch_names
from .verify import Case, compare

if TYPE_CHECKING:
    from ..to_jax.reference import FunctionReference


@dataclass(frozen=True, slots=True)
class _InTorch:
    """The function's weights, loss and gradients as tensors, by the names that programs have."""

    function: FunctionReference
    names: Mapping[str, str]

    def save(self, path: Path) -> None:
        """Writes the weights as plain safetensors."""
        save_file({self.names[n]: _tensor(v) for n, v in self.function.weights().items()}, path)

    def run(self, batch: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The mean loss of a batch, and the gradient of each parameter."""
        loss, gradients = self.function.run({n: rows.numpy() for n, rows in batch.items()})
        return loss, {self.names[name]: _tensor(g) for name, g in gradients.items()}


def verify_function(
    plans: Sequence[Plan], reference: FunctionReference, *, dtype: str = "float64"
) -> list[dict[str, Any]]:
    """Emits plans of one function, runs them on local ranks, compares each with the function.

    Returns what `shardwright verify --json` prints, per plan. Raises InvalidInput and UnsupportedOp
    for plans that cannot be emitted.
    """
    names = torch_names(plans[0].model)
    judge = _InTorch(reference, names)
    with tempfile.TemporaryDirectory(prefix="shardwright-verify-") as folder:
        cases = []
        for i, plan in enumerate(plans):
            place = emit(plan, Path(folder) / f"program-{i}")
            batch = {name: _tensor(rows) for name, rows in reference.batch(plan).items()}
            ranks = plan.strategy.ranks
            cases.append(Case(place, ranks, plan.strategy.to_json(), batch))
        return compare(cases, judge, dtype=dtype)


def _tensor(array: Any) -> Tensor:
    return torch.tensor(array)
