"""The pipeline master problem: equal to brute force, plans cost what they say, Piper's optima."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.ir.errors import Infeasible, InvalidInput
from shardwright.planner import best_stages, downsets, stage_choices
from shardwright.planner.downsets import Downsets
from shardwright.planner.stage_problem import Choice, Cut, Edge, Layer, StageProblem, plan_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from piper import read_piper
from search import PIPER, PIPER_OPTIMA

SEEDS = st.integers(0, 2**32 - 1)


def problem_of(seed: int, chain: bool) -> StageProblem:
    """Two to five layers with up to three choices for up to three degrees. Sync bytes hang on what
    is chosen, and memory binds in most."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 5 if chain else 6))
    pairs = [(i, k) for i in range(count) for k in range(i + 1, count)]
    linked = [(i, k) for i, k in pairs if (k == i + 1 if chain else rng.random() < 0.5)]
    shuffled = range(count) if chain else [int(i) for i in rng.permutation(count)]
    edges = [Edge(shuffled[i], shuffled[k], float(rng.integers(0, 30))) for i, k in linked]
    synced = rng.random() < 0.5
    layers = []
    for at in range(count):
        choices: dict[int, list[Choice]] = {}
        for degree in (1, 2, 3):
            if degree == 1 or rng.random() < 0.6:
                choices[degree] = [
                    Choice(
                        float(rng.integers(1, 40)) / degree,
                        float(rng.integers(0, 40)),
                        float(rng.integers(0, 12)),
                        float(rng.integers(0, 20)),
                        {e.source: float(rng.integers(0, 9)) for e in edges if e.target == at}
                        if synced else {},
                        {e.target: float(rng.integers(0, 9)) for e in edges if e.source == at}
                        if synced else {},
                    )
                    for _ in range(int(rng.integers(1, 4)))
                ]  # fmt: skip
        if rng.random() < 0.15:
            del choices[1]
        layers.append(Layer(f"layer {at}", choices or {2: [Choice(3.0)]}))
    return StageProblem(
        layers, edges, int(rng.integers(1, 8)), int(rng.integers(1, 13)),
        float(rng.uniform(2, 50)), float(rng.integers(15, 110)),
    )  # fmt: skip


def tails(problem: StageProblem, left: frozenset[int]) -> Iterator[frozenset[int]]:
    """What can be the last stage of the layers that are left."""
    for chosen in product((False, True), repeat=len(left)):
        stage = frozenset(v for v, use in zip(sorted(left), chosen, strict=True) if use)
        rest = left - stage
        if stage and not any(e.source in stage and e.target in rest for e in problem.edges):
            yield stage


def brute_force(problem: StageProblem) -> float:
    """The least seconds of the slowest stage over all cuts, degrees, replicas and choices."""
    n, rate, limit = problem.microbatches, problem.bandwidth_bytes_per_s, problem.memory_limit_bytes

    def stage(layers: frozenset[int], t: int, d: int, y: int) -> float:
        least = math.inf
        order = sorted(layers)
        for picks in product(*(problem.layers[v].choices.get(t, ()) for v in order)):
            pick = dict(zip(order, picks, strict=True))
            if sum(y * c.in_flight_bytes + c.fixed_bytes for c in picks) > limit:
                continue
            sent = 0.0
            for e in problem.edges:
                if e.source in layers and e.target not in layers:
                    sent += e.bytes + pick[e.source].sync_out_bytes.get(e.target, 0)
                if e.target in layers and e.source not in layers:
                    sent += e.bytes + pick[e.target].sync_in_bytes.get(e.source, 0)
            resync = 4 * (d - 1) * sum(c.parameter_bytes for c in picks) / (d * n)
            compute = sum(c.seconds_per_sample for c in picks) / d
            least = min(least, (2 * sent / d + resync) / rate + compute)
        return least

    def best(left: frozenset[int], after: int, devices: int) -> float:
        if not left:
            return 0.0
        least = math.inf
        for layers in tails(problem, left):
            for t, d in product((1, 2, 3), range(1, n + 1)):
                if n % d == 0 and after + d <= n and t * d <= devices:
                    seconds = stage(layers, t, d, math.ceil((after + d) / d))
                    if seconds < least:
                        rest = best(left - layers, after + d, devices - t * d)
                        least = min(least, max(seconds, rest))
        return least

    return best(frozenset(range(len(problem.layers))), 0, problem.devices)


def check_optimal(problem: StageProblem) -> None:
    best = brute_force(problem)
    if best == math.inf:
        with pytest.raises(Infeasible):
            best_stages(problem)
        return
    plan = best_stages(problem)
    assert plan.seconds == pytest.approx(best, rel=1e-9)
    cuts = [Cut(s.layers, s.degree, s.replicas, s.picks) for s in plan.stages]
    assert plan_of(problem, cuts) == plan


@settings(max_examples=60)
@given(seed=SEEDS)
def test_chains_equal_brute_force(seed: int) -> None:
    check_optimal(problem_of(seed, chain=True))


@settings(max_examples=60)
@given(seed=SEEDS)
def test_branched_graphs_equal_brute_force(seed: int) -> None:
    check_optimal(problem_of(seed, chain=False))


@settings(max_examples=40)
@given(seed=SEEDS)
def test_frontiers_that_are_only_bounds_change_nothing(seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_choices, "MOST_COLUMNS", 1)
        check_optimal(problem_of(seed, chain=seed % 2 == 0))


@given(count=st.integers(1, 6), bits=st.integers(0, 2**15 - 1))
def test_downsets_are_all_sets_closed_under_what_leads_to_them(count: int, bits: int) -> None:
    pairs = list(combinations(range(count), 2))
    edges = [pair for at, pair in enumerate(pairs) if bits >> at & 1]
    found = Downsets.of(count, edges)
    closed = {
        members
        for members in product((False, True), repeat=count)
        if all(members[i] or not members[k] for i, k in edges)
    }
    assert {tuple(map(bool, row)) for row in found.members} == closed
    nested = sum(
        one != other and all(a <= b for a, b in zip(one, other, strict=True))
        for one, other in product(closed, repeat=2)
    )
    assert len(found.first) == nested


@settings(max_examples=40)
@given(seed=SEEDS)
def test_what_is_said_to_be_enough_is_enough_and_no_less(seed: int) -> None:
    """The least limit and the fewest devices of the message, against brute force."""
    problem = replace(problem_of(seed, chain=True), memory_limit_bytes=20.0)
    try:
        best_stages(problem)
    except Infeasible as error:
        said = str(error).replace(",", "")
    else:
        return
    if "bytes would do" in said:
        enough = float(said.split(" bytes would do")[0].rpartition(" ")[2])
        assert brute_force(replace(problem, memory_limit_bytes=enough)) < math.inf
        assert brute_force(replace(problem, memory_limit_bytes=enough - 1)) == math.inf
    if "devices would do" in said and "no number" not in said:
        fewest = int(said.split(" devices would do")[0].rpartition(" ")[2])
        assert brute_force(replace(problem, devices=fewest)) < math.inf
        assert brute_force(replace(problem, devices=fewest - 1)) == math.inf


def chain(*layers: Layer, **changes: float) -> StageProblem:
    edges = [Edge(at, at + 1, 1.0) for at in range(len(layers) - 1)]
    return replace(StageProblem(layers, edges, 4, 4, 1e9, 100.0), **changes)


PLAIN = Layer("plain", {1: [Choice(1.0, 1.0, 5.0, 30.0)]})


def test_a_degree_that_a_layer_lacks_needs_a_stage_of_its_own() -> None:
    wide = Layer("wide", {2: [Choice(1.0, 1.0, 5.0, 30.0)]})
    plan = best_stages(chain(PLAIN, wide, PLAIN))
    assert [stage.degree for stage in plan.stages] == [1, 2, 1]
    with pytest.raises(Infeasible, match="devices are short; with so much memory 4 devices"):
        best_stages(chain(PLAIN, wide, PLAIN, devices=3))


def test_a_limit_that_is_just_met_is_met() -> None:
    least = 2 * (5 + 30)
    assert best_stages(chain(PLAIN, PLAIN, devices=1, memory_limit_bytes=least)).devices == 1
    with pytest.raises(Infeasible, match=r"memory is 1 bytes short.* 70 bytes would do"):
        best_stages(chain(PLAIN, PLAIN, devices=1, memory_limit_bytes=least - 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: best_stages(replace(chain(PLAIN, PLAIN), edges=[Edge(0, 1, 1), Edge(1, 0, 1)])),
         "layers 0 -> 1 -> 0 form a cycle"),
        (lambda: chain(Layer("bare", {})), "layer bare: no choices"),
        (lambda: chain(Layer("bare", {2: []})), "layer bare, degree 2: no choices"),
        (lambda: chain(PLAIN, microbatches=0), "microbatches: 0; expected a whole number"),
        (lambda: chain(PLAIN, devices=2.5), "devices: 2.5; expected a whole number"),
        (lambda: chain(PLAIN, bandwidth_bytes_per_s=0), "bandwidth_bytes_per_s: 0; expected"),
        (lambda: chain(PLAIN, memory_limit_bytes=math.nan), "memory_limit_bytes: nan; expected"),
        (lambda: chain(), "layers: there are none"),
        (lambda: replace(chain(PLAIN), edges=[Edge(0, 7, 1)]), "edge 0 -> 7: no layer 7"),
        (lambda: chain(Layer("odd", {1: [Choice(-1.0)]})), "layer odd, degree 1, choice 0: sec"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidInput, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_graphs_far_from_a_chain_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downsets, "MOST", 100)
    Downsets.of(6, [])
    with pytest.raises(InvalidInput, match="more than 100 sets of layers"):
        Downsets.of(7, [])


def test_plans_that_break_a_constraint_are_refused() -> None:
    problem = chain(PLAIN, PLAIN, memory_limit_bytes=80.0)
    one, two = Cut((0,), 1, 1, (0,)), Cut((1,), 1, 1, (0,))
    assert [stage.in_flight for stage in plan_of(problem, [one, two]).stages] == [2, 1]
    for cuts, message in (
        ([one], "every layer once"),
        ([two, one], "runs to an earlier stage"),
        ([replace(one, replicas=3), two], "3 replicas do not divide 4"),
        ([replace(one, replicas=4), two], "5 devices and 5 replicas"),
    ):
        with pytest.raises(InvalidInput, match=message):
            plan_of(problem, cuts)
    with pytest.raises(InvalidInput, match="holds 40 bytes"):
        plan_of(replace(problem, memory_limit_bytes=39.0), [one, two])


needs_piper = pytest.mark.skipif(
    not PIPER.exists(), reason="Piper's input is not beside this checkout"
)


@needs_piper
@pytest.mark.parametrize(("devices", "published"), [case[:2] for case in PIPER_OPTIMA])
def test_the_published_optimum(devices: int, published: float) -> None:
    problem = read_piper(PIPER, devices, 1920, 25 * 2**30, 8 * 2**30)
    assert best_stages(problem).seconds == pytest.approx(published, rel=1e-9)


@needs_piper
def test_more_memory_and_more_devices_are_never_slower() -> None:
    def seconds(devices: int, gib: float) -> float:
        return best_stages(read_piper(PIPER, devices, 1920, 25 * 2**30, gib * 2**30)).seconds

    by_memory = [seconds(64, gib) for gib in (4, 6, 10, 20, 80)]
    assert by_memory == sorted(by_memory, reverse=True)
    assert by_memory[0] > 1.2 * by_memory[-1]
    by_devices = [seconds(devices, 8) for devices in (8, 12, 16, 24, 32)]
    assert by_devices == sorted(by_devices, reverse=True)


def test_a_file_that_is_none_of_pipers(tmp_path: Path) -> None:
    path = tmp_path / "problem.json"
    for text, message in (
        ("{", "expected one of Piper's JSON files"),
        (json.dumps({"nodes": [{"id": 0}], "edges": []}), "no or a wrong 'TMPCs'"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidInput, match=message):
            read_piper(path)
