"""The layers of a PipelineModule: files of their own, with names that begin in each.

`layer_NN-model_states.pt` (`layer_NN-model_TT-…` with tensor ranks) is the state dict of one layer;
the optimizer calls its parameters `NN.ATTRIBUTE`, and those of tied layers, whatever their numbers,
`tied_modules.KEY.ATTRIBUTE`. Model states say which stage has which; these names are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....ir import CorruptCheckpoint
from ...contents import BUFFER, WEIGHT
from ...pickles import Tensor
from .directory import Directory, Rank
from .reading import Found, loaded_file, shapes_of

_TIED = "tied_modules."


def layer_states(
    directory: Directory, found: Found, models: Mapping[Rank, tuple[str, Mapping[str, Any]]]
) -> None:
    """Reads the files of all layers; `models` are (file, model states) by rank.

    Raises CorruptCheckpoint where a layer of which the model states speak has no file.
    """
    if not directory.layers:
        return
    tensor_ranks = 1 + max(rank for _, rank in directory.layers)
    stages: dict[str, int] = {}
    buffers: set[str] = set()
    for (rank, _), (file, state) in sorted(models.items()):
        names = {name for group in shapes_of(state, file) for name in group}
        names |= set(state.get("frozen_param_shapes") or ())
        own = set(state.get("buffer_names") or ())
        buffers |= own
        for name in names | own:
            stages.setdefault(name, rank // tensor_ranks)
    numbers = {int(name.partition(".")[0]) for name in stages if name[0].isdigit()}
    for number in sorted(numbers):
        for rank in range(tensor_ranks):
            if (number, rank) not in directory.layers:
                raise CorruptCheckpoint(
                    f"{directory.path}: the file of layer {number} of tensor rank {rank} is "
                    "missing (layer_…-model_states.pt), the model states name its parameters; "
                    "restore it from another copy, or choose an earlier step with --tag"
                )
    for (number, rank), file in sorted(directory.layers.items()):
        state = loaded_file(directory.path, file, found.unread, None)
        for attribute, tensor in state.items():
            if not isinstance(tensor, Tensor):
                continue
            name = f"{number}.{attribute}"
            if name not in stages:
                tied = [n for n in stages if n.startswith(_TIED) and n.endswith(f".{attribute}")]
                if len(tied) > 1:  # which of them is not said: the optimizer has the values
                    continue
                name = tied[0] if tied else name
            at = stages.get(name, 0) * tensor_ranks + rank
            found.tensor((BUFFER if name in buffers else WEIGHT, name), at, tensor, file)
