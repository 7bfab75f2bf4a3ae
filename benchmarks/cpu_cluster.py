"""Prediction against measurement on this machine: a small Llama on 4 local gloo ranks.

    python benchmarks/cpu_cluster.py [--budget SECONDS] [--folder FOLDER]

Calibrates and probes with all ranks at once, as they share the cores when they train; predicts
eight configurations from the two files alone; then emits each, trains it for some steps and prints
the median step beside the prediction, the rank correlations, and what picking by prediction costs.
Gloo's collectives run on the cores that compute, so the runtime is told that nothing is hidden.

Other work on the machine slows what is measured but not what is predicted: its share of the cores
stands beside each row, and of `--attempts` runs of a configuration the least disturbed one counts.
Device and cluster files in `--folder` are used again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau, spearmanr
from transformers import LlamaConfig, LlamaForCausalLM

import shardwright as sw
from shardwright.costmodel import Runtime

RANKS = 4
WORK = sw.Workload(global_batch=16, seq_len=128, precision="fp32")
WARM_UP, STEPS = 3, 9
QUIET_FRACTION = 0.05
"""Of the cores, used by others: a run with less is not tried again."""
CONFIGURATIONS = (
    "dp=4,zero=0,micro_batch=4",
    "dp=4,zero=3,micro_batch=4",
    "dp=4,zero=0,micro_batch=1",
    "tp=4,micro_batch=4",
    "pp=4,micro_batch=2",
    "dp=2,tp=2,zero=0,micro_batch=4",
    "dp=2,pp=2,zero=0,micro_batch=2",
    "pp=2,tp=2,micro_batch=4",
)


@dataclass(frozen=True)
class Row:
    """Seconds of a step of one configuration, how far single steps differ (of the median), and the
    share of the cores that other work took meanwhile."""

    fix: str
    predicted_s: float
    measured_s: float
    spread_fraction: float
    others_fraction: float
    breakdown: str

    @property
    def error(self) -> float:
        """Of the prediction, signed."""
        return self.predicted_s / self.measured_s - 1


def small_llama() -> LlamaForCausalLM:
    """Eight layers, grouped-query attention."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=4096, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def torchrun(*arguments: str) -> float:
    """Runs all ranks with a core's share each; stops with their output if they fail.

    Returns the share of the cores that other processes used meanwhile.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS),
        "--master-port", str(port), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    wall_s, busy_s, own_s = time.perf_counter(), busy_seconds(), own_seconds()
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
    others_s = busy_seconds() - busy_s - (own_seconds() - own_s)
    cores_s = (time.perf_counter() - wall_s) * (os.cpu_count() or 1)
    return max(0.0, others_s / cores_s)


def busy_seconds() -> float:
    """Seconds that all cores have worked, for anyone."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def own_seconds() -> float:
    """Seconds that this process and what it started have worked."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def measured_cluster(folder: Path, budget_s: float, console: Console) -> sw.Cluster:
    """The cluster of local ranks, from measurements alone."""
    device, cluster = folder / "device.yaml", folder / "cluster.yaml"
    budget = ("--budget", f"{budget_s:g}", "--on", "cpu")
    commands = {
        device: ("calibrate", "--dtypes", "float32"),
        cluster: ("probe", "--device", str(device)),
    }
    for file, command in commands.items():
        if not file.exists():
            others = torchrun("-m", "shardwright", *command, "-o", str(file), *budget)
            console.print(f"{command[0]}: other work took {others:.0%} of the cores")
    return sw.Cluster.load(cluster)


def step_seconds(folder: Path, attempts: int) -> tuple[list[float], float]:
    """Seconds of each step after the warm-up, as the emitted program reports them, of the run that
    others disturbed least; and by how much they did."""
    metrics = folder / "metrics.jsonl"
    runs = []
    for _ in range(attempts):
        metrics.unlink(missing_ok=True)
        steps = str(WARM_UP + STEPS)
        others = torchrun(str(folder / "train.py"), "--steps", steps, "--metrics", str(metrics))
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        tokens = WORK.global_batch * WORK.seq_len
        runs.append(([tokens / line["tokens_per_second"] for line in lines[WARM_UP:]], others))
        if others < QUIET_FRACTION:
            break
    return min(runs, key=lambda run: run[1])


def rows(folder: Path, cluster: sw.Cluster, attempts: int, console: Console) -> list[Row]:
    """Every configuration, predicted before any is run."""
    ids = {name: torch.zeros(2, 32, dtype=torch.long) for name in ("input_ids", "labels")}
    model = sw.trace(small_llama(), ids)
    fixes = [f"{fix},recompute=none" for fix in CONFIGURATIONS]
    runtime = Runtime.preset("torch", overlap_gradients=False, overlap_gathers=False)
    predictions = [sw.predict(model, cluster, WORK, fix, runtime=runtime) for fix in fixes]
    found = []
    for at, (fix, prediction) in enumerate(zip(fixes, predictions, strict=True)):
        with console.status(f"training {CONFIGURATIONS[at]}"):
            plan = sw.plan(model, cluster, WORK, fix=fix)
            taken, others = step_seconds(plan.emit("torch", folder / f"program-{at}"), attempts)
        parts = sorted(prediction.time.items(), key=lambda part: -part[1])
        found.append(
            Row(
                CONFIGURATIONS[at],
                prediction.step_seconds,
                median(taken),
                (max(taken) - min(taken)) / median(taken),
                others,
                ", ".join(f"{name} {s / prediction.step_seconds:.0%}" for name, s in parts[:3]),
            )
        )
    return found


def show(found: list[Row], console: Console) -> None:
    """The table, and how well the predictions order the configurations."""
    table = Table(
        "configuration", "predicted", "measured", "error", "spread", "others", "predicted to go to",
        title=f"Small Llama, {RANKS} gloo ranks on {os.cpu_count()} cores, {STEPS} steps each",
    )  # fmt: skip
    for row in sorted(found, key=lambda row: row.measured_s):
        table.add_row(
            row.fix, f"{row.predicted_s:.3f} s", f"{row.measured_s:.3f} s", f"{row.error:+.0%}",
            f"{row.spread_fraction:.0%}", f"{row.others_fraction:.0%}", row.breakdown,
        )  # fmt: skip
    console.print(table)
    predicted, measured = ([getattr(r, f"{k}_s") for r in found] for k in ("predicted", "measured"))
    picked = min(found, key=lambda row: row.predicted_s)
    console.print(
        f"Kendall {kendalltau(predicted, measured).statistic:.2f}  "
        f"Spearman {spearmanr(predicted, measured).statistic:.2f}  "
        f"median error {median(abs(row.error) for row in found):.0%}  "
        f"regret of the favourite ({picked.fix}) {picked.measured_s / min(measured) - 1:.1%}"
    )


def main() -> None:
    """Measures, predicts, trains, compares."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of each measurement")
    parser.add_argument("--folder", type=Path, help="keep files here, and use those that are")
    parser.add_argument("--attempts", type=int, default=2, help="runs of a disturbed configuration")
    arguments = parser.parse_args()
    console = Console(width=120, highlight=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with console.status("calibrating and probing"):
            cluster = measured_cluster(folder, arguments.budget, console)
        show(rows(folder, cluster, arguments.attempts, console), console)


if __name__ == "__main__":
    main()
