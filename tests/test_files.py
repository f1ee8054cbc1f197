"""Files are replaced in one step; the cache folder is where the user or the system wants it."""

import errno
import hashlib
import os
import sys

import pytest

from gpt_lightning.errors import UserError
from gpt_lightning.files import cache_dir, file_sha256, unused, write_atomically


def names(folder):
    return sorted(os.listdir(folder))


def test_the_target_is_the_old_file_until_the_block_ends(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    (tmp_path / ".a.tmp").write_bytes(b"half of a long file that a killed writer left")
    with write_atomically(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old" and names(tmp_path) == [".a.tmp", "a"]
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(error), write_atomically(path) as file:
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a"]


def refusing(real, error, times):
    """`real`, which raises `error` the first `times` times."""
    left = [error] * times
    return lambda *args: real(*args) if not left else (_ for _ in ()).throw(left.pop())


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync_will_do(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, OSError(number, "refused"), 1))
    with write_atomically(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_file_that_another_program_holds_is_replaced_later(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", refusing(os.replace, PermissionError(13, "held"), 3))
    with write_atomically(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and names(tmp_path) == ["a"]


def test_the_digest_is_that_of_the_whole_file(tmp_path):
    data = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(data)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


@pytest.mark.skipif(sys.platform != "linux", reason="the default folder of Linux")
def test_the_cache_is_the_user_s_or_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", "relative/cache")
    assert cache_dir() == tmp_path / "relative/cache" and cache_dir().is_dir()
    monkeypatch.delenv("GPT_LIGHTNING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "gpt_lightning"


def test_a_cache_that_cannot_be_created_is_a_users_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(UserError, match="set GPT_LIGHTNING_CACHE to a folder"):
        cache_dir()


def test_a_name_in_use_gets_a_number(tmp_path):
    path = tmp_path / "a.b.ckpt"
    for name in ("a.b.ckpt", "a.b-1.ckpt", "a.b-2.ckpt"):
        assert unused(path).name == name
        unused(path).touch()
