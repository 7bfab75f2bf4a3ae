"""The ops of a decoder layer: norms, linear layers, attention, the dense MLP.

Op by op what the tracer finds in Hugging Face's Llama and GPT-2, so that time, memory and types of
a model from dimensions are those of the traced one.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

from ..graph import Dims, Init
from .dims import TransformerDims
from .names import names_of
from .sheet import Sheet, dims_of

INIT_STD = 0.02
"""Standard deviation of weights as they start (GPT-2; transformers' initializer_range)."""
_NORMAL = Init("normal", INIT_STD)
_ONES, ZEROS = Init("constant", 1.0), Init("constant", 0.0)


def tokens_by(*sizes: int) -> Dims:
    """Dims of one row of `sizes` elements for every token."""
    return dims_of("b", "s", *sizes)


def norm(sheet: Sheet, x: str, dims: TransformerDims, at: str) -> str:
    """A norm over the last dim of `x`."""
    shape = sheet.values[x].dims
    (size,) = shape[-1] or (1,)
    assert isinstance(size, int)
    module = sheet.under(at)
    read = [x, module.parameter("weight", (size,), _ONES)]
    attributes: dict[str, Any] = {"eps": dims.norm_eps}
    if dims.norm == "rms_norm":
        attributes |= {"offset": 0.0, "wide_weight": False}
    elif dims.bias:
        read.append(module.parameter("bias", (size,), ZEROS))
    return module.op(dims.norm, read, shape, name=_last(at), attributes=attributes)


def linear(
    sheet: Sheet,
    x: str,
    at: str,
    shape: tuple[int, int],
    *,
    bias: bool = False,
    weight_io: bool = False,
    std: float = INIT_STD,
) -> str:
    """A linear layer from `shape[0]` to `shape[1]` elements."""
    inside, outside = shape
    module, name = sheet.under(at), _last(at)
    stored = (inside, outside) if weight_io else (outside, inside)
    weight = module.parameter("weight", stored, Init("normal", std))
    dims = (*sheet.values[x].dims[:-1], *dims_of(outside))
    kind = "linear_io" if weight_io else "linear"
    y = module.op(kind, (x, weight), dims, name=f"{name}_{kind}" if bias else name)
    if bias:
        y = module.op("add", (y, module.parameter("bias", (outside,), ZEROS)), dims, name=name)
    return y


def self_attention(sheet: Sheet, x: str, dims: TransformerDims, window: int | None) -> str:
    """Attention with heads in groups; `x` are the normed activations b s h."""
    names = names_of(dims)
    module = sheet.under(names.attention)
    bias = dims.bias or dims.attention_bias != "none"
    counts = {"query": dims.heads, "key": dims.kv_heads, "value": dims.kv_heads}
    if dims.fused_qkv:
        width = dims.heads * dims.head_dim
        fused = linear(module, x, "c_attn", (dims.hidden, 3 * width), bias=bias,
                       weight_io=names.weight_io)  # fmt: skip
        projected = module.op_of_several(
            "chunk", (fused,), (tokens_by(width),) * 3, ("c_attn_0", "c_attn_1", "c_attn_2"),
            attributes={"dim": 2, "count": 3},
        )  # fmt: skip
    found: list[str] = []
    for i, (part, count) in enumerate(counts.items()):
        if dims.fused_qkv:
            y = projected[i]
        else:
            shape = (dims.hidden, count * dims.head_dim)
            y = linear(module, x, f"{part[0]}_proj", shape, bias=bias)
        y = heads(module, y, count, dims.head_dim, part)
        if dims.qk_norm and part != "value":
            y = norm(module, y, dims, f"{part[0]}_norm")
        found.append(swapped(module, y, part))
    q, k, v = found
    if dims.positions == "rotary":
        q, k = rotary(module, q, dims), rotary(module, k, dims)
    return attend(module, (q, k, v), dims, window, dims.head_dim)


def heads(sheet: Sheet, y: str, count: int, size: int, name: str) -> str:
    """b s (n d) → b s n d."""
    return sheet.op("reshape", (y,), tokens_by(count, size), name=f"{name}_heads")


def swapped(sheet: Sheet, y: str, name: str) -> str:
    """Tokens and heads exchanged: b s n d ↔ b n s d."""
    b, s, n, d = sheet.values[y].dims
    return sheet.op("permute", (y,), (b, n, s, d), name=name, attributes={"order": [0, 2, 1, 3]})


def rotary(sheet: Sheet, y: str, dims: TransformerDims) -> str:
    """Turns the heads by their positions."""
    tables = [sheet.input(t, dims_of(1, "s", dims.rotary_dim), grad=False) for t in ("cos", "sin")]
    return sheet.op("rotary", (y, *tables), sheet.values[y].dims, name=f"{y}_rotary",
                    attributes={"style": "half"})  # fmt: skip


def attend(
    sheet: Sheet, qkv: tuple[str, str, str], dims: TransformerDims, window: int | None, v_dim: int
) -> str:
    """Causal attention of heads b n s d, and the output projection.

    ALiBi (arXiv:2108.12409) is an attribute: its biases are made inside the kernel.
    """
    names = names_of(dims)
    attributes: dict[str, Any] = {
        "causal": True,
        "window": window,
        "scale": dims.head_dim**-0.5,
        "softcap": None,
        "dropout": dims.attention_dropout,
    }
    if dims.positions == "alibi":
        attributes["alibi"] = True
    by_heads = dims_of("b", dims.heads, "s", v_dim)
    y = sheet.op("attention", qkv, by_heads, attributes=attributes)
    y = swapped(sheet, y, "attention_permute")
    width = dims.heads * v_dim
    y = sheet.op("reshape", (y,), tokens_by(width), name="attention_reshape")
    bias = dims.bias or dims.attention_bias == "all"
    return linear(sheet, y, names.output, (width, dims.hidden), bias=bias,
                  weight_io=names.weight_io, std=_output_std(dims))  # fmt: skip


def mlp(sheet: Sheet, x: str, dims: TransformerDims, width: int) -> str:
    """The dense MLP of inner `width`, gated or not, in the module at hand."""
    names = names_of(dims)
    up, down = (dims.hidden, width), (width, dims.hidden)
    options: dict[str, Any] = dict(bias=dims.bias, weight_io=names.weight_io)
    if dims.gated:
        gate = activation(sheet, linear(sheet, x, "gate_proj", up, **options), dims)
        y = linear(sheet, x, names.up, up, **options)
        y = sheet.op("mul", (gate, y), tokens_by(width))
    else:
        y = activation(sheet, linear(sheet, x, names.up, up, **options), dims)
    return linear(sheet, y, names.down, down, **options, std=_output_std(dims))


def activation(sheet: Sheet, x: str, dims: TransformerDims) -> str:
    """The activation function; gelu as GPT-2 computes it."""
    attributes = {"approximate": "tanh"} if dims.activation == "gelu" else {}
    return sheet.op(dims.activation, (x,), sheet.values[x].dims, name="act_fn", at="act_fn",
                    attributes=attributes)  # fmt: skip


def dropout(sheet: Sheet, x: str, dims: TransformerDims, at: str) -> str:
    """Dropout where the model has it."""
    if not dims.dropout:
        return x
    return sheet.op("dropout", (x,), sheet.values[x].dims, name=_last(at), at=at,
                    attributes={"p": dims.dropout})  # fmt: skip


def _output_std(dims: TransformerDims) -> float:
    """GPT-2 starts what adds to the residual stream smaller, by its number of additions."""
    return INIT_STD / sqrt(2 * dims.layers) if dims.fused_qkv else INIT_STD


def _last(path: str) -> str:
    return path.rpartition(".")[2]
