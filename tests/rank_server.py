"""Starts ranks of one worker again and again, from a process that has its libraries loaded.

`python rank_server.py WORKER.py` reads lines of JSON from its input, `{"ranks": number,
"arguments": [word, …], "log": file}`, forks ranks that call the worker's `main()` with these
arguments, and answers each with a line, `{"status": of the first that failed, else 0}`. What
torchrun would do, without ten seconds of imports for every rank of every test. It ends with its
input.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import NoReturn


def loaded(worker: Path) -> ModuleType:
    """The worker's module, in this process."""
    spec = importlib.util.spec_from_file_location(worker.stem, worker)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[worker.stem] = module
    spec.loader.exec_module(module)
    return module


def rank(module: ModuleType, arguments: list[str], log: str, number: int, ranks: int,
         port: int) -> NoReturn:  # fmt: skip
    """What a fork does: the environment that torchrun gives a rank of one node, then `main()`."""
    import rank_end

    os.setpgid(0, 0)  # what it starts ends with it
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, descriptor in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, descriptor)
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    sys.argv = [str(module.__file__), *arguments]
    try:
        module.main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    rank_end.end()


def run(module: ModuleType, job: dict[str, object]) -> int:
    """The status of the ranks; those that are left when one fails are ended."""
    from torch.distributed import TCPStore

    ranks, arguments, log = job["ranks"], job["arguments"], job["log"]
    assert isinstance(ranks, int) and isinstance(arguments, list) and isinstance(log, str)
    store_side, rank_side = os.pipe()
    # The store is a process of its own: a fork of one with threads of C++ may hang.
    store_pid = os.fork()
    if not store_pid:
        os.setpgid(0, 0)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(rank_side, f"{store.port}\n".encode())
        signal.pause()
    port = int(os.read(store_side, 16))
    os.close(store_side)
    os.close(rank_side)
    alive = set()
    for number in range(ranks):
        pid = os.fork()
        if not pid:
            rank(module, arguments, log, number, ranks, port)
        alive.add(pid)
    status = 0
    while alive:
        pid, ended = os.wait()
        if pid in alive:
            alive.remove(pid)
            status = status or os.waitstatus_to_exitcode(ended)
        if status:
            end(alive)
            alive.clear()
    end({store_pid})
    return status


def end(processes: set[int]) -> None:
    """Kills them and what they have started."""
    for pid in processes:
        for kill in (os.killpg, os.kill):  # a fork may not have got so far as to have a group
            try:
                kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        os.waitpid(pid, 0)


def main(worker: str) -> None:
    """Serves until the input ends."""
    sys.path.insert(0, str(Path(worker).parent))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print on import is no answer
    module = loaded(Path(worker))
    for line in sys.stdin:
        print(json.dumps({"status": run(module, json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
