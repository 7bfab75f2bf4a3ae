"""How functions are written in torch."""

from __future__ import annotations

from ..emission.body import Body, Text
from ..emission.language import Language
from .conversions import conversion
from .gradients import densify_gradients
from .lines import BUILDERS, device
from .optable import TEMPLATES

_RESERVED = {
    "attention", "axis", "checkpoint", "cross_entropy", "draw", "dropout", "embedding", "layer",
    "layers", "local", "map", "nn", "rms_norm", "rotary", "rotary_table", "selective", "self",
    "shift_labels", "softmax", "spmd", "sum_loss", "to_model", "torch", "wide",
}  # fmt: skip


def reference(path: str) -> str:
    """This rank's part of a parameter under `self`."""
    if all(part.isidentifier() for part in path.split(".")):
        return f"local(self.{path})"
    return f'local(self.get_parameter("{path}"))'


def _tensor(body: Body, literal: str) -> str:
    return f"torch.tensor({literal}, device={device(body)})"


def _with_bias(text: Text, kind: str) -> Text:
    """`x @ w.T` and then `+ b` becomes `F.linear(x, w, b)`."""
    if kind == "linear":
        return lambda x: f"F.linear({', '.join(x)})"
    return lambda x: f"{text(x[:-1])} + {x[-1]}"


TORCH = Language(
    name="torch",
    templates=TEMPLATES,
    builders=BUILDERS,
    conversion=conversion,
    parameter=reference,
    tensor=_tensor,
    with_bias=_with_bias,
    reserved=frozenset(_RESERVED),
    annotation="Tensor",
    first_rank='int(axis("dp").rank() == 0)',
    passes=(densify_gradients,),
    axis='{axis} = axis("{axis}")',
)
