"""What planning costs: CPU seconds and memory of whole `shardwright plan` processes.

    python benchmarks/plan_time.py

Every row is a process of its own, from the start of the interpreter to the printed plan, tracing
included. Figures of AutoParallel are those measured on a machine of the same kind (2 cores); quote
the ratio.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shardwright.ir.from_torch import preset_config


@dataclass(frozen=True)
class Case:
    """One planning problem; `limit_cpu_s` and `limit_gb` are what it must stay under."""

    title: str
    model: str
    cluster: str
    global_batch: int
    limit_cpu_s: float | None
    limit_gb: float | None
    peer: str = ""
    seq_len: int = 8192
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """CPU seconds and peak memory in GB of a process, and the plan it printed."""

    cpu_s: float
    peak_gb: float
    plan: dict[str, object]


def run(case: Case) -> Measured:
    """Plans in a process of its own."""
    command = [
        sys.executable, "-m", "shardwright", "plan", case.model, "--cluster", case.cluster,
        "--global-batch", str(case.global_batch), "--seq-len", str(case.seq_len), "--json",
        *case.options,
    ]  # fmt: skip
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        done = subprocess.run(command, stdout=write, check=False)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        text = f"\n{usage.ru_utime + usage.ru_stime} {usage.ru_maxrss} {done.returncode}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    body, _, last = text.rpartition("\n")
    cpu, rss, code = last.split()
    if code != "0":
        raise SystemExit(f"{' '.join(command)} failed with exit code {code}")
    return Measured(float(cpu), int(rss) * 1024 / 1e9, json.loads(body))


def with_layers(name: str, layers: int, folder: Path) -> str:
    """A preset's config with another number of layers, as a file."""
    config = {**preset_config(name), "num_hidden_layers": layers}
    path = folder / f"{name}-{layers}.json"
    path.write_text(json.dumps(config))
    return str(path)


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        peer = "AutoParallel, sharding alone on a given mesh: 117 s, 4.4 GB"
        cases = [
            Case("Llama-3.1-8B, 64 GPUs", "llama-3.1-8b", "h100-sxm:8", 64, 15, 1.5, peer),
            Case("Llama-3.1-405B, 1,024 GPUs", "llama-3.1-405b", "h100-sxm:128", 1024, 25, None),
            Case("8B dims, 126 layers, 64 GPUs",
                 with_layers("llama-3.1-8b", 126, folder), "h100-sxm:8", 64, None, None),
        ]  # fmt: skip
        table = Table("case", "CPU s", "limit", "peak GB", "limit", "plan", "gap", "peer")
        found: list[Measured] = []
        for case in cases:
            measured = run(case)
            found.append(measured)
            strategy = measured.plan["strategy"]
            certificate = measured.plan["certificate"]
            assert isinstance(strategy, dict) and isinstance(certificate, dict)
            shown = " ".join(f"{k}={strategy[k]}" for k in ("pp", "dp", "tp", "zero"))
            table.add_row(
                case.title, f"{measured.cpu_s:.1f}", _limit(case.limit_cpu_s),
                f"{measured.peak_gb:.2f}", _limit(case.limit_gb), shown,
                f"{certificate['gap']:.1%}", case.peer,
            )  # fmt: skip
    console = Console(width=160)
    console.print(table)
    growth = found[2].cpu_s / found[0].cpu_s - 1
    console.print(f"32 → 126 layers: {growth:+.1%} CPU time (must stay under +20 %)")


def _limit(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


if __name__ == "__main__":
    main()
