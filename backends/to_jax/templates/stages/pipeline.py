"""One training step of a pipeline: stages are programs of their own, called as the schedule says.

Every process calls the programs of the devices that it has, all in one order; JAX returns before
they are done, so that stages run at the same time. The programs of a stage are in programs.py, what
they send each other in links.py, the order in schedule.py. Gradients accumulate on the devices, and
are summed over dp as in step.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import model
import numpy as np
import settings
from jax import Array
from links import on_rank, over_ranks, send
from mesh import is_here, wide_dtype
from parallel import arrays, gradient_specs, made_here, sharding
from programs import PP, STAGES, Stage
from schedule import waves
from step import Adam, Values, state_specs

__all__ = ["Adam", "create_state", "gradients", "train_step"]

Stages = list[Values]
"""Parameters or gradients of every stage."""


class Pipeline:
    """All stages, and the order of their work."""

    def __init__(self, adam: Adam | None = None) -> None:
        self.stages = [Stage(i, adam) for i in range(STAGES)]
        self.waves = waves(settings.SCHEDULE, PP, STAGES, settings.MICROBATCHES)

    def gradients(self, params: Stages, batch: Values, key: Array | None) -> tuple[Array, Stages]:
        """The loss of the global batch, and of every stage the gradients."""
        run = Run(self.stages, params, batch, key)
        for wave in self.waves:
            for kind, stage, microbatch in wave:
                run.forward(stage, microbatch) if kind == "F" else run.backward(stage, microbatch)
            for kind, stage, microbatch in wave:
                run.send(kind, stage, microbatch)
        found = [
            s.reduce(sums) if s.here else {} for s, sums in zip(self.stages, run.sums, strict=True)
        ]
        return run.loss(), _with_copies(found)

    def step(self, params: Stages, state: list[Any], batch: Values, key: Array | None) -> Any:
        """Parameters and state after a step, its loss and its gradients' norm before clipping."""
        loss, found = self.gradients(params, batch, key)
        squares = [
            {s.rank: s.square(g)} if s.here else {} for s, g in zip(self.stages, found, strict=True)
        ]
        norm = jnp.sqrt(over_ranks(*squares))
        for i, stage in enumerate(self.stages):
            if stage.here:
                here = on_rank(norm, stage.rank)
                params[i], state[i] = stage.update(params[i], state[i], found[i], here)
        return params, state, loss, norm


class Run:
    """What there is in the course of a step."""

    def __init__(
        self, stages: list[Stage], params: Stages, batch: Values, key: Array | None
    ) -> None:
        self.stages, self.params, self.key = stages, params, key
        here = [rank for rank in range(PP) if is_here(rank)]
        self.batch = {r: {n: on_rank(x, r) for n, x in batch.items()} for r in here}
        self.sums = [stage.zeros() for stage in stages]
        last = stages[-1]
        self.scale = last.scale(self.batch[last.rank]) if last.here else None
        self.losses: list[Array] = []
        self.saved: dict[tuple[int, int], list[Array]] = {}
        self.arrived: dict[tuple[str, int, int], list[Array]] = {}
        self.leaving: dict[tuple[str, int, int], list[Array]] = {}

    def forward(self, stage: int, microbatch: int) -> None:
        """A microbatch's forward pass through a stage."""
        program = self.stages[stage]
        if not program.here:
            return
        results, saved = program.forward(
            self.params[stage],
            self.arrived.pop(("F", stage, microbatch), []),
            self.batch[program.rank],
            np.int32(microbatch),
            self.scale if program.is_last else None,
            self.key,
        )
        self.saved[stage, microbatch] = saved
        if program.is_last:
            self.losses += results
        else:
            self.leaving["F", stage, microbatch] = results

    def backward(self, stage: int, microbatch: int) -> None:
        """A microbatch's backward pass through a stage."""
        program = self.stages[stage]
        if not program.here:
            return
        taken, self.sums[stage] = program.backward(
            self.params[stage],
            self.saved.pop((stage, microbatch)),
            self.arrived.pop(("B", stage, microbatch), []),
            self.sums[stage],
        )
        self.leaving["B", stage, microbatch] = taken

    def send(self, kind: str, stage: int, microbatch: int) -> None:
        """Hands on what a stage made of a microbatch: activations, or their gradients."""
        other = stage + 1 if kind == "F" else stage - 1
        values = self.leaving.pop((kind, stage, microbatch), None)
        if not 0 <= other < STAGES:
            return
        source, target = stage % PP, other % PP
        like = [each.lies(source) for each in model.CARRIED[min(stage, other)]]
        arrived = send(values, like, source, target)
        if arrived is not None:
            self.arrived[kind, other, microbatch] = arrived

    def loss(self) -> Array:
        """The loss of the step, on all devices."""
        last = self.stages[-1]
        return over_ranks({last.rank: last.loss(self.losses)} if last.here else {})


def _with_copies(found: Stages) -> Stages:
    """The gradients of what several stages hold are the sum of theirs, added in one order so that
    the copies stay equal."""
    for name in gradient_specs():
        holders = arrays()[name].parameter.stages
        if len(holders) < 2:
            continue
        everyone = {
            target: [_moved(found, name, source, target) for source in holders]
            for target in holders
        }
        for target, copies in everyone.items():
            if is_here(target % PP):
                found[target] = found[target] | {name: _sum(copies)}
    return found


def _moved(found: Stages, name: str, source: int, target: int) -> Array | None:
    """The gradient that one stage has of a parameter, on the devices of another."""
    here, there = source % PP, target % PP
    if here == there:
        return found[source].get(name)
    lies = sharding(gradient_specs()[name], source)
    like = jax.ShapeDtypeStruct(arrays()[name].shape, wide_dtype(), sharding=lies)
    values = [found[source][name]] if is_here(here) else None
    moved = send(values, [like], here, there)
    return moved[0] if moved is not None else None


@jax.jit
def _sum(copies: list[Array]) -> Array:
    return sum(copies[1:], copies[0])


# --- compiled ------------------------------------------------------------------------------------


def gradients() -> Callable[..., tuple[Array, Stages]]:
    """`(params, batch, key) → (loss, gradients)`; `key` is None without dropout."""
    return Pipeline().gradients


def create_state(adam: Adam, params: Stages) -> list[Any]:
    """AdamW's state of every stage, split as ZeRO says from the beginning."""
    found = []
    for stage, part in enumerate(params):
        trained = {name: value for name, value in part.items() if name in gradient_specs()}
        init, specs = adam.transformation().init, {n: gradient_specs()[n] for n in trained}
        lies = [sharding(spec, stage) for spec in jax.tree.leaves(state_specs(adam, specs))]
        leaves, structure = jax.tree.flatten(jax.eval_shape(init, trained))
        like = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=each)
            for leaf, each in zip(leaves, lies, strict=True)
        ]
        found.append(made_here(init, structure.unflatten(like), trained))
    return found


def train_step(adam: Adam) -> Callable[..., Any]:
    """`(params, state, batch, key) → (params, state, loss, norm)`; takes over the memory of params
    and state."""
    return Pipeline(adam).step
