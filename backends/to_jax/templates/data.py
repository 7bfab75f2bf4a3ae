"""Where batches come from: replace `batch` by your own, or give `--data module:function`.

The function gets the absolute numbers of the samples that are wanted, and must return the same
sample for the same number in every process and in every layout. A resumed run goes on with the
sample after the last one it trained on.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Inputs = Mapping[str, tuple[str, tuple[str | int, ...], int]]
"""Name → (dtype: "int64", "int32", "float32", "bool"; dims: "b" samples, "s" positions, a number;
and for integers the bound that they stay under)."""


def batch(samples: range, inputs: Inputs, seq_len: int, seed: int) -> dict[str, np.ndarray]:
    """Synthetic samples: numbered `samples`, one row each, for every input of the model.

    Tokens count upwards from a random token in random steps, so that there is something to learn.
    """
    made = {
        name: np.stack([_row(name, spec, i, seq_len, seed) for i in samples])
        for name, spec in inputs.items()
    }
    if "labels" in made and "input_ids" in made:
        made["labels"] = made["input_ids"].copy()  # the model shifts them by one
    return made


def _row(
    name: str, spec: tuple[str, tuple[str | int, ...], int], sample: int, seq_len: int, seed: int
) -> np.ndarray:
    """One sample of one input; its dims without `b`."""
    dtype, dims, bound = spec
    shape = [seq_len if dim == "s" else int(dim) for dim in dims if dim != "b"]
    draw = np.random.default_rng((seed, sample))
    if dtype == "bool" or name == "attention_mask":
        return np.ones(shape, dtype)
    if name == "position_ids":
        return np.broadcast_to(np.arange(seq_len), shape)
    if dtype.startswith("int"):
        steps = draw.integers(0, min(bound, 4), shape)
        return ((draw.integers(0, bound) + steps.cumsum(-1)) % bound).astype(dtype)
    return draw.standard_normal(shape).astype(dtype)
