"""The model of tests/fixtures/handwritten on one device, and emitted folders of it.

The fixture stands for the generated files; `write` puts the templates beside it, as `emit` does.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    ROOT / "backends/emission/templates",
    ROOT / "backends/to_torch/templates",
    ROOT / "tests/fixtures/handwritten",
)

VOCAB, HIDDEN, GROUPS, WIDTH, LAYERS = 13, 10, 4, 6, 5


def write(
    folder: Path,
    *,
    pp: int = 1,
    dp: int = 1,
    zero: int = 0,
    micro_batch: int = 1,
    global_batch: int = 8,
    precision: str = "fp64",
    schedule: str = "1f1b",
    **tensor_axes: int,
) -> Path:
    """An emitted folder of the model with these settings."""
    folder.mkdir(parents=True)
    for source in SOURCES:
        for path in source.glob("*.py"):
            shutil.copy(path, folder)
    settings = {
        "MESH": {"pp": pp, "dp": dp} | (tensor_axes or {"tp": 1}),
        "ZERO": zero,
        "GLOBAL_BATCH": global_batch,
        "MICRO_BATCH": micro_batch,
        "MICROBATCHES": global_batch // micro_batch // dp,
        "PRECISION": precision,
        "SCHEDULE": schedule,
    }
    with (folder / "settings.py").open("a") as file:
        file.writelines(f"{name} = {value!r}\n" for name, value in settings.items())
    return folder


def ranks(pp: int = 1, dp: int = 1, zero: int = 0, **other: Any) -> int:
    """The number of ranks of a folder with these settings."""
    return pp * dp * prod(size for name, size in other.items() if name.startswith("tp"))


@contextmanager
def imported(folder: Path, *names: str) -> Iterator[SimpleNamespace]:
    """Modules of an emitted folder, in this process, for as long as the context lasts."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in names})
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
                del sys.modules[name]


@contextmanager
def alone(folder: Path, *names: str) -> Iterator[SimpleNamespace]:
    """The same, on a mesh of one rank, with a built `stage`."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with imported(folder, "settings", "parallel", "model", *names) as program:
            program.parallel.init_mesh(program.settings.MESH)
            program.stage = program.parallel.build(program.model.STAGES[0], program.model.BLOCKS)
            yield program
    finally:
        dist.destroy_process_group()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.fused = nn.Linear(2 * GROUPS * WIDTH, HIDDEN, bias=False)
        self.gain = nn.Parameter(torch.rand(GROUPS))
        self.down = nn.Linear(GROUPS * WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (self.norm(x) @ self.fused.weight).chunk(2, dim=-1)
        z = (F.silu(gate) * up).unflatten(-1, (GROUPS, WIDTH)) * self.gain[:, None]
        return x + self.down(z.flatten(-2))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))


class Handwritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Inner()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.model.embed(input_ids)
        for layer in self.model.layers:
            x = layer(x)
        logits = x @ self.model.embed.weight.T
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
