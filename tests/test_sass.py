"""What is read out of a cubin, held against the compiler's own words and against nvdisasm."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from probe import LOCAL_MEMORY, PROBE, SERIALISED, SETMAXNREG_IGNORED

from deep_gemm.errors import InvalidInputError, MissingDependencyError
from deep_gemm.plan import make_tile
from deep_gemm.runtime import sass, tools
from deep_gemm.runtime.compiler import Source, obtain

INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9]+)(\.[A-Z0-9.]+)?.*/\* 0x[0-9a-f]{16} \*/$", re.MULTILINE
)


def words_of(log: str) -> dict[str, int]:
    def figure(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found[1]) if found else 0

    return {
        "registers": figure(r"Used (\d+) registers"),
        "local_bytes": figure(r"(\d+) bytes stack frame"),
        "shared_bytes": figure(r"(\d+) bytes smem"),
    }


@pytest.mark.parametrize("source", [PROBE, SERIALISED, LOCAL_MEMORY])
def test_the_compiler_says_the_same(source: Source):
    cubin = obtain(source)
    info = sass.read(cubin.image, "probe")
    assert words_of(cubin.log) == {name: getattr(info, name) for name in ("registers", "local_bytes", "shared_bytes")}
    assert info.registers > 0
    assert info.local_bytes == cubin.local_bytes


def test_what_the_probe_holds():
    info = sass.read(obtain(PROBE).image, "probe")
    assert (info.qgmma, info.warpgroup_arrives, info.warpgroup_waits) == (2, 1, 1)
    assert info.ffma == 4
    assert (info.local_bytes, info.local_loads, info.local_stores, info.shared_bytes) == (0, 0, 0, 0)
    assert info.setmaxnreg == 0


def test_serialised_wgmmas_show():
    info = sass.read(obtain(SERIALISED).image, "probe")
    assert info.warpgroup_arrives == info.warpgroup_waits == info.qgmma > 2


def test_local_memory_shows():
    info = sass.read(obtain(LOCAL_MEMORY).image, "probe")
    assert info.local_bytes == 256 and info.local_loads and info.local_stores
    assert info.shared_bytes == 33 * 4


def test_a_kernel_that_is_not_there():
    with pytest.raises(InvalidInputError, match=r"^the cubin has no kernel 'fp8_gemm', expected one of: probe$"):
        sass.read(obtain(PROBE).image)


def listing_of(image: bytes) -> str:
    try:
        return sass.disassemble(image)
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("source", [PROBE, SERIALISED, LOCAL_MEMORY])
def test_nvdisasm_counts_the_same(source: Source):
    found = INSTRUCTION.findall(listing_of(obtain(source).image))
    names = Counter(name for name, _ in found)
    kinds = Counter(name + suffix.split(".")[1] for name, suffix in found if name == "WARPGROUP" for suffix in [suffix])
    info = sass.read(obtain(source).image, "probe")
    assert info.instructions == len(found)
    assert info.qgmma == names["QGMMA"]
    assert info.ffma == names["FFMA"]
    assert info.local_loads == names["LDL"]
    assert info.local_stores == names["STL"]
    assert info.warpgroup_arrives == kinds["WARPGROUPARRIVE"]
    assert info.warpgroup_waits == kinds["WARPGROUPDEPBAR"]
    assert info.setmaxnreg == names["USETMAXREG"]


# A short promotion of three warpgroups, by the compiler at hand (12.9 or newer) and, with its work undone, by us

PROMOTION = Source(
    "probe.cu",
    """#include "ptx/wgmma.cuh"
extern "C" __global__ void __launch_bounds__(512, 1)
probe(float* out, unsigned long long a, unsigned long long b, int turns) {
    float partial[4][4] = {}, sum[4][4] = {};
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
        const float scale = out[turn];
        arrive();
        for (int i = 0; i < 4; ++i) wgmma(partial[i], a + i, b);
        commit();
        wait();
        for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] = __fmaf_rn(partial[i / 4][i % 4], scale, sum[i / 4][i % 4]);
    }
    for (int i = 0; i < 16; ++i) out[threadIdx.x + i * 512] = sum[i / 4][i % 4];
}
""",
    PROBE.headers,
)
YIELD, REUSE_B = 109, 123  # bits of an instruction; the first is 0 to yield


def with_constant_ffmas(image: bytes) -> bytes:
    """As compilers before 12.9 leave it: every FFMA of a promotion stays and keeps its second operand."""
    result = bytearray(image)
    text = sass._kernels(image)["probe"]
    for at in range(text.start, text.stop, 16):
        word = int.from_bytes(image[at : at + 16], "little")
        if word & 0x1FF == 0x023 and word >> 105 & 0xF == 1:
            result[at : at + 16] = (word | 1 << YIELD | 1 << REUSE_B).to_bytes(16, "little")
    return bytes(result)


def differences(one: bytes, other: bytes) -> list[tuple[int, int]]:
    """The bits, of 128, that differ: (index of the instruction, difference)."""
    words = [sass._words(image[sass._kernels(image)["probe"]]) for image in (one, other)]
    return [(i, a ^ b) for i, (a, b) in enumerate(zip(*words, strict=True)) if a != b]


def test_a_newer_compiler_interleaves_itself():
    image = obtain(PROMOTION).image
    assert sass.interleave(image) == image
    assert re.match(r"16 FFMAs, runs: \d+, yield (01|10)", sass.ffma_bits(image)["probe"])


def test_interleaving():
    before = with_constant_ffmas(obtain(PROMOTION).image)
    after = sass.interleave(before)
    assert sass.interleave(after) == after
    changed = differences(before, after)
    assert len(changed) == 8 and {bits for _, bits in changed} == {1 << YIELD | 1 << REUSE_B}
    words = sass._words(before[sass._kernels(before)["probe"]])
    ffmas = [i for i, word in enumerate(words) if word & 0x1FF == 0x023]
    assert [i for i, _ in changed] == ffmas[1::2]
    text = sass._kernels(before)["probe"]
    assert before[: text.start] == after[: text.start] and before[text.stop :] == after[text.stop :]


@pytest.mark.parametrize(
    "shape, yields",
    [
        ((128, 256), "1110" * 8 + ("1" * 15 + "0") * 2),
        ((192, 128), "1110" * 16),
        ((128, 64), "10" * 16),
    ],
    ids=str,
)
def test_few_of_a_promotion_yield_and_the_others_keep_the_scale(shape: tuple[int, int], yields: str):
    image = sass.interleave(obtain(make_tile(*shape).source()).image)
    assert sass.interleave(image) == image
    words = sass._words(image[sass._kernels(image)["fp8_gemm"]])
    promotions = [run for run in sass._promotions(words) if len(run) == len(yields)]
    assert promotions
    assert {"".join(str(words[i] >> YIELD & 1) for i in run) for run in promotions} == {yields}
    kept = 0
    for i in (i for run in promotions for i in run):
        reuse = words[i] >> 122 & 0xF
        kept += reuse == 2
        assert reuse in (0, 2) and not (reuse and not words[i] >> YIELD & 1)
        if reuse:  # the next one reads the same register there, and this one does not write it
            assert words[i + 1] & 0xFFF == 0x223
            assert words[i] >> 32 & 0xFF == words[i + 1] >> 32 & 0xFF != words[i] >> 16 & 0xFF
    assert kept > 0.9 * len(promotions) * (yields.count("1") - 2)  # the last of a row's has none to keep it for


def test_what_an_ffma_writes_is_not_kept():
    def ffma(*registers: int) -> int:
        return 0x223 | sum(r << at for r, at in zip(registers, (16, 24, 32, 64), strict=True))

    assert sass._kept(ffma(1, 2, 3, 1), ffma(4, 5, 3, 4)) == 1 << REUSE_B
    assert sass._kept(ffma(1, 2, 3, 4), ffma(5, 2, 3, 4)) == 7 << 122
    assert sass._kept(ffma(3, 2, 3, 1), ffma(4, 5, 3, 4)) == 0
    assert sass._kept(ffma(1, 2, 3, 1), ffma(4, 3, 5, 4)) == 0  # in another place
    assert sass._kept(ffma(1, 2, 3, 1), ffma(4, 5, 3, 4) & ~0xFFF | 0x220) == 0  # not an FFMA


@pytest.mark.parametrize("change", [("512", "256"), ("wgmma(partial[i], a + i, b)", "partial[i][i] += a")], ids=str)
def test_there_is_nothing_to_interleave(change: tuple[str, str]):
    """No second warpgroup that promotes; no wgmmas."""
    source = Source(PROMOTION.name, PROMOTION.text.replace(*change), PROMOTION.headers)
    for image in (obtain(source).image, with_constant_ffmas(obtain(source).image)):
        assert sass.interleave(image) == image


def test_the_bits_in_words():
    image = with_constant_ffmas(obtain(PROMOTION).image)
    assert re.match(r"16 FFMAs, runs: \d+, yield 1111\d*, reuse 2222\d*$", sass.ffma_bits(image)["probe"])
    interleaved = sass.ffma_bits(sass.interleave(image))["probe"]
    assert re.match(r"16 FFMAs, runs: \d+, yield (0101|1010)\d*, reuse (0202|2020)\d*$", interleaved)
    assert sass.ffma_bits(obtain(SETMAXNREG_IGNORED).image) == {"probe": "no FFMAs"}


def test_nvdisasm_sees_the_same_instructions():
    """The yield bit it does not show."""
    before = with_constant_ffmas(obtain(PROMOTION).image)
    listings = [listing_of(image) for image in (before, sass.interleave(before))]
    assert [len(re.findall(r"FFMA R\d+, R\d+, R\d+\.reuse, R\d+", listing)) for listing in listings] == [16, 8]
    texts = [re.sub(r"\.reuse|/\* 0x[0-9a-f]{16} \*/| +", "", listing) for listing in listings]
    assert texts[0] == texts[1]


def test_without_nvdisasm(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(tools.importlib.metadata, "files", lambda package: [])
    with pytest.raises(MissingDependencyError) as caught:
        sass.disassemble(b"")
    assert str(caught.value) == (
        f"nvdisasm is neither on PATH nor in CUDA_HOME ({tmp_path}): pip install nvidia-cuda-nvdisasm"
    )


def test_where_a_program_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    for folder in (tmp_path / "toolkit" / "bin", tmp_path / "path"):
        with pytest.raises(MissingDependencyError, match=r"buy one$"):
            tools.find("no-such-tool", "no-such-package-anywhere", "buy one")
        folder.mkdir(parents=True)
        program = folder / "nvdisasm"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        assert tools.find("nvdisasm", "no-such-package-anywhere", "buy one") == program
