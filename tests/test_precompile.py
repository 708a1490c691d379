"""The commands `compile` and `cache`, as a user runs them, and wheels that bring kernels. No GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from probe import PROBE

from deep_gemm import cli, recorded
from deep_gemm.config import Config
from deep_gemm.deployment import kernels_for
from deep_gemm.problem import Problem
from deep_gemm.runtime import compiler, sass
from deep_gemm.runtime.compiler import COMPILER_FILE, default_compiler
from deep_gemm.runtime.device import H200

ROOT = Path(__file__).parent.parent
SMALL = ("8x64 swapped", "layout")  # which compile in no time
KERNELS = [option for name in SMALL for option in ("--kernel", name)]
MODEL = {
    "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("fresh")


def run(*arguments: object) -> int:
    compiler._memory.clear()
    return cli.main([str(x) for x in arguments])


def test_compile_and_check(fresh: Path, capsys: pytest.CaptureFixture[str]):
    assert run("compile", "--check", *KERNELS) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"missing  {name}" for name in SMALL]
    assert said.err == "deep-gemm: 2 of 2 kernels are not there: compile them\n"
    assert run("compile", *KERNELS[:2]) == 0
    assert run("compile", "--check", *KERNELS) == 1
    assert "missing  layout" in capsys.readouterr().out
    assert run("compile", *KERNELS, "--jobs", 1) == 0
    said = capsys.readouterr()
    first, second = said.out.splitlines()
    assert first == f"2 kernels, 1 of them there; {default_compiler()} on 1 cores, into {fresh}"
    assert re.fullmatch(r"made 1 kernels in \d+\.\d s, 0\.0 MB", second) and said.err == ""
    assert run("compile", "--check", *KERNELS) == 0
    assert run("compile", *KERNELS) == 0
    assert capsys.readouterr().out.splitlines()[0] == "2 kernels, all of them there"
    for file in fresh.glob("decode.*/kernel.cubin"):
        os.truncate(file, 100)
    assert run("compile", "--check", *KERNELS) == 1
    assert run("compile", *KERNELS) == 0
    assert run("compile", "--check", *KERNELS) == 0


def test_what_is_stale_is_told_from_what_is_missing(
    fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert run("compile", *KERNELS[:2]) == 0
    monkeypatch.setattr(sass, "FEW", 33)  # another version of this package
    assert run("compile", "--check", *KERNELS) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == ["stale    8x64 swapped", "missing  layout"]


def test_a_folder_to_bake_into_an_image(
    fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Serves another process as a read-only folder, wherever it lies."""
    made = tmp_path / "made"
    umask = os.umask(0o077)
    try:
        assert run("compile", *KERNELS, "--output", made) == 0
    finally:
        os.umask(umask)
    assert (made / COMPILER_FILE).read_text() == f"{default_compiler()}\n"
    assert {path.stat().st_mode & 0o777 for path in [made, *made.rglob("*")]} == {0o755, 0o644}
    assert sorted(path.name.partition(".")[0] for path in made.iterdir()) == [COMPILER_FILE, "decode", "layout"]
    assert not fresh.exists()
    shutil.move(made, tmp_path / "moved")
    assert run("compile", "--check", *KERNELS) == 1
    assert run("compile", "--check", *KERNELS, "--output", tmp_path / "moved") == 0
    monkeypatch.setenv("DG_JIT_READ_ONLY_CACHE_DIRS", str(tmp_path / "moved"))
    monkeypatch.setenv("DG_JIT_STRICT", "1")
    assert run("compile", "--check", *KERNELS) == 0
    assert compiler.cubin_for(next(x for x in kernels_for() if x.name == "layout").source())


def test_a_folder_of_another_compiler(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Is sound as it is, but gets no kernels of this one."""
    made = tmp_path / "made"
    assert run("compile", *KERNELS, "--output", made) == 0
    (made / COMPILER_FILE).write_text("NVRTC 99.1\n")
    assert run("compile", *KERNELS, "--output", made) == 1
    assert capsys.readouterr().err == (
        f"deep-gemm: {made} has kernels of NVRTC 99.1, expected {default_compiler()}: "
        "take another folder, or empty it\n"
    )


def test_where_nothing_can_be_kept(fresh: Path, capsys: pytest.CaptureFixture[str]):
    fresh.write_text("in the way")
    assert run("compile", *KERNELS) == 1
    assert capsys.readouterr().err == (
        f"deep-gemm: 2 kernels cannot be kept in {fresh}: take a folder of yours, with room in it\n"
    )


def test_which_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By default, for shapes, a model, a log, a GPU, a number of SMs: as kernels_for says."""

    def listed(*arguments: object) -> list[str]:
        assert run("compile", "--list", *arguments) == 0
        return sorted(capsys.readouterr().out.splitlines())

    def named(*arguments: object, **more: object) -> list[str]:
        return sorted(kernel.name for kernel in kernels_for(*arguments, **more))  # type: ignore[arg-type]

    assert listed() == named()
    assert listed("--sms", 100) == named(num_sms=100) != named()
    assert listed("--alignment", 64) == named(alignment=64)
    assert listed("--kind", "masked", "--kind", "psum") == named(kinds=["masked", "psum"])
    assert listed("--tc-util", 50) == named(tc_util=50)
    assert listed("--block-size-multiple-of", 64, 176) == named(block_size_multiple_of=(64, 176))
    shape = listed("--shape", "2112x7168", "--tokens", 300)
    assert shape == named([(2112, 7168)], kinds=["dense"], ms=(1, 300)) != named()
    assert listed("--shape", "2112x7168", "--tokens", 300, "--gpu", "h200") == named(
        [(2112, 7168)], kinds=["dense"], ms=(1, 300), gpus=[H200]
    )
    (tmp_path / "shapes").write_text("# all of them\n2112x7168\n\nmasked:32x4096x4096x7168  # experts\n")
    with_experts = listed("--shapes", tmp_path / "shapes", "--tokens", 300)
    assert with_experts == sorted({*shape, *listed("--shape", "masked:32x4096x4096x7168")})
    assert listed("--shape", "weight_gradients:768x4096") == named(kinds=["weight_gradients"])
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    model = listed("--model", tmp_path, "--tp", 2, "--tokens", 64)
    layers = [(3072, 4096), (4096, 2048), (14336, 4096), (4096, 7168)]
    assert model == named(layers, kinds=["dense"], ms=(1, 64))
    recorded.append(tmp_path / "log", Problem(100, 2112, 7168), H200, Config())
    assert 2 <= len(listed("--recorded", tmp_path / "log")) <= 5
    assert listed("--recorded", tmp_path / "log", "--kernel", "64x176") == sorted(
        [*listed("--recorded", tmp_path / "log"), "64x176"]
    )


def test_layers_are_shown(fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    arguments = ("--model", tmp_path / "config.json", "--shape", "masked:32x4096x4096x7168", "--check")
    assert run("compile", *arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "attention qkv   dense            N   6144 K   4096 M 1 to 16384"
    assert lines[4] == "masked           N   4096 K   7168 M 1 to 4096, 32 x 4096 groups".rjust(len(lines[4]))


def test_debug_kernels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DG_JIT_DEBUG", "1")
    assert run("compile", "--list") == 0
    names = capsys.readouterr().out.splitlines()
    assert sorted(names) == sorted(kernel.name for kernel in kernels_for(debug=True)) and "report" in names


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--shape", "2112"], "the shape is '2112', expected sizes such as 2112x7168, or one of dense:NxK, "),
        (["--shape", "0x7168"], "the shape is '0x7168', expected sizes"),
        (["--shape", f"{'9' * 5000}x7168"], "the shape is '999"),
        (["--shape", "masked:9999999999x4096x4096x7168"], "M, N, K are 4096, 4096, 7168, expected less than 2^31 each"),
        (["--shapes", os.devnull], "--shapes is /dev/null, expected a shape a line: none is in it"),
        (["--alignment", "63"], "alignment is 63, expected a multiple of 64"),
        (["--output", os.devnull, "--kernel", "layout"], "--output is /dev/null, expected a folder: take another name"),
        (["--shape", "8x2112x7168"], "the shape is '8x2112x7168', expected sizes"),
        (["--shape", "sparse:2112x7168"], "the shape is 'sparse:2112x7168', expected sizes"),
        (["--shape", "masked:2112x7168"], "the shape is 'masked:2112x7168', expected sizes"),
        (["--shape", "2113x7168"], "N is 2113, expected a multiple of 8"),
        (["--shapes", "/nowhere"], "--shapes is /nowhere, which cannot be read: "),
        (["--recorded", "/nowhere"], "/nowhere cannot be read as a log of shapes: "),
        (["--model", "/nowhere"], "/nowhere cannot be read, expected a model's config.json"),
        (["--tp", "8"], "--tp, --ep and --dp say how a model is split: pass --model CONFIG.json, too"),
        (["--kernel", "1x1"], "'1x1' is no kernel, expected one such as 64x32"),
        (["--sms", "133"], "num_sms is 133, expected 1 to 132"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_meant(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]):
    assert run("compile", *arguments) == 1
    assert capsys.readouterr().err.startswith(f"deep-gemm: {complaint}")


# cache


def test_the_cache_is_listed_measured_and_verified(fresh: Path, capsys: pytest.CaptureFixture[str]):
    assert run("cache") == 0
    assert capsys.readouterr().out == f"{fresh}: 0 kernels, 0.0 MB, 0 not used\n"
    assert run("compile", *KERNELS) == 0
    capsys.readouterr()
    assert run("cache", "list") == 0
    decode, layout, total = capsys.readouterr().out.splitlines()
    assert decode.startswith("decode.") and decode.endswith(f"8x64 swapped, {default_compiler()}")
    assert layout.startswith("layout.") and " 0.0 days  layout, " in layout
    assert re.fullmatch(rf"{fresh}: 2 kernels, 0\.\d MB, 0 not used", total)
    assert run("cache", "size") == 0 and capsys.readouterr().out == f"{total}\n"
    assert run("cache", "verify") == 0 and capsys.readouterr().out == f"{total}\n"
    (broken,) = fresh.glob("layout.*")
    os.truncate(broken / "kernel.cubin", 9)
    assert run("cache", "verify") == 1
    fault, total = capsys.readouterr().out.splitlines()
    assert fault.startswith(broken.name) and "kernel.cubin has changed since it was written" in fault
    assert total.endswith("2 kernels, 0.1 MB, 1 not used")
    assert run("cache", "verify", "--folder", fresh.parent / "nowhere") == 0


def test_pruning(fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Takes what is broken; more only if asked to; and nothing that is not the cache's."""
    compiler.obtain(PROBE)
    assert run("compile", *KERNELS) == 0
    (fresh / "notes").mkdir()
    (fresh / "notes" / "mine").write_text("")
    (foreign := fresh / f"build.{'d4' * 16}").mkdir()  # by its name it might be one
    (foreign / "mine").write_text("")
    (old,) = fresh.glob("layout.*")
    os.utime(old / "manifest.json", (0, time.time() - 3 * 86400))

    def left() -> list[str]:
        assert (foreign / "mine").exists()
        return sorted(
            path.name.partition(".")[0] for path in fresh.iterdir() if path.name[0] != "." and path != foreign
        )

    assert run("cache", "prune") == 0 and left() == ["decode", "layout", "notes", "probe"]
    assert capsys.readouterr().out.splitlines()[-1] == f"{fresh}: removed 0 of 3 kernels and 0 leftovers, 0.0 MB"
    assert run("cache", "prune", "--stale") == 0 and left() == ["decode", "layout", "notes"]
    (decode,) = fresh.glob("decode.*")
    os.truncate(decode / "kernel.log", 0)
    assert run("cache", "prune", "--older-than", 4) == 0 and left() == ["layout", "notes"]
    assert run("cache", "prune", "--older-than", 2) == 0 and left() == ["notes"]
    assert run("compile", *KERNELS) == 0
    assert run("cache", "prune", "--all") == 0 and left() == ["notes"] and (fresh / "notes" / "mine").exists()
    assert run("compile", "--kernel", "64x16") == 0  # which only set_block_size_multiple_of asks for
    assert run("cache", "prune", "--stale") == 0 and left() == ["fp8_gemm", "notes"]
    assert run("cache", "list", "--all") == 1
    assert "say what to prune: deep-gemm cache prune" in capsys.readouterr().err


@pytest.mark.parametrize("allowed", [False, True])
def test_a_folder_that_others_can_write_to_is_not_pruned(
    allowed: bool, fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """What is refused is not damaged; and where it is allowed it is as good as any."""
    assert run("compile", *KERNELS) == 0
    fresh.chmod(0o775)
    monkeypatch.setenv("DG_JIT_ALLOW_SHARED_CACHE", str(int(allowed)))
    for action in ("verify", "prune", "list"):
        assert run("cache", action) == int(not allowed)
        assert ("DG_JIT_ALLOW_SHARED_CACHE=1 to trust it" in capsys.readouterr().err) is not allowed
    assert run("compile", "--check", *KERNELS) == int(not allowed)
    fresh.chmod(0o700)
    monkeypatch.setenv("DG_JIT_ALLOW_SHARED_CACHE", "0")
    assert run("compile", "--check", *KERNELS) == 0


def test_files_of_others_stay_where_kernels_are_put(tmp_path: Path):
    for name in (".mine.lock", ".Xauthority.lock"):
        (tmp_path / name).write_text("")
    assert run("compile", *KERNELS[:2], "--output", tmp_path) == 0
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".Xauthority.lock", ".mine.lock"]


# A whole set, and a wheel


def shell(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("DG_")} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=cwd, env=env)


EVERY = """
import sys
from deep_gemm import kernels_for
from deep_gemm.runtime.compiler import READY_MADE, cubin_for
sys.modules["cuda.bindings.nvrtc"] = None  # as where there is no compiler
for kernel in kernels_for():
    assert cubin_for(kernel.source())[:4] == b"\\x7fELF"
print(READY_MADE)
"""


def test_a_wheel_brings_every_kernel(tmp_path: Path, kernel_cache: Path):
    """Installed, strict, without a compiler: all kernels are there. Of changed sources none is."""
    files = shell("git", "ls-files", "-co", "--exclude-standard").stdout.split("\n")
    tree, site = tmp_path / "tree", tmp_path / "site"
    for name in filter(None, files):
        if (ROOT / name).is_file() and not name.startswith(("bench/results", "tests")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    made = shell("make", "wheel", "VENV=", f"PYTHON={sys.executable}", cwd=tree, DG_JIT_CACHE_DIR=str(kernel_cache))
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.stat().st_size < 10e6
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    assert shell(sys.executable, *install).returncode == 0
    environment = {"PYTHONPATH": str(site), "DG_JIT_STRICT": "1", "DG_JIT_CACHE_DIR": str(tmp_path / "cache")}
    done = shell(sys.executable, "-c", EVERY, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    ready = Path(done.stdout.strip())
    assert ready == site / "deep_gemm" / "ready" and not (tmp_path / "cache").exists()
    assert sorted(ready.glob(".*")) == []
    doctor = shell(sys.executable, "-m", "deep_gemm", "doctor", cwd=tmp_path, **environment)
    assert f"ok       ready-made     44 kernels of {default_compiler()}" in doctor.stdout
    with (site / "deep_gemm" / "kernels" / "ptx" / "base.cuh").open("a") as file:
        file.write("// changed\n")
    done = shell(sys.executable, "-c", EVERY, cwd=tmp_path, **environment)
    assert done.returncode == 1 and "MissingKernelError: the kernel 64x32 is not in " in done.stderr


def test_the_whole_set_is_compiled_once(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch):
    """From the command line; and again there is nothing to do."""
    command = (sys.executable, "-m", "deep_gemm", "compile")
    environment = {"PYTHONPATH": str(ROOT), "DG_JIT_CACHE_DIR": str(kernel_cache)}
    first = shell(*command, **environment)
    assert first.returncode == 0 and first.stdout.startswith("44 kernels, "), first.stderr
    assert first.stderr == ""  # no progress bar, for this is no terminal
    again = shell(*command, **environment)
    assert again.stdout == "44 kernels, all of them there\n"
    assert shell(*command, "--check", **environment).returncode == 0


@pytest.mark.skipif(not shutil.which("script"), reason="needs `script`, which makes a terminal")
def test_a_progress_bar(fresh: Path):
    """On a terminal: how much is done, and how long the rest takes."""
    command = f"{sys.executable} -m deep_gemm compile {' '.join(f'--kernel {name!r}' for name in SMALL)}"
    environment = {"PYTHONPATH": str(ROOT), "DG_JIT_CACHE_DIR": str(fresh), "TERM": "xterm"}
    done = shell("script", "-qec", f"stty rows 40 cols 100; {command}", "/dev/null", **environment)
    assert "100%|" in done.stdout and "2 of 2 kernels [" in done.stdout and " left]" in done.stdout
