"""What the symbol `c` stands for: how many tokens of a sequence an expert takes."""

from __future__ import annotations

from ..errors import InvalidInput
from ..graph import SLOTS, Binding, Model
from .dims import TransformerDims


def expert_binding(model: Model | TransformerDims, binding: Binding) -> dict[str, int]:
    """`{"b", "s"}` with `c`, the tokens that an expert takes of each sequence under balanced load.

    c = s * top_k / experts, rounded up: sequences shorter than experts / top_k tokens count more
    than they have. Without experts, the binding as it is. Raises InvalidInput where `s` is not
    bound, or where layers differ in experts per token.
    """
    known = sorted(_ratios(model))
    if not known:
        return dict(binding)
    if len(known) > 1:
        raise InvalidInput(
            f"expert_binding: layers with {known[0][0]} of {known[0][1]} and {known[1][0]} of "
            f"{known[1][1]} experts per token; one symbol {SLOTS!r} cannot stand for both"
        )
    if "s" not in binding:
        raise InvalidInput(f"expert_binding: 's' is not bound: known are {sorted(binding)}")
    ((top_k, count),) = known
    return dict(binding) | {SLOTS: -(-binding["s"] * top_k // count)}


def _ratios(model: Model | TransformerDims) -> set[tuple[int, int]]:
    """(experts per token, experts) of all mixtures."""
    if isinstance(model, TransformerDims):
        experts = model.experts
        with_experts = any(model.has_experts(i) for i in range(model.layers))
        return {(experts.top_k, experts.count)} if experts and with_experts else set()
    return {
        (int(op.attributes["top_k"]), int(op.attributes["experts"]))
        for graph in model.blocks.values()
        for op in graph.ops
        if op.kind == "moe_dispatch"
    }
