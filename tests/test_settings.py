"""The environment: every variable with every value, and the text of every complaint."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

import deep_gemm
from deep_gemm import settings
from deep_gemm.errors import InvalidInputError

FLAGS = get_args(settings.Flag)
ON_BY_DEFAULT = {"DG_JIT_USE_NVRTC"}
OLD_NAMES = {
    "DG_JIT_CACHE_DIR": "DG_CACHE_DIR",
    "DG_JIT_NVCC_COMPILER": "DG_NVCC_COMPILER",
    "DG_JIT_PRINT_COMPILER_COMMAND": "DG_JIT_PRINT_NVCC_COMMAND",
    "DG_JIT_PTXAS_VERBOSE": "DG_PTXAS_VERBOSE",
    "CUDA_HOME": "CUDA_PATH",
}


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch):
    for row in settings.describe():
        for name in (row.name, *row.old_names):
            monkeypatch.delenv(name, raising=False)


def test_the_table_is_whole():
    assert {row.name for row in settings.describe()} == {
        *FLAGS,
        "DG_JIT_CACHE_DIR",
        "DG_JIT_NVCC_COMPILER",
        "CUDA_HOME",
    }
    assert {row.name: row.old_names for row in settings.describe() if row.old_names} == {
        name: (old,) for name, old in OLD_NAMES.items()
    }


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


def test_old_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DG_PTXAS_VERBOSE", "1")
    assert settings.get("DG_JIT_PTXAS_VERBOSE") is True
    monkeypatch.setenv("DG_JIT_PTXAS_VERBOSE", "")
    assert settings.get("DG_JIT_PTXAS_VERBOSE") is True
    monkeypatch.setenv("DG_JIT_PTXAS_VERBOSE", "0")
    assert settings.get("DG_JIT_PTXAS_VERBOSE") is False

    monkeypatch.setenv("DG_JIT_PRINT_NVCC_COMMAND", "1")
    assert settings.get("DG_JIT_PRINT_COMPILER_COMMAND") is True
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


def test_cache_dir_without_a_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DG_JIT_CACHE_DIR", "~no-such-user/kernels")
    complaint = "^DG_JIT_CACHE_DIR is '~no-such-user/kernels', expected a folder that needs no home directory"
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
