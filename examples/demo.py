"""The whole way once: plan a real model, emit it, and train a small one in three layouts.

    make demo        (or: python examples/demo.py [FOLDER])

Prints the plan of Llama-3.1-8B on two nodes of eight H100 and emits its program. Then trains a
small Llama for 20 steps with plain PyTorch in one process, and with emitted programs on 4 local
ranks: tp=2 x dp=2 and pp=2 x tp=2. The three losses are equal to 1e-5.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import shardwright as sw

STEPS = 20
LEARNING_RATE = 1e-3
SEED = 0
WORK = sw.Workload(global_batch=8, seq_len=32, precision="fp32")
LAYOUTS = {"tp=2 x dp=2": "tp=2,dp=2,zero=3", "pp=2 x tp=2": "pp=2,tp=2"}
TOLERANCE = 1e-5


def small_llama() -> LlamaForCausalLM:
    """Four layers, grouped-query attention; the same weights every time."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train_alone(model: LlamaForCausalLM, data: ModuleType) -> list[float]:
    """What the emitted train.py does, written plainly for one process."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    inputs = dict.fromkeys(("input_ids", "labels"), ("int64", ("b", "s"), 256))
    losses = []
    for step in range(STEPS):
        samples = range(step * WORK.global_batch, (step + 1) * WORK.global_batch)
        loss = model(**data.batch(samples, inputs, WORK.seq_len, SEED)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_sharded(folder: Path, weights: Path, ranks: int = 4) -> list[float]:
    """Runs an emitted program under torchrun and returns its losses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    metrics = folder / "metrics.jsonl"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--master-port", str(port), str(folder / "train.py"), "--steps", str(STEPS),
        "--lr", str(LEARNING_RATE), "--seed", str(SEED), "--weights", str(weights),
        "--metrics", str(metrics),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise SystemExit(f"{folder}/train.py failed:\n{done.stdout}\n{done.stderr}")
    return [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]


def load(path: Path) -> ModuleType:
    """A module from a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(folder: Path) -> None:
    """Prints the plan, the emitted files and the table of losses."""
    console = Console(width=100, highlight=False)
    plan = sw.plan("llama-3.1-8b", "h100-sxm:2", sw.Workload(global_batch=64, seq_len=8192))
    print(plan)
    emitted = plan.emit("torch", folder / "llama-3.1-8b")
    print(f"\nemitted: {', '.join(sorted(path.name for path in emitted.iterdir()))}\n")

    model = small_llama()
    weights = folder / "weights.safetensors"
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, weights)
    ids = {name: torch.zeros(2, 32, dtype=torch.long) for name in ("input_ids", "labels")}
    graph = sw.trace(model, ids)
    losses: dict[str, list[float]] = {}
    for title, layout in LAYOUTS.items():
        program = sw.plan(graph, "local:4", WORK, fix=layout).emit("torch", folder / title)
        losses[title] = train_sharded(program, weights)
    losses["one process"] = train_alone(model, load(emitted / "data.py"))

    table = Table("step", *losses, title=f"{STEPS} steps of a small Llama, float32, AdamW")
    for step in range(STEPS):
        table.add_row(str(step + 1), *(f"{values[step]:.7f}" for values in losses.values()))
    console.print(table)
    alone = losses.pop("one process")
    worst = max(
        abs(a - b) for values in losses.values() for a, b in zip(values, alone, strict=True)
    )
    console.print(f"largest difference from one process: {worst:.1e} (must stay below 1e-5)")
    if not worst < TOLERANCE:
        raise SystemExit("the losses differ")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
