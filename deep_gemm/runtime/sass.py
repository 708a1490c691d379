"""Reads a cubin: registers, local memory, how often the instructions that matter occur; and interleaves its FFMAs.

Source: the opcode numbers were found by disassembling with nvdisasm 13.5, and tests/test_sass.py holds them against
the nvdisasm at hand. An instruction of sm_90 has 128 bits; its lowest 9 are the opcode, the next 3 the form of its
operands. Its highest 23 bits are for the scheduler: ptxas 12.8 and 12.9 make the same of a kernel but for the yield and
reuse bits of FFMAs. The attributes of .nv.info are named as in nvdisasm's listing.
"""

from __future__ import annotations

import importlib.util
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from ..errors import InvalidInputError, MissingDependencyError
from . import tools

# Of so many FFMAs of a promotion one yields: in its first half, in its second; beside one warpgroup or more, which have
# wgmmas to issue at that time; and in one of few FFMAs. Measured: docs/facts.md, "Registers under the tensor cores".
YIELDS, YIELDS_BESIDE_MORE = (4, 16), (4, 4)
FEW, YIELDS_OF_FEW = 32, (2, 2)

_FFMA, _QGMMA, _LDL, _STL, _WARPGROUP, _USETMAXREG = 0x023, 0x1F3, 0x183, 0x187, 0x1C5, 0x1C8
_WAIT = 1 << 47  # of WARPGROUP: DEPBAR, else ARRIVE
_OPCODE, _FORM = 0x1FF, 0xE00
_REGISTERS = 0x200  # the form whose operands are three registers,
_OPERANDS, _RESULT = (24, 32, 64), 16  # numbered by the bytes here; and the one that is written
_STALL, _ONE_CYCLE = 0xF << 105, 1 << 105  # until this warp's next instruction
_STAY = 1 << 109  # with this warp; 0 yields to another
_FIRST_REUSE = 122
_REUSE = 0xF << _FIRST_REUSE  # the operands that are kept for this warp's next instruction, one bit each
_EIATTR_MAX_THREADS, _EIATTR_MIN_STACK_SIZE, _EIATTR_REGCOUNT = 0x05, 0x12, 0x2F
_RESERVED_SMEM_BYTES = 1024  # of every block on sm_90, for the system


@dataclass(frozen=True)
class KernelInfo:
    """What a kernel costs and holds. Counts are of instructions in the text, not of executions.

    A pipeline of wgmmas has several qgmma between one of warpgroup_arrives and of warpgroup_waits; where the compiler
    serialises, each qgmma has its own.
    """

    registers: int  # of a thread at entry, before any setmaxnreg
    local_bytes: int  # of a thread: spilled registers, and arrays with computed indices
    shared_bytes: int  # static, of a block
    instructions: int
    qgmma: int
    ffma: int
    local_loads: int
    local_stores: int
    warpgroup_arrives: int
    warpgroup_waits: int
    setmaxnreg: int


def can_read() -> bool:
    """Whether pyelftools, without which nothing here works, is installed."""
    return importlib.util.find_spec("elftools") is not None


def read(image: bytes, entry: str = "fp8_gemm") -> KernelInfo:
    """Reads one kernel of a cubin.

    Raises: InvalidInputError if it has no such kernel, or is no ELF file; MissingDependencyError without pyelftools.
    """
    sections, kernels = _sections(image), _kernels(image)
    if entry not in kernels:
        raise InvalidInputError(f"the cubin has no kernel {entry!r}, expected one of: {', '.join(kernels)}")

    symbols = [symbol.name for symbol in sections[".symtab"].iter_symbols()]
    of_kernel = struct.pack("<I", symbols.index(entry))
    attributes = {
        number: int.from_bytes(value[4:], "little")
        for number, value in _attributes(sections[".nv.info"].data())
        if len(value) == 8 and value.startswith(of_kernel)
    }
    words = _words(image[kernels[entry]])
    opcodes = Counter(word & _OPCODE for word in words)
    waits = sum(word & _OPCODE == _WARPGROUP and bool(word & _WAIT) for word in words)
    shared = sections.get(f".nv.shared.{entry}")
    return KernelInfo(
        registers=attributes[_EIATTR_REGCOUNT],
        local_bytes=attributes[_EIATTR_MIN_STACK_SIZE],
        shared_bytes=shared["sh_size"] - _RESERVED_SMEM_BYTES if shared else 0,
        instructions=len(words),
        qgmma=opcodes[_QGMMA],
        ffma=opcodes[_FFMA],
        local_loads=opcodes[_LDL],
        local_stores=opcodes[_STL],
        warpgroup_arrives=opcodes[_WARPGROUP] - waits,
        warpgroup_waits=waits,
        setmaxnreg=opcodes[_USETMAXREG],
    )


def interleave(image: bytes) -> bytes:
    """The image with few of a promotion's FFMAs yielding to another warp, the others keeping the scale for the next.

    What yields lets another warpgroup issue its wgmmas, or else these come late. It keeps no operand, for those are
    kept for the next instruction of the same warp, and an FFMA that reads three registers takes a clock longer than
    one that reads two: there are two banks of registers. ptxas lets every other one yield since 12.9, none before, and
    the kernel is 2 and 18 % slower for it (docs/facts.md). Left alone are kernels without wgmmas, those of at most 256
    threads, which have no second warpgroup that promotes, and FFMAs with a longer stall.

    Raises: InvalidInputError for what is no ELF file; MissingDependencyError without pyelftools.
    """
    result = bytearray(image)
    for kernel, text in _kernels(image).items():
        words, threads = _words(image[text]), _max_threads(image, kernel)
        if threads > 256 and any(word & _OPCODE == _QGMMA for word in words):
            for promotion in _promotions(words):
                few = len(promotion) <= FEW
                early, late = YIELDS_OF_FEW if few else YIELDS_BESIDE_MORE if threads > 384 else YIELDS
                for count, i in enumerate(promotion, 1):
                    words[i] &= ~(_STAY | _REUSE)
                    if count % (early if count <= len(promotion) / 2 else late):
                        words[i] |= _STAY | _kept(words[i], words[i + 1])
            result[text] = b"".join(word.to_bytes(16, "little") for word in words)
    return bytes(result)


def _promotions(words: list[int]) -> Iterator[list[int]]:
    """Where the FFMAs of one cycle and three registers are, between one WARPGROUP and the next."""
    promotion: list[int] = []
    for i, word in enumerate(words):
        if word & _OPCODE == _WARPGROUP:
            yield promotion
            promotion = []
        elif word & (_OPCODE | _FORM | _STALL) == _FFMA | _REGISTERS | _ONE_CYCLE:
            promotion.append(i)
    yield promotion


def _kept(ffma: int, following: int) -> int:
    """The reuse bits of an FFMA: of operands that the next instruction, an FFMA as well, reads in the same place."""
    if following & (_OPCODE | _FORM) != _FFMA | _REGISTERS:
        return 0
    written = ffma >> _RESULT & 0xFF
    kept = [ffma >> at & 0xFF == following >> at & 0xFF != written for at in _OPERANDS]
    return sum(bit << _FIRST_REUSE + place for place, bit in enumerate(kept))


def ffma_bits(image: bytes) -> dict[str, str]:
    """By kernel: how many FFMAs, in how many runs, and the yield (0: yields) and reuse bits of the longest's first."""
    return {kernel: _ffma_bits(_words(image[text])) for kernel, text in _kernels(image).items()}


def _ffma_bits(words: list[int]) -> str:
    runs = [list(run) for is_ffma, run in groupby(words, lambda word: word & _OPCODE == _FFMA) if is_ffma]
    if not runs:
        return "no FFMAs"
    start = max(runs, key=len)[:8]
    yields = "".join(str((word & _STAY) >> 109) for word in start)
    reuse = "".join(f"{(word & _REUSE) >> 122:x}" for word in start)
    return f"{sum(map(len, runs))} FFMAs, runs: {len(runs)}, yield {yields}, reuse {reuse}"


def disassemble(image: bytes) -> str:
    """The listing of nvdisasm, with the bits of each instruction. Raises: MissingDependencyError without nvdisasm."""
    nvdisasm = tools.find("nvdisasm", "nvidia-cuda-nvdisasm", "pip install nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory(prefix="deep_gemm.") as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(image)
        return subprocess.run([nvdisasm, "-hex", path], check=True, capture_output=True, text=True).stdout


def _sections(image: bytes) -> dict[str, Any]:
    if not can_read():
        raise MissingDependencyError("reading a cubin needs pyelftools: pip install pyelftools")
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        return {section.name: section for section in ELFFile(BytesIO(image)).iter_sections()}
    except ELFError as error:
        raise InvalidInputError(f"no cubin, expected an ELF file: {error}") from error


def _kernels(image: bytes) -> dict[str, slice]:
    """Where the instructions of each kernel are."""
    headers = {name[6:]: section.header for name, section in _sections(image).items() if name.startswith(".text.")}
    return {name: slice(x["sh_offset"], x["sh_offset"] + x["sh_size"]) for name, x in headers.items()}


def _words(text: bytes) -> list[int]:
    return [low | high << 64 for low, high in struct.iter_unpack("<QQ", text)]


def _max_threads(image: bytes, kernel: str) -> int:
    """Of a block, by the kernel's launch bounds; 0 without."""
    attributes = dict(_attributes(_sections(image)[f".nv.info.{kernel}"].data()))
    return prod(struct.unpack("<3I", attributes[_EIATTR_MAX_THREADS])) if _EIATTR_MAX_THREADS in attributes else 0


def _attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes of a section .nv.info. Each: a format, a number, 16 bits and, in format 4, so many bytes."""
    while info:
        form, number, size = struct.unpack_from("<BBH", info)
        size = size if form == 4 else 0
        yield number, info[4 : 4 + size]
        info = info[4 + size :]
