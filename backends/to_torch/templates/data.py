"""Where batches come from: replace `batch` by your own, or give `--data module:function`.

The function gets the absolute numbers of the samples that this rank wants, and must return the same
sample for the same number on every rank and in every layout. A resumed run goes on with the sample
after the last one it trained on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Inputs = Mapping[str, tuple[str, tuple[str | int, ...], int]]
"""Name → (dtype: "int64", "int32", "float32", "bool"; dims: "b" samples, "s" positions, a number;
and for integers the bound that they stay under)."""


def batch(samples: range, inputs: Inputs, seq_len: int, seed: int) -> dict[str, Tensor]:
    """Synthetic samples: numbered `samples`, one row each, for every input of the model.

    Tokens count upwards from a random token in random steps, so that there is something to learn.
    """
    made = {
        name: torch.stack([_row(name, spec, i, seq_len, seed) for i in samples])
        for name, spec in inputs.items()
    }
    if "labels" in made and "input_ids" in made:
        made["labels"] = made["input_ids"].clone()  # the model shifts them by one
    return made


def _row(
    name: str, spec: tuple[str, tuple[str | int, ...], int], sample: int, seq_len: int, seed: int
) -> Tensor:
    """One sample of one input; its dims without `b`."""
    dtype, dims, bound = spec
    shape = [seq_len if dim == "s" else int(dim) for dim in dims if dim != "b"]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sample)
    if dtype == "bool" or name == "attention_mask":
        return torch.ones(shape, dtype=getattr(torch, dtype))
    if name == "position_ids":
        return torch.arange(seq_len).expand(shape)
    if dtype.startswith("int"):
        steps = torch.randint(0, min(bound, 4), shape, generator=generator)
        first = torch.randint(0, bound, (), generator=generator)
        return ((first + steps.cumsum(-1)) % bound).to(getattr(torch, dtype))
    return torch.randn(shape, generator=generator, dtype=getattr(torch, dtype))
