"""`shardwright convert` and `shardwright inspect`: a few lines over `convert` and `inspect`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..ir.errors import InvalidInput
from .conversion import convert, inspect
from .engine import from_environment
from .formats import MODULES
from .reads import Listed, list_reads

Guard = Callable[[Callable[[], None], bool], None]
"""Runs an action; errors become one line and an exit code."""

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
From = Annotated[str, typer.Option("--from", help="Format of the source, if it is not clear")]
Spec = Annotated[str, typer.Option("--spec", help="Layout of the source: a file, or a name")]
Sizes = Annotated[
    str, typer.Option("--sizes", help="What a layout needs to know: num_attention_heads=32,...")
]
Tag = Annotated[str, typer.Option("--tag", help="Which save (step, tag) of the source")]


def register(app: typer.Typer, guarded: Guard) -> None:
    """Adds both commands to the command line."""

    @app.command(name="convert")
    def convert_command(
        source: Annotated[Path, typer.Argument(metavar="SRC")],
        target: Annotated[Path, typer.Argument(metavar="DST")],
        to: Annotated[str, typer.Option("--to", help=", ".join(MODULES))] = "",
        plan: Annotated[
            Path | None,
            typer.Option(
                "--plan",
                help="A plan: the mesh of the target; without --to, DST becomes a list of"
                " reads from SRC for the plan's programs (train.py --resume DST)",
            ),
        ] = None,
        mesh: Annotated[
            str, typer.Option("--mesh", help="Mesh of the target: tp=2,pp=2,dp=4")
        ] = "",
        spec: Spec = "",
        target_spec: Annotated[
            str, typer.Option("--target-spec", help="Layout of the target: a file, or a name")
        ] = "",
        source_format: From = "",
        sizes: Sizes = "",
        flags: Annotated[
            str, typer.Option("--set", help="Of the target's format: shard_bytes=...,stage=3")
        ] = "",
        tag: Tag = "",
        config: Annotated[
            Path | None,
            typer.Option("--config", help="Hugging Face folder: config, tokenizer copied along"),
        ] = None,
        states: Annotated[
            str, typer.Option("--states", help="Of the parameters: weight,exp_avg,...; all")
        ] = "",
        dtype: Annotated[str, typer.Option("--dtype", help="Of the weights: bf16, ...")] = "",
        verify: Annotated[
            bool, typer.Option("--verify", help="Read both sides again and prove them equal")
        ] = False,
        memory: Annotated[str, typer.Option("--memory", help="For all buffers")] = "512M",
        threads: Annotated[int, typer.Option("--threads", help="0: one per core")] = 0,
        overwrite: Annotated[
            bool, typer.Option("--overwrite", help="Replace DST, at the end, in one step")
        ] = False,
        as_json: AsJson = False,
        debug: Debug = False,
    ) -> None:
        """Converts a checkpoint from any layout to any other; resumes what was killed.

        Under torchrun or srun every rank takes a share.
        """

        def action() -> None:
            if not to:
                listed = _list_reads(source, target, plan, spec, sizes, tag, source_format)
                typer.echo(json.dumps(listed.to_json(), indent=1) if as_json else str(listed))
                return
            found = convert(
                source,
                target,
                to,
                plan=plan,
                mesh=_assigned("--mesh", mesh),
                source_format=source_format,
                spec=spec,
                target_spec=target_spec,
                sizes=_assigned("--sizes", sizes),
                flags=_assigned("--set", flags),
                tag=tag,
                config=config,
                states=[s.strip() for s in states.split(",") if s.strip()],
                dtype=dtype,
                verify=verify,
                memory=memory,
                threads=threads,
                overwrite=overwrite,
                quiet=False,
            )
            if from_environment()[0] == 0:  # the others' account is of their own memory only
                typer.echo(json.dumps(found.to_json(), indent=1) if as_json else str(found))

        guarded(action, debug)

    @app.command(name="inspect")
    def inspect_command(
        checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT")],
        source_format: From = "",
        spec: Spec = "",
        sizes: Sizes = "",
        tag: Tag = "",
        as_json: AsJson = False,
        debug: Debug = False,
    ) -> None:
        """Says what a directory is, its layout and sizes, and whether all of it is there."""

        def action() -> None:
            found = inspect(
                checkpoint,
                source_format=source_format,
                spec=spec,
                sizes=_assigned("--sizes", sizes),
                tag=tag,
            )
            typer.echo(json.dumps(found.to_json(), indent=1) if as_json else str(found))
            if found.problem:
                raise typer.Exit(InvalidInput.exit_code)

        guarded(action, debug)


def _list_reads(
    source: Path, target: Path, plan: Path | None, spec: str, sizes: str, tag: str, format_name: str
) -> Listed:
    if plan is None:
        raise InvalidInput(
            f"--to is missing: expected {', '.join(MODULES)}; or --plan alone, for a list of reads"
        )
    given = _assigned("--sizes", sizes)
    return list_reads(
        source, target, plan, spec=spec, sizes=given, tag=tag, format_name=format_name
    )


def _assigned(flag: str, said: str) -> dict[str, Any]:
    """`tp=2,stage=3` → values; whole numbers and true/false are read as such."""
    found: dict[str, Any] = {}
    for part in (p.strip() for p in said.split(",") if p.strip()):
        name, equals, value = (text.strip() for text in part.partition("="))
        if not name or not equals or not value:
            raise InvalidInput(f"{flag} {part}: expected name=value")
        plain: dict[str, Any] = {"true": True, "false": False}
        found[name] = plain.get(value, int(value) if value.lstrip("-").isdigit() else value)
    return found
