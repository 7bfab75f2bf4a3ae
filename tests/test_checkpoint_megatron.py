"""Megatron's formats against megatron-core itself: what it wrote equals what it loads from ours."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ranks_on_cpu

from shardwright.checkpoint.conversion import convert

megatron = partial(ranks_on_cpu.start, Path(__file__).with_name("megatron_worker.py"))
VOCABULARY = 90
SIZES = {
    "llama": {"num_query_groups": 2, "kv_channels": 8},
    "moe": {"num_query_groups": 2, "kv_channels": 8},
    "gpt2": {"num_attention_heads": 8},
}

pytest.importorskip("megatron.core", reason="megatron-core is not installed (extra oracles)")


def dumps(folder: Path) -> dict[tuple[int, ...], dict[str, np.ndarray]]:
    found = {}
    for path in folder.glob("*.npz"):
        values = dict(np.load(path))
        found[tuple(values.pop("place").tolist())] = values
    return found


def same(one: Path, other: Path) -> None:
    """Every rank loaded the same weights, optimizer state, steps and logits."""
    left, right = dumps(one), dumps(other)
    assert left.keys() == right.keys() and left
    for place, values in left.items():
        assert values.keys() == right[place].keys()
        for name, value in values.items():
            own, expected = (_unpadded(name, v, place[0]) for v in (value, right[place][name]))
            np.testing.assert_array_equal(own, expected, err_msg=f"{place} {name}")


def _unpadded(name: str, value: np.ndarray, tp: int) -> np.ndarray:
    """Without the rows that pad the vocabulary: Megatron's are random, ours are zero."""
    if name == "logits":
        return value[..., :VOCABULARY]
    if name.startswith("step") or not ("word_embeddings" in name or "output_layer" in name):
        return value
    rows = value.reshape(-1, 64)
    return rows[: max(0, VOCABULARY - tp * len(rows))]


def sizes(family: str, **more: object) -> dict[str, object]:
    return {
        **SIZES[family], "vocab_size": VOCABULARY, "make_vocab_size_divisible_by": 16,
        "transformer_impl": "local", "tie_word_embeddings": family == "gpt2", **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What megatron writes of each family, in both formats."""
    found = {}
    for family, ranks, mesh in (
        ("llama", 4, ["--tp", "2", "--pp", "2"]),
        ("moe", 2, ["--ep", "2"]),
        ("gpt2", 4, ["--tp", "2", "--pp", "2", "--tied"]),
    ):
        at = tmp_path_factory.mktemp(family)
        megatron(ranks, "--family", family, "--vocab", VOCABULARY, *mesh,
                 "--save-dist", at / "dist", "--save-legacy", at / "legacy")  # fmt: skip
        found[family] = at
    return found


CASES = {
    "dist to legacy, tp2·pp2 to pp4": ("llama", "dist", "megatron", {"tp": 1, "pp": 4}),
    "legacy to dist, tp2·pp2 to tp1": ("llama", "legacy", "megatron-dist", {"tp": 1}),
    "legacy to legacy, to tp4": ("llama", "legacy", "megatron", {"tp": 4, "pp": 1}),
    "legacy to legacy, to virtual stages": (
        "llama", "legacy", "megatron", {"tp": 1, "pp": 2, "vpp": 2},
    ),
    "experts, legacy to dist": ("moe", "legacy", "megatron-dist", {"ep": 4}),
    "experts, dist to legacy of four ranks": ("moe", "dist", "megatron", {"ep": 4}),
    "tied gpt2, legacy to dist": ("gpt2", "legacy", "megatron-dist", {"tp": 2}),
    "tied gpt2, dist to legacy": ("gpt2", "dist", "megatron", {"tp": 1, "pp": 4}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_megatron_loads_what_it_would_have_loaded(case, written, tmp_path) -> None:
    family, source, to, mesh = CASES[case]
    at = written[family]
    made = convert(
        at / source, tmp_path / "made", to, mesh=mesh, sizes=sizes(family), verify=True,
        source_format="megatron" if source == "legacy" else "megatron-dist",
    )  # fmt: skip
    assert made.verified
    ranks = mesh.get("tp", 1) * mesh.get("pp", 1) * mesh.get("ep", 1)
    run = ["--family", family, "--vocab", VOCABULARY, *(["--tied"] if family == "gpt2" else [])]
    for axis, size in mesh.items():
        run += [f"--{axis}", size]
    load = "--load-legacy" if to == "megatron" else "--load-dist"
    megatron(ranks, *run, load, tmp_path / "made", "--dump", tmp_path / "ours")
    megatron(ranks, *run, "--load-dist", at / "dist", "--dump", tmp_path / "theirs")
    same(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.slow
def test_transformers_computes_what_megatron_computes(written, tmp_path) -> None:
    """The logits of megatron's GPTModel, from its own checkpoint through Hugging Face's Llama; and
    back into Megatron bit by bit, optimizer and all."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    at = written["llama"] / "legacy"
    assert convert(at, tmp_path / "hf", "safetensors", verify=True).verified
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=10000.0,
        tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(load_file(tmp_path / "hf" / "model.safetensors"), strict=True)
    with torch.no_grad():
        logits = model(torch.arange(12)[None] % VOCABULARY).logits.numpy()
    run = ["--vocab", VOCABULARY]
    megatron(1, *run, "--load-dist", written["llama"] / "dist", "--dump", tmp_path / "theirs")
    expected = _unpadded("logits", dumps(tmp_path / "theirs")[0, 0, 0, 0]["logits"], 0)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, atol=2e-6)
    convert(tmp_path / "hf", tmp_path / "back", "megatron-dist", sizes=sizes("llama"), verify=True)
    megatron(1, *run, "--load-dist", tmp_path / "back", "--dump", tmp_path / "ours")
    same(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("over", "mesh"),
    [("dcp", {"dp": 2}), ("universal", {}), ("deepspeed", {"dp": 2}), ("orbax", {})],
)
def test_over_other_formats_and_back(over, mesh, written, tmp_path) -> None:
    """Three hops: Megatron, another format with the optimizer's state, Megatron on another mesh;
    the second equals the direct conversion."""
    at = written["llama"] / "legacy"
    run = {"mesh": {"tp": 1, "pp": 2}, "sizes": sizes("llama")}
    convert(at, tmp_path / "direct", "megatron", **run)
    convert(at, tmp_path / "over", over, mesh=mesh, verify=True)
    convert(tmp_path / "over", tmp_path / "back", "megatron", verify=True, **run)
    for state in ("hf_direct", "hf_back"):
        convert(tmp_path / state.removeprefix("hf_"), tmp_path / state, "safetensors")
    files = sorted(path.name for path in (tmp_path / "hf_direct").glob("*.safetensors"))
    assert files == sorted(path.name for path in (tmp_path / "hf_back").glob("*.safetensors"))
    assert "exp_avg_sq.safetensors" in files
    for name in files:
        one = (tmp_path / "hf_direct" / name).read_bytes()
        assert one == (tmp_path / "hf_back" / name).read_bytes(), name
