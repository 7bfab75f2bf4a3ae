"""Where shards lie in full tensors: coverage, first values, plain weights, checkpoints."""

from __future__ import annotations

import json
from itertools import product
from math import prod
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from handwritten import HIDDEN, VOCAB, Handwritten, alone, imported, write
from safetensors.torch import save_file
from torch import Tensor

MESHES = [
    dict(),
    dict(tp=2),
    dict(tp=4),
    dict(tp0=2, tp1=2),
    dict(dp=2, zero=3),
    dict(dp=3, zero=1, global_batch=9),
    dict(dp=7, zero=3, global_batch=7),
    dict(dp=2, tp=2, zero=2),
    dict(dp=3, tp0=2, tp1=3, zero=3, global_batch=9),
    dict(dp=2, tp=2),
    dict(pp=2, dp=2, tp=2, zero=3),
]


def every_rank(program: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    """Runs the loop's body as each rank of the mesh, without any process group."""
    mesh = program.settings.MESH
    for index in product(*(range(size) for size in mesh.values())):
        here = dict(zip(mesh, index, strict=True))
        monkeypatch.setattr(program.parallel, "axis_rank", here.__getitem__)
        monkeypatch.setattr(program.parallel, "axis_size", mesh.__getitem__)
        yield here


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_element_is_on_as_many_ranks_as_hold_copies(
    mesh: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "program", **mesh)
    with imported(folder, "settings", "parallel", "parameters") as program:
        specs = program.parameters.PARAMETERS
        held = {name: torch.zeros(spec.shape) for name, spec in specs.items()}
        owned = {name: torch.zeros(spec.shape) for name, spec in specs.items()}
        for here in every_rank(program, monkeypatch):
            for name, spec in specs.items():
                if here["pp"] in spec.stages:
                    for box in program.parallel.rectangles(name):
                        held[name][box.in_full()] += 1
                        owned[name][box.in_full()] += program.parallel.is_owner(name)
        for name, spec in specs.items():
            sizes = program.settings.MESH
            split = [a for a, kind in spec.types.items() if kind.startswith("S")]
            split += ["dp"] if sizes["dp"] > 1 and program.settings.ZERO else []
            copies = prod(n for a, n in sizes.items() if a not in split and a != "pp")
            assert (held[name] == copies * len(spec.stages)).all(), name
            assert (owned[name] == 1).all(), name


@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
def test_first_values_do_not_depend_on_the_layout(
    mesh: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with imported(write(tmp_path / "one"), "settings", "parallel", "initial") as program:
        for _ in every_rank(program, monkeypatch):
            whole = drawn(program)
    with imported(write(tmp_path / "many", **mesh), "settings", "parallel", "initial") as program:
        for here in every_rank(program, monkeypatch):
            if here["pp"]:
                continue
            for name, values in drawn(program).items():
                for box in program.parallel.rectangles(name):
                    same = values[box.in_local()] == whole[name][box.in_full()]
                    assert same.all(), (name, here, box)


def drawn(program: SimpleNamespace, seed: int = 3) -> dict[str, Tensor]:
    """First values of the shards of the rank that `axis_rank` says."""
    values = {}
    for name in program.initial.PARAMETERS:
        boxes = program.parallel.rectangles(name)
        ends = [[a + n for a, n in zip(b.local, b.sizes, strict=True)] for b in boxes]
        shape = [max(end) for end in zip(*ends, strict=True)] if boxes else [0]
        values[name] = torch.full(shape, torch.nan, dtype=torch.float64)
        for box in boxes:
            program.initial._fill(values[name][box.in_local()], name, box, seed)
        assert not values[name].isnan().any()
    return values


def test_first_values_have_their_distribution(tmp_path: Path) -> None:
    index = torch.arange(200_000)
    with imported(write(tmp_path / "program"), "initial") as program:
        normal = program.initial._draw(index, "normal", "a", 0)
        uniform = program.initial._draw(index, "uniform", "a", 0)
        other = program.initial._draw(index, "normal", "b", 0)
        reseeded = program.initial._draw(index, "normal", "a", 1)
    assert abs(normal.mean()) < 0.01
    assert abs(normal.std() - 1) < 0.01
    assert abs((normal**4).mean() - 3) < 0.1
    assert abs(uniform.mean()) < 0.01
    assert abs(uniform.var() - 1 / 3) < 0.01
    assert uniform.abs().max() <= 1
    for draws in (normal, other, reseeded):
        neighbours = torch.stack((draws[:-1], draws[1:]))
        assert abs(torch.corrcoef(neighbours)[0, 1]) < 0.01
    for draws in (other, reseeded):
        assert abs(torch.corrcoef(torch.stack((normal, draws)))[0, 1]) < 0.01


def test_a_large_parameter_is_filled_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with alone(write(tmp_path / "program"), "initial") as program:
        program.initial.initialise(program.stage, 0)
        before = {name: p.detach().clone() for name, p in program.stage.named_parameters()}
        monkeypatch.setattr(program.initial, "ELEMENTS_AT_ONCE", 25)
        program.initial.initialise(program.stage, 0)
        for name, parameter in program.stage.named_parameters():
            assert torch.equal(parameter, before[name])


# --- plain weights -------------------------------------------------------------------------------


def full_weights() -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in Handwritten().named_parameters()}


@pytest.mark.parametrize("form", ["mapping", "pt", "safetensors", "folder", "index"])
def test_weights_are_read_from(form: str, tmp_path: Path) -> None:
    weights = full_weights()
    origin: object = tmp_path / "weights" / "model.safetensors"
    (tmp_path / "weights").mkdir()
    if form == "mapping":
        origin = weights
    elif form == "pt":
        origin = tmp_path / "weights.pt"
        torch.save(weights, origin)
    elif form == "index":
        names = sorted(weights)
        parts = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
        for file, part in parts.items():
            save_file({name: weights[name] for name in part}, tmp_path / "weights" / file)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        origin = tmp_path / "weights"
        (origin / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights, origin)
        origin = tmp_path / "weights" if form == "folder" else origin
    with alone(write(tmp_path / "program"), "weights") as program:
        program.weights.load_weights(program.stage, origin)
        for name, parameter in program.stage.named_parameters():
            assert torch.equal(parameter, weights[name]), name


def test_a_second_name_of_a_tied_weight_and_a_missing_prefix_are_understood(tmp_path: Path) -> None:
    weights = full_weights()
    copy = {"lm_head.weight": weights["model.embed.weight"].clone()}
    bare = {name.removeprefix("model."): value for name, value in weights.items()}
    with alone(write(tmp_path / "program"), "weights") as program:
        for given in (weights | copy, bare | {"layers.0.attn.masked_bias": torch.zeros(())}):
            torch.nn.init.zeros_(program.stage.model.embed.weight)
            program.weights.load_weights(program.stage, given)
            assert torch.equal(program.stage.model.embed.weight, weights["model.embed.weight"])


def test_weights_that_do_not_fit_are_one_error(tmp_path: Path) -> None:
    weights = full_weights()
    del weights["model.layers.0.gain"]
    weights["model.layers.1.gain"] = torch.zeros(3)
    weights["lm_head.weight"] = torch.zeros(VOCAB, HIDDEN)
    with alone(write(tmp_path / "program"), "weights") as program:
        with pytest.raises(ValueError) as error:
            program.weights.load_weights(program.stage, weights)
        with pytest.raises(SystemExit, match=r"expected a \.safetensors or \.pt file"):
            program.weights.load_weights(program.stage, tmp_path)
    assert str(error.value) == (
        "the weights do not fit the model; missing: model.layers.0.gain; "
        "not in the model: lm_head.weight; "
        "of another shape: model.layers.1.gain (3,), expected (4,)"
    )


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_keeps_weights_state_and_progress(tmp_path: Path) -> None:
    with alone(write(tmp_path / "program"), "initial", "checkpoint") as program:
        progress = program.checkpoint.Progress(step=1, samples=8, seed=5)
        program.initial.initialise(program.stage, 0)
        optimizer = torch.optim.AdamW(program.stage.parameters(), fused=True)
        for parameter in program.stage.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        program.checkpoint.save(tmp_path / "saved", program.stage, optimizer, progress)
        names = [name for name, _ in program.stage.named_parameters()]
        before = [p.detach().clone() for p in program.stage.parameters()]
        moments = [optimizer.state[p]["exp_avg_sq"].clone() for p in program.stage.parameters()]
        program.initial.initialise(program.stage, 1)
        fresh = torch.optim.AdamW(program.stage.parameters(), fused=True)
        assert program.checkpoint.resume(tmp_path / "saved", program.stage, fresh) == progress
        for parameter, value, moment in zip(
            program.stage.parameters(), before, moments, strict=True
        ):
            assert torch.equal(parameter, value)
            assert torch.equal(fresh.state[parameter]["exp_avg_sq"], moment)
            assert fresh.state[parameter]["step"] == 1
    plain = {name: torch.zeros_like(value) for name, value in zip(names, before, strict=True)}
    dcp.load(plain, checkpoint_id=tmp_path / "saved" / "step-00000001")
    for name, value in zip(names, before, strict=True):
        assert torch.equal(plain[name], value)


def test_only_whole_checkpoints_count_and_the_last_two_stay(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    with alone(write(tmp_path / "program"), "initial", "checkpoint") as program:
        checkpoint = program.checkpoint
        with pytest.raises(SystemExit, match="no checkpoint in"):
            checkpoint.newest(saved)
        program.initial.initialise(program.stage, 0)
        optimizer = torch.optim.AdamW(program.stage.parameters())
        checkpoint.create_state(optimizer)
        for step in (1, 2, 3, 3):
            checkpoint.save(saved, program.stage, optimizer, checkpoint.Progress(step))
        assert sorted(p.name for p in saved.iterdir()) == ["step-00000002", "step-00000003"]
        for name in ("step-00000009.partial", "step-00000010"):  # killed while writing; cut short
            (saved / name).mkdir()
            (saved / name / "__0_0.distcp").touch()
        assert checkpoint.newest(saved).name == "step-00000003"
        (saved / "step-00000004.partial").mkdir()  # left over from a run that was killed
        (saved / "step-00000004.partial" / "rest").touch()
        checkpoint.save(saved, program.stage, optimizer, checkpoint.Progress(4))
        assert not (saved / "step-00000004" / "rest").exists()
        assert checkpoint.newest(saved).name == "step-00000004"


def test_a_save_beside_training_keeps_what_was_there_when_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Event()  # nothing is written before training has gone on
    with alone(write(tmp_path / "program"), "initial", "checkpoint", "saving") as program:
        really = program.saving.write

        def slowly(*args: object) -> Path:
            disk.wait()
            return really(*args)

        monkeypatch.setattr(program.saving, "write", slowly)
        program.initial.initialise(program.stage, 0)
        optimizer = torch.optim.AdamW(program.stage.parameters())
        program.checkpoint.create_state(optimizer)
        saver = program.saving.Saver(tmp_path / "saved")
        before = {n: p.detach().clone() for n, p in program.stage.named_parameters()}
        progress = program.checkpoint.Progress(step=1, samples=8)
        saver.save(program.stage, optimizer, progress)
        saver.before_update()
        program.initial.initialise(program.stage, 1)
        progress.step = 2
        assert not (tmp_path / "saved").exists()
        disk.set()
        saver.wait()
        fresh = torch.optim.AdamW(program.stage.parameters())
        loaded = program.checkpoint.resume(tmp_path / "saved", program.stage, fresh)
        assert (loaded.step, loaded.samples) == (1, 8)
        for name, parameter in program.stage.named_parameters():
            assert torch.equal(parameter, before[name])


def test_a_save_that_fails_is_heard_of_before_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("a file where the folder should be")
    with alone(write(tmp_path / "program"), "initial", "checkpoint", "saving") as program:
        program.initial.initialise(program.stage, 0)
        optimizer = torch.optim.AdamW(program.stage.parameters())
        program.checkpoint.create_state(optimizer)
        saver = program.saving.Saver(tmp_path / "saved")
        saver.save(program.stage, optimizer, program.checkpoint.Progress(step=1))
        with pytest.raises(OSError, match="saved"):
            saver.save(program.stage, optimizer, program.checkpoint.Progress(step=2))


# --- data ----------------------------------------------------------------------------------------


def test_a_sample_depends_on_its_number_alone(tmp_path: Path) -> None:
    inputs = {
        "input_ids": ("int64", ("b", "s"), 100),
        "labels": ("int64", ("b", "s"), 100),
        "x": ("float32", ("b", "s", 3), 0),
        "attention_mask": ("int64", ("b", "s"), 2),
    }
    with imported(write(tmp_path / "program"), "data") as program:
        whole = program.data.batch(range(8), inputs, 6, seed=1)
        part = program.data.batch(range(3, 5), inputs, 6, seed=1)
        other = program.data.batch(range(8), inputs, 6, seed=2)
    for name in inputs:
        assert torch.equal(part[name], whole[name][3:5])
    assert {name: tuple(value.shape) for name, value in whole.items()} == {
        "input_ids": (8, 6),
        "labels": (8, 6),
        "x": (8, 6, 3),
        "attention_mask": (8, 6),
    }
    assert torch.equal(whole["labels"], whole["input_ids"])
    assert whole["input_ids"].min() >= 0
    assert whole["input_ids"].max() < 100
    assert not torch.equal(whole["input_ids"][0], whole["input_ids"][1])
    assert not torch.equal(whole["input_ids"], other["input_ids"])
