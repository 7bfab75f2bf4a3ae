"""`shardwright convert` and `shardwright inspect`: a few lines over `convert` and `inspect`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..ir.errors import CorruptCheckpoint, InvalidInput
from .conversion import convert
from .engine import from_environment
from .formats import MODULES
from .formats.flags import described
from .inspection import inspect
from .reads import list_reads

Guard = Callable[[Callable[[], None], bool], None]
"""Runs an action; errors become one line and an exit code."""

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
From = Annotated[str, typer.Option("--from", help="Format of the source, if it is not clear")]
Spec = Annotated[
    str,
    typer.Option(
        "--spec",
        help="Layout of the source: a file (docs/layout-language.md), or the name of a built-in"
        " one; found by the names in it otherwise",
    ),
]
Sizes = Annotated[
    str,
    typer.Option(
        "--sizes",
        help="What a layout asks for and the checkpoint does not tell:"
        " num_attention_heads=32,num_key_value_heads=8",
    ),
]
Tag = Annotated[
    str,
    typer.Option("--tag", help="Which save (tag, step, iteration) of a directory that has several"),
]
ReadFlags = Annotated[
    str, typer.Option("--set", help="mixed_steps=true (DeepSpeed), bucket_elements=N (Megatron)")
]

_CONVERT_EXAMPLES = """Examples:

shardwright convert runs/step-1000 out --to safetensors --verify

shardwright convert runs/step-1000 out --to deepspeed --mesh dp=8 --set stage=3,order=@names.txt

shardwright convert iter_0010000 out --to megatron --mesh tp=4,pp=2 --spec megatron-llama

shardwright convert runs/step-1000 list --plan plan.json

torchrun --nproc-per-node 8 -m shardwright convert runs/step-1000 out --to dcp --mesh dp=8
"""

_INSPECT_EXAMPLES = """Examples:

shardwright inspect runs/step-1000

shardwright inspect runs --tag iter_0010000 --spec megatron-llama --json
"""

_OF_LISTS = (
    "source", "target", "to", "plan", "spec", "source_format", "sizes", "flags", "tag", "as_json",
    "debug",
)  # fmt: skip
"""Parameters that a list of reads looks at; others are of a target that is written."""


def register(app: typer.Typer, guarded: Guard) -> None:
    """Adds both commands to the command line."""

    @app.command(name="convert", epilog=_CONVERT_EXAMPLES)
    def convert_command(
        context: typer.Context,
        source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint")],
        target: Annotated[Path, typer.Argument(metavar="DST", help="A new directory")],
        to: Annotated[
            str, typer.Option("--to", help=f"Format of the target: {', '.join(MODULES)}")
        ] = "",
        plan: Annotated[
            Path | None,
            typer.Option(
                "--plan",
                help="A plan: the mesh and ZeRO stage of the target, where they are not given;"
                " without --to, DST becomes a list of reads from SRC for the plan's programs"
                " (train.py --resume DST)",
            ),
        ] = None,
        mesh: Annotated[
            str,
            typer.Option(
                "--mesh",
                help="Mesh of the target, where its files depend on ranks: tp=2,pp=2,dp=4"
                " (and cp, ep, etp; vpp of Megatron)",
            ),
        ] = "",
        spec: Spec = "",
        target_spec: Annotated[
            str, typer.Option("--target-spec", help="Layout of the target: a file, or a name")
        ] = "",
        source_format: From = "",
        sizes: Sizes = "",
        flags: Annotated[
            str, typer.Option("--set", help=f"Flags of formats, as stage=3. {described()}")
        ] = "",
        tag: Tag = "",
        config: Annotated[
            Path | None,
            typer.Option(
                "--config",
                help="Hugging Face folder that tells sizes, and whose config and tokenizer are"
                " copied along, instead of those beside SRC",
            ),
        ] = None,
        states: Annotated[
            str,
            typer.Option(
                "--states",
                help="Of the parameters, what is converted: weight,master,exp_avg,exp_avg_sq,...;"
                " all there are",
            ),
        ] = "",
        dtype: Annotated[
            str, typer.Option("--dtype", help="Of the weights: bf16, fp16, fp32, ...")
        ] = "",
        verify: Annotated[
            bool, typer.Option("--verify", help="Read both sides again and prove them equal")
        ] = False,
        memory: Annotated[
            str, typer.Option("--memory", help="For all buffers, at least 128M")
        ] = "512M",
        threads: Annotated[int, typer.Option("--threads", help="0: one per core")] = 0,
        overwrite: Annotated[
            bool, typer.Option("--overwrite", help="Replace DST, at the end, in one step")
        ] = False,
        as_json: AsJson = False,
        debug: Debug = False,
    ) -> None:
        """Converts a checkpoint from any layout to any other; resumes what was killed.

        Under torchrun or srun every rank takes a share. A flag that would do nothing is refused.
        """

        def action() -> None:
            read: dict[str, Any] = {
                "spec": spec,
                "sizes": _assigned("--sizes", sizes),
                "flags": _assigned("--set", flags, lists=True),
                "tag": tag,
            }
            if not to:
                _check_of_list(context, plan)
                listed = list_reads(source, target, str(plan), format_name=source_format, **read)
                typer.echo(json.dumps(listed.to_json(), indent=1) if as_json else str(listed))
                return
            found = convert(
                source,
                target,
                to,
                plan=plan,
                mesh=_assigned("--mesh", mesh),
                source_format=source_format,
                target_spec=target_spec,
                config=config,
                states=[s.strip() for s in states.split(",") if s.strip()],
                dtype=dtype,
                verify=verify,
                memory=memory,
                threads=threads,
                overwrite=overwrite,
                quiet=False,
                **read,
            )
            if from_environment()[0] == 0:  # the others' account is of their own memory only
                typer.echo(json.dumps(found.to_json(), indent=1) if as_json else str(found))

        guarded(action, debug)

    @app.command(name="inspect", epilog=_INSPECT_EXAMPLES)
    def inspect_command(
        checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT")],
        source_format: From = "",
        spec: Spec = "",
        sizes: Sizes = "",
        flags: ReadFlags = "",
        tag: Tag = "",
        as_json: AsJson = False,
        debug: Debug = False,
    ) -> None:
        """Says what a directory is, its layout and sizes, and whether all of it is there.

        Exit code 2 where something is missing or damaged.
        """

        def action() -> None:
            try:
                found = inspect(
                    checkpoint,
                    source_format=source_format,
                    spec=spec,
                    sizes=_assigned("--sizes", sizes),
                    flags=_assigned("--set", flags, lists=True),
                    tag=tag,
                )
            except CorruptCheckpoint as error:
                if as_json:
                    said = {"path": str(checkpoint), "whole": False, "problem": str(error)}
                    typer.echo(json.dumps(said, indent=1))
                raise
            typer.echo(json.dumps(found.to_json(), indent=1) if as_json else str(found))
            if found.problem:
                raise typer.Exit(CorruptCheckpoint.exit_code)

        guarded(action, debug)


def _check_of_list(context: typer.Context, plan: Path | None) -> None:
    """Raises InvalidInput for what a list of reads, which is written without `--to`, ignores."""
    if plan is None:
        raise InvalidInput(
            f"--to is missing: expected {', '.join(MODULES)}; or --plan alone, for a list of reads"
        )
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name)
        if name in _OF_LISTS or given is None:
            continue
        if given.name == "COMMANDLINE":
            raise InvalidInput(
                f"{parameter.opts[0]}: without --to a list of reads is written, which does not "
                "look at it; leave it out, or give --to"
            )


def _assigned(flag: str, said: str, lists: bool = False) -> dict[str, Any]:
    """`tp=2,stage=3` → values; whole numbers and true/false are read as such. With `lists`, what
    follows a value without a name belongs to it: `order=a,b,stage=3`."""
    found: dict[str, Any] = {}
    name = ""
    for part in (p.strip() for p in said.split(",") if p.strip()):
        left, equals, right = (text.strip() for text in part.partition("="))
        if lists and name and not equals:
            before = found[name]
            found[name] = [*(before if isinstance(before, list) else [str(before)]), left]
            continue
        if not left or not equals or not right:
            raise InvalidInput(f"{flag} {part}: expected name=value")
        if left in found:
            raise InvalidInput(f"{flag} {left}: given twice")
        name = left
        plain: dict[str, Any] = {"true": True, "false": False}
        found[name] = plain.get(right, int(right) if right.lstrip("-").isdigit() else right)
    return found
