"""The device mesh, and how this rank's parameters lie on it.

An *axis* belongs to the mesh, a *dim* to a tensor. The mesh has the axes `pp` (pipeline stages),
`dp` (data parallel) and the *tensor axes* (`tp`, or its sub-axes `tp0`, `tp1`, …), outermost first.
A parameter has a *full* shape; a rank holds a *shard* of it: its part along the tensor axes, and of
that, with ZeRO, the rows that FSDP gives it along `dp`. `rectangles` says which boxes of the full
tensor those are; initialisation, checkpoints and weight files all go by it.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from math import prod
from typing import Any

import settings
import torch
import torch.distributed as dist
from layout import Parameter, intervals, split_of
from parameters import PARAMETERS
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

_mesh: DeviceMesh | None = None
_groups: dict[str, dist.ProcessGroup] = {}
_left = False


# --- the mesh ------------------------------------------------------------------------------------


def device() -> torch.device:
    """Where this rank computes: its GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def init_mesh(sizes: Mapping[str, int]) -> DeviceMesh:
    """Joins the ranks that torchrun started into one mesh with named axes."""
    global _mesh
    if device().type == "cuda":
        torch.cuda.set_device(device())
    if not dist.is_initialized():
        _join(prod(sizes.values()))
    if dist.get_world_size() != prod(sizes.values()):
        shape = " × ".join(f"{name}={size}" for name, size in sizes.items())
        raise SystemExit(
            f"this program runs on {prod(sizes.values())} ranks ({shape}), "
            f"but {dist.get_world_size()} were started"
        )
    _mesh = init_device_mesh(
        device().type, tuple(sizes.values()), mesh_dim_names=tuple(sizes.keys())
    )
    _groups.clear()
    return _mesh


def _join(ranks: int) -> None:
    """Starts torch.distributed as torchrun says; a program of one rank needs no torchrun."""
    if "RANK" not in os.environ and ranks == 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        os.environ.update(alone, MASTER_PORT=str(port))
    if "RANK" not in os.environ:
        raise SystemExit(f"start this program with: torchrun --nproc-per-node {ranks} train.py")
    join(_numbered(ranks))


def _numbered(ranks: int) -> dict[str, Any]:
    """Where ranks meet, and this one's number: `RANKS` says which ranks are on which node."""
    if settings.RANKS is None or int(os.environ["WORLD_SIZE"]) != ranks:
        return {}
    process = int(os.environ["RANK"])
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, ranks, is_master=process == 0 and not hosted)
    return {
        "store": dist.PrefixStore("ranks", store),
        "rank": settings.RANKS[process],
        "world_size": ranks,
    }


def join(meeting: Mapping[str, Any]) -> None:
    """Joins torch.distributed's default group, which meets as `init_process_group` is told."""
    if device().type == "cuda":
        dist.init_process_group("nccl", device_id=device(), **meeting)
    else:
        dist.init_process_group("gloo", **meeting)
        atexit.register(_end)  # the first hook that is registered is the last that runs


def wait_at_most(seconds: float) -> None:
    """Collectives that take longer raise, in all groups that there are now: another rank of the
    group is lost, or waits for one that is."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def leave() -> None:
    """Leaves the mesh; the last thing that a run does which went well."""
    global _left
    if dist.is_initialized():
        dist.destroy_process_group()
    _left = True


def _end() -> None:
    """Ends the process without taking the interpreter down, if the run went well.

    What DTensor caches keeps gloo's threads alive after `destroy_process_group`. One that has yet
    to drop a tensor of the last collective asks for the interpreter; asked for while it goes down,
    that aborts the process (pytorch issue 190489).
    """
    if _left:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def mesh() -> DeviceMesh:
    """The mesh of `init_mesh`."""
    if _mesh is None:
        raise RuntimeError("init_mesh has not been called")
    return _mesh


def tensor_axes() -> tuple[str, ...]:
    """The axes that split tensors inside a block: `tp`, or its sub-axes, outermost first."""
    return tuple(name for name in settings.MESH if name not in ("pp", "dp"))


def axis(name: str) -> dist.ProcessGroup:
    """The process group of this rank along an axis; `tp` names all its sub-axes together too."""
    if name not in _groups:
        if name in settings.MESH:
            _groups[name] = mesh().get_group(name)
        else:
            _groups[name] = mesh()[tensor_axes()]._flatten(name).get_group()
    return _groups[name]


def axis_size(name: str) -> int:
    """Number of ranks along an axis."""
    return axis(name).size()


def axis_rank(name: str) -> int:
    """This rank's coordinate along an axis."""
    return axis(name).rank()


def coordinates() -> dict[str, int]:
    """This rank's coordinate along every axis."""
    return {name: axis_rank(name) for name in settings.MESH}


# --- dtypes --------------------------------------------------------------------------------------


def model_dtype() -> torch.dtype:
    """The dtype that blocks compute in."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[
        settings.PRECISION
    ]


def wide_dtype() -> torch.dtype:
    """The dtype of master weights, gradients and optimizer state, and of the loss."""
    return torch.float64 if settings.PRECISION == "fp64" else torch.float32


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# --- a stage and its parameters ------------------------------------------------------------------


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter along the tensor axes, in the dtype of `model_dtype`."""
    if isinstance(parameter, DTensor):
        parameter = parameter.to_local()
    return parameter.to(model_dtype())


def build(stage_class: type[nn.Module], blocks: tuple[type[nn.Module], ...]) -> nn.Module:
    """This rank's stage on its device, sharded, its memory not yet filled."""
    with torch.device("meta"), _default_dtype(wide_dtype()):
        stage = stage_class()
    _distribute(stage)
    if uses_fsdp():
        _shard(stage, blocks)
    return stage.to_empty(device=device())


def _distribute(stage: nn.Module) -> None:
    """Turns the local tensors of a new stage into DTensors over the tensor axes.

    FSDP and DCP see only a part of the weights otherwise. The DTensor of a split that is not
    contiguous (`S(1.1)`) holds a permutation of the full tensor: right for computing and for the
    optimizer, while checkpoints go by `rectangles`.
    """
    axes = tensor_axes()
    distributed: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in list(stage.named_modules()):
        for key, plain in list(module._parameters.items()):
            if plain is None:
                continue
            if plain not in distributed:
                spec = PARAMETERS[f"{path}.{key}" if path else key]
                value: Tensor = plain
                if prod(settings.MESH[name] for name in axes) > 1:
                    value = DTensor.from_local(
                        plain.detach(),
                        mesh()[axes],
                        [_placement(spec, name) for name in axes],
                        run_check=False,
                        shape=torch.Size(spec.shape),
                        stride=torch.empty(spec.shape, device="meta").stride(),
                    )
                distributed[plain] = nn.Parameter(value, requires_grad=spec.trainable)
            module._parameters[key] = distributed[plain]


def _placement(spec: Parameter, name: str) -> Placement:
    split = split_of(spec.types.get(name, "I"))
    return Shard(split[0]) if split else Replicate()


def uses_fsdp() -> bool:
    """Whether FSDP shards parameters along `dp`: with ZeRO, and more than one rank there."""
    return settings.ZERO > 0 and settings.MESH["dp"] > 1


def _shard(stage: nn.Module, blocks: tuple[type[nn.Module], ...]) -> None:
    """Shards the stage by FSDP, block by block.

    ZeRO 3 frees a block's parameters after its forward pass, 2 and 1 keep them for the backward
    pass. Gradients are summed, not averaged: the loss is already divided by the global count.
    """
    if len(tensor_axes()) > 2:
        raise SystemExit(f"FSDP takes at most two tensor axes, not {tensor_axes()}: set ZERO = 0")
    mixed = settings.PRECISION == "bf16"
    policy = MixedPrecisionPolicy(
        param_dtype=model_dtype() if mixed else None,
        reduce_dtype=wide_dtype() if mixed else None,
        cast_forward_inputs=False,
    )
    units = [module for module in stage.modules() if isinstance(module, blocks)]
    for unit in [*units, stage]:
        fully_shard(
            unit,
            mesh=mesh()["dp"],
            # What is left to the stage itself, the head above all, is needed again at once in the
            # backward pass, unless other microbatches come in between.
            reshard_after_forward=settings.ZERO == 3
            and (unit is not stage or settings.MESH["pp"] > 1),
            mp_policy=policy,
        )
    for unit in [*units, stage]:
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


# --- where a shard lies in the full tensor -------------------------------------------------------


@dataclass(frozen=True)
class Rectangle:
    """A box of a parameter: its sizes, and where it begins in the full tensor and the shard."""

    sizes: tuple[int, ...]
    full: tuple[int, ...]
    local: tuple[int, ...]

    def in_full(self) -> tuple[slice, ...]:
        """Slices of the full tensor."""
        return tuple(slice(a, a + n) for a, n in zip(self.full, self.sizes, strict=True))

    def in_local(self) -> tuple[slice, ...]:
        """Slices of this rank's shard."""
        return tuple(slice(a, a + n) for a, n in zip(self.local, self.sizes, strict=True))


def rectangles(name: str) -> list[Rectangle]:
    """The boxes of the full tensor that this rank's shard consists of."""
    per_dim = [list(dim) for dim in intervals(PARAMETERS[name], settings.MESH, coordinates())]
    if uses_fsdp() and per_dim:
        rows = sum(length for _, length in per_dim[0])
        chunk = -(-rows // axis_size("dp"))  # as FSDP cuts: the last ranks may get less, or nothing
        first = min(axis_rank("dp") * chunk, rows)
        per_dim[0] = list(_cut(per_dim[0], first, min(first + chunk, rows)))
    placed: list[list[tuple[int, int, int]]] = []  # per dim: (length, begin in full, in local)
    for dim in per_dim:
        begin, here = 0, []
        for offset, length in dim:
            here.append((length, offset, begin))
            begin += length
        placed.append(here)
    boxes = []
    for pieces in product(*placed):
        sizes, full, here = zip(*pieces, strict=True) if pieces else ((), (), ())
        boxes.append(Rectangle(sizes, full, here))
    return boxes


def _cut(pieces: list[tuple[int, int]], first: int, last: int) -> Iterator[tuple[int, int]]:
    """The part `first … last-1` of a sequence of (offset, length) pieces laid end to end."""
    begin = 0
    for offset, length in pieces:
        low, high = max(first - begin, 0), min(last - begin, length)
        if low < high:
            yield offset + low, high - low
        begin += length


def shard(tensor: Tensor) -> Tensor:
    """The memory that this rank holds of a parameter, a gradient or an optimizer state."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_owner(name: str) -> bool:
    """Whether this rank is the first of those that hold the same elements of a parameter."""
    spec = PARAMETERS[name]
    here = coordinates()
    replicated = [a for a in tensor_axes() if split_of(spec.types.get(a, "I")) is None]
    if not uses_fsdp():
        replicated.append("dp")
    return here["pp"] == min(spec.stages) and all(here[a] == 0 for a in replicated)
