"""Floor 2: what things take, in seconds and bytes, of anything the planner may ask about.

    device       Device: memory, peaks, efficiencies; presets in data/devices.yaml
    cluster      Cluster and its levels of links; presets in data/clusters.yaml
    precision    Precision: dtypes and bytes per parameter; presets in data/precisions.yaml
    collectives  collective_seconds over a Group of ranks
    runtime      Runtime: how a framework runs a graph; presets in data/runtimes.yaml
    kernels      what an op launches: shapes, FLOPs, bytes; classes of work in data/work.yaml
    efficiency   EfficiencyCurve: measured rates by size
    compute      kernel_seconds: curves, or a roofline with tiles and waves
    work         Work: seconds by cause of a stretch of program
    shards       local sizes of loops and values under types on a mesh
    saved        what ops keep for backward, what recomputation runs again
    liveness     block_bytes: activations of one block, kept and at the peak
    memory       state_bytes, stage_bytes: weights, gradients, optimizer state, in flight
    spending     Spending: what a step costs in time, money or energy
    what_if      a cluster with one thing about it changed
    steptime     the bound and the estimate of 1F1B, gradient synchronisation, optimizer step
    yaml_files   reading and writing validated YAML

Seconds and bytes are those of the slowest and the fullest rank. No file here decides anything.
"""

from .cluster import Cluster, Level
from .collectives import CollectiveKind, Group, collective_seconds
from .compute import backward_seconds, forward_seconds, kernel_seconds
from .device import Device
from .efficiency import ComputeDtype, EfficiencyCurve
from .kernels import Kernel, Kernels, op_flops
from .liveness import BlockBytes, block_bytes
from .memory import (
    StageBytes,
    StateBytes,
    gather_bytes,
    in_flight_microbatches,
    stage_bytes,
    state_bytes,
)
from .pipeline import schedule_bound_seconds, schedule_estimate_seconds
from .precision import Precision
from .runtime import Runtime
from .saved import run_again, saves
from .shards import local_shape, local_sizes, op_splits
from .simulate import DataParallel, StageTimes, StepOptions, simulate
from .spending import Spending
from .steptime import SyncSeconds, data_parallel_sync, optimizer_step_seconds

__all__ = [
    "DataParallel",
    "StageTimes",
    "StepOptions",
    "schedule_bound_seconds",
    "schedule_estimate_seconds",
    "simulate",
    "BlockBytes",
    "Cluster",
    "CollectiveKind",
    "ComputeDtype",
    "Device",
    "EfficiencyCurve",
    "Group",
    "Kernel",
    "Kernels",
    "Level",
    "Precision",
    "Runtime",
    "Spending",
    "StageBytes",
    "StateBytes",
    "SyncSeconds",
    "backward_seconds",
    "block_bytes",
    "collective_seconds",
    "data_parallel_sync",
    "forward_seconds",
    "gather_bytes",
    "in_flight_microbatches",
    "kernel_seconds",
    "local_shape",
    "local_sizes",
    "op_flops",
    "op_splits",
    "optimizer_step_seconds",
    "run_again",
    "saves",
    "stage_bytes",
    "state_bytes",
]
