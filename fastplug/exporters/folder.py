"""A folder that appears under its final name whole, or not at all.

Everything is written into a hidden sibling, ``.<name>.partial-<random>``, which shares the file system with the final
name, is flushed to the disk, and is then renamed: a rename is atomic, so a full disk, an exception or a kill can leave
a hidden partial folder behind (after a kill) but never a half-written one that looks finished.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fastplug.exporters.api import ExportError

logger = logging.getLogger("fastplug")

MANIFEST = "SHA256SUMS"
# Overwriting deletes a folder, so it must be one that an export or a save_pretrained wrote.
_MARKERS = ("fastplug.json", "config.json", "adapter_config.json")


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to write into; on a clean exit it becomes ``path``, on an exception it is removed.

    Args:
        path: The final folder. Parent folders are made.
        overwrite: Replace an existing folder, if it holds a model or an adapter. On Linux the two folders change
            places in one step; elsewhere there is a moment in which neither has the name.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is false, or it is not a folder that fastplug may delete.
        PermissionError: The parent folder cannot be written.
        OSError: No space is left (``ENOSPC``, ``EDQUOT``).
    """
    final = Path(os.path.abspath(os.path.expanduser(path)))
    _check_target(final, overwrite)
    for left in sorted(final.parent.glob(f".{final.name}.partial-*")):
        logger.warning("fastplug: %s was left by an export that was killed; delete it unless one is running", left)
    partial = final.parent / f".{final.name}.partial-{secrets.token_hex(4)}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise type(error)(
            error.errno,
            f"fastplug: cannot write into {final.parent} ({error.strerror}); choose a writable folder",
        ) from error
    try:
        yield partial
        sync_tree(partial)
        _publish(partial, final, overwrite)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and "fastplug:" not in str(error):
            raise OSError(
                error.errno,
                f"fastplug: no space left on the disk of {final.parent}; nothing was written as {final}. "
                "Free some space or export to another disk",
            ) from error
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_target(final: Path, overwrite: bool) -> None:
    if not os.path.lexists(final):
        return
    if not final.is_dir() or final.is_symlink():
        raise FileExistsError(errno.EEXIST, f"fastplug: {final} exists and is not a folder; choose another name")
    if not any(final.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            errno.EEXIST, f"fastplug: {final} exists; choose another name, or pass overwrite=True to replace it"
        )
    if not any((final / marker).is_file() for marker in _MARKERS):
        raise FileExistsError(
            errno.EEXIST,
            f"fastplug: {final} holds neither a model nor an adapter, so it is not replaced; "
            "delete it yourself or choose another name",
        )


def _publish(partial: Path, final: Path, overwrite: bool) -> None:
    _check_target(final, overwrite)  # another process may have written it meanwhile
    if not final.is_dir() or not any(final.iterdir()):
        if final.is_dir():
            final.rmdir()
        os.rename(partial, final)
        _sync(final.parent)
        return
    if _exchange(partial, final):
        _sync(final.parent)
        shutil.rmtree(partial, ignore_errors=True)
        return
    old = final.parent / f".{final.name}.old-{secrets.token_hex(4)}"
    os.rename(final, old)
    try:
        os.rename(partial, final)
    except BaseException:
        os.rename(old, final)
        raise
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (``renameat2`` with ``RENAME_EXCHANGE``); False where the system has no such call."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder under ``folder`` to the disk, so that the rename never outruns the data."""
    for directory, _, names in os.walk(folder):
        for name in names:
            _sync(Path(directory, name))
        _sync(Path(directory))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_files(folder: Path) -> tuple[str, ...]:
    """Names of all files under ``folder``, relative to it, with ``/``, sorted."""
    return tuple(sorted(item.relative_to(folder).as_posix() for item in folder.rglob("*") if item.is_file()))


def write_manifest(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write ``SHA256SUMS`` over all files of ``folder``, in the format of ``sha256sum -c``.

    Args:
        folder: The folder.
        known: Digests already computed while writing, by name; the other files are read.
    """
    known = known or {}
    lines = [
        f"{known.get(name) or digest_of(folder / name)}  {name}\n" for name in list_files(folder) if name != MANIFEST
    ]
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")


def verify_manifest(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of the files in ``folder`` that are missing or differ from its ``SHA256SUMS``; empty when all is well.

    Raises:
        ExportError: There is no manifest, or it names a file outside of the folder.
    """
    root = Path(folder)
    if not (root / MANIFEST).is_file():
        raise ExportError(f"fastplug: {root} has no {MANIFEST}, so there is nothing to check it against")
    wrong = []
    for line in (root / MANIFEST).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        file = root / name
        if not file.resolve().is_relative_to(root.resolve()):
            raise ExportError(f"fastplug: {root / MANIFEST} names {name!r}, which lies outside of the folder")
        if not file.is_file() or digest_of(file) != digest:
            wrong.append(name)
    return tuple(wrong)


def digest_of(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
