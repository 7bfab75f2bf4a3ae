"""Megatron's formats against megatron-core itself: what it wrote equals what it loads from ours.

One run of megatron writes a model in all formats; another loads all that was made of them, on
another mesh, beside what it loads of its own. Conversions are verified, and every tensor of
weights, master weights and moments is compared, on every rank.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks_on_cpu

from shardwright.checkpoint.conversion import convert
from shardwright.ir import CorruptCheckpoint

WORKER = Path(__file__).with_name("megatron_worker.py")
VOCABULARY = 90
FORMATS = {
    "dist": "megatron-dist", "flat": "megatron-dist", "legacy": "megatron",
    "numbered": "megatron-dist", "single": "megatron-dist",
}  # fmt: skip
EVERY = ("dist", "flat", "legacy")
MORE = {"tied gpt2": "numbered", "moe": "single"}
"""What megatron_worker.py calls them: every model is written in three, some in one more."""

pytest.importorskip("megatron.core", reason="megatron-core is not installed (extra oracles)")

MODELS: dict[str, tuple[int, list[str]]] = {
    "llama": (4, ["--tp", "2", "--pp", "2"]),
    "interleaved": (2, ["--pp", "2", "--vpp", "2"]),
    "qwen2": (2, ["--family", "qwen2", "--tp", "2"]),
    "qwen3": (4, ["--family", "qwen3", "--tp", "2", "--dtype", "bfloat16", "--bucket", "20000"]),
    "gemma": (4, ["--family", "gemma", "--pp", "2", "--tied", "--dtype", "bfloat16"]),
    "moe": (2, ["--family", "moe", "--ep", "2"]),
    "grouped": (4, ["--family", "moe", "--tp", "2", "--ep", "2", "--grouped"]),
    "gpt2": (2, ["--family", "gpt2", "--tp", "2"]),
    "glm": (4, ["--family", "glm", "--pp", "2", "--ep", "2"]),
    "deepseek": (4, ["--family", "deepseek", "--tp", "2", "--ep", "2", "--etp", "1"]),
    "tied gpt2": (4, ["--family", "gpt2", "--tp", "2", "--pp", "2", "--tied"]),
}
"""Ranks and arguments of the run that writes each; ranks beyond its mesh are data-parallel."""


def megatron(ranks: int, *arguments: str | int | Path) -> None:
    """Starts ranks of the worker."""
    ranks_on_cpu.start(WORKER, ranks, "--vocab", VOCABULARY, *arguments)


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
            np.testing.assert_array_equal(value, right[place][name], err_msg=f"{place} {name}")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What megatron writes of a model in all formats, and (`own`) what it has in memory then."""
    found: dict[str, Path] = {}

    def write(model: str) -> Path:
        if model not in found:
            at = found[model] = tmp_path_factory.mktemp(model.replace(" ", "-"))
            ranks, arguments = MODELS[model]
            kinds = [*EVERY, *([MORE[model]] if model in MORE else [])]
            saves = [part for kind in kinds for part in ("--save", kind, at / kind)]
            megatron(ranks, *arguments, *saves, "--dump", at / "own")
        return found[model]

    return write


Made = tuple[str, str, dict[str, Any]]
"""(what is read, what is written, what `convert` is told besides)."""


def loaded(
    at: Path, ranks: int, arguments: Sequence[str], made: Sequence[Made], theirs: str, to: Path
) -> None:
    """Converts, and has one run of megatron load all of it and its own (`theirs`, a kind; where it
    is empty, what was made in several ways is compared with each other)."""
    loads: list[str | Path] = ["--load", theirs, at / theirs, to / "theirs"] if theirs else []
    for number, (source, target, more) in enumerate(made):
        into = to / f"{number}-{target}"
        options = {"source_format": FORMATS.get(source, ""), **more}
        assert convert(at / source, into, FORMATS[target], verify=True, **options).verified
        loads += ["--load", target, into, to / f"ours-{number}"]
    megatron(ranks, *arguments, *loads)
    for number, _ in enumerate(made):
        same(to / f"ours-{number}", to / ("theirs" if theirs else "ours-0"))


def options_of(model: str) -> list[str]:
    """What says which model it is, without its mesh."""
    _, said = MODELS[model]
    kept, meshes = [], ("--tp", "--pp", "--ep", "--vpp", "--etp", "--bucket")
    for word in said:
        if word.startswith("--") or not kept or kept[-1] not in meshes:
            kept.append(word)
        else:
            kept.pop()
    return [word for word in kept if word not in meshes]


CASES: dict[str, tuple[str, int, list[str], str, list[Made]]] = {
    "to four stages": ("llama", 4, ["--pp", "4"], "dist", [
        ("dist", "legacy", {"mesh": {"pp": 4}}),
        ("flat", "legacy", {"mesh": {"pp": 4}}),
        ("legacy", "dist", {"mesh": {"pp": 4}}),
        ("flat", "dist", {"mesh": {"tp": 2}}),
    ]),
    "to virtual stages": ("llama", 2, ["--pp", "2", "--vpp", "2"], "dist", [
        ("legacy", "legacy", {"mesh": {"pp": 2, "vpp": 2}}),
        ("flat", "legacy", {"mesh": {"pp": 2, "vpp": 2}}),
    ]),
    "of virtual stages": ("interleaved", 2, ["--tp", "2"], "dist", [
        ("legacy", "dist", {}), ("flat", "legacy", {"mesh": {"tp": 2}}),
    ]),
    "bf16 in buckets over two data-parallel ranks": (
        "qwen3", 4, ["--tp", "2", "--bucket", "20000"], "flat", [
            ("flat", "legacy", {"mesh": {"tp": 2}, "flags": {"bucket_elements": 20000}}),
            ("legacy", "dist", {"mesh": {"tp": 2}}),
            ("flat", "dist", {}),
    ]),
    "bf16, tied, to two stages and two data-parallel ranks": (
        "gemma", 4, ["--pp", "2"], "dist", [
            ("flat", "legacy", {"mesh": {"pp": 2}}),
            ("dist", "legacy", {"mesh": {"pp": 2}}),
            ("legacy", "dist", {"mesh": {"pp": 2}}),
    ]),
    "experts to four ranks": ("moe", 4, ["--ep", "4"], "dist", [
        ("dist", "legacy", {"mesh": {"ep": 4}}),
        ("flat", "legacy", {"mesh": {"ep": 4}}),
        ("single", "legacy", {"mesh": {"ep": 4}}),
        ("legacy", "dist", {"mesh": {"ep": 4}}),
    ]),
    "dense and mixed layers, shared experts, to other ranks": ("glm", 4, ["--tp", "2", "--ep", "2"],
        "dist", [
            ("dist", "legacy", {"mesh": {"tp": 2, "ep": 2}}),
            ("flat", "legacy", {"mesh": {"tp": 2, "ep": 2}}),
            ("legacy", "dist", {"mesh": {"tp": 2, "ep": 2}}),
    ]),
    "tied gpt2 to four stages": ("tied gpt2", 4, ["--pp", "4"], "dist", [
        ("legacy", "dist", {"mesh": {"tp": 2}}),
        ("dist", "legacy", {"mesh": {"pp": 4}}),
        ("flat", "legacy", {"mesh": {"pp": 4}}),
        ("numbered", "legacy", {"mesh": {"pp": 4}}),
    ]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_megatron_loads_what_it_would_have_loaded(case, written, tmp_path) -> None:
    model, ranks, mesh, theirs, made = CASES[case]
    loaded(written(model), ranks, [*options_of(model), *mesh], made, theirs, tmp_path)


LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "tie_word_embeddings": False,
}  # fmt: skip
MIXTURE = {
    **LLAMA, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 16}),
    "gemma": (
        "Gemma",
        {**LLAMA, "head_dim": 8, "hidden_activation": "gelu", "tie_word_embeddings": True},
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_head": 8, "n_layer": 4, "n_inner": 96,
         "n_positions": 32, "activation_function": "gelu", "layer_norm_epsilon": 1e-6,
         "tie_word_embeddings": False},
    ),
    "moe": ("Mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm": ("Glm4Moe", {**MIXTURE, "partial_rotary_factor": 1.0, "attention_bias": True}),
    "deepseek": (
        "DeepseekV3",
        {**MIXTURE, "num_key_value_heads": 8, "q_lora_rank": 24, "kv_lora_rank": 32,
         "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model", ARCHITECTURES)
def test_transformers_computes_what_megatron_computes(model, written, tmp_path) -> None:
    """Megatron's checkpoint over Hugging Face's files and back, optimizer and all: both compute the
    same logits, and one rank of megatron has what it has of its own files."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    at = written(model)
    said: dict[str, Any] = {"dtype": "F32", "verify": True}
    assert convert(at / "legacy", tmp_path / "hf", "safetensors", **said).verified
    name, sizes = ARCHITECTURES[model]
    config = getattr(transformers, f"{name}Config")(**sizes)
    if name == "Glm4Moe":
        config.rope_parameters["partial_rotary_factor"] = 1.0
    config.save_pretrained(tmp_path / "hf")
    kind = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    made, loading = kind.from_pretrained(
        tmp_path / "hf", attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        logits = made.eval()(torch.arange(12)[None] % VOCABULARY).logits.numpy()

    # Megatron loads its own neither in another precision nor with experts on fewer ranks.
    theirs = "dist" if model in ("llama", "qwen2", "gpt2") else ""
    sources: list[Made] = [
        (str(tmp_path / "hf"), "dist", {"sizes": LOCAL}),
        ("legacy", "legacy", {"dtype": "F32"}),
        ("flat", "legacy", {"dtype": "F32"}),
    ]
    options = [word for word in options_of(model) if word not in ("--dtype", "bfloat16")]
    loaded(at, 1, options, sources, theirs, tmp_path)
    expected = dumps(tmp_path / "ours-0")[0, 0, 0, 0]["logits"]
    largest = np.abs(expected).max()
    assert largest > 0.1
    np.testing.assert_allclose(logits, expected, atol=4e-6 * largest)


LOCAL = {"transformer_impl": "local", "make_vocab_size_divisible_by": 16, "vocab_size": VOCABULARY}
"""What files of Hugging Face do not say."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("over", "mesh"),
    [("dcp", {"dp": 2}), ("universal", {}), ("deepspeed", {"dp": 2}), ("orbax", {})],
)
def test_over_other_formats_and_back(over, mesh, written, tmp_path) -> None:
    """Three hops: Megatron, another format with the optimizer's state, Megatron on another mesh;
    the second equals the direct conversion."""
    at = written("llama") / "legacy"
    run = {"mesh": {"tp": 1, "pp": 2}, "sizes": {**LOCAL, "num_query_groups": 2, "kv_channels": 8}}
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


# ------------------------------------------------- older files, and files in the wrong folder

OLD = {
    "self_attention.linear_qkv": "attention.query_key_value",
    "self_attention.linear_proj": "attention.dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}
"""Core's names, and those of the modules of Megatron-LM 2."""


def rewritten(at: Path, to: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A legacy checkpoint's weights with every file changed."""
    import torch

    shutil.copytree(at, to)
    for path in to.rglob("model_optim_rng.pt"):
        (path.parent / "distrib_optim.pt").unlink(missing_ok=True)
        torch.save(change(torch.load(path, weights_only=False)), path)
    return to


def same_files(one: Path, other: Path, to: Path, states: Sequence[str] = ("weight",)) -> None:
    """Two checkpoints are the same Hugging Face files."""
    from safetensors.numpy import load_file

    for number, at in enumerate((one, other)):
        convert(at, to / f"hf{number}", "safetensors", states=states, verify=True)
    files = sorted(path.name for path in (to / "hf0").glob("*.safetensors"))
    assert len(files) == len(states)
    for file in files:
        left, right = (load_file(to / f"hf{k}" / file) for k in range(2))
        assert left.keys() == right.keys() and len(left) > 40
        for name, value in left.items():
            np.testing.assert_array_equal(value, right[name], err_msg=f"{file}: {name}")


@pytest.mark.slow
@pytest.mark.parametrize("version", [0, 1.0, 2.0])
def test_names_and_orders_of_megatron_before_its_core(version, written, tmp_path) -> None:
    """The orders are those that Megatron-LM's fix_query_key_value_ordering turns into its own; what
    is written of them is in today's."""

    def change(state: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"embedding": {}, "transformer": {}}
        for name, value in state["model"].items():
            if "linear_qkv" in name and value is not None:
                heads = value.reshape(-1, 3, 8, *value.shape[1:])
                moved = {0: (1, 0, 2), 1.0: (0, 2, 1), 2.0: (0, 1, 2)}[version]
                ordered = heads.permute(*moved, *range(3, heads.ndim))
                value = ordered.reshape(value.shape).contiguous()
            for core, old in OLD.items():
                name = name.replace(core, old)
            if name.startswith("decoder."):
                found["transformer"][name.removeprefix("decoder.")] = value
            elif name.startswith("embedding."):
                _, module, kind = name.split(".")
                found["embedding"].setdefault(module, {})[kind] = value
            else:
                state.setdefault("tied", {})["weight"] = value
        model: dict[str, Any] = {"language_model": found}
        if "tied" in state:
            model["word_embeddings_for_head"] = state.pop("tied")
        kept = {key: state[key] for key in ("args", "iteration", "rng_state")}
        if version:
            kept["checkpoint_version"] = version
        return {**kept, "model": model}

    at = written("tied gpt2") / "legacy"
    old = rewritten(at, tmp_path / "old", change)
    same_files(at, old, tmp_path)
    convert(old, tmp_path / "new", "megatron", mesh={"tp": 4}, states=["weight"], verify=True)
    same_files(at, tmp_path / "new", tmp_path / "once more")


@pytest.mark.slow
def test_names_of_transformer_engine(written, tmp_path) -> None:
    """Norms in the layers after them, and what those keep of their scales (bytes, or nothing)."""
    import io

    import torch

    def change(state: dict[str, Any]) -> dict[str, Any]:
        model: dict[str, Any] = {}
        for name, value in state["model"].items():
            if value is None:
                continue
            name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
            name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
            model[name] = value
            if "linear_" in name and name.endswith(".weight"):
                extra: Any = torch.arange(9, dtype=torch.uint8)
                if "proj" in name:
                    extra = io.BytesIO(b"scales") if "qkv" in name else None
                model[name.removesuffix("weight") + "_extra_state"] = extra
        state["args"].transformer_impl = "transformer_engine"
        return {**state, "model": model}

    at = written("qwen2") / "legacy"
    same_files(at, rewritten(at, tmp_path / "te", change), tmp_path)


@pytest.mark.slow
def test_experts_of_a_grouped_gemm(written, tmp_path) -> None:
    """GroupedMLP's `weight1` and `weight2`: megatron's own torch_dist says what is in them."""
    at = written("grouped")
    same_files(at / "dist", at / "legacy", tmp_path, ("weight", "exp_avg", "exp_avg_sq"))


@pytest.mark.slow
def test_flat_buckets_of_another_mesh_are_refused(written, tmp_path) -> None:
    import torch

    shutil.copytree(written("qwen2") / "flat", tmp_path / "flat")
    common = torch.load(tmp_path / "flat/common.pt", weights_only=False)
    common["args"].tensor_model_parallel_size = 4
    torch.save(common, tmp_path / "flat/common.pt")
    with pytest.raises(CorruptCheckpoint, match="lies on 2 tensor ranks, of tp=4"):
        convert(tmp_path / "flat", tmp_path / "out", "safetensors")


def swapped(at: Path, to: Path, one: str, other: str) -> Path:
    shutil.copytree(at, to)
    folder = to / "iter_0000010"
    (folder / one).rename(folder / "aside")
    (folder / other).rename(folder / one)
    (folder / "aside").rename(folder / other)
    return to


def forgetting(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Files without what tells their rank: `rank` of the arguments, `rng_state`."""

    def change(state: dict[str, Any]) -> dict[str, Any]:
        said = {k: v for k, v in vars(state["args"]).items() if k not in names}
        kept = {k: v for k, v in state.items() if k not in names}
        return {**kept, "args": argparse.Namespace(**said)}

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other", "without", "said"),
    [
        ("mp_rank_00_000", "mp_rank_01_000", (), "was saved by rank 1 of 4, which is tp=1"),
        ("mp_rank_00_000", "mp_rank_00_001", (), "was saved by rank 2 of 4, which is pp=1"),
        ("mp_rank_00_001", "mp_rank_01_001", ("rank",), "random numbers of another rank"),
        ("mp_rank_00_001", "mp_rank_00_002", ("rank", "rng_state"), "files are swapped"),
    ],
)
def test_files_in_each_others_folders_are_found(one, other, without, said, written, tmp_path):
    at = written("llama") / "legacy"
    if "_002" in other:  # two stages of the same names and shapes
        convert(at, tmp_path / "four", "megatron", mesh={"tp": 2, "pp": 4}, states=["weight"])
        at = next((tmp_path / "four").glob("iter_*")).parent
    plain = rewritten(at, tmp_path / "plain", forgetting(*without))
    convert(plain, tmp_path / "fine", "safetensors", states=["weight"])
    moved = swapped(plain, tmp_path / "moved", one, other)
    with pytest.raises(CorruptCheckpoint, match=said):
        convert(moved, tmp_path / "out", "safetensors", states=["weight"])


@pytest.mark.slow
def test_a_rank_that_is_a_copy_of_another_is_found(written, tmp_path) -> None:
    at = rewritten(written("qwen2") / "legacy", tmp_path / "plain", forgetting("rank", "rng_state"))
    folder = at / "iter_0000010"
    shutil.copy(folder / "mp_rank_00/model_optim_rng.pt", folder / "mp_rank_01/model_optim_rng.pt")
    with pytest.raises(CorruptCheckpoint, match="hold the same shards"):
        convert(at, tmp_path / "out", "safetensors", states=["weight"])
