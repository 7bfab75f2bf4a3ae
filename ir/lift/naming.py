"""Names of ops and values: readable in emitted source, the same for a small and a large model."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterable, Sequence

from .draft import Op, Wire

_FOLLOWS_OPERAND = frozenset(
    {
        "reshape",
        "permute",
        "expand",
        "chunk",
        "slice",
        "cast",
        "rotary",
        "dropout",
        "scale",
        "shift",
    }
)
"""Kinds whose result is named after what they are applied to."""

_RESULTS = {"cross_entropy": ("loss_sum", "loss_count"), "mean_loss": ("loss_sum", "loss_count"),
            "sum_loss": ("loss_sum", "loss_count"), "rotary_table": ("cos", "sin"),
            "shift_labels": ("shifted_labels",)}  # fmt: skip


class Names:
    """Hands out names that are unique in a scope."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self.taken = set(taken)

    def unique(self, base: str) -> str:
        """`base`, or `base_1`, `base_2`, … where it is taken."""
        name, count = base, 0
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name


def identifier(text: str) -> str:
    """A Python name that shadows nothing."""
    name = re.sub(r"\W", "_", text).strip("_") or "value"
    if name[0].isdigit():
        name = f"layer_{name}"
    if keyword.iskeyword(name) or hasattr(builtins, name) or name in ("self", "torch"):
        name += "_value"
    return name


def relative(path: str, module: str) -> str:
    """A module path as seen from another."""
    if path == module:
        return ""
    return path.removeprefix(module + ".") if module else path


def op_names(ops: Sequence[Op], module: str) -> list[str]:
    """`self_attn.q_proj.linear`, `add`, `add_1`."""
    names = Names()
    found = []
    for op in ops:
        path = relative(op.module, module)
        found.append(names.unique(f"{path}.{op.kind}" if path else op.kind))
    return found


def value_names(
    ops: Sequence[Op], module: str, given: dict[Wire, str], scope: Names
) -> dict[Wire, str]:
    """Names of all results, unique in the scope: what a leaf module returns is called like it."""
    names = dict(given)
    paths = [relative(op.module, module) for op in ops]
    last = {path: i for i, path in enumerate(paths)}
    labels = _labels(paths)
    roots: dict[Wire, str] = dict(given)
    for i, op in enumerate(ops):
        path = paths[i]
        leaf = path and not any(other.startswith(path + ".") for other in paths)
        label = labels[path]
        fixed = _RESULTS.get(op.kind)
        follows = op.kind in _FOLLOWS_OPERAND and op.operands and op.operands[0] in roots
        for k, wire in enumerate(op.results):
            if fixed:
                base = root = fixed[k]
            elif leaf and last[path] == i:
                base = root = label
            elif leaf and not follows:
                base, root = f"{label}_{op.kind}", label
            elif follows and op.operands[0].role != "parameter":
                root = roots[op.operands[0]]
                base = f"{root}_{k}" if op.kind == "chunk" else f"{root}_{op.kind}"
                root = base if op.kind == "chunk" else root
            else:
                base = root = op.kind
            if len(op.results) > 1 and not fixed and op.kind != "chunk":
                base = f"{base}_{k}"
            roots[wire] = identifier(root)
            names[wire] = scope.unique(identifier(base))
    return names


def _labels(paths: Sequence[str]) -> dict[str, str]:
    """Path → the shortest end of it that says something and that no other path shares."""
    found: dict[str, str] = {}
    distinct = set(paths)
    for path in distinct:
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            label = "_".join(parts[-length:])
            ending = "." + ".".join(parts[-length:])
            shared = any(other != path and f".{other}".endswith(ending) for other in distinct)
            if not shared and not parts[-length].isdigit():
                break
        found[path] = label
    return found
