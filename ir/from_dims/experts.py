"""The ops of a mixture of experts: router, dispatch, grouped linear layers, combine.

Tokens are gathered into slots, `c` for every expert and sequence: e (b c) h. A split of `b` is data
parallelism, a split of `e` expert parallelism, and the conversion between them, S(1.0) → S(0), is
the all-to-all of the tokens (GShard, arXiv:2006.16668, section 3.3). Parameters of all experts are
one tensor, [experts, out, in], as in transformers from version 5.
"""

from __future__ import annotations

from ..graph import SLOTS, Dims, Init
from .dims import Experts, TransformerDims
from .layers import INIT_STD, ZEROS, activation, linear, mlp, tokens_by
from .sheet import Sheet, dims_of


def mixture(sheet: Sheet, x: str, dims: TransformerDims, experts: Experts) -> str:
    """A mixture of experts in the module at hand; `x` are the normed activations b s h."""
    gates, chosen = _route(sheet, x, dims, experts)
    slots = _slots(experts, dims.hidden)
    numbers = {"experts": experts.count, "top_k": experts.top_k}
    y = sheet.op("moe_dispatch", (x, chosen), slots, attributes=numbers)
    y = _grouped_mlp(sheet.under("experts"), y, dims, experts)
    y = sheet.op("moe_combine", (y, gates, chosen), tokens_by(dims.hidden), attributes=numbers)
    if experts.shared:
        same = mlp(sheet.under("shared_experts"), x, dims, experts.shared_width)
        y = sheet.op("add", (y, same), tokens_by(dims.hidden))
    return y


def _route(sheet: Sheet, x: str, dims: TransformerDims, experts: Experts) -> tuple[str, str]:
    """Gates of every token and expert, 0 where an expert is not chosen, and which are.

    Scores are at least float32. What only shifts the choice (DeepSeek-V3's bias and groups) is not
    drawn: it costs next to nothing.
    """
    shape = tokens_by(experts.count)
    logits = linear(sheet, x, "gate", (dims.hidden, experts.count), bias=dims.bias)
    logits = sheet.op("cast", (logits,), shape, name="gate_cast", dtype="wide",
                      attributes={"to": "wide"})  # fmt: skip
    scores = sheet.op(experts.scoring, (logits,), shape, name="scores")
    gates, chosen = sheet.op_of_several(
        "top_k", (scores,), (shape, shape), ("gates", "chosen"), dtypes=(None, "bool"),
        attributes={"k": experts.top_k},
    )  # fmt: skip
    if experts.normalise:
        total = sheet.op("sum", (gates,), tokens_by(1),
                         attributes={"dims": [-1], "keepdim": True})  # fmt: skip
        gates = sheet.op("div", (gates, total), shape)
    gates = sheet.op("cast", (gates,), shape, name="gates_cast", dtype="model",
                     attributes={"to": "model"})  # fmt: skip
    return gates, chosen


def _slots(experts: Experts, size: int) -> Dims:
    return ((experts.count,), ("b", SLOTS), *dims_of(size))


def _grouped_mlp(sheet: Sheet, x: str, dims: TransformerDims, experts: Experts) -> str:
    """The MLP of every expert on its slots; gate and up are one projection, as in transformers."""
    width, inner = experts.ffn, _slots(experts, experts.ffn)
    if dims.gated:
        both = _grouped(sheet, x, "gate_up_proj", (dims.hidden, 2 * width), dims, experts)
        gate, up = sheet.op_of_several("chunk", (both,), (inner, inner), ("gate", "up"),
                                       attributes={"dim": 2, "count": 2})  # fmt: skip
        y = sheet.op("mul", (activation(sheet, gate, dims), up), inner)
    else:
        up = _grouped(sheet, x, "up_proj", (dims.hidden, width), dims, experts)
        y = activation(sheet, up, dims)
    return _grouped(sheet, y, "down_proj", (width, dims.hidden), dims, experts)


def _grouped(
    sheet: Sheet,
    x: str,
    name: str,
    shape: tuple[int, int],
    dims: TransformerDims,
    experts: Experts,
) -> str:
    inside, outside = shape
    weight = sheet.parameter(name, (experts.count, outside, inside), Init("normal", INIT_STD))
    slots = _slots(experts, outside)
    y = sheet.op("grouped_linear", (x, weight), slots, name=name)
    if dims.bias:
        bias = sheet.parameter(f"{name}_bias", (experts.count, outside), ZEROS)
        rows = sheet.op("reshape", (bias,), dims_of(experts.count, 1, outside))
        y = sheet.op("add", (y, rows), slots, name=f"{name}_add")
    return y
