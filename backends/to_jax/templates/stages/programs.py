"""The programs of one stage: the passes of a microbatch, and what is done once a step.

The forward pass hands on what it saves, as arrays; which program reads them again is known when it
has been traced. What it saves of the parameters is left out: they are given to both passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import model
import settings
from blocks import Params
from jax import Array, lax
from jax.sharding import PartitionSpec
from mesh import AXES, SHARES, is_here, stage_mesh, wide_dtype
from parallel import (
    arrays,
    batch_specs,
    gradient_specs,
    made_here,
    parameter_specs,
    shapes,
    sharding,
    together,
)
from step import (
    Adam,
    Values,
    along_dp,
    microbatches,
    scale_of,
    scattered,
    squares,
    state_specs,
    summed,
    update,
)
from typed import varying

PP, STAGES = settings.MESH["pp"], len(model.STAGES)

_PER_RANK = PartitionSpec(("dp",) if "dp" in AXES else ())
"""How a number of every data-parallel rank lies."""


class Stage:
    """The programs of one stage, which are compiled when they are first called."""

    def __init__(self, index: int, adam: Adam | None = None) -> None:
        self.index, self.adam = index, adam
        self.rank, self.is_last = index % PP, index == STAGES - 1
        self.here = is_here(self.rank)
        self.mesh = stage_mesh(self.rank)
        self.keys = list(shapes()[index])
        self.taken = model.CARRIED[index - 1] if index else ()
        self.given = () if self.is_last else model.CARRIED[index]
        self.parameters = {key: parameter_specs()[key] for key in self.keys}
        self.specs = {k: s for k, s in gradient_specs().items() if k in self.parameters}
        self.sums = {key: _sum_spec(key) for key in self.specs}
        self.saved: list[PartitionSpec] | None = None
        self.backward_of: Any = None  # the backward pass of a microbatch, but for what it saves
        self.forward = self._compiled(
            self._forward,
            lambda: (self.parameters, _specs(self.taken), batch_specs(), *[PartitionSpec()] * 3),
            lambda: ([_PER_RANK] if self.is_last else _specs(self.given), self.saved),
            before=self._find_types,
        )
        self.backward = self._compiled(
            self._backward,
            lambda: (self.parameters, self.saved, _specs(self.given), self.sums),
            lambda: (_specs(self.taken), self.sums),
            donate=(3,),
        )
        self.scale = self._compiled(scale_of, lambda: (batch_specs(),), PartitionSpec)
        self.loss = self._compiled(_total, lambda: (_PER_RANK,), PartitionSpec)
        self.reduce = self._compiled(self._reduce, lambda: (self.sums,), lambda: self.specs)
        self.square = self._compiled(self._square, lambda: (self.specs,), PartitionSpec)
        if adam is not None:
            of_state = state_specs(adam, self.specs)
            self.update = self._compiled(
                functools.partial(update, adam),
                lambda: (self.parameters, of_state, self.specs, PartitionSpec()),
                lambda: (self.parameters, of_state),
                donate=(0, 1, 2),
            )

    def _compiled(
        self,
        f: Callable[..., Any],
        takes: Callable[[], Any],
        gives: Callable[[], Any],
        donate: tuple[int, ...] = (),
        before: Callable[..., None] | None = None,
    ) -> Callable[..., Any]:
        """`f` on the devices of the stage, compiled at its first call; `before` is called first."""
        found: list[Callable[..., Any]] = []

        def call(*args: Any) -> Any:
            if not found:
                if before is not None:
                    before(takes(), args)
                mapped = jax.shard_map(
                    f, mesh=self.mesh, in_specs=takes(), out_specs=gives(), check_vma=True
                )
                found.append(jax.jit(mapped, donate_argnums=donate))
            return found[0](*args)

        return call

    def _find_types(self, takes: Any, args: Sequence[Any]) -> None:
        """Traces the forward pass to learn along which axes what it saves varies."""

        def types_only(*given: Any) -> tuple[()]:
            _, saved = self._forward(*given)
            self.saved = [
                PartitionSpec(tuple(a for a in self.mesh.axis_names if a in varying(x)))
                for x in saved
            ]
            return ()

        mapped = jax.shard_map(
            types_only, mesh=self.mesh, in_specs=takes, out_specs=(), check_vma=True
        )
        jax.eval_shape(mapped, *args)

    def _forward(
        self,
        params: Values,
        taken: Sequence[Array],
        batch: Values,
        microbatch: Array,
        scale: Array | None,
        key: Array | None,
    ) -> tuple[list[Array], list[Array]]:
        """What a microbatch's forward pass gives, and what it saves for the backward pass."""
        rows = {name: microbatches(name, value)[microbatch] for name, value in batch.items()}
        if key is not None:
            key = jax.random.split(key, settings.MICROBATCHES)[microbatch]

        def stage(values: Params, given: list[Array]) -> list[Array]:
            found = model.STAGES[self.index](values, *given, **rows, key=key)
            if not self.is_last:
                return list(found) if isinstance(found, tuple) else [found]
            summands = tuple(a for a, kind in model.LOSS_TYPES.items() if kind == "P" and a != "dp")
            return [(lax.psum(found, summands) if summands else found) * scale]

        results, backward = jax.vjp(stage, self._whole(params), [x[0] for x in taken])
        backward.args_res[0] = None  # parameters are there anyway
        saved, self.backward_of = jax.tree.flatten(backward)
        return [x[None] for x in results], [x[None] for x in saved]

    def _whole(self, params: Values) -> Params:
        return together({name: along_dp(value) for name, value in params.items()})

    def _backward(
        self, params: Values, saved: list[Array], given: list[Array], sums: Values
    ) -> tuple[list[Array], Values]:
        """The gradients of what a microbatch took; those of parameters are added to `sums`."""
        backward = jax.tree.unflatten(self.backward_of, [x[0] for x in saved])
        backward.args_res[0] = tuple(jax.tree.leaves(self._whole(params)))
        found, taken = backward([_one()] if self.is_last else [x[0] for x in given])
        parts = {name: self._part(name, found.values[name]) for name in sums}
        return [x[None] for x in taken], {
            name: sums[name] + (part[None] if _is_summand(name) else part)
            for name, part in parts.items()
        }

    def _part(self, name: str, gradient: Array) -> Array:
        return scattered(name, gradient) if settings.ZERO == 2 else gradient

    def _reduce(self, sums: Values) -> Values:
        """The gradients of a step, from those that accumulated."""
        return {
            name: summed(name, value[0] if _is_summand(name) else value)
            for name, value in sums.items()
        }

    def _square(self, gradients: Values) -> Array:
        """The sum of squares of the gradients of which this is the first stage."""
        first = {n: arrays()[n].parameter.stages[0] for n in gradients}
        return squares({n: g for n, g in gradients.items() if first[n] == self.index})[None]

    def zeros(self) -> Values:
        """Where gradients accumulate."""
        like = {name: self._sum_like(name) for name in self.sums}
        return made_here(lambda: {n: jnp.zeros(a.shape, a.dtype) for n, a in like.items()}, like)

    def _sum_like(self, name: str) -> jax.ShapeDtypeStruct:
        many = (settings.MESH["dp"],) if _is_summand(name) else ()
        lies = sharding(self.sums[name], self.index)
        return jax.ShapeDtypeStruct((*many, *arrays()[name].shape), wide_dtype(), sharding=lies)


def _specs(carried: Sequence[Any]) -> list[PartitionSpec]:
    return [each.spec() for each in carried]


def _one() -> Array:
    """The gradient of a microbatch's loss, which varies along dp."""
    one = jnp.ones((), wide_dtype())
    return lax.pcast(one, "dp", to="varying") if "dp" in AXES else one


def _total(losses: list[Array]) -> Array:
    """The loss of a step, from those of its microbatches on this data-parallel rank."""
    total = sum(losses, jnp.zeros(1, wide_dtype()))
    return lax.psum(total, "dp") if "dp" in AXES else total


def _is_summand(name: str) -> bool:
    """Whether the gradient that a device accumulates is a summand along dp: it is reduced once a
    step. With ZeRO 2 and 3 a part of the sum over dp accumulates."""
    split = SHARES and settings.ZERO > 1 and arrays()[name].shared is not None
    return "dp" in AXES and not split


def _sum_spec(name: str) -> PartitionSpec:
    """How what accumulates lies: summands are apart along a dim of their own."""
    if _is_summand(name):
        return PartitionSpec("dp", *parameter_specs()[name])
    return gradient_specs()[name]
