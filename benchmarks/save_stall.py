"""How long a save holds training up: `python benchmarks/save_stall.py [--ranks 4] [--hidden 512]`.

Emits a Llama, starts its ranks, and lets them train with a save after a step, in several ways in
the same run: written within the step (`checkpoint.save`), torch's own `dcp.async_save` (which
copies within the step and writes beside it), what emitted programs do (`saving.Saver`: copies
during the next batch too), and torch_checkpointing where it is installed (it copies in a thread,
holds the update until that is done, and writes in a process of its own). The stall is what the
training loop waits for in all calls of the save, up to the next update; on two cores the copy and
the disk slow the batch beside it, so the time of the two steps around the save is given as well.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

TORCH_CHECKPOINTING = "torch_checkpointing"
WORKER = "SHARDWRIGHT_SAVE_STALL"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        program = emitted(args, Path(folder) / "program")
        command = [
            sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={args.ranks}",
            "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
            __file__, f"--rounds={args.rounds}",
        ]  # fmt: skip
        env = os.environ | {WORKER: str(program), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=env, check=True, timeout=1200)


def emitted(args: argparse.Namespace, folder: Path) -> Path:
    import transformers

    import shardwright as sw

    config = transformers.LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4, num_hidden_layers=8,
        vocab_size=32000, num_attention_heads=8, num_key_value_heads=8, use_cache=False,
    )  # fmt: skip
    import torch

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    cluster = sw.Cluster.parse(f"h100-sxm:1x{args.ranks}")
    work = sw.Workload(global_batch=args.ranks, seq_len=64, precision="fp32")
    tokens = torch.zeros(1, 64, dtype=torch.long, device="meta")
    inputs = {"input_ids": tokens, "labels": tokens}
    fix = f"dp={args.ranks},tp=1,pp=1,zero=1,micro_batch=1"
    plan = sw.plan(model, cluster, work, fix=fix, example_inputs=inputs)
    return plan.emit("torch", folder)


def worker(program: Path, rounds: int) -> None:
    import time
    from dataclasses import replace

    sys.path.insert(0, str(program))
    import data
    import model
    import parallel
    import settings
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from initial import initialise
    from saving import Saver
    from step import Step, clip_gradients

    import checkpoint

    parallel.init_mesh(settings.MESH)
    stage = parallel.build(model.STAGES[0], model.BLOCKS)
    initialise(stage, 0)
    optimizer = torch.optim.AdamW(stage.parameters(), fused=True)
    checkpoint.create_state(optimizer)
    step, folder = Step(stage), program.parent / "saved"
    saver, group = Saver(folder), dist.new_group(backend="gloo")
    progress = checkpoint.Progress()
    rows = settings.GLOBAL_BATCH // settings.MESH["dp"]
    batch = data.batch(range(rows), model.BATCH, settings.SEQ_LEN, 0)

    manager: Any = None
    if find_spec("torch_checkpointing") is not None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        beside_it = CheckpointManager.Config.with_async_save()
        # Its default of direct writes fails on ext4 (0.1.1: blocks are not aligned).
        beside_it.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        manager = CheckpointManager(beside_it)

    def train(way: str) -> tuple[float, float]:
        """(stall, both steps) in seconds of a save between two steps."""
        stall, writing = 0.0, None
        dist.barrier()
        began = time.perf_counter()
        for number in range(2):
            step(batch)
            clip_gradients(stage, 1.0)
            before = time.perf_counter()
            if number and way == "beside":
                saver.before_update()
            if number and way == TORCH_CHECKPOINTING:
                with manager.lock():
                    pass
            stall += time.perf_counter() - before
            optimizer.step()
            optimizer.zero_grad()
            progress.step += 1
            before = time.perf_counter()
            if not number and way == "within":
                checkpoint.save(folder, stage, optimizer, progress)
            if not number and way == "dcp":
                held = {n: t.here for n, t in checkpoint.state(stage, optimizer).items()}
                held = {f"{dist.get_rank()}.{n}": t for n, t in held.items()}
                writing = dcp.async_save(held, checkpoint_id=folder / "dcp", process_group=group)
            if not number and way == TORCH_CHECKPOINTING:
                held = {n: t.here for n, t in checkpoint.state(stage, optimizer).items()}
                place = folder / f"other-{progress.step}"  # it replaces no earlier save
                writing = manager.save(str(place), {f"rank{dist.get_rank()}": held})
            if not number and way == "beside":
                saver.save(stage, optimizer, replace(progress))
            stall += time.perf_counter() - before
        took = time.perf_counter() - began
        saver.wait()
        if writing is not None:
            writing.result()
        return stall, took

    ways = ["none", "within", "dcp", "beside", *([TORCH_CHECKPOINTING] if manager else [])]
    for way in ways:
        train(way)
    found = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            found[way].append(train(way))
    if dist.get_rank() == 0:
        count = sum(p.numel() for p in stage.parameters())
        print(f"{count / 1e6:.0f} M parameters, {settings.MESH}, medians of {rounds} rounds")
        print("| a save | stall, s | both steps, s |\n|---|---|---|")
        for way in ways:
            stall, took = (median(part) for part in zip(*found[way], strict=True))
            print(f"| {way} | {stall:.3f} | {took:.2f} |")
    if manager is not None:
        manager.close()
    parallel.leave()


if __name__ == "__main__":
    if WORKER in os.environ:
        worker(Path(os.environ[WORKER]), arguments().rounds)
    else:
        main()
