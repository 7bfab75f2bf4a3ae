"""Where Megatron keeps the iterations of a run: `iter_0000010` beside a tracker of the newest."""

from __future__ import annotations

from pathlib import Path

from ....ir import InvalidInput

TRACKER = "latest_checkpointed_iteration.txt"


def iterations(root: Path) -> list[Path]:
    """The folders of all iterations, the one that the tracker names first."""
    found = sorted(root.glob("iter_*"), reverse=True)
    if (root / "release").is_dir():
        found.append(root / "release")
    newest = _tracked(root)
    return sorted(found, key=lambda folder: folder.name != newest)


def chosen(root: Path, tag: str, marker: str) -> Path:
    """The folder to read: `root` itself if it has a `marker` (a glob), or an iteration of it.

    Raises InvalidInput with the iterations that there are where `tag` is none of them, or where
    the tracker names one that is not there.
    """
    if any(root.glob(marker)) and not tag:
        return root
    found = iterations(root)
    said = ", ".join(folder.name for folder in found) or "none"
    if tag:
        names = {tag, f"iter_{int(tag):07d}"} if tag.isdigit() else {tag}
        for folder in found:
            if folder.name in names:
                return folder
        raise InvalidInput(f"{root}: no iteration {tag!r}; it has {said}")
    newest = _tracked(root)
    for folder in found:
        if folder.name == newest:
            return folder
    if newest is None and len(found) == 1:
        return found[0]
    if newest is None:
        raise InvalidInput(f"{root}: no {TRACKER}; choose one with --tag: {said}")
    raise InvalidInput(
        f"{root / TRACKER}: names {newest!r}, which is not there; choose one with --tag: {said}"
    )


def _tracked(root: Path) -> str | None:
    """The name of the folder that the tracker names."""
    try:
        said = (root / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return f"iter_{int(said):07d}" if said.isdigit() else said
