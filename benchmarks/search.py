"""The search beside peers and bounds: whole plans, Piper's program, mapping by links, replanning.

    python benchmarks/search.py [--part plans|exact|pipeline|free|islands|mapping|replan]

CPU seconds of this machine throughout.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from exhaustive import best_of_all, instance
from free_search import compared
from numpy.typing import NDArray
from piper import read_piper
from plan_time import Case, run, with_layers
from rich.console import Console
from rich.table import Table

import shardwright as sw
from shardwright.planner import Search, best_stages
from shardwright.planner.mapping import Flow, flow_seconds, map_places

Array = NDArray[np.float64]

ANNEALING_S = 60.0
"""CPU seconds that simulated annealing gets, as a peer."""
SHAPES = ((16, 1), (8, 2), (4, 4), (2, 8), (1, 16))
"""(pp, dp) over 16 nodes of 8 devices with tp=8 inside."""


ANY = ("--backend", "any", "--top", "1")
"""The whole space, and its best plan alone."""


def plans(console: Console) -> None:
    """Whole processes from the interpreter's start to the printed plan, tracing included."""
    with TemporaryDirectory() as temporary:
        deep = [with_layers("llama-3.1-8b", layers, Path(temporary)) for layers in (100, 1000)]
        cases = [
            Case("Llama-3.1-405B, 16,384 H100", "llama-3.1-405b", "h100-sxm:2048", 2048, 60, None,
                 options=ANY),
            Case("the same, that can be emitted", "llama-3.1-405b", "h100-sxm:2048", 2048, 60,
                 None),
            Case("Llama-3.1-405B, 8,192 H100", "llama-3.1-405b", "h100-sxm:1024", 8192, None, None,
                 options=ANY),
            Case("Llama-3.1-405B, 65,536 H100", "llama-3.1-405b", "h100-sxm:8192", 8192, None, None,
                 options=ANY),
            Case("GPT-3 175B, 1,024 A100", "gpt3-175b", "a100-80g:128", 1536, 20, None,
                 seq_len=2048, options=ANY),
            Case("DeepSeek-V3, 2,048 H100", "deepseek-v3", "h100-sxm:256", 8192, 60, None,
                 seq_len=4096, options=ANY),
            Case("8B dims, 100 layers, 1,024 H100", deep[0], "h100-sxm:128", 1024, None, None,
                 options=ANY),
            Case("8B dims, 1,000 layers, 1,024 H100", deep[1], "h100-sxm:128", 1024, None, None,
                 options=ANY),
            Case("Llama-2-7B, 8 A100", _config_file(Path(temporary), LLAMA_2_7B), "a100-40g:1",
                 64, 10, None, "Galvatron: 148 CPU s", 2048),
        ]  # fmt: skip
        table = Table("case", "CPU s", "limit", "GB", "plan", "step s", "MFU", "gap", "looked at",
                      "peer", title="Plans")  # fmt: skip
        for case in cases:
            measured = run(case)
            strategy, predicted, certificate = (
                measured.plan[key] for key in ("strategy", "predicted", "certificate")
            )
            assert isinstance(strategy, dict) and isinstance(predicted, dict)
            assert isinstance(certificate, dict)
            shown = [
                f"{k}={v}" for k, v in strategy.items()
                if k in SHOWN and v not in (0, 1, "1f1b", "none")
            ]  # fmt: skip
            counted = [str(certificate[key]) for key in ("solved", "pruned", "infeasible")]
            table.add_row(
                case.title, f"{measured.cpu_s:.1f}",
                "" if case.limit_cpu_s is None else f"{case.limit_cpu_s:g}",
                f"{measured.peak_gb:.2f}", " ".join(shown), f"{predicted['step_seconds']:.3f}",
                f"{predicted['mfu']:.1%}", f"{certificate['gap']:.1%}", " / ".join(counted),
                case.peer,
            )  # fmt: skip
    console.print(table)


SHOWN = ("pp", "vpp", "dp", "cp", "tp", "ep", "etp", "zero", "zero_group", "micro_batch",
         "schedule", "recompute")  # fmt: skip
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
"""Galvatron's case, which no preset has; its dimensions: Touvron et al. 2023, arXiv:2307.09288."""


def _config_file(folder: Path, config: dict[str, object]) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


def exact(console: Console) -> None:
    """Random small problems against all their plans, one by one."""
    worst, equal, refused, priced, began = 0.0, 0, 0, 0, time.process_time()
    searched = 0.0
    for seed in range(INSTANCES):
        request = instance(seed)
        best = best_of_all(request)
        priced += best.cuts
        started = time.process_time()
        try:
            found = Search(request, anything=True).run(top=1)
        except sw.Infeasible:
            refused += 1
            if best.candidate is not None:
                console.print(f"instance {seed}: called infeasible, but {best.candidate.key} fits")
            continue
        finally:
            searched += time.process_time() - started
        excess = found.outcomes[0].seconds / best.seconds - 1
        worst, equal = max(worst, excess), equal + (abs(excess) < 1e-9)
        if found.bound > best.seconds * (1 + 1e-9):
            console.print(f"instance {seed}: the bound is above the best plan")
    console.print(
        f"{INSTANCES} random small problems, {priced:,} cuts priced one by one: {equal} equal, "
        f"{refused} infeasible in both, worst excess {worst:.1e}; search "
        f"{searched:.0f} of {time.process_time() - began:.0f} CPU s"
    )


INSTANCES = 60


def pipeline(console: Console) -> None:
    """Piper's program on its own input, beside the published optima."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", "from shardwright.planner import best_stages"], check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imports = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    table = Table("devices", "optimum found, s", "published, s", "difference", "stages",
                  "devices used", "CPU s", "with imports", "limit", "Piper, CPU s",
                  title=f"{PIPER.stem}, N = 1920, 8 GiB per device")  # fmt: skip
    for devices, published, limit, peer in PIPER_OPTIMA:
        began = time.process_time()
        plan = best_stages(read_piper(PIPER, devices, 1920, 25 * 2**30, 8 * 2**30))
        took = time.process_time() - began
        table.add_row(
            f"{devices:,}", f"{plan.seconds:.12g}", f"{published:.12g}",
            f"{plan.seconds / published - 1:+.0e}", str(len(plan.stages)), f"{plan.devices:,}",
            f"{took:.2f}", f"{took + imports:.2f}", f"{limit:g}", f"{peer:g}",
        )  # fmt: skip
    console.print(table)


PIPER = Path(__file__).resolve().parents[2] / "shared" / "data" / "piper_bert32_a100.json"
PIPER_OPTIMA = (
    (8, 0.16585575, 1.0, 0.04),
    (64, 0.0202005502945, 1.0, 0.18),
    (512, 0.00256112784601, 2.7, 2.7),
    (1024, 0.00130317951636, 12.0, 12.0),
)
"""Devices, the optimum in seconds, CPU seconds that we may take, and that Piper's program (C++)
took on a machine of the same kind: the data's README."""


def free(console: Console) -> None:
    """Published groups of runs: the best measured configuration beside what a free search finds."""
    table = Table("family", "groups", "search / best: median", "worst (limit 1.03)", "plan there",
                  "CPU s", title="Free search on published groups")  # fmt: skip
    every = list(compared(RUNS))
    for family in dict.fromkeys(each.family for each in every):
        here = [each for each in every if each.family == family]
        ratios = {
            each.found_s / each.best_s: each for each in here if each.found_s and each.best_fits
        }
        if not ratios:
            continue
        worst = max(ratios)
        table.add_row(
            family, f"{len(ratios)} of {len(here)}", f"{float(np.median(list(ratios))):.3f}",
            f"{worst:.3f}", ratios[worst].plan, f"{sum(each.cpu_s for each in here):.0f}",
        )  # fmt: skip
    console.print(table)
    for each in every:
        if not (each.found_s and each.best_fits):
            console.print(f"{each.family} {each.group}: too large by our reckoning, not compared")


RUNS = Path(__file__).resolve().parents[2] / "shared" / "data" / "published_runs.csv"


def islands(console: Console) -> None:
    """Holmes: islands joined by Ethernet alone, and islands of other devices."""
    work = sw.Workload(256, 2048)
    with TemporaryDirectory() as temporary:
        model = sw.trace(_config_file(Path(temporary), GPT_3_6B))
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
    cases = [
        ("(a) all InfiniBand", where(INFINIBAND), work, ""),
        ("(b) all RoCE", where(ROCE), work, ""),
        ("(c) all Ethernet", where(ETHERNET), work, ""),
        ("(d) InfiniBand + RoCE, Ethernet between", where(INFINIBAND, islands=halves, pairs=joint),
         work, ""),
        ("A100 + V100, fp16", where(INFINIBAND, islands=old), half, ""),
        ("the same, pp=2", where(INFINIBAND, islands=old), half, "pp=2"),
        ("the same, even stages", where(INFINIBAND, islands=old), half, "pp=2,stages=15-15"),
        ("the same, no pipeline", where(INFINIBAND, islands=old), half, "pp=1"),
    ]  # fmt: skip
    table = Table("cluster", "plan", "layers", "step s", "gap", "CPU s",
                  title="GPT 3.6B on 4 nodes of 8, batch 256 x 2,048")  # fmt: skip
    for name, cluster, what, fix in cases:
        began = time.process_time()
        plan = sw.plan(model, cluster, what, fix=fix, top=1)
        table.add_row(
            name, str(plan.strategy), "-".join(map(str, plan.strategy.layers)),
            f"{plan.predicted.step_seconds:.3f}", f"{plan.certificate.gap:.1%}",
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


def measured_links(nodes: int, seed: int, slow: float = 0.1, noise: float = 0.02) -> Array:
    """Slownesses as pairwise captures look: 2 % of noise, a tenth of the links degraded."""
    rng = np.random.default_rng(seed)
    rate = 1 + noise * rng.standard_normal((nodes, nodes))
    degraded = rng.random((nodes, nodes)) < slow
    rate = np.where(degraded, rate * rng.uniform(0.3, 0.8, (nodes, nodes)), rate)
    found = 1 / np.minimum(rate, rate.T)
    np.fill_diagonal(found, 0.0)
    return found


def job(pp: int, dp: int) -> list[Flow]:
    """Rings of data-parallel nodes, and what stages hand on: both matter."""
    rings = np.array([(s * dp + d, s * dp + (d + 1) % dp) for s in range(pp) for d in range(dp)])
    flows = [Flow("data", rings, np.full(len(rings), 0.05))] if dp > 1 else []
    for s in range(pp - 1):
        ends = np.array([(s * dp + d, (s + 1) * dp + d) for d in range(dp)])
        flows.append(Flow(f"boundary {s}", ends, np.full(dp, 0.01)))
    return flows


def cost(flows: Sequence[Flow], node_of: Sequence[int], slowness: Array) -> float:
    """The sum over flows of their worst links."""
    return sum(float(flow_seconds(flow, node_of, slowness).max()) for flow in flows)


def annealed(flows: Sequence[Flow], slowness: Array, seconds: float) -> float:
    """Simulated annealing over exchanges of two nodes, restarted when it has cooled down."""
    rng = np.random.default_rng(1)
    nodes, began, best = len(slowness), time.process_time(), np.inf
    while time.process_time() - began < seconds:
        where = rng.permutation(nodes)
        now = cost(flows, where, slowness)
        for temperature in np.geomspace(0.03 * now, 1e-5 * now, 8000):
            i, k = rng.integers(nodes, size=2)
            where[[i, k]] = where[[k, i]]
            other = cost(flows, where, slowness)
            if other <= now or rng.random() < np.exp((now - other) / temperature):
                now = other
            else:
                where[[i, k]] = where[[k, i]]
            best = min(best, now)
        if time.process_time() - began >= seconds:
            break
    return float(best)


def mapping(console: Console) -> None:
    """Against brute force on 8 nodes, against annealing on 16, and large clusters."""
    worst = 0.0
    for seed in range(5):
        for pp, dp in ((8, 1), (4, 2), (2, 4), (1, 8)):
            flows, slowness = job(pp, dp), measured_links(8, seed, slow=0.3)
            every = np.array(list(permutations(range(8))))
            totals = np.zeros(len(every))
            for flow in flows:
                links = slowness[every[:, flow.ends[:, 0]], every[:, flow.ends[:, 1]]]
                totals += (links * flow.seconds).max(axis=1)
            found = map_places(flows, 8, slowness)
            worst = max(worst, found.seconds / float(totals.min()) - 1)
    console.print(f"8 nodes, 20 cases against all 40,320 mappings: worst excess {worst:.1e}")
    table = Table(
        "nodes", "pp x dp", "in order, ms", "mapped, ms", "bound, ms", "gap", "CPU s",
        f"annealing, {ANNEALING_S:g} s, ms", title="Communication between nodes per step",
    )  # fmt: skip
    for nodes, shapes in ((16, SHAPES), (128, ((8, 16),)), (512, ((16, 32),))):
        for pp, dp in shapes:
            flows, slowness = job(pp, dp), measured_links(nodes, 7)
            began = time.process_time()
            found = map_places(flows, nodes, slowness)
            took = time.process_time() - began
            peer = f"{1e3 * annealed(flows, slowness, ANNEALING_S):.2f}" if nodes == 16 else ""
            table.add_row(
                str(nodes), f"{pp} x {dp}", f"{1e3 * found.in_order_seconds:.2f}",
                f"{1e3 * found.seconds:.2f}", f"{1e3 * found.bound_seconds:.2f}",
                f"{1 - found.bound_seconds / found.seconds:.1%}", f"{took:.1f}", peer,
            )  # fmt: skip
    console.print(table)


def replan(console: Console) -> None:
    """A job of 96 devices loses a node."""
    work = sw.Workload(global_batch=960, seq_len=4096)
    plan = sw.plan("llama-3.1-8b", "h100-sxm:12", work, fix="pp=3,tp=4,dp=8")
    table = Table(
        "search", "new plan", "nodes", "step s", "moved GB", "checkpoint GB", "above bound",
        "CPU s", title="llama-3.1-8b, 12 nodes of 8 H100, pp=3 tp=4 dp=8, without node 5",
    )  # fmt: skip
    for fix in ("", "tp=4"):
        began = time.process_time()
        found = sw.replan(plan, [5], fix=fix)
        took, moved = time.process_time() - began, found.migration
        total = moved.moved_bytes + moved.lost_bytes
        table.add_row(
            fix or "free", str(found.plan.strategy), str(found.plan.cluster["nodes"]),
            f"{found.plan.predicted.step_seconds:.3f}", f"{moved.moved_bytes / 1e9:.1f}",
            f"{moved.lost_bytes / 1e9:.1f}", f"{total / moved.bound_bytes - 1:.1%}", f"{took:.1f}",
        )  # fmt: skip
    console.print(table)


PARTS = {"plans": plans, "exact": exact, "pipeline": pipeline, "free": free, "islands": islands,
         "mapping": mapping, "replan": replan}  # fmt: skip


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=sorted(PARTS), help="only this one")
    chosen = parser.parse_args().part
    console = Console(width=190, highlight=False)
    for name, part in PARTS.items():
        if chosen in (None, name):
            part(console)


if __name__ == "__main__":
    main()
