"""How each kind of op is written in torch, as data: a new op is a line.

See `emission.language.fill` for what stands in braces and brackets. `@name` is a builder in
lines.py, for what depends on shapes or types.
"""

from __future__ import annotations

from ..emission.language import Template
from ..emission.optable import ALIKE, call, mixtures_refused

TEMPLATES: dict[str, Template] = {
    **ALIKE,
    # contractions
    "linear": Template("@linear", name="@parameter"),
    # rotary embedding
    "constant": Template("@constant", name="constant"),
    **mixtures_refused("torch"),
    # reductions
    "sum": Template("{0}.sum({dims}[, keepdim={keepdim}])", defaults={"keepdim": False}),
    "mean": Template("{0}.mean({dims}[, keepdim={keepdim}])", defaults={"keepdim": False}),
    # views
    "expand": Template("@expand", role="view"),
    # functions of one operand
    "silu": call("F.silu"),
    "gelu": Template(
        "F.gelu({0}[, approximate={approximate}])",
        role="pointwise",
        defaults={"approximate": "none"},
    ),
    "relu": call("F.relu"),
    "softplus": call("F.softplus"),
    "tanh": call("torch.tanh"),
    "sigmoid": call("torch.sigmoid"),
    "exp": call("torch.exp"),
    "log": call("torch.log"),
    "sqrt": call("torch.sqrt"),
    "rsqrt": call("torch.rsqrt"),
    "leaky_relu": Template("F.leaky_relu({0}, {slope})", role="pointwise"),
    "elu": Template("F.elu({0}[, {alpha}])", role="pointwise", defaults={"alpha": 1.0}),
    "expm1": call("torch.expm1"),
    "log1p": call("torch.log1p"),
    "stop_gradient": Template("{0}.detach()"),
    "sort": Template("{0}.sort(-1).values"),
    "erf": call("torch.erf"),
    "abs": call("torch.abs"),
}
"""Kind → how it is written."""
