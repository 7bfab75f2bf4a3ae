"""Changes of the model itself that a plan may make, only where they are asked for.

They train another model, or train it otherwise: how well that learns is not ours to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from ..ir import InvalidInput

NAMES = ("parallel-block", "ladder-residual", "local-update")


@dataclass(frozen=True, slots=True)
class Allow:
    """What may be changed.

    `parallel_block`: attention and MLP of a layer read the same input, so that it has one pair of
    tensor-parallel collectives instead of two (PaLM, arXiv:2204.02311, section 2).
    `ladder_residual`: a sub-block reads the residual without what the one before it adds, whose
    collectives run beside it (arXiv:2501.06589). `local_update`: replicas train apart and average
    their parameters every so many steps (local SGD, arXiv:1805.09767; DiLoCo, arXiv:2311.08105);
    0: they do not.
    """

    parallel_block: bool = False
    ladder_residual: bool = False
    local_update: int = 0

    @staticmethod
    def parse(text: str | Sequence[str] | None) -> Allow:
        """Reads `parallel-block,ladder-residual,local-update=H` (or its parts). Raises InvalidInput
        for another name, or fewer than 2 steps."""
        parts = text.split(",") if isinstance(text, str) else list(text or ())
        found: dict[str, int] = {}
        for part in filter(None, (str(part).strip() for part in parts)):
            name, equals, value = (each.strip() for each in part.partition("="))
            if name not in NAMES:
                near = get_close_matches(name.lower().replace("_", "-"), NAMES, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise InvalidInput(f"--allow: {name!r}{hint}; known: {', '.join(NAMES)}=H")
            if (name == "local-update") != bool(equals):
                expected = "local-update=H" if name == "local-update" else f"{name} alone"
                raise InvalidInput(f"--allow: {part}, expected {expected}")
            if equals and not (value.isdecimal() and int(value) >= 2):
                raise InvalidInput(f"--allow: {part}, expected a whole number of at least 2 steps")
            found[name.replace("-", "_")] = int(value) if equals else 1
        return Allow(
            "parallel_block" in found, "ladder_residual" in found, found.get("local_update", 0)
        )

    @property
    def anything(self) -> bool:
        """Whether there is something to ask for."""
        return self.parallel_block or self.ladder_residual or self.local_update > 0
