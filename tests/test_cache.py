"""The cache of compiled kernels under attack: races, kills, damage, other users, and places that cannot be written."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import pytest
from probe import ALONE

from deep_gemm.runtime import cache
from deep_gemm.runtime.cache import Cache

KEY = "0123456789abcdef" * 4
OTHER_KEY = "fedcba9876543210" * 4
FILES = {"kernel.cubin": bytes(range(256)) * 40, "kernel.cu": b"// text\n", "kernel.log": b"12 registers\n"}
OTHER_FILES = {"kernel.cubin": bytes(10000), "kernel.cu": b"// other\n", "kernel.log": b"13 registers\n"}
ABOUT = {"kernel": "gemm 64x128", "compiler": "NVRTC 13.0", "arch": "sm_90a", "options": "-std=c++17"}
THIRD, OTHER = 4242, 4243  # users without a name

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, or mount")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(cache, "_said", set())
    return Cache(tmp_path / "cache")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def alone(script: str, *args: object) -> tuple[str, str]:
    """What a script says on stdout and stderr, warnings included, in a process of its own."""
    command = [sys.executable, "-c", ALONE + script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def test_round_trip(store: Cache, caplog: pytest.LogCaptureFixture):
    assert store.load("gemm", KEY) is None
    store.store("gemm", KEY, FILES)
    assert store.load("gemm", KEY) == FILES
    assert store.load("gemm", OTHER_KEY) is None
    assert store.entry("gemm", KEY) == store.root / f"gemm.{KEY[:32]}"
    assert [path.name for path in store.root.iterdir()] == [f"gemm.{KEY[:32]}"]
    assert {path.name for path in store.entry("gemm", KEY).iterdir()} == {*FILES, "manifest.json"}
    assert not warnings_of(caplog)


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
@pytest.mark.parametrize("public, folder_mode, file_mode", [(False, 0o700, 0o600), (True, 0o755, 0o644)])
def test_who_can_read_it(
    public: bool, folder_mode: int, file_mode: int, mask: int, store: Cache, umask: Callable[[int], int]
):
    umask(mask)
    store = Cache(store.root, public=public)
    with store.lock("gemm", KEY):
        store.store("gemm", KEY, FILES)
    entry = store.entry("gemm", KEY)
    for folder in (store.root, entry):
        assert folder.stat().st_mode & 0o7777 == folder_mode
    for file in entry.iterdir():
        assert file.stat().st_mode & 0o7777 == file_mode
    for lock in store.root.glob(".*.lock"):
        assert lock.stat().st_mode & 0o7777 == 0o600


def test_the_manifest(store: Cache):
    store.store("gemm", KEY, FILES, ABOUT)
    text = (store.entry("gemm", KEY) / "manifest.json").read_text()
    manifest = json.loads(text)
    assert set(manifest) == {"key", "about", "sha256", "checksum"}
    assert (manifest["key"], manifest["about"], set(manifest["sha256"])) == (KEY, ABOUT, set(FILES))
    assert str(store.root) not in text
    store.remove(store.entry("gemm", KEY))
    store.store("gemm", KEY, FILES, ABOUT)
    assert (store.entry("gemm", KEY) / "manifest.json").read_text() == text


def test_all_is_on_disk_before_it_gets_its_name(store: Cache, monkeypatch: pytest.MonkeyPatch):
    flushed: set[int] = set()
    late: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def publish(path: Path, target: Path) -> Path:
        late.extend(str(part) for part in (path, *path.iterdir()) if part.stat().st_ino not in flushed)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", publish)
    store.store("gemm", KEY, FILES)
    assert store.load("gemm", KEY) == FILES
    assert len(flushed) == len(FILES) + 2 and not late


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


def be_of_an_older_version(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    del manifest["checksum"], manifest["about"]
    (entry / "manifest.json").write_text(json.dumps(manifest))


def be_of_a_newer_version(entry: Path) -> None:
    manifest = {"key": KEY, "sha512": {}}
    (entry / "manifest.json").write_text(json.dumps(manifest | {"checksum": cache._checksum(manifest)}))


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
        be_of_an_older_version,
        be_of_a_newer_version,
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
    assert warning.startswith(f"deep_gemm: cache entry {store.entry('gemm', KEY)} is damaged and not used: ")


def flipped(part: float) -> Callable[[bytes, bytes], bytes]:
    def flip_there(content: bytes, other: bytes) -> bytes:
        changed = bytearray(content)
        changed[int(part * (len(content) - 1))] ^= 1 << random.Random(content).randrange(8)
        return bytes(changed)

    return flip_there


@pytest.mark.parametrize("file", [*FILES, "manifest.json"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda content, other: content[: len(content) // 2], id="half"),
        pytest.param(lambda content, other: b"", id="empty"),
        pytest.param(lambda content, other: bytes(len(content)), id="zeros"),
        pytest.param(lambda content, other: random.Random(content).randbytes(len(content)), id="random"),
        pytest.param(lambda content, other: other, id="foreign"),
        pytest.param(lambda content, other: content + b"\0", id="longer"),
        *(pytest.param(flipped(part), id=f"flipped at {part}") for part in (0, 0.2, 0.5, 0.9, 1)),
    ],
)
def test_damage_to_any_file_is_found(
    file: str, change: Callable[[bytes, bytes], bytes], store: Cache, caplog: pytest.LogCaptureFixture
):
    store.store("gemm", KEY, FILES, ABOUT)
    store.store("gemm", OTHER_KEY, OTHER_FILES, ABOUT)
    path, other = (store.entry("gemm", key) / file for key in (KEY, OTHER_KEY))
    content = path.read_bytes()
    path.write_bytes(change(content, other.read_bytes()))
    assert path.read_bytes() != content
    assert store.load("gemm", KEY) is None
    assert store.load("gemm", KEY) is None
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"deep_gemm: cache entry {path.parent} is damaged and not used: ")
    store.store("gemm", KEY, FILES, ABOUT)
    assert store.load("gemm", KEY) == FILES
    assert path.read_bytes() == content
    assert len(warnings_of(caplog)) == 1


def test_no_byte_of_a_manifest_can_change(store: Cache):
    store.store("gemm", KEY, {"kernel.cu": b"// text"}, {"kernel": "gemm"})
    path = store.entry("gemm", KEY) / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert store.load("gemm", KEY) is None, place


def when_first_opened(file: str, do: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets something happen while an entry is being read."""
    os_open = os.open
    todo = [do]

    def intrude(path: str | Path, flags: int, *args: int, **kwargs: int | None) -> int:
        if Path(path).name == file and flags & os.O_ACCMODE == os.O_RDONLY and todo:
            todo.pop()()
        return os_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", intrude)


@pytest.mark.parametrize("file", ["manifest.json", "kernel.cubin", "kernel.log"])
def test_what_is_replaced_while_it_is_read(
    file: str, store: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    more = FILES | {"kernel.ptx": b"ptx"}
    store.store("gemm", KEY, FILES)
    when_first_opened(file, lambda: store.store("gemm", KEY, more), monkeypatch)
    assert store.load("gemm", KEY) == more
    assert not warnings_of(caplog)


@pytest.mark.parametrize("file", ["manifest.json", "kernel.cubin", "kernel.log"])
def test_what_is_removed_while_it_is_read(
    file: str, store: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    store.store("gemm", KEY, FILES)
    when_first_opened(file, lambda: store.remove(store.entry("gemm", KEY)), monkeypatch)
    assert store.load("gemm", KEY) is None
    assert not warnings_of(caplog)


@pytest.mark.parametrize("times", [1, 2])
def test_a_stale_handle(times: int, store: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """As NFS has it for a file that another machine replaced: once is no damage."""

    def fail() -> None:
        if times == 2:
            when_first_opened("kernel.cubin", lambda: fail_once(), monkeypatch)
        fail_once()

    def fail_once() -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    store.store("gemm", KEY, FILES)
    when_first_opened("kernel.cubin", fail, monkeypatch)
    assert store.load("gemm", KEY) == (FILES if times == 1 else None)
    assert len(warnings_of(caplog)) == times - 1


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


def in_the_place_of_a_file(store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    (tmp_path / "file").write_text("")
    return Cache(tmp_path / "file")


def in_proc(store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    return Cache(Path("/proc/self/cache"))


def on_a_full_disk(store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)  # which is where some file systems notice
    return store


def on_a_read_only_disk(store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    os_open = os.open

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

    def refuse_to_write(path: str | Path, flags: int, *args: int, **kwargs: int | None) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return os_open(path, flags, *args, **kwargs)

    store.store("other", OTHER_KEY, FILES)
    monkeypatch.setattr(os, "open", refuse_to_write)
    monkeypatch.setattr(os, "mkdir", refuse)
    return store


@pytest.mark.parametrize(
    "place",
    [in_a_place_that_cannot_be, in_the_place_of_a_file, in_proc, on_a_full_disk, on_a_read_only_disk],
    ids=lambda place: place.__name__,
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
    assert not store.root.is_dir() or set(os.listdir(store.root)) <= {
        f".gemm.{KEY[:32]}.lock",
        f"other.{OTHER_KEY[:32]}",
    }


def test_a_read_only_cache_still_hits(
    store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    on_a_read_only_disk(store, tmp_path, monkeypatch)
    assert store.load("other", OTHER_KEY) == FILES
    assert not warnings_of(caplog)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", folder], capture_output=True
    ).returncode:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@as_root
def test_a_disk_that_is_really_full(small_disk: Path, store: Cache, caplog: pytest.LogCaptureFixture):
    store = Cache(small_disk / "cache")
    store.store("other", OTHER_KEY, FILES)
    for _ in range(2):
        with store.lock("gemm", KEY):
            store.store("gemm", KEY, {"kernel.cubin": bytes(100_000)})
        assert store.load("gemm", KEY) is None
    (warning,) = warnings_of(caplog)
    assert f"{store.root} cannot be written ([Errno {errno.ENOSPC}] " in warning
    assert set(os.listdir(store.root)) - {f".gemm.{KEY[:32]}.lock"} == {f"other.{OTHER_KEY[:32]}"}
    store.store("gemm", KEY, FILES)  # for which there is room
    assert store.load("gemm", KEY) == store.load("other", OTHER_KEY) == FILES


def test_files_that_must_not_grow(store: Cache, caplog: pytest.LogCaptureFixture):
    """As with a quota: some bytes of a file can be written, and no more."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        store.store("gemm", KEY, {"kernel.cubin": bytes(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (warning,) = warnings_of(caplog)
    assert f"{store.root} cannot be written ([Errno {errno.EFBIG}] " in warning
    assert os.listdir(store.root) == [] and store.load("gemm", KEY) is None


# Other users

AS_USER = """
import os, sys, tempfile
from pathlib import Path
from deep_gemm.runtime.cache import Cache
with tempfile.TemporaryDirectory() as folder, Cache(Path(folder)).lock("warm", "0" * 64):
    Cache(Path(folder)).store("warm", "0" * 64, {})  # all modules are loaded now, which the user may not be able to
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
cache, key = Cache(Path(sys.argv[2])), sys.argv[3]
hit = cache.load("gemm", key) is not None
if not hit:
    for _ in range(2):
        with cache.lock("gemm", key):
            cache.store("gemm", key, {"kernel.cubin": b"of another"})
print(hit, cache.load("gemm", key) is not None)
"""


def as_user(uid: int, root: Path) -> tuple[str, list[str]]:
    """Whether that user finds the entry at first, and after storing one; and the warnings."""
    out, err = alone(AS_USER, uid, root, KEY)
    return out.strip(), err.splitlines()


def tree(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(root)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in root.rglob("*")}


def give(uid: int, *paths: Path) -> None:
    for path in paths:
        for part in (path, *path.rglob("*")):
            os.chown(part, uid, uid)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that every user can get to, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def refusal_of(path: Path, uid: int, mode: int, remedy: str = "") -> str:
    return (
        f"{path} is not used, for it belongs to uid {uid} and has mode {mode:04o}, and whoever can write there can run "
        f"code in this process: {remedy}set DG_JIT_CACHE_DIR to a folder of yours, or DG_JIT_ALLOW_SHARED_CACHE=1 to "
        "trust it"
    )


@as_root
def test_what_a_third_user_owns_is_refused(reachable: Path):
    store = Cache(reachable / "cache", public=True)
    store.store("gemm", KEY, FILES)
    give(THIRD, store.root)
    before = tree(store.root)
    reason = refusal_of(store.root, THIRD, 0o755)
    assert as_user(OTHER, store.root) == ("False False", [f"deep_gemm: {reason}"])
    assert tree(store.root) == before
    assert as_user(THIRD, store.root) == ("True True", [])
    assert store.refusal() == reason  # by root, too


@as_root
@pytest.mark.parametrize("mask", [0, 0o077])
def test_a_public_cache_of_root_serves_all(mask: int, reachable: Path, umask: Callable[[int], int]):
    umask(mask)
    store = Cache(reachable / "cache", public=True)
    store.store("gemm", KEY, FILES)
    assert as_user(OTHER, store.root) == ("True True", [])


@as_root
def test_a_private_cache_of_another_is_done_without(reachable: Path):
    store = Cache(reachable / "cache")
    store.store("gemm", KEY, FILES)
    entry = store.entry("gemm", KEY)
    remedy = "Permission denied): set DG_JIT_CACHE_DIR to a folder of yours"
    unreadable = f"deep_gemm: cache entry {entry} cannot be read ({remedy}"
    assert as_user(OTHER, store.root) == ("False False", [unreadable])
    store.root.chmod(0o755)
    assert as_user(OTHER, store.root) == ("False False", [unreadable])
    give(THIRD, store.root)
    store.root.chmod(0o700)
    assert as_user(OTHER, store.root) == ("False False", [f"deep_gemm: {refusal_of(store.root, THIRD, 0o700)}"])


@as_root
def test_an_entry_that_a_third_user_made_is_refused_alone(
    reachable: Path, store: Cache, caplog: pytest.LogCaptureFixture
):
    store = Cache(reachable / "cache", public=True)
    store.store("gemm", KEY, FILES)
    give(OTHER, store.root)
    give(THIRD, entry := store.entry("gemm", KEY))
    refused = f"deep_gemm: {refusal_of(entry, THIRD, 0o755)}"
    assert as_user(OTHER, store.root) == ("False False", [refused])  # for a user cannot replace it
    assert store.refusal() is not None
    give(0, store.root)
    for part in (entry / "kernel.cubin", entry):
        os.chown(part, THIRD, THIRD)
        assert store.refusal() is None and store.load("gemm", KEY) is None
        store.store("gemm", KEY, FILES)  # but root can
        assert store.load("gemm", KEY) == FILES
    assert warnings_of(caplog) == [f"deep_gemm: {refusal_of(entry / 'kernel.cubin', THIRD, 0o644)}"]


@as_root
def test_a_folder_that_another_user_cannot_write(reachable: Path):
    root = reachable / "cache"
    root.mkdir(mode=0o755)
    hits, warnings = as_user(OTHER, root)
    assert hits == "False False" and len(warnings) == 1
    assert warnings[0].startswith(f"deep_gemm: the kernel cache {root} cannot be written ([Errno 13] ")
    assert os.listdir(root) == []


def test_another_user_by_any_id(store: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """As above, for runs that are not root's."""
    store.store("gemm", KEY, FILES)
    owner = os.geteuid() or THIRD
    if os.geteuid() == 0:  # whose files everybody trusts
        give(THIRD, store.root)
    before = tree(store.root)
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    assert store.load("gemm", KEY) is None
    with store.lock("gemm", KEY):
        store.store("gemm", KEY, FILES | {"kernel.ptx": b"ptx"})
    assert store.load("gemm", KEY) is None
    assert warnings_of(caplog) == [f"deep_gemm: {refusal_of(store.root, owner, 0o700)}"]
    assert tree(store.root) == before
    assert Cache(store.root, trusted=True).load("gemm", KEY) == FILES
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    assert store.load("gemm", KEY) == FILES


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o720, 0o702], ids=oct)
@pytest.mark.parametrize("place", ["root", "entry", "manifest.json", *FILES])
def test_where_others_can_write_is_refused(place: str, mode: int, store: Cache, caplog: pytest.LogCaptureFixture):
    store.store("gemm", KEY, FILES)
    entry = store.entry("gemm", KEY)
    path = {"root": store.root, "entry": entry}.get(place, entry / place)
    path.chmod(mode)
    reason = refusal_of(path, os.geteuid(), mode, f"chmod go-w {path}, or ")
    assert store.load("gemm", KEY) is None
    assert store.load("gemm", KEY) is None
    assert warnings_of(caplog) == [f"deep_gemm: {reason}"]
    assert store.refusal() == (reason if place == "root" else None)
    assert [found.fault for found in store.entries()] == [reason]
    assert Cache(store.root, trusted=True).load("gemm", KEY) == FILES
    assert Cache(store.root, trusted=True).refusal() is None
    path.chmod(mode & 0o755)
    assert store.load("gemm", KEY) == FILES
    assert len(warnings_of(caplog)) == 1


def test_nothing_is_written_where_others_can(store: Cache, caplog: pytest.LogCaptureFixture):
    store.store("gemm", KEY, FILES)
    store.root.chmod(0o777)
    before = tree(store.root)
    for key in (KEY, OTHER_KEY):
        with store.lock("gemm", key):
            store.store("gemm", key, FILES | {"kernel.ptx": b"ptx"})
    assert tree(store.root) == before and len(warnings_of(caplog)) == 1
    with Cache(store.root, trusted=True).lock("gemm", OTHER_KEY):
        Cache(store.root, trusted=True).store("gemm", OTHER_KEY, FILES)
    store.root.chmod(0o755)
    assert store.load("gemm", OTHER_KEY) == FILES


def test_an_entry_that_others_can_write_is_replaced(store: Cache, caplog: pytest.LogCaptureFixture):
    store.store("gemm", KEY, FILES)
    store.entry("gemm", KEY).chmod(0o777)
    store.store("gemm", KEY, FILES)
    assert store.load("gemm", KEY) == FILES
    assert len(warnings_of(caplog)) == 1


# Locks

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


def no_lock_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def no_system_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)


def an_older_filelock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(lock: filelock.BaseFileLock, **kwargs: object) -> None:
        Path(lock.lock_file).touch()
        raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)


@pytest.mark.parametrize("lack", [no_lock_daemon, no_system_call, an_older_filelock], ids=lambda lack: lack.__name__)
def test_a_file_system_without_locks(
    lack: Callable[[pytest.MonkeyPatch], None],
    store: Cache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    lack(monkeypatch)
    begun = time.monotonic()
    with store.lock("gemm", KEY):
        store.store("gemm", KEY, FILES)
        with Cache(store.root).lock("gemm", KEY):  # no other means takes the place of a lock
            assert store.load("gemm", KEY) == FILES
    assert time.monotonic() - begun < 10
    assert not warnings_of(caplog)


def test_a_lock_that_cannot_be_released(store: Cache, monkeypatch: pytest.MonkeyPatch):
    flock = fcntl.flock

    def refuse(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_UN:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)
    with store.lock("gemm", KEY):
        store.store("gemm", KEY, FILES)
    assert store.load("gemm", KEY) == FILES
    monkeypatch.undo()


def test_threads_of_one_process_keep_each_other_out(store: Cache):
    inside: list[int] = []
    most: list[int] = []

    def take() -> None:
        for _ in range(5):
            with store.lock("gemm", KEY):
                inside.append(0)
                most.append(len(inside))
                time.sleep(0.003)
                inside.pop()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 20


CROWD = """
import os, sys, time, traceback
from pathlib import Path
from deep_gemm.runtime.cache import Cache
cache, key, marker = Cache(Path(sys.argv[1])), sys.argv[2], sys.argv[1] + ".marker"
ready, go = os.pipe()
children = []
for _ in range(16):
    if not (child := os.fork()):
        try:
            os.close(go)
            os.read(ready, 1)
            for _ in range(4):
                with cache.lock("gemm", key):
                    os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                    time.sleep(0.003)
                    os.unlink(marker)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    children.append(child)
os.close(go)
print([os.waitpid(child, 0)[1] for child in children])
"""


def test_of_sixteen_processes_one_is_inside(store: Cache):
    out, err = alone(CROWD, store.root, KEY)
    assert (out, err) == (f"{[0] * 16}\n", "")


FORK = """
import os, sys
from pathlib import Path
from deep_gemm.runtime import cache
from deep_gemm.runtime.cache import Cache

def is_free():
    free = os.fork()
    if not free:
        lock = cache._file_lock(next(root.glob(".*.lock")), 0.05)
        try:
            lock.acquire()
        except TimeoutError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(free, 0)[1] == 0

root, key = Path(sys.argv[1]), sys.argv[2]
with Cache(root).lock("gemm", key):
    leaver = os.fork()  # goes out of here as if the lock were its own
    if leaver:
        os.waitpid(leaver, 0)
        print("free" if is_free() else "held", flush=True)
        ready, go = os.pipe()
        stayer = os.fork()
        if not stayer:
            os.close(go)
            os.read(ready, 1)
            os._exit(0)
if not leaver:
    os._exit(0)
print("free" if is_free() else "held", flush=True)
os.close(go)
os.waitpid(stayer, 0)
"""


def test_a_child_neither_frees_nor_keeps_its_parents_lock(store: Cache):
    assert alone(FORK, store.root, KEY) == ("held\nfree\n", "")


ORPHAN = """
import os, signal, sys
from pathlib import Path
from deep_gemm.runtime.cache import Cache
with Cache(Path(sys.argv[1])).lock("gemm", sys.argv[2]):
    if not os.fork():
        print("forked", flush=True)
        signal.pause()
    os.wait()
"""


def test_a_child_does_not_keep_the_lock_of_a_parent_that_is_killed(store: Cache, monkeypatch: pytest.MonkeyPatch):
    command = [sys.executable, "-c", ALONE + ORPHAN, store.root, KEY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        assert parent.stdout and parent.stdout.readline() == "forked\n"
        try:
            parent.kill()
            monkeypatch.setattr(cache, "LOCK_SECONDS", 5)
            begun = time.monotonic()
            with store.lock("gemm", KEY):
                assert time.monotonic() - begun < 4
        finally:
            os.killpg(parent.pid, 9)


def test_what_goes_wrong_inside_the_lock_comes_out(store: Cache):
    with pytest.raises(OSError, match=r"^of the caller$"), store.lock("gemm", KEY):
        raise OSError("of the caller")


KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from deep_gemm.runtime.cache import Cache
cache, key = Cache(Path(sys.argv[1])), sys.argv[2]
some = {"kernel.cubin": os.urandom(1_000_000), "kernel.log": b""}
more = some | {"kernel.ptx": os.urandom(100_000)}
random.seed(0)
struck = 0
for _ in range(int(sys.argv[3])):
    child = os.fork()
    if not child:
        while True:
            cache.store("gemm", key, some)
            cache.store("gemm", key, more)  # replaces it
            cache.remove(cache.entry("gemm", key))
    time.sleep(random.uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [found.fault for found in cache.entries()] in ([], [None])
    assert cache.load("gemm", key) in (None, some, more)
    cache.store("gemm", key, more)
    assert cache.load("gemm", key) == more
    for folder in cache.root.glob(".gemm.*"):
        shutil.rmtree(folder)
        struck += 1
    cache.remove(cache.entry("gemm", key))
print(struck)
"""


def test_a_hundred_publishers_that_are_killed(store: Cache):
    out, err = alone(KILLED, store.root, KEY, 100)
    assert err == ""
    assert int(out) > 10  # as many were in the midst of it


# What the command line does with a cache


def test_entries(store: Cache):
    assert list(store.entries()) == []
    store.store("gemm", KEY, FILES, ABOUT)
    store.store("a.b", OTHER_KEY, OTHER_FILES)
    for folder in ("failed", f"failed/gemm.{KEY[:32]}", "gemm.0", f".gemm.{KEY[:32]}.abcdefgh"):
        (store.root / folder).mkdir()
    (store.root / f"file.{KEY[:32]}").write_text("not a directory")
    path = store.entry("gemm", KEY)
    os.utime(path / "manifest.json", (5, 7))
    other, found = store.entries()
    size = sum(file.stat().st_size for file in path.iterdir())
    assert found == cache.Entry(path, "gemm", KEY, ABOUT, size, 7.0, None, False)
    assert (other.path, other.name, other.key) == (store.entry("a.b", OTHER_KEY), "a.b", OTHER_KEY)
    assert (other.about, other.fault) == ({}, None)


def test_entries_that_are_not_sound(store: Cache, caplog: pytest.LogCaptureFixture):
    store.store("gemm", KEY, FILES, ABOUT)
    flip(store.entry("gemm", KEY))
    lost = store.entry("lost", KEY)
    lost.mkdir()
    (lost / "kernel.cu").symlink_to("nowhere")
    foreign = store.entry("foreign", KEY)  # by its name it might be one
    foreign.mkdir()
    (foreign / "notes").write_text("")
    renamed = store.entry("renamed", OTHER_KEY)
    shutil.copytree(store.entry("gemm", KEY), renamed)
    first, second, third = store.entries()
    assert first.fault == "kernel.cubin has changed since it was written"
    assert (first.key, first.about) == (KEY[:32], {})
    assert second.path == lost and second.fault and "No such file or directory: 'manifest.json'" in second.fault
    assert (second.made, second.bytes) == (0, len("nowhere"))
    assert third.fault == "it belongs to another key"
    assert first.damaged and second.damaged and third.damaged
    assert not warnings_of(caplog)


def test_entries_that_are_refused_are_not_damaged(store: Cache):
    store.store("gemm", KEY, FILES, ABOUT)
    store.entry("gemm", KEY).chmod(0o775)
    (found,) = store.entries()
    assert found.fault and "DG_JIT_ALLOW_SHARED_CACHE=1" in found.fault and not found.damaged
    (found,) = Cache(store.root, trusted=True).entries()
    assert (found.fault, found.damaged, found.about) == (None, False, ABOUT)


def test_an_entry_that_goes_while_they_are_listed(store: Cache, monkeypatch: pytest.MonkeyPatch):
    store.store("gemm", KEY, FILES)
    store.store("gemm", OTHER_KEY, FILES)
    when_first_opened("kernel.cubin", lambda: store.remove(store.entry("gemm", KEY)), monkeypatch)
    assert [found.key for found in store.entries()] == [OTHER_KEY]


def test_remove(store: Cache):
    store.store("gemm", KEY, FILES)
    store.store("gemm", OTHER_KEY, FILES)
    first, second = store.entries()
    assert store.remove(first.path) == first.bytes > 10_000
    assert store.remove(first.path) == 0
    assert store.load("gemm", KEY) is None
    assert store.load("gemm", OTHER_KEY) == FILES
    assert os.listdir(store.root) == [second.path.name]


def test_remove_shows_readers_all_or_nothing(store: Cache, monkeypatch: pytest.MonkeyPatch):
    store.store("gemm", KEY, FILES)
    entry = store.entry("gemm", KEY)
    unlink = os.unlink
    seen: list[bool] = []

    def watch(*args: str, **kwargs: int | None) -> None:
        seen.append(entry.exists())
        unlink(*args, **kwargs)

    monkeypatch.setattr(os, "unlink", watch)
    store.remove(entry)
    assert len(seen) == len(FILES) + 1 and not any(seen)


def test_what_is_no_entry_is_never_removed(store: Cache, tmp_path: Path):
    store.store("gemm", KEY, FILES)
    elsewhere = tmp_path / "elsewhere" / store.entry("gemm", KEY).name
    others = [store.root / name for name in ("photos", "failed", f".{KEY[:32]}", "gemm.0", ".config.abcdefgh", ".ssh")]
    for folder in (elsewhere, *others):
        folder.mkdir(parents=True)
    files = [store.root / name for name in ("notes", f"notes.{KEY[:32]}", ".notes.lock", f".notes.{KEY[:32]}.abcdefgh")]
    for file in files:
        file.write_text("mine")
    for path in (elsewhere, *others, *files):
        os.utime(path, (0, 0))
        with pytest.raises(ValueError, match="neither an entry of the cache"):
            store.remove(path)
    assert list(store.leftovers()) == []
    store.store("gemm", OTHER_KEY, FILES)
    assert all(path.exists() for path in (elsewhere, *others, *files))


def test_leftovers(store: Cache):
    assert list(store.leftovers()) == []
    for key in (KEY, OTHER_KEY, "0" * 64):
        with store.lock("gemm", key):
            pass
    free, held, young = (store.root / f".gemm.{key[:32]}.lock" for key in (KEY, OTHER_KEY, "0" * 64))
    folder, young_folder = (store.root / f".gemm.{KEY[:32]}.{end}" for end in ("abcdefgh", "ijkl_123"))
    for path in (folder, young_folder):
        (path / "new").mkdir(parents=True)
    (folder / "new" / "kernel.cubin").write_bytes(b"1234")
    with Cache(store.root).lock("gemm", OTHER_KEY):
        for path in (free, held, folder):
            os.utime(path, (0, 0))
        assert list(store.leftovers()) == [folder, free]
        assert store.remove(held) == 0
        assert held.exists()
    assert store.remove(folder) == 4
    assert store.remove(free) == store.remove(held) == 0
    assert set(store.root.iterdir()) == {young, young_folder}


def test_a_lock_that_is_used_is_no_leftover(store: Cache):
    with store.lock("gemm", KEY):
        pass
    (lock,) = store.root.iterdir()
    os.utime(lock, (0, 0))
    with store.lock("gemm", KEY):
        pass
    assert list(store.leftovers()) == []


def test_whoever_waits_for_a_lock_file_that_is_removed_waits_for_the_next(store: Cache):
    """A lock of a file without a name keeps nobody out."""
    flock = fcntl.flock
    with store.lock("gemm", KEY):
        pass
    (path,) = store.root.iterdir()
    removed: list[int] = []

    def remove_first(descriptor: int, operation: int) -> None:
        if not removed and operation != fcntl.LOCK_UN:
            removed.append(1)
            store.remove(path)
        flock(descriptor, operation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", remove_first)
        with store.lock("gemm", KEY):
            assert removed and path.exists()
            assert not cache._is_free(path)


def test_folders_of_killed_publishers_are_removed_after_a_while(store: Cache):
    store.store("kernel", "a" * 64, {"kernel.cubin": b"1"})
    names = (f".kernel.{'a' * 32}.abcdefgh", f".kernel.{'a' * 32}.ijklmnop", ".another.abcdefgh")
    old, young, other = (store.root / name for name in names)
    for folder in (old, young, other):
        (folder / "new").mkdir(parents=True)
    for folder in (old, other):
        os.utime(folder, (0, 0))
    store.store("kernel", "b" * 64, {"kernel.cubin": b"2"})
    assert not old.exists() and young.exists() and other.exists()
    assert store.load("kernel", "a" * 64) == {"kernel.cubin": b"1"}
