"""Patterns of names: `decoder.layers.{i}.weight`, where `{i}` is a number and `{rest*}` any text.

Names differ in little but their numbers, so they are grouped by what is left without them; a
pattern of numbers alone is then one look into a table, however many names there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

Captures = dict[str, str]

_CAPTURE = re.compile(r"\{(\w+)(\*?)\}")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Pattern:
    """A pattern of names; `{i}` twice means the same number twice."""

    text: str

    @cached_property
    def numbers(self) -> tuple[str, ...]:
        """The captures of numbers, in order of their first place."""
        return tuple(dict.fromkeys(m[1] for m in _CAPTURE.finditer(self.text) if not m[2]))

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The captures of text."""
        return tuple(dict.fromkeys(m[1] for m in _CAPTURE.finditer(self.text) if m[2]))

    @cached_property
    def template(self) -> str:
        """The pattern with `#` for every number."""
        return _NUMBER.sub("#", _CAPTURE.sub("#", self.text))

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        written, at = "", 0
        seen: set[str] = set()
        for match in _CAPTURE.finditer(self.text):
            written += re.escape(self.text[at : match.start()])
            at = match.end()
            kind = ".+" if match[2] else r"\d+"
            written += f"(?P={match[1]})" if match[1] in seen else f"(?P<{match[1]}>{kind})"
            seen.add(match[1])
        return re.compile(written + re.escape(self.text[at:]))

    def match(self, name: str) -> Captures | None:
        """What the captures are in a name, or None if it is no such name."""
        found = self._regex.fullmatch(name)
        return None if found is None else found.groupdict()

    def filled(self, captures: Mapping[str, str | int]) -> str:
        """The text with those captures filled in that are given."""
        return _CAPTURE.sub(
            lambda m: str(captures[m[1]]) if m[1] in captures else m[0],
            self.text,
        )


def template(name: str) -> str:
    """A name with `#` for every number in it."""
    return _NUMBER.sub("#", name)


class Names:
    """Names by their templates."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_template: dict[str, list[str]] = {}
        for name in names:
            self._by_template.setdefault(template(name), []).append(name)

    def __contains__(self, name: str) -> bool:
        return name in self._by_template.get(template(name), ())

    def matching(self, pattern: Pattern) -> list[tuple[str, Captures]]:
        """All names of a pattern, with what the captures are."""
        if pattern.texts:
            listed: Iterable[str] = (n for ns in self._by_template.values() for n in ns)
        else:
            listed = self._by_template.get(pattern.template, ())
        matched = ((name, pattern.match(name)) for name in listed)
        return [(name, captures) for name, captures in matched if captures is not None]
