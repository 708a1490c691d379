"""For the tests of casts, on a CPU and on a GPU: inputs that are hard, and what must be equal."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deep_gemm import quantize
from deep_gemm.runtime import driver, quantization

Pair = tuple[torch.Tensor, torch.Tensor]

KERNELS = Path(__file__).parents[1] / "deep_gemm" / "kernels"
COMPILER = shutil.which("c++")
DTYPES = tuple(quantization.TYPES)
CASTS: dict[str, Callable[..., Pair]] = {
    "per_token": quantize.per_token_cast_to_fp8,
    "per_block": quantize.per_block_cast_to_fp8,
    "per_channel": quantize.per_channel_cast_to_fp8,
    "swiglu": quantize.swiglu_cast_to_fp8,
}


def bits(x: torch.Tensor) -> torch.Tensor:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.cpu().contiguous().view(whole)


def check(got: Pair, want: Pair, name: object = "") -> None:
    """The same bits, shapes and strides; the former may be on a GPU."""
    for which, a, b in zip(("values", "scales"), got, want, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()), (name, which)
        wrong = (bits(a) != bits(b)).nonzero()
        assert not len(wrong), (name, which, len(wrong), wrong[0].tolist())


def hard(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, spoilt: float = 1e-3) -> torch.Tensor:
    """Many magnitudes, zeros of both signs, subnormals, and a share of NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(shape, generator=generator)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-14, 14, shape, generator=generator)
    x = x.to(dtype)
    x[chance > 0.98] = 0.0
    x[chance > 0.99] = -0.0
    x[chance > 0.995] = torch.finfo(dtype).smallest_normal / 2
    for i, value in enumerate((math.nan, -math.nan, math.inf, -math.inf)):
        x[(chance >= i * spoilt / 4) & (chance < (i + 1) * spoilt / 4)] = value
    return x


def every_pattern(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """All bit patterns of 16-bit types, in groups of like and of unlike magnitudes, also of finite ones alone."""
    x = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype).view(256, 256)
    yield "ascending", x
    yield "transposed", x.mT.contiguous()
    shuffled = x.view(-1)[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].view(256, 256)
    yield "shuffled", shuffled
    yield "finite", torch.where(shuffled.isfinite(), shuffled, torch.zeros_like(shuffled))
    yield "small", torch.where(shuffled.abs() < 300, shuffled, torch.ones_like(shuffled))


def orders(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The same values in other memory: what the kernels read as it lies, and what they do not."""
    yield "contiguous", x
    yield "transposed", x.mT.contiguous().mT
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 24), math.nan, dtype=x.dtype, device=x.device)
    for name, start in (("a part", 16), ("off 16 bytes", 1)):
        part = wide[..., start : start + x.shape[-1]]
        yield name, part.copy_(x)
        wide = wide.clone()
    if x.dim() > 2:
        yield "groups inside", x.movedim(0, -2).contiguous().movedim(-2, 0)


def counted(pair: Pair, counts: torch.Tensor) -> Pair:
    """Zeros where rows are not real, in copies."""
    inside = torch.arange(pair[0].shape[1])[:, None] < counts.cpu()[:, None, None]
    values, scales = (x.cpu().clone() for x in pair)
    values.view(torch.uint8).masked_fill_(~inside, 0)
    return values, scales.masked_fill_(~inside, 0)


class Emulator:
    """Stands for the driver: runs kernels/quantize.cu on the CPU, by casts.cpp."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.emulated = ctypes.CDLL(str(folder / "casts.so"))
        self.launched: list[str] = []
        self.enabled = True
        cast = quantization.cast

        def watched(kind: str, x: torch.Tensor, *arguments: Any, **keywords: Any) -> None:
            self.memory = x.untyped_storage()
            cast(kind, x, *arguments, **keywords)

        def is_offered(x: torch.Tensor) -> bool:
            return self.enabled and x.numel() > 0 and x.shape[-1] % 16 == 0 and x.dtype in quantization.TYPES

        for module in (quantization, driver):
            monkeypatch.setattr(module, "driver", lambda: self)
        again, self.at_once = quantization.again, 0

        def counted(key: Any, x: torch.Tensor, counts: torch.Tensor | None) -> Pair | None:
            self.memory = x.untyped_storage()
            made = again(key, x, counts) if self.enabled else None
            self.at_once += made is not None
            return made

        monkeypatch.setattr(quantization, "again", counted)
        monkeypatch.setattr(quantization, "_thread", quantization._Thread())
        monkeypatch.setattr(quantization, "cast", watched)
        monkeypatch.setattr(quantization, "_kernel", lambda index, entry: entry)
        monkeypatch.setattr(quantization.device, "current", lambda index: SimpleNamespace(num_sms=1))
        monkeypatch.setattr(quantize, "_is_offered", is_offered)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index that CPU tensors have
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)

    @staticmethod
    def build(folder: Path) -> None:
        source = quantization.source()
        (folder / "ptx").mkdir()
        source.write(folder)
        for name in ("base", "convert"):  # casts.cpp has it all
            (folder / "ptx" / f"{name}.cuh").write_text("")
        program = Path(__file__).with_suffix(".cpp")
        options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", f"-I{folder}"]
        subprocess.run([str(COMPILER), *options, str(program), "-o", str(folder / "casts.so")], check=True)

    def cuLaunchKernel(self, kernel, x, y, z, threads, one, another, smem, stream, parameters, extra) -> Any:
        self.launched.append(kernel)
        args = ctypes.c_void_p.from_address(parameters)
        grid, start, size = (ctypes.c_uint32 * 3)(x, y, z), self.memory.data_ptr(), self.memory.nbytes()
        where = ctypes.c_void_p(start), ctypes.c_uint64(size)
        assert self.emulated.launch(kernel.encode(), args, grid, threads, *where) == 0, "something else was read"
        return (0,)

    def cuCtxGetCurrent(self) -> Any:
        return 0, 1

    def by_torch(self, call: Callable[[], Pair]) -> Pair:
        self.enabled = False
        try:
            return call()
        finally:
            self.enabled = True
