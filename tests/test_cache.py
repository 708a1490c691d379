"""The cache of compiled kernels under attack: races, damage, and places that cannot be written."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from probe import ALONE

from deep_gemm.runtime import cache
from deep_gemm.runtime.cache import Cache

KEY = "0123456789abcdef" * 4
OTHER_KEY = "fedcba9876543210" * 4
FILES = {"kernel.cubin": bytes(range(256)) * 40, "kernel.cu": b"// text\n"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(cache, "_said", set())
    return Cache(tmp_path / "cache")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_round_trip(store: Cache, caplog: pytest.LogCaptureFixture):
    assert store.load("gemm", KEY) is None
    store.store("gemm", KEY, FILES)
    assert store.load("gemm", KEY) == FILES
    assert store.load("gemm", OTHER_KEY) is None
    assert store.entry("gemm", KEY) == store.root / f"gemm.{KEY[:32]}"
    assert [path.name for path in store.root.iterdir()] == [f"gemm.{KEY[:32]}"]
    assert {path.name for path in store.entry("gemm", KEY).iterdir()} == {*FILES, "manifest.json"}
    assert not warnings_of(caplog)


def test_nobody_else_can_read_it(store: Cache):
    umask = os.umask(0)
    try:
        with store.lock("gemm", KEY):
            store.store("gemm", KEY, FILES)
    finally:
        os.umask(umask)
    for folder in (store.root, store.entry("gemm", KEY)):
        assert folder.stat().st_mode & 0o777 == 0o700


def truncate(entry: Path) -> None:
    os.truncate(entry / "kernel.cubin", 100)


def flip(entry: Path) -> None:
    content = bytearray((entry / "kernel.cubin").read_bytes())
    content[5000] ^= 0x10
    (entry / "kernel.cubin").write_bytes(content)


def lose_a_file(entry: Path) -> None:
    (entry / "kernel.cubin").unlink()


def lose_the_manifest(entry: Path) -> None:
    (entry / "manifest.json").unlink()


def lose_everything(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.mkdir()


def become_a_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_bytes(b"not a directory")


def become_a_dead_link(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.symlink_to("nowhere")


def belong_to_another_key(entry: Path) -> None:
    Cache(entry.parent).store("gemm", OTHER_KEY, FILES)
    shutil.rmtree(entry)
    Cache(entry.parent).entry("gemm", OTHER_KEY).rename(entry)


def manifest_of(content: str) -> Callable[[Path], None]:
    def write(entry: Path) -> None:
        (entry / "manifest.json").write_text(content)

    return write


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip,
        lose_a_file,
        lose_the_manifest,
        lose_everything,
        become_a_file,
        become_a_dead_link,
        belong_to_another_key,
        *map(manifest_of, ["", "{", "[]", "null", "{}", f'{{"key": "{KEY}"}}', f'{{"key": "{KEY}", "sha256": 7}}']),
    ],
)
def test_a_damaged_entry_is_a_miss_and_is_replaced(
    damage: Callable[[Path], None], store: Cache, caplog: pytest.LogCaptureFixture
):
    store.store("gemm", KEY, FILES)
    damage(store.entry("gemm", KEY))
    assert store.load("gemm", KEY) is None
    assert store.load("gemm", KEY) is None
    store.store("gemm", KEY, FILES)
    assert store.load("gemm", KEY) == FILES
    assert os.listdir(store.root) == [store.entry("gemm", KEY).name]
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"deep_gemm: cache entry {store.entry('gemm', KEY)} is damaged and will be replaced: ")


def test_a_moved_root_still_hits(store: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store.store("gemm", KEY, FILES)
    shutil.move(store.root, tmp_path / "moved")
    assert store.load("gemm", KEY) is None
    assert Cache(tmp_path / "moved").load("gemm", KEY) == FILES
    assert not warnings_of(caplog)


def test_a_sound_entry_stays_unless_it_holds_less(store: Cache):
    store.store("gemm", KEY, FILES)
    first = store.entry("gemm", KEY).stat().st_ino
    store.store("gemm", KEY, FILES)
    assert store.entry("gemm", KEY).stat().st_ino == first
    store.store("gemm", KEY, FILES | {"kernel.ptx": b"ptx"})
    assert store.load("gemm", KEY) == FILES | {"kernel.ptx": b"ptx"}
    store.store("gemm", KEY, FILES)
    assert store.load("gemm", KEY) == FILES | {"kernel.ptx": b"ptx"}


@pytest.mark.parametrize("damaged", [False, True])
def test_publishers_that_race(damaged: bool, store: Cache):
    """Without the lock, that is, as on a file system that has none."""
    start = threading.Barrier(8)

    def publish(rounds: range) -> None:
        for number in rounds:
            if damaged and start.wait() == 0:
                store.entry("gemm", f"{number:032}" * 2).mkdir(parents=True)
            start.wait()
            store.store("gemm", f"{number:032}" * 2, FILES)

    rounds = range(20)
    threads = [threading.Thread(target=publish, args=[rounds]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(store.load("gemm", f"{number:032}" * 2) == FILES for number in rounds)
    assert sorted(os.listdir(store.root)) == [f"gemm.{number:032}" for number in rounds]


def in_a_place_that_cannot_be(store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    (tmp_path / "file").write_text("")
    return Cache(tmp_path / "file" / "cache")


def in_proc(store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    return Cache(Path("/proc/self/cache"))


def on_a_full_disk(store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    write_bytes = Path.write_bytes

    def write_half(path: Path, content: bytes) -> int:
        write_bytes(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", write_half)
    return store


def on_a_read_only_disk(store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

    store.store("other", OTHER_KEY, FILES)
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "mkdir", refuse)
    return store


@pytest.mark.parametrize(
    "place", [in_a_place_that_cannot_be, in_proc, on_a_full_disk, on_a_read_only_disk], ids=lambda place: place.__name__
)
def test_a_place_that_cannot_be_written(
    place: Callable[[Cache, Path, pytest.MonkeyPatch], Cache],
    store: Cache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    store = place(store, tmp_path, monkeypatch)
    for _ in range(2):
        assert store.load("gemm", KEY) is None
        with store.lock("gemm", KEY):
            store.store("gemm", KEY, FILES)
    monkeypatch.undo()
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"deep_gemm: the kernel cache {store.root} cannot be written (")
    assert warning.endswith("set DG_JIT_CACHE_DIR to a folder of yours with room")
    assert not store.root.exists() or set(os.listdir(store.root)) <= {
        f".gemm.{KEY[:32]}.lock",
        f"other.{OTHER_KEY[:32]}",
    }


def test_a_read_only_cache_still_hits(
    store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    on_a_read_only_disk(store, tmp_path, monkeypatch)
    assert store.load("other", OTHER_KEY) == FILES
    assert not warnings_of(caplog)


HOLD = """
import sys, time
from pathlib import Path
from deep_gemm.runtime.cache import Cache
with Cache(Path(sys.argv[1])).lock("gemm", sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


def holder_of(store: Cache) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", ALONE + HOLD, store.root, KEY], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_the_lock_keeps_others_out_until_its_holder_is_killed(store: Cache):
    taken = threading.Event()

    def take() -> None:
        with store.lock("gemm", KEY):
            taken.set()

    with holder_of(store) as process:
        with store.lock("gemm", OTHER_KEY):
            pass  # another key is free
        thread = threading.Thread(target=take)
        thread.start()
        assert not taken.wait(0.3)
        process.kill()
        assert taken.wait(10)
        thread.join()


def test_a_holder_that_hangs_is_not_waited_for_forever(store: Cache, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.1)
    with holder_of(store) as process:
        with store.lock("gemm", KEY):
            store.store("gemm", KEY, FILES)
        assert store.load("gemm", KEY) == FILES
        process.kill()


def test_a_file_system_without_locks(store: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with store.lock("gemm", KEY):
        store.store("gemm", KEY, FILES)
    assert store.load("gemm", KEY) == FILES
    assert not warnings_of(caplog)


def test_what_goes_wrong_inside_the_lock_comes_out(store: Cache):
    with pytest.raises(OSError, match=r"^of the caller$"), store.lock("gemm", KEY):
        raise OSError("of the caller")


def test_folders_of_killed_publishers_are_removed_after_a_while(store: Cache):
    store.store("kernel", "a" * 64, {"kernel.cubin": b"1"})
    old, young, other = (store.root / name for name in (".kernel.abcdefgh", ".kernel.ijklmnop", ".another.abcdefgh"))
    for folder in (old, young, other):
        (folder / "new").mkdir(parents=True)
    for folder in (old, other):
        os.utime(folder, (0, 0))
    store.store("kernel", "b" * 64, {"kernel.cubin": b"2"})
    assert not old.exists() and young.exists() and other.exists()
    assert store.load("kernel", "a" * 64) == {"kernel.cubin": b"1"}
