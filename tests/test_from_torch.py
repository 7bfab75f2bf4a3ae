"""What a traced model looks like: segments, blocks, names, masks, initialisation; and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.ir import InvalidInput, UnsupportedOp
from shardwright.ir.from_torch import (
    load_model,
    preset_names,
    scale_config,
    trace,
    trace_loaded,
    trace_spec,
)  # fmt: skip
from shardwright.ir.graph import Model, Op

pytest.importorskip("transformers")

IDS = torch.zeros(2, 16, dtype=torch.long)

PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-2-7b": 6_738_415_616,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 174_604_259_328,
    "gemma-2-9b": 9_241_705_984,
    "qwen2-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_241_732_096,
}
MIXTURES = {"mixtral-8x7b": 46_702_792_704, "qwen3-30b-a3b": 30_532_122_624}


def ops(model: Model, block: str, kind: str) -> list[Op]:
    return [op for op in model.blocks[block].ops if op.kind == kind]


@pytest.fixture(scope="module")
def llama() -> Model:
    return trace_spec("llama-3.1-8b")


@pytest.mark.parametrize("name", [*PUBLISHED, *MIXTURES])
def test_presets_have_their_published_number_of_parameters(name: str) -> None:
    module = load_model(name).module
    assert sum(p.numel() for p in module.parameters()) == {**PUBLISHED, **MIXTURES}[name]
    assert all(p.is_meta for p in module.parameters())


def test_segments_of_a_deep_model(llama: Model) -> None:
    assert [(block, count) for block, _, count in llama.runs()] == [
        ("Embedding", 1), ("LlamaDecoderLayer", 32), ("Head", 1),
    ]  # fmt: skip
    assert llama.elements == PUBLISHED["llama-3.1-8b"]
    last = llama.segments[32]
    assert last.module == "model.layers.31"
    assert last.parameters[0] == "model.layers.31.self_attn.q_proj.weight"
    assert last.inputs == ("hidden_31", "cos", "sin") and last.outputs == ("hidden_32",)
    assert llama.segments[-1].inputs == ("hidden_32", "shifted_labels")
    assert llama.loss == ("loss_sum", "loss_count")
    assert set(llama.preamble.outputs) == {"cos", "sin", "shifted_labels"}


def test_a_layer_is_lifted_to_ops_of_the_table(llama: Model) -> None:
    kinds = [op.kind for op in llama.blocks["LlamaDecoderLayer"].ops]
    assert kinds == [
        "rms_norm", "linear", "reshape", "permute", "linear", "reshape", "permute", "linear",
        "reshape", "permute", "rotary", "rotary", "attention", "permute", "reshape", "linear",
        "add", "rms_norm", "linear", "silu", "linear", "mul", "linear", "add",
    ]  # fmt: skip
    (attention,) = ops(llama, "LlamaDecoderLayer", "attention")
    assert attention.name == "self_attn.attention" and attention.sizes["k"] == 8
    assert dict(attention.attributes) == dict(
        causal=True, window=None, scale=128**-0.5, softcap=None, dropout=0.0
    )
    values = llama.blocks["LlamaDecoderLayer"].values
    assert values["q_proj"].dims == (("b",), ("s",), (8, 4, 128))
    assert values["cos"].grad is False and values["q_proj"].grad
    head = llama.blocks["Head"].values
    assert head["lm_head"].dtype == "model" and head["lm_head_cast"].dtype == "wide"
    assert head["loss_sum"].grad and not head["loss_count"].grad


def test_names_are_those_of_the_small_model(llama: Model) -> None:
    small = trace_loaded(load_model(llama.source, small=True, tp=2, layers=3))
    assert len(small.segments) == 5
    for block, graph in llama.blocks.items():
        assert [op.name for op in graph.ops] == [op.name for op in small.blocks[block].ops]
        assert list(graph.values) == list(small.blocks[block].values)


def test_source_is_json_and_gives_the_same_model(llama: Model) -> None:
    source = json.loads(json.dumps(dict(llama.source)))
    assert trace_spec(source) == llama


def test_gpt2_ties_splits_and_approximates() -> None:
    model = trace_loaded(load_model("gpt2", small=True))
    assert "lm_head.weight" not in model.parameters
    assert "transformer.wte.weight" in model.segments[0].parameters
    assert "transformer.wte.weight" in model.segments[-1].parameters
    (chunk,) = ops(model, "GPT2Block", "chunk")
    assert chunk.attributes["count"] == 3
    (gelu,) = ops(model, "GPT2Block", "gelu")
    assert gelu.attributes["approximate"] == "tanh"
    (attention,) = ops(model, "GPT2Block", "attention")
    assert attention.attributes["dropout"] == 0.1  # a model is traced for training
    bias = model.blocks["GPT2Block"].values["attn.c_attn.bias"]
    assert bias.dims == ((3, *model.blocks["GPT2Block"].values["attention"].dims[1], 8),)


def test_gemma2_has_two_kinds_of_layers() -> None:
    model = trace_spec("gemma-2-9b")
    runs = [block for block, _, _ in model.runs()][1:-1]
    assert runs == ["Gemma2DecoderLayer", "Gemma2DecoderLayer2"] * 21
    windows = [
        op.attributes["window"] for b in runs[:2] for op in ops(model, b, "attention")
    ]  # fmt: skip
    assert windows == [4096, None]
    norm = ops(model, runs[0], "rms_norm")[0]
    assert norm.attributes["offset"] == 1.0 and norm.attributes["wide_weight"] is True
    (scale,) = ops(model, "Embedding", "scale")
    assert scale.attributes["factor"] == pytest.approx(3584**0.5)


def test_initialisation_is_the_models_own() -> None:
    gpt2 = trace_spec("gpt2").parameters
    assert gpt2["transformer.h.7.attn.c_attn.weight"].init.value == 0.02
    assert gpt2["transformer.h.7.attn.c_proj.weight"].init.value == pytest.approx(0.02 / 24**0.5)
    assert gpt2["transformer.h.7.ln_1.weight"].init.value == 1.0
    assert gpt2["transformer.h.7.mlp.c_fc.bias"].init.kind == "constant"
    gemma = trace_loaded(load_model("gemma-2-9b", small=True)).parameters
    assert gemma["model.layers.0.input_layernorm.weight"].init.value == 0.0


class Block(nn.Module):
    def __init__(self, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))


class Net(nn.Module):
    """A plain transformer whose mask the tests choose."""

    def __init__(self, depth: int = 4, mask: Any = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(32, 64)
        self.mask = mask

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        mask = None if self.mask is None else self.mask(ids, attention_mask)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def attention_of(net: nn.Module, *inputs: Tensor) -> tuple[Op, Model]:
    model = trace(net, [*inputs, IDS.clone()], loss=ce)
    return ops(model, "Block", "attention")[0], model


def band(ids: Tensor, window: int) -> Tensor:
    at = torch.arange(ids.shape[1], device=ids.device)
    behind = at[:, None] - at[None, :]
    return (behind >= 0) & (behind < window)


@pytest.mark.parametrize(
    ("mask", "causal", "window"),
    [
        (lambda ids, _: band(ids, 10**6).float().log(), True, 10**6),
        (lambda ids, _: band(ids, 4096), True, 4096),
        (lambda ids, _: band(ids, 3)[None, None], True, 3),
        (lambda ids, _: torch.ones(ids.shape[1], ids.shape[1]).tril().bool(), True, None),
        (lambda ids, _: torch.ones(ids.shape[1], ids.shape[1]).triu(1) * -1e9, True, None),
        (lambda ids, _: torch.ones(ids.shape[1], ids.shape[1]).bool(), False, None),
    ],
)
def test_masks_are_recognised_by_value(mask: Any, causal: bool, window: int | None) -> None:
    attention, model = attention_of(Net(mask=mask), IDS)
    assert (attention.attributes["causal"], attention.attributes["window"]) == (causal, window)
    assert model.preamble.ops == ()


def test_a_padding_mask_becomes_an_operand() -> None:
    def padded(ids: Tensor, keys: Tensor | None) -> Tensor:
        assert keys is not None
        return band(ids, 10**6) & keys.bool()[:, None, None, :]

    attention, model = attention_of(Net(mask=padded), IDS, torch.ones_like(IDS))
    assert len(attention.operands) == 4 and attention.attributes["causal"]
    assert [v.name for v in model.inputs] == ["ids", "attention_mask", "labels"]
    assert model.preamble.values[model.preamble.outputs[0]].dtype == "bool"


@pytest.mark.parametrize(
    "mask",
    [
        lambda ids, _: ids[:, None, :, None] >= ids[:, None, None, :],  # of the tokens
        lambda ids, _: band(ids, 10**6) * 0.1,  # a bias
        lambda ids, _: band(ids, 10**6).roll(1, 0),
        lambda ids, _: ~band(ids, 3) | torch.eye(ids.shape[1], dtype=torch.bool),
    ],
)
def test_other_masks_are_refused(mask: Any) -> None:
    with pytest.raises(UnsupportedOp, match=r"attention at layers\.0: .*supported are causal"):
        attention_of(Net(mask=mask), IDS)


def test_a_repeated_module_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    model = trace(Net(depth=50), [IDS, IDS.clone()], loss=ce)
    assert len(calls) == 2 and len(model.segments) == 52
    assert "layers.49.qkv.weight" in model.parameters


class Uneven(Net):
    """The third layer is looked up by its number."""

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x) * (i + 1.0)
        return self.head(x)


class Looping(Net):
    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(ids)
        for i in range(5):
            x = self.layers[i](x)
        return self.head(x)


def test_layers_that_are_not_alike_are_traced_in_full() -> None:
    assert len(trace(Looping(depth=5), [IDS, IDS.clone()], loss=ce).segments) == 7
    model = trace(Uneven(depth=5), [IDS, IDS.clone()], loss=ce)
    factors = [
        op.attributes["factor"]
        for s in model.segments
        for op in model.blocks[s.block].ops
        if op.kind == "scale"
    ]
    assert factors[-4:] == [2.0, 3.0, 4.0, 5.0]


def test_the_users_module_is_not_changed() -> None:
    net = Net()
    before = {n: p.clone() for n, p in net.named_parameters()}
    trace(net, [IDS, IDS.clone()], loss=ce)
    after = dict(net.named_parameters())
    assert len(net.layers) == 4 and net.training
    assert all(torch.equal(before[n], after[n]) and after[n].device.type == "cpu" for n in before)
    assert not net.layers[0]._forward_hooks and not net.layers[0]._forward_pre_hooks


def test_frozen_parameters_carry_no_gradient() -> None:
    net = Net()
    net.embed.requires_grad_(False)
    model = trace(net, [IDS, IDS.clone()], loss=ce)
    assert not model.parameters["embed.weight"].trainable
    values = model.blocks["Embedding"].values
    assert not values["embed"].grad and not values["embed.weight"].grad
    assert model.parameters["head.weight"].trainable


def test_measured_initialisation_of_a_plain_module() -> None:
    net = Net()
    nn.init.normal_(net.head.weight, std=0.3)
    found = trace(net, [IDS, IDS.clone()], loss=ce).parameters
    assert found["head.weight"].init.value == pytest.approx(0.3, rel=0.1)
    assert found["layers.2.out.weight"].init.kind == "uniform"
    assert found["layers.2.out.weight"].init.value == pytest.approx(32**-0.5)
    assert found["embed.weight"].init.kind == "normal"


def mlp() -> tuple[nn.Module, tuple[Tensor, Tensor], Any]:
    """A model as a command line names it: `test_from_torch:mlp`."""
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    return net, (torch.zeros(3, 8), torch.zeros(3, 4)), F.mse_loss


def test_a_callable_is_built_without_memory_and_with_values() -> None:
    loaded = load_model("test_from_torch:mlp")
    assert next(loaded.module.parameters()).is_meta
    model = trace_loaded(loaded)
    assert model.parameters["0.weight"].init.value == pytest.approx(8**-0.5)
    assert model.source == {"callable": "test_from_torch:mlp"}
    assert not next(load_model(model.source, small=True).module.parameters()).is_meta
    assert not next(loaded.build_real(torch.float64).parameters()).is_meta


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-8b", "gemma-7b", "gpt2", "mistral-7b"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_scaled_config_keeps_the_structure(name: str, tp: int) -> None:
    config = load_model(name).module.config
    small = scale_config(config, tp, 3)
    assert small.num_hidden_layers == 3 and small.num_attention_heads % tp == 0
    for flag in ("tie_word_embeddings", "attention_bias", "model_type"):
        assert getattr(small, flag, None) == getattr(config, flag, None)
    for size in ("hidden_size", "vocab_size"):
        assert getattr(small, size) % max(tp, 2) == 0 and getattr(small, size) < 1000
    if name != "gpt2":
        grouped = config.num_key_value_heads < config.num_attention_heads
        assert (small.num_key_value_heads < small.num_attention_heads) == grouped


class Sorting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).sort(-1).values.mean()


class Branching(Sorting):
    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y.mean() if y.sum() > 0 else y.sum()


class FixedBatch(Sorting):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).view(4, 8).mean()


class InPlace(Sorting):
    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        y[:, 0] += 1
        return y.mean()


class Overlapping(Sorting):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(self.inner(x)[..., None].expand(-1, -1, 9)).mean()


X = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("model", "inputs", "kind", "message"),
    [
        (Sorting, [X], UnsupportedOp, "op sort at the top level.*ir/optable.py"),
        (Overlapping, [X], UnsupportedOp, "op conv1d at convolution.*no rule"),
        (Branching, [X], InvalidInput, "Branching cannot be traced: its control flow depends"),
        (FixedBatch, [X], InvalidInput, "batch"),
        (InPlace, [X], UnsupportedOp, "in place"),
        (lambda: nn.Linear(8, 8), [X], InvalidInput, "give loss="),
        (lambda: nn.Linear(8, 8), [X, X], InvalidInput, "example_inputs: 2 given"),
        (Sorting, [], InvalidInput, "none given"),
        (Sorting, ["text"], InvalidInput, "expected a tensor"),
    ],
)
def test_bad_modules_get_one_line(model: Any, inputs: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        trace(model(), inputs)
    assert "\n" not in str(error.value)


def test_a_loss_of_another_form_says_what_is_supported() -> None:
    with pytest.raises(UnsupportedOp, match=r"the loss ends in exp.*cross_entropy"):
        trace(nn.Linear(8, 8), [X, X.clone()], loss=lambda out, y: (out - y).mean().exp())


def test_bad_specifications_get_one_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"llama-3\.1-8b"):
        load_model("llama-3.1-8")
    with pytest.raises(InvalidInput, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(InvalidInput, match="has no architecture 'no-such-thing'"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidInput, match="model config"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InvalidInput, match="no causal language model head"):
        load_model(tmp_path)
    with pytest.raises(InvalidInput, match="no_such_module"):
        load_model("no_such_module:build")
    with pytest.raises(InvalidInput, match="expected a torch module"):
        load_model("json:JSONDecoder")
    assert {"llama-3.1-405b", "deepseek-v3", "mixtral-8x7b"} <= set(preset_names())


def test_mixtures_of_experts_are_named_as_unsupported() -> None:
    loaded = load_model("mixtral-8x7b", small=True)
    with pytest.raises(UnsupportedOp, match=r"model\.layers\.0\.mlp"):
        trace_loaded(loaded)
