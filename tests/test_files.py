"""Files and folders come into being whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from gemlet.errors import GemletError
from gemlet.files import recover, remove, whole_folder, write_bytes, write_text


def test_a_file_is_replaced(tmp_path: Path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "one")
    write_text(path, "two, ü")
    assert path.read_bytes() == "two, ü".encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(GemletError, match=r"cannot write .*a\.txt: No space left.*\(2\.5 MB needed, .* free\)"):
        write_bytes(path, bytes(2_500_000))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(GemletError, match=r"cannot write .*file.a\.txt: \w"):
        write_text(tmp_path / "file" / "a.txt", "one")


def test_a_folder_appears_at_the_end_of_the_block(tmp_path: Path):
    path = tmp_path / "deep" / "folder"
    with whole_folder(path) as new:
        (new / "a").touch()
        assert not path.exists()
    assert [p.name for p in path.iterdir()] == ["a"]
    with whole_folder(path) as new:
        (new / "b").touch()
        assert [p.name for p in path.iterdir()] == ["a"]
    assert [p.name for p in path.iterdir()] == ["b"]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int):
    path, rename, calls = tmp_path / "folder", os.rename, []
    with whole_folder(path) as new:
        (new / "a").touch()

    def fails_once(*names):
        calls.append(names)
        if len(calls) == failing:
            raise OSError(errno.EIO, "broken")
        rename(*names)

    monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises(OSError, match="broken"), whole_folder(path) as new:
        (new / "b").touch()
    with pytest.raises(KeyboardInterrupt), whole_folder(path) as new:
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [path] and [p.name for p in path.iterdir()] == ["a"]


def test_recover_takes_the_whole_one_of_two(tmp_path: Path):
    path, new, old = tmp_path / "folder", tmp_path / ".tmp-folder", tmp_path / ".old-folder"
    new.mkdir()
    (old / "a").mkdir(parents=True)
    recover(path)  # killed between the two moves
    assert list(tmp_path.iterdir()) == [path] and (path / "a").is_dir()
    (old / "b").mkdir(parents=True)
    recover(path)  # killed after them
    assert list(tmp_path.iterdir()) == [path] and (path / "a").is_dir()
    recover(path)
    assert list(tmp_path.iterdir()) == [path]


def test_remove_does_not_follow_links(tmp_path: Path):
    (tmp_path / "folder" / "a").mkdir(parents=True)
    try:
        (tmp_path / "link").symlink_to("folder")
    except OSError:
        pytest.skip("no symbolic links here")
    remove(tmp_path / "link")
    remove(tmp_path / "nothing")
    assert (tmp_path / "folder" / "a").is_dir() and not (tmp_path / "link").is_symlink()
