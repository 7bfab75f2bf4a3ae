"""Rows of a table of published training runs: reading and validating them.

The columns are those of `published_runs.csv`, as its README describes them. A cell may be empty;
what an empty cell means is decided where it is used (`setup.py`).
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from shardwright import InvalidInput


def _whole(value: Any) -> Any:
    """Spreadsheets print whole numbers as 384.0; an empty cell is None."""
    if isinstance(value, str):
        value = value.strip()
        if not value:
            return None
        head, dot, tail = value.partition(".")
        return head if dot and not tail.strip("0") else value
    return value


def _blank(value: Any) -> Any:
    return None if isinstance(value, str) and not value.strip() else value


Whole = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_whole)]
Count = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_whole)]
Stage = Annotated[Annotated[int, Field(ge=0, le=3)] | None, BeforeValidator(_whole)]
Number = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_blank)]
Flag = Annotated[bool | None, BeforeValidator(_whole)]
Text = Annotated[str, BeforeValidator(lambda value: value.strip() if value else "")]


class Run(BaseModel):
    """One published run. Sizes in elements, `seq` in tokens, `mem_gb_per_gpu` in GiB, times in s.

    The fields are named as the columns are; None (or an empty text) is an empty cell.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    row_id: Annotated[str, Field(min_length=1)]
    family: Annotated[str, Field(min_length=1)]
    group: Text = ""
    source: Text = ""
    model: Text = ""
    arch: Text = ""
    layers: Whole = None
    hidden: Whole = None
    heads: Whole = None
    kv_heads: Whole = None
    head_dim: Whole = None
    ffn: Whole = None
    gated_mlp: Flag = None
    vocab: Whole = None
    seq: Whole = None
    n_experts: Count = None
    top_k: Count = None
    moe_ffn: Count = None
    gpu: Text = ""
    n_gpus: Whole = None
    gpus_per_node: Whole = None
    inter_node_gbytes_per_gpu: Number = None
    framework: Text = ""
    tp: Whole = None
    sp: Flag = None
    pp: Whole = None
    vpp: Whole = None
    dp: Whole = None
    cp: Whole = None
    ep: Whole = None
    zero_stage: Stage = None
    zero_group: Count = None
    mbs: Whole = None
    gbs: Whole = None
    num_microbatches: Whole = None
    recompute: Text = ""
    precision: Text = ""
    attn_impl: Text = ""
    iter_time_s: Number = None
    mem_gb_per_gpu: Number = None
    oom: Flag = None
    config_complete: Flag = None
    missing: Text = ""
    notes: Text = ""

    @property
    def microbatches(self) -> int:
        """Microbatches per pipeline and step, from the batch sizes."""
        if not (self.gbs and self.mbs and self.dp):
            raise InvalidInput(f"row {self.row_id}: gbs, mbs or dp is empty")
        return self.gbs // (self.mbs * self.dp)

    @property
    def memory_only(self) -> bool:
        """A row of which the source gives memory and no time, its configuration being known."""
        return "memory only" in self.missing and self.mem_gb_per_gpu is not None


REQUIRED = (
    "row_id", "family", "arch", "layers", "hidden", "heads", "vocab", "seq", "gpu", "n_gpus",
    "framework", "tp", "pp", "dp", "mbs", "gbs", "iter_time_s",
)  # fmt: skip
"""Columns without which nothing can be predicted or scored; the others may be absent."""


@dataclass(frozen=True, slots=True)
class Runs:
    """The rows of one file, in its order; `refused` says of those that cannot be read why."""

    path: Path
    rows: tuple[Run, ...]
    refused: tuple[str, ...] = ()


def read_runs(path: str | Path) -> Runs:
    """Reads a CSV file of published runs.

    A row with a cell that is not what its column holds is refused, the others count. Raises
    InvalidInput, in one line, for a file that cannot be read, a column or all rows missing, and a
    row id that comes twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InvalidInput(f"runs {path}: {reason}; expected a CSV file of runs") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = reader.fieldnames or []
    if lacking := [name for name in REQUIRED if name not in columns]:
        raise InvalidInput(
            f"runs {path}: column {lacking[0]!r} is missing"
            + (f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else "")
            + ", expected the columns of published_runs.csv in the first line"
        )
    rows: list[Run] = []
    refused: list[str] = []
    lines: dict[str, int] = {}
    for cells in reader:
        try:
            run = _row(path, reader.line_num, cells)
        except InvalidInput as error:
            refused.append(str(error))
            continue
        if run.row_id in lines:
            raise InvalidInput(
                f"runs {path}, line {reader.line_num}: row_id {run.row_id!r} is that of line "
                f"{lines[run.row_id]} too, expected each once"
            )
        lines[run.row_id] = reader.line_num
        rows.append(run)
    if not rows and refused:
        raise InvalidInput(refused[0])
    if not rows:
        raise InvalidInput(f"runs {path}: no rows below the first line, expected one per run")
    return Runs(path, tuple(rows), tuple(refused))


def _row(path: Path, line: int, cells: dict[Any, Any]) -> Run:
    if None in cells or None in cells.values():
        raise InvalidInput(
            f"runs {path}, line {line}: {'more' if None in cells else 'fewer'} cells than columns"
        )
    try:
        return Run.model_validate(cells)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = str(problem["loc"][0])
        raise InvalidInput(
            f"runs {path}, line {line}: {name} is {cells.get(name)!r}: {problem['msg']}"
        ) from None
