"""Reads a cubin: registers, local memory, and how often the instructions that matter occur.

Source: the opcode numbers were found by disassembling with nvdisasm 13.5, and tests/test_sass.py holds them against
the nvdisasm at hand. An instruction of sm_90 has 128 bits; its lowest 9 are the opcode, the next 3 the form of its
operands. The attributes of .nv.info are named as in nvdisasm's listing.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from ..errors import InvalidInputError, MissingDependencyError
from . import tools

_FFMA, _QGMMA, _LDL, _STL, _WARPGROUP, _USETMAXREG = 0x023, 0x1F3, 0x183, 0x187, 0x1C5, 0x1C8
_WAIT = 1 << 47  # of WARPGROUP: DEPBAR, else ARRIVE
_EIATTR_MIN_STACK_SIZE, _EIATTR_REGCOUNT = 0x12, 0x2F
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


def read(image: bytes, entry: str = "fp8_gemm") -> KernelInfo:
    """Reads one kernel of a cubin.

    Raises: InvalidInputError if it has no such kernel; MissingDependencyError without pyelftools.
    """
    try:
        from elftools.elf.elffile import ELFFile
    except ImportError as error:
        raise MissingDependencyError("reading a cubin needs pyelftools: pip install pyelftools") from error

    sections: dict[str, Any] = {section.name: section for section in ELFFile(BytesIO(image)).iter_sections()}
    if f".text.{entry}" not in sections:
        kernels = ", ".join(name[6:] for name in sections if name.startswith(".text."))
        raise InvalidInputError(f"the cubin has no kernel {entry!r}, expected one of: {kernels}")

    symbols = [symbol.name for symbol in sections[".symtab"].iter_symbols()]
    attributes = _attributes(sections[".nv.info"].data(), symbols.index(entry))
    text = sections[f".text.{entry}"].data()
    words = [low for low, _ in struct.iter_unpack("<QQ", text)]
    opcodes = Counter(word & 0x1FF for word in words)
    waits = sum(word & 0x1FF == _WARPGROUP and bool(word & _WAIT) for word in words)
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


def disassemble(image: bytes) -> str:
    """The listing of nvdisasm, with the bits of each instruction. Raises: MissingDependencyError without nvdisasm."""
    nvdisasm = tools.find("nvdisasm", "nvidia-cuda-nvdisasm", "pip install nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory(prefix="deep_gemm.") as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(image)
        return subprocess.run([nvdisasm, "-hex", path], check=True, capture_output=True, text=True).stdout


def _attributes(info: bytes, symbol: int) -> dict[int, int]:
    """The attributes of .nv.info of one symbol. Each: a format, a number, 16 bits and, in format 4, so many bytes."""
    attributes: dict[int, int] = {}
    while info:
        form, number, size = struct.unpack_from("<BBH", info)
        size = size if form == 4 else 0
        if size == 8 and struct.unpack_from("<I", info, 4)[0] == symbol:
            (attributes[number],) = struct.unpack_from("<I", info, 8)
        info = info[4 + size :]
    return attributes
