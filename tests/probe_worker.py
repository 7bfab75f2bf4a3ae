"""One rank of a probe: `python probe_worker.py OUTPUT BUDGET_S RANKS_PER_HOST [TROUBLE]`.

Ranks pretend to be on hosts of so many ranks. TROUBLE is `kill:R` (rank R kills itself midway)
or `slow:R` (rank R works a while before everything it measures).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

from shardwright.costmodel.probe import run_probe
from shardwright.costmodel.probe.exchange import Exchange, Sample
from shardwright.costmodel.probe.schedule import Item
from shardwright.ir.errors import ShardwrightError

_DIES_AT = 40
_BUSY_S = 0.02


def main(output: str, budget_s: float, ranks_per_host: int, trouble: str = "") -> int:
    rank = int(os.environ["RANK"])
    socket.gethostname = lambda: f"host{rank // ranks_per_host}"
    what, _, who = trouble.partition(":")
    if who and int(who) == rank:
        _trouble(what)
    try:
        run_probe(output, device="local", budget_s=budget_s, wait_s=10, on="cpu")
    except ShardwrightError as error:
        print(f"shardwright: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _trouble(what: str) -> None:
    measure = Exchange.measure
    measured = 0

    def troubled(self: Exchange, item: Item) -> Sample:
        nonlocal measured
        measured += 1
        if what == "kill" and measured == _DIES_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "slow":
            until = time.process_time() + _BUSY_S
            while time.process_time() < until:
                pass
        return measure(self, item)

    Exchange.measure = troubled  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]))
