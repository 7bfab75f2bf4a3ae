"""A rank of a DeepSpeed pipeline on CPU: a PipelineModule of two stages with a tied embedding."""

from __future__ import annotations

import argparse
from typing import Any

import deepspeed
import deepspeed_plain  # noqa: F401
import rank_end
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn


class Block(nn.Module):
    """Odd sizes and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(11)
        self.fc = nn.Linear(11, 11)
        self.register_buffer("scale", torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale.to(x.dtype) * self.fc(self.norm(x))


def _logits(embedding: Any, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, embedding.weight)


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float().view(-1, 37), y.view(-1))


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    layers = [
        TiedLayerSpec("embed", nn.Embedding, 37, 11),
        *(LayerSpec(Block) for _ in range(3)),
        nn.functional.silu,
        LayerSpec(nn.LayerNorm, 11),
        TiedLayerSpec("embed", nn.Embedding, 37, 11, forward_fn=_logits),
    ]
    model = PipelineModule(layers, num_stages=2, loss_fn=_loss, partition_method="uniform")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = {}
    for step in range(2):
        x = torch.randint(0, 37, (1, 8), generator=torch.Generator().manual_seed(step))
        losses[step] = engine.train_batch(iter([(x, torch.roll(x, 1))] * 2)).item()
    info = {"pipeline_replicated_parameter_patterns": [r"tied_modules\.embed\.weight"]}
    engine.save_checkpoint(args.save, client_state={"universal_checkpoint_info": info})
    if dist.get_rank() == 0:
        rank_end.say(args.out, losses)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    rank_end.end()
