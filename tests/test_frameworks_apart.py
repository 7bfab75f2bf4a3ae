"""Each framework alone is enough, and neither is imported before it is needed.

A finder in the place of Python's own finds nothing of a framework and of what needs it, as where it
is not installed, in the process and in those that it starts. What runs then is a whole journey, in
a process of its own: plan, save, load, emit, verify.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TORCH = ("torch", "torchvision", "transformers", "accelerate", "spmd_types")
JAX = ("jax", "jaxlib", "flax", "equinox", "optax", "orbax", "jaxtyping")

WITHOUT = """
import importlib.machinery, sys

MISSING = {missing!r}


class Path(importlib.machinery.PathFinder):
    '''The finder of files, without the missing ones: importlib.util.find_spec asks it.'''

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition('.')[0] in MISSING:
            return None
        return super().find_spec(name, path, target)


sys.meta_path[:] = [Path if each is importlib.machinery.PathFinder else each
                    for each in sys.meta_path]
for name in MISSING:
    assert name not in sys.modules
"""

MODEL_OF_JAX = '''
import jax, jax.numpy as jnp


def model():
    """A decoder of two layers: scan, tied embeddings, one head."""

    def layer(x, p):
        q, k, v = (x @ p[name] for name in "qkv")
        scores = jnp.einsum("bsd,btd->bst", q, k) / 4.0
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), dtype=bool))
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        x = x + jnp.einsum("bst,btd->bsd", weights, v) @ p["o"]
        return x + jax.nn.gelu(x @ p["up"]) @ p["down"], None

    def loss(params, tokens, labels):
        x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
        logits = jax.nn.log_softmax(x @ params["embed"].T)
        return -jnp.take_along_axis(logits, labels[..., None], -1).mean()

    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    layers = {name: shape(2, 16, 16) for name in "qkvo"}
    layers |= {"up": shape(2, 16, 32), "down": shape(2, 32, 16)}
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    return loss, {"embed": shape(32, 16), "layers": layers}, (tokens, tokens)
'''

MODEL_OF_TORCH = '''
import torch
from torch import nn


class Net(nn.Module):
    """Two layers of an MLP over tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 32)

    def forward(self, tokens, labels):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def model():
    tokens = torch.zeros(2, 16, dtype=torch.long)
    return Net(), {"tokens": tokens, "labels": tokens}
'''

STEPS = """
import json, sys
import shardwright as sw

assert not {frameworks!r} & set(sys.modules), "import shardwright imports a framework"
work = sw.Workload(global_batch=8, seq_len=16, precision="fp32")
plan = sw.plan("own_model:model", "h100-sxm:1x4", work, fix="tp=2,dp=2,pp=1", backend={backend!r})
plan.save("plan.json")
plan = sw.Plan.load("plan.json")
plan.emit({backend!r}, "out")
found = sw.verify(plan, backend={backend!r})
print(json.dumps({{"equal": found["equal"], "error": found.get("error"), "ranks": found["ranks"],
                  "worst": found["worst_gradient"]["relative_error"],
                  "missing": sorted({missing!r} & set(sys.modules))}}))
"""


def journey(folder: Path, model: str, backend: str, missing: tuple[str, ...]) -> dict[str, object]:
    """A plan from a model to a verdict, in a process without some packages; its ranks lack them
    too."""
    folder.mkdir(exist_ok=True)
    (folder / "own_model.py").write_text(model)
    # Python runs this at its start, in the process and in those that it starts
    (folder / "sitecustomize.py").write_text(WITHOUT.format(missing=missing))
    script = STEPS.format(frameworks={"torch", "jax"}, backend=backend, missing=set(missing))
    environment = os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment,
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    found: dict[str, object] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("model", "backend", "missing"),
    [(MODEL_OF_JAX, "jax", TORCH), (MODEL_OF_TORCH, "torch", JAX)],
    ids=["jax without torch", "torch without jax"],
)
def test_each_alone(model: str, backend: str, missing: tuple[str, ...], tmp_path: Path) -> None:
    found = journey(tmp_path, model, backend, missing)
    assert found["equal"] and found["error"] is None, found
    assert found["ranks"] == 4 and found["missing"] == []


def test_what_is_missing_is_missing(tmp_path: Path) -> None:
    """The finder works: otherwise the tests above would show nothing."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(missing=TORCH + JAX))
    script = (
        "import importlib.util as u\n"
        "for name in ('torch', 'jax', 'flax'):\n"
        "    assert u.find_spec(name) is None, name\n"
        "    try: __import__(name)\n"
        "    except ModuleNotFoundError: continue\n"
        "    raise SystemExit(name)\n"
        "import shardwright as sw\n"
        "try: sw.trace('own:model')\n"
        "except sw.InvalidInput as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True,
                         text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\n") == 1 and "own" in run.stdout
