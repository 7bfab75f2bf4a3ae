"""The judge of a torch module's JAX programs: the module, its tensors as numpy arrays."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ...ir.plan import Plan
from ..emission.batch import batch_entries
from ..to_torch.reference import Loss, Reference
from ..to_torch.verify import torch_dtype
from ..to_torch.verify_worker import make_batch


class ModuleReference:
    """A `Judge` (see verify.py) that is a torch module."""

    def __init__(
        self, module: nn.Module, dtype: str, loss: Loss | None, used: Collection[str]
    ) -> None:
        self.dtype = torch_dtype(dtype)
        self.module = Reference(module, self.dtype, loss, used)

    def save(self, path: Path) -> None:
        """Writes its weights as safetensors."""
        self.module.save(path)

    def batch(self, plan: Plan) -> dict[str, np.ndarray]:
        """A global batch for a plan, some of whose labels are ignored."""
        samples, length = (int(plan.workload[name]) for name in ("global_batch", "seq_len"))
        made = make_batch(batch_entries(plan), samples, length, self.dtype)
        return {name: tensor.numpy() for name, tensor in made.items()}

    def run(self, batch: Mapping[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
        """The mean loss of a batch, and the gradient under each name of each parameter; tied ones
        are one array."""
        loss, gradients = self.module.run({n: torch.tensor(rows) for n, rows in batch.items()})
        arrays = {id(gradient): gradient.numpy() for gradient in gradients.values()}
        return loss, {name: arrays[id(gradient)] for name, gradient in gradients.items()}
