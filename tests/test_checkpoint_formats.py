"""Hugging Face folders and our own form: real libraries read them, damage is named, ranks share."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emit_cases import module, small_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from shardwright.checkpoint import convert, inspect
from shardwright.checkpoint.contents import Job
from shardwright.checkpoint.formats import Options, universal
from shardwright.checkpoint.formats.safetensors_file import read_header
from shardwright.ir import CorruptCheckpoint, InvalidInput, ShardwrightError, VerificationFailed


def tensors(seed: int = 0, layers: int = 6) -> dict[str, np.ndarray]:
    random_ = np.random.default_rng(seed)
    made = {
        f"layers.{k}.weight": random_.standard_normal((40 + k, 30)).astype("f4")
        for k in range(layers)
    }
    return made | {
        "half": random_.standard_normal(33).astype("f2"),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "numbers": np.arange(7, dtype=np.int64),
    }


def folder(root: Path, seed: int = 0) -> Path:
    root.mkdir()
    save_file(tensors(seed), root / "model.safetensors", {"format": "pt"})
    (root / "config.json").write_text(json.dumps({"hidden_size": 30, "seed": seed}))
    (root / "tokenizer.json").write_text(json.dumps({"model_type": "BPE", "seed": seed}))
    return root


def loaded(root: Path, stem: str = "model") -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in sorted(root.glob(f"{stem}*.safetensors")):
        found |= load_file(path)
    return found


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype
        and one[k].shape == other[k].shape
        and one[k].tobytes() == other[k].tobytes()
        for k in one
    )


def test_there_and_back_through_our_form_in_shards(tmp_path: Path) -> None:
    source = folder(tmp_path / "hf")
    first = convert(source, tmp_path / "ours", "universal", verify=True)
    assert first.verified and first.tensors == 10
    back = convert(
        tmp_path / "ours",
        tmp_path / "back",
        "safetensors",
        verify=True,
        flags={"shard_bytes": 9000},
    )
    assert back.nbytes == sum(t.nbytes for t in tensors().values())
    assert same(loaded(tmp_path / "back"), tensors())
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "back" / file, "np") as opened:
            assert name in opened.keys()  # noqa: SIM118 (no dict)
    assert index["metadata"]["total_size"] == back.nbytes
    sizes = [p.stat().st_size for p in (tmp_path / "back").glob("*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 9000 + 4000
    again = convert(source, tmp_path / "again", "safetensors")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()
    assert again.source_format == "safetensors"


def test_our_files_open_with_safetensors(tmp_path: Path) -> None:
    convert(folder(tmp_path / "hf"), tmp_path / "ours", "universal")
    found = loaded(tmp_path / "ours", "fragments")
    assert same({k.removeprefix("weight/"): v for k, v in found.items()}, tensors())


def test_states_beside_the_model_and_weights_out_of_master_copies(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for state in ("master", "exp_avg"):
        save_file(tensors(1), source / f"{state}.safetensors", {"shardwright_state": state})
    made = convert(source, tmp_path / "ours", "universal", verify=True)
    assert made.tensors == 3 * 10
    convert(tmp_path / "ours", tmp_path / "hf", "safetensors", states=["weight"], dtype="bf16")
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == ["model.safetensors"]
    header = read_header(tmp_path / "hf" / "model.safetensors")
    kinds = {entry.name: entry.dtype for entry in header.entries}
    assert kinds["layers.0.weight"] == "BF16" and kinds["numbers"] == "I64"
    with pytest.raises(InvalidInput, match=r"--states exp_avg_sq: the checkpoint has none"):
        convert(tmp_path / "ours", tmp_path / "x", "safetensors", states=["exp_avg_sq"])


def test_a_config_that_is_cut_off_is_named(tmp_path: Path) -> None:
    convert(folder(tmp_path / "hf"), tmp_path / "dcp", "dcp")
    (tmp_path / "dcp" / "config.json").write_text('{"model_type": "llama", "hidden_si')
    with pytest.raises(CorruptCheckpoint, match=r"config\.json: no JSON"):
        convert(tmp_path / "dcp", tmp_path / "out", "universal")


def test_a_damaged_tracker_does_not_choose_the_release(tmp_path: Path) -> None:
    """Megatron's tracker says a number or `release`; all else is damage."""
    model = module("llama", 2)
    model.save_pretrained(tmp_path / "hf")
    at = tmp_path / "megatron"
    convert(tmp_path / "hf", at, "megatron", flags={"iteration": 3})
    shutil.copytree(at / "iter_0000003", at / "release")
    (at / "latest_checkpointed_iteration.txt").write_text("release")
    assert inspect(at).path == str(at)
    (at / "latest_checkpointed_iteration.txt").write_text("s")
    with pytest.raises(InvalidInput, match="names 's', which is not there"):
        inspect(at)


def test_a_plan_gives_the_mesh_with_its_virtual_stages(tmp_path: Path) -> None:
    plan = small_plan("llama", "pp=2,vpp=2,schedule=interleaved", 2, layers=4)
    plan.save(tmp_path / "plan.json")
    model = module("llama", 4)
    model.save_pretrained(tmp_path / "hf")
    found = convert(
        tmp_path / "hf", tmp_path / "mc", "megatron", plan=tmp_path / "plan.json", verify=True
    )
    assert found.verified
    assert inspect(tmp_path / "mc").mesh.items() >= {"pp": 2, "vpp": 2}.items()
    convert(tmp_path / "hf", tmp_path / "dcp", "dcp", plan=tmp_path / "plan.json")
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2


def test_weights_of_another_dtype_come_from_the_master_copies(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    exact = np.array([1.0, 1.0009765625, -3.14159265], np.float32)
    save_file({"w": exact.astype(ml_dtypes.bfloat16)}, tmp_path / "hf" / "model.safetensors")
    save_file({"w": exact}, tmp_path / "hf" / "master.safetensors", {"shardwright_state": "master"})
    run = {"states": ["weight"], "verify": True}
    for dtype, expected in (("fp32", exact), ("fp16", exact.astype(np.float16))):
        convert(tmp_path / "hf", tmp_path / dtype, "safetensors", dtype=dtype, **run)
        assert loaded(tmp_path / dtype)["w"].tobytes() == expected.tobytes()
    with pytest.raises(InvalidInput, match="weights are rounded to one of F64"):
        convert(tmp_path / "hf", tmp_path / "int8", "safetensors", dtype="int8")


def test_flags_that_no_format_has_are_refused(tmp_path: Path) -> None:
    source = folder(tmp_path / "hf")
    with pytest.raises(InvalidInput, match="--set shrd_bytes: neither reading safetensors nor"):
        convert(source, tmp_path / "o", "dcp", flags={"shrd_bytes": 9})
    with pytest.raises(InvalidInput, match="cannot make it"):
        convert(source, "/proc/o", "dcp")


def test_shards_of_dcp_for_hugging_face(tmp_path: Path) -> None:
    source = tmp_path / "shards"
    source.mkdir()
    whole = np.random.default_rng(0).standard_normal((10, 6)).astype("f4")
    for rank, (low, high) in enumerate(((0, 4), (4, 8), (8, 10))):
        said = {"w": {"saved_offsets": [low, 0]}}
        save_file(
            {"w": whole[low:high]},
            source / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors",
            {"DCP_SHARDING_INFO": json.dumps(said), "DCP_VERSION": "1.0", "format": "pt"},
        )
    convert(source, tmp_path / "hf", "safetensors", verify=True)
    assert same(loaded(tmp_path / "hf"), {"w": whole})
    (source / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"w \(weight\): \[4:8, 0:6\] of \(10, 6\)"):
        convert(source, tmp_path / "x", "safetensors")
    assert "[4:8, 0:6]" in inspect(source).problem


def test_a_job_survives(tmp_path: Path) -> None:
    job = Job(step=7, param_groups=({"lr": 0.1, "betas": [0.9, 0.99]},), rng={"0": {"a": [1]}})
    source = folder(tmp_path / "hf")
    (source / "training_state.json").write_text(
        json.dumps({"step": 7, "param_groups": list(job.param_groups), "rng": {"0": {"a": [1]}}})
    )
    convert(source, tmp_path / "ours", "universal")
    assert universal.read(tmp_path / "ours", Options()).job == job
    convert(tmp_path / "ours", tmp_path / "back", "safetensors")
    convert(tmp_path / "back", tmp_path / "ours2", "universal")
    assert universal.read(tmp_path / "ours2", Options()).job == job
    assert inspect(tmp_path / "back").step == 7


# ------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two saves of the same layout and of different values."""
    root = tmp_path_factory.mktemp("saves")
    for name, seed in (("one", 0), ("other", 1)):
        convert(folder(root / f"hf-{name}", seed), root / name, "universal")
    return root / "one", root / "other"


@given(st.sampled_from(["flip", "truncate", "longer", "missing", "swap"]), st.integers(0, 10**9))
@settings(max_examples=60)
def test_every_damage_of_our_form_is_found_and_named(
    saves: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int
) -> None:
    good, other = saves
    draw = random.Random(seed)
    work = tmp_path_factory.mktemp("damage")
    bad = work / "bad"
    shutil.copytree(good, bad)
    file = draw.choice(sorted(bad.iterdir()))
    raw = bytearray(file.read_bytes())
    if kind == "flip":
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        file.write_bytes(raw)
    elif kind == "truncate":
        os.truncate(file, draw.randrange(len(raw)))
    elif kind == "longer":
        file.write_bytes(raw + b"\0")
    elif kind == "missing":
        file.unlink()
    else:
        shutil.copy(other / file.name, file)
    with pytest.raises(ShardwrightError) as caught:
        convert(bad, work / "out", "safetensors")
    assert str(bad) in str(caught.value)
    assert not (work / "out").exists()


def test_files_of_two_saves_are_told_apart_by_their_number(
    saves: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(saves[0], tmp_path / "mixed")
    shutil.copy(saves[1] / "fragments-00000.safetensors", tmp_path / "mixed")
    with pytest.raises(CorruptCheckpoint, match="files of different saves are mixed"):
        inspect(tmp_path / "mixed")


def test_damaged_safetensors_are_named(tmp_path: Path) -> None:
    source = folder(tmp_path / "hf")
    path = source / "model.safetensors"
    size = path.stat().st_size
    for length, said in (
        (size - 1, "truncated"),
        (100, "ends inside its header"),
        (4, "no safetensors"),
    ):
        os.truncate(path, length)
        with pytest.raises(CorruptCheckpoint, match=f"model.safetensors.*{said}"):
            convert(source, tmp_path / "x", "universal")
    shutil.rmtree(source)
    convert(folder(source), tmp_path / "s", "safetensors", flags={"shard_bytes": 9000})
    shards = sorted((tmp_path / "s").glob("model-*.safetensors"))
    shutil.copy(shards[0], shards[1])
    with pytest.raises(CorruptCheckpoint, match="files of different models are mixed"):
        inspect(tmp_path / "s")
    shards[1].unlink()
    with pytest.raises(CorruptCheckpoint, match=f"{shards[1].name}: the file is missing"):
        inspect(tmp_path / "s")


def test_what_is_no_checkpoint_lists_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "readme").write_text("hello")
    with pytest.raises(InvalidInput, match=r"no checkpoint of a known format \(universal, safet"):
        inspect(tmp_path)
    with pytest.raises(InvalidInput, match=r"format 'gguf': expected one of universal"):
        convert(folder(tmp_path / "hf"), tmp_path / "x", "gguf")
    with pytest.raises(InvalidInput, match=r"--memory 'much'"):
        convert(tmp_path / "hf", tmp_path / "x", "universal", memory="much")


# ------------------------------------------------------------------- ranks and the command line


def command(*more: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shardwright", *more],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("over", ["dcp", "orbax", "universal"])
def test_tensors_of_all_dtypes_are_proved_equal(over: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "hf")
    assert convert(source, tmp_path / "over", over, verify=True).verified
    assert convert(tmp_path / "over", tmp_path / "back", "safetensors", verify=True).verified
    assert same(loaded(source), loaded(tmp_path / "back"))


def test_another_layout_does_not_go_on_with_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hf").mkdir()
    fused = np.arange(64, dtype=np.float32).reshape(16, 4)
    save_file({"fused": fused}, tmp_path / "hf" / "model.safetensors")
    specs = []
    for dims in ("([a b] n) c", "(n [a b]) c"):
        specs.append(str(tmp_path / f"{len(specs)}.yaml"))
        Path(specs[-1]).write_text(
            f"layout: fused\ntensors:\n- stored: fused\n  dims: '{dims}'\n  parts: {{a: a, b: b}}\n"
        )
    with monkeypatch.context() as patch:
        patch.setattr(
            "shardwright.checkpoint.engine.directory.put_in_place",
            lambda at: (_ for _ in ()).throw(OSError(5, "broken")),
        )
        with pytest.raises(InvalidInput, match="broken"):
            convert(tmp_path / "hf", tmp_path / "o", "safetensors", spec=specs[0])
    found = convert(tmp_path / "hf", tmp_path / "o", "safetensors", spec=specs[1])
    assert found.resumed_bytes == 0
    assert (loaded(tmp_path / "o")["b"] == fused[1::2]).all()


def test_links_that_lead_out_are_not_copied(tmp_path: Path) -> None:
    source = folder(tmp_path / "hf")
    (tmp_path / "secret").write_text("{}")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer\.json.*not inside its directory"):
        convert(source, tmp_path / "o", "safetensors")
    assert not (tmp_path / "o").exists()
    convert(source, tmp_path / "o", "safetensors", config=source)  # who names it vouches for it


@pytest.mark.parametrize(
    ("more", "says"),
    [({"mesh": {"foo": 2}}, "--mesh foo: expected cp, dp"), ({"threads": -3}, "--threads -3")],
)
def test_what_would_be_ignored_is_refused(more: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=says):
        convert(folder(tmp_path / "hf"), tmp_path / "o", "dcp", **more)
    assert not (tmp_path / "o").exists()


def test_a_snapshot_of_a_cache_leads_to_its_own_blobs(tmp_path: Path) -> None:
    """As the hub's cache keeps models: files of a snapshot are links to blobs beside it."""
    model = tmp_path / "models--some--model"
    snapshot = model / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    folder(snapshot)
    (model / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(model / "blobs" / str(number))
        path.symlink_to(f"../../blobs/{number}")
    convert(snapshot, tmp_path / "o", "safetensors", verify=True)
    (model / "elsewhere").write_bytes((snapshot / "config.json").read_bytes())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../elsewhere")
    with pytest.raises(CorruptCheckpoint, match="not inside its directory"):
        convert(snapshot, tmp_path / "again", "safetensors")


def test_what_fails_to_verify_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path / "hf")
    convert(source, tmp_path / "o", "safetensors")
    before = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}

    def unequal(*_: object) -> None:
        raise VerificationFailed("a tensor differs")

    monkeypatch.setattr("shardwright.checkpoint.conversion.equal", unequal)
    with pytest.raises(VerificationFailed):
        convert(source, tmp_path / "o", "safetensors", dtype="bf16", verify=True, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()} == before


def training(root: Path) -> Path:
    """A Hugging Face folder with an optimizer's state: parameters a and b, not of one shape."""
    root.mkdir()
    random_ = np.random.default_rng(1)
    for state in ("master", "exp_avg", "exp_avg_sq"):
        arrays = {"a.w": random_.random((6, 4)), "b.w": random_.random((3, 4))}
        given_ = {name: array.astype(np.float32) for name, array in arrays.items()}
        save_file(given_, root / f"{state}.safetensors", {"shardwright_state": state})
        if state == "master":
            save_file(given_, root / "model.safetensors")
    (root / "training_state.json").write_text('{"step": 3}')
    return root


def swap(one: Path, other: Path) -> None:
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


OPTIM = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize(
    ("form", "flags", "damage", "said"),
    [
        ("deepspeed", {"stage": 3}, lambda at: swap(*(at / "global_step3" / OPTIM.format(r)
         for r in (0, 1))), "was saved as zero_pp_rank_1.*swapped"),
        ("deepspeed", {"stage": 1}, lambda at: (at / "latest").write_bytes(b"\xff" * 9000),
         "latest: names .*no model states"),
        ("deepspeed-universal", {}, lambda at: (at / "global_step3/zero/a.w/exp_avg.pt").unlink(),
         "a.w/exp_avg.pt: missing"),
        ("deepspeed-universal", {}, lambda at: swap(*(at / f"global_step3/zero/{n}.w/exp_avg.pt"
         for n in "ab")), r"the shape \(3, 4\), the model states say \(6, 4\)"),
        ("orbax", {}, lambda at: (at / "3/state/_METADATA").unlink(), "_CHECKPOINT_METADATA names"),
        ("orbax", {}, lambda at: (at / "3/state/0.count/0").unlink(), "0.count/0: missing"),
        ("orbax", {}, lambda at: (at / "3/params/a.w/.zarray").write_text('{"shape": [6]}'),
         "describes no array"),
        ("dcp", {}, lambda at: (at / "common.pt").write_bytes(b""), "metadata.json: missing"),
    ],
)  # fmt: skip
def test_structural_damage_of_forms_without_checksums_is_named(
    form: str, flags: dict[str, Any], damage: Any, said: str, tmp_path: Path
) -> None:
    source = training(tmp_path / "hf")
    states = ["weight", "exp_avg", "exp_avg_sq", *(["master"] if form.startswith("deep") else [])]
    mesh = {"dp": 2} if form == "deepspeed" else {}
    convert(source, tmp_path / "made", form, states=states, flags=flags, mesh=mesh, verify=True)
    damage(tmp_path / "made")
    with pytest.raises(CorruptCheckpoint, match=said):
        convert(tmp_path / "made", tmp_path / "o", "safetensors", source_format=form)
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    source = folder(tmp_path / "hf")

    def ran(*more: str) -> tuple[int, str, str]:
        run = command(*more)
        out, error = run.communicate(timeout=100)
        return run.returncode, out, error

    code, out, _ = ran("convert", str(source), str(tmp_path / "o"), "--to", "universal", "--verify")
    assert code == 0 and "verified" in out
    code, out, _ = ran("inspect", str(tmp_path / "o"), "--json")
    said: dict[str, Any] = json.loads(out)
    assert code == 0 and said["format"] == "universal" and said["whole"]
    code, _, error = ran("convert", str(source), str(tmp_path / "o"), "--to", "universal")
    assert code == 2 and error.count("\n") == 1 and "--overwrite" in error
