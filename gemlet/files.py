"""Files and folders that are written whole or not at all, and a full disk told in one sentence."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gemlet.errors import GemletError

_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of the text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Give the file this content: after a crash at any instant it has the old one or all of the new one."""
    with writing(path, len(data)), whole_file(path) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends, once all of it is on the disk.

    If the block fails nothing is left of the new file, and what was at `path` is as it was; after a crash there may be
    a hidden file beside it, which the next attempt replaces.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        remove(temporary)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of `path` when the block ends, once all of it is on the disk.

    If the block fails nothing is left of the new folder, and what was at `path` is as it was. A crash leaves at most
    hidden folders beside it, which `recover` clears away.
    """
    new, old = path.with_name(f".tmp-{path.name}"), path.with_name(f".old-{path.name}")
    remove(new)
    remove(old)
    try:
        new.mkdir(parents=True)
        yield new
        for parent, _, files in os.walk(new):
            for name in files:
                _sync(Path(parent, name))
            _sync(Path(parent))
        if os.path.lexists(path):  # a folder cannot be replaced in one move, but recover undoes the first of two
            os.rename(path, old)
        os.rename(new, path)
        _sync(path.parent)
    except BaseException:
        recover(path)
        raise
    remove(old)


@contextmanager
def new_folder(path: Path, needed: int) -> Iterator[Path]:
    """`whole_folder` at the user's wish: a path that is taken is refused, a disk that is full told in a sentence."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise GemletError(f"{path} is there already and not empty; give the name of a new folder")
    with writing(path, needed), whole_folder(path) as new:
        yield new


def recover(path: Path) -> None:
    """Clear away what a `whole_folder(path)` that did not end has left, and put back the old folder if it is gone."""
    remove(path.with_name(f".tmp-{path.name}"))
    old = path.with_name(f".old-{path.name}")
    if os.path.lexists(old) and not os.path.lexists(path):
        os.rename(old, path)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there; a folder that is in use on Windows may stay."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, needed: int) -> Iterator[None]:
    """Turn an `OSError` of the block, which writes about `needed` bytes to `path`, into a sentence for the user.

    Of nested blocks the outer one speaks: its path is the one that the user knows.
    """
    try:
        yield
    except (OSError, GemletError) as raised:
        error = raised.__cause__ if isinstance(raised, GemletError) else raised
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            reason += f" ({human_size(needed)} needed, {human_size(_free(path))} free); nothing that was there is lost"
            reason += ": free some space and try again"
        raise GemletError(f"cannot write {path}: {reason}") from error


def _free(path: Path) -> int:
    """Bytes free on the disk that holds, or would hold, `path`."""
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free


def human_size(size: int) -> str:
    """A number of bytes with one decimal, in GB, MB or kB."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if size >= u), (1e3, "kB"))
    return f"{size / unit:.1f} {name}"


def _sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names; Windows offers no such thing for folders."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
