"""What a backend says of itself: how ops, conversions and parameters are written in its framework.

Everything else about a function's body (which lines there are, what their variables are called,
what can be joined) is the same in every framework.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...ir.conversion import Step
from ...ir.errors import UnsupportedOp
from ...ir.graph import Op

if TYPE_CHECKING:
    from .body import Body, Form, Statement, Text

Builder = Callable[["Body", Op, "list[Form]", "list[Form]"], "Text"]
"""Writes an op whose line depends on shapes or types."""


@dataclass(frozen=True, slots=True)
class Template:
    """One kind of op.

    `text`: the expression (`@name` is a builder); `name`: what the result would like to be called
    (empty: like the first operand); `role`: see `body.Statement`; `defaults`: attribute values that
    need not be said; `refused`: why the kind cannot be written, where it cannot.
    """

    text: str
    name: str = ""
    role: str = "op"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Language:
    """A framework, as the emission sees it.

    `templates` and `builders` write ops, `conversion` the line between two forms of a value,
    `parameter` a reference to a parameter by its path, `tensor` a literal as a tensor and `valid`
    the number of labels that are not the given one. `with_bias` joins a product of a kind and the
    addition of a bias to it. `passes` run over a body before its lines are joined. `axis` is the
    line that makes a variable for an axis (empty: axes are named by strings). `reserved` are names
    that variables leave alone.
    """

    name: str
    templates: Mapping[str, Template]
    builders: Mapping[str, Builder]
    conversion: Callable[[Body, Form, Form, Step], Statement]
    parameter: Callable[[str], str]
    tensor: Callable[[Body, str], str]
    with_bias: Callable[[Text, str], Text]
    reserved: frozenset[str]
    annotation: str
    """The type of tensors in signatures."""
    first_rank: str
    """Whether this is the first data-parallel rank, as an integer expression."""
    passes: Sequence[Callable[[Body], None]] = ()
    axis: str = ""


def fill(template: Template, operands: list[str], attributes: Mapping[str, Any]) -> str:
    """The expression of an op with a plain template. Raises UnsupportedOp for a refused kind.

    `{0}`, `{1}` are the operands, `{names}` the op's attributes as Python literals; a part in
    `[...]` is left out where the attribute it names is missing or has its default.
    """
    if template.refused:
        raise UnsupportedOp(template.refused)
    text = template.text
    while "[" in text:
        head, _, rest = text.partition("[")
        part, _, tail = rest.partition("]")
        key = part[part.index("{") + 1 : part.index("}")]
        value = attributes.get(key)
        said = value is not None and value != template.defaults.get(key)
        text = head + (part if said else "") + tail
    return text.format(*operands, **{key: literal(v) for key, v in attributes.items()})


def literal(value: Any) -> str:
    """A Python literal; lists become tuples."""
    return repr(tuple(value) if isinstance(value, list) else value)
