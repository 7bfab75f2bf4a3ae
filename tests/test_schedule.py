"""Schedule tables: their laws, torch's own schedules action by action, and what is emitted."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from emit_cases import small_plan
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from shardwright.backends.to_torch import emit
from shardwright.ir.errors import InvalidInput
from shardwright.ir.plan import ScheduleName
from shardwright.ir.schedule import Action, ScheduleTable, table_from_json, table_from_rows
from shardwright.ir.schedule_rows import schedule_table

NAMES: tuple[ScheduleName, ...] = get_args(ScheduleName)
TORCH_CLASSES = {
    "gpipe": torch_schedules.ScheduleGPipe,
    "1f1b": torch_schedules.Schedule1F1B,
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "zb-h1": torch_schedules.ScheduleInterleavedZeroBubble,
    "zb-v": torch_schedules.ScheduleZBVZeroBubble,
}
DEFAULT_VPP = {"interleaved": 2, "zb-v": 2}


@st.composite
def tables(draw: st.DrawFn, names: Sequence[ScheduleName] = NAMES) -> ScheduleTable:
    """Any table, the number of microbatches not always a round one."""
    name = draw(st.sampled_from(names))
    pp, microbatches = draw(st.integers(1, 7)), draw(st.integers(1, 20))
    vpp = {"interleaved": draw(st.integers(2, 4)), "zb-v": 2, "zb-h1": draw(st.integers(1, 2))}
    per_rank = vpp.get(name, 1)
    rounds = max(1, microbatches // pp)
    assume(per_rank == 1 or name == "zb-v" or microbatches % rounds == 0)
    return schedule_table(name, pp, microbatches, per_rank)


class FakeStage:
    """Stands in for a stage of torch: nothing to send, notes what it is asked to run."""

    has_backward, is_last = True, False

    def __init__(self, index: int) -> None:
        self.stage_index = index
        self.ran: list[str] = []

    def get_fwd_recv_ops(self, _: int) -> list[Any]:
        return []

    get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = get_fwd_recv_ops

    def forward_one_chunk(self, index: int, *_: Any, **__: Any) -> None:
        self.ran.append(f"{self.stage_index}F{index}")

    def backward_one_chunk(self, index: int, **_: Any) -> None:
        self.ran.append(f"{self.stage_index}B{index}")

    def perform_reduce_grad(self, _: int) -> None:
        pass


def torch_row(schedule: Any, pp: int, microbatches: int, vpp: int, rank: int) -> list[str]:
    """What torch's class runs on a rank: its own loop over fake stages, or its own list."""
    if issubclass(schedule, torch_schedules.PipelineScheduleSingle):
        stage = FakeStage(rank)
        fields = dict(
            _num_stages=pp, _n_microbatches=microbatches, _stage=stage, scale_grads=False,
            _check_inputs=lambda *_: ([()] * microbatches, [{}] * microbatches),
        )  # fmt: skip
        names = ("initialize_stage", "maybe_compute_loss", "maybe_get_loss", "update_losses")
        fields |= {f"_{name}": lambda *_: None for name in names}
        schedule._step_microbatches(SimpleNamespace(**fields))
        return stage.ran
    per_round = microbatches // max(1, microbatches // pp)
    fields = dict(
        pp_group_size=pp, n_local_stages=vpp, num_stages=pp * vpp, _n_microbatches=microbatches,
        microbatches_per_round=per_round,
    )  # fmt: skip
    actions = schedule._calculate_single_rank_operations(SimpleNamespace(**fields), rank)
    return [str(action) for action in actions if action is not None]


@given(tables())
def test_tables_are_those_of_torch(table: ScheduleTable) -> None:
    for rank, row in enumerate(table.rows):
        theirs = torch_row(TORCH_CLASSES[table.name], table.pp, table.microbatches, table.vpp, rank)
        assert [str(action) for action in row] == theirs


@given(tables())
def test_every_table_runs_each_action_once_and_comes_to_an_end(table: ScheduleTable) -> None:
    table.check()
    seen: set[tuple[str, int, int]] = set()
    waves = [table.order.actions[a:b] for a, b in zip(
        table.order.bounds[:-1], table.order.bounds[1:], strict=True)]  # fmt: skip
    actions = [action for row in table.rows for action in row]
    for wave in waves:
        now = [actions[i] for i in wave.tolist()]
        for kind, stage, microbatch in now:
            if kind == "F":
                assert stage == 0 or ("F", stage - 1, microbatch) in seen
            elif kind == "W":
                assert ("I", stage, microbatch) in seen
            elif stage == table.stages - 1:
                assert ("F", stage, microbatch) in seen
            else:
                later = stage + 1
                assert ("B", later, microbatch) in seen or ("I", later, microbatch) in seen
        seen.update(now)
    assert len(seen) == len(actions)


@given(tables())
def test_activations_are_taken_and_given_back(table: ScheduleTable) -> None:
    for rank, row in enumerate(table.rows):
        whole, half = table.held(rank)
        stages = table.stages_of(rank)
        held: dict[tuple[int, int], str] = {}
        for i, (kind, stage, microbatch) in enumerate(row):
            if kind == "F":
                held[stage, microbatch] = "whole"
            for found, expected in ((whole, "whole"), (half, "half")):
                counted = [
                    sum(state == expected and key[0] == s for key, state in held.items())
                    for s in stages
                ]
                assert found[i].tolist() == counted
            if kind == "I":
                held[stage, microbatch] = "half"
            elif kind in "BW":
                del held[stage, microbatch]
        assert held == {}


@given(st.integers(1, 8), st.integers(1, 4), st.integers(2, 4))
def test_memory_is_what_the_papers_say(pp: int, rounds: int, vpp: int) -> None:
    """In microbatches of a rank's whole share of the model; m a multiple of pp."""
    m = rounds * pp

    def peaks(name: ScheduleName, vpp: int = 1) -> list[float]:
        table = schedule_table(name, pp, m, vpp)
        one = [1.0 / vpp] * vpp
        return [table.peak_bytes(rank, one, one) for rank in range(pp)]

    assert peaks("gpipe") == [m] * pp
    assert peaks("1f1b") == [min(m, pp - rank) for rank in range(pp)]
    # Korthikanti et al. 2022, arXiv:2205.05198, appendix A
    many = [2 * (pp - rank - 1) + (vpp - 1) * pp + 1 for rank in range(pp)]
    assert peaks("interleaved", vpp) == pytest.approx([min(m * vpp, n) / vpp for n in many])
    # no more than the first rank of 1F1B (arXiv:2401.10241, table 1; arXiv:2405.15362, table 1)
    assert max(peaks("zb-h1")) <= min(m, pp)
    assert max(peaks("zb-v", 2)) <= min(m, pp)


@given(tables())
def test_tables_survive_json(table: ScheduleTable) -> None:
    again = table_from_json(table.to_json())
    assert again.rows == table.rows
    assert (again.name, again.vpp, again.placement) == (table.name, table.vpp, table.placement)


@given(tables(["1f1b", "zb-h1"]), st.data())
def test_broken_tables_are_refused(table: ScheduleTable, data: st.DataObject) -> None:
    rows = [list(row) for row in table.rows]
    rank = data.draw(st.integers(0, table.pp - 1))
    row = rows[rank]
    at = data.draw(st.integers(0, len(row) - 1))
    match data.draw(st.sampled_from(["missing", "twice", "foreign", "backward first"])):
        case "missing":
            del row[at]
        case "twice":
            row.append(row[at])
        case "foreign":
            assume(table.pp > 1)
            rows[(rank + 1) % table.pp].append(row.pop(at))
        case _:
            row.sort(key=lambda action: action.kind == "F")
    with pytest.raises(InvalidInput, match=rf"^schedule {table.name}: "):
        table_from_rows(table.name, rows, table.microbatches, table.placement)


def test_ranks_that_wait_for_each_other_are_found() -> None:
    first = [Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 1), Action("B", 0, 1)]
    second = [Action("F", 1, 1), Action("B", 1, 1), Action("F", 1, 0), Action("B", 1, 0)]
    with pytest.raises(InvalidInput, match="0B0 waits for ever"):
        table_from_rows("crossed", [first, second], 2, [0, 1])


@pytest.mark.parametrize(
    ("name", "pp", "microbatches", "vpp", "message"),
    [
        ("1f1b", 0, 4, 1, "pp=0, expected at least 1"),
        ("1f1b", 2, 0, 1, "microbatches=0, expected at least 1"),
        ("gpipe", 2, 4, 2, "vpp=2, expected 1; schedule=interleaved takes more"),
        ("interleaved", 4, 8, 1, "vpp=1, expected at least 2"),
        ("interleaved", 4, 9, 2, "9 microbatches do not divide into 2 rounds of about pp=4"),
        ("zb-v", 4, 8, 3, "vpp=3, expected 2"),
        ("dualpipe", 4, 8, 1, "expected one of gpipe, 1f1b, interleaved, zb-h1, zb-v"),
    ],
)
def test_bad_numbers(name: Any, pp: int, microbatches: int, vpp: int, message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        schedule_table(name, pp, microbatches, vpp)
    assert f"schedule={name}" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("field", ["rows", "placement", "microbatches"])
def test_bad_json(field: str) -> None:
    data = schedule_table("1f1b", 2, 2).to_json() | {field: ["0X0"]}
    with pytest.raises(InvalidInput, match="schedule: "):
        table_from_json(data)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_what_is_emitted_is_what_the_table_says(schedule: ScheduleName, tmp_path: Path) -> None:
    plan = small_plan("plain", f"pp=2,dp=1,tp=1,schedule={schedule}", 2, global_batch=6)
    emit(plan, tmp_path)
    settings = assigned(tmp_path / "settings.py")
    count, pp = settings["MICROBATCHES"], settings["MESH"]["pp"]
    schedules = class_names(tmp_path / "step.py", "schedules")
    used = getattr(torch_schedules, schedules[settings["SCHEDULE"]])
    table = schedule_table(plan.strategy.schedule, pp, count)
    assert (pp, count) == (2, plan.microbatches)
    for rank, row in enumerate(table.rows):
        assert torch_row(used, pp, count, 1, rank) == [str(action) for action in row]


def assigned(file: Path) -> dict[str, Any]:
    """The literals that a file assigns to names."""
    found = {}
    for node in ast.parse(file.read_text()).body:
        match node:
            case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, value):
                try:
                    found[name] = ast.literal_eval(value) if value else None
                except ValueError:
                    continue
    return found


def class_names(file: Path, name: str) -> dict[str, str]:
    """The table of classes, by key, that a file assigns to a name."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Assign([ast.Name(target)], ast.Dict(keys, values)) if target == name:
                return {
                    str(ast.literal_eval(key)): ast.unparse(value)
                    for key, value in zip(keys, values, strict=True)
                    if key
                }
    raise AssertionError(f"{file.name} assigns no {name}")
