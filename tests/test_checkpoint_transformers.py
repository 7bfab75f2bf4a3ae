"""Checkpoints of transformers' models: what they compute before and after conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwright.checkpoint import convert
from shardwright.ir import CorruptCheckpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
dcp = pytest.importorskip("torch.distributed.checkpoint")

TOKENS = torch.arange(12)[None]


def stepped(config: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A model after one step of AdamW, and its weights and optimizer states as torch saves them."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    return model, *get_state_dict(model, optimizer)


def test_transformers_computes_the_same_logits(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours", "universal")
    convert(
        tmp_path / "ours", tmp_path / "back", "safetensors", config=tmp_path / "hf",
        flags={"shard_bytes": 20_000}, verify=True,
    )  # fmt: skip
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_in_one_array_go_to_arrays_of_their_own_and_back(tmp_path: Path, name: str) -> None:
    """As transformers holds them in memory, and as it saves them; moments lie as weights do."""
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    config = (
        transformers.MixtralConfig(**sizes, num_local_experts=4)
        if name == "mixtral"
        else transformers.Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=24)
    )
    model, weights, states = stepped(config)
    held = {"model": weights, "optim": states}
    dcp.save(held, checkpoint_id=tmp_path / "fused", no_dist=True)
    config.save_pretrained(tmp_path / "config")
    convert(
        tmp_path / "fused", tmp_path / "megatron", "megatron", mesh={"tp": 2, "ep": 2},
        config=tmp_path / "config", verify=True,
    )  # fmt: skip
    convert(
        tmp_path / "megatron", tmp_path / "hf", "safetensors", config=tmp_path / "config",
        states=["weight"], verify=True,
    )  # fmt: skip
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS).logits, again(TOKENS).logits)

    spec = f"transformers-{name}"
    convert(tmp_path / "megatron", tmp_path / "back", "dcp", target_spec=spec, verify=True)
    back = _zeros_like(held)
    dcp.load(back, checkpoint_id=tmp_path / "back", no_dist=True)
    for key, tensor in held["model"].items():
        assert torch.equal(back["model"][key], tensor), key
    for key, state in held["optim"]["state"].items():
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(back["optim"]["state"][key][moment], state[moment]), (key, moment)


def _zeros_like(held: dict[str, Any]) -> dict[str, Any]:
    """A state dict of the same structure with nothing of the tensors in it."""
    found: dict[str, Any] = {}
    for key, value in held.items():
        if isinstance(value, dict):
            found[key] = _zeros_like(value)
        else:
            found[key] = value.clone().zero_() if hasattr(value, "clone") else value
    return found


@pytest.mark.parametrize("to", ["megatron", "megatron-dist"])
def test_a_tied_head_that_torch_holds_twice_goes_where_it_is_stored_once(
    tmp_path: Path, to: str
) -> None:
    """`get_state_dict` has the head under a name of its own, without optimizer state."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, tie_word_embeddings=True,
    )  # fmt: skip
    model, weights, states = stepped(config)
    assert "lm_head.weight" in weights
    dcp.save({"model": weights, "optim": states}, checkpoint_id=tmp_path / "twice", no_dist=True)
    config.save_pretrained(tmp_path / "twice")
    convert(tmp_path / "twice", tmp_path / "once", to, mesh={"tp": 2, "pp": 2}, verify=True)
    convert(tmp_path / "once", tmp_path / "back", "dcp", verify=True)
    convert(tmp_path / "back", tmp_path / "hf", "safetensors", states=["weight"], verify=True)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS).logits, again(TOKENS).logits)

    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    dcp.save({"model": weights, "optim": states}, checkpoint_id=tmp_path / "apart", no_dist=True)
    config.save_pretrained(tmp_path / "apart")
    with pytest.raises(CorruptCheckpoint, match="embed_tokens"):
        convert(tmp_path / "apart", tmp_path / "none", to)
