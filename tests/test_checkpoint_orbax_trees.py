"""Trees of orbax with all that is in them: real train states go through other forms and come back
as real orbax restores them; torch's FSDP2 goes on from what optax kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_devices import environment
from safetensors.numpy import load_file

from shardwright.checkpoint import convert, inspect
from shardwright.ir import InvalidInput

jax = pytest.importorskip("jax", reason="jax is not installed")
ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
nn = pytest.importorskip("flax.linen", reason="flax is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")

import jax.numpy as jnp  # noqa: E402
import orbax.checkpoint.experimental.v1 as v1  # noqa: E402
from flax.training.train_state import TrainState  # noqa: E402
from orbax.checkpoint.experimental.v1 import training  # noqa: E402

TESTS = Path(__file__).parent


class Model(nn.Module):
    """Two layers and a norm with running averages."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(5)(nn.BatchNorm(use_running_average=True)(nn.Dense(7)(x)))


class State(TrainState):
    """With what programs add to it."""

    batch_stats: Any = None
    rng: Any = None
    note: Any = None


def chain(kind: str, params: Any) -> Any:
    matrices = jax.tree.map(lambda p: p.ndim > 1, params)
    if kind == "masked":
        inner = optax.masked(optax.adamw(1e-3), matrices)
        return optax.chain(optax.clip_by_global_norm(1.0), inner)
    if kind == "multi_transform":
        labels = jax.tree.map(lambda is_matrix: "a" if is_matrix else "b", matrices)
        parts = {"a": optax.adamw(1e-3), "b": optax.sgd(0.1, momentum=0.9)}
        return optax.multi_transform(parts, labels)
    if kind == "multi_steps":
        return optax.MultiSteps(optax.adamw(1e-3), 2).gradient_transformation()
    if kind == "ema":
        return optax.chain(optax.scale_by_adam(), optax.ema(0.9), optax.scale(-1e-3))
    if kind == "hyperparameters":
        return optax.inject_hyperparams(optax.adamw)(learning_rate=3e-4, b1=0.8, b2=0.95)
    return optax.adamw(1e-3)


def state(kind: str) -> State:
    model = Model()
    made = model.init(jax.random.PRNGKey(0), jnp.ones((1, 24)))
    params = made["params"]
    found = State.create(
        apply_fn=model.apply, params=params, tx=chain(kind, params),
        batch_stats=made["batch_stats"], rng=jax.random.key(7),
    )  # fmt: skip
    for _ in range(4):
        found = found.apply_gradients(grads=jax.tree.map(lambda p: jnp.full_like(p, 0.1), params))
    return found


def same(one: Any, other: Any) -> None:
    """Equal structure, dtypes and bytes."""
    pairs = [jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda leaf: leaf is None)[0]
             for x in (one, other)]  # fmt: skip
    assert [path for path, _ in pairs[0]] == [path for path, _ in pairs[1]]
    for (path, a), (_, b) in zip(*pairs, strict=True):
        if a is None or isinstance(a, str):
            assert a == b, path
            continue
        if jax.dtypes.issubdtype(getattr(a, "dtype", np.float32), jax.dtypes.prng_key):
            assert a.dtype == b.dtype
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.parametrize(
    ("kind", "step", "states"),
    [
        ("adamw", 4, {"weight": 6, "exp_avg": 6, "exp_avg_sq": 6}),
        ("masked", 4, {"weight": 6, "exp_avg": 2, "exp_avg_sq": 2}),
        ("multi_transform", 4,
         {"weight": 6, "exp_avg": 2, "exp_avg_sq": 2, "momentum_buffer": 4}),
        ("multi_steps", 2, {"weight": 6, "exp_avg": 6, "exp_avg_sq": 6, "acc_grads": 6}),
        ("ema", 4, {"weight": 6, "exp_avg": 6, "exp_avg_sq": 6, "ema": 6}),
        ("hyperparameters", 4, {"weight": 6, "exp_avg": 6, "exp_avg_sq": 6}),
    ],
)  # fmt: skip
def test_train_states_come_back_as_they_were(
    kind: str, step: int, states: dict[str, int], tmp_path: Path
) -> None:
    saved = state(kind)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "saved", saved)
    found = inspect(tmp_path / "saved")
    assert found.step == step
    assert {name: said["tensors"] for name, said in found.states.items()} == states
    convert(tmp_path / "saved", tmp_path / "hf", "safetensors", verify=True)
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    np.testing.assert_array_equal(
        weights["Dense_0.kernel"], np.asarray(saved.params["Dense_0"]["kernel"])
    )
    told = json.loads((tmp_path / "hf" / "training_state.json").read_text())
    groups = [{"lr": 3e-4, "betas": [0.8, 0.95]}] if kind == "hyperparameters" else []
    assert [{"lr": g["lr"], "betas": g["betas"]} for g in told["param_groups"]] == [
        {name: pytest.approx(value) for name, value in group.items()} for group in groups
    ]
    assert bool(found.notes) == (not groups)
    convert(tmp_path / "hf", tmp_path / "back", "orbax", flags={"tree": "source"}, verify=True)
    with ocp.StandardCheckpointer() as loader:
        same(loader.restore(tmp_path / "back", saved), saved)
    if kind == "adamw":  # one tree stays that tree, with the step of its top
        convert(tmp_path / "saved", tmp_path / "plain", "orbax", flags={"tree": "standard"})
        with ocp.StandardCheckpointer() as loader:
            assert int(loader.restore(tmp_path / "plain", saved).step) == 4


def test_counters_follow_a_job_that_went_on_elsewhere(tmp_path: Path) -> None:
    saved = state("adamw")
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "saved", saved)
    convert(tmp_path / "saved", tmp_path / "hf", "safetensors")
    path = tmp_path / "hf" / "training_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 9}))
    convert(tmp_path / "hf", tmp_path / "back", "orbax", flags={"tree": "source"})
    with ocp.StandardCheckpointer() as loader:
        found = loader.restore(tmp_path / "back", saved)
    assert int(found.step) == 9 and int(found.opt_state[0].count) == 9


TREE = {
    "params": {
        "w": np.arange(6, dtype=np.float32), "layers": [np.ones(2, np.float32), np.zeros(3)],
        "temperature": np.float32(0.7),
    },
    "s": "hello", "none": None, "yes": True, "int": 3, "float": 0.25, "numpy": np.float32(1.5),
    "dict": {}, "list": [], "tuple": (), "mixed": ["x", {}, np.ones(1, np.float32)],
}  # fmt: skip


def tree() -> dict[str, Any]:
    few = {
        "bf16": jnp.bfloat16, "int8": jnp.int8, "f8": jnp.float8_e4m3fn, "f8b": jnp.float8_e5m2
    }  # fmt: skip
    own = {name: jnp.arange(15, dtype=dtype).reshape(3, 5) for name, dtype in few.items()}
    more = {"old_key": jax.random.PRNGKey(3), "key": jax.random.key(1), "big": jnp.ones((200, 200))}
    return {**TREE, "params": {**TREE["params"], **own}, **more}


@pytest.mark.parametrize(
    ("ocdbt", "zarr3", "hop"),
    [(True, False, "safetensors"), (False, False, "dcp"), (True, True, "universal"),
     (False, True, "dcp")],
)  # fmt: skip
def test_whatever_is_in_a_tree_survives(ocdbt: bool, zarr3: bool, hop: str, tmp_path: Path) -> None:
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    ocp.Checkpointer(handler).save(tmp_path / "saved", tree())
    convert(tmp_path / "saved", tmp_path / "hop", hop, verify=True)
    convert(tmp_path / "hop", tmp_path / "back", "orbax", flags={"tree": "source"}, verify=True)
    one, other = (ocp.PyTreeCheckpointer().restore(tmp_path / name) for name in ("saved", "back"))
    same(one, other)
    assert other["s"] == "hello" and other["none"] is None and other["yes"] is True
    assert other["dict"] == {} and other["list"] == []


def test_the_new_interface_reads_and_is_read(tmp_path: Path) -> None:
    held = {k: v for k, v in tree().items() if k not in ("numpy", "tuple", "list", "mixed")}
    held["params"] = {k: v for k, v in held["params"].items() if k != "temperature"}
    v1.save_pytree(tmp_path / "saved", held)
    convert(tmp_path / "saved", tmp_path / "ours", "universal", verify=True)
    convert(tmp_path / "ours", tmp_path / "back", "orbax", flags={"tree": "source"})
    same(v1.load_pytree(tmp_path / "back"), v1.load_pytree(tmp_path / "saved"))
    with training.Checkpointer(tmp_path / "run") as run:
        run.save_pytree(5, {"params": {"w": jnp.ones(3)}, "step": 5})
    assert inspect(tmp_path / "run").step == 5
    convert(tmp_path / "run", tmp_path / "again", "orbax", flags={"tree": "source"})
    with training.Checkpointer(tmp_path / "again") as run:
        assert run.load_pytree(5)["step"] == 5


SHARDED = """
import sys, jax, numpy as np, jax.numpy as jnp, orbax.checkpoint as ocp
from pathlib import Path
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from shardwright.checkpoint import convert
root, ocdbt = Path(sys.argv[1]), sys.argv[2] == "ocdbt"
x = jnp.arange(6 * 20 * 3, dtype=jnp.float32).reshape(6, 20, 3)
y = jnp.arange(35.0).reshape(7, 5)
def on(devices, shape, names):
    return Mesh(np.array(jax.devices()[:devices]).reshape(shape), tuple(names))
def put(mesh, specs):
    return {k: NamedSharding(mesh, s) for k, s in specs.items()}
first = put(on(8, (2, 4), "ab"), {"x": P("a", "b"), "z": P(None, "b"), "y": P()})
values = {"x": x, "z": x * 2, "y": y}
tree = {"params": {k: jax.device_put(v, first[k]) for k, v in values.items()}}
ocp.PyTreeCheckpointer(use_ocdbt=ocdbt).save(root / "saved", tree)
convert(root / "saved", root / "ours", "universal", verify=True)
flags = {"tree": "standard", "chunk_bytes": 64}
convert(root / "ours", root / "back", "orbax", flags=flags, verify=True)
other = put(on(6, (3, 2), "cd"), {"x": P("c"), "z": P("c", "d"), "y": P()})
wanted = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=other[k]) for k, v in values.items()}
with ocp.StandardCheckpointer() as loader:
    found = loader.restore(root / "back", {"params": wanted})["params"]
for k, v in values.items():
    assert found[k].sharding == other[k]
    np.testing.assert_array_equal(np.asarray(found[k]), np.asarray(v))
print("equal")
"""


@pytest.mark.parametrize("kind", ["ocdbt", "plain"])
def test_eight_devices_save_and_six_restore(kind: str, tmp_path: Path) -> None:
    (tmp_path / "sharded.py").write_text(SHARDED)
    run = subprocess.run(
        [sys.executable, str(tmp_path / "sharded.py"), str(tmp_path), kind],
        env=environment(8),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0 and "equal" in run.stdout, run.stderr[-2000:]


def torch_model() -> Any:
    torch.manual_seed(99)
    parts = (torch.nn.Linear(7, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5))
    return torch.nn.Sequential(*parts, torch.nn.LayerNorm(5))


@pytest.mark.slow
def test_fsdp_goes_on_from_what_optax_kept(tmp_path: Path) -> None:
    """Against one process of plain torch, given the same moments by hand."""
    model = torch_model()
    params = {name: jnp.asarray(p.detach().numpy()) for name, p in model.named_parameters()}
    adam = optax.adamw(1e-2)
    kept = adam.init(params)
    for _ in range(3):
        gradients = jax.tree.map(lambda p: jnp.sin(p) + 0.1, params)
        updates, kept = adam.update(gradients, kept, params)
        params = optax.apply_updates(params, updates)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "saved", {"params": params, "opt_state": kept})
    convert(tmp_path / "saved", tmp_path / "dcp", "dcp", mesh={"dp": 2}, flags={"lr": 0.01})
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(TESTS / "dcp_worker.py"), "--load", str(tmp_path / "dcp"), "--first", "3",
         "--out", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    model.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in params.items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.tensor(np.asarray(kept[0].mu[name])),
            "exp_avg_sq": torch.tensor(np.asarray(kept[0].nu[name])),
        }
    losses = json.loads((tmp_path / "out" / "losses.json").read_text())
    for step in (3, 4):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        loss = (model(x) * torch.arange(5.0)).square().mean()
        assert losses[str(step)] == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_train_state_of_other_sources_has_its_step(tmp_path: Path) -> None:
    saved = state("adamw")
    with ocp.CheckpointManager(tmp_path / "saved") as kept:
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(saved.params), state=ocp.args.StandardSave(saved.opt_state)
        )
        kept.save(4, args=items, force=True)
    flags = {"tree": "train_state", "nested": True}
    convert(tmp_path / "saved", tmp_path / "made", "orbax", flags=flags, verify=True)
    wanted = {"step": jnp.int32(0), "params": saved.params, "opt_state": saved.opt_state}
    with ocp.StandardCheckpointer() as loader:
        found = loader.restore(tmp_path / "made", wanted)
    same(found, {**wanted, "step": np.int32(4)})


def test_a_tree_needs_a_source_that_had_one(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    (tmp_path / "hf").mkdir()
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(InvalidInput, match="tree=source: the source is no orbax checkpoint"):
        convert(tmp_path / "hf", tmp_path / "o", "orbax", flags={"tree": "source"})


def test_a_manager_finds_its_step_beside_a_config(tmp_path: Path) -> None:
    saved = state("adamw")
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "saved", saved.params)
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "x"}')
    convert(tmp_path / "saved", tmp_path / "made", "orbax", flags={"nested": True})
    assert (tmp_path / "made" / "config.json").exists()
    with ocp.CheckpointManager(tmp_path / "made") as kept:
        found = kept.restore(0, args=ocp.args.Composite(params=ocp.args.StandardRestore()))
    same(found["params"], saved.params)
