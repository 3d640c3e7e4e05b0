"""Writing a file: what stands at a path keeps its kind, its mode and its links, and a write that fails changes nothing.

A link is followed. A pipe, a device, a socket and a folder are refused, and so is a file into which this program's own
output goes. A file with one name is replaced as a whole: the new text is written beside it, and then takes its name,
its mode and its owner. What cannot be replaced without loss (a file with several names, of another owner, with an
access list, or in a folder in which nothing can be made) is written in place, and gets its old text back where that
fails.
"""

import errno
import os
import secrets
import stat
from functools import partial
from pathlib import Path

# Where a path leads


KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
OUTPUTS = 1, 2  # the program's own


def check_writable(path: Path | str) -> Path:  # where the text is to stand, links followed
    "The file that `path` leads to. ValueError says why nothing can be written there; nothing is touched."
    target = Path(path)
    try:
        target = Path(os.path.realpath(path))
        reason = _why_not(Path(path), target)
    except (OSError, ValueError) as error:  # a loop of links, too long a name
        reason = getattr(error, "strerror", None) or str(error)
    if reason:
        raise ValueError(f"{path} cannot be written: {reason}")
    return target


def _why_not(path: Path, target: Path) -> str:
    "Why nothing can be written; empty where it can. Raises OSError where the system does not say what stands there."
    try:
        found = path.stat()
    except FileNotFoundError:  # or a link to what is yet to be made
        if not target.parent.is_dir():
            return f"there is no folder {target.parent.name!r}; it must be a file in a folder that exists"
        return "" if _makes_files(target.parent) else f"nothing can be made in the folder {target.parent.name!r}"
    if not stat.S_ISREG(found.st_mode):
        return f"it is {KINDS.get(stat.S_IFMT(found.st_mode), 'something else')}; it must be a file"
    if any(_is_open(number, found) for number in OUTPUTS):
        return "this program's own output goes there; name another file"
    return "" if os.access(target, os.W_OK) else "it is write-protected"


def _is_open(number: int, found: os.stat_result) -> bool:
    "Whether what was found is behind the file descriptor of that number."
    try:
        return os.path.samestat(os.fstat(number), found)
    except OSError:  # closed
        return False


def _makes_files(folder: Path) -> bool:
    "Whether a file can be made in a folder."
    return os.access(folder, os.W_OK | os.X_OK)


# Writing


def write_text(path: Path | str, text: str) -> None:
    """Make `text`, as UTF-8, all that the file at `path` holds. Raises ValueError as `check_writable` does, OSError
    where the disk is full, say; then the file is what it was, or is not there.
    """
    target, data = check_writable(path), text.encode("utf8")
    found = target.stat() if target.exists() else None
    if found and not (_is_only_name(target, found) and _makes_files(target.parent)):
        _overwrite(target, data)
    else:
        _replace(target, data, found)


def _is_only_name(target: Path, found: os.stat_result) -> bool:
    "Whether a new file under this name would be all that the old one was: its owner, its rights, its only name."
    may = getattr(os, "geteuid", lambda: 0)()  # the root of the system may give files to anybody
    groups = {found.st_gid} if may == 0 else {os.getegid(), *os.getgroups()}
    return found.st_nlink == 1 and may in (0, found.st_uid) and found.st_gid in groups and not _notes(target)


def _notes(target: Path) -> list[str]:
    "Names of the access list and other notes that people attach to a file."
    try:
        names = getattr(os, "listxattr", lambda path: [])(target)
    except OSError:  # this kind of disk has none
        return []
    return [name for name in names if name.startswith(("user.", "system.posix_acl"))]


def _replace(target: Path, data: bytes, found: os.stat_result | None) -> None:
    "Write beside, then rename: a reader sees the old file or the new one."
    beside = target.with_name(f".mha-book-{os.getpid()}-{secrets.token_hex(4)}")
    private = partial(os.open, mode=0o600) if found else None  # nobody reads it before its mode is known
    try:
        with open(beside, "xb", opener=private) as file:
            if found:
                _liken(beside, found)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except OSError as error:
        if error.errno != errno.EBUSY or not found:  # busy: the file itself is mounted there, as containers do
            raise
        _overwrite(target, data)
    finally:
        beside.unlink(missing_ok=True)


def _liken(beside: Path, found: os.stat_result) -> None:
    "Owner, group and mode as they were found."
    now = beside.stat()
    if (now.st_uid, now.st_gid) != (found.st_uid, found.st_gid):
        os.chown(beside, found.st_uid, found.st_gid)
    os.chmod(beside, stat.S_IMODE(found.st_mode))


def _overwrite(target: Path, data: bytes) -> None:
    "Write into the file itself; where that fails, what it held is put back."
    with open(target, "r+b", buffering=0) as file:
        old = file.readall()
        try:
            _put(file, data)
        except BaseException:
            _put(file, old)
            raise


def _put(file, data: bytes) -> None:
    "Make `data` all that an open file holds. It is cut last, so that what it held finds its room again."
    file.seek(0)
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
    file.truncate(len(data))
    os.fsync(file.fileno())
