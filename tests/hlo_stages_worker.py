"""Says which collectives the programs of a pipeline have that run in a step.

`python hlo_stages_worker.py FOLDER`: one line of JSON, `{"count": {kind: number per step},
"bytes": {kind: bytes of their results on one device of each}, "arrays": [[names], …]}`. Loss and
gradients are run; every program counts as often as it was called, as do collectives in its loops.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def called() -> dict[str, Any]:
    """The collectives of a step."""
    import jax
    from hlo_worker import collectives

    programs: list[Called] = []
    compiled = jax.jit

    def recorded(f: Any = None, **options: Any) -> Any:
        programs.append(Called(compiled(f, **options)))
        return programs[-1]

    jax.jit = recorded
    import parallel
    import pipeline
    from initial import initialise

    batch = {
        name: jax.device_put(np.ones(like.shape, like.dtype), like.sharding)
        for name, like in inputs().items()
    }
    params = initialise(0)
    programs.clear()
    pipeline.gradients()(params, batch, None)
    found: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for program in programs:
        for text, count in program.texts():
            for into, counted in zip((found, moved), collectives(text), strict=True):
                for kind, number in counted.items():
                    into[kind] += number * count
    held = [list(parallel.arrays()[key].names) for stage in parallel.shapes() for key in stage]
    return {"count": dict(found), "bytes": dict(moved), "arrays": held}


class Called:
    """A compiled function that keeps the shapes of what it is called with."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, Counter[str]()
        self.shapes: dict[str, Any] = {}

    def __call__(self, *args: Any) -> Any:
        import jax

        shapes = jax.tree.map(lambda x: x if isinstance(x, np.generic) else jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=x.sharding), args)  # fmt: skip
        key = str(jax.tree.map(lambda x: (x.shape, str(x.dtype)), args))
        self.shapes.setdefault(key, shapes)
        self.calls[key] += 1
        return self.function(*args)

    def texts(self) -> Iterator[tuple[str, int]]:
        """The optimised HLO of each shape, and how often it ran."""
        for key, shapes in self.shapes.items():
            yield self.function.lower(*shapes).compile().as_text(), self.calls[key]


def inputs() -> dict[str, Any]:
    """Shapes of the global batch."""
    import jax
    import model
    import parallel
    import settings

    sizes = {"b": settings.GLOBAL_BATCH, "s": settings.SEQ_LEN}
    specs = parallel.batch_specs()
    return {
        name: jax.ShapeDtypeStruct(
            tuple(sizes.get(dim, dim) for dim in dims),
            jax.dtypes.canonicalize_dtype(dtype),
            sharding=parallel.sharding(specs[name]),
        )
        for name, (dtype, dims, _) in model.BATCH.items()
    }


if __name__ == "__main__":
    sys.path[:0] = [sys.argv[1], str(Path(__file__).parent)]
    print(json.dumps(called()))
