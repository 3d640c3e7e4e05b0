"""Writing a file: links, modes, owners and names stay, what is no file is refused, and what fails changes nothing."""

import contextlib
import errno
import os
import resource
import socket
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from mha_book.bench import files
from mha_book.bench.files import check_writable, write_text
from support.mutants_files import WRITERS
from support.refusals import refused

pytestmark = pytest.mark.usefixtures("own_messages")
NEW = "new text: a√b\n"


@pytest.fixture
def old(tmp_path):
    "A file that is there already."
    path = tmp_path / "real" / "m.json"
    path.parent.mkdir()
    path.write_text("old")
    return path


# Links


def test_every_kind_of_link_leads_where_it_led(old, tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    links = {
        "absolute": (tmp_path / "a.json", old),
        "to a link": (tmp_path / "b.json", tmp_path / "a.json"),
        "relative": (tmp_path / "far" / "c.json", "../real/m.json"),
        "folder": (tmp_path / "folder", old.parent),
        "to what is not there": (tmp_path / "d.json", "real/later.json"),
    }
    for link, goal in links.values():
        link.symlink_to(goal)
    monkeypatch.chdir(tmp_path / "far")
    for path in ("../a.json", "../b.json", "c.json", "../folder/m.json", "../d.json"):
        write_text(path, path)
        assert Path(path).read_text(encoding="utf8") == path
    assert all(link.is_symlink() and os.readlink(link) == str(goal) for link, goal in links.values())
    assert old.read_text() == "../folder/m.json" and (old.parent / "later.json").read_text() == "../d.json"
    assert {path.name for path in old.parent.iterdir()} == {"m.json", "later.json"}, "nothing is left beside them"


def test_a_link_to_another_disk(tmp_path):
    far = Path("/dev/shm")  # a folder in memory
    if not (far.is_dir() and os.access(far, os.W_OK) and far.stat().st_dev != tmp_path.stat().st_dev):
        pytest.skip("there is no second disk")
    goal = far / f"mha-book-test-{os.getpid()}.json"
    (tmp_path / "m.json").symlink_to(goal)
    try:
        for text in ("first", NEW):  # the file is not there, and then it is
            write_text(tmp_path / "m.json", text)
            assert goal.read_text(encoding="utf8") == text and (tmp_path / "m.json").is_symlink()
    finally:
        goal.unlink()


# Modes, owners, names


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o666, 0o755])
def test_the_mode_stays(old, mode):
    old.chmod(mode)
    write_text(old, NEW)
    assert stat.S_IMODE(old.stat().st_mode) == mode and old.read_text(encoding="utf8") == NEW


def test_while_it_is_written_a_private_file_is_private(old, monkeypatch):
    old.chmod(0o600)
    seen, liken = [], files._liken
    monkeypatch.setattr(files, "_liken", lambda path, found: (seen.append(path.stat().st_mode), liken(path, found)))
    write_text(old, NEW)
    assert [stat.S_IMODE(mode) for mode in seen] == [0o600]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_that_new_files_have(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "m.json", NEW)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m.json").stat().st_mode) == 0o666 & ~mask


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_stays(old):
    os.chown(old, 1234, 2345)
    old.chmod(0o4640)  # a change of the owner takes the first digit away, unless the mode is set after it
    write_text(old, NEW)
    found = old.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 2345, 0o4640)


def in_place(path, text=NEW):
    "Whether writing keeps the file itself, not only its name."
    before = path.stat().st_ino
    write_text(path, text)
    assert path.read_text(encoding="utf8") == text
    assert [one.name for one in path.parent.iterdir() if one.name.startswith(".")] == []
    return path.stat().st_ino == before


def test_a_file_of_its_own_is_replaced_and_a_second_name_keeps_up(old):
    assert not in_place(old)
    twin = old.with_name("twin.json")
    os.link(old, twin)
    assert in_place(old, "longer than the old text was\n" * 9) and twin.read_text() == old.read_text()
    assert in_place(twin, "short") and old.read_text() == "short"


def test_what_a_new_file_could_not_be_is_written_in_place(old, monkeypatch):
    for name, value in (
        ("geteuid", lambda: os.stat(old).st_uid + 1),  # somebody else's file
        ("listxattr", lambda path: ["security.x", "user.note"]),
        ("access", lambda path, mode: path == old),  # nothing can be made beside it
    ):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, name, value)
            assert in_place(old), name
    monkeypatch.setattr(files.os, "listxattr", lambda path: ["security.x"])
    assert not in_place(old)


def test_a_group_that_is_not_ours_stays(old, monkeypatch):
    found = SimpleNamespace(st_nlink=1, st_uid=1234, st_gid=os.getegid())
    monkeypatch.setattr(files.os, "geteuid", lambda: 1234)
    assert files._is_only_name(old, found)
    found.st_gid = max([os.getegid(), *os.getgroups()]) + 1
    assert not files._is_only_name(old, found)


def test_a_file_that_is_mounted_by_itself_is_written_in_place(old, monkeypatch):
    def busy(*paths):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(files.os, "replace", busy)
    assert in_place(old)


# What is refused


def refuses(path, *words):
    "Both say why, in words, and neither touches anything."
    for act in (check_writable, lambda path: write_text(path, NEW)):
        with refused(ValueError, f"{path} cannot be written: ", *words):
            act(path)


def test_what_is_no_file_is_refused_and_stays(tmp_path):
    pipe, place, loop, end = (tmp_path / name for name in ("pipe", "socket", "loop", "end"))
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place))
    loop.symlink_to(end)
    end.symlink_to(loop)
    for path, words in (
        (pipe, "it is a pipe; it must be a file"),
        (tmp_path / "link", "it is a pipe"),
        (place, "it is a socket"),
        (tmp_path, "it is a folder"),
        (loop, os.strerror(errno.ELOOP)),
        (tmp_path / "none" / "m.json", "there is no folder 'none'"),
        (tmp_path / "pipe" / "m.json", os.strerror(errno.ENOTDIR)),
        (tmp_path / ("m" * 300), os.strerror(errno.ENAMETOOLONG)),
        (tmp_path / "m\0.json", "null"),
    ):
        refuses(path, words)
    assert stat.S_ISFIFO(pipe.lstat().st_mode) and stat.S_ISSOCK(place.lstat().st_mode) and loop.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "link", "socket", "loop", "end"}


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
def test_a_device_is_refused(monkeypatch, tmp_path, kind):
    path = tmp_path / "device"  # only said to be one
    monkeypatch.setattr(Path, "stat", lambda self, **options: SimpleNamespace(st_mode=kind | 0o666))
    refuses(path, "it is a device")


def test_a_file_that_this_program_prints_into_is_refused(old, monkeypatch):
    with old.open("a") as output:
        monkeypatch.setattr(files, "OUTPUTS", (output.fileno(),))
        refuses(old, "this program's own output goes there")
        check_writable(old.with_name("other.json"))
    check_writable(old)  # closed


def test_what_is_protected_is_refused(old, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    refuses(old, "it is write-protected")
    refuses(old.with_name("new.json"), "nothing can be made in the folder 'real'")
    assert old.read_text() == "old" and [*old.parent.iterdir()] == [old]


# What fails


@pytest.fixture(params=["replaced", "in place", "not there yet"])
def target(request, old):
    "A file that is written by each of the ways, and what it is to hold after a failure."
    if request.param == "in place":
        os.link(old, old.parent.parent / "second name")
    return (old, "old") if request.param != "not there yet" else (old.with_name("new.json"), None)


def is_as_it_was(path, text):
    there = path.read_text() if path.exists() else None
    assert there == text and {one.name for one in path.parent.iterdir()} <= {"m.json"}


@contextlib.contextmanager
def small_files():
    "No file may grow beyond 1000 bytes."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_changes_nothing(target):
    path, text = target
    with small_files(), pytest.raises(OSError) as error:
        write_text(path, "x" * 5000)
    assert error.value.errno == errno.EFBIG
    is_as_it_was(path, text)


def test_an_interruption_changes_nothing(target, monkeypatch):
    path, text = target
    signals = [KeyboardInterrupt()]

    def fsync(number):
        if signals:
            raise signals.pop()

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, NEW * 50)
    is_as_it_was(path, text)


def test_a_text_that_cannot_be_encoded_changes_nothing(target):
    with pytest.raises(UnicodeEncodeError):
        write_text(target[0], "\ud800")
    is_as_it_was(*target)


# Each of the wrong writers is noticed


def faults(write, folder):
    "What a writer breaks."
    names = "link", "mode", "second name", "full disk"
    paths = {name: folder / name.replace(" ", "-") for name in names}
    for path in paths.values():
        path.write_text("old")
        path.chmod(0o600)
    (folder / "to").symlink_to(paths["link"])
    os.link(paths["second name"], folder / "twin")
    os.mkfifo(folder / "pipe")
    write(folder / "to", NEW)
    for name in ("mode", "second name"):
        write(paths[name], NEW)
    with contextlib.suppress(OSError), small_files():
        write(paths["full disk"], "x" * 5000)
    reader = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)  # somebody who would read
    with contextlib.suppress(ValueError):
        write(folder / "pipe", NEW)
    right = {
        "link": (folder / "to").is_symlink() and paths["link"].read_text(encoding="utf8") == NEW,
        "mode": stat.S_IMODE(paths["mode"].stat().st_mode) == 0o600,
        "second name": (folder / "twin").read_text(encoding="utf8") == NEW,
        "full disk": paths["full disk"].read_text() == "old",
        "pipe": stat.S_ISFIFO((folder / "pipe").lstat().st_mode) and os.read(reader, 1) == b"",
    }
    os.close(reader)
    return {name for name, stays in right.items() if not stays}


def test_ours_breaks_nothing(tmp_path):
    assert faults(write_text, tmp_path) == set()


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_that_breaks_something_is_noticed(tmp_path, name):
    write, broken = WRITERS[name].apply()
    assert faults(write, tmp_path) >= broken
