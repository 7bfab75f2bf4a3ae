"""Tracing a JAX function: jaxpr → flat program → draft → lifting → pieces → model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
from jax import export

from ..errors import InvalidInput, ShardwrightError
from ..graph import Init, Model, Parameter, Pin
from ..lift.assemble import Unlike, assemble
from ..lift.draft import Draft
from ..lift.lifting import lift
from ..lift.pieces import Run
from .annotate import pin_of_sharding
from .evaluate import Evaluations
from .flatten import Flat, Source, flatten
from .normalise import check, normalise
from .repeats import block_name, cut, place_modules
from .trees import named_inputs, named_leaves, structs

_LEAST_SEQUENCE = 16
"""The sequence is traced as a symbol of at least this size: enough to decide `s - 1 >= 1`."""


def trace(
    function: Callable[..., Any],
    params: Any,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    *,
    name: str = "",
) -> Model:
    """Traces `function(params, *inputs) -> loss` into a `Model`, without running it.

    Arguments:
        params: a pytree of arrays or ShapeDtypeStructs; a parameter's name is its key path joined
            with dots, and slices of what `lax.scan` runs over are `layers.wq[3]`.
        example_inputs: arrays or ShapeDtypeStructs by name or in order. Their values do not
            matter: dim 0 is the batch `b`; dim 1 of token ids [b, s] and of features [b, s, h] is
            the sequence `s`.
        name: what to call the model; the function's name by default.

    Raises InvalidInput for a function that cannot be traced and UnsupportedOp for a primitive
    without a rule, each in one line that names the place.
    """
    if not callable(function):
        raise InvalidInput(f"model: {type(function).__name__} is no function of (params, *inputs)")
    name = name or getattr(function, "__name__", type(function).__name__)
    leaves, structure = named_leaves(params, "params")
    if not leaves:
        raise InvalidInput(f"{name}: params has no arrays")
    problem: ShardwrightError | None = None
    traced = None
    for wide in (True, False):
        try:
            traced = _Traced(function, leaves, structure, example_inputs, name, wide)
            break
        except InvalidInput as error:
            problem = problem or error
    if traced is None:
        assert problem is not None
        raise problem
    try:
        return traced.model(whole=False)
    except Unlike:
        pass  # iterations of a scan that are not alike after all
    try:
        return traced.model(whole=True)
    except Unlike as error:
        raise AssertionError(f"a full trace has nothing to compare: {error}") from error


class _Traced:
    """A jaxpr with what its arguments are.

    `wide`: floats are traced as float64, so that numbers in the program keep their digits and
    casts to float32 show; functions that fix the dtype of a carry need their own (wide=False).
    """

    def __init__(
        self,
        function: Callable[..., Any],
        leaves: Mapping[str, Any],
        structure: Any,
        example_inputs: Mapping[str, Any] | Sequence[Any],
        name: str,
        wide: bool,
    ) -> None:
        self.name, self.leaves = name, leaves
        with jax.enable_x64(True) if wide else nullcontext():
            floating = np.dtype(np.float64) if wide else None
            stored = structs(leaves, floating)
            self.dtype = _commonest(stored)
            given, _, _, inner = named_inputs(function, example_inputs)
            shapes = structs(given, floating)
            _check_batch(shapes)
            self.closed, self.shapes = _jaxpr(function, stored, structure, shapes, inner, name)

    def model(self, whole: bool) -> Model:
        """The model; `whole`: every iteration of a scan is looked at."""
        parameters = {
            name: Source(tuple(np.shape(leaf)), self.dtype if _floats(leaf) else leaf.dtype,
                         "parameter", name)
            for name, leaf in self.leaves.items()
        }  # fmt: skip
        inputs = [
            Source(tuple(struct.shape), struct.dtype, "input", name)
            for name, struct in self.shapes.items()
        ]
        flat, (loss,) = flatten(self.closed, [*parameters.values(), *inputs], whole)
        draft = normalise(flat, inputs, loss, str(self.dtype))
        units = place_modules(draft, flat.runs)
        lift(draft, Evaluations(tuple(inputs)))
        check(draft)
        stored = _parameters(self.leaves, flat)
        model = assemble(
            draft, cut(draft, units), _runs(flat, draft), stored, block_name, self.name
        )
        pins = (*_pins(self.leaves, model), *model.pins)
        return Model(**{**_fields(model), "pins": pins})


def _jaxpr(
    function: Callable[..., Any],
    stored: Mapping[str, jax.ShapeDtypeStruct],
    structure: Any,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    inner: Any,
    name: str,
) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    """The jaxpr of the function of flat arguments, and its inputs with symbolic dims."""

    def flat(*arguments: Any) -> Any:
        params = jax.tree.unflatten(structure, arguments[: len(stored)])
        positional, keywords = jax.tree.unflatten(inner, arguments[len(stored) :])
        loss = function(params, *positional, **keywords)
        return loss[0] if isinstance(loss, tuple) and loss else loss

    problem: Exception | None = None
    for sequence in (True, False):
        symbolic = _symbolic(shapes, sequence)
        try:
            closed = jax.make_jaxpr(flat)(*stored.values(), *symbolic.values())
        except ShardwrightError:
            raise
        except Exception as error:  # whatever the user's function does
            problem = problem or error
            continue
        if [tuple(v.shape) for v in closed.out_avals] != [()]:
            got = ", ".join(str(v) for v in closed.out_avals) or "nothing"
            raise InvalidInput(f"{name} returns {got}: expected one scalar, the loss")
        return closed, symbolic
    assert problem is not None
    raise InvalidInput(f"{name} cannot be traced: {_reason(problem)}") from problem


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    if "Concretization" in kind or "TracerBool" in kind or "TracerInteger" in kind:
        return f"its control flow depends on the values of arrays ({kind}); use jax.lax.cond"
    if "TracerArrayConversion" in kind:
        return f"it makes a traced array into one of numpy ({kind}); use jax.numpy"
    if "InconclusiveDimension" in kind:
        return f"a number in it depends on the batch or sequence size ({lines[0][:160]})"
    return f"{kind}: {lines[0][:240] if lines else ''}"


def _symbolic(
    shapes: Mapping[str, jax.ShapeDtypeStruct], sequence: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """Inputs whose batch, and sequence where asked, are symbols."""
    b, s = export.symbolic_shape("b, s", constraints=["b >= 2", f"s >= {_LEAST_SEQUENCE}"])
    long = _sequence_inputs(shapes) if sequence else frozenset()
    found = {}
    for name, struct in shapes.items():
        shape: list[Any] = list(struct.shape)
        if shape and not _is_key(struct):
            shape[0] = b
        if name in long:
            shape[1] = s
        found[name] = jax.ShapeDtypeStruct(tuple(shape), struct.dtype)
    return found


def _check_batch(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raises InvalidInput where no input has a batch dim, or inputs disagree on its size."""
    given = {n: s.shape for n, s in shapes.items() if s.shape and not _is_key(s)}
    if shapes and not given:
        raise InvalidInput(
            f"example inputs {', '.join(shapes)}: none has a batch dim; dim 0 of an array is the "
            "batch"
        )
    first = next(iter(given), "")
    for name, shape in given.items():
        if shape[0] != given[first][0]:
            raise InvalidInput(
                f"example inputs {first} {list(given[first])} and {name} {list(shape)}: dim 0 is "
                "the batch, so it must be of one size"
            )


def _is_key(struct: jax.ShapeDtypeStruct) -> bool:
    """Whether an input is a key of random numbers, typed or two words."""
    typed = jax.numpy.issubdtype(struct.dtype, jax.dtypes.prng_key)
    return bool(typed) or (str(struct.dtype) == "uint32" and struct.shape == (2,))


def _sequence_inputs(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> frozenset[str]:
    """Inputs whose dim 1 is the sequence: token ids [b, s], features [b, s, h], and what agrees."""
    whole = [s.shape[1] for s in shapes.values() if len(s.shape) >= 2 and s.dtype.kind in "iub"]
    lengths = whole or [s.shape[1] for s in shapes.values() if len(s.shape) == 3]
    if not lengths:
        return frozenset()
    return frozenset(n for n, s in shapes.items() if len(s.shape) >= 2 and s.shape[1] == lengths[0])


def _commonest(stored: Mapping[str, jax.ShapeDtypeStruct]) -> Any:
    """The dtype of most floating parameters: the one the model computes in."""
    dtypes = [s.dtype for s in stored.values() if jax.numpy.issubdtype(s.dtype, jax.numpy.floating)]
    if not dtypes:
        raise InvalidInput("params: no floating arrays, so nothing to train")
    return max(set(dtypes), key=dtypes.count)


def _floats(leaf: Any) -> bool:
    return not hasattr(leaf, "dtype") or bool(jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating))


def _parameters(leaves: Mapping[str, Any], flat: Flat) -> dict[str, Parameter]:
    """Every parameter in the tree's order; a stack that a scan runs over as its slices."""
    lengths = {
        node.operands[0].name: node.operands[0].shape[0]
        for node in flat.nodes
        if node.name == "slice of a stack" and node.operands[0].role == "parameter"
    }
    found: dict[str, Parameter] = {}
    for name, leaf in leaves.items():
        shape, trainable = tuple(np.shape(leaf)), _floats(leaf)
        if name in lengths:
            for i in range(lengths[name]):
                part = f"{name}[{i}]"
                found[part] = Parameter(part, shape[1:], _init(name, shape[1:]), trainable)
        else:
            found[name] = Parameter(name, shape, _init(name, shape), trainable)
    return found


def _init(name: str, shape: tuple[int, ...]) -> Init:
    """A start for demonstrations: a JAX function does not say how its parameters start."""
    last = name.rpartition(".")[2]
    if len(shape) >= 2:
        return Init("normal", 0.02)
    return Init("constant", 0.0 if last in ("bias", "b", "beta") else 1.0)


def _runs(flat: Flat, draft: Draft) -> list[Run]:
    """Runs of layers that the loss depends on."""
    read = {w.name for op in draft.ops for w in op.operands if w.role == "parameter"}
    stacks = {name.partition("[")[0] for name in read if "[" in name}
    return [run for run in flat.runs if any(s.startswith(run.path) for s in stacks)]


def _pins(leaves: Mapping[str, Any], model: Model) -> list[Pin]:
    """Pins that shardings of the given parameters are."""
    found = []
    for name, leaf in leaves.items():
        types = pin_of_sharding(getattr(leaf, "sharding", None), len(np.shape(leaf)))
        slices = [n for n in model.parameters if n == name or n.startswith(f"{name}[")]
        for each in slices if types else ():
            less = 1 if each != name else 0
            moved = {axis: f"S({int(kind[2:-1]) - less})" for axis, kind in types.items()
                     if kind != "S(0)" or not less}  # fmt: skip
            if moved:
                found.append(Pin("parameter", each, moved))
    return found


def _fields(model: Model) -> dict[str, Any]:
    return {field: getattr(model, field) for field in model.__dataclass_fields__}
