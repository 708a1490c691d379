"""Compiled kernels on disk, by the hash of all that went into them.

An entry is a directory <root>/<name>.<first 32 hex digits of the key>/ holding a few files and manifest.json: the
whole key, and the SHA-256 of every file. It is written beside its place and renamed into it, so a reader sees a
whole entry or none, whoever is killed when. Nothing in it names a path or a time: the root can be moved or copied.

The cache never stands in the way: a damaged entry is a miss and is replaced, and where nothing can be written the
caller works from memory. Either is said once, through logging.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

LEFTOVER_SECONDS = 3600.0  # older than this, a folder that was being filled is nobody's
LOCK_SECONDS = 60.0  # a holder that is stopped or hangs must not stop the others: compiling twice does no harm

_logger = logging.getLogger("deep_gemm")
_said: set[Path] = set()


def _say_once(about: Path, message: str) -> None:
    if about not in _said:
        _said.add(about)
        _logger.warning(message)


@dataclass(frozen=True)
class Cache:
    """A store of small sets of files under one root directory."""

    root: Path

    def entry(self, name: str, key: str) -> Path:
        """The directory of an entry, whether it exists or not."""
        return self.root / f"{name}.{key[:32]}"

    def load(self, name: str, key: str) -> dict[str, bytes] | None:
        """The files of an entry, or None where there is no sound one."""
        entry = self.entry(name, key)
        if not os.path.lexists(entry):
            return None
        try:
            manifest = json.loads((entry / "manifest.json").read_bytes())
            if manifest["key"] != key:
                raise ValueError("it belongs to another key")
            files = {file: (entry / file).read_bytes() for file in manifest["sha256"]}
            for file, content in files.items():
                if _sha256(content) != manifest["sha256"][file]:
                    raise ValueError(f"{file} has changed since it was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _say_once(entry, f"deep_gemm: cache entry {entry} is damaged and will be replaced: {error!r}")
            return None
        return files

    def store(self, name: str, key: str, files: Mapping[str, bytes]) -> None:
        """Publishes an entry in one step. A sound entry that is there already, and holds as much, stays."""
        entry = self.entry(name, key)
        manifest = {"key": key, "sha256": {file: _sha256(content) for file, content in files.items()}}
        with self._or_from_memory():
            self._create_root()
            if files.keys() <= (self.load(name, key) or {}).keys():
                return
            self._remove_leftovers(name)
            with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=self.root, ignore_cleanup_errors=True) as folder:
                fresh = Path(folder, "new")
                fresh.mkdir(mode=0o700)
                for file, content in files.items():
                    (fresh / file).write_bytes(content)
                (fresh / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
                with contextlib.suppress(FileNotFoundError):
                    entry.rename(Path(folder, "old"))
                try:
                    fresh.rename(entry)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another was first: ours is discarded
                        raise

    @contextlib.contextmanager
    def lock(self, name: str, key: str) -> Generator[None, None, None]:
        """Keeps other processes from compiling the same entry; at most for LOCK_SECONDS, and only if files can be."""
        with contextlib.ExitStack() as stack:
            with self._or_from_memory():
                self._create_root()
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                descriptor = os.open(self.root / f".{name}.{key[:32]}.lock", flags, 0o600)
                stack.callback(os.close, descriptor)
                if _locked(descriptor):
                    stack.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
            yield

    def _remove_leftovers(self, name: str) -> None:
        """Folders of processes that were killed while they published."""
        for folder in self.root.glob(f".{name}.????????"):
            with contextlib.suppress(FileNotFoundError):  # its process is alive and done with it, or another was faster
                if folder.is_dir() and time.time() - folder.stat().st_mtime > LEFTOVER_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)

    def _create_root(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _or_from_memory(self) -> Generator[None, None, None]:
        try:
            yield
        except OSError as error:
            _say_once(
                self.root,
                f"deep_gemm: the kernel cache {self.root} cannot be written ({error}), so every process compiles anew: "
                "set DG_JIT_CACHE_DIR to a folder of yours with room",
            )


def _locked(descriptor: int) -> bool:
    deadline = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:  # a file system without locks
            break
    return False


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
