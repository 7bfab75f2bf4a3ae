"""How ranks find each other: a key-value store that all reach, and who did not come."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from ...ir.errors import InvalidInput
from .launch import Launch, listed

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_POLL_S = 0.2
_ANSWER_S = 30.0
"""How long after its own deadline a rank waits for rank 0's word on who came."""
_FAREWELL_S = 5.0


@dataclass(frozen=True, slots=True)
class Joined:
    """The store of the ranks that came, and the host of each, by rank."""

    store: Store
    hosts: tuple[str, ...]


class Silent(SystemExit):
    """Ends a rank without a word, because another one tells the user."""

    def __init__(self) -> None:
        super().__init__(InvalidInput.exit_code)


def join(launch: Launch, wait_s: float) -> Joined:
    """Waits for all ranks.

    Raises InvalidInput on rank 0 if some have not come within `wait_s` seconds (naming them) or if
    two processes are the same rank, and Silent on the others; on every rank if rank 0 is missing.
    """
    store = _store(launch, wait_s)
    twice = store.add(f"came/{launch.rank}", 1) > 1
    if twice:
        raise InvalidInput(
            f"rank {launch.rank} was started twice (host {launch.host}), expected every rank of "
            f"{launch.world_size} once: check RANK or SLURM_PROCID"
        )
    store.set(f"host/{launch.rank}", launch.host)
    if launch.rank == 0:
        problem = _wait_for_all(store, launch.world_size, wait_s)
        store.set("joined", problem or "all")
        if problem:
            _let_others_read(store, launch.world_size)
            raise InvalidInput(problem)
    else:
        store.wait(["joined"], timedelta(seconds=wait_s + _ANSWER_S))
        refused = store.get("joined") != b"all"
        store.add("read", 1)
        if refused:
            raise Silent
    hosts = [store.get(f"host/{rank}").decode() for rank in range(launch.world_size)]
    return Joined(store, tuple(hosts))


def _store(launch: Launch, wait_s: float) -> Store:
    from torch.distributed import (  # type: ignore[attr-defined]
        DistError,
        PrefixStore,
        TCPStore,
    )

    at = f"{launch.address}:{launch.port} (MASTER_ADDR, MASTER_PORT)"
    serves = launch.rank == 0 and not launch.agent_store
    try:
        store = TCPStore(
            launch.address,
            launch.port,
            launch.world_size,
            is_master=serves,
            timeout=timedelta(seconds=wait_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except DistError as error:
        if serves:
            reason = " ".join(str(error).split())
            raise InvalidInput(f"rank 0 cannot listen at {at}: {reason}") from None
        raise InvalidInput(
            f"rank {launch.rank}: nothing answered at {at} within {wait_s:g} s, "
            "expected rank 0 there"
        ) from None
    return PrefixStore(f"shardwright/{launch.attempt}", store)


def _wait_for_all(store: Store, world_size: int, wait_s: float) -> str:
    """Empty when all have come, else the line that says who has not."""
    deadline = time.monotonic() + wait_s
    missing = set(range(world_size))
    while missing:
        missing = {rank for rank in missing if not store.check([f"host/{rank}"])}
        if missing and time.monotonic() > deadline:
            some = "rank" if len(missing) == 1 else "ranks"
            return (
                f"{some} {listed(missing)} of {world_size} did not come within {wait_s:g} s: "
                f"expected {world_size} processes (WORLD_SIZE), {world_size - len(missing)} came"
            )
        if missing:
            time.sleep(_POLL_S)
    return ""


def _let_others_read(store: Store, world_size: int) -> None:
    """The store may go with rank 0, so it stays until those that came know why."""
    came = sum(store.check([f"host/{rank}"]) for rank in range(world_size))
    deadline = time.monotonic() + _FAREWELL_S
    while store.add("read", 0) < came - 1 and time.monotonic() < deadline:
        time.sleep(_POLL_S)
