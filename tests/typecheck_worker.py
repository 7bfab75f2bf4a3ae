"""Runs every stage of emitted folders under spmd_types' checker, in global mode, on fake ranks.

A script: `python typecheck_worker.py WORLD FOLDER…` prints one JSON object, folder → list with one
entry per stage: null where the checker is content, else its message. It needs nothing but torch,
spmd_types and the folders. Stages are built from plain local tensors.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from math import prod
from typing import Any

import spmd_types as spmd
import torch
import torch.distributed as dist
from spmd_types import _mesh_axis
from spmd_types.checker import typecheck
from torch.testing._internal.distributed.fake_pg import FakeStore

warnings.filterwarnings("ignore")


def main(world: int, folders: list[str]) -> None:
    found: dict[str, list[str | None]] = {}
    for folder in folders:
        sys.path.insert(0, folder)
        before = set(sys.modules)
        import settings  # type: ignore[import-not-found]

        stages = settings.MESH["pp"]
        found[folder] = [run(world, stage) for stage in range(stages)]
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                del sys.modules[name]
    print(json.dumps(found))


def run(world: int, index: int) -> str | None:
    """Checks one stage on its first rank."""
    import settings

    sizes = settings.MESH
    assert prod(sizes.values()) == world, f"{sizes} is not a mesh of {world} ranks"
    rank = index * (world // sizes["pp"])
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    _mesh_axis._reset()
    try:
        check(index)
    except Exception as error:
        where = "".join(traceback.format_exc(limit=-3)) if "-v" in sys.argv else ""
        return f"{type(error).__name__}: {error}{where}"
    finally:
        dist.destroy_process_group()
    return None


def check(index: int) -> None:
    import model  # type: ignore[import-not-found]
    import parallel  # type: ignore[import-not-found]
    import settings
    from parameters import PARAMETERS  # type: ignore[import-not-found]

    mesh = parallel.init_mesh(settings.MESH)
    parallel._groups.clear()
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(parallel.wide_dtype())
    stage = model.STAGES[index]()
    torch.set_default_dtype(before)
    names = {name: mesh[name] for name in settings.MESH if name != "pp"}
    inside = mesh[tuple(names)]
    kwargs = {name: batch(spec) for name, spec in model.BATCH.items()}
    carried = [carry(c) for c in model.CARRIED[index - 1]] if index else []
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.normal_(0.0, 0.02)
    with spmd.set_current_mesh(inside):
        for name, parameter in stage.named_parameters():
            spec = PARAMETERS[name]
            declare(parameter, {"dp": "R", **spec.types})
        for name, tensor in kwargs.items():
            rows = "b" in model.BATCH[name][1]
            other = {a: "R" for a in settings.MESH if a not in ("pp", "dp")}
            declare(tensor, {"dp": "S(0)" if rows else "R", **other})
        for tensor, spec in zip(carried, model.CARRIED[index - 1] if index else [], strict=True):
            declare(tensor, spec.types)
        with typecheck(strict_mode="strict", local=False):
            out = stage(*carried, **kwargs)
        if index == settings.MESH["pp"] - 1:
            declare(out, model.LOSS_TYPES)
        else:
            made = out if isinstance(out, tuple) else (out,)
            for tensor, spec in zip(made, model.CARRIED[index], strict=True):
                shape = spec.shape(settings.MICRO_BATCH, settings.SEQ_LEN)
                assert tuple(tensor.shape) == shape, (
                    f"{spec.name}: {tuple(tensor.shape)} != {shape}"
                )
                declare(tensor, spec.types)


def batch(spec: tuple[str, tuple[Any, ...], int]) -> torch.Tensor:
    import settings

    dtype, dims, bound = spec
    sizes = {"b": settings.MICRO_BATCH, "s": settings.SEQ_LEN}
    shape = [sizes.get(dim, dim) for dim in dims]
    if dtype == "int64":
        return torch.randint(0, bound, shape)
    import parallel

    floating = getattr(torch, dtype).is_floating_point
    return torch.ones(shape, dtype=parallel.model_dtype() if floating else getattr(torch, dtype))


def carry(spec: Any) -> torch.Tensor:
    import parallel
    import settings

    dtype = {"model": parallel.model_dtype(), "wide": parallel.wide_dtype()}[spec.dtype]
    shape = spec.shape(settings.MICRO_BATCH, settings.SEQ_LEN)
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def declare(tensor: torch.Tensor, types: dict[str, str]) -> None:
    """Declares (or checks) a type, with the partition spec in nesting order."""
    import settings

    kinds: dict[str, Any] = {}
    entries: list[list[tuple[int, int, str]]] = [[] for _ in range(tensor.dim())]
    for order, axis in enumerate(a for a in settings.MESH if a != "pp"):
        kind = types.get(axis, "R")
        if kind.startswith("S"):
            dim, _, part = kind[2:-1].partition(".")
            if settings.MESH[axis] > 1:
                entries[int(dim)].append((int(part or 0), order, axis))
            kinds[axis] = spmd.V
        else:
            kinds[axis] = getattr(spmd, kind)
    spec = [tuple(axis for *_, axis in sorted(entry)) or None for entry in entries]
    spmd.assert_type(tensor, kinds, spmd.PartitionSpec(*spec))
    types_now = {str(a): k for a, k in spmd.get_local_type(tensor).items()}
    have = spmd.get_partition_spec(tensor)
    sharded = sum(len(e) if isinstance(e, tuple) else e is not None for e in have or ())
    assert sharded == sum(map(len, entries)), f"{types_now} {have}, declared {types}"


if __name__ == "__main__":
    main(int(sys.argv[1]), [argument for argument in sys.argv[2:] if argument != "-v"])
