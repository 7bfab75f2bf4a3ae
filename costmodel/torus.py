"""A torus of devices, each linked to its neighbours, and what a group has of its links.

The devices of a torus level stand in a grid as near to a cube as their number allows, ranks in it
dim by dim, the smallest dim first. A dim closes into a ring where the machine has links for it,
otherwise it is a line. A group of ranks at one distance crosses dims one after the other; in each
it has `members`, `step` devices apart, and shares every link with the `step` groups in between.

    ring of c    both directions at once: 2 links' worth for each member, ⌊c/2⌋ hops
    line of c    its ends have one link, and all wait for them: 1 link's worth, c-1 hops

Several dims at once add up: the tensor is cut into as many parts, and each part goes through the
dims in an order of its own (Jain & Sabharwal 2010, bucket algorithms for tori; Austin et al. 2025,
How to Scale Your Model, ch. 3, for both formulas on TPUs). Of dims of unequal length this is the
bound that every device's own links set.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from pydantic import BaseModel, ConfigDict, Field


class Torus(BaseModel):
    """How the devices of a level are wired.

    A dim whose length is a multiple of `ring_devices` closes into a ring; with `whole_blocks`
    only where all dims are (links that close a ring leave through the faces of whole blocks).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dims: int = Field(ge=1, le=3)
    ring_devices: int = Field(ge=2)
    whole_blocks: bool = False

    @property
    def links_per_device(self) -> int:
        """Two for each dim."""
        return 2 * self.dims

    def shape(self, devices: int) -> tuple[int, ...]:
        """Length of each dim for so many devices, the smallest first: nearest to a cube.

        Example: 32 devices in three dims are 2 x 4 x 4.
        """
        return _nearest_cube(devices, self.dims)

    def rings(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """Which dims of that shape are rings."""
        closed = tuple(length % self.ring_devices == 0 for length in shape)
        return tuple(all(closed) for _ in shape) if self.whole_blocks else closed

    def spans(self, devices: int, size: int, stride: int) -> tuple[Span, ...]:
        """The dims that a group of `size` ranks at that stride crosses, of so many devices.

        Where it does not fill dims evenly it is taken for a line through the torus, each hop of
        it as long as the stride: the safe side.
        """
        shape = self.shape(devices)
        found: list[Span] = []
        apart, left = stride, size
        for length, ring in zip(shape, self.rings(shape), strict=True):
            if left == 1:
                break
            if apart % length == 0:
                apart //= length
                continue
            room = length // apart
            members = min(room, left)
            if length % apart or room % members or left % members:
                return (Span(size, _distance(shape, stride), False),)
            found.append(Span(members, apart, ring and members == room))
            apart, left = 1, left // members
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Span:
    """One dim of a torus as a group crosses it: `members` of it, `step` devices apart."""

    members: int
    step: int
    ring: bool

    @property
    def links(self) -> float:
        """Links' worth of bandwidth that a member sends on in this dim, others using theirs."""
        return (2 if self.ring else 1) / self.step

    @property
    def hops(self) -> int:
        """Links from a member to the farthest."""
        return self.step * (self.members // 2 if self.ring else self.members - 1)

    @property
    def cut_fraction(self) -> float:
        """Of an all-to-all's bytes, what crosses the middle of this dim in one direction."""
        half = self.members // 2
        return half * (self.members - half) / self.members**2


def exchange_s_per_byte(spans: tuple[Span, ...], size: int, link_bytes_per_s: float) -> float:
    """Seconds per byte of an all-to-all among the members of these spans, of a group of `size`.

    The bisection bound of the dim that is worst off: what must cross its middle in one direction,
    over the links that do. Routes dim by dim load all links of a dim alike, so it is reached
    (Dally & Towles 2004, §3.3; with one ring, a quarter of the all-gather: How to Scale Your
    Model, ch. 3). Every rank has bytes/size² for each other one.
    """
    units = prod(span.members for span in spans)
    return max(
        units * span.members * span.cut_fraction / size**2 / (span.links * link_bytes_per_s)
        for span in spans
    )


def _distance(shape: tuple[int, ...], stride: int) -> int:
    """Links from a device to the one that many ranks on, dim by dim."""
    hops = 0
    for length in shape[:-1]:
        hops += stride % length
        stride //= length
    return hops + stride


@lru_cache(maxsize=1024)
def _nearest_cube(devices: int, dims: int) -> tuple[int, ...]:
    """Factors of least sum, ascending."""
    if dims == 1:
        return (devices,)
    candidates = (
        (first, *_nearest_cube(devices // first, dims - 1))
        for first in range(1, int(devices ** (1 / dims) + 1e-9) + 1)
        if devices % first == 0
    )
    return min((tuple(sorted(shape)) for shape in candidates), key=sum)
