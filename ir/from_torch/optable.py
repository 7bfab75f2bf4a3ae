"""torch's operations → the kinds of the op table, as data.

A line gives the kind, the names of the tensor arguments in torch's schema, and which further
arguments become attributes. Operations that need more than renaming (views, biases, losses) have a
function in `normalise`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Line:
    """`operands` are schema names of tensors; `attributes` maps our attribute to a schema name."""

    kind: str
    operands: tuple[str, ...] = ("self",)
    attributes: dict[str, str] = field(default_factory=dict)


TABLE: dict[str, Line] = {
    # pointwise
    "silu": Line("silu"),
    "gelu": Line("gelu", attributes={"approximate": "approximate"}),
    "relu": Line("relu"),
    "tanh": Line("tanh"),
    "sigmoid": Line("sigmoid"),
    "exp": Line("exp"),
    "log": Line("log"),
    "sqrt": Line("sqrt"),
    "rsqrt": Line("rsqrt"),
    "erf": Line("erf"),
    "special_erf": Line("erf"),
    "abs": Line("abs"),
    "neg": Line("neg"),
    "dropout": Line("dropout", ("input",), {"p": "p", "train": "train"}),
    # contractions
    "matmul": Line("matmul", ("self", "other")),
    "bmm": Line("matmul", ("self", "mat2")),
    "mm": Line("matmul", ("self", "mat2")),
    # lookup
    "embedding": Line("embedding", ("weight", "indices"), {"padding_idx": "padding_idx"}),
    # lifted further: attention, losses
    "scaled_dot_product_attention": Line(
        "sdpa",
        ("query", "key", "value", "attn_mask"),
        {"dropout": "dropout_p", "causal": "is_causal", "scale": "scale"},
    ),
    "cross_entropy_loss": Line(
        "torch.cross_entropy",
        ("self", "target", "weight"),
        {"reduction": "reduction", "ignore_index": "ignore_index", "smoothing": "label_smoothing"},
    ),
    "nll_loss_nd": Line(
        "torch.nll_loss",
        ("self", "target", "weight"),
        {"reduction": "reduction", "ignore_index": "ignore_index"},
    ),
    "mse_loss": Line("torch.mse_loss", ("self", "target"), {"reduction": "reduction"}),
    "l1_loss": Line("torch.l1_loss", ("self", "target"), {"reduction": "reduction"}),
    "masked_fill": Line("torch.masked_fill", ("self", "mask"), {"value": "value"}),
}
"""Name without `aten.` and overload → its line."""

ALIASES = frozenset(
    {"contiguous", "clone", "alias", "lift_fresh_copy", "lift_fresh", "_assert_tensor_metadata",
     "positive"}
)  # fmt: skip
"""Operations that change nothing we keep track of."""

CASTS = frozenset({"to", "_to_copy", "type_as", "float", "half", "bfloat16", "double"})

VIEWS = frozenset(
    {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze",
     "view_as", "reshape_as"}
)  # fmt: skip
"""Reshapes: the result's shape says all."""

EXPANDS = frozenset({"expand", "expand_as", "broadcast_to"})

MORE_VIEWS = frozenset(
    {"transpose", "t", "permute", "movedim", "swapaxes", "swapdims", "slice", "select", "chunk",
     "split", "split_with_sizes", "unbind", "detach", "to"}
)  # fmt: skip
"""Other operations whose results may share memory with their operand."""
