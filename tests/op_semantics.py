"""What every kind of the op table computes, in plain torch and in the clearest form.

The oracle of the tests: `SEMANTICS[kind](operands, attributes, result_shapes)` returns the results.
`result_shapes` are the shapes of the results on whatever the operands are (whole tensors or
shards); only `reshape`, `expand`, `positions`, `constant` and `moe_dispatch` need them. Dtypes are
concrete here: run it in float64, where `cast` between floating dtypes changes nothing. Dropout is
the identity (compare with a model in eval mode).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = Sequence[Sequence[int]] | None
Semantics = Callable[[Sequence[Tensor], Mapping[str, Any], Shapes], tuple[Tensor, ...]]

_FIXED_DTYPES = {
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
    "float32": torch.float32,
    "float64": torch.float64,
}


def _one(function: Callable[..., Tensor]) -> Semantics:
    """A function of the operands alone."""
    return lambda operands, attributes, shapes: (function(*operands),)


def _with(function: Callable[..., Tensor]) -> Semantics:
    """A function of the attributes and the operands."""
    return lambda operands, attributes, shapes: (function(attributes, *operands),)


def _shape(shapes: Shapes, index: int = 0) -> list[int]:
    assert shapes is not None, "this op needs the shapes of its results"
    return list(shapes[index])


def _cast(attributes: Mapping[str, Any], x: Tensor) -> Tensor:
    if attributes["to"] in _FIXED_DTYPES:
        return x.to(_FIXED_DTYPES[attributes["to"]])
    return x if x.is_floating_point() else x.to(torch.get_default_dtype()).double()


def _attention(
    attributes: Mapping[str, Any], q: Tensor, k: Tensor, v: Tensor, *mask: Tensor
) -> Tensor:
    """softmax(scale·q·kᵀ, capped, masked)·v; query head `k·g + j` reads key head `k`.

    `causal`: query i sees keys j ≤ i. `window`: and only i - j < window (without causal also
    j - i < window). `softcap`: scores become c·tanh(scores / c) before the mask. `alibi`: head n
    of N loses 2^(-8n/N) per key of distance (arXiv:2108.12409; N a power of two); whole heads only.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = attributes.get("scale")
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if cap := attributes.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    behind = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])[None, :]
    allowed = torch.ones_like(behind, dtype=torch.bool)
    if attributes.get("alibi"):
        slopes = 2.0 ** (-8.0 * torch.arange(1, q.shape[1] + 1).double() / q.shape[1])
        scores = scores - slopes[:, None, None] * behind
    if attributes.get("causal"):
        allowed &= behind >= 0
    if window := attributes.get("window"):
        allowed &= behind.abs() < window
    allowed = allowed[None, None]
    if mask:
        allowed = allowed & mask[0].bool()[:, None, None, :]
    weights = torch.softmax(scores.masked_fill(~allowed, -math.inf), -1)
    # a query that may look at nothing gives zero
    return torch.nan_to_num(weights, nan=0.0) @ v


def _rotary(attributes: Mapping[str, Any], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`half` turns (x[i], x[i + d/2]), `interleaved` (x[2i], x[2i + 1])."""
    if attributes.get("style", "half") == "half":
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def _rotary_table(
    operands: Sequence[Tensor], attributes: Mapping[str, Any], _: Shapes
) -> tuple[Tensor, ...]:
    (positions,) = operands
    if positions.dim() == 1:
        positions = positions[None]
    inverse = torch.tensor(attributes["inv_freq"], dtype=torch.float64)
    angles = positions.double()[..., None] * inverse
    if attributes.get("style", "half") == "half":
        angles = torch.cat((angles, angles), -1)
    else:
        angles = angles.repeat_interleave(2, -1)
    scaling = attributes.get("scaling", 1.0)
    return angles.cos() * scaling, angles.sin() * scaling


def _rms_norm(attributes: Mapping[str, Any], x: Tensor, weight: Tensor) -> Tensor:
    eps = attributes["eps"] if attributes["eps"] is not None else torch.finfo(x.dtype).eps
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return scaled * (weight + attributes.get("offset", 0.0))


def _layer_norm(attributes: Mapping[str, Any], x: Tensor, *parameters: Tensor) -> Tensor:
    weight, bias = (*parameters, None, None)[:2]
    return F.layer_norm(x, x.shape[-1:], weight, bias, attributes["eps"])


def _cross_entropy(
    operands: Sequence[Tensor], attributes: Mapping[str, Any], _: Shapes
) -> tuple[Tensor, ...]:
    logits, labels = operands
    ignore = attributes.get("ignore_index", -100)
    total = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        ignore_index=ignore,
        reduction="sum",
    )
    return total, (labels != ignore).sum().to(total.dtype)


def _shift_labels(attributes: Mapping[str, Any], labels: Tensor) -> Tensor:
    """The label of position i is the token at i + 1; the last position has none."""
    return F.pad(labels, (0, 1), value=attributes.get("ignore_index", -100))[:, 1:]


def _slice(attributes: Mapping[str, Any], x: Tensor) -> Tensor:
    size = x.shape[attributes["dim"]]
    stop = size if attributes["stop"] is None or attributes["stop"] < 0 else attributes["stop"]
    return x.narrow(attributes["dim"], attributes["start"], stop - attributes["start"])


def _embedding(attributes: Mapping[str, Any], weight: Tensor, ids: Tensor) -> Tensor:
    """`padding_idx`: the row that gets no gradient from here."""
    return F.embedding(ids, weight, padding_idx=attributes.get("padding_idx"))


def _top_k(
    operands: Sequence[Tensor], attributes: Mapping[str, Any], _: Shapes
) -> tuple[Tensor, ...]:
    (scores,) = operands
    least = scores.topk(attributes["k"], -1).values[..., -1:]
    chosen = scores >= least
    return scores * chosen, chosen


def _taken(chosen: Tensor, slots: int) -> Tensor:
    """b s e c: 1 where the token at s takes slot c of expert e. An expert's slots are taken in the
    order of the sequence; who comes later than the last gets none."""
    place = chosen.long().cumsum(1) - 1
    return ((place[..., None] == torch.arange(slots)) & chosen.bool()[..., None]).double()


def _moe_dispatch(
    operands: Sequence[Tensor], attributes: Mapping[str, Any], shapes: Shapes
) -> tuple[Tensor, ...]:
    tokens, chosen = operands
    taken = _taken(chosen, _shape(shapes)[1] // len(tokens))
    return (torch.einsum("bsh,bsec->ebch", tokens, taken).flatten(1, 2),)


def _moe_combine(slots: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
    slots = slots.unflatten(1, (len(gates), -1))
    taken = _taken(chosen, slots.shape[2])
    return torch.einsum("ebch,bse,bsec->bsh", slots, gates, taken)


def _constant(attributes: Mapping[str, Any], shapes: Shapes) -> Tensor:
    value = torch.tensor(attributes["value"])
    value = value.double() if value.is_floating_point() else value
    return value.expand(_shape(shapes)) if shapes is not None else value


SEMANTICS: dict[str, Semantics] = {
    # contractions
    "linear": _one(lambda x, w: x @ w.T),
    "linear_io": _one(lambda x, w: x @ w),
    "matmul": _one(torch.matmul),
    "attention": _with(_attention),
    # rotary embedding
    "rotary": _with(_rotary),
    "rotary_table": _rotary_table,
    # made from nothing
    "positions": lambda operands, attributes, shapes: (
        torch.arange(_shape(shapes)[-1]).expand(_shape(shapes)),
    ),
    "constant": lambda operands, attributes, shapes: (_constant(attributes, shapes),),
    # normalisations
    "rms_norm": _with(_rms_norm),
    "layer_norm": _with(_layer_norm),
    "softmax": _one(lambda x: torch.softmax(x, -1)),
    # lookup
    "embedding": _with(_embedding),
    # mixtures of experts
    "top_k": _top_k,
    "moe_dispatch": _moe_dispatch,
    "grouped_linear": _one(lambda x, w: x @ w.mT),
    "grouped_linear_io": _one(lambda x, w: x @ w),
    "moe_combine": _one(_moe_combine),
    # losses: sum and count
    "cross_entropy": _cross_entropy,
    "sum_loss": lambda operands, attributes, shapes: (
        operands[0].sum(),
        torch.ones((), dtype=operands[0].dtype),
    ),
    "mean_loss": lambda operands, attributes, shapes: (
        operands[0].sum(),
        torch.tensor(operands[0].numel(), dtype=operands[0].dtype),
    ),
    "shift_labels": _with(_shift_labels),
    # reductions
    "sum": _with(lambda a, x: x.sum(tuple(a["dims"]), keepdim=a.get("keepdim", False))),
    "mean": _with(lambda a, x: x.mean(tuple(a["dims"]), keepdim=a.get("keepdim", False))),
    # views
    "reshape": lambda operands, attributes, shapes: (operands[0].reshape(_shape(shapes)),),
    "permute": _with(lambda a, x: x.permute(tuple(a["order"]))),
    "expand": lambda operands, attributes, shapes: (operands[0].expand(_shape(shapes)),),
    "chunk": lambda operands, attributes, shapes: operands[0].chunk(
        attributes["count"], attributes["dim"]
    ),
    "slice": _with(_slice),
    "concat": lambda operands, attributes, shapes: (torch.cat(list(operands), attributes["dim"]),),
    # pointwise
    "add": _one(torch.add),
    "sub": _one(torch.sub),
    "mul": _one(torch.mul),
    "div": _one(torch.div),
    "scale": _with(lambda a, x: x * a["factor"]),
    "shift": _with(lambda a, x: x + a["term"]),
    "neg": _one(torch.neg),
    "cast": _with(_cast),
    "silu": _one(F.silu),
    "gelu": _with(lambda a, x: F.gelu(x, approximate=a.get("approximate", "none"))),
    "relu": _one(torch.relu),
    "tanh": _one(torch.tanh),
    "sigmoid": _one(torch.sigmoid),
    "exp": _one(torch.exp),
    "log": _one(torch.log),
    "sqrt": _one(torch.sqrt),
    "rsqrt": _one(torch.rsqrt),
    "erf": _one(torch.erf),
    "abs": _one(torch.abs),
    "power": _with(lambda a, x: x.pow(a["exponent"])),
    "softplus": _one(F.softplus),
    "elu": _with(lambda a, x: F.elu(x, a.get("alpha", 1.0))),
    "expm1": _one(torch.expm1),
    "log1p": _one(torch.log1p),
    "leaky_relu": _with(lambda a, x: F.leaky_relu(x, a["slope"])),
    "stop_gradient": _one(lambda x: x.detach() + 0 * x),  # a gradient that is zero, not none
    "cumsum": _one(lambda x: x.cumsum(-1)),
    "sort": _one(lambda x: x.sort(-1).values),
    "dropout": _one(lambda x: x),
}
