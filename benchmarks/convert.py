"""Conversions of checkpoints: rates beside a plain copy, memory, planning, kills and corruptions.

    python benchmarks/convert.py                    every part, one table
    python benchmarks/convert.py --part planning    or rates, memory, kills, corruptions
    python benchmarks/convert.py --part rates --repeat 5 --parameters 194.05e6
    python benchmarks/convert.py --part memory --gigabytes 9      (takes twice that of the disk)

CPU seconds are the stable number on a shared machine; rates are of the best of several runs, the
copy taken in turns with the conversions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

COPY = """
import os, sys
source, target = sys.argv[1:]
os.makedirs(target)
for name in sorted(os.listdir(source)):
    a = os.open(os.path.join(source, name), os.O_RDONLY)
    b = os.open(os.path.join(target, name), os.O_WRONLY | os.O_CREAT)
    buffer = bytearray(4 << 20)
    while n := os.readv(a, [buffer]):
        os.write(b, memoryview(buffer)[:n])
    os.fsync(b)
"""

MERGE = """
import sys
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(*sys.argv[1:])
"""

STATES = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Ran:
    """What a process took."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    anonymous_bytes: int
    said: str


def ran(command: list[str]) -> Ran:
    """Runs a command; its memory is looked at every 10 ms."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    anonymous = peak = 0
    over = threading.Event()

    def watch() -> None:
        nonlocal anonymous, peak
        while not over.wait(0.01):
            with suppress(OSError, KeyError, ValueError):
                text = Path(f"/proc/{process.pid}/status").read_text()
                said = dict(line.split(":", 1) for line in text.splitlines())
                anonymous = max(anonymous, int(said["RssAnon"].split()[0]) * 1024)
                peak = max(peak, int(said["VmHWM"].split()[0]) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    over.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return Ran(
        time.monotonic() - begun,
        usage.ru_utime + usage.ru_stime,
        peak,
        anonymous,
        said,
    )


def convert_command(source: Path, target: Path, to: str, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "shardwright", "convert", str(source), str(target), "--to", to,
        "--json", *more,
    ]  # fmt: skip


# ---------------------------------------------------------------- data


def model(parameters: float) -> dict[str, tuple[int, ...]]:
    """Shapes of a Llama-like model with tied embeddings, of about so many parameters."""
    hidden, vocabulary = 1024, 32768
    layers = max(1, round((parameters - vocabulary * hidden) / 13.37e6))
    inner = round((parameters - vocabulary * hidden) / layers - 4 * hidden**2) // (3 * hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for k in range(layers):
        at = f"model.layers.{k}."
        for name in "qkvo":
            shapes[f"{at}self_attn.{name}_proj.weight"] = (hidden, hidden)
        shapes[f"{at}mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{at}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{at}input_layernorm.weight"] = (hidden,)
        shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
    return shapes | {"model.norm.weight": (hidden,)}


def write_shards(root: Path, shapes: dict[str, tuple[int, ...]], ranks: int, dim: int) -> int:
    """Shards as torch's DCP writes them for Hugging Face, a file per rank and state, cut along a
    dim; the bytes of all."""
    from safetensors.numpy import save_file

    root.mkdir(parents=True)
    generator = np.random.default_rng(0)
    total = 0
    for state in STATES:
        for rank in range(ranks):
            held: dict[str, np.ndarray] = {}
            offsets: dict[str, Any] = {}
            for name, shape in shapes.items():
                cut = min(dim, len(shape) - 1)
                each = -(-shape[cut] // ranks)
                own, begin = list(shape), [0] * len(shape)
                begin[cut] = min(rank * each, shape[cut])
                own[cut] = min(each, shape[cut] - begin[cut])
                held[name] = generator.standard_normal(own, dtype=np.float32)
                offsets[name] = {"saved_offsets": begin}
                total += held[name].nbytes
            metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"}
            if state != "weight":
                metadata["shardwright_state"] = state
            name = f"{state}-shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
            save_file(held, root / name, metadata)
    return total


# ---------------------------------------------------------------- parts


def rates(work: Path, options: argparse.Namespace) -> list[tuple[str, str]]:
    shapes = model(options.parameters)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    total = write_shards(work / "rows", shapes, 4, 0)
    write_shards(work / "columns", shapes, 4, 1)
    subprocess.run(
        convert_command(work / "rows", work / "ours", "universal"), check=True, capture_output=True
    )
    moments = ("--states", "master,exp_avg,exp_avg_sq")
    for to, more in (
        ("deepspeed", ("--set", "stage=1")),
        ("deepspeed", ("--set", "stage=3")),
        ("dcp", ()),
    ):
        name = to + "".join(more[1:]).removeprefix("stage=")
        made = convert_command(work / "rows", work / name, to, "--mesh", "dp=4", *more)
        subprocess.run(made, check=True, capture_output=True)
    cases: dict[str, tuple[str, str, tuple[str, ...]]] = {
        "pure moves: universal to safetensors": ("ours", "safetensors", ()),
        "fused: 4 ranks' rows to safetensors": ("rows", "safetensors", ()),
        "fused: 4 ranks' columns to safetensors": ("columns", "safetensors", ()),
        "fused: 4 ranks' rows to universal": ("rows", "universal", ()),
        "DeepSpeed ZeRO-1, 4 ranks, to safetensors": ("deepspeed1", "safetensors", moments),
        "DeepSpeed ZeRO-3, 4 ranks, to safetensors": ("deepspeed3", "safetensors", moments),
        "DCP, 4 ranks, to safetensors": ("dcp", "safetensors", ()),
        "safetensors shards to DCP": ("rows", "dcp", ()),
    }
    best: dict[str, Ran] = {}
    for _ in range(options.repeat):
        for name, (source, to, more) in cases.items():
            better(best, name, ran(convert_command(work / source, work / "out", to, *more)))
            shutil.rmtree(work / "out")
        copy = [sys.executable, "-c", COPY, str(work / "rows"), str(work / "out")]
        better(best, "plain copy", ran(copy))
        shutil.rmtree(work / "out")
    if options.peers:
        peers(work, best)
    plain = best["plain copy"]
    rows = [(f"{count / 1e6:.2f} M parameters x 3 states, 4 ranks", f"{total / 1e9:.2f} GB")]
    for name, run in best.items():
        rows.append(
            (
                name,
                f"{run.seconds:.2f} s, {total / run.seconds / 1e9:.2f} GB/s "
                f"({plain.seconds / run.seconds:.0%} of the copy), {run.cpu_seconds:.2f} CPU-s, "
                f"{run.anonymous_bytes / 1e6:.0f} MB anonymous, peak {run.peak_bytes / 1e6:.0f} MB",
            )
        )
    return rows


def peers(work: Path, best: dict[str, Ran]) -> None:
    """The libraries' own converters, on checkpoints in their formats."""
    universal = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    universal.append("--inject_missing_state")
    into = ["--output_folder", str(work / "out")]
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        for stage in ("1", "3"):
            (tag,) = (p for p in (work / f"deepspeed{stage}").iterdir() if p.is_dir())
            run = ran([*universal, "--input_folder", str(tag), *into])
            better(best, f"peer: ds_to_universal, ZeRO-{stage}", run)
            shutil.rmtree(work / "out")
        run = ran([sys.executable, "-c", MERGE, str(work / "dcp"), str(work / "out.pt")])
        better(best, "peer: dcp_to_torch_save", run)
        (work / "out.pt").unlink()


def better(best: dict[str, Ran], name: str, run: Ran) -> None:
    took = f"{run.seconds:.2f} s, {run.cpu_seconds:.2f} CPU-s"
    print(f"  {name}: {took}", file=sys.stderr, flush=True)
    if name not in best or run.seconds < best[name].seconds:
        best[name] = run


def memory(work: Path, options: argparse.Namespace) -> list[tuple[str, str]]:
    if options.gigabytes:
        return large(work, options.gigabytes)
    total = write_shards(work / "columns", model(options.parameters), 4, 1)
    rows = []
    for limit in ("128M", "256M", "512M"):
        out = work / "out"
        run = ran(convert_command(work / "columns", out, "universal", "--memory", limit))
        proof = ran(convert_command(work / "columns", out, "universal", "--memory", limit,
                                    "--overwrite", "--verify"))  # fmt: skip
        rows.append(
            (
                f"--memory {limit}, {total / 1e9:.2f} GB",
                f"peak {run.peak_bytes / 1e6:.0f} MB, verified {proof.peak_bytes / 1e6:.0f} MB",
            )
        )
        shutil.rmtree(out)
    return rows


def large(work: Path, gigabytes: float) -> list[tuple[str, str]]:
    """Memory over a checkpoint many times the limit; what is no longer needed is removed at once,
    so that no more than two copies are on the disk."""
    limit = "512M"
    total = write_shards(work / "rows", model(gigabytes * 1e9 / 12), 4, 0)
    source, rows = work / "rows", []
    for form, more in (("universal", ()), ("deepspeed", ("--set", "stage=1", "--mesh", "dp=4"))):
        made = work / form
        subprocess.run(convert_command(source, made, form, *more), check=True, capture_output=True)
        shutil.rmtree(source)
        source, found = made, []
        for check in ((), ("--verify",)):
            states = ("--states", "master,exp_avg,exp_avg_sq") if form == "deepspeed" else ()
            found.append(
                ran(convert_command(made, work / "out", "safetensors", "--memory", limit,
                                    *states, *check))
            )  # fmt: skip
            shutil.rmtree(work / "out")
        rows.append(
            (
                f"--memory {limit}, {total / 1e9:.2f} GB, {form} to safetensors",
                f"peak {found[0].peak_bytes / 1e6:.0f} MB, with --verify "
                f"{found[1].peak_bytes / 1e6:.0f} MB; {found[0].seconds:.0f} s, "
                f"{found[0].cpu_seconds:.1f} CPU-s",
            )
        )
    return rows


def kills(work: Path, options: argparse.Namespace) -> list[tuple[str, str]]:
    """Kills one conversion again and again, at random moments; what it ends with is compared."""
    shapes = {f"layers.{k}.weight": (1024, 512) for k in range(24)}
    write_shards(work / "columns", shapes, 4, 1)
    expected = work / "expected"
    subprocess.run(
        convert_command(work / "columns", expected, "universal"), check=True, capture_output=True
    )
    script = (
        "import sys; from shardwright.checkpoint.engine import streaming as s\n"
        "s._FLUSH_BYTES = 8 << 20; s.TASK_BYTES = 1 << 20\n"
        "from shardwright.checkpoint import convert\n"
        "open(sys.argv[3], 'w').close()\n"
        "convert(sys.argv[1], sys.argv[2], 'universal')\n"
    )
    generator = random.Random(0)
    done, same, attempts, spread = 0, 0, 0, 0.6
    while done < options.kills:
        attempts += 1
        out, begun = work / "out", work / "begun"
        finished = False
        while not finished:
            begun.unlink(missing_ok=True)
            run = subprocess.Popen(
                [sys.executable, "-c", script, str(work / "columns"), str(out), str(begun)]
            )
            while not begun.exists() and run.poll() is None:
                time.sleep(0.001)
            try:
                finished = run.wait(generator.uniform(0, spread)) == 0
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
                run.wait()
                done += 1
                # Killed after all was done: the target is there, and nothing is left to resume.
                finished = out.exists() and not (work / ".out.conversion/journal.0").exists()
                if done >= options.kills:
                    spread = 1e6
        same += equal_folders(expected, out)
        shutil.rmtree(out)
        assert not list(work.glob("*.partial"))
    return [
        (
            f"{done} SIGKILLs at random moments",
            f"{same} of {attempts} conversions ended with identical bytes",
        )
    ]


def equal_folders(one: Path, other: Path) -> bool:
    names = sorted(p.name for p in one.iterdir())
    return names == sorted(p.name for p in other.iterdir()) and all(
        (one / n).read_bytes() == (other / n).read_bytes() for n in names
    )


def damage(work: Path, options: argparse.Namespace) -> list[tuple[str, str]]:
    """Flips, truncations, missing and swapped files: each must be an error that names a file."""
    from corruptions import corruptions

    return corruptions(work, options.corruptions)


def planning(work: Path, options: argparse.Namespace) -> list[tuple[str, str]]:
    """Manifests only, in processes of their own (their memory is measured)."""
    rows = [fused_projection()]
    for case in ("megatron", "rows"):
        command = [sys.executable, __file__, "--plan-case", case]
        run = ran(command)
        rows.append((json.loads(run.said)["what"], json.loads(run.said)["took"]))
    return rows


def fused_projection() -> tuple[str, str]:
    """Megatron's fused projection of 128 groups, split tp=128 and tp=96 ways."""
    from shardwright.checkpoint.arrangement import arrange
    from shardwright.checkpoint.boxes import Boxes, coverage, overlaps
    from shardwright.checkpoint.factor_boxes import Split, shard
    from shardwright.checkpoint.notation import Arrangement

    groups, share, width, hidden = 384, 8, 128, 8192
    arranged = arrange(
        Arrangement.parse(
            "(g [q k v] d) h",
            {"q": ("q", "(g r d) h"), "k": ("k", "(g d) h"), "v": ("v", "(g d) h")},
        ),
        {"g": groups, "r": share, "d": width, "h": hidden},
    )
    dims, sizes = arranged.columns
    tables = [
        Boxes.joined([shard(dims, sizes, [Split(0, tp, k)], k) for k in range(tp)], 2)
        for tp in (128, 96)
    ]

    def once() -> int:
        one, other = (arranged.logical(table) for table in tables)
        met = 0
        for name in one:
            assert coverage(one[name], (int(one[name].size[:, 0].sum()), hidden)).exactly_once
            met += len(overlaps(one[name], other[name]))
        return met

    seconds = best_of(once, 20)
    return (
        "fused projection, tp=128 to tp=96: geometry, coverage, ranges",
        f"{seconds * 1e3:.1f} ms, {once()} ranges",
    )


def best_of(action: Callable[[], Any], times: int) -> float:
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        action()
        found.append(time.perf_counter() - begun)
    return min(found)


PARTS = {
    "planning": planning,
    "rates": rates,
    "memory": memory,
    "kills": kills,
    "corruptions": damage,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--parameters", type=float, default=194.05e6)
    parser.add_argument("--gigabytes", type=float, help="memory: of a checkpoint of this size")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--corruptions", type=int, default=1000)
    parser.add_argument("--peers", action="store_true", help="run the libraries' converters, too")
    parser.add_argument("--work", type=Path, help="where the data goes (a fast disk)")
    parser.add_argument("--plan-case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan_case:
        from large_layouts import plan_case

        begun = time.process_time()
        what, took = plan_case(options.plan_case)
        cpu = time.process_time() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        took += f"; {cpu:.1f} CPU-s with the manifests, peak {peak / 1e6:.0f} MB"
        print(json.dumps({"what": what, "took": took}))
        return
    rows: list[tuple[str, str]] = []
    for name in options.part or PARTS:
        with tempfile.TemporaryDirectory(dir=options.work, prefix="convert-") as folder:
            rows += PARTS[name](Path(folder), options)
    width = max(len(row[0]) for row in rows)
    for what, took in rows:
        print(f"{what:<{width}}  {took}")


if __name__ == "__main__":
    main()
