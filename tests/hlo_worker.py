"""Compiles the training step of emitted folders and says which collectives the optimised HLO has.

`python hlo_worker.py FOLDER …`: one line of JSON for each, `{"count": {kind: number per step},
"bytes": {kind: bytes of their results on one device}, "arrays": [[names], …], "instructions": lines
of HLO, "seconds": of compiling, of the processor, "memory": bytes per device by kind}`. A
collective in a loop counts as often as the loop runs; one that XLA combined from several counts as
those.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from math import prod
from typing import Any

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALL = re.compile(r"= (\(?.*?\)?) (" + "|".join(KINDS) + r")(?:-start)?\(([^)]*)\)")
_LOOP = re.compile(r" while\(.*body=%?([\w.-]+).*known_trip_count\":\{\"n\":\"(\d+)\"")
_SHAPE = re.compile(r"\b(pred|[a-z]+)(\d*)\[([\d,]*)\]")


def bytes_of(result: str) -> int:
    """Bytes of a shape, or of all in a tuple: `(f32[4,8]{1,0}, s32[])`."""
    return sum(
        prod(map(int, filter(None, sizes.split(",")))) * (int(bits or 8) // 8)
        for _, bits, sizes in _SHAPE.findall(result)
    )


def collectives(text: str) -> tuple[Counter[str], Counter[str]]:
    """Kind → how many a step runs, and their bytes, from the text of a module."""
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = head.group(1)
            bodies[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current:
            bodies[current].append(line)

    def count(name: str) -> tuple[Counter[str], Counter[str]]:
        found: Counter[str] = Counter()
        moved: Counter[str] = Counter()
        for line in bodies[name]:
            if call := _CALL.search(line):
                result, kind, operands = call.groups()
                combined = result.startswith("(") and kind != "all-to-all"
                found[kind] += len(operands.split(", ")) if combined else 1
                moved[kind] += bytes_of(result)
            if " while(" in line:
                loop = _LOOP.search(line)
                assert loop is not None, line
                for into, inner in zip((found, moved), count(loop.group(1)), strict=True):
                    for kind in inner:
                        into[kind] += inner[kind] * int(loop.group(2))
        return found, moved

    return count(entry)


def compiled(folder: str) -> dict[str, Any]:
    """What there is to say of one folder."""
    import jax
    import model
    import parallel
    import settings
    import step

    adam = step.Adam(lambda _: 1e-3)
    params = {key: parallel.shape_of(key) for key in parallel.arrays()}
    state = step.state_shapes(adam)
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
    began = time.process_time()
    made = step.train_step(adam).lower(params, state, batch, None).compile()
    seconds = time.process_time() - began
    text, memory = made.as_text(), made.memory_analysis()
    found, moved = collectives(text)
    return {
        "count": dict(found),
        "bytes": dict(moved),
        "arrays": [list(array.names) for array in parallel.arrays().values()],
        "instructions": text.count("\n"),
        "seconds": seconds,
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "alias": memory.alias_size_in_bytes,
        },
    }


def main(folders: list[str]) -> None:
    """One folder after the other, each with its own modules of the same names."""
    import jax

    for folder in folders:
        before = set(sys.modules)
        sys.path.insert(0, folder)
        print(json.dumps(compiled(folder)), flush=True)
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                del sys.modules[name]
        jax.clear_caches()


if __name__ == "__main__":
    main(sys.argv[1:])
