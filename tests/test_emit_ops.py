"""The line that the torch backend writes for an op, in every signature, equals the op run whole.

The laws of test_laws.py once more, with emitted source in place of the oracle on the shards:
forward and gradient, on simulated ranks in one process. A split-vocabulary cross-entropy
communicates inside itself; test_emit_parity.py runs it on real ranks.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import test_laws
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import Case, cases
from simulated import Ranks
from test_laws import ONE_AXIS, TWO_AXES, check_all, examples

from shardwright.backends.emission.body import Body
from shardwright.backends.emission.lines import line
from shardwright.backends.emission.naming import Writer, returning
from shardwright.backends.emission.peephole import simplify
from shardwright.backends.emission.target import Target
from shardwright.backends.emission.text import indented
from shardwright.backends.to_torch import TEMPLATES as FOLDER
from shardwright.backends.to_torch.language import TORCH
from shardwright.backends.to_torch.optable import TEMPLATES
from shardwright.ir import Mesh, NdType, UnsupportedOp
from shardwright.ir.optable import TABLE

semantics_run = test_laws.run
WHERE = SimpleNamespace(mesh=Mesh.of(tp=1), rank=0)
"""The simulated rank that emitted lines run on."""


def axis(name: str) -> SimpleNamespace:
    """Stands for a process group."""
    mesh, rank = WHERE.mesh, WHERE.rank
    return SimpleNamespace(
        size=lambda: mesh[name].size if name in mesh.names else 1,
        rank=lambda: mesh.coordinates(rank)[name] if name in mesh.names else 0,
    )


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    """What an emitted model.py has imported."""
    parallel = ModuleType("parallel")
    parallel.axis = axis  # type: ignore[attr-defined]
    parallel.model_dtype = parallel.wide_dtype = lambda: torch.float64  # type: ignore[attr-defined]
    sys.modules["parallel"] = parallel
    found: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "axis": axis}
    found |= {"S": lambda dim: dim, "R": None, "I": None, "P": None}  # types are for the checker
    for name in ("typed", "ops"):
        spec = importlib.util.spec_from_file_location(name, Path(FOLDER) / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found |= vars(module)
    for name in ("typed", "ops", "parallel"):
        del sys.modules[name]
    return found


@pytest.fixture(autouse=True)
def emitted(namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The laws run emitted lines."""

    def run(
        case: Case,
        mesh: Mesh,
        types: Sequence[NdType],
        made: Sequence[NdType],
        operands: list[Ranks],
    ) -> list[Ranks]:
        special = [f for f, _ in TABLE[case.op.kind].special]
        split = {s for t in types for s in _factors(case, t, types)}
        if split & set(special):
            return semantics_run(case, mesh, types, made, operands)
        try:
            function = compiled(case, mesh, types, made, namespace)
        except UnsupportedOp as refused:  # a vocabulary of several factors: no model has it
            assert "vocabulary" in str(refused) or TEMPLATES[case.op.kind].refused
            return semantics_run(case, mesh, types, made, operands)
        ranks = []
        for rank in range(mesh.size):
            WHERE.mesh, WHERE.rank = mesh, rank
            result = function(*(x[rank] for x in operands))
            ranks.append(result if isinstance(result, tuple | list) else (result,))
        results: list[Ranks] = [list(result) for result in zip(*ranks, strict=True)]
        if TABLE[case.op.kind].work == "loss":  # the count of terms is not the program's to compute
            results.append(semantics_run(case, mesh, types, made, operands)[1])
        return results

    monkeypatch.setattr(test_laws, "run", run)
    yield


def _factors(case: Case, t: NdType, types: Sequence[NdType]) -> Iterator[str]:
    shape = case.op.rule.operands[list(types).index(t)]
    for _, kind in t:
        if kind.is_split:
            yield shape[kind.dim][kind.part].split("_")[0]


def compiled(
    case: Case,
    mesh: Mesh,
    types: Sequence[NdType],
    made: Sequence[NdType],
    namespace: dict[str, Any],
) -> Any:
    """The emitted line as a function of the local operands."""
    op, target = case.op, Target(mesh)
    body = Body(target, TORCH)
    for i, (name, t) in enumerate(zip(op.operands, types, strict=True)):
        body.argument(case.values[name], target.live(t), f"operand{i}")
    if not op.operands:  # where it finds a device
        body.inputs["anything"] = "anything"
        namespace["anything"] = torch.zeros(())
    reads = [(name, target.live(t)) for name, t in zip(op.operands, types, strict=True)]
    writes = [
        body.know(case.values[name], target.live(t))
        for name, t in zip(op.results, made, strict=True)
    ]
    statement = line(body, op, reads, writes)
    body.add(statement)
    body.outputs = statement.writes
    body.inputs.pop("anything", None)
    simplify(body)
    writer = Writer(body)
    lines, result = writer.lines(), writer.result()
    arguments = ", ".join(body.inputs.values())
    source = f"def function({arguments}):\n{indented(chr(10).join(returning(lines, result)))}"
    draw = namespace["Draw"](seed=1, step=2, first_row=0, rows=1)
    scope = {**namespace, **body.constant_values(), "draw": draw, "self": SimpleNamespace(path="m")}
    exec(source, scope)
    return scope["function"]


def test_every_kind_has_a_template() -> None:
    assert set(TEMPLATES) == set(TABLE)


@pytest.mark.parametrize("kind", TABLE)
@examples(25)
@given(data=st.data())
def test_line_on_one_axis(kind: str, data: Any) -> None:
    mesh = data.draw(st.sampled_from(ONE_AXIS))
    check_all(data.draw(cases(kind, mesh.size)), mesh)


@pytest.mark.parametrize("kind", TABLE)
@examples(8)
@given(data=st.data())
def test_line_on_two_axes(kind: str, data: Any) -> None:
    mesh = data.draw(st.sampled_from(TWO_AXES))
    check_all(data.draw(cases(kind, mesh.size)), mesh)
