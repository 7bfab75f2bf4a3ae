"""A rank of DeepSpeed's automatic tensor parallelism on CPU: trains, saves, loads.

`--out` gets losses by step.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import deepspeed
import deepspeed_plain  # noqa: F401
import rank_end
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 50
SIZES: dict[str, Any] = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, vocab_size=VOCABULARY,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=32,
)  # fmt: skip

FUSED = {
    "use_default_specs": False,
    "layer_specs": [
        {
            "patterns": [r".*\.qkv\.weight$"], "partition_type": "column",
            "shape": [[24, 12, 12], -1], "partition_dim": 0,
        },
        {
            "patterns": [r".*\.gate_up\.weight$"], "partition_type": "column",
            "shape": [2, -1], "partition_dim": 0,
        },
        {"patterns": [r".*\.(o|down)\.weight$"], "partition_type": "row"},
    ],
}  # fmt: skip
"""Six heads of queries and three of keys and values: two and one of them on two ranks."""


class FusedBlock(nn.Module):
    """Fused projections with biases; mixing is not attention's, whose sizes AutoTP has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.qkv = nn.Linear(24, 48)
        self.o = nn.Linear(24, 24)
        self.gate_up = nn.Linear(24, 28, bias=False)
        self.down = nn.Linear(14, 24)

    def forward(self, x: Tensor) -> Tensor:
        made = self.qkv(self.norm(x))
        heads = made.shape[-1] // 16
        q, k, v = made.split([8 * heads, 4 * heads, 4 * heads], -1)
        x = x + self.o(q * torch.cat([k, v], -1))
        gate, up = self.gate_up(x).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


class Fused(nn.Module):
    """An embedding, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_key_value_heads=3, hidden_size=24, model_type="fused")
        self.emb = nn.Embedding(VOCABULARY, 24)
        self.layers = nn.ModuleList(FusedBlock() for _ in range(2))
        self.out = nn.Linear(24, VOCABULARY, bias=False)
        self.register_buffer("scale", torch.tensor([1.5, 2.5]))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        h = self.emb(input_ids) * self.scale[0].to(self.emb.weight.dtype)
        for layer in self.layers:
            h = layer(h)
        logits = self.out(h).float().view(-1, VOCABULARY)
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels.view(-1)))


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama")
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--first", type=int, default=0, help="step of the first batch")
    parser.add_argument("--save")
    parser.add_argument("--save-after", type=int, default=2, help="steps")
    parser.add_argument("--tag")
    parser.add_argument("--load")
    parser.add_argument("--out", required=True)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--universal", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0 if not args.load else 99)  # what is loaded has to come from the file
    parallel: dict[str, Any] = {"autotp_size": args.tp}
    if args.model == "fused":
        model: Any = Fused()
        parallel["partition_config"] = FUSED
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": args.stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": args.dtype == "bf16"},
        "checkpoint": {"load_universal": args.universal},
    }
    if args.tp > 1:
        config["tensor_parallel"] = parallel
    deepspeed.init_distributed("gloo")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if args.load:
        path, _ = engine.load_checkpoint(args.load, tag=args.tag)
        assert path is not None, f"DeepSpeed loads nothing from {args.load}"
    losses = {}
    for step in range(args.first, args.first + args.steps):
        x = torch.randint(0, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(step))
        loss = engine(input_ids=x, labels=x).loss
        engine.backward(loss)
        engine.step()
        losses[step] = loss.item()
        if args.save and step + 1 == args.save_after:
            engine.save_checkpoint(args.save)
    if dist.get_rank() == 0:
        rank_end.say(args.out, losses)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    rank_end.end()
