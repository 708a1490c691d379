"""The commands `compile` and `cache`: kernels before they are needed, and what is kept of them. No GPU, no driver."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import models, recorded, settings
from .deployment import (
    GPUS,
    KINDS,
    MOST_MS,
    Kernel,
    Layer,
    every_kernel,
    kernel_named,
    kernels_for,
    kernels_of_records,
)
from .errors import InvalidInputError
from .runtime import device as devices
from .runtime.cache import Cache, Entry
from .runtime.compiler import COMPILER_FILE, Cubin, Source, compile_many, compiler_of, default_compiler, find

DAY = 86400.0
SIZES = {"dense": "NxK", "contiguous": "GxNxK", "psum": "GxNxK", "masked": "GxMxNxK", "weight_gradients": "NxK"}


def add_to(commands: Any, positive: Callable[[str], int]) -> None:
    """Adds both commands to those of a parser. positive: reads a number of 1 or more."""
    parser = commands.add_parser("compile", help="compile kernels before they are needed, without a GPU")
    what = parser.add_argument_group("which kernels (default: all that there can be)")
    what.add_argument("--model", type=Path, metavar="CONFIG.json", help="of a model, by its Hugging Face configuration")
    for name, meaning in (
        ("tp", "ranks that attention and dense layers are split over"),
        ("ep", "ranks that experts are spread over"),
        ("dp", "replicas of attention"),
    ):
        what.add_argument(f"--{name}", type=positive, default=1, help=f"{meaning} (default: 1)")
    what.add_argument("--tokens", type=positive, default=MOST_MS[1], help="of one pass, at most (default: 16384)")
    what.add_argument("--decode-tokens", type=positive, default=128, help="of one pass of decode (default: 128)")
    forms = ", ".join(f"{kind}:{size}" for kind, size in SIZES.items())
    what.add_argument("--shape", action="append", default=[], metavar="NxK", help=f"of a layer; {forms}")
    what.add_argument("--shapes", type=Path, metavar="FILE", help="of the layers of a file, one a line as for --shape")
    what.add_argument("--recorded", type=Path, metavar="FILE", help="of what DG_RECORD_SHAPES has recorded")
    what.add_argument("--kernel", action="append", default=[], metavar="NAME", help="of that name, as in --list")
    what.add_argument("--kind", action="append", choices=KINDS, help="of that kind, where no layers are given")
    what.add_argument("--gpu", action="append", choices=tuple(devices.MODELS), help="to plan for (default: h100, h200)")
    what.add_argument("--sms", type=positive, help="as set_num_sms (default: all)")
    what.add_argument("--tc-util", type=positive, default=100, metavar="PERCENT", help="as set_tc_util (default: 100)")
    block = ("ROWS", "COLUMNS")
    what.add_argument("--block-size-multiple-of", type=positive, nargs=2, metavar=block, help="as the function set_...")
    what.add_argument("--alignment", type=positive, help="as set_mk_alignment_for_contiguous_layout (default: 128)")
    parser.add_argument("--output", type=_path, metavar="FOLDER", help="to bake into an image, in place of the cache")
    parser.add_argument("--check", action="store_true", help="compile nothing; name what is missing or stale")
    parser.add_argument("--list", action="store_true", help="compile nothing; print the names of the kernels")
    parser.add_argument("--jobs", type=positive, help="kernels at a time (default: one per core)")
    parser.set_defaults(run=_compile)

    parser = commands.add_parser("cache", help="list, measure, verify or prune the cache of compiled kernels")
    parser.add_argument("action", nargs="?", choices=("list", "size", "verify", "prune"), default="list")
    parser.add_argument("--folder", type=Path, help="another one than DG_JIT_CACHE_DIR's")
    parser.add_argument(
        "--stale", action="store_true", help="prune: what this version, compiler and settings do not use"
    )
    parser.add_argument("--older-than", type=positive, metavar="DAYS", help="prune: what was made before that")
    parser.add_argument("--all", action="store_true", help="prune: every kernel")
    parser.set_defaults(run=_cache)


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is not a path")
    return Path(text)


# compile


def _compile(args: argparse.Namespace) -> int:
    kernels = _kernels(args)
    if args.list:
        print(*(kernel.name for kernel in kernels), sep="\n")
        return 0
    return _check(kernels, args.output) if args.check else _make(kernels, args.output, args.jobs)


def _kernels(args: argparse.Namespace) -> tuple[Kernel, ...]:
    """Those that are asked for, the largest first, so that cores finish together."""
    debug = settings.get("DG_JIT_DEBUG")
    layers: list[Layer] = []
    if args.model:
        parallel = models.Parallel(args.tp, args.ep, args.dp)
        layers += models.layers_of(models.read(args.model), parallel, args.tokens, args.decode_tokens)
    elif (args.tp, args.ep, args.dp) != (1, 1, 1):
        raise InvalidInputError("--tp, --ep and --dp say how a model is split: pass --model CONFIG.json, too")
    shapes = [_layer(text, args.tokens) for text in args.shape]
    if args.shapes:
        lines = list(_lines(args.shapes))
        shapes += [_layer(line, args.tokens) for line in lines]
        if not lines:
            raise InvalidInputError(f"--shapes is {args.shapes}, expected a shape a line: none is in it")
    if not args.list:
        _print(layers + shapes)
    wanted = {kernel_named(name) for name in args.kernel}
    if args.recorded:
        wanted.update(kernels_of_records(recorded.read(args.recorded), debug))
    if layers or shapes or not (args.recorded or args.kernel):
        narrowed = kernels_for(
            layers + shapes or None,
            kinds=args.kind or KINDS,
            num_sms=args.sms,
            tc_util=args.tc_util,
            block_size_multiple_of=args.block_size_multiple_of or 1,
            alignment=args.alignment,
            gpus=args.gpu or GPUS,
            debug=debug,
        )
        wanted.update(narrowed)
    return tuple(sorted(wanted, key=lambda kernel: (-kernel.work, kernel.name)))


def _layer(text: str, most: int) -> Layer:
    """A layer as for --shape. Raises: InvalidInputError."""
    kind, colon, numbers = text.rpartition(":")
    kind = kind if colon else "dense"
    sizes = numbers.split("x")
    fitting = kind in SIZES and len(sizes) == len(SIZES[kind].split("x"))
    if not (fitting and all(x.isdecimal() and len(x) <= 10 and int(x) for x in sizes)):
        forms = ", ".join(f"{kind}:{size}" for kind, size in SIZES.items())
        raise InvalidInputError(f"the shape is {text!r}, expected sizes such as 2112x7168, or one of {forms}")
    *before, n, k = map(int, sizes)
    groups, max_m = (*before, None, None)[:2]
    return Layer(kind, n, k, groups, (1, max_m or most), max_m)


def _lines(path: Path) -> Iterator[str]:
    """What is in a file, without comments."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"--shapes is {path}, which cannot be read: {error}") from error
    yield from filter(None, (line.partition("#")[0].strip() for line in text.splitlines()))


def _print(layers: list[Layer]) -> None:
    width = max((len(layer.name) for layer in layers), default=0)
    for x in layers:
        room = f" x {x.max_m}" if x.max_m else ""
        of_groups = f", {x.groups}{room} groups" if x.groups else ""
        print(f"{x.name:{width}} {x.kind:16} N {x.n:6} K {x.k:6} M {x.ms[0]} to {x.ms[1]}{of_groups}".strip())


def _folder(output: Path | None) -> Path:
    return output or settings.get("DG_JIT_CACHE_DIR")


def _make(kernels: tuple[Kernel, ...], output: Path | None, jobs: int | None) -> int:
    from tqdm import tqdm

    if output:
        _claim(output)
    missing = [kernel for kernel in kernels if not find(kernel.source(), output)[1]]
    if not missing:
        print(f"{len(kernels)} kernels, all of them there")
        return 0
    there, cores = len(kernels) - len(missing), jobs or len(os.sched_getaffinity(0))
    how = f"{default_compiler()} on {cores} cores, into {_folder(output)}"
    print(f"{len(kernels)} kernels, {there} of them there; {how}", flush=True)
    begun, size, done = time.perf_counter(), 0, 0
    work = {kernel.source(): kernel.work for kernel in missing}
    form = "{percentage:3.0f}%|{bar}| {desc} [{elapsed}, {remaining} left]"
    # disable=None: no bar unless stderr is a terminal.
    with tqdm(total=sum(work.values()), bar_format=form, mininterval=0, miniters=1, leave=False, disable=None) as bar:

        def on_done(source: Source, cubin: Cubin) -> None:
            nonlocal done, size
            done, size = done + 1, size + len(cubin.image)
            bar.set_description_str(f"{done} of {len(missing)} kernels", refresh=False)
            bar.update(work[source])

        compile_many(work, jobs, on_done, output)
    if output:
        Cache(output).remove_locks()  # which are nobody's business in an image
    lost = [kernel.name for kernel in missing if not find(kernel.source(), output)[1]]
    if lost:
        raise InvalidInputError(
            f"{len(lost)} kernels cannot be kept in {_folder(output)}: take a folder of yours, with room in it"
        )
    print(f"made {done} kernels in {time.perf_counter() - begun:.1f} s, {size / 1e6:.1f} MB")
    return 0


def _claim(output: Path) -> None:
    """Makes a folder that says what its kernels are compiled with. Raises: InvalidInputError if it says another."""
    compiler = default_compiler()
    if os.path.lexists(output) and not output.is_dir():
        raise InvalidInputError(f"--output is {output}, expected a folder: take another name")
    if not output.is_dir():
        output.mkdir(parents=True)
        output.chmod(0o755)  # whatever the umask
    found = compiler_of(output)
    if found and found != compiler:
        raise InvalidInputError(
            f"{output} has kernels of {found}, expected {compiler}: take another folder, or empty it"
        )
    fresh = output / f".{COMPILER_FILE}.{os.getpid()}"
    fresh.write_text(f"{compiler}\n", encoding="utf-8")
    fresh.chmod(0o644)
    fresh.replace(output / COMPILER_FILE)


def _check(kernels: tuple[Kernel, ...], output: Path | None) -> int:
    """Names what a process would have to compile; as stale what is there by that name, of other text or options."""
    folder = _folder(output)
    older = {entry.about.get("kernel") for entry in _cache_of(folder).entries()}
    missing = [kernel.name for kernel in kernels if not find(kernel.source(), output)[1]]
    for name in missing:
        print(f"{'stale' if name in older else 'missing':8} {name}")
    if missing:
        print(f"deep-gemm: {len(missing)} of {len(kernels)} kernels are not there: compile them", file=sys.stderr)
        return 1
    print(f"{len(kernels)} kernels, all of them there")
    return 0


# cache


def _cache(args: argparse.Namespace) -> int:
    cache = _cache_of(args.folder or settings.get("DG_JIT_CACHE_DIR"))
    if args.action != "prune" and (args.stale or args.older_than or args.all):
        raise InvalidInputError("--stale, --older-than and --all say what to prune: deep-gemm cache prune")
    entries = list(cache.entries())
    size = sum(entry.bytes for entry in entries)
    faults = [entry for entry in entries if entry.fault]
    if args.action in ("list", "verify"):
        for entry in entries if args.action == "list" else faults:
            print(_line(entry))
    if reason := cache.refusal():
        raise InvalidInputError(reason)
    if args.action == "prune":
        return _prune(cache, entries, args)
    print(f"{cache.root}: {len(entries)} kernels, {size / 1e6:.1f} MB, {len(faults)} not used")
    return int(args.action == "verify" and bool(faults))


def _cache_of(folder: Path) -> Cache:
    return Cache(folder, trusted=settings.get("DG_JIT_ALLOW_SHARED_CACHE"))


def _line(entry: Entry) -> str:
    days = (time.time() - entry.made) / DAY
    what = entry.fault or f"{entry.about.get('kernel', '')}, {entry.about.get('compiler', '')}"
    return f"{entry.path.name:48} {entry.bytes / 1e3:7.0f} KB {days:5.1f} days  {what}"


def _prune(cache: Cache, entries: list[Entry], args: argparse.Namespace) -> int:
    """Removes what is damaged or left over from killed processes, and what the options name."""
    used: set[str] = set()
    if args.stale:
        every = [kernel for debug in (False, True) for kernel in every_kernel(debug)]
        used = {find(kernel.source(), cache.root)[0].name for kernel in every}
    before = time.time() - min(args.older_than, 10**6) * DAY if args.older_than else 0.0
    gone = [
        entry
        for entry in entries
        if entry.damaged or args.all or entry.made < before or (args.stale and entry.path.name not in used)
    ]
    leftovers = list(cache.leftovers())
    freed = sum(cache.remove(path) for path in (*(entry.path for entry in gone), *leftovers))
    what = f"{len(gone)} of {len(entries)} kernels and {len(leftovers)} leftovers"
    print(f"{cache.root}: removed {what}, {freed / 1e6:.1f} MB")
    return 0
