"""How each kind of op is written in torch, as data: a new op is a line.

See `emission.language.fill` for what stands in braces and brackets. `@name` is a builder in
lines.py, for what depends on shapes or types.
"""

from __future__ import annotations

from ..emission.language import Template
from ..emission.optable import ALIKE


def _refused(kind: str) -> Template:
    reason = "the torch backend does not write mixtures of experts yet"
    return Template("", refused=f"op {kind!r}: {reason}")


def _call(function: str) -> Template:
    return Template(f"{function}({{0}})", role="pointwise")


TEMPLATES: dict[str, Template] = {
    **ALIKE,
    # contractions
    "linear": Template("@linear", name="@parameter"),
    # rotary embedding
    "constant": Template("@constant", name="constant"),
    # mixtures of experts
    "top_k": _refused("top_k"),
    "moe_dispatch": _refused("moe_dispatch"),
    "moe_combine": _refused("moe_combine"),
    # reductions
    "sum": Template("{0}.sum({dims}[, keepdim={keepdim}])", defaults={"keepdim": False}),
    "mean": Template("{0}.mean({dims}[, keepdim={keepdim}])", defaults={"keepdim": False}),
    # views
    "expand": Template("@expand", role="view"),
    # functions of one operand
    "silu": _call("F.silu"),
    "gelu": Template(
        "F.gelu({0}[, approximate={approximate}])",
        role="pointwise",
        defaults={"approximate": "none"},
    ),
    "relu": _call("F.relu"),
    "softplus": _call("F.softplus"),
    "tanh": _call("torch.tanh"),
    "sigmoid": _call("torch.sigmoid"),
    "exp": _call("torch.exp"),
    "log": _call("torch.log"),
    "sqrt": _call("torch.sqrt"),
    "rsqrt": _call("torch.rsqrt"),
    "leaky_relu": Template("F.leaky_relu({0}, {slope})", role="pointwise"),
    "elu": Template("F.elu({0}[, {alpha}])", role="pointwise", defaults={"alpha": 1.0}),
    "expm1": _call("torch.expm1"),
    "log1p": _call("torch.log1p"),
    "stop_gradient": Template("{0}.detach()"),
    "sort": Template("{0}.sort(-1).values"),
    "erf": _call("torch.erf"),
    "abs": _call("torch.abs"),
}
"""Kind → how it is written."""
