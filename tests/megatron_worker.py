"""megatron-core writes and loads checkpoints on CPU ranks (started by torchrun).

    torchrun --nproc-per-node 4 megatron_worker.py --tp 2 --pp 2 --save dist D --save legacy L
    torchrun --nproc-per-node 4 megatron_worker.py --pp 4 --load dist D OUT --load legacy L OTHER

What is left of the ranks are data-parallel ones. `flat` is torch_dist with the optimizer's state as
dp_reshardable, `numbered` has arrays for each layer, `single` for experts, gate and up too. A dump
has, per rank, every parameter of the model by its name, its optimizer state as the distributed
optimizer has it, and the logits of fixed tokens where one rank has it all; rows that pad the
vocabulary are zero in it. Before every load, all that is to be loaded is noise.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_cpu  # noqa: F401
import megatron_models
import numpy as np
import rank_end
import torch

STEPS = 2


def arguments() -> argparse.Namespace:
    given = argparse.ArgumentParser()
    for name in ("tp", "pp", "ep", "vpp"):
        given.add_argument(f"--{name}", type=int, default=1)
    given.add_argument("--etp", type=int, default=0)
    given.add_argument("--family", default="llama", choices=megatron_models.FAMILIES)
    given.add_argument("--layers", type=int, default=4)
    given.add_argument("--tied", action="store_true")
    given.add_argument("--grouped", action="store_true")
    given.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    given.add_argument("--groups", type=int, default=2)
    given.add_argument("--vocab", type=int, default=96)
    given.add_argument("--divisible", type=int, default=16)
    given.add_argument("--bucket", type=int, default=0)
    given.add_argument("--save", nargs=2, action="append", default=[])
    given.add_argument("--load", nargs=3, action="append", default=[])
    given.add_argument("--dump", default="")
    return given.parse_args()


def optimizer_of(chunks: list[Any], said: argparse.Namespace) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=said.bucket > 0,
        bucket_size=said.bucket or None,
        grad_reduce_in_fp32=True,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    config = OptimizerConfig(
        optimizer="adam", lr=1e-2, weight_decay=0.1, use_distributed_optimizer=True, clip_grad=0.0,
        bf16=said.dtype == "bfloat16", params_dtype=getattr(torch, said.dtype),
    )  # fmt: skip
    return get_megatron_optimizer(config, wrapped, use_gloo_process_groups=True)


def keep_steps() -> None:
    """torch's Adam, which stands in for fused ones, has its step beside the moments; Megatron would
    look for it among the loaded tensors."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    setting = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_with_step(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        setting(self, parameter, {**tensors, "step": state["step"].clone()})

    DistributedOptimizer._set_main_param_and_optimizer_states = set_with_step


class Run:
    """A rank's chunks and optimizer, and where the rank is."""

    def __init__(self, said: argparse.Namespace) -> None:
        from megatron.core import parallel_state as ps

        self.said = said
        self.place = {
            "tp": ps.get_tensor_model_parallel_rank(),
            "pp": ps.get_pipeline_model_parallel_rank(),
            "ep": ps.get_expert_model_parallel_rank(),
            "etp": ps.get_expert_tensor_parallel_rank(),
            "dp": ps.get_data_parallel_rank(),
            "edp": ps.get_expert_data_parallel_rank(),
        }
        self.chunks = megatron_models.make(said)
        self.optimizer = optimizer_of(self.chunks, said)
        keep_steps()
        # With one expert rank per folder, its dense parameters are replicas: edp says who writes.
        self.first = self.place["edp" if said.ep > 1 else "dp"] == 0
        self.folder = (
            f"mp_rank_{self.place['tp']:02d}"
            + (f"_{self.place['pp']:03d}" if said.pp > 1 else "")
            + (f"_{self.place['ep']:03d}" if said.ep > 1 else "")
        )

    def parameters(self) -> Iterator[tuple[int, str, Any]]:
        for number, chunk in enumerate(self.chunks):
            for name, parameter in chunk.named_parameters():
                yield number, name, parameter

    def single(self) -> list[Any]:
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    def train(self, steps: int) -> None:
        """Steps of drawn gradients: copies get the same on every rank, shards one of their own."""
        for step in range(steps):
            for number, name, parameter in self.parameters():
                own: tuple[Any, ...] = (step, number, name, self.place["pp"])
                if self.said.tied and parameter is self.tied(number):
                    own = (step,)
                tp = self.place["tp"] if getattr(parameter, "tensor_model_parallel", False) else 0
                if ".experts." in name:
                    own, tp = (*own, self.place["ep"]), self.place["etp"]
                seed = zlib.crc32(repr((own, tp)).encode())
                parameter.main_grad.normal_(generator=torch.Generator().manual_seed(seed))
            self.optimizer.step()

    def tied(self, number: int) -> Any:
        chunk = self.chunks[number]
        has = chunk.pre_process or chunk.post_process
        return chunk.shared_embedding_or_output_weight() if has else None

    def scramble(self) -> None:
        """Noise in all that a checkpoint is to bring."""
        with torch.no_grad():
            for one in self.single():
                for parameter in one.model_param_gbuf_map:
                    for value in one._get_main_param_and_optimizer_states(parameter).values():
                        value.fill_(77.0) if value.ndim == 0 else value.normal_()
            for *_, parameter in self.parameters():
                parameter.normal_()
            for chunk in self.chunks:
                for name, value in chunk.named_buffers():
                    if name.endswith("expert_bias"):
                        value.normal_()

    # ------------------------------------------------------------ both formats

    def _dist(self, kind: str, loading: bool) -> dict[str, Any]:
        state: dict[str, Any] = {"iteration": 10, "checkpoint_version": 3.0, "args": self._args()}
        models: dict[str, Any] = {}
        for number, chunk in enumerate(self.chunks):
            key = "model" if len(self.chunks) == 1 else f"model{number}"
            models[key] = chunk.sharded_state_dict(metadata=metadata_of(kind))
            state[key] = dict(models[key])
        with torch.no_grad():
            state["optimizer"] = self.optimizer.sharded_state_dict(
                models if len(self.chunks) > 1 else models["model"],
                is_loading=loading,
                metadata=metadata_of(kind),
            )
        return state

    def _args(self) -> argparse.Namespace:
        said = self.said
        config = self.chunks[0].config
        return argparse.Namespace(
            num_layers=said.layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_query_groups,
            group_query_attention=said.family != "gpt2",
            kv_channels=config.kv_channels,
            ffn_hidden_size=config.ffn_hidden_size,
            tensor_model_parallel_size=said.tp,
            pipeline_model_parallel_size=said.pp,
            expert_model_parallel_size=said.ep,
            expert_tensor_parallel_size=said.etp or said.tp,
            virtual_pipeline_model_parallel_size=said.vpp if said.vpp > 1 else None,
            untie_embeddings_and_output_weights=not said.tied,
            padded_vocab_size=0,
            vocab_size=said.vocab,
            make_vocab_size_divisible_by=said.divisible,
            transformer_impl="local",
            swiglu=config.gated_linear_unit,
            apply_layernorm_1p=config.layernorm_zero_centered_gamma,
            use_distributed_optimizer=True,
            overlap_grad_reduce=said.bucket > 0,
            ddp_bucket_size=said.bucket or None,
            params_dtype=config.params_dtype,
            rank=torch.distributed.get_rank(),
            world_size=torch.distributed.get_world_size(),
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
        )

    def save(self, kind: str, path: str) -> None:
        from megatron.core import dist_checkpointing

        if kind != "legacy":
            if torch.distributed.get_rank() == 0:
                os.makedirs(path)
            torch.distributed.barrier()
            dist_checkpointing.save(
                self._dist(kind, False), path, content_metadata=metadata_of(kind)
            )
            return
        to = Path(path) / "iter_0000010" / self.folder
        if self.first:
            to.mkdir(parents=True)
        torch.distributed.barrier()
        self.optimizer.save_parameter_state(str(to / "distrib_optim.pt"))
        if self.first:
            state: dict[str, Any] = {
                "args": self._args(),
                "checkpoint_version": 3.0,
                "iteration": 10,
                "optimizer": self.optimizer.state_dict(),
                "opt_param_scheduler": {"max_lr": 1e-2, "num_steps": 40},
                "rng_state": [self._random()],
                "num_floating_point_operations_so_far": 1e9,
            }
            for number, chunk in enumerate(self.chunks):
                key = "model" if len(self.chunks) == 1 else f"model{number}"
                state[key] = chunk.state_dict_for_save_checkpoint()
            torch.save(state, to / "model_optim_rng.pt")
        if torch.distributed.get_rank() == 0:
            (Path(path) / "latest_checkpointed_iteration.txt").write_text("10")

    def _random(self) -> dict[str, Any]:
        """As megatron.training keeps it. A CUDA generator's state is its seed and its offset; those
        of the trackers are seeded as model_parallel_cuda_manual_seed does."""

        def generator(seed: int) -> torch.Tensor:
            return torch.frombuffer(bytearray(struct.pack("<qq", seed, 24)), dtype=torch.uint8)

        seed = 1234 + 100 * self.place["pp"]
        return {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": generator(seed),
            "rng_tracker_states": {
                "data-parallel-rng": generator(seed),
                "model-parallel-rng": generator(seed + 2718 + self.place["tp"]),
            },
        }

    def load(self, kind: str, path: str) -> None:
        from megatron.core import dist_checkpointing

        if kind == "legacy":
            at = Path(path) / "iter_0000010" / self.folder
            loaded = torch.load(at / "model_optim_rng.pt", weights_only=False)
            assert loaded["iteration"] == 10
        else:
            loaded = dist_checkpointing.load(self._dist(kind, True), path)
        for number, chunk in enumerate(self.chunks):
            key = "model" if len(self.chunks) == 1 else f"model{number}"
            chunk.load_state_dict(loaded[key], strict=True)
        with torch.no_grad():  # float32 masters are views of the parameters
            self.optimizer.load_state_dict(loaded["optimizer"])
            if kind == "legacy":
                self.optimizer.load_parameter_state(str(at / "distrib_optim.pt"))

    def dump(self, path: str) -> None:
        found: dict[str, np.ndarray] = {}
        for number, name, parameter in self.parameters():
            found[f"weight.{number}.{name}"] = self._kept(name, parameter.detach().float(), 0)
        for chunk in self.chunks:
            for name, value in chunk.named_buffers():
                if name.endswith("expert_bias"):
                    found[f"buffer.{name}"] = value.numpy().copy()
        names = {p: (f"{k}.{n}", n) for k, n, p in self.parameters()}
        for at, one in enumerate(self.single()):
            for parameter in one.model_param_gbuf_map:
                full, name = names[parameter]
                begin = one._get_model_param_range_map(parameter)["param"].start
                for key, value in one._get_main_param_and_optimizer_states(parameter).items():
                    held = value.detach().float()
                    found[f"{key}.{full}"] = self._kept(name, held, begin)
            group = one.optimizer.param_groups[0]
            state = next(iter(one.optimizer.state.values()))
            found[f"step.{at}"] = np.array([float(group.get("step", state.get("step", -1)))])
        if torch.distributed.get_world_size() == 1:
            found["logits"] = self._logits()
        found["place"] = np.array([self.place[axis] for axis in ("tp", "pp", "ep", "dp")])
        Path(path).mkdir(parents=True, exist_ok=True)
        np.savez(Path(path) / f"{torch.distributed.get_rank()}.npz", **found)

    def _kept(self, name: str, value: torch.Tensor, begin: int) -> np.ndarray:
        """Zeros for the rows that pad the vocabulary; `begin` is where a flat slice starts."""
        held = value.numpy().copy()
        if held.ndim and ("word_embeddings" in name or "output_layer" in name):
            said = self.said
            multiple = said.divisible * said.tp
            rows = -(-said.vocab // multiple) * said.divisible
            end = (said.vocab - self.place["tp"] * rows) * megatron_models.HIDDEN - begin
            held.reshape(-1)[max(0, end) :] = 0
        return held

    def _logits(self) -> np.ndarray:
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()  # no dropout here
        tokens = torch.arange(12)[None] % self.said.vocab
        mask = torch.triu(torch.ones(12, 12, dtype=torch.bool), 1)[None, None]
        with torch.no_grad():
            logits = self.chunks[0].eval()(tokens, torch.arange(12)[None], mask)
        self.chunks[0].train()
        return np.asarray(logits.float().numpy()[..., : self.said.vocab])


def metadata_of(kind: str) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "dp_reshardable" if kind == "flat" else "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": kind in ("numbered", "single"),
        "singleton_local_shards": kind == "single",
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    said = arguments()
    from megatron.core import parallel_state as ps

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    ps.initialize_model_parallel(
        said.tp,
        said.pp,
        said.vpp if said.vpp > 1 else None,
        expert_model_parallel_size=said.ep,
        expert_tensor_parallel_size=said.etp or said.tp,
    )
    torch.manual_seed(77)
    run = Run(said)
    run.train(STEPS if said.save else 1)  # Adam's state must be there
    for kind, path in said.save:
        run.save(kind, path)
    if said.dump:
        run.dump(said.dump)
    for kind, path, dump in said.load:
        run.scramble()
        run.load(kind, path)
        run.dump(dump)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    rank_end.end()
