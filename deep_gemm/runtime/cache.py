"""Compiled kernels on disk, by the hash of all that went into them.

An entry is a directory <root>/<name>.<first 32 hex digits of the key>/ holding a few files and manifest.json: the
whole key, a few words about them, the SHA-256 of every file, and that of the manifest itself. It is written beside its
place, flushed and renamed into it, so a reader sees a whole entry or none, whoever is killed when, and whether the
power stays or not. Nothing in it names a path or a time: the root can be moved or copied.

What is loaded runs in this process, and nobody who can write a cubin is kept from writing its checksum. So nothing is
taken from, or put into, what others than this user and root own or can write to.

The cache never stands in the way: a damaged entry is a miss and is replaced, and where nothing can be written the
caller works from memory. Either is said once, through logging.

All that is asked of a file system, be it local or NFS: one step makes a name that is not there yet (mkdir, O_EXCL), and
one step renames a directory. Locks (flock) only save work: where they are missing or fail, two compile the same.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import FileLock

LEFTOVER_SECONDS = 3600.0  # older than this, a folder that was being filled is nobody's
LOCK_SECONDS = 60.0  # a holder that is stopped or hangs must not stop the others: compiling twice does no harm
POLL_SECONDS = 0.01

_ENTRY = re.compile(r"[^.].*\.[0-9a-f]{32}")
_ASIDE = re.compile(r"\.[^.].*\.[0-9a-f]{32}\.[a-z0-9_]{8}")  # where entries are made and deleted; mkdtemp's names
_LOCK = re.compile(r"\.[^.].*\.[0-9a-f]{32}\.lock")
_UNSOUND = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what reading raises where there is damage

_logger = logging.getLogger("deep_gemm")
_said: set[Path] = set()


def say_once(about: Path, message: str) -> None:
    """Warns, through logging, if nothing has been said about that yet."""
    if about not in _said:
        _said.add(about)
        _logger.warning(message)


class _Untrusted(Exception):
    """Others than this user and root can have put there what they like. Says where, why that matters, the remedy."""


@dataclass(frozen=True)
class Entry:
    """What is known of an entry without its files.

    key: of a faulty entry only the first 32 digits. about: as stored. bytes: of all its files. made: the manifest's
    mtime, in seconds since 1970; 0 where there is no manifest. fault: why it is not used, if it is not. damaged:
    whether it is of no use to anyone.
    """

    path: Path
    name: str
    key: str
    about: dict[str, str]
    bytes: int
    made: float
    fault: str | None
    damaged: bool


@dataclass(frozen=True)
class _Content:
    key: str
    about: dict[str, str]
    files: dict[str, bytes]


@dataclass(frozen=True)
class Cache:
    """A store of small sets of files under one root directory.

    trusted: use it whoever owns it or can write to it. public: let all users read what is written, whatever the umask.
    """

    root: Path
    trusted: bool = False
    public: bool = False

    def entry(self, name: str, key: str) -> Path:
        """The directory of an entry, whether it exists or not."""
        return self.root / f"{name}.{key[:32]}"

    def load(self, name: str, key: str) -> dict[str, bytes] | None:
        """The files of an entry, or None where there is no sound one that can be trusted."""
        entry = self.entry(name, key)
        try:
            content = self._read(entry, key)
            return content.files if content else None
        except _Untrusted as reason:
            say_once(self.root, f"deep_gemm: {reason}")
        except PermissionError as error:
            remedy = "set DG_JIT_CACHE_DIR to a folder of yours"
            say_once(self.root, f"deep_gemm: cache entry {entry} cannot be read ({error.strerror}): {remedy}")
        except _UNSOUND as error:
            say_once(entry, f"deep_gemm: cache entry {entry} is damaged and not used: {error!r}")
        return None

    def store(self, name: str, key: str, files: Mapping[str, bytes], about: Mapping[str, str] = {}) -> None:
        """Publishes an entry in one step. A sound entry that is there already, and holds as much, stays.

        about: a few words for whoever looks at the cache.
        """
        entry = self.entry(name, key)
        digests = {file: _sha256(content) for file, content in files.items()}
        manifest = _sealed({"key": key, "about": dict(about), "sha256": digests})
        if self._is_refused():
            return
        with self._or_from_memory():
            self._create_root()
            if files.keys() <= (self.load(name, key) or {}).keys():
                return
            for folder in filter(_is_old, self._all(_ASIDE)):
                shutil.rmtree(folder, ignore_errors=True)
            with self._aside(entry) as folder:
                fresh = folder / "new"
                self._create(fresh)
                for file, content in {**files, "manifest.json": manifest}.items():
                    self._write(fresh / file, content)
                _flush(fresh)
                with contextlib.suppress(FileNotFoundError):
                    entry.rename(folder / "old")
                try:
                    fresh.rename(entry)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another was first: ours is discarded
                        raise

    @contextlib.contextmanager
    def lock(self, name: str, key: str) -> Generator[None, None, None]:
        """Keeps other processes from compiling the same entry; at most for LOCK_SECONDS, and only if files can be."""
        with contextlib.ExitStack() as stack:
            if not self._is_refused():
                with self._or_from_memory():
                    self._create_root()
                    if lock := _locked(self.root / f".{name}.{key[:32]}.lock"):
                        stack.callback(_unlock, lock)
            yield

    def refusal(self) -> str | None:
        """Why nothing is taken from this root or put into it, if that is so: where, who can write there, the remedy."""
        try:
            with self._opened(self.root, os.O_PATH | os.O_DIRECTORY):
                return None
        except _Untrusted as reason:
            return str(reason)
        except OSError:
            return None  # there is none yet, or it is out of reach

    def entries(self) -> Iterator[Entry]:
        """Every entry, sound or not, by name; each is read whole. Raises: OSError if the root cannot be read."""
        for path in self._all(_ENTRY):
            name, _, key = path.name.rpartition(".")
            about: dict[str, str] = {}
            fault, damaged = None, False
            if not _is_ours(path):
                continue
            try:
                content = self._read(path, key)
                if not content:
                    continue  # it has just been removed
                key, about = content.key, content.about
            except (_Untrusted, PermissionError) as error:
                fault = str(error)
            except _UNSOUND as error:
                fault, damaged = str(error) or repr(error), True
            manifest = _status(path / "manifest.json")
            yield Entry(path, name, key, about, _bytes_of(path), manifest.st_mtime if manifest else 0.0, fault, damaged)

    def leftovers(self) -> Iterator[Path]:
        """Folders of killed publishers, and lock files that nobody holds, if older than LEFTOVER_SECONDS."""
        yield from filter(_is_old, self._all(_ASIDE))
        yield from (path for path in self._all(_LOCK) if _is_old(path) and _is_free(path))

    def remove_locks(self) -> None:
        """Deletes all lock files, for a folder that nobody else is writing to."""
        for path in self._all(_LOCK):
            path.unlink(missing_ok=True)

    def remove(self, path: Path) -> int:
        """Deletes an entry, of which readers see all or nothing, or a leftover. Returns the bytes freed.

        What is gone already counts as 0, and a lock file that somebody holds by now stays.

        Raises: ValueError if it is anything else; OSError if it cannot be deleted.
        """
        kind = next((kind for kind in (_ENTRY, _ASIDE, _LOCK) if _is(path, kind)), None)
        with contextlib.suppress(FileNotFoundError, TimeoutError):
            path.lstat()
            if path.parent != self.root or not kind:
                raise ValueError(f"{path} stays: it is neither an entry of the cache {self.root} nor a leftover of one")
            if kind is _ENTRY:
                with self._aside(path) as folder:
                    return _bytes_of(path.rename(folder / "old"))
            if kind is _ASIDE:
                freed = _bytes_of(path)
                shutil.rmtree(path)
                return freed
            with _file_lock(path, seconds=0):
                path.unlink()
        return 0

    def _read(self, entry: Path, key: str) -> _Content | None:
        """An entry whose key starts so, every byte checked; None where there is none. Raises: _Untrusted; _UNSOUND."""
        for again in (True, False):
            try:
                return self._read_once(entry, key)
            except PermissionError:
                raise
            except OSError as error:
                if not os.path.lexists(entry):
                    return None
                if not again or error.errno not in (errno.ENOENT, errno.ESTALE):  # else it has just been replaced
                    raise

    def _read_once(self, entry: Path, key: str) -> _Content:
        folder_flags = os.O_PATH | os.O_DIRECTORY
        with self._opened(self.root, folder_flags) as root, self._opened(entry, folder_flags, root) as folder:

            def read(file: str) -> bytes:
                with self._opened(entry / file, os.O_RDONLY, folder) as fd, open(fd, "rb", closefd=False) as stream:
                    return stream.read()

            manifest = json.loads(read("manifest.json"))
            if not isinstance(manifest, dict) or manifest.pop("checksum", None) != _checksum(manifest):
                raise ValueError("manifest.json has changed since it was written, or is of an older version")
            if not manifest["key"].startswith(key):
                raise ValueError("it belongs to another key")
            files = {file: read(file) for file in manifest["sha256"]}
            for file, content in files.items():
                if _sha256(content) != manifest["sha256"][file]:
                    raise ValueError(f"{file} has changed since it was written")
        return _Content(manifest["key"], manifest["about"], files)

    @contextlib.contextmanager
    def _opened(self, path: Path, flags: int, parent: int | None = None) -> Generator[int, None, None]:
        """A descriptor of what can be trusted. parent: that of its directory. Raises: _Untrusted; OSError."""
        name = path if parent is None else path.name
        descriptor = os.open(name, flags | os.O_CLOEXEC, dir_fd=parent)
        try:
            if not self.trusted:
                _check_writers(path, os.fstat(descriptor))
            yield descriptor
        finally:
            os.close(descriptor)

    def _is_refused(self) -> bool:
        reason = self.refusal()
        if reason:
            say_once(self.root, f"deep_gemm: {reason}")
        return reason is not None

    def _all(self, kind: re.Pattern[str]) -> list[Path]:
        try:
            paths = [self.root / name for name in sorted(os.listdir(self.root))]
        except FileNotFoundError:
            return []
        return [path for path in paths if _is(path, kind)]

    @contextlib.contextmanager
    def _aside(self, entry: Path) -> Generator[Path, None, None]:
        """A folder beside an entry that no reader looks at, and that is deleted in the end with all in it."""
        folder = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=self.root))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _create_root(self) -> None:
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self._create(self.root)

    def _create(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        if self.public:
            folder.chmod(0o755)

    def _write(self, path: Path, content: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(path, flags, 0o600), "wb") as stream:
            if self.public:
                os.fchmod(stream.fileno(), 0o644)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())

    @contextlib.contextmanager
    def _or_from_memory(self) -> Generator[None, None, None]:
        try:
            yield
        except OSError as error:
            say_once(
                self.root,
                f"deep_gemm: the kernel cache {self.root} cannot be written ({error}), so every process compiles anew: "
                "set DG_JIT_CACHE_DIR to a folder of yours with room",
            )


def _check_writers(path: Path, status: os.stat_result) -> None:
    """Raises: _Untrusted where others than this user and root can write."""
    ours, mode = status.st_uid in (os.geteuid(), 0), stat.S_IMODE(status.st_mode)
    if not ours or mode & 0o022:
        remedies = [f"chmod go-w {path}"] * ours + [
            "set DG_JIT_CACHE_DIR to a folder of yours",
            "DG_JIT_ALLOW_SHARED_CACHE=1 to trust it",
        ]
        raise _Untrusted(
            f"{path} is not used, for it belongs to uid {status.st_uid} and has mode {mode:04o}, and whoever can write "
            f"there can run code in this process: {', or '.join(remedies)}"
        )


def _flush(folder: Path) -> None:
    """The names in a folder, to disk; there are file systems that cannot, or need not."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_lock(path: Path, seconds: float) -> FileLock:
    """A lock to be taken within so many seconds, or else a TimeoutError."""
    from filelock import FileLock  # by those who compile alone

    # If it need not be preserved, the mere existence of the file is a lock where there is no flock, and outlives a
    # holder that is killed.
    return FileLock(path, timeout=seconds, mode=0o600, preserve_lock_file=True)


def _locked(path: Path) -> FileLock | None:
    """The lock, held; None if that cannot be: after LOCK_SECONDS, without flock, or where nothing can be written."""
    lock = _file_lock(path, LOCK_SECONDS)
    try:
        lock.acquire(poll_interval=POLL_SECONDS)
    except (OSError, NotImplementedError):  # the latter is that of filelock up to 3.23
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # for leftovers()
    return lock


def _unlock(lock: FileLock) -> None:
    with contextlib.suppress(OSError):  # a server that is gone by now lets go of it, too
        lock.release()


def _is_free(lock: Path) -> bool:
    with contextlib.suppress(OSError, NotImplementedError), _file_lock(lock, seconds=0):
        return True
    return False


def _is(path: Path, kind: re.Pattern[str]) -> bool:
    return bool(kind.fullmatch(path.name)) and path.is_dir() == (kind is not _LOCK)


def _is_ours(entry: Path) -> bool:
    """Whether a folder of such a name holds what an entry does, or nothing."""
    files = set(os.listdir(entry)) if os.access(entry, os.R_OK | os.X_OK) else {"manifest.json"}
    return not files or "manifest.json" in files or any(file.startswith("kernel.") for file in files)


def _is_old(path: Path) -> bool:
    status = _status(path)
    return status is not None and time.time() - status.st_mtime > LEFTOVER_SECONDS


def _bytes_of(folder: Path) -> int:
    paths = (Path(parent, file) for parent, _, files in os.walk(folder) for file in files)
    return sum(status.st_size for status in map(_status, paths) if status)


def _status(path: Path) -> os.stat_result | None:
    """None if it has just been removed."""
    with contextlib.suppress(FileNotFoundError):
        return path.lstat()
    return None


def _checksum(manifest: dict[str, Any]) -> str:
    return _sha256(json.dumps(manifest, sort_keys=True).encode())


def _sealed(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest | {"checksum": _checksum(manifest)}, indent=1) + "\n").encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
