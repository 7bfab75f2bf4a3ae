"""Goes on under another program of the same model, from what processes hold in memory.

Shardwright's `replan PLAN --lost NODE -o new.json --moves moves.jsonl` writes who has to send which
part of which parameter's state to whom when a run loses nodes; `emit new.json` writes the program
to go on with. A run that was started with `--next FOLDER` learns of lost ranks by a collective that
fails, or takes longer than `--lost-after`. Then it waits for both: the program in FOLDER/1 (after
another loss FOLDER/2, …), and, last of all, FOLDER/1/moves.jsonl. The processes that are left meet,
send each other what moves, and train on as the new program; a device that the new program does not
use sends what it has and ends.

Processes of nodes that joined are started with the new program's `train.py --joins`.

The first line of moves.jsonl names the device of every rank `before` and `after`, and those that
are `lost`. Every other line is a part of a parameter: `boxes` are [begin, sizes] in its full shape,
`source` and `target` devices. Where `source` is null, no device has that part any more: then all go
back to the last checkpoint of `--save`, from which only these parts are read; everything else is a
copy that every process keeps in its host memory since it saved.

NCCL ends processes whose collectives fail, unless it is started with TORCH_NCCL_BLOCKING_WAIT=1 and
TORCH_NCCL_ASYNC_ERROR_HANDLING=0.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import parallel
import settings
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel import Rectangle, rectangles, shard
from parameters import PARAMETERS
from torch import Tensor, nn

from checkpoint import Boxes, Progress, create_state, newest

ROUND_BYTES = 1 << 28  # a device sends and receives about this much at a time
PATIENCE_S = 3600.0  # that a run waits for the program to go on with


@dataclass
class Piece:
    """A box of a parameter: where it begins in the full tensor, and what is in it (`weight`,
    `exp_avg`, `exp_avg_sq`), in host memory."""

    name: str
    begin: tuple[int, ...]
    tensors: dict[str, Tensor]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.tensors["weight"].shape)


@dataclass
class Held:
    """What a process has: its rank in the program that it ran (None: it has only now joined), how
    far it was, and its pieces; `saved` is the same as of its last checkpoint, `programs` how many
    programs it has gone on with."""

    rank: int | None
    progress: Progress
    pieces: list[Piece]
    saved: Held | None = None
    programs: int = 0


@dataclass
class Moves:
    """A file of moves."""

    before: list[int]
    after: list[int]
    lost: list[int]
    lines: list[dict[str, Any]]

    @staticmethod
    def read(path: Path) -> Moves:
        with path.open() as file:
            return Moves(**json.loads(file.readline()), lines=[json.loads(line) for line in file])

    @property
    def members(self) -> list[int]:
        """All devices that send or receive."""
        return sorted({*self.before, *self.after} - set(self.lost))

    def device(self, rank: int | None) -> int:
        """The device of this process. Those that joined are the new ones, in order."""
        if rank is not None:
            return self.before[rank]
        return sorted(set(self.after) - set(self.before))[int(os.environ.get("RANK", "0"))]


def held(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, progress: Progress
) -> Held:
    """A copy of what this process holds, between steps. `parameters` are those of its stage as it
    was built: within a step FSDP has others in their place."""
    pieces = []
    for name, parameter in parameters.items():
        tensors = {"weight": shard(parameter)}
        state = optimizer.state.get(parameter, {})
        for key in keys(name)[1:]:
            tensors[key] = shard(state[key]) if state else torch.zeros_like(tensors["weight"])
        for box in rectangles(name):
            inside = box.in_local()
            # a copy, on the host: the next program has the device to itself
            copies = {k: t[inside].to("cpu", copy=True).contiguous() for k, t in tensors.items()}
            pieces.append(Piece(name, box.full, copies))
    return Held(dist.get_rank(), replace(progress), pieces)


def keys(name: str) -> tuple[str, ...]:
    """The tensors that are kept of a parameter."""
    return ("weight", "exp_avg", "exp_avg_sq") if PARAMETERS[name].trainable else ("weight",)


# --- from one program to the next ----------------------------------------------------------------


def go_on(args: Namespace, state: Held) -> Held | None:
    """Runs the next program of `args.next`; returns what there is to go on with if it loses ranks
    too. Raises SystemExit where there is no next program, or it does not fit what ranks hold."""
    folder = args.next / str(state.programs + 1)
    _leave()
    _wait_for(folder / "moves.jsonl")
    train, migrate, other = _enter(folder)
    moved = migrate.exchange(state, folder)
    if moved is None:  # this device has no part in the next program
        return None
    _meet(other, folder / "meeting", moved.rank, len(Moves.read(folder / "moves.jsonl").after))
    other.init_mesh(importlib.import_module("settings").MESH)
    following: Held | None = train.train(args, moved)
    return following


def _leave() -> None:
    """Leaves a group of which some ranks are gone, without waiting for anyone."""
    gc.collect()
    if dist.is_initialized():
        if dist.get_backend() == "gloo":
            _hang_up()
        dist.distributed_c10d._abort_process_group()


def _hang_up() -> None:
    """Shuts this process's TCP connections, so that ranks that wait for it learn that it left:
    gloo's stay open while anything refers to them, and receives of a pipeline have no time limit.
    """
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry))) as connection:
            listens = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if connection.family in (socket.AF_INET, socket.AF_INET6) and not listens:
                connection.shutdown(socket.SHUT_RDWR)


def _wait_for(file: Path) -> None:
    print(f"waiting for {file}", file=sys.stderr, flush=True)
    until = time.monotonic() + PATIENCE_S
    while not file.exists():
        if time.monotonic() > until:
            raise SystemExit(f"{file}: not there after {PATIENCE_S:.0f} s")
        time.sleep(0.1)


def _enter(folder: Path) -> tuple[Any, Any, Any]:
    """The modules `train`, `migrate` and `parallel` of another program, in place of this one's."""
    here = Path(__file__).resolve().parent
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name != "__main__" and file and Path(file).resolve().parent == here:
            del sys.modules[name]
    sys.path[:] = [str(folder.resolve()), *(p for p in sys.path if Path(p).resolve() != here)]
    train, migrate, other = map(importlib.import_module, ("train", "migrate", "parallel"))
    return train, migrate, other


def _meet(program: Any, file: Path, rank: int, ranks: int) -> None:
    """Forms a group of all that come to a file."""
    store = dist.FileStore(str(file), ranks)
    program.join({"store": store, "rank": rank, "world_size": ranks})


# --- moving --------------------------------------------------------------------------------------


def exchange(state: Held, folder: Path) -> Held | None:
    """What this process has after the moves, as a rank of this program; None where it is none."""
    moves = Moves.read(folder / "moves.jsonl")
    if len(moves.after) != (ranks := _ranks()):
        raise SystemExit(f"{folder}: moves to {len(moves.after)} ranks, a program for {ranks}")
    device, members, programs = moves.device(state.rank), moves.members, state.programs + 1
    if any(line["source"] is None for line in moves.lines) and state.rank is not None:
        if state.saved is None:
            raise SystemExit(
                "parts of the state are lost, and there is no checkpoint to go back to: expected a "
                "run with --save and --save-every"
            )
        state = state.saved
    _meet(parallel, folder / "meeting-of-moves", members.index(device), len(members))
    progress = _agreed(state)
    here: dict[str, list[Piece]] = {}
    for piece in state.pieces:
        here.setdefault(piece.name, []).append(piece)
    received = list[Piece]()
    for lines in _rounds(moves.lines):
        received += _round(lines, device, members, here)
    dist.barrier()
    dist.destroy_process_group()
    if device not in moves.after:
        return None
    rank = moves.after.index(device)
    return Held(rank, progress, [*state.pieces, *received], programs=programs)


def _ranks() -> int:
    found = 1
    for size in settings.MESH.values():
        found *= size
    return found


def _agreed(state: Held) -> Progress:
    """How far the run was, which all that were in it must agree on."""
    known = state.rank is not None
    mine = torch.tensor([state.progress.step, state.progress.samples, state.progress.seed])
    most = (mine if known else torch.full_like(mine, -1)).to(parallel.device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    differs = torch.tensor(int(known and most[0].item() != state.progress.step))
    differs = differs.to(parallel.device())
    dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    if differs.item():
        raise SystemExit("ranks stopped after different steps: resume from a checkpoint")
    step, samples, seed = (int(number) for number in most.tolist())
    return Progress(step, samples, seed)


def _rounds(lines: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The moves between devices, in order, as many at a time as memory is spent on."""
    found: list[dict[str, Any]] = []
    traffic: dict[tuple[str, int], int] = {}
    for line in lines:
        if line["source"] is None:
            continue
        found.append(line)
        for end in ("source", "target"):
            traffic[end, line[end]] = traffic.get((end, line[end]), 0) + line["bytes"]
            full = traffic[end, line[end]] >= ROUND_BYTES
            if full and found:
                yield found
                found, traffic = [], {}
    if found:
        yield found


def _round(
    lines: list[dict[str, Any]], device: int, members: list[int], here: dict[str, list[Piece]]
) -> list[Piece]:
    """Sends and receives one round, a message for every pair of devices; what was received."""
    outgoing: dict[int, list[Tensor]] = {}
    incoming: dict[int, list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = {}
    for line in lines:
        for begin, sizes in line["boxes"]:
            if line["source"] == device:
                piece = _cut(here.get(line["name"], []), line["name"], begin, sizes)
                parts = outgoing.setdefault(line["target"], [])
                parts += [piece.tensors[key].reshape(-1) for key in keys(line["name"])]
            if line["target"] == device:
                box = line["name"], tuple(begin), tuple(sizes)
                incoming.setdefault(line["source"], []).append(box)
    dtype, on = parallel.wide_dtype(), parallel.device()
    buffers = {
        source: torch.empty(
            sum(torch.Size(sizes).numel() * len(keys(name)) for name, _, sizes in boxes),
            dtype=dtype, device=on,
        )
        for source, boxes in incoming.items()
    }  # fmt: skip
    calls = [
        dist.P2POp(dist.isend, torch.cat(parts).to(on), members.index(target))
        for target, parts in outgoing.items()
    ]
    calls += [
        dist.P2POp(dist.irecv, buffer, members.index(source)) for source, buffer in buffers.items()
    ]
    for work in dist.batch_isend_irecv(calls) if calls else []:
        work.wait()
    received = []
    for source, boxes in incoming.items():
        rest = buffers[source].cpu()
        for name, begin, sizes in boxes:
            tensors = {}
            for key in keys(name):
                count = torch.Size(sizes).numel()
                tensors[key], rest = rest[:count].view(sizes), rest[count:]
            received.append(Piece(name, begin, tensors))
    return received


def _cut(pieces: list[Piece], name: str, begin: list[int], sizes: list[int]) -> Piece:
    """A box of a parameter, out of the piece that has it."""
    for piece in pieces:
        at = [b - p for b, p in zip(begin, piece.begin, strict=True)]
        fits = zip(at, sizes, piece.sizes, strict=True)
        if all(a >= 0 and a + n <= whole for a, n, whole in fits):
            inside = tuple(slice(a, a + n) for a, n in zip(at, sizes, strict=True))
            return Piece(name, tuple(begin), {k: t[inside] for k, t in piece.tensors.items()})
    raise SystemExit(
        f"{name}: this process does not hold {begin}+{sizes}, which it is to send: the moves are "
        "not from the program that it ran"
    )


# --- into the new program's memory ---------------------------------------------------------------


def place(
    moved: Held, folder: Path, stage: nn.Module, optimizer: torch.optim.Optimizer,
    checkpoint: Path | None,
) -> Progress:  # fmt: skip
    """Fills a stage and its optimizer's state with what this process has, and with what is lost
    from the last checkpoint. `folder` is the program's. Raises SystemExit where something is
    missing, or the checkpoint is of another step."""
    create_state(optimizer)
    pieces: dict[str, list[Piece]] = {}
    for piece in moved.pieces:
        pieces.setdefault(piece.name, []).append(piece)
    moves = Moves.read(folder / "moves.jsonl")
    device = moves.after[dist.get_rank()]
    gone = [line for line in moves.lines if line["source"] is None]
    wanted: dict[str, Any] = {}
    for name, parameter in stage.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors = {key: shard(state[key]) for key in keys(name)[1:]} | {"weight": shard(parameter)}
        missing = sum(torch.Size(box.sizes).numel() for box in rectangles(name))
        for box in rectangles(name):
            for piece in pieces.get(name, []):
                if (both := _common(box, piece.begin, piece.sizes)) is not None:
                    inside = tuple(
                        slice(f - b, f - b + n)
                        for f, b, n in zip(both.full, piece.begin, both.sizes, strict=True)
                    )
                    for key, tensor in tensors.items():
                        tensor[both.in_local()].copy_(piece.tensors[key][inside])
                    missing -= torch.Size(both.sizes).numel()
        lost = [
            both
            for line in gone
            if line["name"] == name and line["target"] == device
            for begin, sizes in line["boxes"]
            for box in rectangles(name)
            if (both := _common(box, begin, sizes)) is not None
        ]
        missing -= sum(torch.Size(box.sizes).numel() for box in lost)
        if missing:
            raise SystemExit(f"{name}: {missing} elements of this rank were not moved to it")
        for key, tensor in tensors.items():
            stored = name if key == "weight" else f"optimizer.{key}.{name}"
            if lost:
                wanted[stored] = Boxes(name, tensor, lost)
    if gone:
        _read(wanted, checkpoint, moved.progress.step)
    for entry in optimizer.state.values():
        entry["step"].fill_(moved.progress.step)
    return moved.progress


def _common(box: Rectangle, begin: Any, sizes: Any) -> Rectangle | None:
    """What a box of this rank's shard has in common with another box of the full tensor."""
    low = [max(a, b) for a, b in zip(box.full, begin, strict=True)]
    ends = zip(box.full, box.sizes, begin, sizes, strict=True)
    high = [min(a + n, b + m) for a, n, b, m in ends]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    local = tuple(a - f + at for a, f, at in zip(low, box.full, box.local, strict=True))
    return Rectangle(tuple(b - a for a, b in zip(low, high, strict=True)), tuple(low), local)


def _read(wanted: dict[str, Any], checkpoint: Path | None, step: int) -> None:
    """What is lost, from the checkpoint that everything else was copied at."""
    if checkpoint is None:
        raise SystemExit("parts of the state are lost: expected --save, a folder of checkpoints")
    folder, stored = newest(checkpoint), torch.tensor(0)
    dcp.load({"train.step": stored} | wanted, checkpoint_id=folder)
    if int(stored) != step:
        raise SystemExit(f"{folder} is of step {int(stored)}, what ranks hold of step {step}")
