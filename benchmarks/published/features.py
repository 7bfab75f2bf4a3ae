"""What a run's deviation from its prediction may depend on: its time by cause, its configuration.

Nothing here has seen a measured time: probes are chosen by these alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import log2

from .baseline import forward_flops_per_token
from .rows import Run
from .setup import Setup

BUBBLE = "pipeline_bubble"
ONCE_PER_STEP = ("data_parallel", "optimizer")
HEAD, ODD_HEAD = "head", "head of unpadded words"
WHOLE_ROW = 8
"""Elements of 2 bytes in the 16 that matrix units load at a time: products with rows of another
length run at a third of the rate (NVIDIA, Matrix Multiplication Background, section 2.2)."""

_PADDED = re.compile(r"vocab (\d+) padded")

_NARROW = {"fp8": 1.0, "mxfp8": 1.0, "nvfp4": 2.0}
"""Halvings of the 2 bytes that products read."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A row with its prediction by cause and its measured time, in seconds."""

    setup: Setup
    breakdown: Mapping[str, float]
    measured_s: float

    @property
    def predicted_s(self) -> float:
        return sum(self.breakdown.values())


def shares(row: Timed) -> dict[str, float]:
    """Shares of the step by cause; they add up to 1.

    A bubble is waiting for other stages' work: it is spread over the causes that are paid per
    microbatch. The vocabulary's product is a cause of its own beside those of the layers.
    """
    seconds = dict(row.breakdown)
    head = _head_fraction(row.setup) * seconds.get("matmul", 0.0)
    if head:
        seconds["matmul"] -= head
        seconds[ODD_HEAD if _odd_words(row.setup.run) else HEAD] = head
    bubble = seconds.pop(BUBBLE, 0.0)
    repeated = sum(s for cause, s in seconds.items() if cause not in ONCE_PER_STEP)
    if bubble and repeated:
        for cause in seconds:
            if cause not in ONCE_PER_STEP:
                seconds[cause] *= 1 + bubble / repeated
    total = sum(seconds.values())
    return {cause: s / total for cause, s in seconds.items()}


def _head_fraction(setup: Setup) -> float:
    """The vocabulary's part of the FLOPs of a stage that holds it."""
    layers, head = forward_flops_per_token(setup.dims, setup.run.seq or 1)
    passes = 4 if setup.recompute == ("full",) else 3
    own = passes * layers / (setup.run.pp or 1)
    return 3 * head / (3 * head + own)


def _odd_words(run: Run) -> bool:
    """Whether a rank's words do not fill rows of 16 bytes, where the row says that its vocabulary
    was padded to a size that the source's own model does not have."""
    padded = _PADDED.search(run.missing)
    return bool(padded and (int(padded[1]) // (run.tp or 1)) % WHOLE_ROW)


FEATURES = (
    "tp", "pp", "dp", "cp", "ep", "micro_batch", "microbatches", "tokens_per_rank", "seq",
    "hidden", "layers", "head_dim", "recompute", "sequence_parallel", "zero", "narrow",
)  # fmt: skip
"""Coordinates of a configuration: degrees and sizes in doublings, modes as 0 or 1."""


def point(setup: Setup) -> list[float]:
    """A configuration's coordinates, in the order of FEATURES."""
    run, dims = setup.run, setup.dims
    tp, cp, seq, mbs = run.tp or 1, run.cp or 1, run.seq or 1, run.mbs or 1
    sizes = (
        tp, run.pp or 1, run.dp or 1, cp, run.ep or 1, mbs, run.microbatches,
        mbs * seq / (tp * cp), seq, dims.hidden, dims.layers, dims.head_dim,
    )  # fmt: skip
    modes = (
        float(setup.recompute == ("full",)),
        float(bool(run.sp)),
        (run.zero_stage or 0) + log2(run.zero_group or 1) / 4,
        _NARROW.get(setup.workload.precision, 0.0),
    )
    return [*map(log2, sizes), *modes]
