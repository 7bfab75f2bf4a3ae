"""SBP types: how a tensor lies on the devices of one mesh axis, and the law of duals.

An `AxisType` says how a value lies along *one* (sub-)axis of the mesh: split along a factor of a
dim (`S`), replicated with a partial gradient (`R`), replicated with a replicated gradient (`I`), or
partial, i.e. the devices hold summands (`P`). `NdType` puts one on every axis of a mesh.

Vocabulary, here and everywhere: an *axis* belongs to the mesh, a *dim* to a tensor, and a dim is a
product of *factors* (`(k g d)`, outermost first); a split names the dim and the factor in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from .errors import InvalidInput

Kind = Literal["S", "R", "I", "P"]


@dataclass(frozen=True, slots=True, order=True)
class AxisType:
    """The type of a value along one mesh axis.

    `dim` and `part` say which factor of which dim is split: part 0 is the outermost factor. They
    are -1 unless `kind` is "S".
    """

    kind: Kind
    dim: int = -1
    part: int = -1

    def __post_init__(self) -> None:
        at = (self.dim, self.part)
        if min(at) < 0 if self.kind == "S" else at != (-1, -1):
            raise InvalidInput(f"type {self.kind} with dim {self.dim}, part {self.part}")

    def __str__(self) -> str:
        if self.kind != "S":
            return self.kind
        return f"S({self.dim})" if self.part == 0 else f"S({self.dim}.{self.part})"

    __repr__ = __str__

    @property
    def is_split(self) -> bool:
        """Whether the axis splits the value."""
        return self.kind == "S"

    @property
    def dual(self) -> AxisType:
        """The type of the gradient of a value of this type: S↔S, R↔P, I↔I."""
        return {"S": self, "R": P, "I": I, "P": R}[self.kind]

    @staticmethod
    def parse(text: str) -> AxisType:
        """Reads `S(0)`, `S(1.2)`, `R` (or `B`), `I`, `P`; raises InvalidInput for anything else."""
        text = text.strip().upper()
        if text in ("R", "B"):
            return R
        if text in ("I", "P"):
            return I if text == "I" else P
        if text.startswith("S(") and text.endswith(")"):
            dim, _, part = text[2:-1].partition(".")
            if dim.isdecimal() and (part.isdecimal() or not part):
                return S(int(dim), int(part or 0))
        raise InvalidInput(f"SBP type {text!r}: expected S(dim), S(dim.factor), R, I or P")


def S(dim: int, part: int = 0) -> AxisType:  # noqa: N802 - the field's name for it
    """Split along factor `part` (0 is the outermost) of dim `dim`."""
    return AxisType("S", dim, part)


R = AxisType("R")
I = AxisType("I")  # noqa: E741 - the field's name for it
P = AxisType("P")


@dataclass(frozen=True, slots=True)
class NdType:
    """One `AxisType` per mesh axis.

    The order of `axes` is the nesting order: where several axes split the same factor, the one
    that comes first is the outermost.
    """

    axes: tuple[tuple[str, AxisType], ...]

    @staticmethod
    def of(types: Mapping[str, AxisType]) -> NdType:
        """From a mapping whose order is the nesting order."""
        return NdType(tuple(types.items()))

    @staticmethod
    def uniform(axes: tuple[str, ...], kind: AxisType) -> NdType:
        """The same type on every axis."""
        return NdType(tuple((axis, kind) for axis in axes))

    def __getitem__(self, axis: str) -> AxisType:
        for name, kind in self.axes:
            if name == axis:
                return kind
        raise InvalidInput(f"axis {axis!r}: the type {self} has {[a for a, _ in self.axes]}")

    def __iter__(self) -> Iterator[tuple[str, AxisType]]:
        return iter(self.axes)

    def __str__(self) -> str:
        return "{" + ", ".join(f"{axis}: {kind}" for axis, kind in self.axes) + "}"

    __repr__ = __str__

    @property
    def dual(self) -> NdType:
        """The type of the gradient."""
        return NdType(tuple((axis, kind.dual) for axis, kind in self.axes))

    def replace(self, axis: str, kind: AxisType) -> NdType:
        """This type with another type on one axis; the nesting order stays."""
        self[axis]
        return NdType(tuple((a, kind if a == axis else k) for a, k in self.axes))

    def splitting(self, dim: int, part: int | None = None) -> tuple[str, ...]:
        """Axes that split dim `dim` (and factor `part` of it), outermost first."""
        return tuple(
            a for a, k in self.axes if k.is_split and k.dim == dim and part in (None, k.part)
        )

    def to_json(self) -> dict[str, str]:
        """`{axis: "S(0)"}` in nesting order."""
        return {axis: str(kind) for axis, kind in self.axes}

    @staticmethod
    def from_json(data: Mapping[str, str]) -> NdType:
        """The inverse of `to_json`."""
        return NdType(tuple((axis, AxisType.parse(kind)) for axis, kind in data.items()))
