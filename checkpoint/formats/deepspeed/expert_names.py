"""What DeepSpeed-MoE calls the parameters of expert E.

In files of experts, E counts those of all ranks; in what ranks say of themselves, those of the own
rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import groupby

DATA_FIRST = "use_data_before_expert_parallelism"
"""Of DeepSpeed's config: neighbouring ranks have the same experts, and not different ones."""

_NAME = re.compile(r"(.*\.deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..+)")


def split_name(name: str) -> tuple[str, int, str]:
    """(what the layer's experts begin with, the expert, the parameter in it); ("", 0, name) of
    what is in no expert."""
    found = _NAME.fullmatch(name)
    return (found[1], int(found[2]), found[3]) if found else ("", 0, name)


def in_all_experts(names: Iterable[str], known: Mapping[str, Iterable[str]]) -> list[str]:
    """The parameters of a group in the order of the whole model: for those that a rank gives its
    own experts, those that they have on all ranks (`known`), layer by layer."""
    found: list[str] = []
    for layer, some in groupby(names, lambda name: split_name(name)[0] if name in known else ""):
        own = list(some)
        if layer:
            by_rank = zip(*(known[name] for name in own), strict=True)
            found += [name for rank in by_rank for name in rank]
        else:
            found += own
    return found
