"""The report as tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from .report import Report

PEERS = ("calculon", "llm-analysis", "SimuMax")


def show(report: Report, console: Console) -> None:
    """Prints errors, choice, memory, calibration, and what was skipped."""
    if report.families:
        console.print(_errors(report))
    if report.choice:
        console.print(_choice(report))
    if report.memory:
        console.print(_memory(report))
    if report.calibrated:
        console.print(_calibrated(report))
    reasons = Counter((row.run.family, row.reason) for row in report.skipped)
    for (family, reason), count in sorted(reasons.items()):
        console.print(f"skipped {count} of {family}: {reason}", highlight=False, markup=False)


def _errors(report: Report) -> Table:
    table = _table(
        "Iteration time, absolute error in %: median / 90th percentile",
        ["family"],
        ["rows", "median", "mean", "p90", "bias", "one efficiency", *PEERS],
    )
    for name, score in sorted(report.families.items()):
        errors, baseline = score.errors, score.baseline
        peers = _peers()["time"].get(name, {})
        table.add_row(
            name,
            str(errors.rows),
            _percent(errors.median_ape),
            _percent(errors.mean_ape),
            _percent(errors.p90_ape),
            f"{100 * errors.bias:+.1f}",
            f"{_percent(baseline.median_ape)} / {_percent(baseline.p90_ape)}" if baseline else "",
            *(_pair(peers.get(peer)) for peer in PEERS),
        )
    table.caption = (
        "one efficiency: per chip, fitted on the other sources. Peers: as published with the data, "
        "on rows of which some are kept back. bloom-v100 carries ±40 % and is no gate."
    )
    return table


def _choice(report: Report) -> Table:
    table = _table(
        "Choosing within groups: Kendall tau, regret in %",
        ["family"],
        ["groups", "rows", "tau", "mean regret", "worst", "at random", "one efficiency", *PEERS],
    )
    for name, score in sorted(report.choice.items()):
        baseline = report.baseline_choice.get(name)
        peers = _peers()["choice"].get(name, {})
        table.add_row(
            name,
            str(score.groups),
            str(score.rows),
            f"{score.kendall:.2f}",
            _percent(score.mean_regret),
            _percent(score.max_regret),
            _percent(score.random_regret),
            f"{baseline.kendall:.2f} / {_percent(baseline.mean_regret)}" if baseline else "",
            *(_tau(peers.get(peer)) for peer in PEERS),
        )
    return table


def _memory(report: Report) -> Table:
    table = _table(
        "Memory of the fullest GPU",
        ["family"],
        [
            "rows",
            "median %",
            "bias %",
            "+ one constant %",
            "constants GiB",
            "OOM caught",
            "false OOM",
        ],
    )
    for name, score in sorted(report.memory.items()):
        fitted = ", ".join(f"{x:+.1f}" for x in score.overhead_gib)
        table.add_row(
            name,
            str(score.rows),
            _percent(score.median_ape),
            "" if score.bias is None else f"{100 * score.bias:+.1f}",
            _percent(score.median_ape_with_overhead),
            fitted,
            f"{score.oom_caught} of {score.oom_total}" if score.oom_total else "",
            "" if score.false_oom is None else f"{_percent(score.false_oom)} % of {score.ran}",
        )
    table.caption = (
        "The constant is fitted on one half of the groups (every other one by name) and reported "
        "on the other, both ways."
    )
    return table


def _calibrated(report: Report) -> Table:
    table = _table(
        "Calibrated per cluster with a few rows, errors of the others in %",
        ["cluster"],
        ["probes", "rows", "before", "median", "p90", "multipliers of time"],
    )
    for each in sorted(report.calibrated, key=lambda each: each.source):
        far = sorted(each.multipliers.items(), key=lambda item: -abs(item[1] - 1))[:4]
        table.add_row(
            each.source,
            str(len(each.probes)),
            str(each.after.rows),
            f"{_percent(each.before.median_ape)} / {_percent(each.before.p90_ape)}",
            _percent(each.after.median_ape),
            _percent(each.after.p90_ape),
            ", ".join(f"{cause} {value:.2f}" for cause, value in far),
        )
    table.caption = (
        "Probes are chosen by configurations and predictions, before measured times are looked at. "
        "How far causes and configurations deviate in general (prior.yaml) is learned on the other "
        "sources by their likelihood, without any row of the one reported (vTrain's two tables are "
        "one source); the form of the model was settled with all tables in sight. Probes: "
        + "; ".join(f"{each.source}: {', '.join(each.probes)}" for each in report.calibrated)
    )
    return table


def _table(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f}"


def _pair(pair: Any) -> str:
    return f"{100 * pair[0]:.3g} / {100 * pair[1]:.3g}" if pair else ""


def _tau(pair: Any) -> str:
    return f"{pair[0]:.2f} / {100 * pair[1]:.3g}" if pair else ""


@lru_cache(maxsize=1)
def _peers() -> Mapping[str, Any]:
    text = Path(__file__).with_name("peers.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))
