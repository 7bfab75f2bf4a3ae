"""Models and plans as files: there and back, byte for byte, and every kind of broken file."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_cases import random_plan, small_model

from shardwright.ir import InvalidInput
from shardwright.ir.check import check_plan
from shardwright.ir.plan import Plan
from shardwright.ir.serial import load_plan, model_from_json, plan_from_json, save_plan, to_json


def text_of(plan: Plan, folder: Path) -> str:
    save_plan(plan, folder / "plan.json")
    return (folder / "plan.json").read_text()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plan on a mesh with every axis larger than 1."""
    plan = next(p for p in map(random_plan, range(100)) if p.strategy.pp == 2)
    return text_of(plan, tmp_path_factory.mktemp("plan"))


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(0, 3))
def test_round_trip(seed: int, layers: int) -> None:
    plan = random_plan(seed, layers)
    check_plan(plan)
    data = json.loads(json.dumps(to_json(plan)))
    back = plan_from_json(data)
    assert back == plan
    assert json.dumps(to_json(back)) == json.dumps(data)  # the order too
    assert model_from_json(json.loads(json.dumps(to_json(plan.model)))) == plan.model


def test_file_round_trip(tmp_path: Path) -> None:
    plan = random_plan(1)
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert os.listdir(tmp_path) == ["plan.json"]


def test_subclass_is_written_as_what_it_is(tmp_path: Path) -> None:
    """The public `Plan` adds methods, no fields."""

    class Public(Plan):
        __slots__ = ()

    plan = random_plan(1)
    save_plan(Public(*(getattr(plan, field.name) for field in fields(plan))), tmp_path / "p.json")
    assert load_plan(tmp_path / "p.json") == plan


def test_equal_plans_are_equal_bytes(tmp_path: Path) -> None:
    """Whatever order the dicts of a plan were filled in."""
    plan = random_plan(5)
    model = plan.model

    def shuffled(data: Any) -> dict[str, Any]:
        items = list(data.items())
        random.Random(0).shuffle(items)
        return dict(items)

    layer = model.blocks["Layer"]
    layer = replace(layer, values=shuffled(layer.values))
    other = replace(
        plan,
        model=replace(
            model,
            blocks=shuffled(dict(model.blocks) | {"Layer": layer}),
            parameters=shuffled(model.parameters),
        ),
        annotations=shuffled(plan.annotations),
        workload=shuffled(plan.workload),
    )
    assert other == plan
    assert text_of(other, tmp_path) == text_of(plan, tmp_path)


def test_canonical_order_is_the_graph_s(text: str) -> None:
    """Readers that iterate see values as they come into being and layers in order."""
    plan = plan_from_json(json.loads(text))
    made = [r for op in plan.model.blocks["Layer"].ops for r in op.results]
    assert list(plan.model.blocks["Layer"].values)[-len(made) :] == made
    assert list(plan.model.blocks) == ["Embed", "Layer", "Head"]


def test_depth_costs_little(tmp_path: Path) -> None:
    """Blocks are stored once: a layer more is its parameters' names and a segment."""
    short, deep = (len(text_of(random_plan(0, n), tmp_path)) for n in (2, 126))
    assert (deep - short) / 124 < 800
    assert max(map(len, text_of(random_plan(0), tmp_path).splitlines())) < 400


@pytest.mark.parametrize("value", [(1, (2, 3)), float("inf"), -0.0, None, {"a": [True]}, "×\u2028"])
def test_attributes_keep_what_json_lacks(value: Any) -> None:
    model = replace(small_model(), source={"value": value})
    back = model_from_json(json.loads(json.dumps(to_json(model)))).source["value"]
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize("value", [object(), {1: 2}, {"()": 1}])
def test_what_cannot_be_written(value: Any) -> None:
    with pytest.raises(InvalidInput, match="cannot be written as JSON"):
        to_json(replace(small_model(), source={"value": value}))


# --- broken files -------------------------------------------------------------------------------

Edit = Callable[[Any], object]

BROKEN: dict[str, tuple[Edit, str]] = {
    "newer version": (
        lambda d: d.update(version=2),
        "written by a newer Shardwright (plan format 2, this one reads 1): upgrade",
    ),
    "no version": (lambda d: d.pop("version"), "version: got null"),
    "version as text": (lambda d: d.update(version="1"), "version: got '1'"),
    "another format": (lambda d: d.update(format="gguf"), "format 'gguf', expected"),
    "a model": (lambda d: d.update(format="shardwright-model"), "expected 'shardwright-plan'"),
    "missing field": (
        lambda d: d["model"]["blocks"]["Layer"]["ops"][3].pop("rule"),
        "model.blocks.Layer.ops[3].rule: missing",
    ),
    "ill-typed field": (
        lambda d: d["model"]["blocks"]["Layer"]["ops"][3].update(rule=3),
        "model.blocks.Layer.ops[3].rule: got 3, expected a string",
    ),
    "bad rule": (
        lambda d: d["model"]["blocks"]["Layer"]["ops"][3].update(rule="a b"),
        "model.blocks.Layer.ops[3].rule: rule 'a b': expected 'operands -> results'",
    ),
    "unknown field": (lambda d: d["strategy"].update(tq=2), "strategy.tq: no such field"),
    "a boolean for a number": (lambda d: d["strategy"].update(tp=True), "strategy.tp: got true"),
    "unknown schedule": (
        lambda d: d["strategy"].update(schedule="2f2b"),
        "strategy.schedule: got '2f2b', expected one of 'gpipe', '1f1b'",
    ),
    "wrong degree": (lambda d: d["strategy"].update(tp=4), "strategy.tp is 4, but the mesh has 2"),
    "bad axis": (lambda d: d["mesh"]["axes"][0].update(size=0), "mesh.axes[0]: mesh axis 'pp'"),
    "bad type": (
        lambda d: d["annotations"]["Layer"]["inputs"].__setitem__(0, "dp=R tp=Q"),
        "annotations.Layer.inputs[0]: SBP type 'Q'",
    ),
    "an axis is missing": (
        lambda d: d["annotations"]["Layer"]["inputs"].__setitem__(0, "dp=R"),
        "inputs 'x' as {dp: R}: expected the axes dp, tp",
    ),
    "a factor that is not there": (
        lambda d: d["annotations"]["Head"]["parameters"].__setitem__(0, "dp=R tp=S(1.7)"),
        "have no factor S(1.7)",
    ),
    "a factor that does not split": (
        lambda d: (
            d["mesh"]["axes"][2].update(size=5),
            d["strategy"].update(tp=5),
        ),
        "does not split",
    ),
    "an illegal signature": (
        lambda d: d["annotations"]["Layer"]["ops"]["rms_norm"].update(
            operands=["dp=R tp=P", "dp=R tp=R"], results=["dp=R tp=P"]
        ),
        "op 'rms_norm' (rms_norm) runs P, R -> P along 'tp', which its rule",
    ),
    "an op without types": (
        lambda d: d["annotations"]["Layer"]["ops"].pop("add"),
        "op 'add' is in only one of graph and annotation",
    ),
    "a block without types": (
        lambda d: d["annotations"].pop("Layer"),
        "block 'Layer': the model's blocks and the annotations differ",
    ),
    "an op of the future": (
        lambda d: d["model"]["blocks"]["Layer"]["ops"][0].update(kind="mamba"),
        "op 'rms_norm' is of kind 'mamba', which this Shardwright does not know",
    ),
    "dims that contradict the rule": (
        lambda d: d["model"]["blocks"]["Head"]["values"]["x"].update(dims=[["b"], ["s"], [7]]),
        "x has dims",
    ),
    "a parameter of another shape": (
        lambda d: d["model"]["parameters"]["model.embed.weight"].update(shape=[24, 17]),
        "model.embed.weight has shape (24, 17)",
    ),
    "an unknown block": (
        lambda d: d["model"]["segments"][1].update(block="Lair"),
        "no block is called 'Lair'",
    ),
    "too few inputs": (
        lambda d: d["model"]["segments"][1]["inputs"].pop(),
        "2 inputs, the block has 3",
    ),
    "a loss that no one makes": (lambda d: d["model"].update(loss=["lost", "count"]), "'lost'"),
    "a loss without count": (lambda d: d["model"].update(loss=["loss"]), "model.loss: 1 items"),
    "stages with a hole": (lambda d: d["stages"][1].update(first=99), "stages[1] runs segments 99"),
    "a batch that does not divide": (
        lambda d: d["workload"].update(global_batch=7),
        "workload.global_batch 7 is no multiple of dp 2",
    ),
    "no batch": (lambda d: d["workload"].clear(), "workload.global_batch is None"),
    "too large a number": (
        lambda d: d["predicted"].update(mfu=10**400),
        "predicted.mfu: a number of 401 digits",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_plan(what: str, text: str, tmp_path: Path) -> None:
    edit, message = BROKEN[what]
    data = json.loads(text)
    edit(data)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data))
    with pytest.raises(InvalidInput) as caught:
        load_plan(file)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"plan file {file}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"model: llama\n", "not JSON: Expecting value at line 1, column 1"),
        (b"PK\x03\x04\xff\xfe", "not JSON: 'utf-8' codec"),
        (b"[]", "not a plan: expected a JSON object with a 'format'"),
        (b"{}", "not a plan"),
        (b'{"format": "shardwright-plan", "version": 1}', "model: missing"),
        (b'{"format": "shardwright-plan", "ver', "truncated: the JSON ends in the middle"),
        (b'{"version": NaN}', "not JSON: NaN"),
        (b'{"version": 1, "version": 2}', "a key appears twice"),
        (b"[" * 100_000, "not JSON: nested too deeply"),
        (b"1" * 10_000, "not JSON: Exceeds the limit"),
    ],
)
def test_not_a_plan(raw: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(raw)
    with pytest.raises(InvalidInput) as caught:
        load_plan(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_anywhere(text: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    whole = text.rstrip()
    for end in random.Random(0).sample(range(1, len(whole)), 100):
        file.write_text(whole[:end])
        with pytest.raises(InvalidInput, match="truncated"):
            load_plan(file)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot read it: No such file"):
        load_plan(tmp_path / "plan.json")
    with pytest.raises(InvalidInput, match="cannot read it: Is a directory"):
        load_plan(tmp_path)


def test_nowhere_to_write(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot write it: No such file"):
        save_plan(random_plan(0), tmp_path / "none" / "plan.json")
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(InvalidInput, match="cannot write it: Is a directory"):
        save_plan(random_plan(0), tmp_path / "plan.json")
    assert os.listdir(tmp_path) == ["plan.json"]


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plan.json"
    save_plan(random_plan(0), file)
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidInput, match="No space left"):
        save_plan(random_plan(1), file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["plan.json"]


@settings(max_examples=1500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_corruption_is_seen_or_harmless(text: str, tmp_path: Path, data: Any) -> None:
    """Any damage gives InvalidInput, or another plan that is well formed; never another error."""
    raw = bytearray(text.rstrip().encode())
    interesting = b'0123456789"{}[]:,.-eSRIP=() \\n\xffx'
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["flip", "replace", "delete", "repeat", "truncate"])):
            case "flip":
                raw[at] ^= 1 << data.draw(st.integers(0, 7))
            case "replace":
                raw[at] = data.draw(st.sampled_from(interesting))
            case "delete":
                del raw[at : at + data.draw(st.integers(1, 20))]
            case "repeat":
                raw[at:at] = raw[at : at + data.draw(st.integers(1, 20))]
            case "truncate":
                del raw[at + 1 :]
        if not raw:
            break
    file = tmp_path / "corrupt.json"
    file.write_bytes(bytes(raw))
    try:
        plan = load_plan(file)
    except InvalidInput as error:
        assert "\n" not in str(error) and str(error).isprintable()
    else:
        check_plan(plan)
        assert plan_from_json(json.loads(json.dumps(to_json(plan)))) == plan


@settings(max_examples=600)
@given(data=st.data())
def test_any_field_may_be_wrong(text: str, data: Any) -> None:
    """Some part of the JSON is replaced by other JSON, deleted, or moved elsewhere."""
    document = json.loads(text)
    spots: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], (dict, list)):
                collect(node[key])

    collect(document)
    node, key = data.draw(st.sampled_from(spots))
    other, its_key = data.draw(st.sampled_from(spots))
    odd: list[Any] = [None, True, 0, -1, 1.5, "", "b", "x" * 50, [], {}, [[]], 10**30, "dp=R tp=R"]
    match data.draw(st.sampled_from(["replace", "delete", "move"])):
        case "replace":
            node[key] = data.draw(st.sampled_from(odd))
        case "delete":
            del node[key]
        case "move":
            node[key] = json.loads(json.dumps(other[its_key]))
    try:
        plan = plan_from_json(document)
    except InvalidInput as error:
        assert "\n" not in str(error)
    else:
        check_plan(plan)
