"""The baseline: one efficiency per chip, fitted on the other sources.

    time = executed FLOPs of the matrix products / (efficiency * peak * GPUs) * (1 + bubble)

FLOPs count recomputation and the whole of the attention matrix, the bubble is
(pp - 1) / (vpp * m) (Narayanan et al. 2021, arXiv:2104.04473, section 2.2), the efficiency is the
median of what rows of other sources reached on the same chip. On the A100 rows it reproduces the
column "one efficiency" of the data folder's README.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from shardwright.costmodel.efficiency import ComputeDtype
from shardwright.ir.from_dims import TransformerDims

from .setup import Setup, chip_of


def campaign(family: str) -> str:
    """The source that a family belongs to: both of vTrain's tables are one."""
    return family.partition("-")[0] if family.startswith("vtrain") else family


def forward_flops_per_token(dims: TransformerDims, seq: int) -> tuple[float, float]:
    """FLOPs of the matrix products of the forward pass for one token: (decoder layers, head)."""
    h, heads = dims.hidden, dims.heads
    if latent := dims.latent:
        qk, v = latent.nope_dim + latent.rope_dim, latent.v_dim
        queries = (
            h * latent.q_rank + latent.q_rank * heads * qk if latent.q_rank else h * heads * qk
        )
        keys = h * (latent.kv_rank + latent.rope_dim)
        keys += latent.kv_rank * heads * (latent.nope_dim + v)
        projections = queries + keys + heads * v * h
        scores = heads * (qk + v)
    else:
        d = dims.head_dim
        projections = h * (heads + 2 * dims.kv_heads) * d + heads * d * h
        scores = 2 * heads * d
    products = 3 if dims.gated else 2
    total = 0.0
    for layer in range(dims.layers + dims.mtp_layers):
        last = min(layer, dims.layers - 1)
        mlp = products * h * dims.ffn
        if dims.has_experts(last) and dims.experts:
            experts = dims.experts
            mlp = h * experts.count + products * h * (experts.top_k * experts.ffn)
            mlp += products * h * experts.shared_width
        seen = min(seq, dims.window(last) or seq)
        total += 2 * (projections + mlp) + 2 * scores * seen
    return total, 2.0 * h * dims.vocab * (1 + dims.mtp_layers)


def executed_flops(setup: Setup) -> float:
    """FLOPs of a step of all GPUs, recomputation included where the row says it is full."""
    run = setup.run
    assert run.seq and run.gbs
    layers, head = forward_flops_per_token(setup.dims, run.seq)
    passes = 4 if setup.recompute == ("full",) else 3
    return run.gbs * run.seq * (passes * layers + 3 * head)


def ideal_seconds(setup: Setup) -> float:
    """The step at the peak of all GPUs, its pipeline bubble included."""
    run = setup.run
    device = setup.cluster.device
    dtype: ComputeDtype = "float16" if run.precision == "fp16" else "bfloat16"
    if run.precision.startswith(("fp8", "mxfp8", "nvfp4")):
        dtype = "float8"
    peak = device.peak(dtype)
    bubble = ((run.pp or 1) - 1) / ((run.vpp or 1) * run.microbatches)
    return executed_flops(setup) * (1 + bubble) / (peak * setup.cluster.world_size)


@dataclass(frozen=True, slots=True)
class Baseline:
    """What each source reached on each chip: fractions of the peak, one per row."""

    reached: Mapping[tuple[str, str], tuple[float, ...]]

    @staticmethod
    def fitted(setups: Iterable[Setup]) -> Baseline:
        """From all rows with a measured time; each row once."""
        reached: dict[tuple[str, str], dict[str, float]] = {}
        for setup in setups:
            run = setup.run
            if run.iter_time_s and run.config_complete is not False:
                rows = reached.setdefault((campaign(run.family), chip_of(run)), {})
                rows[run.row_id] = ideal_seconds(setup) / run.iter_time_s
        return Baseline({key: tuple(rows.values()) for key, rows in reached.items()})

    def efficiency(self, family: str, chip: str) -> float | None:
        """Median over the other sources on this chip; on any chip where none of them has it; None
        where there is no other source."""
        others = {key: rows for key, rows in self.reached.items() if key[0] != campaign(family)}
        same = [x for (_, other), rows in others.items() if other == chip for x in rows]
        pool = same or [x for rows in others.values() for x in rows]
        return median(pool) if pool else None

    def seconds(self, setup: Setup) -> float | None:
        """The baseline's prediction of a row, or None where nothing could be fitted."""
        efficiency = self.efficiency(setup.run.family, chip_of(setup.run))
        return None if efficiency is None else ideal_seconds(setup) / efficiency
