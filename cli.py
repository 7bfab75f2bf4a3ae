"""The command line. Every command is a few lines over what `shardwright` offers in Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from .api import Plan, Prediction, Runtime, Workload
from .api import plan as make_plan
from .api import predict as make_prediction
from .api import replan as make_replan
from .api import verify as run_verify
from .checkpoint import list_reads
from .checkpoint.command import register as register_checkpoints
from .costmodel import Cluster, Device
from .ir import InvalidInput
from .ir.serial import write_whole
from .ir.workload import Precision
from .terminal import command_line, errors, guarded

app = command_line()

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Fixed = Annotated[str, typer.Option("--fix", help="Parts that are given: tp=8,pp=4,zero=3,...")]


def _list_names() -> None:
    from .ir.from_torch import preset_names

    typer.echo("models:   " + " ".join(preset_names()))
    pretended = ("local", "willing")
    names = [name for name in Cluster.preset_names() if name not in pretended]
    typer.echo("clusters: " + " ".join(names))


ModelName = Annotated[str, typer.Argument(help="config.json, package.module:callable, preset")]
ClusterSpec = Annotated[
    str, typer.Option("--cluster", help="A cluster file, preset:NODES or :NODESxGPUS")
]
DeviceFile = Annotated[
    str, typer.Option("--device", help="Calibrated efficiencies: a device.yaml, or a preset")
]
GlobalBatch = Annotated[int, typer.Option("--global-batch", help="Sequences per step")]
SeqLen = Annotated[int, typer.Option("--seq-len", help="Tokens per sequence")]


def _problem(
    model: str, cluster: str, device: str, global_batch: int, seq_len: int, precision: str
) -> tuple[Cluster, Workload]:
    """The cluster and the workload of `plan` and `predict`; raises InvalidInput naming the flag."""
    for flag, given in (("MODEL", model), ("--cluster", cluster)):
        if not given:
            raise InvalidInput(f"{flag} is missing; see shardwright --help")
    for flag, number in (("--global-batch", global_batch), ("--seq-len", seq_len)):
        if number < 1:
            raise InvalidInput(f"{flag} is {number}, expected a whole number of at least 1")
    if precision not in (names := get_args(Precision)):
        raise InvalidInput(f"--precision {precision}: expected {', '.join(names)}")
    where = Cluster.parse(cluster)
    if device:
        where = where.with_device(Device.parse(device))
    for note in where.notes:
        errors.print(f"note: {note}")
    return where, Workload(global_batch, seq_len, precision=precision)


@app.command()
def plan(
    model: ModelName = "",
    cluster: ClusterSpec = "",
    global_batch: GlobalBatch = 0,
    seq_len: SeqLen = 0,
    precision: Annotated[str, typer.Option(help="bf16, fp32 or fp64")] = "bf16",
    device: DeviceFile = "",
    top: Annotated[int, typer.Option(help="Configurations to show")] = 5,
    fix: Fixed = "",
    backend: Annotated[
        str, typer.Option(help="torch, jax, or any: what cannot be emitted too")
    ] = "torch",
    objective: Annotated[
        str, typer.Option(help="What is to be least: time, cost or energy of a step")
    ] = "time",
    allow: Annotated[
        str,
        typer.Option(
            help="What may change the model: parallel-block,ladder-residual,local-update=H"
        ),
    ] = "",
    as_json: AsJson = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Plan file")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List presets")] = False,
    debug: Debug = False,
) -> None:
    """Finds the best way to train MODEL on a cluster."""

    def action() -> None:
        if show_list:
            return _list_names()
        if top < 1:
            raise InvalidInput(f"--top is {top}, expected a whole number of at least 1")
        where, work = _problem(model, cluster, device, global_batch, seq_len, precision)
        found = _with_progress(
            as_json,
            lambda report: make_plan(
                model,
                where,
                work,
                fix=fix,
                top=top,
                backend=backend,
                objective=objective,
                allow=allow,
                progress=report,
            ),
        )
        if output is not None:
            found.save(output)
        typer.echo(json.dumps(found.to_json(), indent=1) if as_json else str(found))
        if not as_json and found.alternatives:
            typer.echo("\nRunners-up")
            for other in found.alternatives:
                typer.echo(f"  {other.strategy}: {other.reason}")
        return None

    guarded(action, debug)


def _with_progress(quiet: bool, work: Callable[[Callable[[str], None] | None], Plan]) -> Plan:
    if quiet or not errors.is_terminal:
        return work(None)
    with errors.status("tracing the model") as status:
        return work(status.update)


@app.command()
def predict(
    model: ModelName = "",
    cluster: ClusterSpec = "",
    global_batch: GlobalBatch = 0,
    seq_len: SeqLen = 0,
    precision: Annotated[str, typer.Option(help="bf16, fp16, fp8, fp32 or fp64")] = "bf16",
    device: DeviceFile = "",
    runtime: Annotated[
        str, typer.Option(help=f"What runs it: {', '.join(Runtime.preset_names())}")
    ] = "torch",
    fix: Fixed = "",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """What a step of a given configuration takes, and the memory of its stages.

    What --fix leaves open is 1 or the default; dp is what is left of the devices.
    """

    def action() -> None:
        where, work = _problem(model, cluster, device, global_batch, seq_len, precision)
        found: Prediction = make_prediction(model, where, work, fix, runtime=runtime)
        typer.echo(json.dumps(found.to_json(), indent=1) if as_json else str(found))

    guarded(action, debug)


@app.command()
def probe(
    output: Annotated[Path, typer.Option("-o", "--output", help="Cluster file")] = Path(
        "cluster.yaml"
    ),
    device: DeviceFile = "",
    budget: Annotated[float, typer.Option(help="Seconds to measure for")] = 75.0,
    wait: Annotated[float, typer.Option(help="Seconds to wait for ranks to come")] = 120.0,
    seed: Annotated[int, typer.Option(help="Of the random order of measuring")] = 0,
    on: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    debug: Debug = False,
) -> None:
    """Measures every link, under torchrun or srun on all ranks, and writes the cluster file."""
    from .costmodel.probe import run_probe

    guarded(
        lambda: run_probe(
            output, device=device, budget_s=budget, wait_s=wait, seed=seed, on=on, debug=debug
        ),
        debug,
    )


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option("-o", "--output", help="Device file")] = Path(
        "device.yaml"
    ),
    budget: Annotated[float, typer.Option(help="Seconds to measure for")] = 60.0,
    dtypes: Annotated[str, typer.Option(help="Comma-separated: bfloat16,float32,...")] = "",
    on: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    debug: Debug = False,
) -> None:
    """Measures this device's matmul, attention and memory efficiency and writes the device file."""
    from .costmodel.calibrate import run_calibrate

    names = [name.strip() for name in dtypes.split(",") if name.strip()]
    guarded(
        lambda: run_calibrate(output, budget_s=budget, dtypes=names, device=on, debug=debug), debug
    )


@app.command()
def explain(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN.JSON")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Where time and memory go, what binds, what the runners-up lose on."""

    def action() -> None:
        found = Plan.load(plan_file).explain()
        typer.echo(json.dumps(found.to_json(), indent=1) if as_json else str(found))

    guarded(action, debug)


@app.command()
def replan(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN.JSON")],
    more: Annotated[list[int] | None, typer.Argument(metavar="", show_default=False)] = None,
    lost: Annotated[list[int] | None, typer.Option(help="Nodes that are gone: --lost 3 7")] = None,
    gained: Annotated[int, typer.Option(help="Nodes of the same kind that joined")] = 0,
    steps: Annotated[int, typer.Option(help="Steps that the new plan is for")] = 1000,
    repair_seconds: Annotated[
        float | None, typer.Option(help="Seconds until the lost nodes would be back")
    ] = None,
    fix: Fixed = "",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Plan file")] = None,
    moves: Annotated[
        Path | None, typer.Option(help="Moves, a line of JSON each after the first")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """The best plan after nodes were lost or joined, and the cheapest moves from the old one."""

    def action() -> None:
        if more and not lost:
            raise InvalidInput(f"{more[0]}: expected --lost before the nodes that are gone")
        found = make_replan(
            Plan.load(plan_file),
            [*(lost or ()), *(more or ())],
            gained=gained,
            steps=steps,
            fix=fix,
            repair_seconds=repair_seconds,
        )
        new = found.plan
        assert isinstance(new, Plan)
        if moves is not None:  # first: a plan without its moves is of no use
            write_whole(moves, found.moves_text(), "moves")
        if output is not None:
            new.save(output)
        if as_json:
            typer.echo(json.dumps({**new.to_json(), "replan": found.to_json()}, indent=1))
        else:
            typer.echo(f"{found}\n\n{new}")

    guarded(action, debug)


@app.command()
def emit(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN.JSON")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the program")],
    backend: Annotated[str, typer.Option(help="torch or jax")] = "torch",
    weights: Annotated[
        Path | None, typer.Option(help="safetensors or state dict to start from")
    ] = None,
    origin: Annotated[
        Path | None, typer.Option("--from", help="A checkpoint of any format to go on from")
    ] = None,
    spec: Annotated[str, typer.Option(help="Its layout: a file, or a name")] = "",
    debug: Debug = False,
) -> None:
    """Writes the sharded program of a plan as source."""

    def action() -> None:
        found = Plan.load(plan_file)
        folder = found.emit(backend, output, weights=weights)
        if origin is not None:
            list_reads(origin, folder, found, spec=spec)
        ranks = found.strategy.ranks
        if backend == "jax":
            typer.echo(f"{folder}: python {folder}/train.py, once per host of {ranks} devices")
            return
        typer.echo(f"{folder}: torchrun --nproc-per-node {min(ranks, _per_node(found))} "
                   f"--nnodes {max(1, ranks // _per_node(found))} {folder}/train.py")  # fmt: skip
        if found.mapping is not None and list(found.mapping.node_of) != sorted(
            found.mapping.node_of
        ):
            order = " ".join(map(str, found.mapping.node_of))
            typer.echo(f"node ranks 0, 1, … of torchrun are best started on nodes {order}")

    guarded(action, debug)


def _per_node(found: Plan) -> int:
    """Ranks that one torchrun starts: those of a node, or all where the cluster is this machine."""
    here = found.cluster["device"]["name"] == "local"
    return found.strategy.ranks if here else int(found.cluster["devices_per_node"])


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A plan file, or a MODEL together with --layout")],
    layout: Annotated[str, typer.Option(help="tp=2,dp=2,zero=3,...")] = "",
    dtype: Annotated[str, typer.Option(help="float64 or float32")] = "float64",
    backend: Annotated[str, typer.Option(help="torch or jax")] = "torch",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Runs the emitted program on local CPU ranks against the single-device model."""

    def action() -> None:
        if backend not in ("torch", "jax"):
            raise InvalidInput(f"--backend {backend}: expected torch or jax")
        result = _verified(model, layout, dtype, backend)
        if as_json:
            typer.echo(json.dumps(result, indent=1))
        else:
            _show(result)
        if not result["equal"]:
            raise typer.Exit(4)

    guarded(action, debug)


def _verified(model: str, layout: str, dtype: str, backend: str) -> dict[str, Any]:
    if layout:
        return run_verify(model, layout=layout, dtype=dtype, backend=backend)
    if not Path(model).is_file():
        raise InvalidInput(f"{model}: no such plan file; to check a model, give --layout as well")
    return run_verify(Plan.load(model), dtype=dtype, backend=backend)


def _show(result: dict[str, Any]) -> None:
    verdict = "equal" if result["equal"] else "NOT EQUAL"
    if "error" in result:
        typer.echo(f"{verdict}: {result['error']}")
        return
    loss, worst = result["loss"], result["worst_gradient"]
    typer.echo(f"{verdict} on {result['ranks']} ranks")
    typer.echo(f"  loss        single {loss['single']:.15g}  sharded {loss['sharded']:.15g}")
    typer.echo(f"  worst gradient  {worst['name']}  relative error {worst['relative_error']:.3g}")


register_checkpoints(app, guarded)
