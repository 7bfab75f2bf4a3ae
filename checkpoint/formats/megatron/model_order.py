"""Which rank has what, and in which order: how Megatron cuts a model into stages.

The flat buffers name nothing, so the order in which Megatron's modules register their parameters
is a part of the format. It is read from files; to write them it is known here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ....ir import InvalidInput

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"

_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
_EXPERT = re.compile(r"(.*\.experts\.(?:local_experts\.|linear_fc[12]\.(?:weight|bias)))(\d+)(.*)")

_IN_LAYER = [
    "input_layernorm", "self_attention.linear_proj", "self_attention.linear_qkv",
    "self_attention.linear_q_proj", "self_attention.linear_q_down_proj",
    "self_attention.linear_q_up_proj", "self_attention.linear_kv_down_proj",
    "self_attention.linear_kv_up_proj", "self_attention.q_layernorm",
    "self_attention.k_layernorm", "self_attention.kv_layernorm", "pre_cross_attn_layernorm",
    "pre_mlp_layernorm", "mlp.router", "mlp.experts.linear_fc1", "mlp.experts.linear_fc2",
    "mlp.experts.local_experts", "mlp.shared_experts", "mlp.linear_fc1", "mlp.linear_fc2",
]  # fmt: skip
_UNTRAINED = ("expert_bias", "local_tokens_per_expert", "inv_freq")
_KINDS = [".layer_norm_weight", ".layer_norm_bias", ".weight", ".bias"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of the model: of pipeline rank `stage` and number `virtual` there."""

    stage: int
    virtual: int
    first_layer: int
    layers: int


def chunks_of(layers: int, stages: int, virtual: int, counts: Sequence[int] = ()) -> list[Chunk]:
    """Cuts layers into chunks; `counts` are layers by pipeline rank where they differ.

    Raises InvalidInput where layers do not divide evenly and no counts are given.
    """
    pieces = stages * virtual
    if counts:
        if len(counts) != stages or sum(counts) != layers or virtual > 1:
            raise InvalidInput(
                f"stages={'-'.join(map(str, counts))}: expected {stages} numbers of layers that "
                f"add up to {layers} (without virtual stages)"
            )
        per = list(counts)
    elif layers % pieces:
        raise InvalidInput(
            f"{layers} layers do not divide into {pieces} (pp={stages}, vpp={virtual}); say the "
            "layers of each stage with the flag stages"
        )
    else:
        per = [layers // pieces] * pieces
    found, at = [], 0
    for number, count in enumerate(per):
        found.append(Chunk(number % stages, number // stages, at, count))
        at += count
    return found


def layer_of(name: str) -> int | None:
    """The number of the layer in a name."""
    matched = _LAYER.fullmatch(name)
    return int(matched[2]) if matched else None


def with_layer(name: str, number: int) -> str:
    """A name with another layer."""
    matched = _LAYER.fullmatch(name)
    return f"{matched[1]}{number}{matched[3]}" if matched else name


def expert_of(name: str) -> int | None:
    """The number of the expert in a name."""
    matched = _EXPERT.fullmatch(name)
    return int(matched[2]) if matched else None


def with_expert(name: str, number: int) -> str:
    """A name with another expert."""
    matched = _EXPERT.fullmatch(name)
    return f"{matched[1]}{number}{matched[3]}" if matched else name


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to an expert that one rank of `ep` has."""
    return ".mlp.experts." in name


def is_trained(name: str) -> bool:
    """Whether an optimizer has a state for it; other values of the model are buffers."""
    return not name.endswith(_UNTRAINED)


def ordered(names: Sequence[str]) -> list[str]:
    """Names in the order in which Megatron's modules register them."""
    return sorted(names, key=_place)


def _place(name: str) -> tuple[int, ...]:
    if name.startswith("embedding."):
        return (0, 0 if ".word_" in name else 1)
    number = layer_of(name)
    if number is None:
        last = 3 if name.startswith("output_layer") else 2
        return (last, 1 if name.endswith(".bias") else 0)
    inside = name.split(f"layers.{number}.", 1)[1]
    group = next((k for k, part in enumerate(_IN_LAYER) if inside.startswith(part)), None)
    if group is None:
        raise InvalidInput(
            f"{name}: its place in Megatron's model is not known, so there is no telling where it "
            "is in the optimizer's flat buffers; use torch_dist as fully_reshardable, or the "
            "weights only"
        )
    kind = next((k for k, part in enumerate(_KINDS) if part in inside), len(_KINDS))
    if ".post_layernorm." in inside:  # registered after the layer that it is in
        kind += len(_KINDS)
    expert = expert_of(name)
    linear = 1 if "linear_fc2" in inside else 0
    return (1, number, group, -1 if expert is None else expert, linear, kind)


def stage_names(
    names: Sequence[str], chunk: Chunk, last: bool, first: bool, tied: bool
) -> dict[str, str]:
    """What a chunk holds: the name in its file → the name over the whole model."""
    found: dict[str, str] = {}
    for name in names:
        number = layer_of(name)
        if number is not None:
            if chunk.first_layer <= number < chunk.first_layer + chunk.layers:
                found[with_layer(name, number - chunk.first_layer)] = name
        elif (name.startswith("embedding.") and first) or (
            not name.startswith("embedding.") and last
        ):
            found[name] = name
    if tied and last and not first:
        found[OUTPUT] = EMBEDDING
    return found
