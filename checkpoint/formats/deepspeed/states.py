"""All files of a step, read in their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ....ir import CorruptCheckpoint
from .directory import Directory, Rank
from .experts import expert_states
from .reading import Found, Shapes, loaded, model_state, shapes_of
from .zero_states import optimizer_state


def states_of(directory: Directory, found: Found) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Reads all files, and gives (name, its dict without tensors) of each as it comes."""
    shapes: dict[Rank, list[Shapes]] = {}
    models = {name: loaded(directory, name, found.unread) for name in directory.model.values()}
    experts = expert_states(directory, found, models)
    for (rank, data_rank), name in sorted(directory.model.items()):
        state = models[name]
        _check_ranks(directory, state)
        shapes[rank, data_rank] = shapes_of(state, name)
        parts = directory.data_ranks if name.startswith("zero_") else 0
        model_state(found, rank, data_rank, state, name, parts)
        yield name, state
    for (rank, data_rank), name in sorted(directory.optimizer.items()):
        state = loaded(directory, name, found.unread)
        own = shapes.get((rank, data_rank), shapes[rank, 0])
        optimizer_state(found, (rank, data_rank), directory.data_ranks, own, state, name, experts)
        yield name, state


def _check_ranks(directory: Directory, state: Mapping[str, Any]) -> None:
    """As many optimizer states as the model states say."""
    data_ranks = state.get("dp_world_size")
    if directory.optimizer and data_ranks not in (None, directory.data_ranks):
        raise CorruptCheckpoint(
            f"{directory.path}: optimizer states of {directory.data_ranks} ranks, the model states "
            f"are of {data_ranks}; files are missing, or of different runs"
        )
