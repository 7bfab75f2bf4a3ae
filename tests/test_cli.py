"""The command line: whole journeys, and bad input in one line with the right exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from shardwright.__main__ import main
from shardwright.cli import app
from shardwright.planner.solving import Solving

RUNNER = CliRunner()
SMALL = ["--cluster", "h100-sxm:1", "--global-batch", "16", "--seq-len", "2048"]


def run(*arguments: str) -> Result:
    return RUNNER.invoke(app, list(arguments))


def fails(code: int, *arguments: str) -> str:
    """Runs a command that must fail with one line on stderr and no traceback."""
    result = run(*arguments)
    assert result.exit_code == code, (result.stdout, result.stderr)
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    result = run("plan", "llama-3.1-8b", *SMALL, "--fix", "tp=4", "-o", str(path))
    assert result.exit_code == 0, result.output
    return path


def test_plan_prints_json_that_scripts_rely_on() -> None:
    result = run("plan", "llama-3.1-8b", *SMALL, "--json", "--top", "3")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert {
        "pp",
        "vpp",
        "dp",
        "cp",
        "tp",
        "ep",
        "zero",
        "micro_batch",
        "schedule",
        "recompute",
    } <= (data["strategy"].keys())
    assert {"step_seconds", "tokens_per_second", "mfu", "memory_bytes", "memory_limit_bytes"} <= (
        data["predicted"].keys()
    )
    certificate = data["certificate"]
    assert 0 <= certificate["gap"] < 1
    assert certificate["lower_bound_seconds"] <= data["predicted"]["step_seconds"]
    assert len(data["parameters"]) == 32 * 9 + 3
    norm = data["parameters"]["model.norm.weight"]
    assert norm["stages"] == [data["strategy"]["pp"] - 1]
    assert set(norm["sbp"].values()) <= {"I", "R", "P", "S(0)"}
    assert len(data["alternatives"]) == 2


def test_plan_explain_emit(plan_file: Path, tmp_path: Path) -> None:
    explained = run("explain", str(plan_file))
    assert explained.exit_code == 0
    assert "What binds" in explained.stdout and "all_gather" in explained.stdout
    emitted = run("emit", str(plan_file), "--backend", "torch", "-o", str(tmp_path / "out"))
    assert emitted.exit_code == 0, emitted.output
    source = (tmp_path / "out" / "model.py").read_text()
    assert "class LlamaDecoderLayer" in source
    for path in (tmp_path / "out").glob("*.py"):
        assert "shardwright" not in path.read_text().replace("Shardwright", ""), path


def test_list_names_presets() -> None:
    result = run("plan", "--list")
    assert result.exit_code == 0
    for name in ("llama-3.1-405b", "gpt3-175b", "h100-sxm", "mi300x"):
        assert name in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "llama-3.1-8", *SMALL], "llama-3.1-8b"),
        (["plan", "llama-3.1-8b", "--cluster", "h100:2", "--global-batch", "8", "--seq-len", "128"],
         "h100-sxm"),
        (["plan", "llama-3.1-8b", "--cluster", "h100-sxm:2"], "--global-batch"),
        (["plan", "llama-3.1-8b", *SMALL, "--fix", "tp=3"], "tp=3"),
        (["plan", "llama-3.1-8b", *SMALL, "--precision", "int4"], "int4"),
        (["plan"], "MODEL"),
        (["explain", "no-such.json"], "no-such.json"),
        (["emit", "no-such.json", "-o", "out"], "no-such.json"),
        (["verify", "no-such.json"], "no-such.json"),
        (["verify", "llama-3.1-8b", "--layout", "tp=2", "--dtype", "int8"], "int8"),
        (["verify", "llama-3.1-8b", "--layout", "tp=2,bogus=1"], "bogus"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments: list[str], said: str) -> None:
    assert said in fails(2, *arguments)


@pytest.mark.parametrize(
    ("fix", "said"),
    [
        ("zero=0,zero_group=4", "zero_group=4 without ZeRO"),
        ("schedule=1f1b,vpp=2", "vpp=2 with schedule=1f1b, which has 1"),
        ("schedule=zb-v,vpp=3", "vpp=3 with schedule=zb-v, which has 2"),
        ("schedule=interleaved,vpp=1", "which has 2 or more"),
        ("cp=2,attention=heads", "attention=heads with cp=2"),
        ("tp=8,pp=4", "32 does not make up the cluster's 8 devices"),
        ("stages=16-15", "adds up to 31 layers"),
        ("zero=1,zero_group=3", "no configuration of 8 devices has all of zero=1, zero_group=3"),
        ("ep=4", "has no experts"),
        ("cp=2,attention=tokenring", "attention=tokenring is not planned yet"),
    ],
)
def test_parts_that_contradict_are_one_line(fix: str, said: str) -> None:
    assert said in fails(2, "plan", "llama-3.1-8b", *SMALL, "--fix", fix)


def test_an_objective_needs_figures(tmp_path: Path) -> None:
    dear = ["plan", "llama-3.1-8b", *SMALL, "--objective"]
    assert "h100-sxm has no price_per_hour" in fails(2, *dear, "cost")
    assert "expected one of time, cost, energy" in fails(2, *dear, "money")
    found = run(*dear, "energy", "--json", "--top", "1")
    certificate = json.loads(found.stdout)["certificate"]
    assert certificate["objective"] == "energy" and certificate["unit"] == "J"
    assert 0 < certificate["bound"] <= certificate["spent"]
    where = tmp_path / "cluster.yaml"
    where.write_text(
        "name: none\ndevice: h100-sxm\ndevices_per_node: 8\n"
        "islands: [{name: a, nodes: 1}, {name: b, nodes: 0, device: v100}]\n"
        "levels: [{name: n, span_devices: cluster, latency_s: 1.0e-6, "
        "bandwidth_bytes_per_s: 1.0e+11}]\n"
    )
    arguments = ["--cluster", str(where), "--global-batch", "8", "--seq-len", "2048"]
    assert "islands[1].nodes is 0" in fails(2, "plan", "llama-3.1-8b", *arguments)


def test_an_interrupted_search_prints_the_best_so_far(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    solve, calls = Solving.solve, []

    def interrupted(self: Solving, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return solve(self, *arguments)

    monkeypatch.setattr(Solving, "solve", interrupted)
    path = tmp_path / "plan.json"
    result = run("plan", "llama-3.1-8b", *SMALL, "-o", str(path))
    assert result.exit_code == 0, result.output
    assert "the search was interrupted" in result.stdout and "gap" in result.stdout
    certificate = json.loads(path.read_text())["certificate"]
    assert certificate["solved"] <= 2 and certificate["gap"] >= 0
    calls.clear()
    monkeypatch.setattr(Solving, "solve", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    nothing = run("plan", "llama-3.1-8b", *SMALL, "-o", str(tmp_path / "none.json"))
    assert nothing.exit_code == 130 and "interrupted" in nothing.stderr
    assert not (tmp_path / "none.json").exists()


def test_explanations_for_scripts(plan_file: Path) -> None:
    data = json.loads(run("explain", str(plan_file), "--json").stdout)
    assert data["binds"][0].keys() == {"what", "saves"}
    whats = {change["what"] for change in data["sensitivity"]}
    assert {"arithmetic of the devices", "memory", "memory bandwidth", "global batch"} <= whats
    assert any(what.startswith("links of level") for what in whats)
    assert all({"strategy", "loses", "reason"} <= each.keys() for each in data["alternatives"])


def test_a_batch_that_no_layout_divides() -> None:
    said = fails(
        2, "plan", "llama-3.1-8b", "--cluster", "h100-sxm:1", "--global-batch", "7",
        "--seq-len", "2048", "--fix", "dp=8",
    )  # fmt: skip
    assert "7" in said and "8" in said


def test_a_model_too_large() -> None:
    said = fails(
        3, "plan", "llama-3.1-70b", "--cluster", "a100-40g:1", "--global-batch", "64",
        "--seq-len", "8192",
    )  # fmt: skip
    assert "short" in said and "smallest cluster that fits" in said


def test_broken_plan_files(plan_file: Path, tmp_path: Path) -> None:
    data = json.loads(plan_file.read_text())
    truncated = tmp_path / "truncated.json"
    truncated.write_text(plan_file.read_text()[:5000])
    assert "truncated.json" in fails(2, "explain", str(truncated))
    newer = tmp_path / "newer.json"
    newer.write_text(json.dumps({**data, "version": 99}))
    assert "newer" in fails(2, "explain", str(newer))
    other = tmp_path / "other.json"
    other.write_text("[1, 2]")
    fails(2, "explain", str(other))


MODELS = """
import torch
from torch import nn

class Sorts(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)
    def forward(self, x, y):
        return ((self.inner(x).sort(-1).values - y) ** 2).mean()

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)
    def forward(self, x, y):
        h = self.inner(x)
        if h.sum() > 0:
            h = h * 2
        return ((h - y) ** 2).mean()

def _inputs():
    return {"x": torch.zeros(4, 16), "y": torch.zeros(4, 16)}

def sorts():
    return Sorts(), _inputs()

def branches():
    return Branches(), _inputs()

def nothing():
    return 3
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [("sorts", "sort"), ("branches", "Branches"), ("nothing", "nothing"), ("absent", "absent")],
)
def test_models_that_cannot_be_planned(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("odd_models", None)
    message = fails(2, "plan", f"odd_models:{name}", *SMALL)
    assert said in message


def test_a_damaged_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama", ')
    assert "config.json" in fails(2, "plan", str(path), *SMALL)
    path.write_text('{"model_type": "no-such-architecture"}')
    assert "no-such-architecture" in fails(2, "plan", str(path), *SMALL)
    path.write_text("[]")
    fails(2, "plan", str(path), *SMALL)


@pytest.mark.parametrize("arguments", [["plan", "x", "--global-batch", "many"], ["no-such"]])
def test_arguments_that_are_none_fail_in_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["shardwright", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("cluster", {}, "cluster: name is missing"),
        ("workload", {"global_batch": 16, "seq_len": 2048, "precision": "q"}, "precision is 'q'"),
        ("workload", {"global_batch": 16, "seq_len": 2048}, "workload.optimizer is missing"),
        ("predicted", {"memory_bytes": []}, "predicted.memory_bytes has 0 items"),
        ("predicted", {"step_seconds": 0}, "predicted.step_seconds is 0"),
    ],
)
def test_a_plan_file_without_its_figures_is_corrupt(
    plan_file: Path, tmp_path: Path, field: str, value: dict[str, object], said: str
) -> None:
    data = json.loads(plan_file.read_text())
    data[field] = data[field] | value if field == "predicted" else value
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    assert said in fails(2, "explain", str(path))
