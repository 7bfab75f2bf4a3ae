"""Compiles the gradients of emitted folders and says which collectives the optimised HLO has.

`python hlo_worker.py FOLDER`: one line of JSON, `{"collectives": {kind: number per step}, "arrays":
parameters as stored, "instructions": lines of HLO, "seconds": of compiling}`. A collective in a
loop counts as often as the loop runs; one that XLA combined from several counts as those.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALL = re.compile(r"= (\(?.*?\)?) (" + "|".join(KINDS) + r")(?:-start)?\(([^)]*)\)")
_LOOP = re.compile(r" while\(.*body=%?([\w.-]+).*known_trip_count\":\{\"n\":\"(\d+)\"")


def collectives(text: str) -> Counter[str]:
    """Kind → how many a step runs, from the text of a module."""
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = head.group(1)
            bodies[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current:
            bodies[current].append(line)

    def count(name: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for line in bodies[name]:
            if call := _CALL.search(line):
                result, kind, operands = call.groups()
                combined = result.startswith("(") and kind != "all-to-all"
                found[kind] += len(operands.split(", ")) if combined else 1
            if " while(" in line:
                loop = _LOOP.search(line)
                assert loop is not None, line
                inner = count(loop.group(1))
                for kind in inner:
                    found[kind] += inner[kind] * int(loop.group(2))
        return found

    return count(entry)


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    import jax
    import model
    import parallel
    import settings
    import step

    params = {key: parallel.shape_of(key) for key in parallel.arrays()}
    sizes = {"b": settings.GLOBAL_BATCH, "s": settings.SEQ_LEN}
    specs = parallel.batch_specs()
    batch = {
        name: jax.ShapeDtypeStruct(
            tuple(sizes.get(dim, dim) for dim in dims),
            jax.dtypes.canonicalize_dtype(dtype),
            sharding=parallel.sharding(specs[name]),
        )
        for name, (dtype, dims, _) in model.BATCH.items()
    }
    began = time.perf_counter()
    text = step.gradients().lower(params, batch, None).compile().as_text()
    seconds = time.perf_counter() - began
    arrays = len(parallel.arrays())
    lines = text.count("\n")
    found = dict(collectives(text))
    print(json.dumps({"collectives": found, "arrays": arrays, "instructions": lines,
                      "seconds": seconds}))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
