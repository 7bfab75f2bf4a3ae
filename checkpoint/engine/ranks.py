"""Many processes at one conversion, started by torchrun, srun or a loop in a shell.

They need nothing but the target's file system. Rank 0 calls: it writes a number of its own, and
the others answer with it in a hello of theirs, so that neither the leftovers of an earlier start
nor another job at the same target deceive anybody. When all have answered with the same arguments,
rank 0 prepares the files, and the ranks that it names go on.

A rank that fails says so, and all others end with its message. One that is killed is missed: by
its process where it ran on the same machine, else by its hello, which a living rank touches every
second. Every rank looks after its neighbour and rank 0, so that a job of a thousand ranks reads no
more files than one of two.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from ...ir.errors import InvalidInput, ShardwrightError
from ...ir.serial import write_whole

SILENCE_SECONDS = 60.0
"""After which a rank of another machine counts as dead, and one that never came as missing."""

_BEAT_SECONDS = 1.0
_LOOK_SECONDS = 0.05
_GOODBYE_SECONDS = 10.0

_AGAIN = "start all ranks again with the same arguments, they go on from here"


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
        self._hello: dict[str, Any] = {}
        self._numbers: dict[int, str] = {}
        self._seen: dict[Path, tuple[int, float]] = {}
        self._lost = ""
        self._over = Event()
        self._beat: Thread | None = None

    def start(self, fingerprint: str) -> None:
        """Says hello. `fingerprint` is of the conversion, which must be the same on all."""
        if self.world == 1:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._hello = {"fingerprint": fingerprint, "process": _process(), "for": ""}
        self._say()
        self._beat = Thread(target=self._keep_alive, daemon=True)
        self._beat.start()

    def stop(self) -> None:
        """Says goodbye."""
        self._over.set()
        if self._beat is not None:
            self._beat.join()
            self._path(self.rank, self._number).unlink(missing_ok=True)

    def prepared(self, fingerprint: str, prepare: Callable[[], None]) -> None:
        """Runs `prepare` on rank 0 when all are there; the others go on when it is done."""
        if self.world == 1:
            prepare()
            return
        if self.rank == 0:
            self._call({})
            self._say(**{"for": self._number})
            self._wait(lambda: self._answered(fingerprint))
            prepare()
            self._call(self._numbers)
            return
        self._wait(self._called)

    def check(self) -> None:
        """Raises LostRank where another rank is known to have failed or died."""
        if self._lost:
            raise LostRank(self._lost)

    def finished(self) -> None:
        """Ends this rank's share; rank 0 waits for all others'."""
        if self.world == 1:
            return
        self._say(done=True)
        if self.rank == 0:
            others = [self._path(rank, number) for rank, number in self._numbers.items()]
            self._wait(lambda: all(_read(path).get("done") for path in others))

    def closed(self) -> None:
        """Rank 0 tells the others that all is over; they wait for it."""
        if self.world == 1:
            return
        end = self._folder / "end.json"
        if self.rank == 0:
            self._over.set()  # the others leave: nobody is missed any more
            write_whole(end, json.dumps({"over": self._number}), "end of ranks")
            self._goodbye()
            return
        self._wait(lambda: _read(end).get("over") == self._numbers[0])

    def failed(self, error: str) -> None:
        """Tells the others why this rank does not go on."""
        if self.world == 1 or not self._leader:
            return
        if not self._lost:
            self._tell(f"rank {self.rank} of {self.world} ended: {error}")
        if self.rank == 0:
            self._goodbye()

    # ---------------------------------------------------------------- at the beginning

    @property
    def _leader(self) -> str:
        """The number of the rank 0 to which this rank answers."""
        return str(self._hello.get("for", ""))

    def _call(self, numbers: Mapping[int, str]) -> None:
        said = {"leader": self._number, "process": _process(), "numbers": numbers}
        write_whole(self._folder / "start.json", json.dumps(said), "start of ranks")

    def _called(self) -> bool:
        """Answers a call; true when rank 0 has named this rank."""
        said = _read(self._folder / "start.json")
        leader, numbers = said.get("leader"), said.get("numbers") or {}
        if leader and numbers and numbers.get(str(self.rank)) != self._number:
            if _gone(said.get("process")) is False:
                raise InvalidInput(
                    f"{self._folder.parent}: another job converts to the same target; wait until "
                    "it is done, or choose another target"
                )
            return False  # what an earlier start left
        if leader and leader != self._leader:
            self._say(**{"for": leader})
        if numbers:
            self._numbers = {int(rank): str(number) for rank, number in numbers.items()}
        return bool(numbers)

    def _answered(self, fingerprint: str) -> bool:
        """Whether all ranks have answered this call."""
        for path in self._folder.glob("rank-*.json"):
            _, rank, number = path.name.removesuffix(".json").split("-")
            hello = _read(path)
            if hello.get("for") != self._number:
                continue
            if hello.get("fingerprint") != fingerprint:
                raise InvalidInput(
                    f"rank {rank} of {self.world} has other arguments than rank 0, or sees other "
                    "files of the source; start all ranks alike"
                )
            self._numbers[int(rank)] = number
        return len(self._numbers) == self.world

    # ---------------------------------------------------------------- who is there

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Until `ready`, as long as the others are heard of."""
        begun = time.monotonic()
        while not ready():
            time.sleep(_LOOK_SECONDS)
            self._look(range(self.world) if self.rank == 0 else [0])
            self.check()
            if len(self._numbers) == self.world or time.monotonic() - begun < self._silence:
                continue
            missing = 0 if self.rank else min(set(range(self.world)) - self._numbers.keys())
            raise LostRank(
                f"rank {missing} of {self.world} has not been heard of for {self._silence:.0f} s; "
                f"{_AGAIN}"
            )

    def _look(self, ranks: Sequence[int]) -> None:
        """Notes what another rank says of its end, and who is gone of some."""
        said = _read(self._folder / "lost.json")
        if said and said.get("leader") == self._leader:
            self._lost = self._lost or str(said["error"])
        for rank in ranks:
            number = self._numbers.get(rank)
            if rank == self.rank or number is None or self._lost:
                continue
            path = self._path(rank, number)
            try:
                with path.open("rb") as file:  # opening asks a network's file system anew
                    changed = os.fstat(file.fileno()).st_mtime_ns
                    process = json.loads(file.read()).get("process")
            except (OSError, ValueError):
                continue  # it has said goodbye
            if self._seen.get(path, (0, 0.0))[0] != changed:
                self._seen[path] = (changed, time.monotonic())
            if _gone(process):
                self._tell(f"rank {rank} of {self.world} was killed; {_AGAIN}")
            elif time.monotonic() - self._seen[path][1] > self._silence:
                self._tell(
                    f"rank {rank} of {self.world} has not been heard of for {self._silence:.0f} s; "
                    f"{_AGAIN}"
                )

    def _tell(self, error: str) -> None:
        self._lost = error
        said = json.dumps({"leader": self._leader, "error": error})
        with suppress(ShardwrightError, OSError):
            write_whole(self._folder / "lost.json", said, "lost rank")

    def _goodbye(self) -> None:
        """Waits a while until the others have gone."""
        deadline = time.monotonic() + _GOODBYE_SECONDS
        others = [self._path(rank, n) for rank, n in self._numbers.items() if rank != self.rank]
        while time.monotonic() < deadline and any(
            path.exists() and not _gone(_read(path).get("process")) for path in others
        ):
            time.sleep(_LOOK_SECONDS)

    def _path(self, rank: int, number: str) -> Path:
        return self._folder / f"rank-{rank}-{number}.json"

    def _say(self, **more: Any) -> None:
        self._hello |= more
        write_whole(self._path(self.rank, self._number), json.dumps(self._hello), "hello of a rank")

    def _keep_alive(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self._path(self.rank, self._number))
            if self._numbers:
                self._look([(self.rank + 1) % self.world, 0])


def _process() -> list[str]:
    """This process, as only processes of the same machine can name it: the machine's boot, the
    namespace of process numbers, the number, and when it began."""
    return [_boot(), *_named("self"), str(os.getpid())]


def _boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _named(process: str) -> list[str]:
    """When a process began (field 22 of its stat); nothing for one that is gone or dead."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else [fields[19]]


def _gone(process: Any) -> bool | None:
    """Whether a process has ended; None where that cannot be seen from here."""
    if not isinstance(process, list) or len(process) != 3 or not _boot() or process[0] != _boot():
        return None
    return _named(process[2]) != [process[1]]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
