"""settings.py: the sizes and the strategy that the program was emitted for."""

from __future__ import annotations

from ...ir.plan import Plan

ZERO_IN_WORDS = {
    0: "replicated",
    1: "replicated, the optimizer's state is split (ZeRO 1)",
    2: "replicated, gradients and the optimizer's state are split (ZeRO 2)",
    3: "split, as are gradients and the optimizer's state (ZeRO 3)",
}
"""What the stages of ZeRO do with parameters along dp, for the program's docstring."""


def settings_source(plan: Plan, weights: str | None = None) -> str:
    """The text of settings.py. `weights` is what training starts from."""
    work, strategy = plan.workload, plan.strategy
    sizes = {axis.name: axis.size for axis in plan.mesh.axes}
    for name in ("pp", "dp"):
        sizes.setdefault(name, 1)
    if not plan.tensor_axes:
        sizes["tp"] = 1
    renumbered = plan.mapping.ranks if plan.mapping is not None else ()
    mesh = ", ".join(f'"{name}": {size}' for name, size in sizes.items())
    return f'''"""Sizes and layout of this program. `model.py` was generated for this mesh."""

from __future__ import annotations

MODEL_NAME = "{plan.model.name}"

# axes of the mesh, outermost first: neighbouring ranks differ in the last one
MESH = {{{mesh}}}

# 0: parameters, gradients and optimizer state on every data-parallel rank; 1: optimizer state split
# along dp; 2: gradients too; 3: parameters too
ZERO = {strategy.zero}

# the rank that each process takes which the launcher starts; None: its own
RANKS = {renumbered or None}

# sequences per step; per microbatch and data-parallel rank; microbatches per step and rank
GLOBAL_BATCH = {int(work["global_batch"])}
MICRO_BATCH = {strategy.micro_batch}
MICROBATCHES = {plan.microbatches}
SEQ_LEN = {int(work["seq_len"])}

# bf16: bfloat16 compute, float32 weights, gradients and state; fp32 and fp64 are uniform
PRECISION = "{work.get("precision", "bf16")}"

# order of microbatches in the pipeline
SCHEDULE = "{strategy.schedule}"

# plain weights that training starts from, relative to this file; None: fresh ones
WEIGHTS = {f'"{weights}"' if weights else None}
'''
