"""Paths that a checkpoint names: they stay inside its directory."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ..ir import CorruptCheckpoint


def within(root: Path, name: str) -> Path:
    """The path of a file that a checkpoint names.

    Raises CorruptCheckpoint for one that is not inside the checkpoint's directory: absolute, with
    `..`, or reached by a symbolic link that leads out; but to the `blobs` of a Hugging Face cache
    a snapshot of the same model may lead.
    """
    pure, path = PurePosixPath(name), root / name
    inside = not pure.is_absolute() and ".." not in pure.parts and "\0" not in name
    own = [root.resolve()]
    if own[0].parent.name == "snapshots":
        own.append(own[0].parent.parent / "blobs")
    real = path.resolve()
    if not inside or not any(real.is_relative_to(folder) for folder in own):
        raise CorruptCheckpoint(
            f"{root}: it names the file {name!r}, which is not inside its directory; nothing "
            "outside of it is read. If you trust it, copy the file in its place"
        )
    return path


def sizes(root: Path, pattern: str = "**/*") -> dict[str, int]:
    """The files below a directory, relative to it, with their sizes in bytes."""
    return {
        path.relative_to(root).as_posix(): within(root, path.relative_to(root).as_posix())
        .stat()
        .st_size
        for path in sorted(root.glob(pattern))
        if path.is_file()
    }
