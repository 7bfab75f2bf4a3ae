"""Says which rank died: every rank beats, and a watcher reads the beats.

When a rank dies, some of the others get an error from the process group, some wait for ever, and
torchrun asks all to stop. In each case a thread finds whose beats have ended, one rank tells the
user in one line, and all leave.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from ...ir.errors import InvalidInput
from .launch import listed

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

BEAT_S = 0.5
SILENCE_S = 5.0
"""After an error, whoever has not beaten for this long is dead. torchrun kills all 30 s after it
asked them to stop (torch.distributed.elastic), so the verdict must come before."""
LOST_S = 30.0
"""Without an error: a machine that hangs for less is only slow."""
_EXIT = InvalidInput.exit_code


@dataclass(slots=True)
class Beats:
    """The last beat seen of each rank, and when it changed (seconds of the callers' clock)."""

    hosts: tuple[str, ...]
    started_s: float
    seen: dict[int, bytes] = field(default_factory=dict)
    changed_s: dict[int, float] = field(default_factory=dict)

    def read(self, rank: int, beat: bytes, now_s: float) -> None:
        """Notes what was read of a rank."""
        if self.seen.get(rank) != beat:
            self.seen[rank] = beat
            self.changed_s[rank] = now_s

    def silent(self, for_s: float, now_s: float, among: Iterable[int] | None = None) -> list[int]:
        """Ranks (of all, or of some) whose beat has not changed for so long."""
        return [
            rank
            for rank in (range(len(self.hosts)) if among is None else among)
            if now_s - self.changed_s.get(rank, self.started_s) >= for_s
        ]

    def behind(self) -> list[int]:
        """Ranks that have done fewer steps than others, by their last beats."""
        steps = {rank: int(beat.split(b":")[1]) for rank, beat in self.seen.items()}
        most = max(steps.values(), default=0)
        return [rank for rank, step in steps.items() if step < most]

    def verdict(self, alarm: str, now_s: float) -> str:
        """What happened: who is dead, else who keeps the others waiting, else the first error."""
        dead = self.silent(SILENCE_S, now_s)
        if dead:
            left = len(self.hosts) - len(dead)
            return (
                f"{self.named(dead)} died, {left} of {len(self.hosts)} ranks are left: "
                "mend it, or start again without it"
            )
        late = self.behind()
        if late and len(late) < len(self.hosts):
            return f"{self.named(late)} did not keep up with the others: {alarm}"
        return alarm

    def named(self, ranks: list[int]) -> str:
        """`rank 3 (host gpu07)`, `ranks 8-15 (host gpu01)`."""
        some = "rank" if len(ranks) == 1 else "ranks"
        hosts = sorted({self.hosts[rank] for rank in ranks})
        shown = ", ".join(hosts[:4]) + (", …" if len(hosts) > 4 else "")
        return f"{some} {listed(ranks)} ({'host' if len(hosts) == 1 else 'hosts'} {shown})"


class Watch:
    """The thread of one rank. `step` is advanced by the work, so that beats say how far it is."""

    def __init__(self, store: Store, rank: int, hosts: tuple[str, ...]) -> None:
        self.step = 0
        self._store = store
        self._rank = rank
        self._beats = Beats(hosts, time.monotonic())
        self._alarmed_s: float | None = None
        self._counter = 0
        self._stopping = threading.Event()
        self._woken, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Starts beating; from here on SIGTERM is answered with a verdict."""
        # The handler itself runs only when the main thread leaves a blocking collective; the
        # wake-up byte is written at once (signal.set_wakeup_fd).
        os.set_blocking(self._wake, False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch: the work is done."""
        self._stopping.set()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(self._wake, b"\0")
        self._thread.join()
        os.close(self._wake)
        os.close(self._woken)

    def failed(self, error: Exception) -> NoReturn:
        """Leaves with all ranks after an error of the process group: a rank may have died."""
        reason = " ".join(str(error).split())[:200]
        with suppress(RuntimeError):  # where the store has gone too, the thread finds that out
            self._alarm(f"rank {self._rank} reports {type(error).__name__}: {reason}")
        self._thread.join()  # it ends the process
        os._exit(_EXIT)

    def refused(self, line: str) -> NoReturn:
        """Leaves with all ranks after an error of this rank's own, with that line."""
        self._end(line)

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._woken], [], [], BEAT_S)
            woken = os.read(self._woken, 64) if ready else b""
            if self._stopping.is_set():
                return
            try:
                if signal.SIGTERM in woken:
                    self._alarm("the ranks were told to stop (SIGTERM)")
                self._beat()
                self._look()
            except RuntimeError:  # DistError: the store has gone, and with it the rank that held it
                if self._rank == min(1, len(self._beats.hosts) - 1):
                    self._say(f"{self._beats.named([0])} died: its store no longer answers")
                os._exit(_EXIT)

    def _beat(self) -> None:
        self._counter += 1
        self._store.set(f"beat/{self._rank}", f"{self._counter}:{self.step}")

    def _alarm(self, reason: str) -> None:
        self._store.compare_set("alarm", "", reason)

    def _look(self) -> None:
        """Ends the process once there is a verdict; gives one where it is this rank's turn."""
        if self._store.check(["verdict"]):
            if not self._store.get("verdict").startswith(b"%d|" % self._rank):
                os._exit(_EXIT)
            return  # the main thread is telling the user, and ends the process
        now_s = time.monotonic()
        # All beats are read by rank 0 only; the others read rank 0's, in case it is the dead one.
        mine = range(len(self._beats.hosts)) if self._rank == 0 else (0,)
        present = [rank for rank in mine if self._store.check([f"beat/{rank}"])]
        for rank in present:
            self._beats.read(rank, self._store.get(f"beat/{rank}"), now_s)
        if self._alarmed_s is None and self._store.check(["alarm"]):
            self._alarmed_s = now_s
        waited_s = 0.0 if self._alarmed_s is None else now_s - self._alarmed_s
        if self._rank:
            patience_s = LOST_S if self._alarmed_s is None else 2 * SILENCE_S
            if 0 in self._beats.silent(patience_s, now_s, among=(0,)):
                self._end(self._beats.named([0]) + " died: it no longer answers")
            return
        if self._alarmed_s is None:
            lost = self._beats.silent(LOST_S, now_s)
            if lost:
                self._end(f"{self._beats.named(lost)} died: no answer for {LOST_S:g} s")
        elif waited_s >= SILENCE_S + 2 * BEAT_S:
            alarm = self._store.get("alarm").decode()
            self._end(self._beats.verdict(alarm, now_s))

    def _end(self, line: str) -> NoReturn:
        """Tells the user, unless another rank has already, and ends this process."""
        mine = f"{self._rank}|{line}"
        if self._store.compare_set("verdict", "", mine).decode() == mine:
            self._say(line)
            time.sleep(4 * BEAT_S)  # the store may go with this rank: let the others read it
        os._exit(_EXIT)

    def _say(self, line: str) -> None:
        start = "\n" if sys.stderr.isatty() else ""  # below a progress bar
        os.write(2, f"{start}shardwright: {line}\n".encode())
