"""Why nothing fits, and the least that would have to change: more nodes, shorter sequences, or the
optimizer's state in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import isfinite

import numpy as np

from ..costmodel.memory import state_bytes
from ..ir import Infeasible, InvalidInput, ShardwrightError
from ..ir.workload import Workload
from .bounds import variant_floors
from .candidates import Candidate
from .fix import Fix
from .footprint import Parameters, held_state
from .report import GIB
from .request import Request
from .solving import Outcome, Solving
from .space import allowed, counts, heads, most_devices
from .stages import Shortfall

_MOST_NODES = 4096
"""Nodes of the largest cluster that is looked at for one that fits."""
_LENGTHS = 16
"""Parts of a sequence that one that fits is told to."""
_WHOLE_TOKENS = 64
"""What the length of a shorter sequence is a multiple of, where the one asked for is."""


def infeasible(
    solving: Solving, anything: bool, short: Sequence[tuple[float, Candidate]]
) -> ShardwrightError:
    """What to raise where nothing fits. `short`: the bytes that candidates need on a device, not a
    number where that is not known yet."""
    known = []
    for needed, candidate in short:
        if not isfinite(needed):
            cut = solving.cut(candidate)
            needed = cut.needed_bytes if isinstance(cut, Shortfall) else float("inf")
        known.append((needed, candidate))
    if not known:
        return InvalidInput(_useless(solving.request))
    needed, candidate = min(known)
    if needed == float("inf"):
        return Infeasible(_contradiction(solving.request, candidate))
    return Infeasible(_Shortage(solving, anything, needed, candidate).text())


def _contradiction(request: Request, candidate: Candidate) -> str:
    pins = ", ".join(
        f"{p.name or 'the model'}={p.stage}" for p in request.model.pins if p.stage >= 0
    )
    stages = request.fix.stages
    layers = f" and stages={'-'.join(map(str, stages))}" if stages else ""
    return (
        f"no cut into pp={candidate.pp} stages keeps the stage pins ({pins}){layers}: stages "
        "are contiguous, in order, and hold at least one layer or end of the model each"
    )


def _useless(request: Request) -> str:
    if request.fix.tp is None:
        return (
            f"--fix: no configuration of {request.cluster.world_size} devices has all of "
            f"{request.fix}; fix less"
        )
    return (
        f"--fix: tp={request.fix.tp}: no operation of the model can be split over "
        f"{request.fix.tp} devices (heads, hidden sizes and sequence length "
        f"{request.workload.seq_len} do not divide by it)"
    )


class _Shortage:
    """What is short by how much, and what would do."""

    def __init__(
        self, solving: Solving, anything: bool, needed_bytes: float, thriftiest: Candidate
    ) -> None:
        self.solving, self.anything = solving, anything
        self.request = solving.request
        self.hardware = self.request.hardware or self.request.cluster
        self.needed_bytes, self.thriftiest = needed_bytes, thriftiest

    def text(self) -> str:
        request, needed = self.request, self.needed_bytes
        limit = request.limit_bytes
        smallest = min(self.hardware.device_kinds, key=lambda kind: kind.memory_limit_bytes)
        return (
            f"no plan fits: the thriftiest configuration ({self.thriftiest.key}) needs "
            f"{needed / GIB:.1f} GiB per device, {smallest.name} has "
            f"{limit / GIB:.1f} GiB usable: {(needed - limit) / GIB:.1f} GiB short; "
            + "; ".join(part for part in (self._nodes(), *self._others()) if part)
        )

    def _others(self) -> Iterator[str]:
        """What would do on the nodes that there are."""
        length = self._length()
        if length is not None:
            yield f"sequences of {length:,} tokens would fit these nodes"
        size = self._optimizer_bytes()
        room = [kind.host_memory_bytes for kind in self.hardware.device_kinds]
        too_small = any(known is not None and known < size for known in room)
        if not too_small and self._fits_where(
            lambda request: replace(request, optimizer_on_host=True)
        ):
            yield (
                f"with the optimizer's state in host memory ({size / GIB:.1f} GiB per device) it "
                "would fit these nodes"
            )

    # --- more nodes ------------------------------------------------------------------------------

    def _nodes(self) -> str:
        request, cluster = self.request, self.request.cluster
        devices = cluster.devices_per_node
        smallest = self._smallest_cluster(request.fix, cluster.nodes + 1)
        if smallest is not None:
            return f"the smallest cluster that fits is {_nodes(smallest, devices)}"
        free = replace(request.fix, pp=None, dp=None, stages=None)
        smallest = self._smallest_cluster(free, cluster.nodes) if free != request.fix else None
        if smallest is not None:
            return (
                f"nor does it fit a larger cluster with {request.fix}; without pp, dp and "
                f"stages {_nodes(smallest, devices)} would do"
            )
        filled = f"that a batch of {request.workload.global_batch} sequences can fill"
        few = most_devices(request) < _MOST_NODES * devices
        return "nor does it fit any larger cluster of this kind " + (
            filled if few else f"of up to {_nodes(_MOST_NODES, devices)}"
        )

    def _smallest_cluster(self, fix: Fix, start: int) -> int | None:
        """Nodes of the smallest cluster from `start` nodes on where some configuration fits.

        What fits is not monotone in the nodes (degrees must divide them and the batch), so every
        count is looked at, those aside whose memory all together is too little.
        """
        request, cluster = replace(self.request, fix=fix), self.request.cluster
        state = state_bytes(request.model.elements, request.precision, 3, shards=1).total
        largest = max(kind.memory_limit_bytes for kind in self.hardware.device_kinds)
        start = max(start, -(-state // (largest * cluster.devices_per_node)))
        last = min(_MOST_NODES, most_devices(request) // cluster.devices_per_node)

        def with_nodes(nodes: int) -> Callable[[Request], Request]:
            def larger(_: Request) -> Request:
                grown = self.hardware.resized(nodes)
                return replace(request, cluster=grown.at_slowest(), hardware=grown)

            return larger

        fitting = (n for n in range(start, last + 1) if self._fits_where(with_nodes(n)))
        return next(fitting, None)

    # --- other work on the same nodes ------------------------------------------------------------

    def _length(self) -> int | None:
        """The longest sequence that fits, to a sixteenth of the one asked for."""
        tokens = self.request.workload.seq_len
        whole = _WHOLE_TOKENS if tokens % _WHOLE_TOKENS == 0 else 1
        lengths = [tokens * part // _LENGTHS // whole * whole for part in range(1, _LENGTHS)]

        def shorter(length: int) -> Callable[[Request], Request]:
            return lambda request: replace(
                request,
                workload=Workload(**{**request.workload.model_dump(), "seq_len": length}),
            )

        fits, too_long = 0, _LENGTHS  # of a part of the sequence; what fits does so when shorter
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            length = lengths[middle - 1]
            if length and self._fits_where(shorter(length)):
                fits = middle
            else:
                too_long = middle
        return lengths[fits - 1] if fits else None

    def _optimizer_bytes(self) -> int:
        """The optimizer's state on a device of the thriftiest configuration, on average."""
        inners = self.solving.inners(self.thriftiest)
        assert inners is not None
        held = Parameters.of(self.request, inners[0], 0, len(self.request.model.segments))
        state = held_state(self.request, self.thriftiest, held.dense, held.experts)
        return state.optimizer // self.thriftiest.pp

    def _fits_where(self, changed: Callable[[Request], Request]) -> bool:
        """Whether some configuration fits the memory of a changed problem."""
        try:
            request = changed(self.request)
            like = self.solving if request.workload == self.request.workload else None
            other = Solving(request, self.solving.solver, like, self.anything)
            every = heads(request)
        except InvalidInput:
            return False
        options = [head for head in every if counts(head, self.anything)]
        smallest = min((head.micro_batch for head in options), default=0)
        return any(self._fits(other, head) for head in options if head.micro_batch == smallest)

    def _fits(self, solving: Solving, head: Candidate) -> bool:
        """Whether some variant of a set of degrees does."""
        inners, options = solving.inners(head), allowed(solving.request, head, self.anything)
        if inners is None or not options:
            return False
        floors = variant_floors(solving.request, options, inners)
        possible = [options[i] for i in np.flatnonzero(np.isfinite(floors))]
        return any(isinstance(solving.solve(each), Outcome) for each in possible)


def _nodes(count: int, devices: int) -> str:
    return f"{count} node{'s' * (count > 1)} of {devices} device{'s' * (devices > 1)}"
