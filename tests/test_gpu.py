"""The kernel on a Hopper GPU: equal bits with the exact reference, on every tile, in every corner."""

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import sanitizer
import tiles
import torch

import deep_gemm
from deep_gemm import heuristics, reference
from deep_gemm.config import Config
from deep_gemm.gemm import plan_of
from deep_gemm.plan import describing_source
from deep_gemm.problem import Problem, dense
from deep_gemm.runtime import device
from deep_gemm.runtime import launch as launching
from deep_gemm.runtime.compiler import compile, compile_many, cubin_for
from deep_gemm.runtime.launch import launch

pytestmark = pytest.mark.gpu
GUARD = 12345.0


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """All kernels, compiled on all cores."""
    return compile_many([*(tile.source() for tile in tiles.EVERY), describing_source()])


@pytest.fixture(autouse=True)
def everything_restored():
    yield
    deep_gemm.set_num_sms(None)
    deep_gemm.set_batch_invariant(False)
    deep_gemm.set_pdl(False)


def test_every_tile_compiles_clean_with_the_compiler_of_this_machine(compiled):
    """tests/test_plan.py asks for more, of the compiler that the development environment has."""
    for tile, cubin in zip((*tiles.EVERY, "describe"), compiled, strict=True):
        assert (cubin.warnings, cubin.local_bytes) == ([], 0), tile


def test_the_compiler_compiles_every_time():
    """NVRTC has a cache where there is a driver; what it says of a kernel must not depend on who compiled it before."""
    source = heuristics.make_tile(64, 16).source()
    first, second = compile(source), compile(source)
    assert first.image == second.image
    assert all("registers" in cubin.log for cubin in (first, second))


def operands(m, n, k, seed=0, kind="normal"):
    """Random operands on the GPU. `bits`: every E4M3 pattern but NaN; scales of many sizes, some negative or zero."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    blocks = deep_gemm.ceil_div(k, 128)

    def values(rows):
        if kind == "normal":
            x = torch.randn(rows, k, generator=generator, device="cuda") * 100
            return x.clamp_(-448, 448).to(torch.float8_e4m3fn)
        x = torch.randint(0, 254, (rows, k), generator=generator, device="cuda", dtype=torch.int16)
        return (x + (x >= 127)).to(torch.uint8).view(torch.float8_e4m3fn)  # skips 127 and, at the end, 255

    def scales(rows):
        x = torch.rand(rows, blocks, generator=generator, device="cuda") * 0.01 + 0.005
        if kind == "normal":
            return x
        exponent = torch.randint(-40, 40, (rows, blocks), generator=generator, device="cuda")
        sign = torch.randint(-1, 8, (rows, blocks), generator=generator, device="cuda").clamp_(-1, 1)
        return torch.ldexp(x, exponent) * sign

    return (values(m), scales(m)), (values(n), scales(deep_gemm.ceil_div(n, 128)))


def guarded(m, n):
    """A NaN-filled d inside of a guarded allocation, and the check that nothing around it was written."""
    memory = torch.full((m + 4, n + 32), GUARD, dtype=torch.bfloat16, device="cuda")
    d = memory[2 : m + 2, 16 : n + 16]

    def untouched():
        inside = d.clone()
        d.fill_(GUARD)
        clean = bool((memory == GUARD).all())
        d.copy_(inside)
        return clean

    d.fill_(float("nan"))
    return d, untouched


def exact(a, b, split=None):
    """What the call gives, bit for bit, or a kernel that splits K so."""
    d = torch.empty(a[0].shape[0], b[0].shape[0], dtype=torch.bfloat16, device="cuda")
    split = plan_of(dense(a, b, d)[0]).split if split is None else split
    reference.run(*a, *b, d, exact=True, split=split)
    return d


def differing(d, want):
    return int((d.contiguous().view(torch.int16) != want.view(torch.int16)).sum())


def on_tile(tile, a, b, d, num_sms=132):
    """Runs the multiplication on a given tile; False where it is not legal."""
    problem, checked = dense(a, b, d)
    hopper, settings = device.current(0), Config(num_sms=num_sms)
    if not heuristics.is_legal(tile, problem, hopper, settings):
        return False
    launch(heuristics.plan_for(tile, problem, hopper, settings), checked)
    return True


@pytest.mark.parametrize("kind", ["normal", "bits"])
@pytest.mark.parametrize(
    "shape",
    [(1, 16, 16), (64, 128, 128), (129, 264, 400), (200, 136, 272), (513, 808, 1168), (300, 2112, 640)],
    ids=str,
)
def test_every_tile_gives_the_exact_bits(shape, kind):
    a, b = operands(*shape, kind=kind)
    want, ran = exact(a, b, split=1), 0
    for tile in tiles.ROWS:
        for num_sms in (132, 5):
            d, untouched = guarded(*shape[:2])
            if on_tile(tile, a, b, d, num_sms):
                ran += 1
                assert differing(d, want) == 0, (tile, num_sms)
                assert untouched(), (tile, num_sms)
    assert ran >= 50


@pytest.mark.parametrize("tile", [(64, 16), (128, 256), (192, 128), (128, 256, 2, 1)], ids=str)
@pytest.mark.parametrize("k", [16, 640, 1152])
def test_more_ctas_than_tiles(tile, k):
    """None is planned so; but those without a tile load nothing, and end."""
    a, b = operands(256, 520, k)
    d, untouched = guarded(256, 520)
    problem, checked = dense(a, b, d)
    launch(replace(heuristics.plan_for(tiles.made(*tile), problem, device.current(0)), ctas=132), checked)
    assert differing(d, exact(a, b)) == 0 and untouched()


def grid():
    ms = (1, 7, 16, 32, 63, 64, 65, 100, 128, 129, 192, 255, 256)
    nks = (
        (8, 16),
        (16, 7168),
        (64, 128),
        (576, 256),
        (2112, 384),
        (24640, 128),
        (7168, 1152),
        (192, 192),
        (448, 576),
        (832, 7296),
    )
    return [(m, n, k) for m in ms for n, k in nks]


def check(m, n, k, seed, kind="normal"):
    """The public call against the exact reference; of large problems, sampled rows and columns."""
    a, b = operands(m, n, k, seed, kind)
    d, untouched = guarded(m, n)
    deep_gemm.fp8_gemm_nt(a, b, d)
    rng = random.Random(seed)
    rows = (
        torch.tensor(sorted({0, m - 1, *rng.choices(range(m), k=62)}), device="cuda")
        if m > 256
        else torch.arange(m, device="cuda")
    )
    columns = (
        torch.tensor(sorted({0, n - 1, *rng.choices(range(n), k=510)}), device="cuda")
        if n > 1024
        else torch.arange(n, device="cuda")
    )
    picked_a = a[0].view(torch.uint8)[rows].view(torch.float8_e4m3fn), a[1][rows]
    picked_b = b[0].view(torch.uint8)[columns].view(torch.float8_e4m3fn), b[1][columns // 128]
    split = plan_of(Problem(m, n, k)).split
    total = reference.fp8_gemm_nt_per_column_scales(*picked_a, *picked_b, exact=True, split=split)
    want = reference.to_bf16(total)
    assert differing(d[rows][:, columns], want) == 0, (m, n, k, seed, kind)
    assert untouched(), (m, n, k, seed, kind)
    if kind == "normal":
        assert not d.isnan().any(), (m, n, k, seed)


@pytest.mark.parametrize("shape", grid(), ids=str)
def test_grid(shape):
    check(*shape, seed=1)


@pytest.mark.parametrize("seed", range(150))
def test_random(seed):
    rng = random.Random(seed)
    m, n, k = int(2 ** rng.uniform(0, 12.5)), 8 * int(2 ** rng.uniform(0, 10)), 16 * int(2 ** rng.uniform(0, 9))
    deep_gemm.set_num_sms(rng.choice([None, None, 1, 2, 3, 78, 114, 130, 131]))
    check(m, n, k, seed, rng.choice(["normal", "bits"]))


@pytest.mark.parametrize(
    "shape",
    [
        (4096, 2112, 7168),
        (4096, 7168, 2048),
        (128, 7168, 16384),
        (576, 16, 7168),
        (32, 8192, 8192),
        (73728, 128, 36864),
    ],
    ids=str,
)
def test_large(shape):
    check(*shape, seed=3)


@pytest.mark.parametrize("shape", [(70_000, 32_768, 128), (16, 140_000, 16_384)], ids=str)
def test_offsets_past_2_to_the_31(shape):
    m, n, k = shape
    assert max(m * n, n * k) > 2**31
    check(*shape, seed=4)


def test_nan_and_infinity():
    a, b = operands(70, 136, 272)
    a[0].view(torch.uint8)[3, 5] = 0x7F
    a[1][9, 1] = float("inf")
    b[1][1, 2] = float("nan")
    d, untouched = guarded(70, 136)
    deep_gemm.fp8_gemm_nt(a, b, d)
    assert differing(d, exact(a, b)) == 0
    assert d[3].isnan().all() and d[:, 128:].isnan().all() and not d[10, :128].isnan().any()
    assert untouched()


@pytest.mark.parametrize("num_sms", [None, 5])
@pytest.mark.parametrize("shape", [(4096, 2112, 7168), (300, 24576, 384), (64, 2112, 7168), (130, 576, 16384)], ids=str)
def test_thousand_repeats_give_equal_bits(shape, num_sms):
    """On few SMs every CTA has many tiles; the first result there is held against that of all."""
    a, b = operands(*shape)
    first = torch.empty(shape[0], shape[1], dtype=torch.bfloat16, device="cuda")
    deep_gemm.set_batch_invariant(num_sms is not None)
    deep_gemm.fp8_gemm_nt(a, b, first)
    differences = torch.zeros((), dtype=torch.int64, device="cuda")
    d = torch.empty_like(first)
    deep_gemm.set_num_sms(num_sms)
    for _ in range(1000):
        d.fill_(float("nan"))
        deep_gemm.fp8_gemm_nt(a, b, d)
        differences += (d.view(torch.int16) != first.view(torch.int16)).sum()
    assert int(differences) == 0


def test_rows_have_the_same_bits_for_every_m():
    """If batches are to be invariant; else for every M whose plan splits K alike."""
    a, b = operands(4096, 2112, 4096)
    of_split: dict[int, torch.Tensor] = {}
    for invariant in (True, False):
        deep_gemm.set_batch_invariant(invariant)
        for m in (4096, 1, 2, 17, 64, 100, 128, 200, 777, 2048):
            split = plan_of(Problem(m, 2112, 4096)).split
            assert split == 1 or not invariant
            d, _ = guarded(m, 2112)
            deep_gemm.fp8_gemm_nt((a[0][:m], a[1][:m].contiguous()), b, d)
            whole = of_split.setdefault(split, exact(a, b, split) if split > 1 else d)
            assert differing(d, whole[:m].contiguous()) == 0, (m, invariant)
    assert len(of_split) > 1


def test_scales_in_any_strides():
    a, b = operands(130, 264, 1168)
    want = exact(a, b)
    layouts = [
        a[1],
        a[1].t().contiguous().t(),
        deep_gemm.get_mn_major_tma_aligned_tensor(a[1]),
        torch.cat([a[1], a[1]], 1)[:, :10],
        torch.stack([a[1], a[1]], 2)[..., 1],
    ]
    for a_scales in layouts:
        for b_scales in (b[1], b[1].t().contiguous().t()):
            d, _ = guarded(130, 264)
            deep_gemm.fp8_gemm_nt((a[0], a_scales), (b[0], b_scales), d)
            assert differing(d, want) == 0, (a_scales.stride(), b_scales.stride())


def test_rows_of_any_length():
    """a and b as columns of wider memory, whose other columns are NaN."""
    a, b = operands(130, 264, 1168)
    views: list[torch.Tensor] = []
    for values in (a[0], b[0]):
        wide = torch.full((values.shape[0], 1168 + 48), 0x7F, dtype=torch.uint8, device="cuda")
        wide[:, 16 : 16 + 1168] = values.view(torch.uint8)
        views.append(wide.view(torch.float8_e4m3fn)[:, 16 : 16 + 1168])
    d, untouched = guarded(130, 264)
    deep_gemm.fp8_gemm_nt((views[0], a[1]), (views[1], b[1]), d)
    assert differing(d, exact(a, b)) == 0
    assert untouched()


def test_strides_that_mean_nothing():
    """Of the only row of a and d, of a's scales where there is one row or one column; and scales of b that are one."""
    a, b = operands(1, 136, 272)
    for stride in (1, 7, 1 << 40):
        values, scales = (x.as_strided(x.shape, (stride, 1)) for x in a)
        d, untouched = guarded(1, 136)
        deep_gemm.fp8_gemm_nt((values, scales), b, d.as_strided(d.shape, (stride, 1)))
        assert differing(d, exact(a, b)) == 0, stride
        assert untouched(), stride
    a, b = operands(70, 264, 128)
    scales = b[1][:1].expand(3, 1)
    for stride in (1, 3, 1 << 40):
        d, untouched = guarded(70, 264)
        deep_gemm.fp8_gemm_nt((a[0], a[1].as_strided((70, 1), (1, stride))), (b[0], scales), d)
        assert differing(d, exact(a, (b[0], scales.contiguous()))) == 0, stride
        assert untouched(), stride


FORKED = """
import os, sys
import torch, deep_gemm
def child():
    a = torch.ones(70, 512).to(torch.float8_e4m3fn).cuda(), torch.ones(70, 4, device="cuda")
    b = torch.ones(264, 512).to(torch.float8_e4m3fn).cuda(), torch.ones(3, 4, device="cuda")
    d = torch.zeros(70, 264, dtype=torch.bfloat16, device="cuda")
    deep_gemm.fp8_gemm_nt(a, b, d)
    return int(not (d == 512).all())
children = []
for _ in range(2):
    children.append(os.fork())
    if not children[-1]:
        os._exit(child())
sys.exit(any([os.waitpid(pid, 0)[1] for pid in children]) or child())
"""


def test_forks_after_the_import(tmp_path):
    """Two at once, with an empty cache; and then the process that was forked from."""
    environment = os.environ | {"DG_JIT_CACHE_DIR": str(tmp_path), "DG_JIT_STRICT": "0"}
    command = [sys.executable, "-c", FORKED]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def test_debug_builds_give_the_same_bits(monkeypatch):
    """With a time limit on every wait."""
    monkeypatch.setenv("DG_JIT_DEBUG", "1")
    monkeypatch.setenv("DG_JIT_STRICT", "0")  # for clusters that no plan has
    a, b = operands(257, 528, 1152)
    want = exact(a, b, split=1)
    for shape in ((64, 16), (64, 48, 1, 2), (128, 112), (128, 256, 2), (128, 256, 2, 1, False, 2), (192, 128, 1, 2)):
        d, untouched = guarded(257, 528)
        assert on_tile(heuristics.make_tile(*shape), a, b, d)
        assert differing(d, want) == 0, shape
        assert untouched(), shape


def test_graph_replays_with_new_contents():
    a, b = operands(100, 576, 512)
    d, _ = guarded(100, 576)
    deep_gemm.fp8_gemm_nt(a, b, d)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        deep_gemm.fp8_gemm_nt(a, b, d)
    for seed in (5, 6):
        new_a, new_b = operands(100, 576, 512, seed)
        for old, new in zip((*a, *b), (*new_a, *new_b), strict=True):
            old.copy_(new)
        d.fill_(float("nan"))
        graph.replay()
        assert differing(d, exact(a, b)) == 0


FIRST_CALL_CAPTURED = """
import torch, deep_gemm
def operand(rows, scale_rows):
    values = torch.randint(0, 126, (rows, 512), device="cuda").to(torch.uint8).view(torch.float8_e4m3fn)
    return values, torch.rand(scale_rows, 4, device="cuda")
a, b = operand(100, 100), operand(576, 5)
d, graph = torch.zeros(100, 576, dtype=torch.bfloat16, device="cuda"), torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    deep_gemm.fp8_gemm_nt(a, b, d)
assert not d.any(), "the call ran while it was captured"
graph.replay()
want = torch.empty_like(d)
split = deep_gemm.gemm.plan_of(deep_gemm.problem.Problem(100, 576, 512)).split
deep_gemm.reference.run(*a, *b, want, exact=True, split=split)
assert torch.equal(d.view(torch.int16), want.view(torch.int16))
d.zero_()
deep_gemm.fp8_gemm_nt(a, b, d)
assert torch.equal(d.view(torch.int16), want.view(torch.int16))
print("ran")
"""


@pytest.mark.parametrize("loading", ["LAZY", "EAGER"])
def test_first_call_inside_a_capture(loading, tmp_path):
    """Compiled, loaded and launched for the first time in a new process while a CUDA graph is captured."""
    compiles = {"DG_JIT_CACHE_DIR": str(tmp_path), "DG_JIT_STRICT": "0"}
    environment = os.environ | compiles | {"CUDA_MODULE_LOADING": loading}
    command = [sys.executable, "-c", FIRST_CALL_CAPTURED]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0 and "ran" in result.stdout, result.stdout[-3000:] + result.stderr[-3000:]


def test_calls_follow_the_addresses():
    """A second call of a shape replaces addresses in a prepared launch; every operand in turn."""
    first, second = operands(100, 576, 512, 1), operands(100, 576, 512, 2)
    for turn in range(16):
        picked = [(second if turn >> i & 1 else first) for i in range(4)]
        a, b = (picked[0][0][0], picked[1][0][1]), (picked[2][1][0], picked[3][1][1])
        d, untouched = guarded(100, 576)
        deep_gemm.fp8_gemm_nt(a, b, d)
        assert differing(d, exact(a, b)) == 0, turn
        assert untouched(), turn


def test_prepared_launches_are_bounded(monkeypatch):
    monkeypatch.setattr(launching, "MAX_LAUNCHERS", 3)
    a, b = operands(64, 576, 512)
    want = exact(a, b)
    for m in (*range(1, 20), *range(1, 20)):
        d, _ = guarded(m, 576)
        deep_gemm.fp8_gemm_nt((a[0][:m], a[1][:m]), b, d)
        assert differing(d, want[:m]) == 0
    launching._thread.launchers.known.clear()


@pytest.mark.parametrize("value", ["0", "1"])
def test_load_time_is_printed_where_asked_for(value, monkeypatch, capsys):
    monkeypatch.setenv("DG_JIT_PRINT_LOAD_TIME", value)
    tile = tiles.made(64, 16)
    launching._load(cubin_for(tile.source()), tile.name, tile.smem_bytes, 0)
    assert ("deep_gemm: loaded 64x16 in " in capsys.readouterr().err) == (value == "1")


def test_streams_and_threads():
    problems = [operands(64 + i, 576, 512, i) for i in range(8)]
    wants = [exact(*p) for p in problems]

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                d = torch.full_like(wants[i], float("nan"))
                deep_gemm.fp8_gemm_nt(*problems[i], d)
                torch.cuda.current_stream().synchronize()
                if differing(d, wants[i]):
                    return False
        return True

    torch.cuda.synchronize()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    a, b = operands(300, 576, 512)
    want = exact(a, b)
    a, b = ([x.to("cuda:1") for x in pair] for pair in (a, b))
    assert torch.cuda.current_device() == 0
    for d in (torch.empty(300, 576, dtype=torch.bfloat16, device="cuda:1") for _ in range(3)):
        deep_gemm.fp8_gemm_nt(a, b, d)
        assert differing(d.to("cuda:0"), want) == 0
    counts = torch.tensor([300, 7], dtype=torch.int32, device="cuda:1")
    stacked = [[torch.stack([x, x]) for x in pair] for pair in (a, b)]
    d = torch.zeros(2, 300, 576, dtype=torch.bfloat16, device="cuda:1")
    deep_gemm.m_grouped_fp8_gemm_nt_masked(*stacked, d, counts, 100)
    assert differing(d[0].to("cuda:0"), want) == 0
    assert differing(d[1, :7].to("cuda:0"), want[:7]) == 0 and not d[1, 7:].any()
    assert torch.cuda.current_device() == 0


def test_rejection_then_good_call():
    a, b = operands(64, 128, 128)
    d, _ = guarded(64, 128)
    with pytest.raises(
        deep_gemm.errors.InvalidInputError, match="the operands are on cpu, cuda:0, expected one device"
    ):
        deep_gemm.fp8_gemm_nt(a, (b[0].cpu(), b[1]), d)
    deep_gemm.fp8_gemm_nt(a, b, d)
    assert differing(d, exact(a, b)) == 0


SANITIZED = """
import torch, deep_gemm
from deep_gemm import heuristics
from deep_gemm.config import Config
from deep_gemm.problem import dense
from deep_gemm.runtime import device
from deep_gemm.runtime.compiler import compile_many
from deep_gemm.runtime.launch import launch
hopper = device.current(0)
for m, n, k in ((65, 136, 400), (257, 528, 1152)):
    # Copied from the host: initcheck knows of no other kernel that could have written them.
    a = torch.ones(m, k).to(torch.float8_e4m3fn).cuda(), torch.ones(-(-k // 128), (m + 3) // 4 * 4).cuda().t()[:m]
    b = torch.ones(n, k).to(torch.float8_e4m3fn).cuda(), torch.ones(-(-n // 128), -(-k // 128)).cuda()
    for shape in ((64, 16), (64, 48, 1, 2), (128, 112), (128, 256, 2), (128, 256, 2, 1, False, 2), (192, 128, 1, 2)):
        tile = heuristics.make_tile(*shape)
        compile_many([tile.source()])
        d = torch.zeros(m, n, dtype=torch.bfloat16).cuda()
        problem, operands = dense(a, b, d)
        if heuristics.is_legal(tile, problem, hopper, Config(num_sms=8)):
            launch(heuristics.plan_for(tile, problem, hopper, Config(num_sms=8)), operands)
            assert (d.cpu() == torch.tensor(float(k)).bfloat16()).all(), tile
print("ran")
"""


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_compute_sanitizer(tool):
    sanitizer.check(tool, SANITIZED)
