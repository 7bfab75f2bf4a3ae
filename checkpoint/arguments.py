"""What is said of a conversion: sizes, axes and memory that nothing would look at are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ..ir.errors import InvalidInput
from .contents import Contents
from .formats.flags import WHOLE, byte_count
from .layout import Layout, load_layout
from .rules import Rule
from .spec import builtin

AXES = ("tp", "pp", "dp", "cp", "ep", "etp", "vpp")

_WORD = re.compile(r"[^\W\d]\w*")
_KEEP_SIZES = ("universal", "megatron", "megatron-dist")
"""Formats that write sizes of the model down, for whoever reads them next."""

_OF_CONFIGS = {
    "num_hidden_layers", "num_layers", "intermediate_size", "ffn_hidden_size", "vocab_size",
    "padded_vocab_size", "hidden_size", "num_experts", "num_local_experts", "seq_length",
    "max_position_embeddings", "tie_word_embeddings", "n_layer", "n_embd", "n_positions",
}  # fmt: skip
"""Sizes that a config of Hugging Face or the arguments of Megatron have, whatever layouts ask."""


def memory_bytes(said: str | int) -> int:
    """Bytes of `--memory`: a number, or a text as `512M`."""
    found = byte_count(said)
    if found is None:
        raise InvalidInput(f"--memory {said!r}: expected bytes, as 512M or 2G")
    return found


def asked(layout: Layout) -> set[str]:
    """Names of the sizes and facts that a layout asks for."""
    spec = layout.spec
    said = [*spec.sizes.values(), *(text for rule in layout.rules for text in rule.pad.values())]
    facts = {fact.removeprefix("not ") for rule in layout.rules for fact in rule.when}
    found = {*spec.sizes, *spec.variants, *facts}
    return found.union(*(_WORD.findall(text) for text in said if isinstance(text, str)))


def check_sizes(
    sizes: Iterable[str], contents: Contents, layouts: Sequence[Layout], to: str = ""
) -> tuple[str, ...]:
    """Raises InvalidInput for a size that no layout knows; returns a note for each that others ask
    for, neither of these does, and no target keeps."""
    known = set().union(*map(asked, layouts))
    factors = {f for layout in layouts for rule in layout.rules for f in _factors(rule)}
    elsewhere = {*_OF_CONFIGS, *contents.facts}.union(
        *(asked(load_layout(name)) for name in builtin())
    )
    between = " and ".join(dict.fromkeys(layout.name for layout in layouts))
    notes = []
    for name in sizes:
        if name in known | factors or (to in _KEEP_SIZES and name in elsewhere):
            continue
        if name not in elsewhere:
            raise InvalidInput(
                f"--sizes {name}: layout {between} has no use for it; expected "
                f"{', '.join(sorted(known)) or 'none'}"
            )
        notes.append(f"--sizes {name}: layout {between} has no use for it")
    return tuple(notes)


def _factors(rule: Rule) -> tuple[str, ...]:
    return (*(rule.generic.factors if rule.generic is not None else ()), *rule.stacked)


def check_axes(mesh: Mapping[str, int], layout: Layout, to: str, given: Iterable[str]) -> None:
    """Raises InvalidInput for an axis that no format and no rule of the layout knows, and for one
    given by hand (`given`) that would change nothing."""
    own = {one.axis for rule in layout.rules for one in rule.types}
    if unknown := sorted(mesh.keys() - {*AXES, *own}):
        raise InvalidInput(f"--mesh {unknown[0]}: expected {', '.join(sorted({*AXES, *own}))}")
    used = {*own, *asked(layout)}
    for axis in given:
        if mesh[axis] > 1 and to in WHOLE and axis not in used:
            raise InvalidInput(
                f"--mesh {axis}={mesh[axis]}: {to} holds whole tensors, whatever the ranks; leave "
                "it out (or give a --target-spec that splits along it)"
            )
        if mesh[axis] > 1 and to == "megatron" and axis == "etp" and axis not in used:
            raise InvalidInput(
                f"--mesh etp={mesh[axis]}: layout {layout.name} splits nothing along it; leave it "
                "out, experts are split as all else"
            )
        if mesh[axis] > 1 and axis == "vpp" and not to.startswith("megatron"):
            raise InvalidInput(f"--mesh vpp={mesh[axis]}: {to} has no virtual stages; leave it out")
