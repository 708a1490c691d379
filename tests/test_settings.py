"""The environment: every variable by every name with every value, the text of every complaint, and that it acts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from probe import numbered

import deep_gemm
from deep_gemm import settings
from deep_gemm.errors import InvalidInputError
from deep_gemm.runtime import driver, launch, tools
from deep_gemm.runtime.compiler import cubin_for

FLAGS = get_args(settings.Flag)
ON_BY_DEFAULT = {"DG_JIT_USE_NVRTC"}
OLD_NAMES = {
    "DG_JIT_CACHE_DIR": "DG_CACHE_DIR",
    "DG_JIT_NVCC_COMPILER": "DG_NVCC_COMPILER",
    "DG_JIT_PRINT_COMPILER_COMMAND": "DG_JIT_PRINT_NVCC_COMMAND",
    "DG_JIT_PTXAS_VERBOSE": "DG_PTXAS_VERBOSE",
    "CUDA_HOME": "CUDA_PATH",
}
# What clients set: DeepGEMM's variables, and CUDA's own.
KNOWN = {
    "DG_JIT_CACHE_DIR", "DG_JIT_DEBUG", "DG_PRINT_CONFIGS", "DG_JIT_USE_NVRTC", "DG_JIT_NVCC_COMPILER",
    "DG_JIT_PRINT_COMPILER_COMMAND", "DG_JIT_PTXAS_VERBOSE", "DG_JIT_PTXAS_CHECK", "DG_JIT_WITH_LINEINFO",
    "DG_JIT_DUMP_ASM", "DG_JIT_DUMP_PTX", "DG_JIT_DUMP_SASS", "DG_JIT_PRINT_LOAD_TIME", "DG_DISABLE_FFMA_INTERLEAVE",
    "DG_PRINT_REG_REUSE", "DG_USE_NVIDIA_TOOLS", "DG_JIT_READ_ONLY_CACHE_DIRS", "DG_JIT_ALLOW_SHARED_CACHE",
    "DG_JIT_STRICT", "DG_RECORD_SHAPES", "CUDA_HOME",
}  # fmt: skip
# Where tests hold that a variable acts.
ACTS = {
    "test_settings.py": {"DG_JIT_CACHE_DIR", "DG_CACHE_DIR", "CUDA_HOME", "CUDA_PATH", "DG_JIT_PRINT_LOAD_TIME"},
    "test_gemm.py": {"DG_PRINT_CONFIGS"},
    "test_recorded.py": {"DG_RECORD_SHAPES"},
    "test_testing.py": {"DG_USE_NVIDIA_TOOLS"},
    "test_compiler.py": {
        "DG_JIT_DEBUG", "DG_JIT_USE_NVRTC", "DG_JIT_NVCC_COMPILER", "DG_NVCC_COMPILER", "DG_JIT_PRINT_COMPILER_COMMAND",
        "DG_JIT_PRINT_NVCC_COMMAND", "DG_JIT_PTXAS_VERBOSE", "DG_PTXAS_VERBOSE", "DG_JIT_PTXAS_CHECK",
        "DG_JIT_WITH_LINEINFO", "DG_JIT_DUMP_ASM", "DG_JIT_DUMP_PTX", "DG_JIT_DUMP_SASS", "DG_DISABLE_FFMA_INTERLEAVE",
        "DG_PRINT_REG_REUSE", "DG_JIT_READ_ONLY_CACHE_DIRS", "DG_JIT_ALLOW_SHARED_CACHE", "DG_JIT_STRICT",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch):
    for row in settings.describe():
        for name in (row.name, *row.old_names):
            monkeypatch.delenv(name, raising=False)


def test_the_table_is_whole():
    rows = settings.describe()
    paths = {"DG_JIT_CACHE_DIR", "DG_JIT_READ_ONLY_CACHE_DIRS", "DG_JIT_NVCC_COMPILER", "DG_RECORD_SHAPES", "CUDA_HOME"}
    assert {row.name for row in rows} == KNOWN == {*FLAGS, *paths}
    assert {row.name: row.old_names for row in rows if row.old_names} == {k: (old,) for k, old in OLD_NAMES.items()}


def test_every_variable_acts():
    """The package asks for each one, and by each of its names a test sets it: `ACTS` says where."""
    package, folder = Path(deep_gemm.__file__).parent, Path(__file__).parent
    code = "".join(path.read_text() for path in package.rglob("*.py") if path.name != "settings.py")
    assert [name for name in sorted(KNOWN) if f'"{name}"' not in code] == []
    assert set().union(*ACTS.values()) == KNOWN | set(OLD_NAMES.values())
    for file, names in ACTS.items():
        text = (folder / file).read_text()
        assert [name for name in sorted(names) if f'"{name}"' not in text] == [], file


def test_nothing_else_reads_the_environment():
    package = Path(deep_gemm.__file__).parent
    readers = [
        path.name
        for path in package.rglob("*.py")
        if "environ[" in (text := path.read_text()) or "getenv" in text or "environ.get" in text
    ]
    assert readers == ["settings.py"]


@pytest.mark.parametrize("name", FLAGS)
def test_flag(name: settings.Flag, monkeypatch: pytest.MonkeyPatch):
    default = name in ON_BY_DEFAULT
    assert settings.get(name) is default
    for text, value in {"0": False, "1": True, "": default}.items():
        monkeypatch.setenv(name, text)
        assert settings.get(name) is value


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("text", ["maybe", "2", "true", " 1"])
def test_flag_that_is_none(name: settings.Flag, text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, text)
    with pytest.raises(InvalidInputError) as caught:
        settings.get(name)
    assert str(caught.value) == f"{name} is {text!r}, expected 0 or 1"


@pytest.mark.parametrize(("name", "old"), OLD_NAMES.items())
def test_old_names(name: str, old: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The new one wins; empty counts as not set."""
    first, second = (False, True) if name in FLAGS else (tmp_path / "first", tmp_path / "second")
    texts = {first: "0", second: "1"} if name in FLAGS else {first: str(first), second: str(second)}
    if name not in FLAGS:
        for program in (first, second):
            program.touch(mode=0o755)

    def value() -> settings.Value:
        return settings.get(name)  # type: ignore[call-overload]

    monkeypatch.setenv(old, texts[second])
    assert value() == second
    monkeypatch.setenv(name, "")
    assert value() == second
    monkeypatch.setenv(name, texts[first])
    assert value() == first
    monkeypatch.delenv(name)
    monkeypatch.delenv(old)
    monkeypatch.setenv(name, texts[second])
    assert value() == second


def test_a_complaint_names_the_variable_that_is_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DG_JIT_PRINT_NVCC_COMMAND", "yes")
    with pytest.raises(InvalidInputError, match=r"^DG_JIT_PRINT_NVCC_COMMAND is 'yes', expected 0 or 1$"):
        settings.get("DG_JIT_PRINT_COMPILER_COMMAND")


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings.get("DG_JIT_CACHE_DIR") == tmp_path / ".deep_gemm"
    monkeypatch.setenv("DG_CACHE_DIR", "~/old")
    assert settings.get("DG_JIT_CACHE_DIR") == tmp_path / "old"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DG_JIT_CACHE_DIR", "new")
    assert settings.get("DG_JIT_CACHE_DIR") == tmp_path / "new"


def test_read_only_cache_dirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert settings.get("DG_JIT_READ_ONLY_CACHE_DIRS") is None
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DG_JIT_READ_ONLY_CACHE_DIRS", "/opt/kernels::~/b:c")
    assert settings.get("DG_JIT_READ_ONLY_CACHE_DIRS") == (Path("/opt/kernels"), tmp_path / "b", tmp_path / "c")


def test_cache_dir_without_a_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DG_JIT_CACHE_DIR", "~no-such-user/kernels")
    complaint = "^DG_JIT_CACHE_DIR is '~no-such-user/kernels', expected a path that needs no home directory"
    with pytest.raises(InvalidInputError, match=complaint):
        settings.get("DG_JIT_CACHE_DIR")


def test_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert settings.get("DG_JIT_NVCC_COMPILER") is None
    nvcc = tmp_path / "nvcc"
    monkeypatch.setenv("DG_NVCC_COMPILER", str(nvcc))
    with pytest.raises(InvalidInputError) as caught:
        settings.get("DG_JIT_NVCC_COMPILER")
    wish = "a program that can be run: give its full path, or a name on PATH"
    assert str(caught.value) == f"DG_NVCC_COMPILER is {str(nvcc)!r}, expected {wish}"

    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    assert settings.get("DG_JIT_NVCC_COMPILER") == nvcc
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert settings.get("DG_JIT_NVCC_COMPILER") == nvcc


def test_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert settings.get("CUDA_HOME") == Path("/usr/local/cuda")
    monkeypatch.setenv("CUDA_PATH", "/opt/cuda")
    assert settings.get("CUDA_HOME") == Path("/opt/cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert settings.get("CUDA_HOME") == tmp_path


def test_describe_raises_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DG_JIT_DEBUG", "maybe")
    monkeypatch.setenv("DG_JIT_PTXAS_CHECK", "1")
    values = {row.name: row.value for row in settings.describe()}
    assert values["DG_JIT_DEBUG"] == "DG_JIT_DEBUG is 'maybe', expected 0 or 1"
    assert values["DG_JIT_PTXAS_CHECK"] is True
    assert values["DG_JIT_NVCC_COMPILER"] is None
    assert all(row.meaning for row in settings.describe())


def test_unknown_name():
    with pytest.raises(KeyError):
        settings.get("DG_NO_SUCH_SETTING")  # type: ignore[call-overload]


# That they act, where no other file holds it


@pytest.mark.parametrize("name", ["DG_JIT_CACHE_DIR", "DG_CACHE_DIR"])
def test_kernels_are_kept_where_the_cache_is(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    source = numbered(["DG_JIT_CACHE_DIR", "DG_CACHE_DIR"].index(name) + 1000)
    monkeypatch.setenv(name, str(tmp_path / "kernels"))
    image = cubin_for(source)
    assert [path.read_bytes() for path in (tmp_path / "kernels").rglob("*.cubin")] == [image]


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_programs_of_the_toolkit_are_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    program = tmp_path / "bin" / "deep-gemm-program"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setenv(name, str(tmp_path))
    assert tools.find(program.name, "no-such-package", "install it") == program


@pytest.mark.parametrize("value", ["0", "1"])
def test_load_time_is_printed(value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Over a driver that does nothing; with one, in test_gpu.py."""
    names = ("MAX_DYNAMIC_SHARED_SIZE_BYTES", "PREFERRED_SHARED_MEMORY_CARVEOUT")
    attribute = SimpleNamespace(**{f"CU_FUNC_ATTRIBUTE_{name}": i for i, name in enumerate(names)})
    idle = SimpleNamespace(CUfunction_attribute=attribute, CUfunction=int)
    for name in ("cuLibraryLoadData", "cuLibraryGetKernel", "cuDeviceGet", "cuKernelSetAttribute"):
        setattr(idle, name, lambda *arguments: 7)
    for module in (launch, driver):
        monkeypatch.setattr(module, "driver", lambda: idle)
        monkeypatch.setattr(module, "check", lambda result, action: result)
    monkeypatch.setenv("DG_JIT_PRINT_LOAD_TIME", value)
    assert launch._load(b"image", "64x16", 1024, 0) == 7
    said = capsys.readouterr().err
    assert (said.startswith("deep_gemm: loaded 64x16 in ") and said.endswith(" ms\n")) is (value == "1")
    assert bool(said) is (value == "1")
