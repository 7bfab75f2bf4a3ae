"""From a row to what a cost model is asked: model, cluster, workload, configuration, runtime.

Physical facts only: what the row says, what names stand for (`facts.yaml`), and what the row's
architecture has in common with its published configuration (`architecture.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml

from shardwright import Cluster, InvalidInput, Workload
from shardwright.costmodel.runtime import Runtime
from shardwright.ir.from_dims import TransformerDims
from shardwright.ir.workload import Precision

from .architecture import dims_of
from .rows import Run

Entry = TypeVar("Entry")
Recompute = Literal["none", "selective", "full"]
MemoryKind = Literal["allocated", "reserved", "device"]
"""What a source's memory figure counts: tensors (`torch.cuda.max_memory_allocated`), what the
allocator holds (`max_memory_reserved`), or all that the driver reports (`nvidia-smi`)."""

LEAST_THAT_FITS: tuple[Recompute, ...] = ("none", "selective", "full")
"""The rule for every source that does not name its recompute mode: the least that fits. NVIDIA's
performance tables omit it; their recipes recompute only where memory asks for it."""


@dataclass(frozen=True, slots=True)
class Setup:
    """A row, ready to be predicted. `recompute` holds the modes to try, the first that fits counts;
    `fix` the rest of the configuration; `notes` where a fact had to be replaced by the nearest."""

    run: Run
    dims: TransformerDims
    cluster: Cluster
    workload: Workload
    fix: Mapping[str, Any]
    recompute: tuple[Recompute, ...]
    runtime: Runtime
    memory_kind: MemoryKind
    notes: tuple[str, ...] = ()

    @property
    def memory_known(self) -> bool:
        """Whether the source says how much memory its GPUs have (vTrain does not)."""
        return "GB" in self.run.gpu


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that cannot be predicted, and why."""

    run: Run
    reason: str


def setup_of(run: Run) -> Setup | Skipped:
    """What a row describes, or the reason why it cannot be predicted."""
    try:
        return _setup(run)
    except InvalidInput as error:
        return Skipped(run, str(error))


def _setup(run: Run) -> Setup:
    if run.config_complete is False and not run.memory_only:
        raise InvalidInput(f"the source is incomplete: {run.missing.strip(';') or 'unsaid'}")
    dims = dims_of(run)
    for name in ("n_gpus", "gbs", "mbs"):
        if getattr(run, name) is None:
            raise InvalidInput(f"{name} is empty")
    _check_degrees(run)
    workload, notes = _workload(run)
    return Setup(
        run=run,
        dims=dims,
        cluster=_cluster(run),
        workload=workload,
        fix=_fix(run),
        recompute=_recompute(run),
        runtime=_runtime(run),
        memory_kind=_memory_kind(run),
        notes=notes,
    )


def _check_degrees(run: Run) -> None:
    tp, pp, dp, cp = (getattr(run, name) or 1 for name in ("tp", "pp", "dp", "cp"))
    if tp * pp * dp * cp != run.n_gpus:
        raise InvalidInput(
            f"tp*pp*dp*cp = {tp}*{pp}*{dp}*{cp} = {tp * pp * dp * cp}, but n_gpus is {run.n_gpus}"
        )
    assert run.gbs and run.mbs
    if run.gbs % (run.mbs * dp):
        raise InvalidInput(f"mbs*dp = {run.mbs}*{dp} does not divide gbs {run.gbs}")


def _fix(run: Run) -> dict[str, Any]:
    """Keys of `--fix`; degrees of 1 that only some models know are left out."""
    pp, vpp = run.pp or 1, run.vpp or 1
    vpp = vpp if pp > 1 else 1
    fix: dict[str, Any] = {
        "pp": pp,
        "dp": run.dp or 1,
        "tp": run.tp or 1,
        "sp": int(bool(run.sp) and (run.tp or 1) > 1),
        "zero": run.zero_stage or 0,
        "micro_batch": run.mbs,
        "schedule": "interleaved" if vpp > 1 else "1f1b",
    }
    fix |= {key: n for key, n in (("vpp", vpp), ("cp", run.cp), ("ep", run.ep)) if n and n > 1}
    if run.zero_group and run.zero_group < (run.dp or 1):
        fix["zero_group"] = run.zero_group
    if stages := _stages(run):
        fix["stages"] = stages
    return fix


def _stages(run: Run) -> tuple[int, ...] | None:
    """Layers per stage where DeepSpeed cut a model unevenly; None: as even as they go.

    DeepSpeed of 2022 fills stages from the front up to the least possible bottleneck
    (runtime/utils.py, partition_balanced): "78/12=6.5 - so the last stage has 1 block, while the
    rest have 7" (bigscience, chronicles-prequel.md). From 28 February on the embedding and the head
    count as a layer each (--pp-partition-method 'type:transformer|embedding').
    """
    pp, layers = run.pp or 1, run.layers or 0
    if pp == 1 or not run.framework.startswith("Megatron-DeepSpeed"):
        return None
    ends = int("Rebalancing layers" in run.notes)
    each, rest = divmod(layers + 2 * ends, pp)
    if not rest and not ends:
        return None
    each += bool(rest)
    left = layers
    stages: list[int] = []
    for stage in range(pp):
        here = each - ends * ((stage == 0) + (stage == pp - 1))
        stages.append(min(here, left))
        left -= stages[-1]
    return tuple(stages) if left == 0 and stages[-1] > 0 else None


def _recompute(run: Run) -> tuple[Recompute, ...]:
    if run.recompute in ("", "unspecified"):
        return LEAST_THAT_FITS
    for mode in LEAST_THAT_FITS:
        if run.recompute == mode:
            return (mode,)
    raise InvalidInput(f"recompute is {run.recompute!r}, expected none, selective or full")


def _memory_kind(run: Run) -> MemoryKind:
    if "max_memory_allocated" in run.notes or run.memory_only:
        return "allocated"
    # bigscience chronicles-prequel.md: "getting the memory snapshot with nvidia-smi"; torchtitan
    # logs max_reserved (components/metrics.py)
    return "reserved" if run.framework.startswith("torchtitan") else "device"


_PRECISIONS = {
    # the source's name → ours, and the nearest that every version of Workload knows
    "bf16": "bf16", "fp16": "fp16", "fp32": "fp32", "tf32": "tf32",
    "fp8": "fp8", "fp8-cs": "fp8", "fp8-rowwise": "fp8", "fp8-mx": "mxfp8", "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
}  # fmt: skip
_NEAREST = {"fp16": "bf16", "tf32": "fp32", "fp8": "bf16", "mxfp8": "fp8", "nvfp4": "mxfp8"}


def _workload(run: Run) -> tuple[Workload, tuple[str, ...]]:
    name = _PRECISIONS.get(run.precision or "bf16")
    if name is None:
        raise InvalidInput(f"precision is {run.precision!r}, expected one of {list(_PRECISIONS)}")
    wanted, known = name, get_args(Precision)
    while name not in known:
        name = _NEAREST[name]
    assert run.gbs and run.seq
    notes = () if name == wanted else (f"{wanted} priced as {name}",)
    return Workload(run.gbs, run.seq, precision=name), notes


def _runtime(run: Run) -> Runtime:
    name = _named(facts()["runtimes"], run.framework)
    if name is None:
        raise InvalidInput(f"framework is {run.framework!r}, expected one that facts.yaml names")
    changes: dict[str, Any] = dict(_named(facts()["recipes"], run.framework) or {})
    if run.attn_impl:
        kernel = _named(facts()["attention"], run.attn_impl)
        if kernel is None:
            raise InvalidInput(f"attn_impl is {run.attn_impl!r}, expected one of facts.yaml")
        if kernel == "unfused" or _runtime_preset(name, ()).attention == "unfused":
            changes["attention"] = kernel
    for older in facts()["older_kernels"]:
        newer = older["unless_source"] in run.source
        if (
            run.framework.startswith(older["framework"])
            and not newer
            and "attention" not in changes
        ):
            changes["attention"] = older["attention"]
    for text, fields in facts()["notes"].items():
        if text in run.notes:
            changes |= fields
    return _runtime_preset(name, tuple(sorted(changes.items())))


@lru_cache(maxsize=256)
def _runtime_preset(name: str, changes: tuple[tuple[str, Any], ...]) -> Runtime:
    try:
        return Runtime.preset(name, **dict(changes))
    except InvalidInput as error:  # no fault of the row's
        raise LookupError(f"facts.yaml, runtime {name}: {error}") from None


_BUS_BANDWIDTH = re.compile(r"measured \d+-node all-reduce busbw ([\d.]+) GB/s")
"""What a row says that a collective between nodes reached: what one communicator gets of the NICs.
(BLOOM's: NCCL 2.10 put both of its channels on one of four ports, bigscience
experiments/bandwidth.)"""


def _cluster(run: Run) -> Cluster:
    name = _named(facts()["devices"], run.gpu)
    if name is None:
        raise InvalidInput(f"gpu is {run.gpu!r}, expected one that facts.yaml names")
    if name not in Cluster.preset_names():
        raise InvalidInput(f"gpu {run.gpu}: there is no cluster preset {name!r} yet")
    assert run.n_gpus
    per_node = min(run.gpus_per_node or 8, run.n_gpus)
    if run.n_gpus % per_node:
        raise InvalidInput(f"gpus_per_node {per_node} does not divide n_gpus {run.n_gpus}")
    nic = (run.inter_node_gbytes_per_gpu or 0.0) * 1e9
    measured = _BUS_BANDWIDTH.search(run.notes)
    limit = float(measured[1]) * 1e9 if measured else float("inf")
    return _cluster_preset(name, run.n_gpus // per_node, per_node, nic, limit)


@lru_cache(maxsize=1024)
def _cluster_preset(name: str, nodes: int, per_node: int, nic: float, limit: float) -> Cluster:
    """A preset with the row's NICs (bytes/s per GPU, 0: the preset's) and, where a communicator was
    measured to get less of them, that."""
    try:
        cluster = Cluster.preset(name, nodes, per_node)
    except InvalidInput as error:  # no fault of the row's
        raise LookupError(f"facts.yaml, device {name}: {error}") from None
    if nodes == 1 or not nic:
        return cluster
    *inner, last = cluster.levels
    fraction = min(last.achieved_fraction, limit / nic)
    last = last.model_copy(update={"bandwidth_bytes_per_s": nic, "achieved_fraction": fraction})
    return cluster.model_copy(update={"levels": (*inner, last)})


def _named(table: Mapping[str, Entry], text: str) -> Entry | None:
    """The entry whose name is the longest that the text begins with."""
    name = max((key for key in table if text.startswith(key)), key=len, default=None)
    return None if name is None else table[name]


def chip_of(run: Run) -> str:
    """The silicon that a row ran on: what one efficiency is fitted to."""
    return _named(facts()["chips"], run.gpu) or run.gpu


@lru_cache(maxsize=1)
def facts() -> Mapping[str, Any]:
    """The contents of `facts.yaml`."""
    text = Path(__file__).with_name("facts.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))
