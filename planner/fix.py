"""`--fix` and `--layout`: the parts of a strategy that the user decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, get_args

from ..ir import InvalidInput
from ..ir.plan import ScheduleName

_CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"),
    "recompute": ("none", "selective", "full", "offload"),
    "attention": ("heads", "ulysses", "ring", "gather-kv", "tokenring"),
}
_DEGREES = ("pp", "vpp", "dp", "cp", "tp", "ep", "etp", "micro_batch", "zero_group",
            "gradient_group", "parameter_group")  # fmt: skip
KEYS = (*_DEGREES, "sp", "zero", "stages", *_CHOICES)


@dataclass(frozen=True, slots=True)
class Fix:
    """What is fixed; everything else is searched (None)."""

    pp: int | None = None
    dp: int | None = None
    tp: int | None = None
    zero: int | None = None
    micro_batch: int | None = None
    recompute: str | None = None
    schedule: str | None = None
    stages: tuple[int, ...] | None = None
    sp: bool | None = None
    vpp: int | None = None
    cp: int | None = None
    ep: int | None = None
    etp: int | None = None
    zero_group: int | None = None
    gradient_group: int | None = None
    parameter_group: int | None = None
    attention: str | None = None

    @staticmethod
    def parse(text: str | Mapping[str, Any] | None) -> Fix:
        """Reads `tp=8,pp=4,stages=8-8-7-9` (or a mapping). Raises InvalidInput naming the key."""
        if not text:
            return Fix()
        items: dict[str, Any] = {}
        if isinstance(text, str):
            for item in text.split(","):
                key, equals, value = (part.strip() for part in item.partition("="))
                if not equals or not value:
                    raise InvalidInput(f"--fix: {item!r}, expected key=value such as tp=8")
                if key in items:
                    raise InvalidInput(f"--fix: {key} is given twice")
                items[key] = value
        elif isinstance(text, Mapping):
            items = dict(text)
        else:
            raise InvalidInput(f"--fix: got {text!r}, expected text such as tp=8,pp=4 or a mapping")
        return Fix(**{key: value for key, value in _read(items).items() if key in _FIELDS})

    def with_defaults(self) -> Fix:
        """What `predict` and `verify` take for granted: 1 or the default where nothing is said."""
        return Fix(
            pp=self.pp or (len(self.stages) if self.stages else 1),
            dp=self.dp or 1,
            tp=self.tp or 1,
            zero=self.zero or 0,
            micro_batch=self.micro_batch,
            recompute=self.recompute or "none",
            schedule=self.schedule or "1f1b",
            stages=self.stages,
            sp=self.sp,
        )

    @property
    def beyond_backends(self) -> bool:
        """Whether something is fixed that no backend emits yet (`candidates.unemittable`)."""
        degrees = (self.vpp, self.cp, self.ep, self.etp)
        return (
            any((degree or 1) > 1 for degree in degrees)
            or self.schedule not in (None, "1f1b", "gpipe")
            or self.attention not in (None, "heads")
            or any(each is not None for each in self.zero_groups)
            or self.recompute == "offload"
        )

    @property
    def zero_groups(self) -> tuple[int | None, int | None, int | None]:
        """Ranks over which optimizer state, gradients and parameters are split; without the other
        two `zero_group` is that of all."""
        return self.zero_group, self.gradient_group, self.parameter_group

    @property
    def schedule_name(self) -> ScheduleName:
        """The schedule that is fixed, or the default for the virtual stages that are."""
        default: ScheduleName = "interleaved" if (self.vpp or 1) > 1 else "1f1b"
        return next((name for name in get_args(ScheduleName) if name == self.schedule), default)

    @property
    def degrees(self) -> tuple[int, int, int]:
        """(pp, dp, tp), 1 where nothing is fixed."""
        return self.pp or 1, self.dp or 1, self.tp or 1

    def __str__(self) -> str:
        shown = {f: getattr(self, f) for f in _FIELDS if getattr(self, f) is not None}
        return ", ".join(f"{key}={value}" for key, value in shown.items()) or "nothing"


_FIELDS = tuple(Fix.__dataclass_fields__)


def _read(items: Mapping[str, Any]) -> dict[str, Any]:
    readers: dict[str, Callable[[str, Any], Any]] = {
        **dict.fromkeys(_DEGREES, _degree),
        "zero": _zero,
        "sp": _switch,
        "stages": _stages,
        **dict.fromkeys(_CHOICES, _choice),
    }
    found: dict[str, Any] = {}
    for key, value in items.items():
        if key not in readers:
            near = get_close_matches(str(key).lower(), KEYS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InvalidInput(f"--fix: unknown key {key!r}{hint}; known: {', '.join(KEYS)}")
        found[key] = readers[key](key, value)
    stages, pp = found.get("stages"), found.get("pp")
    if stages and pp and len(stages) != pp * found.get("vpp", 1):
        raise InvalidInput(f"--fix: stages={value_of(stages)} has {len(stages)} stages, pp={pp}")
    _check_pairs(found)
    return found


def _check_pairs(found: Mapping[str, Any]) -> None:
    """Raises InvalidInput for parts that contradict each other whatever the model and cluster."""
    schedule, vpp, zero = (found.get(k) for k in ("schedule", "vpp", "zero"))
    _check_groups(found, zero)
    expected = {"interleaved": "2 or more", "zb-v": "2"}.get(schedule or "", "1")
    if schedule and vpp and (vpp < 2 if expected == "2 or more" else str(vpp) != expected):
        raise InvalidInput(
            f"--fix: vpp={vpp} with schedule={schedule}, which has {expected} virtual stages on a "
            "rank"
        )
    if found.get("pp") == 1 and schedule in ("interleaved", "zb-h1", "zb-v"):
        raise InvalidInput(f"--fix: schedule={schedule} with pp=1, expected two ranks or more")
    attention, cp = found.get("attention"), found.get("cp")
    if cp and attention and (attention == "heads") != (cp == 1):
        expected = "heads" if cp == 1 else "another than heads"
        raise InvalidInput(f"--fix: attention={attention} with cp={cp}, expected {expected}")


def _check_groups(found: Mapping[str, Any], zero: int | None) -> None:
    """Raises InvalidInput for groups of state that the ZeRO stage does not split, or that are not
    nested."""
    names = (("zero_group", 1), ("gradient_group", 2), ("parameter_group", 3))
    for name, least in names:
        if zero is not None and zero < least and name in found:
            what = "without ZeRO" if zero == 0 else f"with zero={zero}"
            expected = {1: "zero=1, 2 or 3", 2: "zero=2 or 3", 3: "zero=3"}[least]
            raise InvalidInput(f"--fix: {name}={found[name]} {what}, expected {expected}")
    given = [(name, found[name]) for name, _ in names if name in found]
    for (outer, most), (inner, size) in pairwise(given):
        if most % size:
            raise InvalidInput(
                f"--fix: {inner}={size} does not divide {outer}={most}: groups are nested"
            )


def value_of(stages: tuple[int, ...]) -> str:
    """`8-8-7-9`."""
    return "-".join(map(str, stages))


def _degree(key: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or str(number) != str(value):
        raise InvalidInput(f"--fix: {key}={value}, expected a whole number of at least 1")
    return number


def _zero(key: str, value: Any) -> int:
    if str(value) not in ("0", "1", "2", "3"):
        raise InvalidInput(f"--fix: {key}={value}, expected 0, 1, 2 or 3")
    return int(value)


def _switch(key: str, value: Any) -> bool:
    if str(value) not in ("0", "1", "True", "False"):
        raise InvalidInput(f"--fix: {key}={value}, expected 0 or 1")
    return str(value) in ("1", "True")


def _stages(key: str, value: Any) -> tuple[int, ...]:
    try:
        parts = value.split("-") if isinstance(value, str) else list(value)
        counts = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        counts = (-1,)
    if not counts or min(counts) < 0:
        raise InvalidInput(f"--fix: {key}={value}, expected layers per stage such as 8-8-7-9")
    return counts


def _choice(key: str, value: Any) -> str:
    if value not in _CHOICES[key]:
        raise InvalidInput(f"--fix: {key}={value}, expected one of {', '.join(_CHOICES[key])}")
    return str(value)
