"""The command line of checkpoints: what is given is looked at, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from shardwright.checkpoint import convert, inspect
from shardwright.checkpoint.formats import MODULES
from shardwright.checkpoint.formats.flags import FLAGS, TAGGED, WHOLE
from shardwright.cli import app
from shardwright.ir import CorruptCheckpoint

STATES = ("weight", "exp_avg", "exp_avg_sq")
OTHER = "layout: other\ntensors:\n- {stored: a, logical: a}\n"
BESIDE = {"config.json", "tokenizer.json", "modeling.py"}


def shapes() -> dict[str, tuple[int, ...]]:
    """Of a Llama with two layers and grouped heads."""
    made = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (16, 8))
    made = {**made, "model.norm.weight": (8,)}
    for at in ("model.layers.0.", "model.layers.1."):
        made |= {f"{at}self_attn.{n}_proj.weight": (8 if n in "qo" else 4, 8) for n in "qkvo"}
        made |= {f"{at}mlp.{n}_proj.weight": (12, 8) for n in ("gate", "up")}
        made |= {f"{at}mlp.down_proj.weight": (8, 12)}
        made |= {f"{at}{n}_layernorm.weight": (8,) for n in ("input", "post_attention")}
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source") / "hf"
    root.mkdir()
    draw = np.random.default_rng(0)
    for state in STATES:
        held = {name: draw.standard_normal(shape).astype("f4") for name, shape in shapes().items()}
        own = {"format": "pt"} | ({} if state == "weight" else {"shardwright_state": state})
        stem = "model" if state == "weight" else state
        save_file(held, root / f"{stem}.safetensors", own)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}
    (root / "config.json").write_text(json.dumps({"model_type": "llama", **heads}))
    (root / "tokenizer.json").write_text('{"version": "1.0"}')
    (root / "modeling.py").write_text("raise RuntimeError('never run')\n")
    groups = [{"lr": 0.1, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}]
    (root / "training_state.json").write_text(json.dumps({"step": 3, "param_groups": groups}))
    (root.parent / "other.yaml").write_text(OTHER)
    return root


def run(*said: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in said])


def refused(result: Result, says: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and says in result.stderr, result.stderr


@pytest.mark.parametrize("to", MODULES)
@pytest.mark.parametrize(
    ("said", "says"),
    [
        ("--tag x", "--tag x: a safetensors directory is one save"),
        ("--sizes foo=3", "--sizes foo: layout identity"),
        ("--set foo=1", "--set foo: neither reading safetensors nor writing"),
        ("--set mixed_steps=true", "--set mixed_steps: neither"),
        ("--memory 64M", "expected at least 128M"),
        ("--dtype bf16 --states exp_avg", "--dtype bf16 is of weights"),
        ("--mesh foo=2", "foo"),
        ("--mesh tp=2,tp=4", "--mesh tp: given twice"),
        ("--spec megatron-llama", "--spec megatron-llama: it has no rule for any array"),
        ("--target-spec OTHER", "it has no rule for any tensor of the source"),
    ],
)
def test_what_nothing_looks_at_is_refused(
    to: str, said: str, says: str, source: Path, tmp_path: Path
) -> None:
    said = said.replace("OTHER", str(source.parent / "other.yaml"))
    refused(run("convert", source, tmp_path / "o", "--to", to, *said.split()), says)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "said", "says"),
    [
        ("universal", "--mesh tp=2", "universal holds whole tensors"),
        ("orbax", "--mesh dp=2", "orbax holds whole tensors"),
        ("dcp", "--mesh vpp=2", "dcp has no virtual stages"),
        ("megatron", "--mesh etp=2", "as many tensor ranks as the rest"),
        ("orbax", "--set nested=yes", "--set nested=yes: expected true or false"),
        ("dcp", "--set lr=nan", "--set lr=nan: expected a number, as 3e-4"),
        ("orbax", "--set chunk_bytes=abc", "--set chunk_bytes=abc: expected bytes"),
        ("megatron", "--set stages=1-x", "--set stages=1-x: expected layers of each stage"),
        ("megatron", "--set grad_dtype=f99", "--set grad_dtype=f99: expected a dtype"),
        ("megatron-dist", "--set iteration=x", "--set iteration=x: expected a whole number"),
        ("safetensors", "--set shard_bytes=0", "--set shard_bytes=0: expected bytes, as 5G"),
        ("deepspeed", "--set stage=4", "--set stage=4: expected 1, 2 or 3"),
        ("deepspeed", "--set order=a,b,stage=1", "order: 2 names for 21 parameters"),
        ("deepspeed", "--set order=@/nowhere", "--set order=@/nowhere: cannot read the file"),
        ("dcp", "--set names=a,b", "--set names=a,b: expected state_dict or emitted"),
        ("", "--plan p.json --verify", "--verify: without --to a list of reads is written"),
        ("", "--plan p.json --mesh tp=2", "--mesh: without --to a list of reads is written"),
        ("", "", "--to is missing"),
    ],
)
def test_what_does_not_fit_is_refused(
    to: str, said: str, says: str, source: Path, tmp_path: Path
) -> None:
    form = ["--to", to] if to else []
    refused(run("convert", source, tmp_path / "o", *form, *said.split()), says)
    assert not any(tmp_path.iterdir())


def test_an_order_is_a_list_or_a_file(source: Path, tmp_path: Path) -> None:
    names = sorted(shapes(), reverse=True)
    (tmp_path / "names.txt").write_text("\n".join(names))
    made = []
    for k, said in enumerate(
        (f"order={','.join(names)},stage=1", f"stage=1,order=@{tmp_path}/names.txt")
    ):
        target = tmp_path / str(k)
        result = run("convert", source, target, "--to", "deepspeed", "--set", said)
        assert result.exit_code == 0, result.output
        made.append({p.relative_to(target): p.read_bytes() for p in target.rglob("*.pt")})
    assert made[0] == made[1]
    plain = run("convert", source, tmp_path / "2", "--to", "deepspeed", "--set", "stage=1")
    assert plain.exit_code == 0
    file = next(path for path in made[0] if "optim_states" in path.name)
    assert (tmp_path / "2" / file).read_bytes() != made[0][file]


def test_help_names_every_flag_and_gives_examples() -> None:
    text = " ".join(run("convert", "--help").output.replace("│", " ").split())
    assert "Examples:" in text and "--set stage=3,order=@names.txt" in text
    for form, flags in FLAGS.items():
        assert form in text and all(flag.name in text for flag in flags)
    assert "Examples:" in run("inspect", "--help").output


@pytest.mark.parametrize("form", MODULES)
def test_what_hugging_face_keeps_beside_weights_goes_along(
    form: str, source: Path, tmp_path: Path
) -> None:
    """There and back through any form; heads that a layout asks for come from config.json."""
    axis = "dp" if form.startswith("deepspeed") else "tp"
    mesh = {} if form in WHOLE else {axis: 2}
    convert(source, tmp_path / form, form, mesh=mesh)
    tag = {"megatron": "iter_0000003", "orbax": "3"}.get(form, "")
    assert (form in TAGGED) or not tag
    convert(tmp_path / form, tmp_path / "back", "safetensors", tag=tag)
    for name in BESIDE:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    for path in source.glob("*.safetensors"):
        one, other = load_file(path), load_file(tmp_path / "back" / path.name)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_config_that_is_given_goes_before_that_of_the_source(
    source: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "other"}')
    convert(source, tmp_path / "made", "dcp", config=other)
    assert (tmp_path / "made" / "config.json").read_text() == '{"model_type": "other"}'
    assert not (tmp_path / "made" / "tokenizer.json").exists()
    refused(
        run("convert", source, tmp_path / "o", "--to", "dcp", "--config", tmp_path / "no"),
        "expected a folder with a config.json",
    )


def test_inspect_counts_what_ranks_hold_once_or_says_that_it_cannot(
    source: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "made", "megatron", mesh={"tp": 2})
    elements = sum(int(np.prod(shape)) for shape in shapes().values())
    known = inspect(tmp_path / "made")
    assert known.parameters == elements
    assert {state: said["bytes"] for state, said in known.states.items()} == dict.fromkeys(
        STATES, 4 * elements
    )
    other = source.parent / "other.yaml"
    refused(run("inspect", tmp_path / "made", "--spec", other), "no rule for any")
    names = {path: path.read_bytes() for path in (tmp_path / "made").rglob("model_optim_rng.pt")}
    for path, data in names.items():  # names that no layout knows, of the same length
        path.write_bytes(data.replace(b"linear_qkv", b"linear_kqv"))
    with pytest.raises(CorruptCheckpoint, match=r"mp_rank_00/model_optim_rng\.pt"):
        inspect(tmp_path / "made")


def test_inspect_of_an_unclear_layout_says_so(tmp_path: Path) -> None:
    """Shards of names that no layout has: two ranks hold a vector each, halves or partial."""
    torch = pytest.importorskip("torch")
    for rank in range(2):
        folder = tmp_path / "iter_0000001" / f"mp_rank_{rank:02d}"
        folder.mkdir(parents=True)
        state = {"model": {"odd": torch.full((4,), float(rank))}, "iteration": 1}
        torch.save(state, folder / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    found = inspect(tmp_path)
    assert found.parameters is None and "not clear" in found.layout
    assert found.to_json()["whole"] is None
    assert found.states["weight"]["bytes"] == 2 * 4 * 4
    assert "as stored by all ranks" in str(found)


def test_inspect_names_the_damaged_file(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "made", "universal")
    (tmp_path / "made" / "tokenizer.json").unlink()
    refused(run("inspect", tmp_path / "made"), f"{tmp_path}/made/tokenizer.json: missing")
    said = json.loads(run("inspect", tmp_path / "made", "--json").stdout)
    assert said["whole"] is False and "tokenizer.json" in said["problem"]
