"""Trains the model: `python train.py --steps 100`, on the devices of this host or of all hosts.

On one host nothing else is needed: CPU, GPU or TPU. On many, start one process per host; where
JAX cannot find the others by itself (Slurm, Open MPI and Cloud TPU it knows), say where they meet:

    python train.py --coordinator HOST:PORT --processes N --process I

On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N makes N devices. Sizes and layout are
in settings.py, the model in model.py, data in data.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import settings


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
    parser.add_argument("--resume", type=Path, help="a folder of checkpoints")
    parser.add_argument("--log-every", type=int, default=1, help="steps")
    parser.add_argument("--metrics", type=Path, help="also write one JSON line per logged step")
    parser.add_argument("--many-hosts", action="store_true", help="join hosts that JAX finds")
    parser.add_argument("--coordinator", help="HOST:PORT where the processes of all hosts meet")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="which of them this one is")
    return parser.parse_args()


def main() -> None:
    """One run, from the mesh to the last checkpoint."""
    args = arguments()
    if args.many_hosts or args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    train(args)


def train(args: argparse.Namespace) -> None:
    """Trains to the last step."""
    import model
    from initial import initialise
    from weights import load_weights

    import checkpoint

    step = importlib.import_module("pipeline" if model.STAGES else "step")
    adam = step.Adam(
        lambda count: learning_rate(count, args), tuple(args.betas), args.weight_decay, args.clip
    )
    progress = checkpoint.Progress(seed=args.seed)
    if args.weights or settings.WEIGHTS:
        params = load_weights(args.weights or Path(__file__).parent / settings.WEIGHTS)
    else:
        params = initialise(args.seed)
    state = step.create_state(adam, params)
    here = Path(__file__).parent
    if args.resume or (here / checkpoint.reads.FILE).exists():
        params, state, progress = checkpoint.resume(args.resume or here, params, state)
    kept = checkpoint.manager(args.save) if args.save else None
    samples = find(args.data)
    train_step = step.train_step(adam)
    log = Log(args)
    while progress.step < args.steps:
        key = jax.random.fold_in(jax.random.key(progress.seed), progress.step)
        batch = global_batch(samples, progress)
        params, state, loss, norm = train_step(params, state, batch, key)
        progress.step += 1
        progress.samples += settings.GLOBAL_BATCH
        log(progress.step, loss, norm, learning_rate(progress.step - 1, args))
        due = args.save_every and progress.step % args.save_every == 0
        if kept is not None and (due or progress.step == args.steps):
            checkpoint.save(kept, params, state, progress)
    if kept is not None:
        kept.close()


def learning_rate(step: Any, args: argparse.Namespace) -> Any:
    """The rate of a step, counted from 0: a number, or traced."""
    from jax import numpy as jnp

    done = jnp.clip((step - args.warmup) / max(1, args.steps - args.warmup), 0.0, 1.0)
    left = {"none": 1.0, "linear": 1 - done, "cosine": (1 + jnp.cos(jnp.pi * done)) / 2}
    rate = args.lr * (args.min_lr + (1 - args.min_lr) * left[args.decay])
    return jnp.where(step < args.warmup, args.lr * (step + 1) / max(1, args.warmup), rate)


def find(path: str) -> Callable[..., dict[str, np.ndarray]]:
    """The data function that `--data module:function` names."""
    module, _, function = path.partition(":")
    sys.path.append(str(Path.cwd()))
    try:
        found: Callable[..., dict[str, np.ndarray]] = getattr(
            importlib.import_module(module), function
        )
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(f"--data {path}: expected module:function ({error})") from error
    return found


def global_batch(samples: Callable[..., dict[str, np.ndarray]], progress: Any) -> dict[str, Any]:
    """The next global batch, of which every process makes the rows that its devices want."""
    import model
    from mesh import wide_dtype
    from parallel import batch_specs, sharding

    made: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def rows(name: str, first: int, last: int) -> np.ndarray:
        if (first, last) not in made:
            numbers = range(progress.samples + first, progress.samples + last)
            made[first, last] = samples(numbers, model.BATCH, settings.SEQ_LEN, progress.seed)
            if set(made[first, last]) != set(model.BATCH):
                raise ValueError(
                    f"the data function gave {sorted(made[first, last])}, not {sorted(model.BATCH)}"
                )
        return made[first, last][name]

    def array(name: str, spec: Any) -> Any:
        dtype, dims, _ = model.BATCH[name]
        sizes = {"b": settings.GLOBAL_BATCH, "s": settings.SEQ_LEN}
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in dims)
        kind = wide_dtype() if dtype.startswith("float") else dtype

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = (index[0] if index else slice(0, 1)).indices(sizes["b"])
            found = rows(name, first, last)
            if found.shape != (last - first, *shape[1:]):
                raise ValueError(
                    f"the data function gave {name} as {found.shape} for {last - first} samples, "
                    f"not {(last - first, *shape[1:])}"
                )
            return found.astype(kind)

        return jax.make_array_from_callback(shape, sharding(spec), piece)

    return {name: array(name, spec) for name, spec in batch_specs().items()}


class Log:
    """Prints in the first process how training goes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.quiet = jax.process_index() != 0
        self.since, self.began = 0, time.perf_counter()

    def __call__(self, step: int, loss: Any, norm: Any, rate: Any) -> None:
        """One step is done; reading the loss waits for the device, so only where it is shown."""
        self.since += 1
        if self.quiet or (step % self.args.log_every and step != self.args.steps):
            return
        entry = {"step": step, "loss": float(loss), "gradient_norm": float(norm)}
        now = time.perf_counter()
        tokens = prod((self.since, settings.GLOBAL_BATCH, settings.SEQ_LEN)) / (now - self.began)
        self.since, self.began = 0, now
        entry |= {"learning_rate": float(rate), "tokens_per_second": tokens}
        print(
            f"step {step:6d}  loss {entry['loss']:.6f}  norm {entry['gradient_norm']:.4f}  "
            f"lr {entry['learning_rate']:.3e}  tokens/s {tokens:,.0f}",
            flush=True,
        )
        if self.args.metrics:
            with self.args.metrics.open("a") as file:
                file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
