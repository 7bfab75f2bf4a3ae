"""What an attention mask is: found by evaluating it, not by how it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import UnsupportedOp
from .dims import elements
from .draft import Wire, ancestors
from .evaluate import Array, NoValue, Settings, equal

_SMALL = 64
"""Windows up to this size are evaluated as they are, larger ones shrunk to `_STANDIN`."""
_STANDIN = 5
_LARGEST = 8192

_SUPPORTED = (
    "supported are causal masks, sliding windows, and a padding mask given as a model input "
    "[batch, keys] (1: attend)"
)


@dataclass(frozen=True, slots=True)
class Mask:
    """`window`: keys at a distance below it; `padding`: the input that masks keys."""

    causal: bool
    window: int | None = None
    padding: Wire | None = None


def classify(
    mask: Wire,
    additive: bool,
    inverted: bool,
    make: Settings,
    module: str,
    arrange: Callable[[Array], Array] | None = None,
    keys: tuple[int | str, ...] | None = None,
) -> Mask:
    """Says what a mask lets through.

    `arrange` brings its values to [batch, heads, queries, keys] (they are, by default); `keys` is
    the size of its dim of keys (the last, by default).

    `additive` masks are added to the scores (0: attend, very negative: not); others are bool, True
    meaning attend, or with `inverted` the opposite. Raises UnsupportedOp for any other mask.
    """
    where = f"attention at {module or 'the top level'}"
    inputs = [w for w in ancestors([mask]) if w.role == "input"]
    if mask.carried or mask.source is None:
        raise UnsupportedOp(f"{where}: its mask is computed from activations; {_SUPPORTED}")
    constants = make.constants(mask.source)
    small = [c for c in constants if c <= _SMALL]
    large = sorted(c for c in constants if c > _SMALL)
    standins = {c: _STANDIN + 4 * i for i, c in enumerate(large)}
    size = max([8, *small, *standins.values()]) + 5
    stored = [w for w in ancestors([mask]) if w.role == "constant"]
    size = max([size, *(elements(dim) for w in stored for dim in w.dims)])  # it may hold a window
    if size > _LARGEST:
        raise UnsupportedOp(
            f"{where}: a mask stored for {size} positions, at most {_LARGEST} can be checked; make "
            "it in forward instead"
        )
    last = mask.dims[-1:] if keys is None else (keys,)
    fixed = [n for dim in last for n in dim if isinstance(n, int)]
    size = fixed[0] if fixed else size

    def allowed(seed: int, **given: Array) -> Array:
        try:
            evaluation = make(b=2, s=size, seed=seed, substitute=standins, known=None, **given)
            value = evaluation(mask.source)
        except NoValue:
            raise UnsupportedOp(f"{where}: its mask cannot be evaluated; {_SUPPORTED}") from None
        value = value if arrange is None else arrange(value)
        return _as_bool(value, additive, inverted, where)

    plain = allowed(0)
    if not _constant_over_batch(plain) or not equal(plain, allowed(1)):
        raise UnsupportedOp(f"{where}: its mask depends on the inputs' values; {_SUPPORTED}")
    band = plain.reshape(-1, *plain.shape[-2:])[0]
    form = _band(band, standins, where)
    padding = [w for w in inputs if _masks_keys(w, plain, allowed)]
    if len(padding) > 1:
        raise UnsupportedOp(f"{where}: several inputs mask keys; {_SUPPORTED}")
    return Mask(form.causal, form.window, padding[0] if padding else None)


def _as_bool(value: Array, additive: bool, inverted: bool, where: str) -> Array:
    if value.ndim < 2:
        raise UnsupportedOp(f"{where}: a mask of shape {tuple(value.shape)}; {_SUPPORTED}")
    if value.dtype == np.bool_ or not additive:
        return ~value.astype(bool) if inverted else value.astype(bool)
    if not bool(((value == 0) | (value <= -1e4)).all()):
        raise UnsupportedOp(
            f"{where}: a mask that is added, neither 0 nor very negative (a bias); {_SUPPORTED}"
        )
    return np.asarray(value == 0)


def _constant_over_batch(allowed: Array) -> bool:
    flat = allowed.reshape(-1, *allowed.shape[-2:])
    return bool((flat == flat[:1]).all())


def _band(allowed: Array, standins: Mapping[int, int], where: str) -> Mask:
    """Reads causality and window off a [s, s] mask; the window is named by the constant it came
    from where that was replaced."""
    rows, columns = allowed.shape
    if rows == 1 and bool(allowed.all()):
        return Mask(False)
    behind = np.arange(rows)[:, None] - np.arange(columns)[None, :]
    causal = not bool((allowed & (behind < 0)).any())
    reach = int(np.abs(behind[allowed]).max()) + 1 if bool(allowed.any()) else 0
    want = np.abs(behind) < reach
    if causal:
        want &= behind >= 0
    if rows != columns or not equal(allowed, want):
        raise UnsupportedOp(f"{where}: a mask of another form; {_SUPPORTED}")
    if reach == rows:
        return Mask(causal)
    for real, standin in standins.items():
        if abs(reach - standin) <= 1:
            return Mask(causal, reach - standin + real)
    return Mask(causal, reach)


def _masks_keys(wire: Wire, plain: Array, allowed: object) -> bool:
    """Whether an input [b, t] with zeros takes away exactly those keys."""
    if wire.rank != 2 or wire.is_float:
        return False
    size = plain.shape[-1]
    mask = np.ones((2, size), bool)
    mask[0, size - 3 :] = False
    mask[1, 2] = False
    assert callable(allowed)
    have = allowed(0, **{wire.name: mask if wire.dtype == "bool" else mask.astype(wire.dtype)})
    if equal(have, plain):
        return False
    want = plain & mask[:, None, None, :]
    if want.shape != have.shape:
        have = np.broadcast_to(have, want.shape)
    rows = want.any(-1)  # rows that may look at nothing are nobody's business
    if equal(have[rows], want[rows]):
        return True
    raise UnsupportedOp(f"input {wire.name!r} masks attention in another form; {_SUPPORTED}")
