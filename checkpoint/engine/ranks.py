"""Many processes at one conversion, started by torchrun, srun or a loop in a shell.

They need nothing but the target's file system. Each rank says hello with a number of its own; rank
0 prepares the files, then writes the numbers that it saw, and a rank goes on when its number is
among them (so leftovers of an earlier start deceive nobody). A rank that is at work touches its
hello every second; one that has been silent for too long is given up by all others.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event, Thread
from typing import Any

from ...ir.errors import InvalidInput, ShardwrightError
from ...ir.serial import write_whole

SILENCE_SECONDS = 120.0
"""After which a rank counts as dead (a file system may show a change late)."""

_BEAT_SECONDS = 1.0
_LOOK_SECONDS = 0.05


class LostRank(ShardwrightError):
    """A rank died or never came (exit code 2); the same command goes on where it stopped."""


def from_environment(environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """(rank, number of ranks) as torchrun or srun say; (0, 1) where neither does."""
    given = os.environ if environment is None else environment
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in given and world in given:
            try:
                found = int(given[rank]), int(given[world])
            except ValueError:
                found = (-1, 0)
            if not 0 <= found[0] < found[1]:
                raise InvalidInput(f"{rank}={given[rank]}, {world}={given[world]}: no rank of any")
            return found
    return 0, 1


class Ranks:
    """This rank among the others; files are in `folder`."""

    def __init__(
        self, folder: Path, rank: int, world: int, silence_seconds: float = SILENCE_SECONDS
    ) -> None:
        self.rank, self.world = rank, world
        self._folder = folder
        self._silence = silence_seconds
        self._number = secrets.token_hex(8)
        self._over = Event()
        self._beat: Thread | None = None

    def start(self, fingerprint: str) -> None:
        """Says hello. `fingerprint` is of the conversion, which must be the same on all."""
        if self.world == 1:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._say({"number": self._number, "fingerprint": fingerprint})
        self._beat = Thread(target=self._keep_alive, daemon=True)
        self._beat.start()

    def stop(self) -> None:
        """Says goodbye."""
        self._over.set()
        if self._beat is not None:
            self._beat.join()
            self._path(self.rank).unlink(missing_ok=True)

    def prepared(self, fingerprint: str, prepare: Callable[[], None]) -> None:
        """Runs `prepare` on rank 0 when all are there; the others go on when it is done."""
        if self.world == 1:
            prepare()
            return
        start = self._folder / "start.json"
        if self.rank == 0:
            start.unlink(missing_ok=True)
            self._wait(lambda: len(self._hellos(fingerprint)) == self.world)
            prepare()
            self._numbers(start, fingerprint)
            return
        self._wait(lambda: self._number in _read(start).get("numbers", ()), [0])

    def finished(self, fingerprint: str) -> None:
        """Ends this rank's share; rank 0 waits for all others'."""
        if self.world == 1:
            return
        start = self._folder / "start.json"
        leader = self._number if self.rank == 0 else _read(start).get("leader")
        self._say({"number": self._number, "fingerprint": fingerprint, "done_for": leader})
        if self.rank == 0:

            def all_done() -> bool:
                self._numbers(start, fingerprint)
                hellos = self._hellos(fingerprint).values()
                done = [h for h in hellos if h.get("done_for") == self._number]
                return len(done) == self.world

            self._wait(all_done)

    def closed(self, error: str = "") -> None:
        """Rank 0 tells the others that all is over; they wait for it."""
        if self.world == 1:
            return
        end = self._folder / "end.json"
        if self.rank == 0:
            write_whole(end, json.dumps({"over": self._number, "error": error}), "end of ranks")
            deadline = time.monotonic() + 10.0
            while time.monotonic() < deadline and any(
                self._path(r).exists() for r in range(1, self.world)
            ):
                time.sleep(_LOOK_SECONDS)
            return
        first = _read(self._path(0)).get("number")
        self._wait(lambda: _read(end).get("over") == first, [0])
        if said := _read(end).get("error"):
            raise InvalidInput(f"rank 0: {said}")

    def _numbers(self, start: Path, fingerprint: str) -> None:
        numbers = sorted(h["number"] for h in self._hellos(fingerprint).values())
        if _read(start).get("numbers") != numbers:
            write_whole(
                start, json.dumps({"leader": self._number, "numbers": numbers}), "start of ranks"
            )

    def _hellos(self, fingerprint: str) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in range(self.world):
            hello = _read(self._path(rank))
            if not hello or (rank != self.rank and self._age(rank) > self._silence):
                continue
            if hello.get("fingerprint") == fingerprint:  # or it is left from something else
                found[rank] = hello
        return found

    def _wait(self, ready: Callable[[], bool], others: list[int] | None = None) -> None:
        """Until `ready`, as long as the others are heard of."""
        begun = time.monotonic()
        watched = [r for r in (others or range(self.world)) if r != self.rank]
        while not ready():
            time.sleep(_LOOK_SECONDS)
            if time.monotonic() - begun < self._silence:
                continue
            for rank in watched:
                if self._age(rank) > self._silence:
                    raise LostRank(
                        f"rank {rank} of {self.world} has not been heard of for "
                        f"{self._silence:.0f} s; start all ranks again with the same arguments, "
                        "they go on from here"
                    )

    def _age(self, rank: int) -> float:
        try:
            return time.time() - self._path(rank).stat().st_mtime
        except OSError:
            return float("inf")

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"

    def _say(self, what: Mapping[str, Any]) -> None:
        write_whole(self._path(self.rank), json.dumps(what), "hello of a rank")

    def _keep_alive(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            try:
                os.utime(self._path(self.rank))
            except OSError:
                continue


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
