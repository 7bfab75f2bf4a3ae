"""Routers of mixtures of experts: `top_k` with values and indices becomes gates per expert.

A router gives every token k weights and k experts, and whatever follows (sorts, counts, one-hot
products) reads these. The op table's `top_k` says the same per token and *expert*: its gate, 0
where it is not chosen, and whether it is. What is computed from the k weights alone is drawn again
per expert; what is computed from the choice is known by its values, for choices that are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from ..errors import UnsupportedOp
from ..graph import SLOTS, Dims
from .draft import Draft, Op, Wire, ancestors
from .evaluate import Array, NoValue, Settings
from .softmax import size_of

BEFORE_CHOICE = ("softmax", "sigmoid", "exp")
"""What keeps the order of scores: f(the k largest) are the k largest of f."""

LOOKUPS = ("jax.gather",)
"""What reads entries at places, in the words of the tracers."""

_SIZES = ((2, 5, 0), (3, 4, 1))
"""Batch, sequence and seed of the choices that are tried."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A choice that is drawn: experts [tokens, k], all of a token's different; weights likewise."""

    b: int
    s: int
    experts: Array
    weights: Array

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """The shape of dims of the draft."""
        return tuple(prod(size_of(n, self.b, self.s) for n in dim) for dim in dims)


@dataclass(slots=True)
class Router:
    """A `choose` of the draft, attributes k and place, with scores b s e."""

    draft: Draft
    op: Op
    make: Settings
    trials: list[Trial] = field(default_factory=list)
    gates: dict[Wire, Wire] = field(default_factory=dict)
    """Weights per choice [..., k] → gates per expert [b, s, e]."""
    totals: dict[Wire, Wire] = field(default_factory=dict)
    """One number per token, from its weights → [b, s, 1]."""
    chosen: Wire = field(init=False)

    def __post_init__(self) -> None:
        scores = self.op.operands[0]
        if [n for dim in scores.dims[:-1] for n in dim] != ["b", "s"]:
            shown = " x ".join("·".join(map(str, dim)) or "1" for dim in scores.dims)
            raise UnsupportedOp(
                f"{self.where}: scores of {shown}; expected those of a router, [batch, sequence, "
                "experts] or flattened to [batch·sequence, experts]"
            )
        for b, s, seed in _SIZES:
            drawn = np.random.default_rng(seed)
            experts = np.argsort(drawn.random((b * s, self.experts)), -1)[:, : self.k]
            self.trials.append(Trial(b, s, experts, 0.5 + drawn.random(experts.shape)))
        self._per_expert()

    @property
    def k(self) -> int:
        return int(self.op.attributes["k"])

    @property
    def experts(self) -> int:
        (size,) = self.op.operands[0].dims[-1] or (1,)
        return int(size)

    @property
    def where(self) -> str:
        return f"op top_k at {self.op.attributes['place']}"

    def by_token(self, wire: Wire, before: Op) -> Wire:
        """A wire of one row per token as [b, s, ...]."""
        dims: Dims = (("b",), ("s",), wire.dims[-1])
        if wire.dims == dims:
            return wire
        return self.draft.add(
            "reshape", [wire], dims, module=before.module, before=before
        ).result  # fmt: skip

    def _per_expert(self) -> None:
        """Draws the top_k, and again per expert what is computed from the k weights alone."""
        draft, op = self.draft, self.op
        scores, values = op.operands[0], op.results[0]
        first = [r for w in self._casts(values) for r in draft.readers(w) if r.kind != "cast"]
        early = first[0].kind if first and first[0].kind in BEFORE_CHOICE else ""
        if early and any(r.kind != early for r in first):
            early = ""
        x = self.by_token(scores, op)
        if early:
            dtype = first[0].result.dtype
            if dtype != x.dtype:
                x = draft.add("cast", [x], x.dims, dtype=dtype, attributes={"to": dtype},
                              module=op.module, before=op).result  # fmt: skip
            x = draft.add(early, [x], x.dims, dtype=dtype, module=op.module, before=op).result
        made = draft.add(
            "top_k", [x], (x.dims, x.dims), count=2, dtype=x.dtype, module=op.module, before=op,
            attributes={"k": self.k},
        )  # fmt: skip
        gates, self.chosen = made.results
        self.chosen.dtype, self.chosen.grad = "bool", False
        if early:
            for reader in first:
                same = self._normalised(gates, reader) if early == "softmax" else gates
                self.gates[reader.result] = same
        else:
            self.gates[values] = gates
        for each in list(draft.ops):
            self._again(each)

    def _casts(self, wire: Wire) -> list[Wire]:
        found = [wire]
        for each in found:
            found += [r.result for r in self.draft.readers(each) if r.kind == "cast"]
        return found

    def _normalised(self, gates: Wire, before: Op) -> Wire:
        """A softmax over the chosen is that over all experts, divided by the sum of the chosen."""
        return self._op("div", [gates, self._total(gates, before)], gates.dims, before)

    def _total(self, gates: Wire, before: Op) -> Wire:
        return self._op(
            "sum", [gates], (*gates.dims[:-1], ()), before, dims=[-1], keepdim=True
        )  # fmt: skip

    def _op(
        self, kind: str, operands: Sequence[Wire], dims: Dims, like: Op, /, **attributes: object
    ) -> Wire:
        return self.draft.add(
            kind, operands, dims, dtype=like.results[0].dtype, attributes=attributes,
            module=like.module, before=like,
        ).result  # fmt: skip

    def _again(self, op: Op) -> None:
        """Adds what an op computes from weights to `gates` or `totals`."""
        if len(op.results) != 1 or not op.operands:
            return
        a, b = op.operands[0], op.operands[-1]
        if op.kind in LOOKUPS:
            self._looked_up(op)
            return
        known = self.gates.get(a)
        if known is not None and op.kind in ("cast", "scale"):
            self.gates[op.result] = self._op(op.kind, [known], known.dims, op, **op.attributes)
        elif known is not None and op.kind == "sum" and op.attributes["dims"] == [a.rank - 1]:
            self.totals[op.result] = self._total(known, op)
        elif known is not None and op.kind in ("div", "mul") and (all_ := self._total_of(b)):
            self.gates[op.result] = self._op(op.kind, [known, all_], known.dims, op)
        elif (all_ := self._total_of(a)) and op.kind in ("cast", "scale", "shift", "power"):
            self.totals[op.result] = self._op(op.kind, [all_], all_.dims, op, **op.attributes)

    def _looked_up(self, op: Op) -> None:
        """Scores of all experts, looked up at those that were chosen by others: the weights of a
        router whose choice is biased (DeepSeek-V3, arXiv:2412.19437, section 2.1.2)."""
        scores = op.operands[0]
        flat = [n for dim in scores.dims for n in dim]
        if flat != ["b", "s", self.experts] or not self.reads(op.operands[-1]):
            return
        if scores.source is None or op.result.source is None:
            return
        drawn = [np.random.default_rng(2).random((t.b * t.s, self.experts)) for t in self.trials]
        given = [x.reshape(t.shape(scores.dims)) for x, t in zip(drawn, self.trials, strict=True)]
        try:
            values = self.values(op.result, [(scores, given)])
        except NoValue:
            return
        pairs = zip(drawn, self.trials, strict=True)
        wanted = (np.take_along_axis(x, trial.experts, 1) for x, trial in pairs)
        if all(map(same, values, wanted)):
            marks = self._op("cast", [self.chosen], self.chosen.dims, op, to=op.result.dtype)
            x = self.by_token(scores, op)
            self.gates[op.result] = self._op("mul", [x, marks], marks.dims, op)

    def _total_of(self, wire: Wire) -> Wire | None:
        while wire not in self.totals and (op := wire.made_by("reshape", "expand")):
            wire = op.operands[0]
        return self.totals.get(wire)

    # -- values -----------------------------------------------------------------------------------

    def values(self, wire: Wire, known: Sequence[tuple[Wire, Sequence[Array]]] = ()) -> list[Array]:
        """A wire's value in each trial; `known` are wires with theirs. Raises NoValue."""
        found = []
        for i, trial in enumerate(self.trials):
            given = {self.op.results[1].source: self._choices(trial)}
            given |= {each.source: values[i] for each, values in known}
            found.append(self.make(trial.b, trial.s, known=given)(wire.source))
        return found

    def _choices(self, trial: Trial) -> Array:
        return trial.experts.reshape(trial.shape(self.op.results[1].dims))

    def weights(self, wire: Wire) -> tuple[Wire, list[Array]] | None:
        """(gates, values in each trial) of what is moved or summed from one form of the weights."""
        forms = self.forms([wire])
        if len(forms) != 1 or wire.source is None:
            return None
        given = [t.weights.reshape(t.shape(forms[0].dims)) for t in self.trials]
        try:
            return self.gates[forms[0]], self.values(wire, [(forms[0], given)])
        except NoValue:
            return None

    def forms(self, wires: Sequence[Wire]) -> list[Wire]:
        """The forms of the weights that these are computed from."""
        met = ancestors(wires, lambda each: each in self.gates)
        return [each for each in met if each in self.gates and each.source is not None]

    def reads(self, wire: Wire) -> bool:
        """Whether a wire depends on the choice."""
        return self.op.results[1] in ancestors([wire])

    def marks(self, weighted: bool) -> Iterator[Array]:
        """Per token and expert: the weight, or 1, of the chosen."""
        for trial in self.trials:
            marks = np.zeros((len(trial.experts), self.experts))
            rows = np.arange(len(trial.experts))[:, None]
            marks[rows, trial.experts] = trial.weights if weighted else 1
            yield marks


def same(have: Array, want: Array) -> bool:
    """Whether values are the same to rounding, shapes aside."""
    return have.size == want.size and np.allclose(
        have.reshape(want.shape).astype(np.float64), want, rtol=1e-9, atol=1e-12
    )


def routers(draft: Draft, make: Settings) -> list[Router]:
    """Every router of the draft, drawn per expert."""
    return [Router(draft, op, make) for op in draft.each("choose")]


def dispatched(draft: Draft, router: Router, tokens: Wire, before: Op) -> Wire:
    """The slots of tokens, e (b c) h."""
    x = router.by_token(tokens, before)
    dims: Dims = ((router.experts,), ("b", SLOTS), x.dims[-1])
    return draft.add(
        "moe_dispatch", [x, router.chosen], dims, dtype=x.dtype, module=before.module,
        attributes={"experts": router.experts, "top_k": router.k}, before=before,
    ).result  # fmt: skip


def combined(draft: Draft, router: Router, slots: Wire, gates: Wire, before: Op) -> Wire:
    """The sum of a token's slots times its gates, b s h."""
    dims: Dims = (("b",), ("s",), slots.dims[-1])
    return draft.add(
        "moe_combine", [slots, gates, router.chosen], dims, dtype=before.results[0].dtype,
        attributes={"experts": router.experts, "top_k": router.k}, module=before.module,
        before=before,
    ).result  # fmt: skip
