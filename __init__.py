"""Shardwright: plans and compiles parallel training.

    import shardwright as sw

    cluster = sw.Cluster.preset("h100-sxm", nodes=2)
    work = sw.Workload(global_batch=64, seq_len=8192)
    plan = sw.plan("llama-3.1-8b", cluster, work)
    print(plan)
    plan.save("plan.json")
    plan.emit("torch", "out/")

What is offered is in `api.py`, which is imported when the first of its names is used: a conversion
of checkpoints starts without the planner's libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import (
        Cluster,
        Converted,
        CorruptCheckpoint,
        Device,
        Explanation,
        Infeasible,
        Inspected,
        InvalidInput,
        Plan,
        Prediction,
        Replanned,
        Runtime,
        ShardwrightError,
        UnsupportedOp,
        VerificationFailed,
        Workload,
        annotate,
        convert,
        inspect,
        plan,
        predict,
        replan,
        trace,
        verify,
    )

__version__ = "0.1.0"


__all__ = [
    "Cluster",
    "Converted",
    "CorruptCheckpoint",
    "Device",
    "Explanation",
    "Infeasible",
    "Inspected",
    "InvalidInput",
    "Plan",
    "Prediction",
    "Replanned",
    "Runtime",
    "ShardwrightError",
    "UnsupportedOp",
    "VerificationFailed",
    "Workload",
    "annotate",
    "convert",
    "inspect",
    "plan",
    "predict",
    "replan",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
