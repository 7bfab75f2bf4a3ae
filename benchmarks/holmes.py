"""Holmes's clusters (Yang et al. 2023, arXiv:2312.03549): islands of other networks or devices."""

from __future__ import annotations

import time

from rich.console import Console
from rich.table import Table

import shardwright as sw
from shardwright.ir.graph import Model


def show_islands(model: Model, console: Console) -> None:
    """What is planned on every cluster, as a table; (d) beside (b)."""
    base = sw.Cluster.preset("a100-80g", nodes=4)

    def where(rate: float, **changes: object) -> sw.Cluster:
        levels = [level.model_dump() for level in base.levels]
        levels[-1]["bandwidth_bytes_per_s"] = rate
        return sw.Cluster(**{**base.model_dump(), "curves": (), "levels": levels, **changes})

    outer = {"name": base.levels[-1].name, "bandwidth_bytes_per_s": ROCE}
    halves = [{"name": "infiniband", "nodes": 2}, {"name": "roce", "nodes": 2, "levels": [outer]}]
    joint = [{"islands": ("infiniband", "roce"), "bandwidth_bytes_per_s": ETHERNET}]
    old = [{"name": "new", "nodes": 2}, {"name": "old", "nodes": 2, "device": "v100"}]
    half = sw.Workload(256, 2048, precision="fp16")
    mixed = where(INFINIBAND, islands=halves, pairs=joint)
    cases = [
        (name, cluster, sw.Workload(batch, 2048), "", backend)
        for batch in (256, 768, 1536)
        for name, cluster, backend in (
            ("(a) all InfiniBand", where(INFINIBAND), "torch"),
            ("(b) all RoCE", where(ROCE), "torch"),
            ("(c) all Ethernet", where(ETHERNET), "torch"),
            ("(d) InfiniBand + RoCE, Ethernet between", mixed, "torch"),
            ("(d), whole space", mixed, "any"),
        )
    ] + [
        ("A100 + V100, fp16", where(INFINIBAND, islands=old), half, "", "torch"),
        ("the same, pp=2", where(INFINIBAND, islands=old), half, "pp=2", "torch"),
        ("the same, even stages", where(INFINIBAND, islands=old), half, "pp=2,stages=15-15",
         "torch"),
        ("the same, no pipeline", where(INFINIBAND, islands=old), half, "pp=1", "torch"),
    ]  # fmt: skip
    table = Table("cluster", "batch", "plan", "layers", "step s", "of (b)", "gap", "CPU s",
                  title="GPT 3.6B on 4 nodes of 8, sequences of 2,048")  # fmt: skip
    roce_s: dict[int, float] = {}
    for name, cluster, what, fix, backend in cases:
        began = time.process_time()
        plan = sw.plan(model, cluster, what, fix=fix, top=1, backend=backend)
        if name.startswith("(b)"):
            roce_s[what.global_batch] = plan.predicted.step_seconds
        ratio = roce_s[what.global_batch] / plan.predicted.step_seconds if "(d)" in name else None
        table.add_row(
            name, str(what.global_batch), str(plan.strategy),
            "-".join(map(str, plan.strategy.layers)), f"{plan.predicted.step_seconds:.3f}",
            "" if ratio is None else f"{ratio:.0%}", f"{plan.certificate.gap:.1%}",
            f"{time.process_time() - began:.1f}",
        )  # fmt: skip
    console.print(table)


INFINIBAND, ROCE, ETHERNET = 25e9, 20e9, 0.4e9
"""Bytes per second and device: 200 Gb/s each, less over RoCE; 25 Gb/s for a node."""
GPT_3_6B = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 3072, "n_layer": 30,
    "n_head": 32, "n_positions": 2048, "vocab_size": 51200, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
"""Holmes's smallest model (Yang et al. 2023, arXiv:2312.03549, table 2)."""
