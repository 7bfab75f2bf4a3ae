"""A jaxpr as one flat list of nodes: calls are seen through, a scan over layers becomes its first
iterations with slices of the stacked parameters.

Vocabulary: a `Source` is a value of the flat program, a `Node` makes some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax.extend.core as jex
import numpy as np

from ..errors import UnsupportedOp
from ..lift.pieces import Run

SLICE = "slice of a stack"
"""The node that takes one entry of dim 0, `params["index"]`."""

ITERATIONS = "outputs of all iterations"
"""The node that lays them on top of each other."""

_CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
    "remat2": "jaxpr", "remat": "jaxpr", "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_lin": "jaxpr",
}  # fmt: skip
"""Primitive that only calls → the parameter that holds what it calls."""

_THROUGH = ("convert_element_type", "stop_gradient", "copy", "copy_p", "name", "mesh_cast",
            "sharding_constraint")  # fmt: skip
"""What may stand between a stacked parameter and the scan over it: a slice goes before it."""

_LONGEST = 64
"""Iterations of a scan over anything but parameters that are written out."""


@dataclass(eq=False, slots=True)
class Source:
    """A value: of a node, a parameter or input by name, or a constant (`value`)."""

    shape: tuple[Any, ...]
    dtype: Any
    role: Literal["activation", "parameter", "input", "constant", "literal"] = "activation"
    name: str = ""
    value: Any = None
    node: Node | None = None
    index: int = 0


@dataclass(eq=False, slots=True)
class Node:
    """One primitive application; `scope` is the name stack, `info` says where in the source it is,
    and where the calls around it are."""

    name: str
    primitive: Any
    params: dict[str, Any]
    operands: tuple[Source, ...]
    results: tuple[Source, ...]
    scope: str
    info: Any


@dataclass(slots=True)
class Flat:
    """Nodes in order, the loss, and the runs of stacked layers that were met."""

    nodes: list[Node] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    def add(
        self,
        name: str,
        primitive: Any,
        params: dict[str, Any],
        operands: Sequence[Source],
        results: Sequence[tuple[tuple[Any, ...], Any]],
        scope: str,
        info: Any,
    ) -> tuple[Source, ...]:
        """A node at the end; its results."""
        node = Node(name, primitive, params, tuple(operands), (), scope, info)
        node.results = tuple(
            Source(shape, dtype, node=node, index=i) for i, (shape, dtype) in enumerate(results)
        )
        self.nodes.append(node)
        return node.results


def flatten(
    closed: Any, arguments: Sequence[Source], whole: bool, through: bool = True
) -> tuple[Flat, list[Source]]:
    """The flat program of a closed jaxpr, and its results.

    `whole`: scans over layers are written out in full. `through`: functions with derivatives of
    their own are seen through, else they are one node. Raises UnsupportedOp for a loop whose number
    of iterations is not known.
    """
    walk = _Walk(whole, through)
    return walk.flat, walk.closed(closed, arguments, "")


class _Walk:
    def __init__(self, whole: bool, through: bool) -> None:
        self.whole, self.through = whole, through
        self.flat = Flat()
        self.calls: list[Any] = []  # where the calls that we are in were made

    def closed(self, closed: Any, arguments: Sequence[Source], scope: str) -> list[Source]:
        constants = [_constant(value) for value in getattr(closed, "consts", ())]
        return self.body(getattr(closed, "jaxpr", closed), constants, arguments, scope)

    def body(
        self, jaxpr: Any, constants: Sequence[Source], arguments: Sequence[Source], scope: str
    ) -> list[Source]:
        known: dict[Any, Source] = dict(zip(jaxpr.constvars, constants, strict=True))
        known |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Source:
            if isinstance(atom, jex.Literal):
                return Source((), getattr(atom.aval, "dtype", None), "literal", value=atom.val)
            return known[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            inner = _joined(scope, str(eqn.source_info.name_stack))
            results = self.equation(eqn, operands, inner)
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[Source], scope: str) -> Sequence[Source]:
        name = eqn.primitive.name
        self.calls.append(eqn.source_info)
        try:
            if name in _CALLS and (self.through or not name.startswith("custom_vjp")):
                return self.closed(eqn.params[_CALLS[name]], operands, scope)
            if name == "scan":
                return self.scan(eqn, operands, scope)
            if name == "cond" and operands[0].role == "literal":
                branch = eqn.params["branches"][int(operands[0].value)]
                return self.closed(branch, operands[1:], scope)
        finally:
            self.calls.pop()
        results = [(tuple(v.aval.shape), v.aval.dtype) for v in eqn.outvars if _has_shape(v.aval)]
        return self.flat.add(
            name, eqn.primitive, dict(eqn.params), operands, results, scope,
            (eqn.source_info, *self.calls[::-1]),
        )  # fmt: skip

    def scan(self, eqn: Any, operands: list[Source], scope: str) -> Sequence[Source]:
        """Iterations one after the other; the first two stand for all where nothing but the carry
        leaves the loop and layers' parameters enter it."""
        params = eqn.params
        fixed, carried, length = params["num_consts"], params["num_carry"], params["length"]
        constants, carry = operands[:fixed], operands[fixed : fixed + carried]
        stacks = operands[fixed + carried :]
        outputs = eqn.outvars[carried:]
        leaves = [_stacked(source) for source in stacks]
        used = [i for i, v in enumerate(outputs) if not isinstance(v, jex.DropVar)]
        layers = any(leaf is not None for leaf in leaves)
        if not isinstance(length, int) or (length > _LONGEST and not layers):
            raise UnsupportedOp(
                f"op scan at {place(self.calls[::-1])}: {length} iterations over what is no "
                f"parameter; at most {_LONGEST} are written out"
            )
        kept = min(2, length) if layers and not used and not self.whole else length
        order = range(length - 1, -1, -1) if params["reverse"] else range(length)
        run = self.run([leaf for leaf in leaves if leaf], list(order), kept) if layers else None
        made: list[list[Source]] = []
        for position, index in enumerate(order):
            if position == kept:
                break
            sliced = [self.entry(source, index, scope, self.calls[::-1]) for source in stacks]
            inner = _joined(scope, run.child(position)) if run else scope
            results = self.closed(params["jaxpr"], [*constants, *carry, *sliced], inner)
            carry = results[:carried]
            made.append(results[carried:])
        if params["reverse"]:
            made.reverse()
        return [
            *carry,
            *(self.stacked(made, i, outputs[i], scope, eqn) for i in range(len(outputs))),
        ]

    def run(self, leaves: Sequence[Source], order: Sequence[int], kept: int) -> Run:
        """The run of layers that a scan calls, under a name that no other has."""
        path = _common_path([leaf.name for leaf in leaves])
        children = tuple(map(str, order))
        run = Run(path, children, (0,) * len(children), kept, stacked=True)
        if run not in self.flat.runs:
            self.flat.runs.append(run)
        return run

    def entry(self, source: Source, index: int, scope: str, info: Any) -> Source:
        """Entry `index` of dim 0, taken before casts of a parameter."""
        node = source.node
        if node is not None and node.name in _THROUGH and _stacked(source) is not None:
            inner = self.entry(node.operands[0], index, scope, info)
            (made,) = self.flat.add(
                node.name, node.primitive, node.params, [inner],
                [(source.shape[1:], source.dtype)], scope, info,
            )  # fmt: skip
            return made
        (made,) = self.flat.add(
            SLICE, None, {"index": index}, [source], [(source.shape[1:], source.dtype)], scope, info
        )
        return made

    def stacked(
        self, made: Sequence[Sequence[Source]], index: int, var: Any, scope: str, eqn: Any
    ) -> Source:
        """The outputs of all iterations on top of each other."""
        pieces = [results[index] for results in made]
        shape, dtype = tuple(var.aval.shape), var.aval.dtype
        if isinstance(var, jex.DropVar):
            return Source(shape, dtype)
        (result,) = self.flat.add(
            ITERATIONS, None, {}, pieces, [(shape, dtype)], scope, self.calls[::-1]
        )
        return result


def _has_shape(aval: Any) -> bool:
    return hasattr(aval, "shape")


def _constant(value: Any) -> Source:
    array = value if hasattr(value, "dtype") else np.asarray(value)
    return Source(tuple(array.shape), array.dtype, "constant", value=value)


def _stacked(source: Source) -> Source | None:
    """The parameter that a source is, casts aside."""
    while source.node is not None and source.node.name in _THROUGH:
        source = source.node.operands[0]
    return source if source.role == "parameter" else None


def _common_path(names: Sequence[str]) -> str:
    """The path that holds all of these parameters."""
    parts = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _joined(scope: str, name: str) -> str:
    return f"{scope}/{name}" if scope and name else scope or name


def place(infos: Sequence[Any]) -> str:
    """`model.py:12 (attention)`: the line of the user's program that made an equation, or else of
    the innermost call that has one (what JAX's own functions do has none)."""
    from jax._src import source_info_util

    for info in infos:
        if text := str(source_info_util.summarize(info)):
            return text.rpartition("/")[2]
    return "the top level"


def literal_of(source: Source) -> Any:
    """The number that a source is everywhere, or None: a literal, broadcast or cast."""
    while source.node is not None and source.node.name in (
        "broadcast_in_dim", "convert_element_type", "reshape", "copy", "stop_gradient"
    ):  # fmt: skip
        source = source.node.operands[0]
    if source.role == "literal":
        return _number(source.value, source.dtype)
    if source.role == "constant" and source.shape == ():
        return _number(np.asarray(source.value), source.dtype)
    return None


def _number(value: Any, dtype: Any) -> Any:
    """A Python number; a float32 one as it was written: 1e-5, not 9.99999974e-06."""
    if np.issubdtype(dtype, np.floating) and np.dtype(dtype).itemsize == 4:
        return float(str(np.float32(value)))
    array = np.asarray(value)
    if array.dtype.kind not in "biufc":
        array = array.astype(np.float64)
    return array.item()


def walk_back(sources: Sequence[Source], stop: Callable[[Source], bool]) -> Iterator[Source]:
    """Sources that these depend on, and themselves, each once; not beyond where `stop` holds."""
    seen: set[Source] = set()
    waiting = list(sources)
    while waiting:
        at = waiting.pop()
        if at in seen:
            continue
        seen.add(at)
        yield at
        if at.node is not None and not stop(at):
            waiting += at.node.operands
