"""Whole conversions of random models over random meshes: three hops end with the same bytes."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from checkpoint_models import STATES, Values, llama, models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from shardwright.checkpoint.conversion import convert
from shardwright.checkpoint.formats import Options, megatron
from shardwright.checkpoint.formats.flags import WHOLE
from shardwright.ir import CorruptCheckpoint, InvalidInput


def save(values: Values, folder: Path) -> None:
    folder.mkdir(parents=True)
    for state in dict.fromkeys(state for state, _ in values):
        own = {name: value for (s, name), value in values.items() if s == state}
        file = "model" if state == "weight" else state
        metadata = {"format": "pt"} | ({} if state == "weight" else {"shardwright_state": state})
        save_file(own, folder / f"{file}.safetensors", metadata)


def load(folder: Path) -> Values:
    found = {}
    for path in folder.glob("*.safetensors"):
        state = "weight" if path.stem == "model" else path.stem
        found |= {(state, name): value for name, value in load_file(path).items()}
    return found


HOPS = st.lists(
    st.tuples(
        st.sampled_from(["megatron", "megatron-dist", "dcp", "universal"]),
        st.sampled_from([1, 2, 4]),
        st.sampled_from([1, 2]),
        st.sampled_from([1, 2]),
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(models(), HOPS)
def test_there_and_back_over_hops(model, hops) -> None:
    family, values, facts = model
    layers = 1 + max(
        int(n) for _, name in values for n in re.findall(r"\.(?:layers|h)\.(\d+)", name)
    )
    sizes = {**facts, "make_vocab_size_divisible_by": 8}
    with tempfile.TemporaryDirectory() as base:
        at = Path(base) / "start"
        save(values, at)
        for number, (to, tp, pp, ep) in enumerate(hops):
            mesh = {"tp": tp}
            if to == "megatron":
                mesh["pp"] = pp if layers % pp == 0 else 1
                mesh["ep"] = ep if family in ("mixtral", "qwen3-moe") else 1
            if to == "dcp":
                mesh = {"dp": tp}
            if to in WHOLE:
                mesh = {}
            following = Path(base) / str(number)
            convert(at, following, to, mesh=mesh, sizes=sizes, verify=True)
            at = following
        convert(at, Path(base) / "end", "safetensors", sizes=sizes)
        found = load(Path(base) / "end")
    assert found.keys() == values.keys()
    for key, value in values.items():
        np.testing.assert_array_equal(found[key], value, err_msg=str(key))


@pytest.fixture
def legacy(tmp_path: Path) -> Path:
    values, facts = llama(layers=2, groups=2, states=STATES, ffn=8)
    save(values, tmp_path / "hf")
    sizes = {**facts, "make_vocab_size_divisible_by": 8}
    convert(tmp_path / "hf", tmp_path / "legacy", "megatron", mesh={"tp": 2, "pp": 2}, sizes=sizes)
    return tmp_path / "legacy"


def ranks(legacy: Path) -> list[Path]:
    return sorted(legacy.glob("iter_*/mp_rank_*"))


def test_a_missing_rank_is_named(legacy: Path) -> None:
    for file in ranks(legacy)[1].iterdir():
        file.unlink()
    ranks(legacy)[1].rmdir()
    with pytest.raises(CorruptCheckpoint, match="tp=0, pp=1"):
        megatron.read(legacy, Options())


def test_a_missing_optimizer_file_is_named(legacy: Path) -> None:
    (ranks(legacy)[2] / "distrib_optim.pt").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"mp_rank_01_000/distrib_optim\.pt"):
        megatron.read(legacy, Options())


def test_a_truncated_file_is_named(legacy: Path) -> None:
    file = ranks(legacy)[0] / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CorruptCheckpoint, match="mp_rank_00_000"):
        megatron.read(legacy, Options())


def test_iterations_are_chosen_and_listed(legacy: Path) -> None:
    name = next(legacy.glob("iter_*")).name
    assert megatron.read(legacy, Options(tag=name)).mesh["pp"] == 2
    with pytest.raises(InvalidInput, match=f"no iteration '77'; it has {name}"):
        megatron.read(legacy, Options(tag="77"))
    (legacy / "latest_checkpointed_iteration.txt").write_text("99")
    with pytest.raises(InvalidInput, match="iter_0000099"):
        megatron.read(legacy, Options())


def test_layers_that_do_not_divide_ask_for_stages(legacy: Path, tmp_path: Path) -> None:
    facts = llama(layers=2, groups=2, ffn=8)[1]
    sizes = {**facts, "make_vocab_size_divisible_by": 8}
    with pytest.raises(InvalidInput, match="flag stages"):
        convert(legacy, tmp_path / "x", "megatron", mesh={"pp": 4}, sizes=sizes)
