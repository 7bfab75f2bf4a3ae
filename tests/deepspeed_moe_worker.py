"""A rank of a DeepSpeed run with MoE layers on CPU: trains, saves, loads.

`--out` gets losses by step and, from rank 0, every parameter's weight, master copy and moments
(npz, `STATE NAME`), gathered from the live partitions of all ranks; experts are counted over all
ranks.
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
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from torch import Tensor, nn

HIDDEN, ROWS = 10, 23


class Expert(nn.Module):
    """Odd sizes, so that nothing is a multiple of the ranks; a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 7)
        self.down = nn.Linear(7, HIDDEN, bias=False)
        self.register_buffer("scale", torch.tensor([0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(x))) * self.scale.to(x.dtype)


class Block(nn.Module):
    """A norm and a layer of experts."""

    def __init__(self, experts: int, ep_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.moe = MoE(
            HIDDEN, Expert(), experts, ep_size=ep_size, k=1, capacity_factor=4.0, min_capacity=8,
            use_rts=False,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        made, _, _ = self.moe(self.norm(x))
        return x + made


class Model(nn.Module):
    """An embedding, blocks of different numbers of experts, a head."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.emb = nn.Embedding(ROWS, HIDDEN)
        self.layers = nn.ModuleList(Block(*size) for size in sizes)
        self.head = nn.Linear(HIDDEN, ROWS, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.emb(x)
        for layer in self.layers:
            h = layer(h)
        return nn.functional.cross_entropy(self.head(h).float().view(-1, ROWS), y.view(-1))


PREFIX = ".deepspeed_moe.experts.deepspeed_experts."


def whole_name(model: nn.Module, name: str) -> str:
    """A name with the expert's number among those of all ranks."""
    layer, found, rest = name.partition(PREFIX)
    if not found:
        return name
    moe = model.get_submodule(layer)
    number, _, attribute = rest.partition(".")
    first = groups._get_expert_parallel_rank(moe.expert_group_name) * moe.num_local_experts
    return f"{layer}{PREFIX}{first + int(number)}.{attribute}"


def live_states(model: Model, engine: Any) -> dict[str, Tensor]:
    """Gathered from the live flat partitions, by all ranks; on rank 0 those of all."""
    zero = engine.optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own = {f"weight {whole_name(model, n)}": p.detach().float() for n, p in names_of(model)}
    for group, partition in enumerate(zero.single_partition_of_fp32_groups):
        process_group = zero.real_dp_process_group[group]
        for state, local in {"master": partition, **zero.optimizer.state[partition]}.items():
            if state == "step":
                continue
            parts = [torch.empty_like(local) for _ in range(dist.get_world_size(process_group))]
            dist.all_gather(parts, local.detach(), group=process_group)
            flat, at = torch.cat(parts), 0
            paddings = zero.round_robin_bit16_padding[group]
            for parameter, padding in zip(
                zero.round_robin_bit16_groups[group], paddings, strict=True
            ):
                piece = flat[at : at + parameter.numel()].view_as(parameter)
                own[f"{state} {whole_name(model, names[id(parameter)])}"] = piece
                at += parameter.numel() + padding
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, {name: tensor.numpy() for name, tensor in own.items()})
    return {name: array for one in every for name, array in one.items()}


def names_of(model: Model) -> list[tuple[str, Tensor]]:
    """Parameters and buffers."""
    return [*model.named_parameters(), *model.named_buffers()]


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--sizes", default="[[4, 2], [4, 2]]", help="JSON: (experts, ep_size)")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--first", type=int, default=0, help="step of the first batch")
    parser.add_argument("--save")
    parser.add_argument("--load")
    parser.add_argument("--out", required=True)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--config", default="{}", help="JSON for the engine")
    parser.add_argument("--zero", default="{}", help="JSON for zero_optimization")
    parser.add_argument("--largest", type=int, default=10**9, help="elements of a group, at most")
    parser.add_argument("--frozen", action="store_true", help="the experts of the first layer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    sizes = json.loads(args.sizes)
    # What is loaded has to come from the file, and experts differ by rank.
    torch.manual_seed(dist.get_rank() if not args.load else 99)
    model = Model(sizes)
    if args.frozen:
        model.layers[0].moe.deepspeed_moe.experts.requires_grad_(False)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": args.stage, **json.loads(args.zero)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": args.dtype == "bf16"},
        **json.loads(args.config),
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = split_params_into_different_moe_groups_for_optimizer(
        {"params": trained, "name": "dense"}, max_group_size=args.largest
    )
    optimizer = torch.optim.AdamW(parts, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if args.load:
        path, _ = engine.load_checkpoint(args.load)
        assert path is not None, f"DeepSpeed loads nothing from {args.load}"
    losses = {}
    for step in range(args.first, args.first + args.steps):
        data = torch.Generator().manual_seed(1000 + 10 * step + dist.get_rank())
        x = torch.randint(0, ROWS, (1, 8), generator=data)
        loss = engine(x, torch.roll(x, 1))
        engine.backward(loss)
        engine.step()
        losses[step] = loss.item()
    if args.save:
        engine.save_checkpoint(args.save)
    found = live_states(model, engine) if args.stage else {}
    if dist.get_rank() == 0:
        out = rank_end.say(args.out, losses)
        np.savez(out / "states.npz", **found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    rank_end.end()
