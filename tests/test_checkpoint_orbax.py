"""orbax against orbax itself: what it wrote is read, and it restores what we write."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from shardwright.checkpoint.conversion import convert
from shardwright.checkpoint.formats import Options, orbax
from shardwright.ir import CorruptCheckpoint

jax = pytest.importorskip("jax", reason="jax is not installed")
ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")

import jax.numpy as jnp  # noqa: E402


def model():
    random = np.random.default_rng(3)
    params = {
        "layers.w": jnp.asarray(random.standard_normal((3, 5, 7)), jnp.float32),
        "emb": jnp.asarray(random.standard_normal((9, 4)), jnp.bfloat16),
    }
    adam = optax.adamw(lambda step: 1e-3)
    state = adam.init(params)
    gradients = jax.tree.map(jnp.ones_like, params)
    for _ in range(3):
        updates, state = adam.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def save(folder: Path, kind: str) -> None:
    params, state = model()
    if kind == "manager":
        with ocp.CheckpointManager(folder) as kept:
            items = ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                state=ocp.args.StandardSave(state),
                progress=ocp.args.JsonSave({"step": 3, "samples": 24, "seed": 1}),
            )
            kept.save(3, args=items, force=True)
    elif kind == "standard":
        with ocp.StandardCheckpointer() as saver:
            saver.save(folder / "one", {"params": params, "opt_state": state})
    else:
        saver = ocp.PyTreeCheckpointer(use_ocdbt=False)
        saver.save(folder / "one", {"params": params, "opt_state": state})


def where(folder: Path, kind: str) -> Path:
    return folder if kind == "manager" else folder / "one"


@pytest.mark.parametrize("kind", ["manager", "standard", "plain"])
def test_what_orbax_wrote_goes_through_safetensors_and_back(kind, tmp_path) -> None:
    from safetensors.numpy import load_file

    save(tmp_path / "saved", kind)
    source = where(tmp_path / "saved", kind)
    there = convert(source, tmp_path / "hf", "safetensors", source_format="orbax", verify=True)
    assert there.verified and there.tensors == 6
    params, state = model()
    loaded = load_file(tmp_path / "hf" / "exp_avg_sq.safetensors")
    np.testing.assert_array_equal(loaded["layers.w"], state[0].nu["layers.w"])
    back = convert(
        tmp_path / "hf", tmp_path / "back", "orbax", source_format="safetensors", verify=True
    )
    assert back.verified
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, state))
    with ocp.CheckpointManager(tmp_path / "back") as kept:
        assert kept.latest_step() == 3
        wanted = ocp.args.Composite(
            params=ocp.args.StandardRestore(shapes[0]),
            state=ocp.args.StandardRestore(shapes[1]),
            progress=ocp.args.JsonRestore(),
        )
        found = kept.restore(3, args=wanted)
    assert found["progress"]["step"] == 3
    assert jax.tree.structure(found["state"]) == jax.tree.structure(state)
    for got, expected in zip(
        jax.tree.leaves((found["params"], found["state"])), jax.tree.leaves((params, state)),
        strict=True,
    ):  # fmt: skip
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_a_standard_tree_in_small_chunks_restores(tmp_path) -> None:
    save(tmp_path / "saved", "manager")
    convert(
        tmp_path / "saved", tmp_path / "out", "orbax", source_format="orbax", verify=True,
        flags={"tree": "standard", "chunk_bytes": 64, "schedule": True},
    )  # fmt: skip
    params, state = model()
    tree = {"params": params, "opt_state": state}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    with ocp.StandardCheckpointer() as loader:
        found = loader.restore(tmp_path / "out", shapes)
    for got, expected in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
    said = json.loads((tmp_path / "out" / "params.layers.w" / ".zarray").read_text())
    assert np.prod(said["chunks"]) * 4 <= 64


def test_scalars_among_arrays_are_read(tmp_path) -> None:
    tree = {"w": np.arange(6, dtype=np.float32), "i": np.int32(3), "deep": {"n": np.float32(0.5)}}
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "saved", jax.tree.map(jnp.asarray, tree))
    convert(tmp_path / "saved", tmp_path / "out", "safetensors", verify=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: (str(x.dtype), x.tolist()) for name, x in found.items()} == {
        "w": ("float32", [0, 1, 2, 3, 4, 5]), "i": ("int32", 3), "deep.n": ("float32", 0.5),
    }  # fmt: skip


def test_a_truncated_chunk_is_named(tmp_path) -> None:
    save(tmp_path / "saved", "manager")
    convert(tmp_path / "saved", tmp_path / "out", "orbax", source_format="orbax")
    chunk = tmp_path / "out" / "3" / "params" / "layers.w" / "0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match=r"layers\.w/0\.0\.0"):
        orbax.read(tmp_path / "out", Options())
