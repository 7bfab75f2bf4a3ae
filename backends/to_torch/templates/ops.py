"""The ops that torch does not have, or not in this form, on local shards.

`wide` is the dtype of sums that must not lose digits: at least float32, and the input's own dtype
where that is wider. The index notation above a function says which of its loops an axis may split;
see typed.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import spmd_types as spmd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from parallel import axis, model_dtype, wide_dtype
from spmd_types import rules
from spmd_types.types import normalize_axis
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from typed import Split, lifted

# --- dtypes --------------------------------------------------------------------------------------


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_model(x: Tensor) -> Tensor:
    """The dtype that the model computes in."""
    return x.to(model_dtype())


# --- normalisation -------------------------------------------------------------------------------


def rms_norm(
    x: Tensor, weight: Tensor, eps: float | None, offset: float = 0.0, wide_weight: bool = False
) -> Tensor:
    """x / rms(x) · (weight + offset), last dim; `wide_weight` multiplies before narrowing."""
    y = wide(x)
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    y = y * torch.rsqrt(y.pow(2).mean((-1,), keepdim=True) + eps)
    if wide_weight:
        return (y * (wide(weight) + offset)).to(x.dtype)
    return y.to(x.dtype) * (weight + offset if offset else weight)


def softmax(x: Tensor) -> Tensor:
    """Over the last dim, summed wide."""
    return torch.softmax(wide(x), -1).to(x.dtype)


# --- rotary embedding ----------------------------------------------------------------------------


def rotary_table(
    positions: Tensor, frequencies: Sequence[float], scaling: float = 1.0, style: str = "half"
) -> tuple[Tensor, Tensor]:
    """cos and sin of positions [s] or [b, s]: wide, [1 or b, s, d]."""
    if positions.dim() == 1:
        positions = positions.unsqueeze(0)
    steps = torch.tensor(frequencies, dtype=wide_dtype(), device=positions.device)
    angles = positions.to(wide_dtype()).unsqueeze(-1) * steps
    if style == "half":
        angles = torch.cat((angles, angles), -1)
    else:
        angles = angles.repeat_interleave(2, -1)
    return angles.cos() * scaling, angles.sin() * scaling


def rotary(x: Tensor, cos: Tensor, sin: Tensor, style: str = "half") -> Tensor:
    """Turns pairs of the last dim of x [b, n, s, d]: (i, i + d/2), or neighbours if interleaved."""
    if style == "half":
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return (x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)).to(x.dtype)


# --- attention -----------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    split: Split | None = None,
    drop: tuple[float, Draw | None, str] | None = None,
    **options: Any,
) -> Tensor:
    """softmax(scale · q kᵀ) v; query head k·g + j reads key head k.

    `mask` [b, t] is True where a key may be looked at. `drop` is the probability, draw and name of
    a dropout of the weights.
    """
    if drop is not None and drop[1] is not None:
        heads = {
            a: (1, "kg".index(str(loop))) for a, loop in (split or {}).items() if loop in ("k", "g")
        }
        local = {1: (k.shape[1], q.shape[1] // k.shape[1])}
        p, draw, name = drop
        options["drop"] = partial(dropout, p=p, draw=draw, name=name, split=heads, factors=local)
    if mask is None:
        return _attention(q, k, v, split=split, **options)
    return _masked_attention(q, k, v, mask, split=split, **options)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    allowed = _allowed(q, k, mask, causal, window)
    if softcap is None and drop is None:
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=allowed,
            is_causal=causal and allowed is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        if mask is not None:  # a query that may look at nothing gives zero
            assert allowed is not None
            out = out.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
        return out
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = wide(q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if allowed is None and causal:
        allowed = _band(q, k, causal, None)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1)
    if allowed is not None:
        weights = weights.masked_fill(~allowed, 0.0)
    weights = weights.to(q.dtype)
    return (weights if drop is None else drop(weights)) @ v


def _allowed(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, window: int | None
) -> Tensor | None:
    """[b or 1, 1, s, t], True where a query may look; None where `is_causal` says it all."""
    if mask is None and window is None:
        return None
    allowed = _band(q, k, causal, window)
    return allowed if mask is None else allowed & mask.bool()[:, None, None, :]


def _band(q: Tensor, k: Tensor, causal: bool, window: int | None) -> Tensor:
    behind = torch.arange(q.shape[2], device=q.device)[:, None]
    behind = behind - torch.arange(k.shape[2], device=q.device)[None, :]
    allowed = behind >= 0 if causal else behind == behind
    if window is not None:
        allowed = allowed & (behind.abs() < window)
    return allowed[None, None]


_attention = lifted("b (k g) s d, b k t d, b k t e -> b (k g) s e")(_attend)
_masked_attention = lifted("b (k g) s d, b k t d, b k t e, b t -> b (k g) s e")(_attend)


# --- split vocabulary ----------------------------------------------------------------------------

Groups = Sequence[dist.ProcessGroup]
"""The ranks that split one dim, outermost first."""


def _offset(groups: Groups, size: int) -> int:
    """Where this rank's `size` rows begin."""
    index = 0
    for group in groups:
        index = index * group.size() + group.rank()
    return index * size


@lifted("v h, ... -> ... h")
def embedding(
    weight: Tensor, ids: Tensor, *, vocab: Groups, padding_idx: int | None = None
) -> Tensor:
    """Looks up the rows that this rank has; the others' are zero: the ranks hold summands."""
    rows = weight.shape[0]
    here = ids - _offset(vocab, rows)
    inside = (here >= 0) & (here < rows)
    if padding_idx is not None:
        padding_idx -= _offset(vocab, rows)
        padding_idx = padding_idx if 0 <= padding_idx < rows else None
    found = F.embedding(here.clamp(0, rows - 1), weight, padding_idx=padding_idx)
    return found * inside.unsqueeze(-1).to(found.dtype)


@lifted("... v, ... -> ", special="v")
def cross_entropy(
    logits: Tensor, labels: Tensor, *, vocab: Groups = (), ignore_index: int = -100
) -> Tensor:
    """Sum over the labels that are not `ignore_index`, wide.

    With a split vocabulary the maximum, the sum of exponentials and the label's logit are reduced
    over `vocab`; no rank sees all logits of a token.
    """
    labels = labels.long()  # JAX's are int32, as which torch does not take them
    if vocab:
        return _SplitCrossEntropy.apply(logits, labels, vocab, ignore_index)  # type: ignore[no-any-return]
    if logits.dim() > 2:
        logits, labels = logits.flatten(0, -2), labels.flatten()
    return F.cross_entropy(wide(logits), labels, ignore_index=ignore_index, reduction="sum")


class _SplitCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocab: Groups, ignore_index: int
    ) -> Tensor:
        x = wide(logits)
        top = x.amax(-1)
        for group in vocab:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        here = labels - _offset(vocab, x.shape[-1])
        inside = (here >= 0) & (here < x.shape[-1])
        here = here.clamp(0, x.shape[-1] - 1)
        picked = x.gather(-1, here.unsqueeze(-1)).squeeze(-1) * inside
        sums = torch.stack(((x - top.unsqueeze(-1)).exp().sum(-1), picked))
        for group in vocab:
            dist.all_reduce(sums, group=group)
        log_sum = sums[0].log() + top
        ctx.save_for_backward(logits, here, inside, labels != ignore_index, log_sum)
        return torch.where(labels != ignore_index, log_sum - sums[1], 0.0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        logits, here, inside, valid, log_sum = ctx.saved_tensors
        result = (wide(logits) - log_sum.unsqueeze(-1)).exp()
        result.scatter_add_(-1, here.unsqueeze(-1), -inside.to(result.dtype).unsqueeze(-1))
        result *= (valid * gradient).unsqueeze(-1)
        return result.to(logits.dtype), None, None, None

    @staticmethod
    def spmd_typecheck(loss: Any, *, logits: Tensor, labels: Tensor, vocab: Groups) -> None:
        rules.ignore(logits, labels)
        over = {normalize_axis(group): spmd.I for group in vocab}
        spmd.assert_type(loss, {**spmd.get_local_type(logits), **over})


def sum_loss(x: Tensor) -> Tensor:
    """The sum of all elements, wide."""
    return wide(x).sum()


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The label of a position is the token at the next one; the last position has none."""
    return F.pad(labels, (0, 1), value=ignore_index)[:, 1:]


# --- gradients -----------------------------------------------------------------------------------


class _DenseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()

    @staticmethod
    def spmd_typecheck(result: Any, *, x: Tensor) -> None:
        spmd.assert_type_like(spmd.assert_type(x, spmd.get_local_type(x)), x)
        spmd.assert_type_like(result, x)


def dense_gradient(x: Tensor) -> Tensor:
    """x; its gradient comes in one piece, as an all-reduce wants it."""
    return _DenseGradient.apply(x)  # type: ignore[no-any-return]


# --- dropout -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """What the random numbers of one forward pass depend on: nothing of the layout.

    `first_row` is the place of the microbatch's first sequence among the `rows` of the step's
    global batch.
    """

    seed: int
    step: int
    first_row: int
    rows: int

    @staticmethod
    def of(forwards: int, microbatches: int, micro_batch: int) -> Draw:
        """For a stage that has run so many forward passes since the start of the program."""
        step, microbatch = divmod(forwards, microbatches)
        dp, rows = axis("dp"), microbatches * micro_batch
        first = rows * dp.rank() + microbatch * micro_batch
        return Draw(torch.initial_seed(), step, first, rows * dp.size())


Place = tuple[int, int]
"""A factor of a dim, as (dim, factor)."""


def dropout(
    x: Tensor,
    p: float,
    draw: Draw | None,
    name: str,
    split: Mapping[str, int | Place] | None = None,
    rows: Place | None = (0, 0),
    factors: Mapping[int, tuple[int, ...]] | None = None,
) -> Tensor:
    """Zeroes elements with probability p and scales the others by 1 / (1 - p); none without `draw`.

    Which ones is a hash of the seed, the step, the op's name and the element's index in the full
    tensor. `split` maps axes to dims, or to factors of them; `factors` gives the local factor sizes
    of a dim of which an inner factor is split; `rows` is where the sequences of the batch are.
    """
    if draw is None:
        return x
    homes = {a: (home, 0) if isinstance(home, int) else home for a, home in (split or {}).items()}
    index = torch.zeros((), dtype=torch.int64, device=x.device)
    for dim, size in enumerate(x.shape):
        sizes = (factors or {}).get(dim, (size,))
        for part, count in enumerate(sizes):
            along = torch.arange(count, dtype=torch.int64, device=x.device)
            if (dim, part) == rows:  # the ranks of dp, if there are any, have rows of their own
                along, full = along + draw.first_row, draw.rows
            else:
                groups = [axis(a) for a, home in homes.items() if home == (dim, part)]
                along = along + _offset(groups, count)
                full = count * prod(group.size() for group in groups)
            index = index.unsqueeze(-1) * full + along
    key = zlib.crc32(f"{draw.seed} {draw.step} {name}".encode())
    kept = (_uniform(index, key) >= p).reshape(x.shape)
    return x * (kept.to(x.dtype) / (1 - p))


def _uniform(index: Tensor, key: int) -> Tensor:
    """Numbers in [0, 1): the finaliser of SplitMix64 (Steele et al. 2014) of index and key."""
    x = (index + (key << 20)) * -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return ((x >> 40) & 0xFFFFFF).to(torch.float32) / 2**24


# --- recomputation -------------------------------------------------------------------------------

_SAVED = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.linear.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
}


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keeps the results of contractions, attention and reductions, computes the rest again."""
    return CheckpointPolicy.MUST_SAVE if op in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE


selective = partial(create_selective_checkpoint_contexts, _policy)
"""For `checkpoint(..., context_fn=selective)`."""
