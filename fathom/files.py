"""Files and directories that appear, or replace older ones, only when they are complete."""

import errno
import fcntl
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` in one step."""
    with atomic_file(path) as aside, open(aside, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Where to write what becomes the file `path` when the block ends without an error: flushed, then renamed.

    A device or a pipe is itself that place. The error of a full disk names `path`. Raises ValueError for a directory.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name a file")
    if _is_written_in_place(path):
        yield path
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with full_disk_named(path, aside):
            yield aside
            sync(aside)
            os.replace(aside, path)
            sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def _is_written_in_place(path: Path) -> bool:
    """Whether `path` is a device or a pipe, or one of the links /dev/stdout and /dev/fd/1 to whatever is open."""
    in_dev = path.absolute().parent in (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))
    return path.exists() and (in_dev or not path.is_file())


@contextmanager
def atomic_directory(target: Path, replaced: Sequence[str] = ("*",)) -> Iterator[Path]:
    """An empty directory beside `target`, which takes its place when the block ends without an error.

    After an error, or a Ctrl-C, it is removed and `target` is unchanged. Of the files of an older directory those that
    match none of the patterns `replaced` are kept. The error of a full disk names `target`. Raises ValueError for a
    `target` that cannot be replaced.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; name a directory")
    target = target.resolve()
    if Path.cwd().is_relative_to(target):
        raise ValueError(f"{target} is the working directory or a parent of it, and cannot be replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = _temporary_sibling(target)
    try:
        os.chmod(staging, 0o755)
        with full_disk_named(target, staging):
            yield staging
            _replace(target, staging, replaced)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _temporary_sibling(target: Path) -> Path:
    # A staging directory's own sibling has no second dot, so that `remove_leftovers` finds it by the same name.
    return Path(tempfile.mkdtemp(prefix=f".{target.name.removeprefix('.')}.", suffix=".tmp", dir=target.parent))


def _replace(target: Path, staging: Path, replaced: Sequence[str]) -> None:
    """Give the staged directory the name `target`.

    Both are complete at any moment: directories are renamed, and the old one is deleted only after the new one has its
    name and the files that are kept.
    """
    if not target.exists():
        os.rename(staging, target)
    else:
        old = _temporary_sibling(target)
        os.rename(target, old)
        try:
            os.rename(staging, target)
        except BaseException:
            os.rename(old, target)
            raise
        for file in old.iterdir():
            if not any(map(file.match, replaced)) and not (target / file.name).exists():
                os.rename(file, target / file.name)
        shutil.rmtree(old)
    sync(target.parent)


def remove_leftovers(directory: Path, *names: str) -> None:
    """Delete what killed processes left of files and directories with these names, which may be patterns."""
    for name in names:
        for path in directory.glob(f".{name}.*tmp"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the kernel releases it when the process ends, however that happens.

    Raises ValueError, which names the holder, where another process has it. A file system without locks is a warning.
    """
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"{path.parent} is in use by {holder}: wait for it or end it, or name another") from error
        except OSError as error:
            warnings.warn(f"nothing keeps a second process out of {path.parent}: {error.strerror}", stacklevel=1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def full_disk_named(path: Path, aside: Path | None = None) -> Iterator[None]:
    """The error of a full disk or quota, where a failed write names no file, names `path`, and never `aside`."""
    try:
        yield
    except OSError as error:
        hidden = error.filename is None or (aside is not None and Path(error.filename).is_relative_to(aside))
        if hidden and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = str(path)
        raise
