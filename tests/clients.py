"""How vLLM and SGLang call the package, argument by argument, and whether every result has the right bits.

`python tests/clients.py [--device cuda|cpu]` prints a line for each way of calling, and exits with 1 if one fails.
After vllm/utils/deep_gemm.py and sglang/srt/layers/deep_gemm_wrapper/{entrypoint,compile_utils}.py of 2025.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import library

N, K, GROUPS = 576, 512, 4
ROWS, BLOCKS = 300, 7  # of a dense a; of 128 rows, in a contiguous one
FILL = float("nan")  # of what nobody has written
LARGEST_M = 16384  # of SGLang's sweep
MISS_US = 1000  # a call that compiles nothing may take so long, in the median
OpCall = tuple[Callable[..., None], tuple[Any, ...]]  # an op, and what it is given


class Skipped(Exception):
    """A way of calling that this machine does not have; the text says why."""


@cache
def vllm() -> SimpleNamespace:
    """What vLLM looks up at its first use: by the newer name, else by the older one."""
    if not os.environ.get("DG_JIT_CACHE_DIR"):
        os.environ["DG_JIT_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "vllm", "deep_gemm")
    deep_gemm = importlib.import_module("deep_gemm")
    alignment = deep_gemm.get_mk_alignment_for_contiguous_layout()
    check(alignment == 128, f"the block size is {alignment}")
    names = {
        "dense": ("fp8_gemm_nt", "gemm_fp8_fp8_bf16_nt"),
        "contiguous": ("m_grouped_fp8_gemm_nt_contiguous", "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous"),
        "masked": ("fp8_m_grouped_gemm_nt_masked", "m_grouped_gemm_fp8_fp8_bf16_nt_masked"),
        "aligned": ("get_mn_major_tma_aligned_tensor", "get_col_major_tma_aligned_tensor"),
    }
    found = {use: getattr(deep_gemm, new, None) or getattr(deep_gemm, old) for use, (new, old) in names.items()}
    older = {use: getattr(deep_gemm, old) for use, (_, old) in names.items()}
    return SimpleNamespace(**found, older=SimpleNamespace(**older), package=deep_gemm)


def check(holds: bool, complaint: str) -> None:
    """An assertion that `python -O` keeps."""
    if not holds:
        raise AssertionError(complaint)


class Operands:
    """Of one multiplication, in memory that stays where it is, as CUDA graphs need it; and what must come out."""

    def __init__(self, kind: str, device: str, *, empty: int = -1, max_m: int = 128, scales: str = "rows") -> None:
        """empty: the expert of blocks that have no token. scales: `rows`, `columns` or (of masked) `batched`."""
        self.kind, self.empty, self.expected_m = kind, empty, 40
        m = {"dense": (ROWS,), "contiguous": (BLOCKS * 128,), "masked": (GROUPS, max_m)}[kind]
        groups = () if kind == "dense" else (GROUPS,)
        self.a, self.w = (torch.empty(*x, K, dtype=torch.float8_e4m3fn, device=device) for x in (m, (*groups, N)))
        self.w_scales = torch.empty(*groups, -(-N // 128), K // 128, device=device)
        self.a_scales = torch.empty(*m, K // 128, device=device)
        if scales == "columns":
            self.a_scales = self.a_scales.t().contiguous().t()
        if scales == "batched":
            strides = (max_m * (K // 128), 1, max_m)
            self.a_scales = torch.empty_strided(self.a_scales.shape, strides, device=device)
        self.out = torch.empty(*m, N, dtype=torch.bfloat16, device=device)
        self.layout = torch.empty({"dense": 0, "contiguous": m[0], "masked": GROUPS}[kind], dtype=torch.int32).to(
            device
        )
        self.refill(0)

    @property
    def lhs(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a, self.a_scales

    @property
    def rhs(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.w, self.w_scales

    def refill(self, seed: int) -> None:
        """New contents: values, scales, expert ids or counts; nothing in out."""
        generator = torch.Generator().manual_seed(seed)
        for values, scales in (self.lhs, self.rhs):
            values.copy_((torch.randn(values.shape, generator=generator) * 100).clamp(-448, 448).to(values.dtype))
            scales.copy_(torch.rand(scales.shape, generator=generator) * 0.01 + 0.005)
        rng = random.Random(seed)
        if self.kind == "contiguous":
            self.layout.copy_(torch.tensor(self._expert_ids(rng), dtype=torch.int32))
        if self.kind == "masked":
            counts = [0, 1, self.a.shape[1], rng.randrange(self.a.shape[1])]
            self.layout.copy_(torch.tensor(rng.sample(counts, GROUPS), dtype=torch.int32))
        self.out.fill_(FILL)

    def _expert_ids(self, rng: random.Random) -> list[int]:
        """Experts' tokens, each padded to whole blocks; the last blocks are nobody's."""
        experts = sorted(rng.choices(range(GROUPS), k=BLOCKS - 2))
        ids = [expert for expert in experts for _ in range(128)] + [self.empty] * 256
        for block, expert in enumerate(experts):
            if experts[block + 1 : block + 2] != [expert]:
                padding = rng.choice([0, 1, 63, 64, 127])
                ids[(block + 1) * 128 - padding : (block + 1) * 128] = [-1] * padding
        return ids

    def check(self) -> None:
        """Equal bits with the reference, which leaves alone what the kernel is to leave alone."""
        from deep_gemm import problem, reference
        from deep_gemm.gemm import plan_of

        d = torch.full_like(self.out, FILL)
        if self.kind == "dense":
            described, operands = problem.dense(self.lhs, self.rhs, d)
        elif self.kind == "contiguous":
            described, operands = problem.contiguous(self.lhs, self.rhs, d, self.layout, False, 128, None, True)
        else:
            described, operands = problem.masked(self.lhs, self.rhs, d, self.layout, self.expected_m)
        on_gpu = self.out.is_cuda
        reference.multiply(described, operands, exact=on_gpu, split=plan_of(described).split if on_gpu else 1)
        differing = int((self.out.view(torch.int16) != d.view(torch.int16)).sum())
        check(differing == 0, f"{differing} of {d.numel()} values differ")
        check(bool((~self.out.isnan()).any()), "nothing was written")


# vLLM: custom ops that mutate out, eager, compiled and in CUDA graphs


@library.custom_op("clients::dense", mutates_args=("out",))
def dense_op(
    a: torch.Tensor, a_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, out: torch.Tensor, cast: bool
) -> None:
    vllm().dense((a, a_scales), (w, w_scales), out, disable_ue8m0_cast=not cast)


@library.custom_op("clients::contiguous", mutates_args=("out",))
def contiguous_op(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    out: torch.Tensor,
    expert_ids: torch.Tensor,
    cast: bool,
) -> None:
    vllm().contiguous((a, a_scales), (w, w_scales), out, expert_ids, disable_ue8m0_cast=not cast)


@library.custom_op("clients::masked", mutates_args=("out",))
def masked_op(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    out: torch.Tensor,
    expert_num_tokens: torch.Tensor,
    expected_m: int,
    cast: bool,
) -> None:
    vllm().masked((a, a_scales), (w, w_scales), out, expert_num_tokens, expected_m, disable_ue8m0_cast=not cast)


def vllm_call(o: Operands, cast: bool = False) -> OpCall:
    operands = (*o.lhs, *o.rhs, o.out)
    if o.kind == "dense":
        return torch.ops.clients.dense, (*operands, cast)
    if o.kind == "contiguous":
        return torch.ops.clients.contiguous, (*operands, o.layout, cast)
    return torch.ops.clients.masked, (*operands, o.layout, o.expected_m, cast)


def eager(make: Callable[[], Operands]) -> None:
    for seed, cast in enumerate((False, True)):
        o = make()
        o.refill(seed)
        op, arguments = vllm_call(o, cast)
        op(*arguments)
        o.check()


def compiled(make: Callable[[], Operands], backend: str, to_call: Callable[[Operands], OpCall] = vllm_call) -> None:
    """Something follows in the same graph that reads out; new contents do not compile anew."""
    o = make()
    step, arguments = _compiled_step(o, backend, to_call)
    for seed in (0, 1):
        o.refill(seed)
        result = step(o.out, *arguments)
        o.check()
        same = torch.equal(result.view(torch.int32), o.out.float().view(torch.int32))
        check(same, "what follows in the graph did not see the result")


def _compiled_step(
    o: Operands, backend: str, to_call: Callable[[Operands], OpCall]
) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
    op, arguments = to_call(o)

    def step(out: torch.Tensor, *arguments: Any) -> torch.Tensor:
        op(*arguments)
        return out.float()

    torch._dynamo.reset()
    function = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    try:
        function(o.out, *arguments)
    except Exception as error:
        if backend == "inductor" and type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise Skipped(f"inductor cannot compile here: {str(error).splitlines()[0][:100]}") from error
        raise
    return function, arguments


def replayed(o: Operands, step: Callable[[], object]) -> None:
    """Captured once, replayed with other values, scales, expert ids and counts in the same memory."""
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(4):
        o.refill(seed)
        graph.replay()
        o.check()


def graphed(make: Callable[[], Operands], backend: str | None) -> None:
    """In a CUDA graph, as it is or inside torch.compile."""
    o = make()
    if backend is None:
        op, arguments = vllm_call(o)
        step = partial(op, *arguments)
    else:
        function, arguments = _compiled_step(o, backend, vllm_call)
        step = partial(function, o.out, *arguments)
    replayed(o, step)


def first_names(device: str) -> None:
    """Positional alone, as the first release has them."""
    for kind, layout in (("dense", ()), ("contiguous", ("layout",)), ("masked", ("layout", "expected_m"))):
        o = Operands(kind, device)
        getattr(vllm().older, kind)(o.lhs, o.rhs, o.out, *(getattr(o, name) for name in layout))
        o.check()


def helpers(device: str) -> str:
    """What else vLLM asks for; scales that went through the helpers serve as they are."""
    package = vllm().package
    num_sms = int(package.get_num_sms())
    check(num_sms > 0, f"get_num_sms() is {num_sms}")
    for kind, groups in (("dense", None), ("contiguous", GROUPS)):
        o = Operands(kind, device)
        o.a_scales = vllm().aligned(o.a_scales)
        o.w_scales = package.transform_sf_into_required_layout(
            sf=o.w_scales, mn=N, k=K, recipe=(1, 128, 128), num_groups=groups, is_sfa=False, disable_ue8m0_cast=True
        )
        op, arguments = vllm_call(o)
        op(*arguments)
        o.check()
    o = Operands("dense", device)
    vllm().dense(o.lhs, o.rhs, o.out, disable_ue8m0_cast=True)
    a = package.per_token_cast_back(*o.lhs).double()
    diff = package.calc_diff(o.out, a @ package.per_block_cast_back(*o.rhs).double().t())
    check(diff < 1e-3, f"calc_diff() is {diff}")
    return f"{num_sms} SMs, calc_diff {diff:.1e}"


# SGLang: arguments by position and by keyword, fewer SMs for a while, a sweep that compiles and launches nothing


def sglang_calls(o: Operands | SimpleNamespace) -> Iterator[Callable[[], None]]:
    import deep_gemm

    if o.kind == "dense":
        yield partial(deep_gemm.fp8_gemm_nt, o.lhs, o.rhs, o.out)
    elif o.kind == "contiguous":
        yield partial(deep_gemm.m_grouped_fp8_gemm_nt_contiguous, o.lhs, o.rhs, o.out, o.layout)
        yield partial(deep_gemm.m_grouped_fp8_gemm_nt_contiguous, o.lhs, o.rhs, o.out, m_indices=o.layout)
    else:
        masked = deep_gemm.fp8_m_grouped_gemm_nt_masked
        yield partial(masked, o.lhs, o.rhs, o.out, o.layout, o.expected_m)
        yield partial(masked, o.lhs, o.rhs, o.out, masked_m=o.layout, expected_m=o.expected_m)


def sglang(kind: str, device: str) -> None:
    from deep_gemm.utils.layout import get_mn_major_tma_aligned_tensor

    o = Operands(kind, device)
    for aligned in (False, True):
        if aligned:
            o.a_scales = get_mn_major_tma_aligned_tensor(o.a_scales)
        for call in sglang_calls(o):
            o.out.fill_(FILL)
            call()
            o.check()


def sglang_graphed(kind: str, device: str) -> None:
    """Every call in a CUDA graph."""
    o = Operands(kind, device)
    for call in sglang_calls(o):
        replayed(o, call)


@library.custom_op("clients::sglang", mutates_args=("out",))
def sglang_op(
    kind: str,
    a: torch.Tensor,
    a_scales: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    out: torch.Tensor,
    layout: torch.Tensor,
    expected_m: int,
) -> None:
    o = SimpleNamespace(kind=kind, lhs=(a, a_scales), rhs=(w, w_scales), out=out, layout=layout, expected_m=expected_m)
    for call in sglang_calls(o):
        out.fill_(FILL)
        call()


def sglang_call(o: Operands) -> OpCall:
    return torch.ops.clients.sglang, (o.kind, *o.lhs, *o.rhs, o.out, o.layout, o.expected_m)


@contextmanager
def configured_num_sms(num_sms: int) -> Iterator[None]:
    import deep_gemm

    original = deep_gemm.get_num_sms()
    deep_gemm.set_num_sms(num_sms)
    try:
        yield
    finally:
        deep_gemm.set_num_sms(original)


def fewer_sms(device: str) -> None:
    import deep_gemm

    everything = deep_gemm.get_num_sms()
    for num_sms in (everything - 20, everything // 2 - 1, 1):
        for kind in ("dense", "contiguous", "masked"):
            o = Operands(kind, device)
            for call in sglang_calls(o):
                o.out.fill_(FILL)
                with configured_num_sms(num_sms):
                    call()
                    check(deep_gemm.get_num_sms() == num_sms, "num_sms is not as set")
                o.check()
    check(deep_gemm.get_num_sms() == everything, "num_sms is not restored")


@contextmanager
def compile_mode() -> Iterator[None]:
    import deep_gemm

    old = deep_gemm.get_compile_mode()
    deep_gemm.set_compile_mode(1)
    try:
        yield
    finally:
        deep_gemm.set_compile_mode(old)


def sweep(kind: str, device: str) -> str:
    """Every M is new to the planner: it has to plan, and at times to compile, but never to launch."""
    import deep_gemm

    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, K, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)

    rows = (GROUPS, LARGEST_M) if kind == "masked" else (LARGEST_M,)
    groups = () if kind == "dense" else (GROUPS,)
    a, a_scales = empty(*rows), torch.ones(*rows, K // 128, device=device)
    rhs = empty(*groups, N), torch.ones(*groups, -(-N // 128), K // 128, device=device)
    out = torch.full((*rows, N), FILL, dtype=torch.bfloat16, device=device)
    layout = torch.zeros(GROUPS if kind == "masked" else LARGEST_M, dtype=torch.int32, device=device)

    def execute(m: int) -> None:
        if kind == "dense":
            deep_gemm.fp8_gemm_nt((a[:m], a_scales[:m]), rhs, out[:m])
        elif kind == "contiguous":
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous((a[:m], a_scales[:m]), rhs, out[:m], m_indices=layout[:m])
        else:
            deep_gemm.fp8_m_grouped_gemm_nt_masked((a, a_scales), rhs, out, masked_m=layout, expected_m=m)

    step = deep_gemm.get_mk_alignment_for_contiguous_layout() if kind == "contiguous" else 5 if out.is_cuda else 97
    ms = [*range(step if kind == "contiguous" else 1, LARGEST_M, step), LARGEST_M]
    taken_us: list[float] = []
    with compile_mode():
        for m in ms:
            start = time.perf_counter()
            execute(m)
            taken_us.append((time.perf_counter() - start) * 1e6)
    check(bool(out.isnan().all()), "something was launched")
    check(deep_gemm.get_compile_mode() == 0, "the compile mode is not restored")
    if kind == "masked":
        layout.fill_(3)
    execute(step)
    written = out[:, :3] if kind == "masked" else out[:step]
    check(bool((written == 0).all()), "nothing is multiplied after the sweep")
    median_us = statistics.median(taken_us)
    check(median_us < MISS_US, f"an M takes {median_us:.0f} us, expected less than {MISS_US}")
    return f"{len(ms)} values of M, {median_us:.0f} us each, {sum(taken_us) / 1e6:.1f} s in all"


def paths(device: str) -> dict[str, Callable[[], str | None]]:
    """Every way of calling, by name. What is called may raise Skipped."""
    cases = {
        "fp8_gemm_nt": partial(Operands, "dense", device, scales="columns"),
        "contiguous, 0 in empty blocks": partial(Operands, "contiguous", device, empty=0),
        "contiguous, -1 in empty blocks": partial(Operands, "contiguous", device, empty=-1, scales="columns"),
        "masked": partial(Operands, "masked", device, scales="batched"),
        "masked, 101 rows": partial(Operands, "masked", device, max_m=101, scales="batched"),
    }
    backends = ("aot_eager", "inductor") if device == "cuda" else ("aot_eager",)
    found: dict[str, Callable[[], str | None]] = {}
    for name, make in cases.items():
        found[f"vLLM: {name}, eager"] = partial(eager, make)
        for backend in backends:
            found[f"vLLM: {name}, torch.compile {backend}"] = partial(compiled, make, backend)
        if device == "cuda":
            for backend in (None, "aot_eager"):
                way = f"CUDA graph{f' of torch.compile {backend}' if backend else ''}"
                found[f"vLLM: {name}, {way}"] = partial(graphed, make, backend)
    found["vLLM: the first release's names"] = partial(first_names, device)
    found["vLLM: helpers"] = partial(helpers, device)
    for kind in ("dense", "contiguous", "masked"):
        found[f"SGLang: {kind}"] = partial(sglang, kind, device)
        for backend in backends:
            make = partial(Operands, kind, device)
            found[f"SGLang: {kind}, torch.compile {backend}"] = partial(compiled, make, backend, sglang_call)
        found[f"SGLang: {kind}, compile mode"] = partial(sweep, kind, device)
        if device == "cuda":
            found[f"SGLang: {kind}, CUDA graph"] = partial(sglang_graphed, kind, device)
    found["SGLang: fewer SMs for a while"] = partial(fewer_sms, device)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    vllm()
    failed = 0
    for name, path in paths(device).items():
        try:
            said = path()
            print(f"{name}: OK{f' ({said})' if said else ''}", flush=True)
        except Skipped as why:
            print(f"{name}: skipped: {why}", flush=True)
        except Exception as error:
            failed += 1
            print(f"{name}: FAILED: {type(error).__name__}: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
