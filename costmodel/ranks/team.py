"""Ranks that measure together: they start each piece of work at once, and rank 0 decides."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from ...ir.errors import InvalidInput, ShardwrightError
from .join import Joined, Silent, join
from .launch import Launch
from .watch import Watch

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
DeviceKind = Literal["auto", "cpu", "cuda"]
_PATIENCE = timedelta(minutes=10)
"""A collective that takes longer has failed; dead ranks are found sooner, by their beats."""


@dataclass(frozen=True, slots=True)
class Team:
    """This rank among the others; a process started by itself is a team of one.

    `device` is what it measures; `hosts` names the machine of every rank.
    """

    rank: int
    hosts: tuple[str, ...]
    device: torch.device
    watch: Watch | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.hosts)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that decides and speaks to the user."""
        return self.rank == 0

    @property
    def ranks_here(self) -> int:
        """How many ranks share this rank's machine."""
        return self.hosts.count(self.hosts[self.rank])

    def together(self) -> float:
        """Waits for all ranks; seconds it took, which is little for the rank that comes last."""
        if self.watch is None:
            return 0.0
        import torch
        import torch.distributed as dist

        self.watch.step += 1
        before = time.perf_counter()
        dist.all_reduce(torch.zeros(1))  # over gloo on GPU machines too: it waits for no kernel
        return time.perf_counter() - before

    def told(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, on every rank; `decide` runs on rank 0 only."""
        if self.watch is None:
            return decide()
        import torch
        import torch.distributed as dist

        said: list[Any] = [decide() if self.leads else None]
        dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
        return cast(T, said[0])

    def gathered(self, value: T) -> list[T]:
        """Everyone's value by rank, on rank 0; empty on the others."""
        if self.watch is None:
            return [value]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.world_size if self.leads else None
        dist.gather_object(value, found, dst=0)
        return cast(list[T], found or [])


def alone(kind: DeviceKind = "auto") -> Team:
    """A team of one. Raises InvalidInput if CUDA is asked for and there is none."""
    return Team(0, (socket.gethostname(),), _device(kind, 0, socket.gethostname()))


@contextmanager
def team_of(
    launch: Launch, wait_s: float, kind: DeviceKind = "auto", debug: bool = False
) -> Iterator[Team]:
    """The ranks that were started, as a process group over gloo, and NCCL where there are GPUs.

    Raises InvalidInput if not all come within `wait_s` seconds. An error inside ends all ranks with
    exit code 2 and one line from one of them, which names ranks that died.
    """
    # What the process group logs when a rank dies would bury the line that says which.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    import torch.distributed as dist

    joined = join(launch, wait_s)
    device = _agreed_device(launch, joined, kind)
    watch = Watch(cast(Any, joined.store).clone(), launch.rank, joined.hosts)
    watch.start()
    team = Team(launch.rank, joined.hosts, device, watch)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "cpu:gloo",
            store=dist.PrefixStore(  # type: ignore[attr-defined]
                "group", joined.store
            ),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=_PATIENCE,
        )
        yield team
        team.together()
    except ShardwrightError as error:
        watch.refused(str(error))
    except (RuntimeError, OSError) as error:
        if debug:
            traceback.print_exc()
        watch.failed(error)
    except Exception as error:
        if debug:
            traceback.print_exc()
        watch.refused(f"rank {launch.rank} (host {launch.host}): {error!r}")
    watch.stop()
    _leave(launch, joined)


def _leave(launch: Launch, joined: Joined) -> None:
    """The store may go with rank 0, so rank 0 goes last."""
    import torch.distributed as dist

    dist.destroy_process_group()
    joined.store.add("left", 1)
    deadline = time.monotonic() + 10
    while launch.rank == 0 and not launch.agent_store and time.monotonic() < deadline:
        if joined.store.add("left", 0) == launch.world_size:
            break
        time.sleep(0.01)


def _agreed_device(launch: Launch, joined: Joined, kind: DeviceKind) -> torch.device:
    """This rank's device; all must be of one kind, because they share collectives."""
    problem, device = "", None
    try:
        device = _device(kind, launch.local_rank, launch.host)
    except InvalidInput as error:
        problem = str(error)
    joined.store.set(f"kind/{launch.rank}", problem or (device.type if device else ""))
    kinds = [joined.store.get(f"kind/{rank}").decode() for rank in range(launch.world_size)]
    if device is not None and set(kinds) == {device.type}:
        return device
    if launch.rank:
        raise Silent
    odd = next((k for k in kinds if k not in ("cpu", "cuda")), None)
    gpus = [rank for rank, found in enumerate(kinds) if found == "cuda"]
    raise InvalidInput(
        odd
        or f"{len(gpus)} of {len(kinds)} ranks have a GPU, expected all or none: "
        f"{joined.hosts[kinds.index('cpu')]} has none to give"
    )


def _device(kind: DeviceKind, local_rank: int, host: str) -> torch.device:
    import torch

    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise InvalidInput(
            f"local rank {local_rank} on host {host} has no GPU, expected one for each rank: "
            f"{count} are visible; start {count or 'no'} ranks there, or choose the cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
