"""Checkpoints damaged at random: flips, truncations, missing and swapped files, of one file each.

Found is what is an error that names the file, or the checkpoint's directory. Four checkpoints: our
universal form, ZeRO-2 of DeepSpeed and DCP as we write them (swapped with the same file of a later
step, of equal shapes), and DCP as torch writes it (swapped with one of other shapes: it has nothing
that tells equal ones apart). Torch's index has no checksum; flips in it that leave every tensor's
bytes as they were are counted apart, as not protected by the format.
"""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROWS = 40
INDEX = ".metadata"


def corruptions(work: Path, trials: int) -> list[tuple[str, str]]:
    """Rows of a table: `trials` corruptions of each checkpoint."""
    rows: list[tuple[str, str]] = []
    for name, (good, other) in _checkpoints(work).items():
        rows += _damaged(name, good, other, work, trials)
    return rows


def _checkpoints(work: Path) -> dict[str, tuple[Path, Path]]:
    """By name, a checkpoint and the one that files are swapped with."""
    from shardwright.checkpoint import convert

    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    _saved(work / "step3", 3, ROWS)
    _saved(work / "step4", 4, ROWS)
    _saved(work / "larger", 3, ROWS + 2)
    made = {"DCP of torch": (work / "step3", work / "larger")}
    for to, label, options in (
        ("dcp", "DCP of ours", {"mesh": {"dp": 2}}),
        ("deepspeed", "DeepSpeed ZeRO-2", {"mesh": {"dp": 2}, "flags": {"stage": 2}}),
        ("universal", "universal", {}),
    ):
        for step in ("step3", "step4"):
            convert(work / step, work / f"{to}-{step}", to, **options)
        made[label] = (work / f"{to}-step3", work / f"{to}-step4")
    return made


def _saved(root: Path, step: int, rows: int) -> None:
    """A model with AdamW's state, as torch's DCP saves it: small and large tensors."""
    import torch
    import torch.distributed.checkpoint as dcp

    generator = torch.Generator().manual_seed(step)
    shapes = {"norm.weight": (rows,), **{f"layers.{k}.weight": (rows + k, 50) for k in range(3)}}

    def drawn() -> dict[str, Any]:
        return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}

    weights, first, second = drawn(), drawn(), drawn()
    state = {
        name: {
            "step": torch.tensor(float(step)), "exp_avg": first[name], "exp_avg_sq": second[name]
        }
        for name in shapes
    }  # fmt: skip
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optim = {"state": state, "param_groups": [{**group, "params": list(shapes)}]}
    dcp.save({"model": weights, "optim": optim}, checkpoint_id=root, no_dist=True)


def _damaged(name: str, good: Path, other: Path, work: Path, trials: int) -> list[tuple[str, str]]:
    from shardwright.checkpoint import convert
    from shardwright.ir import ShardwrightError

    convert(good, work / "expected", "universal")
    expected, manifest = _tensors(work / "expected"), _manifest(work / "expected")
    shutil.rmtree(work / "expected")
    generator = random.Random(1)
    found: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    harmless = renamed = 0
    missed = []
    for trial in range(trials):
        bad = work / "bad"
        shutil.copytree(good, bad)
        kind = generator.choice(["flip", "flip", "truncate", "missing", "swap"])
        file = generator.choice([p for p in sorted(bad.rglob("*")) if p.is_file()])
        _corrupt(kind, file, next(other.rglob(file.name), None), generator)
        tried[kind] += 1
        try:
            convert(bad, work / "out", "universal")
            if (name, kind, file.name) == ("DCP of torch", "flip", INDEX) and (
                _tensors(work / "out") == expected
            ):
                same = _manifest(work / "out") == manifest
                harmless, renamed = harmless + same, renamed + (not same)
            else:
                missed.append(f"{trial}: {kind} of {file.name}")
        except ShardwrightError as error:
            if file.name in str(error) or str(bad) in str(error):
                found[kind] += 1
            else:
                missed.append(f"{trial}: {kind} of {file.name} said {error}")
        for rest in (bad, work / "out", work / "out.partial", work / ".out.conversion"):
            shutil.rmtree(rest, ignore_errors=True)
    said = ", ".join(f"{kind} {found[kind]}/{tried[kind]}" for kind in sorted(tried))
    rows = [(f"{trials} corruptions of {name}: found and named", said)]
    if harmless or renamed:
        rows.append(
            (
                f"  flips of {INDEX}, not protected by the format",
                f"{harmless} change nothing that is read, {renamed} a name",
            )
        )
    return rows + [("  missed", one) for one in missed[:10]]


def _tensors(root: Path) -> Counter[tuple[str, tuple[int, ...], bytes]]:
    """What the tensors of a universal checkpoint are, whatever their names."""
    from safetensors.numpy import load_file

    held: Counter[tuple[str, tuple[int, ...], bytes]] = Counter()
    for file in sorted(root.glob("*.safetensors")):
        for array in load_file(file).values():
            held[str(array.dtype), array.shape, array.tobytes()] += 1
    return held


def _manifest(root: Path) -> bytes:
    return (root / "shardwright.json").read_bytes()


def _corrupt(kind: str, file: Path, other: Path | None, generator: random.Random) -> None:
    raw = bytearray(file.read_bytes())
    if kind == "flip":
        raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
        file.write_bytes(raw)
    elif kind == "truncate":
        os.truncate(file, generator.randrange(len(raw)))
    elif kind == "missing":
        file.unlink()
    else:
        assert other is not None
        shutil.copy(other, file)
