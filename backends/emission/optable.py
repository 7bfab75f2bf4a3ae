"""What every language writes alike: ops as operators, functions of the program's own `ops.py`, and
builders that each language has under the same name.

See `language.fill` for what stands in braces and brackets.
"""

from __future__ import annotations

from .language import Template


def call(function: str) -> Template:
    """A function of one operand."""
    return Template(f"{function}({{0}})", role="pointwise")


def mixtures_refused(language: str) -> dict[str, Template]:
    """The ops of mixtures of experts, which a language does not write yet."""
    reason = f"the {language} backend does not write mixtures of experts yet"
    kinds = ("top_k", "moe_dispatch", "moe_combine")
    return {kind: Template("", refused=f"op {kind!r}: {reason}") for kind in kinds}


ALIKE: dict[str, Template] = {
    # contractions
    "linear_io": Template("{0} @ {1}", name="@parameter"),
    "matmul": Template("{0} @ {1}", name="product"),
    "attention": Template("@attention", name="context"),
    # rotary embedding
    "rotary": Template("rotary({0}, {1}, {2}[, style={style}])", defaults={"style": "half"}),
    "rotary_table": Template(
        "@rotary_table", name="cos sin", defaults={"scaling": 1.0, "style": "half"}
    ),
    "positions": Template("@positions", name="positions"),
    # normalisations
    "rms_norm": Template(
        "rms_norm({0}, {1}, eps={eps}[, offset={offset}][, wide_weight={wide_weight}])",
        name="@module",
        defaults={"offset": 0.0, "wide_weight": False},
    ),
    "layer_norm": Template("@layer_norm", name="@module"),
    "softmax": Template("softmax({0})"),
    # along the last dim
    "cumsum": Template("{0}.cumsum(-1)"),
    # lookup
    "embedding": Template("@embedding", name="hidden"),
    # mixtures of experts
    "grouped_linear": Template("{0} @ {1}.mT", name="@parameter"),
    "grouped_linear_io": Template("{0} @ {1}", name="@parameter"),
    # losses
    "cross_entropy": Template("@cross_entropy", name="loss count"),
    "sum_loss": Template("sum_loss({0})", name="loss count"),
    "mean_loss": Template("sum_loss({0})", name="loss count"),
    "shift_labels": Template(
        "shift_labels({0}[, ignore_index={ignore_index}])", defaults={"ignore_index": -100}
    ),
    # views
    "reshape": Template("@reshape", role="view"),
    "permute": Template("@permute", role="view"),
    "chunk": Template("@chunk"),
    "slice": Template("@slice", role="view"),
    "concat": Template("@concat"),
    # arithmetic
    "add": Template("{0} + {1}", name="@stream"),
    "sub": Template("{0} - {1}", name="@stream"),
    "mul": Template("{0} * {1}"),
    "div": Template("{0} / {1}"),
    "scale": Template("{0} * {factor}"),
    "shift": Template("{0} + {term}"),
    "neg": Template("-{0}"),
    "power": Template("{0} ** {exponent}"),
    "cast": Template("@cast"),
    # functions of one operand
    "dropout": Template("@dropout"),
}
