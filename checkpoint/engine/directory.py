"""Where a conversion writes: beside its target, in a directory that takes the target's name at the
very end. What is there under that name stays whole until then."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ...ir.errors import InvalidInput
from ..paths import within
from .files import folder_durable
from .journal import read

_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
_HERE = -100  # AT_FDCWD


class DiskFull(InvalidInput):
    """There is no room for the target (exit code 2). What was written stays; the same command goes
    on from there."""


@dataclass(frozen=True, slots=True)
class Place:
    """The target's path, the directory that is written, and the one for journals and ranks.

    `replaces`: whether what is there under the target's name may be replaced.
    """

    final: Path
    replaces: bool = False

    @property
    def partial(self) -> Path:
        return self.final.with_name(self.final.name + ".partial")

    @property
    def control(self) -> Path:
        return self.final.with_name(f".{self.final.name}.conversion")


def place(destination: Path, source: Path, overwrite: bool) -> Place:
    """Checks a target's path before anything is done. Raises InvalidInput where something is there
    already, or where it lies inside the source or the source inside it."""
    final = Path(os.path.abspath(destination))
    one, other = Path(os.path.realpath(final)), Path(os.path.realpath(source))
    if one == other or one in other.parents or other in one.parents:
        raise InvalidInput(f"{destination}: it is inside the source {source}, or the other way")
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise InvalidInput(f"{destination}: expected a directory, or a name that is free")
    at = Place(final, overwrite)
    if not overwrite and occupied(at) and finished_before(at) is None:
        raise exists_already(at)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"{final.parent}: cannot make it: {error.strerror}") from None
    return at


def occupied(at: Place) -> bool:
    """Whether something is there under the target's name."""
    return at.final.exists() and any(at.final.iterdir())


def exists_already(at: Place) -> InvalidInput:
    """The error for that."""
    return InvalidInput(f"{at.final} exists already; --overwrite replaces it at the end")


def finished_before(at: Place) -> str | None:
    """The fingerprint of the conversion that gave the target its name and was killed before it had
    cleared away its journal."""
    entries = read(at.control / "journal.0")
    inode = next((e["inode"] for e in reversed(entries) if "inode" in e), None)
    if inode is None or not at.final.exists() or at.final.stat().st_ino != inode:
        return None
    return str(entries[0].get("conversion"))


@contextmanager
def held(at: Place) -> Iterator[None]:
    """Keeps other processes away from a target while this one writes it; the kernel lets go when
    this one dies. File systems without locks are trusted.

    Raises InvalidInput where another process has it.
    """
    lock = at.control / "lock"
    while True:
        try:
            at.control.mkdir(exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"{at.control}: cannot make it: {error.strerror}") from None
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue  # who had it before clears away
        except OSError as error:
            raise InvalidInput(f"{lock}: cannot make it: {error.strerror}") from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InvalidInput(
                    f"{at.final}: another process converts to it; wait until it is done, or choose "
                    "another target"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
            if not _is_file(descriptor, lock):
                continue
            try:
                yield
            finally:
                if not any(at.control.glob("journal.*")):  # nothing to go on from
                    with suppress(OSError):
                        lock.unlink()
                        at.control.rmdir()
            return
        finally:
            os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def clear_journals(at: Place) -> None:
    """Removes the journals of a conversion that is over; the first one last."""
    for path in sorted(at.control.glob("journal.*"), reverse=True):
        path.unlink(missing_ok=True)


def clear_control(at: Place) -> None:
    """Removes journals and ranks' files; the first journal last, which says what was finished."""
    for path in at.control.glob("*"):
        if path.name != "journal.0":
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.rmtree(at.control, ignore_errors=True)


def check_room(at: Place, files: Mapping[str, int]) -> None:
    """Raises DiskFull where the disk has less free than the target takes (less what is there)."""
    needed = sum(files.values())
    for name in files:
        try:
            needed -= min((at.partial / name).stat().st_blocks * 512, files[name])
        except OSError:
            continue
    free = shutil.disk_usage(at.final.parent).free
    if needed > free:
        raise DiskFull(
            f"{at.final.parent}: {needed:,} bytes are needed, {free:,} are free; make room for "
            f"{needed - free:,} bytes more"
        )


def lay_out(at: Place, files: Mapping[str, int]) -> None:
    """Makes the directory and its files, each of its final size (what is there stays)."""
    at.partial.mkdir(exist_ok=True)
    for name, nbytes in files.items():
        path = within(at.partial, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(descriptor, nbytes)
        finally:
            os.close(descriptor)


def folders_durable(at: Place, files: Mapping[str, int]) -> None:
    """Waits until all names below the written directory are on the disk."""
    for folder in {at.partial, *(p for name in files for p in (at.partial / name).parents)}:
        if folder == at.partial or at.partial in folder.parents:
            folder_durable(folder)


def put_in_place(at: Place) -> None:
    """Gives the directory its name: what was there is exchanged for it in one step, then removed.

    Where the file system cannot exchange, the old one is moved aside first.
    """
    if not occupied(at):
        os.rename(at.partial, at.final)
    elif _exchange(at.partial, at.final):
        folder_durable(at.final.parent)
        shutil.rmtree(at.partial)
    else:
        aside = at.control / "replaced"
        os.rename(at.final, aside)
        os.rename(at.partial, at.final)
    folder_durable(at.final.parent)


def _exchange(one: Path, other: Path) -> bool:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done: int = rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)
    return done == 0


def no_space(error: OSError, at: Place) -> InvalidInput:
    """The named error for what writing raised."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"{at.partial}: no space left on the disk; make room and run the same command again, "
            "it goes on where this one stopped"
        )
    return InvalidInput(f"{at.partial}: cannot write: {error.strerror or error}")
