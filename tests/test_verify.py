"""Verification finds programs equal that are, and finds out those that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from handwritten import Handwritten, ranks, write

from shardwright.backends.to_torch import verify as verification
from shardwright.backends.to_torch.reference import Reference
from shardwright.backends.to_torch.verify import Case, compare
from shardwright.ir.errors import InvalidInput

LAYOUTS: list[dict[str, Any]] = [
    dict(),
    dict(micro_batch=4),
    dict(tp=2),
    dict(tp=4),
    dict(tp0=2, tp1=2),
    dict(dp=2, zero=0),
    dict(dp=2, zero=1),
    dict(dp=2, zero=2, micro_batch=2),
    dict(dp=2, zero=3),
    dict(dp=3, zero=3, global_batch=9),
    dict(dp=3, zero=0, global_batch=6, micro_batch=2),
    dict(dp=4, zero=2),
    dict(dp=2, tp=2, zero=0),
    dict(dp=2, tp=2, zero=3),
    dict(dp=2, tp=2, zero=1),
    dict(dp=2, tp0=2, tp1=2, zero=3),
    dict(pp=2),
    dict(pp=2, schedule="gpipe", micro_batch=2),
    dict(pp=2, tp=2),
    dict(pp=2, dp=2, zero=0),
    dict(pp=2, dp=2, zero=1),
    dict(pp=2, dp=2, zero=2),
    dict(pp=2, dp=2, zero=3),
    dict(pp=2, dp=2, zero=3, schedule="gpipe"),
    dict(pp=3, global_batch=6),
    dict(pp=4),
]


def case(folder: Path, **settings: Any) -> Case:
    return Case(write(folder, **settings), ranks(**settings), settings)


def edited(case: Case, old: str, new: str, file: str = "model.py") -> Case:
    """The case with a mistake in it."""
    path = case.folder / file
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new))
    return case


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "layouts"), [("float64", LAYOUTS), ("float32", LAYOUTS[4::5])])
def test_every_layout_gives_the_single_device_gradients(
    dtype: str, layouts: list[dict[str, Any]], tmp_path: Path
) -> None:
    cases = [case(tmp_path / str(i), **layout) for i, layout in enumerate(layouts)]
    results = compare(cases, Reference(Handwritten(), getattr(torch, dtype)), dtype=dtype)
    for layout, result in zip(layouts, results, strict=True):
        assert result["equal"], result
        assert result["worst_gradient"]["relative_error"] < (1e-14 if dtype == "float64" else 2e-6)
        assert result["strategy"] == layout
        assert result["ranks"] == ranks(**layout)


@pytest.mark.slow
def test_mistakes_are_found_and_named(tmp_path: Path) -> None:
    gain = "            gain = convert(gain, axis(name), src=I, dst=R, **options(gain))"
    norm = "            y = convert(y, axis(name), src=I, dst=R, **options(y))"
    cases = [
        # A missing all-reduce in the backward pass, of a parameter and of an activation.
        edited(case(tmp_path / "a", tp0=2, tp1=2), gain, "            pass"),
        edited(case(tmp_path / "b", tp=2), norm, "            pass"),
        # A bias that every rank adds before the sum.
        edited(
            case(tmp_path / "c", tp=2),
            ".T\n        for",
            ".T + local(self.down.bias)\n        for",
        ),
        # Tied copies whose gradients are not summed; gradients that are averaged over ranks.
        edited(
            case(tmp_path / "d", pp=2), "if len(PARAMETERS[name].stages) > 1", "if 0", "step.py"
        ),
        edited(case(tmp_path / "e", dp=2, zero=3), "factor(1.0)", "factor(2.0)", "parallel.py"),
        # The mean over each microbatch instead of over the global batch.
        edited(case(tmp_path / "f"), 'reduction="sum"', 'reduction="mean"'),
        # A program that trains something else.
        edited(case(tmp_path / "g"), "setattr(self, name,", "setattr(self, name + '_',"),
        # A rank that fails among others, one that exits, and after them all a right program.
        edited(case(tmp_path / "h", dp=2), "logits = (", "assert axis('dp').rank(); logits = ("),
        edited(case(tmp_path / "i", dp=2), "logits = (", "import os; os._exit(3); logits = ("),
        Case(write(tmp_path / "j", tp=2), 4),
        # The pipeline wraps what a stage raises.
        edited(case(tmp_path / "k", pp=2), "logits = (", "assert False, 'no head'; logits = ("),
        case(tmp_path / "l", tp=2),
    ]
    results = compare(cases, Reference(Handwritten(), torch.float64))
    assert [result["equal"] for result in results] == [False] * 11 + [True]
    assert results[0]["worst_gradient"]["name"].endswith("gain")
    assert results[0]["loss"]["sharded"] == pytest.approx(results[0]["loss"]["single"], rel=1e-12)
    assert results[3]["worst_gradient"]["name"] == "model.embed.weight"
    assert results[4]["worst_gradient"]["relative_error"] == pytest.approx(0.5)
    errors = [result.get("error") for result in results]
    assert errors[:6] == [None] * 6
    assert "KeyError: 'model.embed.weight_'" in errors[6]
    assert errors[7] == "rank 0: AssertionError"
    assert errors[8] in [f"rank {i}: it died without a traceback" for i in range(2)]
    assert "this program runs on 2 ranks (pp=1 × dp=1 × tp=2), but 4 were started" in errors[9]
    assert errors[10] == "rank 1: AssertionError: no head"


@pytest.mark.slow
def test_a_program_that_hangs_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "START_TIMEOUT_S", 10.0)
    monkeypatch.setattr(verification, "CASE_TIMEOUT_S", 1.0)
    hanging = edited(
        case(tmp_path / "a", dp=2),
        "logits = (",
        "import time; time.sleep(1000 * axis('dp').rank()); logits = (",
    )
    (result,) = compare([hanging], Reference(Handwritten(), torch.float64))
    assert not result["equal"]
    assert result["error"].startswith("no answer in time; rank-0 was at File")


def test_the_reference_is_perturbed_and_the_model_is_not() -> None:
    model = Handwritten()
    before = [parameter.clone() for parameter in model.parameters()]
    reference = Reference(model, torch.float64)
    for old, kept, used in zip(
        before, model.parameters(), reference.module.parameters(), strict=True
    ):
        assert torch.equal(old, kept)
        assert used.dtype is torch.float64
        assert not torch.equal(old.double(), used)


def test_bad_input_is_said() -> None:
    with pytest.raises(InvalidInput, match="dtype 'bfloat16': expected float64 or float32"):
        compare([], Reference(Handwritten(), torch.float64), dtype="bfloat16")
    with pytest.raises(InvalidInput, match="Handwritten is on meta"):
        Reference(Handwritten().to("meta"), torch.float64)
    with pytest.raises(InvalidInput, match="returns Tensor and no scalar loss: give `loss=`"):
        Reference(torch.nn.Linear(2, 2), torch.float64).run({"input": torch.zeros(1, 2).double()})
