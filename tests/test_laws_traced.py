"""The law of ops on the graphs that the tracer makes of real models: their rules, as refined by
their neighbours, with the attributes and gradient flags that tracing gave them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from op_cases import DATA, Case, Draw
from simulated import int_sizes, shape_of
from test_laws import check_all

from shardwright.ir import Graph, Mesh, Model
from shardwright.ir.from_torch import trace
from shardwright.ir.graph import bind

transformers = pytest.importorskip("transformers")

BINDING = {"b": 4, "s": 4}
GROUPED = dict(hidden_size=16, intermediate_size=12, num_key_value_heads=2)
CONFIGS = {
    "llama": ("LlamaConfig", GROUPED),
    "gemma2": ("Gemma2Config", GROUPED | dict(head_dim=4)),
    "gpt2": ("GPT2Config", dict(n_embd=16, n_layer=2, n_head=4, n_positions=8)),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Model:
    kind, sizes = CONFIGS[request.param]
    shared = dict(num_hidden_layers=2, num_attention_heads=4) if kind != "GPT2Config" else {}
    config = getattr(transformers, kind)(
        vocab_size=24, bos_token_id=1, eos_token_id=2, pad_token_id=0, **shared, **sizes
    )
    config.use_cache = False
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 24, (2, 5))
    return trace(module, {"input_ids": ids, "labels": ids})


def cases_of(graph: Graph) -> Iterator[Case]:
    """Every op, with its symbols bound and random operands."""
    values = {
        name: replace(value, dims=int_sizes(value.dims, BINDING))
        for name, value in graph.values.items()
    }
    for op in graph.ops:
        sizes = {factor: bind(size, BINDING) for factor, size in op.sizes.items()}
        shapes = [shape_of(int_sizes(values[name].dims, {})) for name in op.operands]
        operands = []
        for k, (name, shape) in enumerate(zip(op.operands, shapes, strict=True)):
            made = DATA.get((op.kind, k))
            if made:
                x = made(Draw(None, 2), shape, shapes[0])
            elif values[name].dtype in ("int64", "int32"):
                x = torch.randint(0, 9, shape)
            else:
                x = torch.randn(shape)
            operands.append(x.double() if x.is_floating_point() else x)
        yield Case(replace(op, sizes=sizes), values, tuple(operands))


def test_traced_ops(model: Model) -> None:
    torch.manual_seed(0)
    seen, split = set(), 0
    for graph in (model.preamble, *model.blocks.values()):
        for case in cases_of(graph):
            if (key := (case.op.kind, str(case.op.rule), str(case))) not in seen:
                seen.add(key)
                split += check_all(case, Mesh.of(a=2))
    assert split > 60
