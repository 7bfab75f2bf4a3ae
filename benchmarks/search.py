"""The search beside peers and bounds: whole plans, Piper's program, mapping by links, replanning.

    python benchmarks/search.py [--part plans|galvatron|exact|pipeline|free|islands|mapping|replan]

CPU seconds of this machine throughout.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from annealing import annealed, job, measured_links
from exhaustive import best_of_all, instance
from free_search import compared
from holmes import GPT_3_6B, show_islands
from numpy.typing import NDArray
from piper import read_piper
from plan_time import Case, run, with_layers
from rich.console import Console
from rich.table import Table

import shardwright as sw
from shardwright.costmodel import what_if
from shardwright.planner import Search, best_stages
from shardwright.planner.mapping import map_places

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
        h800 = str(Path(temporary) / "h800.yaml")
        what_if.with_level(sw.Cluster.preset("h100-sxm", nodes=256), 0, H800_NVLINK).save(h800)
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
            Case("DeepSeek-V3, 2,048 H800", "deepseek-v3", h800, 8192, 60, None, seq_len=4096,
                 options=ANY),
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


H800_NVLINK = 400 / 900
"""Of an H100's NVLink: 400 GB/s instead of 900, both directions together (NVIDIA's data sheets)."""
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


def galvatron(console: Console) -> None:
    """Galvatron's plan for Llama-2-7B on 8 A100 beside ours, both in our model. Its plan has 27
    layers under ZeRO-3 and 5 under ZeRO-2, all recomputed: no layer can do better than under
    ZeRO-2, and no microbatch better than the best of those that divide."""
    work = sw.Workload(64, 2048)
    with TemporaryDirectory() as temporary:
        model = sw.trace(_config_file(Path(temporary), LLAMA_2_7B))
    base = sw.Cluster.preset("a100-40g", nodes=1)
    device = base.device.model_copy(
        update={"memory_bytes": int(GALVATRON_BYTES) + base.device.reserve_bytes}
    )
    where = base.with_device(device)
    plan = sw.plan(model, where, work, top=1)
    table = Table("plan", "step s", "GiB", "CPU s", title="Llama-2-7B, 8 A100 of 36 GB, 64 x 2,048")
    table.add_row(
        f"ours: {plan.strategy}", f"{plan.predicted.step_seconds:.3f}",
        f"{max(plan.predicted.memory_bytes) / 2**30:.1f}", f"{plan.certificate.seconds:.1f}",
    )  # fmt: skip
    for zero in (2, 3):
        found = [
            sw.predict(model, where, work, f"dp=8,zero={zero},micro_batch={b},recompute=full")
            for b in (1, 2, 4, 8)
        ]
        best = min(found, key=lambda each: each.step_seconds)
        table.add_row(
            f"Galvatron's, all layers zero={zero}: {best.strategy}", f"{best.step_seconds:.3f}",
            f"{max(best.memory_bytes) / 2**30:.1f}", "",
        )  # fmt: skip
    console.print(table)


GALVATRON_BYTES = 36e9
"""Of a device, that its plan may use."""


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
        ratios = [
            (each.found_s / each.best_s, each.plan)
            for each in here
            if each.found_s and each.best_fits
        ]
        if not ratios:
            continue
        worst, plan = max(ratios)
        table.add_row(
            family, f"{len(ratios)} of {len(here)}",
            f"{float(np.median([ratio for ratio, _ in ratios])):.3f}", f"{worst:.3f}", plan,
            f"{sum(each.cpu_s for each in here):.0f}",
        )  # fmt: skip
    console.print(table)
    for each in every:
        if not (each.found_s and each.best_fits):
            console.print(f"{each.family} {each.group}: too large by our reckoning, not compared")


RUNS = Path(__file__).resolve().parents[2] / "shared" / "data" / "published_runs.csv"


def islands(console: Console) -> None:
    """Holmes: islands joined by Ethernet alone, and islands of other devices."""
    with TemporaryDirectory() as temporary:
        model = sw.trace(_config_file(Path(temporary), GPT_3_6B))
    show_islands(model, console)


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
    """A job of 96 devices loses a node. CPU seconds are of the replan alone: imports and the plan
    before are done."""
    work = sw.Workload(global_batch=960, seq_len=4096)
    plan = sw.plan("llama-3.1-8b", "h100-sxm:12", work, fix="pp=3,tp=4,dp=8")
    table = Table(
        "search", "new plan", "nodes", "step s", "moved GB", "checkpoint GB", "bound GB", "above",
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
            f"{moved.lost_bytes / 1e9:.1f}", f"{moved.bound_bytes / 1e9:.1f}",
            f"{total / moved.bound_bytes - 1:.1%}", f"{took:.1f}",
        )  # fmt: skip
    console.print(table)


PARTS = {
    part.__name__: part
    for part in (plans, galvatron, exact, pipeline, free, islands, mapping, replan)
}


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
