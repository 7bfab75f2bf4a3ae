"""Islands: runs of nodes with a device or a network of their own, and nodes that lag behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from ..ir.errors import InvalidInput
from .device import Device
from .levels import FROZEN, LevelChange
from .yaml_files import Misfit

NetworkKind = Literal["infiniband", "roce", "ethernet", "slingshot", "efa", "ici"]
"""What joins the nodes of an island. RDMA of one kind does not reach another: Holmes
(Yang et al., 2023) joins InfiniBand and RoCE islands over plain Ethernet."""


def _device_by_name(value: Any) -> Any:
    if isinstance(value, Mapping) and "preset" in value:
        name, changes = value["preset"], {k: v for k, v in value.items() if k != "preset"}
    elif isinstance(value, str):
        name, changes = value, {}
    else:
        return value
    try:
        return Device.preset(str(name)).model_dump() | changes if changes else Device.preset(name)
    except InvalidInput as error:
        raise ValueError(str(error)) from None


NamedDevice = Annotated[Device, BeforeValidator(_device_by_name)]
"""A device, which files may give by the name of its preset, or as `preset` and what differs."""


class Island(BaseModel):
    """`nodes` neighbouring nodes; what it does not give is the cluster's.

    `levels` says by name which of the cluster's levels differ here, and how.
    """

    model_config = FROZEN

    name: str = Field(min_length=1)
    nodes: int = Field(ge=1)
    device: NamedDevice | None = None
    network: NetworkKind | None = None
    levels: tuple[LevelChange, ...] = ()


class Degraded(BaseModel):
    """Nodes that are slower than their kind.

    `bandwidth_fraction` of the nominal is what their links to other nodes have left, where no
    measurement says it; `compute_fraction` is the same of their arithmetic.
    """

    model_config = FROZEN

    nodes: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    bandwidth_fraction: float = Field(default=1.0, gt=0, le=1)
    compute_fraction: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _says_something(self) -> Degraded:
        if self.bandwidth_fraction == 1 and self.compute_fraction == 1:
            raise Misfit(
                "is missing: expected it or compute_fraction, below 1", "bandwidth_fraction"
            )
        return self
