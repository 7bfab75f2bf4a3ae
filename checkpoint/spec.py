"""The files of the layout language, as written: YAML checked by pydantic (docs/layout-language.md).

This is the edge: what is wrong with a file is said here, with its name and the field. `layout.py`
makes rules of what is right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..ir import InvalidInput

FOLDER = Path(__file__).parent / "specs"

Sizes = dict[str, int | str]

_TERM = re.compile(r"\s*([*/]?)\s*(\w+)")
_TYPE = re.compile(r"R|S\((\w+)\)|P\((sum|mean)\)")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tensor(_Strict):
    """A rule: which stored arrays it is for, and which logical tensors they are made of.

    `stored` is a name, or names by variant. `logical` is `NAME` or `NAME as DIMS` of the one part;
    `parts` have those of several by their names in the slot of `dims`. `types` are by mesh axis,
    outermost first. `when` lists facts that must be true (`not FACT`: false, `FACT=VALUE`: that).
    `beside` lists logical tensors that must be there for the rule to be written. `also` names
    further stored arrays that are copies. `states`: the rule is for these only.
    """

    stored: str | dict[str, str]
    dims: str = ""
    logical: str = ""
    parts: dict[str, str] = Field(default_factory=dict)
    types: dict[str, str | list[str]] = Field(default_factory=dict)
    pad: Sizes = Field(default_factory=dict)
    when: list[str] = Field(default_factory=list)
    beside: list[str] = Field(default_factory=list)
    also: list[str] = Field(default_factory=list)
    states: list[str] = Field(default_factory=list)

    @field_validator("types")
    @classmethod
    def _are_types(cls, given: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
        for axis, said in given.items():
            for one in [said] if isinstance(said, str) else said:
                if _TYPE.fullmatch(one) is None:
                    raise ValueError(f"{axis}: {one!r} is no type: S(factor), R, P(sum), P(mean)")
            if isinstance(said, list) and not (len(said) == 2 and said[1] == "R"):
                raise ValueError(f"{axis}: sub-axes are [S(factor), R], not {said}")
        return given


class Spec(_Strict):
    """A layout as its file says it.

    `extends` another, whose rules come after its own. `stack`: factors that are taken out of the
    stored names (with what stands around them) and become the first dim. `needs`: names that a
    checkpoint must have for this layout to be chosen unasked, `without`: that it must not have.
    `read_only`: it is chosen unasked for what is read, not for what is written.
    """

    layout: str
    about: str = ""
    formats: list[str] = Field(default_factory=list)
    extends: str = ""
    stack: dict[str, str] = Field(default_factory=dict)
    sizes: Sizes = Field(default_factory=dict)
    variants: dict[str, str] = Field(default_factory=dict)
    states: dict[str, str] = Field(default_factory=dict)
    needs: list[str] = Field(default_factory=list)
    without: list[str] = Field(default_factory=list)
    ignore: list[str] = Field(default_factory=list)
    strict: bool = False
    read_only: bool = False
    default_types: dict[str, Literal["R", "S(0)", "S(1)", "P(mean)", "P(sum)"]] = Field(
        default_factory=dict
    )
    tensors: list[Tensor] = Field(default_factory=list)


def read_spec(path_or_name: str | Path) -> Spec:
    """A spec by its path, or a built-in one by its name; raises InvalidInput with what is wrong."""
    path = Path(path_or_name)
    if not path.suffix and (FOLDER / f"{path_or_name}.yaml").exists():
        path = FOLDER / f"{path_or_name}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        raise InvalidInput(
            f"layout {str(path_or_name)!r}: expected a YAML file, or one of {', '.join(builtin())}"
        ) from None
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidInput(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, Mapping):
        raise InvalidInput(f"{path}: expected a mapping with `layout` and `tensors`")
    return parse_spec(dict(loaded), str(path), path.parent)


def parse_spec(loaded: dict[str, Any], source: str, folder: Path = FOLDER) -> Spec:
    """A spec from what its file says, with what it extends merged in."""
    try:
        spec = Spec.model_validate(loaded)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(place) for place in first["loc"])
        raise InvalidInput(f"{source}: {where}: {first['msg']}") from None
    if not spec.extends:
        return spec
    beside = folder / f"{spec.extends}.yaml"
    base = read_spec(beside if beside.exists() else spec.extends)
    return base.model_copy(
        update={
            **{name: getattr(spec, name) for name in spec.model_fields_set},
            "sizes": {**base.sizes, **spec.sizes},
            "states": {**base.states, **spec.states},
            "variants": spec.variants or base.variants,
            "ignore": [*base.ignore, *spec.ignore],
            "tensors": [*spec.tensors, *base.tensors],
        }
    )


def builtin() -> list[str]:
    """The names of the layouts that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def evaluate(expression: int | str, known: Mapping[str, Any]) -> int | None:
    """The first alternative of `a * b / c | d` whose names are all known, as a number.

    >>> evaluate("num_query_groups | heads", {"heads": 8})
    8
    >>> evaluate("hidden / heads | 128 * tp", {"tp": 2})
    256
    """
    if isinstance(expression, int):
        return expression
    for alternative in expression.split("|"):
        value: int | None = None
        at = 0
        text = alternative.strip()
        while at < len(text):
            match = _TERM.match(text, at)
            if match is None or bool(match[1]) != (at > 0):
                raise InvalidInput(f"size {expression!r}: {text[at:]!r} is no name * name / number")
            at = match.end()
            term = int(match[2]) if match[2].isdigit() else known.get(match[2])
            if not isinstance(term, int) or isinstance(term, bool):
                value = None
                break
            if value is None:
                value = term
            elif match[1] == "*":
                value *= term
            elif term and value % term == 0:
                value //= term
            else:
                raise InvalidInput(f"size {expression!r}: {value} is no multiple of {term}")
        if value is not None:
            return value
    return None
