"""megatron-core writes and loads checkpoints on CPU ranks (started by torchrun).

    torchrun --nproc-per-node 4 megatron_worker.py --tp 2 --pp 2 --save-dist D --save-legacy L
    torchrun --nproc-per-node 4 megatron_worker.py --pp 4 --load-dist D --dump OUT

A dump has, per rank, every parameter of the model by its name, its optimizer state as the
distributed optimizer has it, and the logits of fixed tokens on the last stage.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import warnings
import zlib
from pathlib import Path
from typing import Any

import megatron_cpu  # noqa: F401
import numpy as np
import rank_end
import torch


def arguments() -> argparse.Namespace:
    given = argparse.ArgumentParser()
    for name in ("tp", "pp", "ep", "vpp"):
        given.add_argument(f"--{name}", type=int, default=1)
    given.add_argument("--family", default="llama", choices=["llama", "moe", "gpt2"])
    given.add_argument("--layers", type=int, default=4)
    given.add_argument("--tied", action="store_true")
    given.add_argument("--groups", type=int, default=2)
    given.add_argument("--vocab", type=int, default=96)
    given.add_argument("--divisible", type=int, default=16)
    given.add_argument("--no-optimizer", action="store_true")
    given.add_argument("--bucket", type=int, default=20000)
    given.add_argument("--sharding", default="fully_reshardable")
    for name in ("save-dist", "load-dist", "save-legacy", "load-legacy", "dump"):
        given.add_argument(f"--{name}", default="")
    return given.parse_args()


def make(said: argparse.Namespace) -> list[Any]:
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    llama = said.family != "gpt2"
    experts = 4 if said.family == "moe" else 0
    options: dict[str, Any] = {}
    if experts:
        options = dict(
            num_moe_experts=experts,
            moe_router_topk=2,
            moe_grouped_gemm=False,
            moe_token_dispatcher_type="alltoall",
            sequence_parallel=said.tp > 1,
        )
    config = TransformerConfig(
        num_layers=said.layers,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=said.groups if llama else 8,
        ffn_hidden_size=96,
        gated_linear_unit=llama,
        activation_func=torch.nn.functional.silu if llama else torch.nn.functional.gelu,
        add_bias_linear=not llama,
        normalization="RMSNorm" if llama else "LayerNorm",
        use_cpu_initialization=True,
        tensor_model_parallel_size=said.tp,
        pipeline_model_parallel_size=said.pp,
        virtual_pipeline_model_parallel_size=said.vpp if said.vpp > 1 else None,
        expert_model_parallel_size=said.ep,
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **options,
    )
    multiple = said.divisible * said.tp
    vocab = -(-said.vocab // multiple) * multiple
    chunks = []
    for chunk in range(said.vpp):
        virtual = chunk if said.vpp > 1 else None
        chunks.append(
            GPTModel(
                config,
                get_gpt_layer_local_spec(
                    num_experts=experts or None,
                    moe_grouped_gemm=False,
                    normalization=config.normalization,
                ),
                vocab_size=vocab,
                max_sequence_length=32,
                position_embedding_type="rope" if llama else "learned_absolute",
                share_embeddings_and_output_weights=said.tied,
                pre_process=ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual),
                post_process=ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual),
                vp_stage=virtual,
            )
        )
    return chunks


def optimizer_of(chunks: list[Any], said: argparse.Namespace) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=False, bucket_size=said.bucket
    )
    wrapped = [
        DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    config = OptimizerConfig(
        optimizer="adam", lr=1e-2, weight_decay=0.1, use_distributed_optimizer=True, clip_grad=0.0
    )
    return get_megatron_optimizer(config, wrapped, use_gloo_process_groups=True)


def keep_steps() -> None:
    """torch's Adam, which stands in for fused ones, has its step beside the moments; Megatron would
    look for it among the loaded tensors."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    setting = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_with_step(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        setting(self, parameter, {"step": state["step"].clone(), **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = set_with_step


def main() -> None:
    warnings.filterwarnings("ignore")
    said = arguments()
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as ps

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    ps.initialize_model_parallel(
        said.tp,
        said.pp,
        said.vpp if said.vpp > 1 else None,
        expert_model_parallel_size=said.ep,
        expert_tensor_parallel_size=said.tp,
    )
    torch.manual_seed(77 + (1000 if said.load_dist or said.load_legacy else 0))
    chunks = make(said)
    optimizer = None
    if not said.no_optimizer:
        optimizer = optimizer_of(chunks, said)
        keep_steps()
        steps = 1 if said.load_dist or said.load_legacy else 2  # Adam's state must be there
        place = (ps.get_pipeline_model_parallel_rank(), ps.get_expert_model_parallel_rank())
        tp = ps.get_tensor_model_parallel_rank()
        for step in range(steps):
            for number, chunk in enumerate(chunks):
                for name, parameter in chunk.named_parameters():
                    # Copies get the same gradient on every rank, shards one of their own.
                    own: tuple[Any, ...] = (step, number, name, *place)
                    if parameter is chunk.shared_embedding_or_output_weight() and said.tied:
                        own = (step,)
                    elif ".experts." not in name:
                        own = own[:-1]
                    sharded = getattr(parameter, "tensor_model_parallel", False)
                    seed = zlib.crc32(repr((own, tp if sharded else 0)).encode())
                    parameter.main_grad.normal_(generator=torch.Generator().manual_seed(seed))
            optimizer.step()
    metadata = {
        "distrib_optim_sharding_type": said.sharding,
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }

    def dist_state(loading: bool) -> dict[str, Any]:
        state: dict[str, Any] = {"iteration": 10, "checkpoint_version": 3.0}
        models: dict[str, Any] = {}
        for number, chunk in enumerate(chunks):
            key = "model" if len(chunks) == 1 else f"model{number}"
            models[key] = chunk.sharded_state_dict(metadata=metadata)
            chunk_keys = dict(models[key])
            state[key] = chunk_keys
        if optimizer is not None:
            with torch.no_grad():
                state["optimizer"] = optimizer.sharded_state_dict(
                    models if len(chunks) > 1 else models["model"],
                    is_loading=loading,
                    metadata=metadata,
                )
        return state

    if said.save_dist:
        if rank == 0:
            os.makedirs(said.save_dist)
        torch.distributed.barrier()
        dist_checkpointing.save(dist_state(False), said.save_dist, content_metadata=metadata)
    folder = (
        f"mp_rank_{ps.get_tensor_model_parallel_rank():02d}"
        + (f"_{ps.get_pipeline_model_parallel_rank():03d}" if said.pp > 1 else "")
        + (f"_{ps.get_expert_model_parallel_rank():03d}" if said.ep > 1 else "")
    )
    if said.save_legacy:
        to = Path(said.save_legacy) / "iter_0000010" / folder
        first = (
            ps.get_expert_data_parallel_rank() if said.ep > 1 else ps.get_data_parallel_rank()
        ) == 0
        if first:
            to.mkdir(parents=True)
        torch.distributed.barrier()
        if optimizer is not None:
            if first:
                pass
            optimizer.save_parameter_state(str(to / "distrib_optim.pt"))
        if first:
            state: dict[str, Any] = {
                "args": argparse.Namespace(
                    num_layers=said.layers,
                    hidden_size=64,
                    num_attention_heads=8,
                    num_query_groups=said.groups if said.family != "gpt2" else 8,
                    group_query_attention=said.family != "gpt2",
                    kv_channels=8,
                    ffn_hidden_size=96,
                    tensor_model_parallel_size=said.tp,
                    pipeline_model_parallel_size=said.pp,
                    expert_model_parallel_size=said.ep,
                    virtual_pipeline_model_parallel_size=said.vpp if said.vpp > 1 else None,
                    untie_embeddings_and_output_weights=not said.tied,
                    padded_vocab_size=0,
                    vocab_size=said.vocab,
                    make_vocab_size_divisible_by=said.divisible,
                    transformer_impl="local",
                    swiglu=said.family != "gpt2",
                    use_distributed_optimizer=True,
                    params_dtype=torch.float32,
                ),
                "checkpoint_version": 3.0,
                "iteration": 10,
            }
            for number, chunk in enumerate(chunks):
                key = "model" if len(chunks) == 1 else f"model{number}"
                state[key] = chunk.state_dict_for_save_checkpoint()
            if optimizer is not None:
                state["optimizer"] = optimizer.state_dict()
            torch.save(state, to / "model_optim_rng.pt")
        if rank == 0:
            (Path(said.save_legacy) / "latest_checkpointed_iteration.txt").write_text("10")
    if said.load_dist:
        loaded = dist_checkpointing.load(dist_state(True), said.load_dist)
        for number, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded["model" if len(chunks) == 1 else f"model{number}"])
        if optimizer is not None:
            optimizer.load_state_dict(loaded["optimizer"])
    if said.load_legacy:
        at = Path(said.load_legacy) / "iter_0000010" / folder
        loaded = torch.load(at / "model_optim_rng.pt", weights_only=False)
        assert loaded["iteration"] == 10
        for number, chunk in enumerate(chunks):
            chunk.load_state_dict(
                loaded["model" if len(chunks) == 1 else f"model{number}"], strict=True
            )
        if optimizer is not None:
            optimizer.load_state_dict(loaded["optimizer"])
            with torch.no_grad():  # float32 masters are views of the parameters
                optimizer.load_parameter_state(str(at / "distrib_optim.pt"))
    if said.dump:
        dump(said, chunks, optimizer, rank)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def dump(said: argparse.Namespace, chunks: list[Any], optimizer: Any, rank: int) -> None:
    from megatron.core import parallel_state as ps

    found: dict[str, np.ndarray] = {}
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            found[f"weight.{number}.{name}"] = parameter.detach().numpy().copy()
    if optimizer is not None:
        single = getattr(optimizer, "chained_optimizers", [optimizer])
        names = {
            p: f"{k}.{n}" for k, chunk in enumerate(chunks) for n, p in chunk.named_parameters()
        }
        for one in single:
            for parameter in one.model_param_gbuf_map:
                states = one._get_main_param_and_optimizer_states(parameter)
                for key, value in states.items():
                    found[f"{key}.{names[parameter]}"] = value.detach().numpy().copy()
            group = one.optimizer.param_groups[0]
            found[f"step.{single.index(one)}"] = np.array(
                [float(group.get("step", next(iter(one.optimizer.state.values())).get("step", -1)))]
            )
    # The router's product needs Transformer Engine, which has no CPU kernels.
    if said.tp * said.pp * said.ep * said.vpp == 1 and said.family != "moe":
        tokens = torch.arange(12)[None] % said.vocab
        mask = torch.triu(torch.ones(12, 12, dtype=torch.bool), 1)[None, None]
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()  # no dropout here
        with torch.no_grad():
            logits = chunks[0].eval()(tokens, torch.arange(12)[None], mask)
        found["logits"] = logits.numpy()
    place = [
        ps.get_tensor_model_parallel_rank(),
        ps.get_pipeline_model_parallel_rank(),
        ps.get_expert_model_parallel_rank(),
        ps.get_data_parallel_rank(),
    ]
    found["place"] = np.array(place)
    Path(said.dump).mkdir(parents=True, exist_ok=True)
    np.savez(Path(said.dump) / f"{rank}.npz", **found)


if __name__ == "__main__":
    main()
    rank_end.end()
