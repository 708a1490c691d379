"""The command line: `python -m deep_gemm`, or `deep-gemm`.

demo     multiplies the linear layers of DeepSeek-V3, experts among them, or of a checkpoint, and checks them
doctor   says what is found, what is missing and how to get it
explain  prints the plan for a shape, what it costs and what came second
compile  compiles kernels before they are needed; cache  looks after what is kept of them (precompile.py)
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import (
    __version__,
    fp8_gemm_nt,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
    measured,
    precompile,
    reference,
    settings,
)
from .config import Config
from .errors import DeepGemmError, InvalidInputError, MissingDependencyError
from .gemm import plan_of
from .heuristics import ranked
from .layout import ceil_div, get_mk_alignment_for_contiguous_layout, get_mn_major_tma_aligned_tensor
from .problem import Kind, Problem, check_shape
from .quantize import per_block_cast_to_fp8, per_token_cast_to_fp8
from .runtime import device as devices
from .runtime import sass
from .runtime.cache import Cache
from .runtime.compiler import READY_MADE, Source, compile, compiler_of
from .runtime.driver import check, driver

# The linear layers of DeepSeek-V3 outside its routed experts: name, N, K. Projections of one input are one GEMM.
# Source: the model's config.json: hidden 7168, q_lora_rank 1536, kv_lora_rank 512, qk_rope_head_dim 64, 128 heads of
# 128 + 64 (queries) and 128 (values), moe_intermediate_size 2048.
LAYERS = (
    ("attention q_a + kv_a", 2112, 7168),
    ("attention q_b", 24576, 1536),
    ("attention kv_b", 32768, 512),
    ("attention o", 7168, 16384),
    ("shared expert gate + up", 4096, 7168),
    ("shared expert down", 7168, 2048),
)
DEFAULT_M = {"cuda": 4096, "cpu": 64}


@dataclass(frozen=True)
class Experts:
    """The sizes of a layer of routed experts: every token goes to `top` of them."""

    groups: int
    hidden: int
    intermediate: int
    tokens: int
    top: int


EXPERTS = {"cuda": Experts(8, 7168, 2048, 512, 2), "cpu": Experts(4, 512, 256, 48, 2)}  # DeepSeek-V3's; small
CHECKED_ROWS, CHECKED_COLUMNS = 16, 128
PLAIN = ("BF16", "F16", "F32")  # dtypes of a checkpoint that are quantised, and that scales may have

Weight = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """A weight, [n, k], loaded when its turn comes: E4M3 values and scales per 128x128 on a device."""

    name: str
    n: int
    k: int
    load: Callable[[torch.device], Weight]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 where something failed or a check did not hold. Errors are one line on stderr."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:  # the reader has seen enough, as `head` has; and nothing is left to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (DeepGemmError, OSError, RuntimeError) as error:  # torch is out of memory with a RuntimeError
        print(f"deep-gemm: {_first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """One line for a wrong option, as for every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}: see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("deep-gemm", description="FP8 matrix multiplication for NVIDIA Hopper.")
    parser.add_argument("--version", action="version", version=f"deep-gemm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo", help="multiply the linear layers of DeepSeek-V3, or of a checkpoint, and check them"
    )
    demo.add_argument("--m", type=_positive, help="rows of the activations (default: 4096 on a GPU, 64 on a CPU)")
    demo.add_argument("--device", help="cuda, cuda:1, cpu (default: a Hopper GPU if there is one)")
    demo.add_argument(
        "--weights", type=Path, metavar="FILE.safetensors", help="take the 2-D weights of this checkpoint"
    )
    demo.add_argument("--limit", type=_positive, default=16, help="weights of the checkpoint at most (default: 16)")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="say what is found, what is missing and how to get it")
    doctor.set_defaults(run=_doctor)

    explain = commands.add_parser("explain", help="print the plan for a shape, without a GPU")
    for name, axis in (("m", "rows of a and d"), ("n", "rows of b, columns of d"), ("k", "columns of a and b")):
        explain.add_argument(name, type=_positive, metavar=name.upper(), help=axis)
    explain.add_argument("--groups", type=_positive, default=1, help="of a grouped multiplication (default: 1)")
    explain.add_argument(
        "--layout", choices=("contiguous", "masked"), help="of the groups: M is of all of them, or room for each"
    )
    explain.add_argument("--expected-m", type=_positive, help="rows that a group probably has, masked (default: M)")
    explain.add_argument("--sms", type=_positive, help="SMs to use (default: all)")
    explain.add_argument("--device", choices=("h200", "current"), default="h200", help="plan for (default: h200)")
    explain.set_defaults(run=_explain)

    precompile.add_to(commands, _positive)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


# demo


def _demo(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    device = _demo_device(args.device)
    m = args.m or DEFAULT_M[device.type]
    layers = list(_checkpoint(args.weights, args.limit) if args.weights else _deepseek_v3())
    hardware = (
        devices.current(device.index).name if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"d = a @ b.T, E4M3 x E4M3 -> BF16 on {hardware}; scales of a per 1x128, of b per 128x128")
    width = max((len(layer.name) for layer in layers), default=5)
    width = width if args.weights else max(width, len("experts gate + up, contiguous"))
    print(f"{'layer':{width}}      M      N      K   device        time        speed    error  checked against float64")
    held: list[bool] = []
    # disable=None: no bar unless stderr is a terminal.
    for layer in tqdm(layers, unit="layer", leave=False, disable=None):
        row, holds = _multiply(layer, m, device)
        tqdm.write(f"{layer.name:{width}} {row}")
        held.append(holds)
    for name, row, holds in () if args.weights else _multiply_experts(EXPERTS[device.type], device):
        print(f"{name:{width}} {row}")
        held.append(holds)
    failed = held.count(False)
    if failed:
        print(f"deep-gemm: {failed} of {len(held)} checks do not hold: see OUTSIDE and DIFFER above", file=sys.stderr)
    return int(failed > 0)


def _demo_device(name: str | None) -> torch.device:
    """The device asked for; else the current GPU if it is a Hopper GPU, else the CPU.

    Raises: InvalidInputError, UnsupportedDeviceError.
    """
    if name is None:
        hopper = torch.cuda.is_available() and devices.current().capability == devices.HOPPER
        return torch.device("cuda" if hopper else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in DEFAULT_M or (
        device.type == "cuda" and (device.index or 0) >= max(1, torch.cuda.device_count())
    ):
        raise InvalidInputError(
            f"--device is {name}, expected cpu, or cuda with the number of a GPU: see deep-gemm doctor"
        )
    if device.type == "cuda":
        devices.current(device.index).require_hopper()
    return device


def _deepseek_v3() -> Iterator[Layer]:
    for name, n, k in LAYERS:
        yield Layer(name, n, k, lambda device, n=n, k=k: per_block_cast_to_fp8(torch.randn(n, k, device=device)))


def _checkpoint(path: Path, limit: int) -> Iterator[Layer]:
    """The 2-D weights of a safetensors file, plain or FP8 with `<name>_scale_inv`. Says what it leaves out, and why.

    Raises: InvalidInputError for what is no such file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InvalidInputError(f"--weights is {path}, expected a safetensors file: there is no such file")
    try:
        file: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InvalidInputError(f"--weights is {path}, expected a safetensors file: {error}") from error
    slices = {name: file.get_slice(name) for name in sorted(file.keys())}
    shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
    dtypes = {name: str(tensor.get_dtype()) for name, tensor in slices.items()}
    weights = {name: shape for name, shape in shapes.items() if len(shape) == 2 and not name.endswith("_scale_inv")}
    fitting = 0
    for name, (n, k) in weights.items():
        scales = f"{name}_scale_inv"
        shown = name if name.isascii() and name.isprintable() else ascii(name)
        if reason := _why_not(name, n, k, dtypes[name], shapes.get(scales), dtypes.get(scales)):
            print(f"{shown} [{n}, {k}] {dtypes[name]}: left out, {reason}")
            continue
        fitting += 1
        if fitting <= limit:
            yield Layer(shown, n, k, lambda device, name=name: _load(file, name, device))
    if fitting > limit:
        print(f"{fitting - limit} more weights fit: raise --limit {limit} to multiply them")
    if not fitting:
        raise InvalidInputError(
            f"--weights is {path}, expected 2-D weights, N a multiple of 8 and K of 16: none is in it"
        )


def _why_not(
    name: str, n: int, k: int, dtype: str, scales: tuple[int, ...] | None, scales_dtype: str | None
) -> str | None:
    """Why a weight cannot be multiplied; None if it can."""
    if "embed" in name:
        return "an embedding is a table, and is not multiplied"
    if n == 0:
        return "it is empty"
    try:
        check_shape(1, n, k)
    except InvalidInputError as misfit:
        return str(misfit).partition(":")[0]
    if dtype == "F8_E4M3":
        want = (ceil_div(n, 128), ceil_div(k, 128))
        if scales != want:
            return f"its _scale_inv has shape {scales}, expected {want}"
        return None if scales_dtype in PLAIN else f"its _scale_inv is {scales_dtype}, expected {' or '.join(PLAIN)}"
    return None if dtype in PLAIN else f"neither F8_E4M3 nor {', '.join(PLAIN)}"


def _load(file: Any, name: str, device: torch.device) -> Weight:
    """FP8 weights as they are, with their scales; others quantised. Copied, for in a file nothing lies on 16 bytes."""
    weight = file.get_tensor(name).to(device, copy=True)
    if weight.dtype == torch.float8_e4m3fn:
        return weight, file.get_tensor(f"{name}_scale_inv").to(device).float()
    slabs = [per_block_cast_to_fp8(slab) for slab in weight.split(4096)]  # in FP32 a vocabulary fills many gigabytes
    return torch.cat([x for x, _ in slabs]), torch.cat([x for _, x in slabs])


def _speed(problem: Problem, us: float, device_type: str) -> str:
    """By what bounds the time: TFLOPS where it is computing, otherwise GB/s."""
    # An H200 does some 300 FLOP in the time of a byte from memory; a CPU is busy computing at every M.
    if device_type == "cuda" and problem.flop <= 300 * problem.bytes:
        return f"{problem.bytes / us / 1e3:.0f} GB/s"
    tflops = problem.flop / us / 1e6
    return f"{tflops:.0f} TFLOPS" if tflops >= 100 else f"{tflops:.3g} TFLOPS"


def _multiply(layer: Layer, m: int, device: torch.device) -> tuple[str, bool]:
    """A row of the table, and whether every checked element is within the bound."""
    torch.manual_seed(0)
    b = layer.load(device)
    a, a_scales = per_token_cast_to_fp8(torch.randn(m, layer.k, device=device))
    a = (a, get_mn_major_tma_aligned_tensor(a_scales))
    d = torch.full((m, layer.n), float("nan"), dtype=torch.bfloat16, device=device)
    us = _time_us(lambda: fp8_gemm_nt(a, b, d), device)
    problem = Problem(m, layer.n, layer.k)
    split = plan_of(problem, d.device.index).split if d.is_cuda else 1
    error, checked, outside = _check(a, b, d, split)
    return _row(problem, us, device, error, checked, outside), not outside


def _row(problem: Problem, us: float, device: torch.device, error: float, checked: int, outside: int) -> str:
    speed = _speed(problem, us, device.type)
    duration = f"{us:.1f} us" if us < 1e4 else f"{us / 1e3:.0f} ms"
    verdict = f"{outside} of {checked} OUTSIDE the bound" if outside else f"{checked} within the bound"
    verdict = verdict if checked else "not checked: not finite in BF16"
    shape = f"{problem.m:6d} {problem.n:6d} {problem.k:6d}"
    return f"{shape}   {device.type:6} {duration:>11} {speed:>12} {error:8.1e}  {verdict}"


@dataclass(frozen=True)
class Arrangement:
    """Where a layout has the rows of all groups, and how they are multiplied.

    shape: of a and d before their columns. slots: [rows], the place of every row, as if shape were flat.
    run: the call, given a, b [G, N, K] and d.
    """

    name: str
    shape: tuple[int, ...]
    slots: torch.Tensor
    run: Callable[[Weight, Weight, torch.Tensor], None]


def _arrangements(group: torch.Tensor, size: Experts) -> Iterator[Arrangement]:
    """Both layouts for rows of ascending groups: group [rows] says whose each is."""
    counts = group.bincount(minlength=size.groups)
    rank = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group]

    alignment = get_mk_alignment_for_contiguous_layout()
    room = -(-counts // alignment) * alignment
    slots = (room.cumsum(0) - room)[group] + rank
    groups_of_rows = torch.full((int(room.sum()),), -1, dtype=torch.int32, device=group.device)
    groups_of_rows[slots] = group.int()
    yield Arrangement(
        "contiguous",
        tuple(groups_of_rows.shape),
        slots,
        lambda a, b, d: m_grouped_fp8_gemm_nt_contiguous(a, b, d, groups_of_rows),
    )

    masked_m, expected_m = counts.int(), ceil_div(len(group), size.groups)
    yield Arrangement(
        "masked",
        (size.groups, size.tokens),
        group * size.tokens + rank,
        lambda a, b, d: m_grouped_fp8_gemm_nt_masked(a, b, d, masked_m, expected_m),
    )


def _multiply_experts(size: Experts, device: torch.device) -> Iterator[tuple[str, str, bool]]:
    """A mixture of experts, gate and up, SwiGLU, down, in both layouts: rows of the table, and whether each holds."""
    torch.manual_seed(0)
    tokens = torch.randn(size.tokens, size.hidden, device=device)
    chosen = torch.rand(size.tokens, size.groups, device=device).topk(size.top).indices.flatten()
    order = chosen.argsort(stable=True)
    group, routed = chosen[order], tokens[order // size.top]
    gate_up, down = (
        per_block_cast_to_fp8(torch.randn(size.groups, n, k, device=device))
        for n, k in ((2 * size.intermediate, size.hidden), (size.hidden, size.intermediate))
    )
    results: list[torch.Tensor] = []
    for layout in _arrangements(group, size):
        between, row, holds = _multiply_groups(routed, gate_up, group, layout)
        yield f"experts gate + up, {layout.name}", row, holds
        gate, up = between.float().chunk(2, dim=-1)
        result, row, holds = _multiply_groups(torch.nn.functional.silu(gate) * up, down, group, layout)
        yield f"experts down, {layout.name}", row, holds
        results.append(result)
    differing = int((results[0].view(torch.int16) != results[1].view(torch.int16)).sum())
    verdict = f"{differing} elements of the layouts DIFFER" if differing else "the same bits in both layouts"
    row = f"{size.tokens} tokens, each to {size.top} of {size.groups} experts: {verdict}"
    yield "experts, result", row, not differing


def _multiply_groups(
    rows: torch.Tensor, b: Weight, group: torch.Tensor, layout: Arrangement
) -> tuple[torch.Tensor, str, bool]:
    """The product of every row with its group's b, a row of the table, and whether what was checked is in the bound."""
    (groups, n, k), device = b[0].shape, rows.device
    x = rows.new_zeros(*layout.shape, k)
    x.view(-1, k)[layout.slots] = rows
    values, scales = per_token_cast_to_fp8(x)
    a = values, get_mn_major_tma_aligned_tensor(scales)
    d = torch.full((*layout.shape, n), float("nan"), dtype=torch.bfloat16, device=device)
    us = _time_us(lambda: layout.run(a, b, d), device)
    result = d.view(-1, n)[layout.slots]
    error, checked, outside = 0.0, 0, 0
    for g in group.unique().tolist():
        mine = layout.slots[group == g]
        few = values.view(torch.uint8).view(-1, k)[mine].view(values.dtype), scales.flatten(0, -2)[mine]
        found = _check(few, (b[0][g], b[1][g]), result[group == g])
        error, checked, outside = max(error, found[0]), checked + found[1], outside + found[2]
    problem = Problem(len(rows), n, k, Kind.CONTIGUOUS, groups)
    return result, _row(problem, us, device, error, checked, outside), not outside


def _time_us(run: Callable[[], None], device: torch.device) -> float:
    """The median of some calls after a first one, as a user sees them: operands may be found in the cache."""
    run()
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
        for event in events[:-1]:
            event.record()
            run()
        events[-1].record()
        torch.cuda.synchronize()
    return statistics.median(x.elapsed_time(y) for x, y in pairwise(events)) * 1e3


def _check(a: Weight, b: Weight, d: torch.Tensor, split: int = 1) -> tuple[float, int, int]:
    """Holds all columns of some rows and all rows of some columns against float64.

    Returns the relative error (norm of the difference over the norm), how many elements were checked, and how many of
    them are further away than the bound of docs/numerics.md, which says nothing of what is not finite in BF16.
    """
    (m, n), exact = d.shape, d.device.type == "cuda"
    rows = torch.randperm(m)[:CHECKED_ROWS].to(d.device)
    first = int(torch.randint(ceil_div(n, CHECKED_COLUMNS), ())) * CHECKED_COLUMNS
    columns, block = slice(first, first + CHECKED_COLUMNS), slice(first // 128, first // 128 + 1)
    few_rows = (a[0].view(torch.uint8)[rows].view(a[0].dtype), a[1][rows])
    square = wrong = 0.0
    checked = outside = 0
    for x, y, got in ((few_rows, b, d[rows]), (a, (b[0][columns], b[1][block]), d[:, columns])):
        truth, bound = reference.truth_and_bound(*x, *y, exact=exact, split=split)
        finite = truth.abs() + bound < torch.finfo(torch.bfloat16).max
        truth, bound = truth[finite], bound[finite]
        distance = (got[finite].double() - truth).abs()
        outside += int((~(distance <= reference.bf16_bound(truth, bound))).sum())  # NaN is outside
        checked += distance.numel()
        wrong += float(distance.square().sum())
        square += float(truth.square().sum())
    return (wrong / square) ** 0.5 if square else wrong**0.5, checked, outside


# doctor


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`. remedy: what to do, empty where nothing is missing."""

    name: str
    value: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{'missing' if self.remedy else 'ok':8} {self.name:14} {self.value}"
        return f"{line}\n{'':23} -> {self.remedy}" if self.remedy else line


def _doctor(args: argparse.Namespace) -> int:
    hopper = torch.cuda.is_available() and devices.current().capability == devices.HOPPER
    needed = [_find_bindings(), _find_driver(), _find_compiler()]
    print(f"ok       Python         {sys.version.split()[0]}, {sys.executable}")
    print(f"ok       deep_gemm      {__version__}, {Path(__file__).parent}")
    others = [_find_elftools(), _find_ready_made(), _find_cache(), *_find_wrong_settings()]
    print(*[_find_torch(), _find_gpu(), *needed, *others], sep="\n")
    print("\nsettings, by the environment:")
    for name, _, value, _, meaning in settings.describe():
        print(f"  {name:30} {value!s:24} {meaning}")
    usable = not any(finding.remedy for finding in needed)
    if not hopper:
        print("\nGEMMs run on the CPU of this machine" + (", and kernels compile." if usable else "."))
        return 0
    print(
        f"\nGEMMs run on {devices.current().name}." if usable else "\nThe GPU cannot be used until the above is mended."
    )
    return int(not usable)


def _find_torch() -> Finding:
    cuda = torch.version.cuda
    return Finding("PyTorch", f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'a build without CUDA'}")


def _find_gpu() -> Finding:
    if not torch.cuda.is_available():
        why = (
            "no driver or no GPU"
            if torch.version.cuda
            else "PyTorch is a build without CUDA; pytorch.org has one with it"
        )
        return Finding("GPU", f"PyTorch sees none: {why}", "an NVIDIA H100, H200 or H800; on the CPU nothing is needed")
    gpu = devices.current()
    value = f"{gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, {gpu.num_sms} SMs"
    return Finding(
        "GPU", value, "" if gpu.capability == devices.HOPPER else "kernels need Hopper (9.0): H100, H200, H800"
    )


def _driver_cuda() -> int:
    """The CUDA version that the driver supports, such as 13020 for 13.2; an error where there is none."""
    return check(driver().cuDriverGetVersion(), "asking for the driver's version")


def _find_driver() -> Finding:
    try:
        version = _driver_cuda()
    except MissingDependencyError:
        return Finding("driver", "unknown without cuda-bindings", "see cuda-bindings")
    except (DeepGemmError, RuntimeError) as error:
        return Finding("driver", _first_line(error), "NVIDIA's driver, 580 or newer (525 with the CUDA 12 packages)")
    return Finding("driver", f"supports CUDA {version // 1000}.{version % 1000 // 10}")


def _find_bindings() -> Finding:
    try:
        import_module("cuda.bindings.driver")
    except ImportError as error:
        return Finding("cuda-bindings", _first_line(error), "pip install cuda-bindings")
    return Finding("cuda-bindings", metadata.version("cuda-bindings"))


def _find_elftools() -> Finding:
    if not sass.can_read():
        return Finding("pyelftools", "not installed: kernels stay as compiled, and slower", "pip install pyelftools")
    return Finding("pyelftools", metadata.version("pyelftools"))


def _find_compiler() -> Finding:
    """The compiler that kernels would be compiled with now, tried on an empty one."""
    start = time.perf_counter()
    try:
        compile(Source("doctor.cu", 'extern "C" __global__ void doctor() {}'))
        nvcc = settings.get("DG_JIT_NVCC_COMPILER")
    except DeepGemmError as error:
        what, _, remedy = _first_line(error).partition(": ")
        return Finding("compiler", what, remedy or "mend the settings below; DG_JIT_PTXAS_VERBOSE=1 says more")
    taken = f"an empty kernel in {time.perf_counter() - start:.2f} s"
    if nvcc or not settings.get("DG_JIT_USE_NVRTC"):
        return Finding("compiler", f"{nvcc or 'nvcc'}, {taken}")
    _, major, minor = import_module("cuda.bindings.nvrtc").nvrtcVersion()
    with suppress(DeepGemmError, RuntimeError):  # no driver has a line of its own
        if _driver_cuda() < 1000 * major:
            remedy = f"the driver loads no kernels of CUDA {major}: a newer driver, or pip install 'deep-gemm[cu12]'"
            return Finding("compiler", f"NVRTC {major}.{minor}", remedy)
    return Finding("compiler", f"NVRTC {major}.{minor}, {taken}")


def _find_ready_made() -> Finding:
    """Kernels that the package brings. Without them each is compiled once."""
    compiler = compiler_of(READY_MADE)
    count = len(list(READY_MADE.glob("*/manifest.json")))
    return Finding("ready-made", f"{count} kernels of {compiler}" if compiler else "no kernels: see deep-gemm compile")


def _find_cache() -> Finding:
    try:
        folder = settings.get("DG_JIT_CACHE_DIR")
    except InvalidInputError as error:
        return Finding("cache", _first_line(error), "set DG_JIT_CACHE_DIR")
    try:
        entries = [manifest.parent for manifest in folder.glob("*/manifest.json")]
        size = sum(file.stat().st_size for entry in entries for file in entry.iterdir())
    except OSError as error:
        return Finding("cache", f"{folder}: {error.strerror}", "set DG_JIT_CACHE_DIR to a folder of yours")
    value = f"{folder}, kernels: {len(entries)}, {size / 1e6:.1f} MB"
    if reason := Cache(folder, trusted=settings.get("DG_JIT_ALLOW_SHARED_CACHE")).refusal():
        what, _, remedy = reason.rpartition(": ")
        return Finding("cache", what, remedy)
    there = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    remedy = f"{there} cannot be written, so every process compiles anew: set DG_JIT_CACHE_DIR to a folder of yours"
    return Finding("cache", value, "" if writable else remedy)


def _find_wrong_settings() -> list[Finding]:
    """describe() has text in place of a value that cannot be read."""
    wrong = [(name, value) for name, _, value, *_ in settings.describe() if isinstance(value, str)]
    return [Finding(name, complaint, "set it to what is expected, or unset it") for name, complaint in wrong]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# explain


def _explain(args: argparse.Namespace) -> int:
    problem = _problem(args)
    device = devices.current() if args.device == "current" else devices.H200
    device.require_hopper()
    if args.sms and args.sms > device.num_sms:
        raise InvalidInputError(f"--sms is {args.sms}, expected at most {device.num_sms}, what {device.name} has")
    config = Config(num_sms=args.sms)
    first, second, *others = ranked(problem, device, config)
    m, n, k, groups = problem.m, problem.n, problem.k, problem.groups
    of_rows = f"{groups}, " if problem.kind == Kind.MASKED else ""
    of_b = f"{groups}, " if problem.kind != Kind.DENSE else ""
    product = f"d[{of_rows}{m}, {n}] = a[{of_rows}{m}, {k}] @ b[{of_b}{n}, {k}].T"
    print(f"{product} on {device.name}, {args.sms or device.num_sms} SMs")
    work, size = problem.flop, problem.bytes
    print(f"work       {work / 1e9:.4g} GFLOP, {size / 1e6:.4g} MB: {work / size:.0f} FLOP per byte")
    for name, plan in (("plan", first), ("runner-up", second)):
        print(f"{name:10} {plan}\n{'':10} {plan.cost}")
    known = first.name == measured.fastest(problem, device, config)[0]
    behind = "slower where it was measured" if known else f"{second.cost.us / first.cost.us - 1:.1%} behind"
    print(f"{'':10} {behind}; {len(others)} more plans are legal")
    return 0


def _problem(args: argparse.Namespace) -> Problem:
    """Raises: InvalidInputError for a shape that cannot be multiplied, and for options that do not go together."""
    check_shape(args.m, args.n, args.k, args.groups)
    if args.layout != "masked" and args.expected_m:
        raise InvalidInputError(f"--expected-m is {args.expected_m}, expected none without --layout masked")
    if args.layout == "contiguous":
        alignment = get_mk_alignment_for_contiguous_layout()
        return Problem(args.m, args.n, args.k, Kind.CONTIGUOUS, args.groups, alignment=alignment)
    if args.layout == "masked":
        expected_m = min(args.expected_m or args.m, args.m)
        return Problem(args.m, args.n, args.k, Kind.MASKED, args.groups, expected_m)
    if args.groups > 1:
        raise InvalidInputError(f"--groups is {args.groups}, expected 1 without --layout contiguous or masked")
    return Problem(args.m, args.n, args.k)
