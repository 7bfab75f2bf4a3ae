"""A rank of a DeepSpeed run on CPU: trains, saves, loads, and says what its losses and states are.

`--out` gets losses by step and, from rank 0, every parameter's master copy and moments as the
engine itself gathers them (npz, `STATE NAME`).
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import deepspeed
import deepspeed_plain  # noqa: F401
import numpy as np
import rank_end
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn


class Block(nn.Module):
    """Odd sizes, so that nothing is a multiple of the ranks."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.fc1 = nn.Linear(hidden, ffn)
        self.fc2 = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.nn.functional.silu(self.fc1(self.norm(x))))


class Model(nn.Module):
    """An embedding, three blocks, a buffer, and a head that may be tied or frozen."""

    def __init__(self, tied: bool, frozen: bool) -> None:
        super().__init__()
        self.emb = nn.Embedding(37, 11)
        self.layers = nn.ModuleList(Block(11, 17) for _ in range(3))
        self.head = nn.Linear(11, 37, bias=False)
        self.register_buffer("scale", torch.tensor([1.5, 2.5]))
        if tied:
            self.head.weight = self.emb.weight
        if frozen:
            self.layers[1].requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.emb(x) * self.scale[0].to(self.emb.weight.dtype)
        for layer in self.layers:
            h = layer(h)
        return torch.nn.functional.cross_entropy(self.head(h).float().view(-1, 37), y.view(-1))


def _stage3_states(model: Model) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[f"master {name}"] = safe_get_full_fp32_param(parameter)
            for state in ("exp_avg", "exp_avg_sq"):
                found[f"{state} {name}"] = safe_get_full_optimizer_state(parameter, state)
    return found


def _flat_states(model: Model, engine: Any) -> dict[str, Tensor]:
    """Gathered from the live flat partitions (DeepSpeed's own getters fail with param groups)."""
    zero = engine.optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group, partition in enumerate(zero.single_partition_of_fp32_groups):
        for state, local in {"master": partition, **zero.optimizer.state[partition]}.items():
            if state == "step":
                continue
            parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, local.detach())
            flat, at = torch.cat(parts), 0
            paddings = zero.round_robin_bit16_padding[group]
            for parameter, padding in zip(
                zero.round_robin_bit16_groups[group], paddings, strict=True
            ):
                found[f"{state} {names[id(parameter)]}"] = flat[
                    at : at + parameter.numel()
                ].view_as(parameter)
                at += parameter.numel() + padding
    return found


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--first", type=int, default=0, help="step of the first batch")
    parser.add_argument("--save")
    parser.add_argument("--tag")
    parser.add_argument("--load")
    parser.add_argument("--out", required=True)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--config", default="{}", help="JSON for zero_optimization")
    for flag in ("universal", "tied", "frozen", "groups"):
        parser.add_argument(f"--{flag}", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0 if not args.load else 99)  # what is loaded has to come from the file
    model = Model(args.tied, args.frozen)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": args.stage, **json.loads(args.config)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if args.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if args.universal:
        config["checkpoint"] = {"load_universal": True}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: Any = trained
    if args.groups:
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
    deepspeed.init_distributed("gloo")
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if args.load:
        path, _ = engine.load_checkpoint(args.load, tag=args.tag)
        assert path is not None, f"DeepSpeed loads nothing from {args.load}"
    losses = {}
    for step in range(args.first, args.first + args.steps):
        data = torch.Generator().manual_seed(1000 + 10 * step + dist.get_rank())
        x = torch.randint(0, 37, (1, 8), generator=data)
        loss = engine(x, torch.roll(x, 1))
        engine.backward(loss)
        engine.step()
        losses[step] = loss.item()
    if args.save:
        engine.save_checkpoint(args.save, tag=args.tag or f"step{args.first + args.steps}")
    found = _stage3_states(model) if args.stage == 3 else _flat_states(model, engine)
    if dist.get_rank() == 0:
        out = rank_end.say(args.out, losses)
        np.savez(out / "states.npz", **{k: v.detach().numpy() for k, v in found.items()})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    rank_end.end()
