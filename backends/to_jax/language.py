"""How functions are written in JAX."""

from __future__ import annotations

from ..emission.body import Body, Text
from ..emission.language import Language
from .conversions import conversion
from .lines import BUILDERS
from .optable import TEMPLATES

_RESERVED = {
    "at_factors", "attention", "cross_entropy", "cut", "dropout", "embedding", "fold", "jax",
    "jnp", "keep_first", "key", "lax", "layer_norm", "layers", "local", "loss", "map", "nn",
    "of_first", "own", "p", "pad_part", "params", "rms_norm", "rotary", "rotary_table", "run",
    "shift_labels", "softmax", "sum_loss", "take_part", "to_model", "under", "wide", "y",
}  # fmt: skip


def _parameter(path: str) -> str:
    return f'local(p["{path}"])'


def _tensor(body: Body, literal: str) -> str:
    return f"jnp.asarray({literal})"


def _with_bias(text: Text, kind: str) -> Text:
    """`x @ w.T` and then `+ b` on one line."""
    return lambda x: f"{text(x[:-1])} + {x[-1]}"


JAX = Language(
    name="jax",
    templates=TEMPLATES,
    builders=BUILDERS,
    conversion=conversion,
    parameter=_parameter,
    tensor=_tensor,
    with_bias=_with_bias,
    reserved=frozenset(_RESERVED),
    annotation="Array",
    first_rank="1",  # a loss that cannot be taken apart over ranks is on one of them
)
