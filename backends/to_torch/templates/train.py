"""Trains the model: `torchrun --nproc-per-node N train.py --steps 100`.

Sizes and layout are in settings.py, the model in model.py, data in data.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from math import cos, pi
from pathlib import Path
from typing import Any

import migrate
import model
import parallel
import reads
import settings
import torch
import torch.distributed as dist
from initial import initialise
from saving import Saver
from step import Step, clip_gradients
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from weights import load_weights

from checkpoint import Progress, resume


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=f"Train {settings.MODEL_NAME}.")
    parser.add_argument("--steps", type=int, default=20, help="train until this step")
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate")
    parser.add_argument("--min-lr", type=float, default=0.1, help="last rate, as a part of --lr")
    parser.add_argument("--warmup", type=int, default=0, help="steps of linear warm-up")
    parser.add_argument("--decay", choices=["none", "linear", "cosine"], default="none")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--betas", type=float, nargs=2, default=[0.9, 0.95])
    parser.add_argument(
        "--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="data:batch", help="module:function, see data.py")
    parser.add_argument("--weights", type=Path, help="start from these plain weights")
    parser.add_argument("--save", type=Path, help="folder for checkpoints")
    parser.add_argument("--save-every", type=int, default=0, help="steps; 0: only at the end")
    parser.add_argument(
        "--resume", type=Path, help="a checkpoint, a folder of them, or of reads.jsonl"
    )
    parser.add_argument(
        "--next", type=Path, help="folder of programs to go on with when ranks are lost: migrate.py"
    )
    parser.add_argument(
        "--lost-after", type=float, default=600.0, help="seconds that a rank is waited for then"
    )
    parser.add_argument("--joins", action="store_true", help="as a new rank of such a program")
    parser.add_argument("--log-every", type=int, default=1, help="steps")
    parser.add_argument("--metrics", type=Path, help="also write one JSON line per logged step")
    return parser.parse_args()


@record  # so that torchrun shows the traceback of the rank that failed first
def main() -> None:
    """One run, from the mesh to the last checkpoint."""
    args = arguments()
    # spmd_types calls torch's collectives by names that torch is about to change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="spmd_types")
    if args.joins:
        programs = int(Path(__file__).resolve().parent.name) - 1
        state: Any = migrate.Held(None, Progress(), [], programs=programs)
    else:
        parallel.init_mesh(settings.MESH)
        state = train(args)
    while state is not None:  # ranks were lost
        state = migrate.go_on(args, state)


def train(args: argparse.Namespace, moved: migrate.Held | None = None) -> migrate.Held | None:
    """Trains to the last step, from what was `moved` here from another program if anything was.

    Returns None; where ranks are lost on the way, and `--next` says how to go on, what is held.
    """
    stage = parallel.build(model.STAGES[parallel.axis_rank("pp")], model.BLOCKS)
    optimizer = adamw(stage, args)
    parameters = dict(stage.named_parameters())
    progress = Progress(seed=args.seed)
    if moved is not None:
        here = Path(__file__).resolve().parent
        progress = migrate.place(moved, here, stage, optimizer, args.save or args.resume)
    elif args.resume or (Path(__file__).parent / reads.FILE).exists():
        progress = resume(args.resume or Path(__file__).parent, stage, optimizer)
    elif args.weights or settings.WEIGHTS:
        load_weights(stage, args.weights or Path(__file__).parent / settings.WEIGHTS)
    else:
        initialise(stage, args.seed)
    torch.manual_seed(progress.seed)
    if hasattr(stage, "forwards"):  # dropout draws by the number of forward passes
        stage.forwards = progress.step * settings.MICROBATCHES
    programs, saved = moved.programs if moved is not None else 0, None
    if args.next and args.resume and moved is None:
        saved = migrate.held(parameters, optimizer, progress)
    samples = find(args.data)
    step = Step(stage)
    saver = Saver(args.save) if args.save else None
    log = Log(args)
    if args.next:
        parallel.wait_at_most(args.lost_after)
    while progress.step < args.steps:
        try:
            loss = step(own_rows(samples, progress))
            norm = clip_gradients(stage, args.clip or float("inf"))
        except RuntimeError as error:  # what collectives raise that a rank has no part in any more
            if args.next is None or isinstance(error, torch.OutOfMemoryError):
                raise
            print(f"step {progress.step + 1} failed: {error}", file=sys.stderr, flush=True)
            state = migrate.held(parameters, optimizer, progress)
            return dataclasses.replace(state, saved=saved, programs=programs)
        rate = learning_rate(progress.step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if saver is not None:
            saver.before_update()
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        progress.samples += settings.GLOBAL_BATCH
        log(progress.step, loss, norm, rate)
        due = args.save_every and progress.step % args.save_every == 0
        if saver is not None and (due or progress.step == args.steps):
            saver.save(stage, optimizer, progress)
            if args.next:  # what a run goes back to is on disk, and in host memory
                saver.wait()
                saved = migrate.held(parameters, optimizer, progress)
    if saver is not None:
        saver.wait()
    return None


def adamw(stage: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors (norms, biases) do not."""
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=True)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """The rate of a step, counted from 0."""
    if step < args.warmup:
        return float(args.lr * (step + 1) / args.warmup)
    done = min(1.0, (step - args.warmup) / max(1, args.steps - args.warmup))
    left = {"none": 1.0, "linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2}[args.decay]
    return float(args.lr * (args.min_lr + (1 - args.min_lr) * left))


def find(path: str) -> Callable[..., dict[str, Tensor]]:
    """The data function that `--data module:function` names."""
    module, _, function = path.partition(":")
    sys.path.append(str(Path.cwd()))
    try:
        found: Callable[..., dict[str, Tensor]] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(f"--data {path}: expected module:function ({error})") from error
    return found


def own_rows(samples: Callable[..., dict[str, Tensor]], progress: Progress) -> dict[str, Tensor]:
    """This data-parallel rank's rows of the next global batch, on its device."""
    rows = settings.GLOBAL_BATCH // settings.MESH["dp"]
    first = progress.samples + rows * parallel.axis_rank("dp")
    batch = samples(range(first, first + rows), model.BATCH, settings.SEQ_LEN, progress.seed)
    if set(batch) != set(model.BATCH):
        raise ValueError(f"the data function gave {sorted(batch)}, not {sorted(model.BATCH)}")
    sizes = {"b": rows, "s": settings.SEQ_LEN}
    for name, (_, dims, _) in model.BATCH.items():
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in dims)
        if tuple(batch[name].shape) != shape:
            raise ValueError(
                f"the data function gave {name} as {tuple(batch[name].shape)}, not {shape}"
            )
    moved = {
        name: tensor.to(parallel.device(), non_blocking=True) for name, tensor in batch.items()
    }
    return {
        name: t.to(parallel.model_dtype()) if t.is_floating_point() else t
        for name, t in moved.items()
    }


class Log:
    """Prints on rank 0 how training goes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.quiet = dist.get_rank() != 0
        self.since, self.began = 0, time.perf_counter()

    def __call__(self, step: int, loss: Tensor, norm: Tensor, rate: float) -> None:
        """One step is done; reading the loss waits for the device, so only where it is shown."""
        self.since += 1
        if self.quiet or (step % self.args.log_every and step != self.args.steps):
            return
        entry: dict[str, Any] = {"step": step, "loss": loss.item(), "gradient_norm": norm.item()}
        now = time.perf_counter()
        tokens = self.since * settings.GLOBAL_BATCH * settings.SEQ_LEN / (now - self.began)
        self.since, self.began = 0, now
        entry |= {"learning_rate": rate, "tokens_per_second": tokens}
        print(
            f"step {step:6d}  loss {entry['loss']:.6f}  norm {entry['gradient_norm']:.4f}  "
            f"lr {rate:.3e}  tokens/s {tokens:,.0f}",
            flush=True,
        )
        if self.args.metrics:
            with self.args.metrics.open("a") as file:
                file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
    parallel.leave()
