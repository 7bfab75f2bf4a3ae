"""A rank of an FSDP run on CPU: trains, saves with DCP, loads, and says its losses and states."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import rank_end
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--save")
    parser.add_argument("--load")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1)
    for flag in ("fsdp1", "flatten"):
        parser.add_argument(f"--{flag}", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0 if not args.load else 99)
    model: Any = nn.Sequential(nn.Linear(7, 30), nn.ReLU(), nn.Linear(30, 5), nn.LayerNorm(5))
    ranks = dist.get_world_size()
    if args.fsdp1:
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif args.tp > 1:
        mesh = init_device_mesh("cpu", (ranks // args.tp, args.tp), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = StateDictOptions(flatten_optimizer_state_dict=args.flatten)
    if args.load:
        weights, state = get_state_dict(model, optimizer, options=options)
        dcp.load({"model": weights, "optim": state}, checkpoint_id=args.load)
        set_state_dict(
            model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options
        )
    losses = {}
    for step in range(args.first, args.first + args.steps):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        loss = (model(x) * torch.arange(5.0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = loss.item()
    weights, state = get_state_dict(model, optimizer, options=options)
    if args.save:
        dcp.save({"model": weights, "optim": state, "seen": 12}, checkpoint_id=args.save)
    full = StateDictOptions(full_state_dict=True)
    weights, state = get_state_dict(model, optimizer, options=full)
    if dist.get_rank() == 0:
        out = rank_end.say(args.out, losses)
        arrays = {f"weight {name}": tensor.numpy() for name, tensor in weights.items()}
        for name, entry in state["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                arrays[f"{key} {name}"] = entry[key].numpy()
        np.savez(out / "states.npz", **arrays)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    rank_end.end()
