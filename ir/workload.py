"""What is to be trained per step: batch, sequence length, optimizer, precision."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from .errors import InvalidInput

Precision = Literal["bf16", "fp32", "fp64", "fp16", "fp8"]


class Workload(BaseModel):
    """A training step: `global_batch` sequences of `seq_len` tokens.

    `precision`: `bf16` is mixed (bfloat16 compute, float32 master weights and gradients), `fp32`
    and `fp64` are uniform. `fp16` is mixed as well, `fp8` multiplies matrices in 8 bits and is
    `bf16` otherwise; these two can be predicted, not yet emitted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    global_batch: PositiveInt
    seq_len: PositiveInt
    optimizer: Literal["adamw"] = "adamw"
    precision: Precision = "bf16"

    def __init__(self, global_batch: int, seq_len: int, **other: object) -> None:
        """Raises InvalidInput naming the field, its value and what was expected."""
        try:
            super().__init__(global_batch=global_batch, seq_len=seq_len, **other)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            field = ".".join(map(str, problem["loc"]))
            raise InvalidInput(
                f"workload: {field} is {problem['input']!r}: {problem['msg']}"
            ) from None
