"""Nothing fits: what is named as enough is, and what is less is not."""

from __future__ import annotations

import re

import pytest

import shardwright as sw
from shardwright.ir.from_dims import TransformerDims, transformer
from shardwright.ir.graph import Model
from shardwright.planner import Fix, Request, Search
from shardwright.planner.relax import _LENGTHS


@pytest.fixture(scope="module")
def model() -> Model:
    dims = TransformerDims(
        layers=16, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=32000, gated=True
    )
    return transformer(dims, name="llama")


def refusal(model: Model, where: str, work: sw.Workload, fix: str = "") -> str:
    with pytest.raises(sw.Infeasible) as caught:
        sw.plan(model, where, work, fix=fix)
    return str(caught.value)


def fits(model: Model, where: str, work: sw.Workload, fix: str = "", host: bool = False) -> bool:
    request = Request.on(model, sw.Cluster.parse(where), work, Fix.parse(fix))
    if host:
        object.__setattr__(request, "optimizer_on_host", True)
    return bool(Search(request).attempt(top=1).outcomes)


def test_the_length_that_fits_is_the_longest_told(model: Model) -> None:
    """Activations are too much: shorter sequences help, to a sixteenth of what was asked for."""
    asked = 65536
    fix = "tp=1,recompute=none"
    said = refusal(model, "a100-80g:1", sw.Workload(8, asked), fix)
    found = re.search(r"sequences of ([\d,]+) tokens would fit these nodes", said)
    assert found is not None, said
    length = int(found[1].replace(",", ""))
    step = asked // _LENGTHS
    assert length % step == 0
    assert fits(model, "a100-80g:1", sw.Workload(8, length), fix)
    assert not fits(model, "a100-80g:1", sw.Workload(8, length + step), fix)


def test_the_optimizer_on_the_host_is_told_where_it_helps(model: Model) -> None:
    work = sw.Workload(8, 2048)
    said = refusal(model, "a100-40g:1x1", work)
    assert "sequences of" not in said  # the state alone is too much
    found = re.search(r"optimizer's state in host memory \(([\d.]+) GiB per device\)", said)
    assert found is not None, said
    assert float(found[1]) == pytest.approx(12 * model.elements / 2**30, rel=0.01)
    assert fits(model, "a100-40g:1x1", work, host=True)
    hopeless = refusal(model, "v100-16g:1x1", work)
    assert "host memory" not in hopeless and not fits(model, "v100-16g:1x1", work, host=True)


def test_more_nodes_are_told_first(model: Model) -> None:
    said = refusal(model, "v100-16g:1x2", sw.Workload(64, 2048, precision="fp16"))
    found = re.search(r"smallest cluster that fits is (\d+) nodes of 2 devices", said)
    assert found is not None, said
    nodes = int(found[1])
    assert fits(model, f"v100-16g:{nodes}x2", sw.Workload(64, 2048, precision="fp16"))
    assert not fits(model, f"v100-16g:{nodes - 1}x2", sw.Workload(64, 2048, precision="fp16"))
    assert said.index("smallest cluster") < said.find("would fit these nodes", 0) or (
        "would fit these nodes" not in said
    )


def test_a_host_that_is_too_small_is_no_help(model: Model) -> None:
    base = sw.Cluster.preset("a100-40g", nodes=1, devices_per_node=1)
    small = base.device.model_copy(update={"host_memory_bytes": 2**30})
    with pytest.raises(sw.Infeasible) as caught:
        sw.plan(model, base.with_device(small), sw.Workload(8, 2048))
    assert "host memory" not in str(caught.value)


def test_islands_count_with_the_memory_they_have() -> None:
    """Named is the smallest number of nodes, though some of them have little memory."""
    base = sw.Cluster.preset("a100-80g", nodes=2, devices_per_node=1)
    parts = [{"name": "new", "nodes": 1}, {"name": "old", "nodes": 1, "device": "v100-16g"}]
    where = sw.Cluster(**{**base.model_dump(), "curves": (), "islands": parts})
    work = sw.Workload(64, 2048, precision="fp16")
    dims = TransformerDims(
        layers=28, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=32000, gated=True
    )
    model = transformer(dims, name="llama")
    with pytest.raises(sw.Infeasible) as caught:
        sw.plan(model, where, work)
    found = re.search(r"smallest cluster that fits is (\d+) nodes", str(caught.value))
    assert found is not None and "v100-16g has" in str(caught.value), caught.value
    nodes = int(found[1])
    assert sw.plan(model, where.resized(nodes), work, top=1).predicted.step_seconds > 0
    assert nodes > 3
    for fewer in range(3, nodes):
        with pytest.raises(sw.ShardwrightError):
            sw.plan(model, where.resized(fewer), work)
