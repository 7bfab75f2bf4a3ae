"""Mixed-integer linear programs as arrays, solved through OR-tools MathOpt.

The model is built as a MathOpt protocol buffer from flat lists: programs with tens of thousands of
flow variables are assembled in milliseconds that way, where one Python object per variable takes
longer than the solve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt

from ..ir import Infeasible, ShardwrightError

Solver = Literal["glop", "highs", "cp-sat", "scip"]

_SOLVERS = {
    "glop": mathopt.SolverType.GLOP,
    "highs": mathopt.SolverType.HIGHS,
    "cp-sat": mathopt.SolverType.CP_SAT,
    "scip": mathopt.SolverType.GSCIP,
}
_LARGEST_COST = 1e4
"""Costs are scaled so that the largest is this: solvers stop at reduced costs of 1e-7, and seconds
of a conversion are no larger."""
_NOTHING: mathopt.SparseVectorFilter[Any] = mathopt.SparseVectorFilter(filtered_items=())
_VALUES = mathopt.ModelSolveParameters(dual_values_filter=_NOTHING, reduced_costs_filter=_NOTHING)
"""Only values of variables are read back: turning duals into objects takes as long as the solve."""
_WORTH_PRESOLVING = 2000
"""Variables below which HiGHS takes longer to presolve a relaxation than to solve it."""
INTEGRAL = 1e-6
"""Distance from an integer below which a value of the relaxation counts as integral."""


@dataclass(frozen=True, slots=True)
class Solution:
    """Values by variable, the objective, and how they were found: the linear relaxation was
    `integral`, or the whole was solved as a `mip`."""

    values: NDArray[np.float64]
    objective: float
    bound: float
    method: Literal["integral", "mip"]


@dataclass(slots=True)
class LinearProgram:
    """Minimise `Σ cost·x` under `lower ≤ A x ≤ upper` and `0 ≤ x ≤ 1`."""

    _costs: list[float] = field(default_factory=list)
    _integer: list[bool] = field(default_factory=list)
    _rows: list[int] = field(default_factory=list)
    _columns: list[int] = field(default_factory=list)
    _coefficients: list[float] = field(default_factory=list)
    _lower: list[float] = field(default_factory=list)
    _upper: list[float] = field(default_factory=list)
    _made: tuple[tuple[int, int, int], model_pb2.ModelProto] | None = None

    def variable(self, cost: float = 0.0, integer: bool = False) -> int:
        """A new variable in [0, 1]; returns its index."""
        self._costs.append(cost)
        self._integer.append(integer)
        return len(self._costs) - 1

    def row(self, terms: Sequence[tuple[int, float]], lower: float, upper: float) -> None:
        """A constraint `lower ≤ Σ coefficient·x ≤ upper`."""
        index = len(self._lower)
        for column, coefficient in terms:
            self._rows.append(index)
            self._columns.append(column)
            self._coefficients.append(coefficient)
        self._lower.append(lower)
        self._upper.append(upper)

    @property
    def size(self) -> tuple[int, int, int]:
        """(variables, of them integer, constraints)."""
        return len(self._costs), sum(self._integer), len(self._lower)

    @property
    def costs(self) -> NDArray[np.float64]:
        """A copy of the variables' costs."""
        return np.array(self._costs)

    def solve(self, solver: Solver = "highs", costs: NDArray[np.float64] | None = None) -> Solution:
        """The optimum: the relaxation where it is integral, otherwise the whole as a MIP.

        `costs` stand in for the variables' own. Raises Infeasible where there is none. GLOP solves
        relaxations only: a fractional one goes to HiGHS then.
        """
        costs = self.costs if costs is None else costs
        relaxed = self._solve(solver, costs, integer=False)
        flags = np.asarray(self._integer)
        inside = relaxed.values[flags]
        if bool(np.all(np.abs(inside - np.round(inside)) <= INTEGRAL)):
            return Solution(relaxed.values, relaxed.objective, relaxed.objective, "integral")
        return self._solve("highs" if solver == "glop" else solver, costs, integer=True)

    def search(self, hint: NDArray[np.float64], effort: float, seed: int) -> Solution | None:
        """The best that CP-SAT finds from a hint, with its bound, within a deterministic effort
        (about seconds); None where it finds nothing."""
        scale = _scale(self.costs)
        model = mathopt.Model.from_model_proto(self._proto(self.costs * scale, integer=True))
        variables = list(model.variables())
        parameters = mathopt.SolveParameters(random_seed=seed, threads=1)
        parameters.cp_sat.max_deterministic_time = effort
        hints = [mathopt.SolutionHint(dict(zip(variables, hint.tolist(), strict=True)))]
        result = mathopt.solve(
            model,
            _SOLVERS["cp-sat"],
            params=parameters,
            model_params=mathopt.ModelSolveParameters(solution_hints=hints),
        )
        if not result.has_primal_feasible_solution():
            return None
        values = np.asarray(result.variable_values(variables), dtype=np.float64)
        bound = result.dual_bound() / scale
        return Solution(values, float(np.dot(self.costs, values)), bound, "mip")

    def _solve(self, solver: Solver, costs: NDArray[np.float64], integer: bool) -> Solution:
        scale = _scale(costs)
        model = mathopt.Model.from_model_proto(self._proto(costs * scale, integer))
        # A fixed seed and no time limit: the same program always gives the same plan.
        parameters = mathopt.SolveParameters(random_seed=1, relative_gap_tolerance=0.0)
        if not integer:
            small = len(costs) < _WORTH_PRESOLVING
            presolve = mathopt.Emphasis.OFF if small else None
            parameters = mathopt.SolveParameters(random_seed=1, presolve=presolve)
        result = mathopt.solve(model, _SOLVERS[solver], params=parameters, model_params=_VALUES)
        reason = result.termination.reason
        if reason in (
            mathopt.TerminationReason.INFEASIBLE,
            mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED,
        ):
            raise Infeasible("the sharding program has no solution")
        if reason != mathopt.TerminationReason.OPTIMAL:
            raise ShardwrightError(f"{solver} stopped without an optimum: {result.termination}")
        variables = list(model.variables())
        values = np.asarray(result.variable_values(variables), dtype=np.float64)
        bound = result.dual_bound() / scale
        return Solution(values, float(np.dot(costs, values)), bound, "mip")

    def _proto(self, costs: NDArray[np.float64], integer: bool) -> model_pb2.ModelProto:
        proto = model_pb2.ModelProto()
        proto.CopyFrom(self._constraints())
        if integer:
            proto.variables.integers[:] = self._integer
        present = np.nonzero(costs)[0]
        proto.objective.linear_coefficients.ids.extend(present.tolist())
        proto.objective.linear_coefficients.values.extend(costs[present].tolist())
        return proto

    def _constraints(self) -> model_pb2.ModelProto:
        """The relaxation without its objective; made anew when the program has grown."""
        count, rows, entries = len(self._costs), len(self._lower), len(self._rows)
        if self._made is not None and self._made[0] == (count, rows, entries):
            return self._made[1]
        proto = model_pb2.ModelProto()
        proto.variables.ids.extend(range(count))
        proto.variables.lower_bounds.extend([0.0] * count)
        proto.variables.upper_bounds.extend([1.0] * count)
        proto.variables.integers.extend([False] * count)
        proto.linear_constraints.ids.extend(range(rows))
        proto.linear_constraints.lower_bounds.extend(self._lower)
        proto.linear_constraints.upper_bounds.extend(self._upper)
        key = np.asarray(self._rows, dtype=np.int64) * count + np.asarray(self._columns)
        unique, inverse = np.unique(key, return_inverse=True)
        summed = np.zeros(len(unique))
        np.add.at(summed, inverse, self._coefficients)
        proto.linear_constraint_matrix.row_ids.extend((unique // count).tolist())
        proto.linear_constraint_matrix.column_ids.extend((unique % count).tolist())
        proto.linear_constraint_matrix.coefficients.extend(summed.tolist())
        self._made = (count, rows, entries), proto
        return proto


def _scale(costs: NDArray[np.float64]) -> float:
    """What makes the largest cost `_LARGEST_COST`."""
    largest = float(np.abs(costs).max(initial=0.0))
    return _LARGEST_COST / largest if largest > 0 else 1.0
