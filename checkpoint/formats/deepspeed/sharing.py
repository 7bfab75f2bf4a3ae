"""How the ranks of an engine that is written for share experts: param groups, and who has which.

Engines want the experts' parameters in groups of their own (`moe`, called `ep_size_N`), and take
experts from files by the number of the MoE layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ....ir import InvalidInput
from ...contents import MASTER, Wanted
from .expert_names import in_all_experts, split_name

LAYERS = "moe_layers"
"""What experts' names begin with, in the order of the layers, as kept of a source."""

_GROUP_ELEMENTS = 178956971
"""Up to how many a group of experts has on a rank, unless the engine is told otherwise
(deepspeed/moe/utils.py, split_params_into_different_moe_groups_for_optimizer)."""

_SIZED = "ep_size_"

Groups = list[tuple[dict[str, Any], list[str]]]
"""(entries of a param group, its parameters)."""


@dataclass(frozen=True, slots=True)
class Own:
    """What a rank has of a group: `part` of the `parts` of its flat buffer, and the `names` that it
    gives the parameters in it, by those among all ranks."""

    parts: int
    part: int
    names: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Sharing:
    """Experts of each layer, and how many ranks share them (`ep_size`), by what their names begin
    with and in the order of the layers."""

    counts: Mapping[str, int] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    data_first: bool = False
    """Neighbouring ranks have the same experts."""

    def own(self, names: Sequence[str], data_rank: int, data_ranks: int) -> Own:
        """What a data rank has of a group of these parameters."""
        ranks = self.ranks.get(split_name(names[0])[0], 1) if names else 1
        parts = data_ranks // ranks
        rank, part = data_rank % ranks, data_rank // ranks
        if self.data_first:
            rank, part = data_rank // parts, data_rank % parts
        called = {name: self.called(name, rank) for name in names}
        return Own(parts, part, {name: own for name, own in called.items() if own is not None})

    def called(self, name: str, rank: int) -> str | None:
        """What an expert rank calls a parameter or buffer; None of another rank's experts."""
        layer, number, attribute = split_name(name)
        if not layer:
            return name
        own = self.counts[layer] // self.ranks[layer]
        return f"{layer}{number % own}{attribute}" if number // own == rank else None


def shared(
    groups: Groups, wants: Mapping[tuple[str, str], Wanted], mesh: Mapping[str, int],
    layers: Sequence[str], data_first: bool,
) -> tuple[Groups, Sharing]:  # fmt: skip
    """Param groups as the engine has them, and how ranks share what is in them.

    The axis `ep` of the mesh says how many ranks share the experts, else groups that are of experts
    already say it, else each rank has all. `layers` is their order, where it is known. Raises
    InvalidInput where experts and ranks do not fit together.
    """
    counts = _counts([name for _, name in wants], layers)
    if not counts:
        if mesh.get("ep", 1) > 1:
            raise InvalidInput(
                f"mesh ep={mesh['ep']}: DeepSpeed shares experts among ranks in models with its "
                "MoE layers alone (names with deepspeed_moe.experts.deepspeed_experts.E); leave "
                "ep out, or give the experts such names by --target-spec"
            )
        return [(_plain(entry), group) for entry, group in groups], Sharing()
    given = mesh.get("ep")
    made: Groups = []
    late: Groups = []
    sizes: dict[str, int] = {}
    for entry, group in groups:
        inside = [name for name in group if split_name(name)[0]]
        rest = [name for name in group if not split_name(name)[0]]
        if rest or not inside:
            made.append((_plain(entry), rest))
        if not inside:
            continue
        said = _said(entry)
        size = given or said or 1
        for name in inside:
            sizes.setdefault(split_name(name)[0], said or 0)
        named = {**entry, "name": f"{_SIZED}{size}", "moe": True}
        place = late if said is None or rest else made
        if size == said:
            place.append((named, inside))
        elif place and place[-1][0] == named:
            place[-1][1].extend(inside)
        else:
            place.append((named, inside))
    if given and len(set(sizes.values())) > 1:
        raise InvalidInput(
            f"mesh ep={given}: the source's MoE layers have several ep_size; leave ep out, then "
            "each keeps its own"
        )
    known = [said for said in sizes.values() if said]
    ranks = {layer: given or sizes.get(layer) or max(known, default=1) for layer in counts}
    _check(counts, ranks, mesh.get("dp", 1))
    sharing = Sharing(counts, ranks, data_first)
    return [one for group in (*made, *late) for one in _cut(group, wants, sharing)], sharing


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Of a group that is not of experts."""
    sized = str(entry.get("name", "")).startswith(_SIZED)
    return {k: v for k, v in entry.items() if k != "moe" and not (sized and k == "name")}


def _said(entry: Mapping[str, Any]) -> int | None:
    """The ranks that share the experts of a group, if it says so."""
    size = str(entry.get("name", "")).removeprefix(_SIZED)
    return int(size) if entry.get("moe") and size.isdigit() and int(size) else None


def _counts(names: Sequence[str], layers: Sequence[str]) -> dict[str, int]:
    """The experts of each layer; raises InvalidInput for numbers with gaps."""
    found: dict[str, set[int]] = {layer: set() for layer in layers}
    for layer, number, _ in map(split_name, names):
        if layer:
            found.setdefault(layer, set()).add(number)
    for layer, numbers in found.items():
        if numbers != set(range(len(numbers))):
            raise InvalidInput(f"{layer}…: the experts {sorted(numbers)}, expected 0, 1, …")
    return {layer: len(numbers) for layer, numbers in found.items() if numbers}


def _check(counts: Mapping[str, int], ranks: Mapping[str, int], data_ranks: int) -> None:
    for layer, size in ranks.items():
        if data_ranks % size or counts[layer] % size:
            raise InvalidInput(
                f"{layer}…: {counts[layer]} experts shared by ep={size} of dp={data_ranks} ranks; "
                "give a --mesh whose ep divides both, as dp=4,ep=2"
            )


def _cut(
    group: tuple[dict[str, Any], list[str]], wants: Mapping[tuple[str, str], Wanted],
    sharing: Sharing,
) -> Groups:  # fmt: skip
    """A group of experts as DeepSpeed cuts it: whole parameters of a rank, up to a size."""
    entry, names = group
    if not entry.get("moe"):
        return [group]
    own: dict[str, dict[str, None]] = {}
    size = sharing.ranks[split_name(names[0])[0]]
    for rank in range(size):
        for name in names:
            if called := sharing.called(name, rank):
                own.setdefault(called, {})[name] = None
    if some := [name for name, held in own.items() if len(held) != size]:
        raise InvalidInput(
            f"{some[0]}: in the param group of some experts only, which DeepSpeed-MoE cannot have; "
            "give it to all of them, or give the experts other names by --target-spec"
        )
    parts: list[list[str]] = [[]]
    held = 0
    for name in own:
        elements = prod(wants[MASTER, name].shape)
        if parts[-1] and held + elements > _GROUP_ELEMENTS:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += elements
    return [(entry, in_all_experts(part, own)) for part in parts]
