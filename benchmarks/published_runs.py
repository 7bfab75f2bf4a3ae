"""Predicted beside measured iteration times of published training runs.

    python benchmarks/published_runs.py [--runs FILE] [--json] [--only FAMILY] [--calibrate N]

Reads any table with the columns of `published_runs.csv`, turns each complete row into a model, a
cluster and a configuration, predicts it with class defaults of device and fabric, and prints per
family: errors of the iteration time beside a baseline with one efficiency per chip, how well
predictions choose within groups of runs, errors of memory, and, with `--calibrate`, errors after
calibrating each cluster with a few of its rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from published.baseline import Baseline
from published.predictors import Estimate, Predict, Shardwright
from published.report import Report, family_of, predict_all, report
from published.rows import Runs, read_runs
from published.setup import Recompute, Setup, Skipped, setup_of
from published.table import show
from rich.console import Console

from shardwright import InvalidInput

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "data" / "published_runs.csv"
"""The rows that are read by default, and that the baseline is fitted on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        runs = read_runs(options.runs)
        for refused in runs.refused:
            print(f"note: {refused}: left out", file=sys.stderr)
        found = evaluate(
            runs,
            predictor=options.predictor,
            only=options.only,
            source=options.source,
            probes=options.calibrate,
        )
    except InvalidInput as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(found.to_json(), indent=1, allow_nan=False))
    else:
        show(found, Console(width=None if sys.stdout.isatty() else 160))
    return 0


def evaluate(
    runs: Runs,
    *,
    predictor: str = "shardwright",
    only: str | None = None,
    source: str | None = None,
    probes: int | None = None,
) -> Report:
    """Scores of a table of runs, of one family or one source if asked.

    Raises InvalidInput where nothing is left to predict.
    """
    described = [setup_of(run) for run in runs.rows]
    setups = [each for each in described if isinstance(each, Setup)]
    skipped = [each for each in described if isinstance(each, Skipped)]
    baseline = Baseline.fitted(_reference(runs, setups))
    if only is not None:
        setups = [each for each in setups if only in (each.run.family, family_of(each))]
        skipped = [each for each in skipped if each.run.family == only]
    if source is not None:
        setups = [each for each in setups if source in each.run.source]
        skipped = [each for each in skipped if source in each.run.source]
    if not setups and not skipped:
        asked = f"--only {only}" if only is not None else f"--source {source}"
        known = ", ".join(sorted({run.family for run in runs.rows}))
        raise InvalidInput(f"{asked}: no such rows in {runs.path}; its families: {known}")
    outcomes, refused = predict_all(setups, _predictor(predictor, baseline), baseline)
    return report(outcomes, [*skipped, *refused], probes)


def _reference(runs: Runs, setups: list[Setup]) -> list[Setup]:
    """What the baseline is fitted on: the reference table, or without it the given one."""
    if runs.path.resolve() == REFERENCE or not REFERENCE.is_file():
        return setups
    described = (setup_of(run) for run in read_runs(REFERENCE).rows)
    return [each for each in described if isinstance(each, Setup)]


def _predictor(name: str, baseline: Baseline) -> Predict:
    if name == "shardwright":
        return Shardwright()

    def one_efficiency(setup: Setup, recompute: Recompute) -> Estimate:
        seconds = baseline.seconds(setup)
        if seconds is None:
            raise InvalidInput("the baseline has no other source to be fitted on")
        return Estimate(seconds, None, None, True, {"matmul": seconds})

    return one_efficiency


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="published_runs.py", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--runs", default=REFERENCE, metavar="FILE", help="a table of runs (CSV)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--only", metavar="FAMILY", help="rows of one family")
    parser.add_argument("--source", metavar="NAME", help="rows whose source holds this text")
    parser.add_argument(
        "--calibrate", type=_probes, metavar="N", help="calibrate each cluster with N of its rows"
    )
    parser.add_argument(
        "--predictor", choices=("shardwright", "one-efficiency"), default="shardwright",
        help="what predicts (default: shardwright)",
    )  # fmt: skip
    return parser


def _probes(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if not 1 <= number <= 20:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1 to 20")
    return number


if __name__ == "__main__":
    sys.exit(main())
