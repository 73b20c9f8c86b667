"""What is written appears whole or not at all, and what cannot be replaced is written in place."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fathom.files import atomic_directory, atomic_file, atomic_write, remove_leftovers


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fathom.files.os.fsync", no_space)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_and_nothing_stays(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'file'}'"),
        atomic_file(tmp_path / "file"),
    ):
        Path("/dev/full").write_bytes(b"x")
    with (
        pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'folder'}'"),
        atomic_directory(tmp_path / "folder"),
    ):
        Path("/dev/full").write_bytes(b"x")
    assert not list(tmp_path.iterdir())


def test_a_pipe_is_written_in_place(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    atomic_write(pipe, "through")
    assert reader.communicate(timeout=20)[0] == b"through"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root makes devices")
def test_a_device_stays_a_device(tmp_path: Path) -> None:
    null = tmp_path / "null"
    os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    atomic_write(null, "nothing")
    assert stat.S_ISCHR(null.stat().st_mode)


def test_standard_output_is_written_even_where_it_is_a_file(tmp_path: Path) -> None:
    code = "from pathlib import Path; from fathom.files import atomic_write; atomic_write(Path('/dev/stdout'), 'seen')"
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "seen"
    assert Path("/dev/stdout").is_symlink()


@pytest.mark.parametrize("path", [Path("/"), Path(".")])
def test_a_directory_is_no_file(path: Path) -> None:
    with pytest.raises(ValueError, match="is a directory; name a file"):
        atomic_write(path, "")


def test_a_directory_is_replaced_as_a_whole_but_for_what_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("old", "new"):
        with atomic_directory(target, replaced=("*.bin",)) as staging:
            (staging / f"{content}.bin").write_text(content)
            (staging / "config").write_text(content)
        (target / "notes").touch()
    assert sorted(path.name for path in target.iterdir()) == ["config", "new.bin", "notes"]
    assert (target / "config").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_leftovers_of_the_killed_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".data.abc.tmp").mkdir()
    (tmp_path / ".data.123.tmp").touch()
    for other in ("data.tmp", ".database.x.tmp", ".data"):
        (tmp_path / other).touch()
    remove_leftovers(tmp_path, "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data", ".database.x.tmp", "data.tmp"]


def test_leftovers_of_a_write_within_a_write_are_removed(tmp_path: Path) -> None:
    """As those of a model that is saved into the staging directory of a checkpoint."""
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_directory(tmp_path / "data") as staging,
        atomic_directory(staging) as nested,
    ):
        (nested / "config").touch()
        names = [path.name for path in tmp_path.iterdir()]
        raise KeyboardInterrupt
    assert len(names) == 2
    for name in names:
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path, "data")
    assert not list(tmp_path.iterdir())
