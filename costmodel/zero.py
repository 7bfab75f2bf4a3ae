"""Over how many ranks ZeRO splits each kind of state."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class ZeroShards:
    """Ranks that share out a copy of the parameters, of the gradients, of the optimizer's state.

    Groups are neighbouring data-parallel ranks and nested, each a whole number of the one before:
    parameters are gathered most often and lie on the fastest links, the optimizer's state is
    touched once a step. All alike is ZeRO over one group (hybrid sharding; MiCS,
    arXiv:2205.00119); parameters within a node and the rest over all ranks is ZeRO++'s secondary
    partition (hpZ, arXiv:2306.10209); three different ones are Frontier's three levels
    (arXiv:2501.04266).
    """

    parameters: int
    gradients: int
    optimizer: int

    @staticmethod
    def even(shards: int) -> ZeroShards:
        """The same group for all."""
        return ZeroShards(shards, shards, shards)

    @staticmethod
    def of(shards: int | ZeroShards) -> ZeroShards:
        """A number of ranks for all, or the groups themselves; raises InvalidInput where they are
        not nested."""
        found = ZeroShards.even(shards) if isinstance(shards, int) else shards
        if min(found.parameters, found.gradients, found.optimizer) < 1:
            raise InvalidInput(f"ZeRO over {found.text} ranks: expected at least 1")
        if found.gradients % found.parameters or found.optimizer % found.gradients:
            raise InvalidInput(
                f"ZeRO over {found.text} ranks (parameters, gradients, optimizer state): expected "
                "each to divide the next"
            )
        return found

    def split(self, stage: int) -> ZeroShards:
        """What a stage splits of it: nothing at 0, the optimizer's state from 1 on, gradients from
        2, parameters from 3 (arXiv:1910.02054). Raises InvalidInput for another stage."""
        if stage not in (0, 1, 2, 3):
            raise InvalidInput(f"zero_stage is {stage}, expected 0, 1, 2 or 3")
        return ZeroShards(
            self.parameters if stage == 3 else 1,
            self.gradients if stage >= 2 else 1,
            self.optimizer if stage >= 1 else 1,
        )

    @property
    def uniform(self) -> bool:
        """Whether all have the same group."""
        return self.parameters == self.gradients == self.optimizer

    @property
    def text(self) -> str:
        """`8`, or `8-16-64` where they differ."""
        every = (self.parameters, self.gradients, self.optimizer)
        return str(every[0]) if self.uniform else "-".join(map(str, every))
