"""Which kernels a deployment needs: all that the planner can ever choose for it. Pure: no GPU, no compiler."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from .config import Config, block_size, percent
from .decode import MOST_ROWS, strips
from .errors import InvalidInputError
from .heuristics import choices, is_legal, kernels, spare_tiles, tiles
from .layout import alignment_of_groups, is_whole
from .plan import (
    DEBUG_WAIT_SECONDS,
    DESCRIBE,
    REPORT,
    Strip,
    Tile,
    describing_source,
    kernel_name,
    reporting_source,
)
from .problem import Kind, Problem, Problems, check_shape
from .recorded import Record
from .runtime import quantization, transpose
from .runtime.compiler import Source
from .runtime.device import MODELS, Device

GPUS = ("h100", "h200")
MOST_MS = (1, 16384)
MOST_COUNTS = 2**20  # numbers of rows that are gone through
_BLOCK = 512  # problems that are planned together
_LARGE = 2**30  # enough for every tile
_LAYOUT, _QUANTIZE = "layout", "quantize"
_KINDS = {
    "dense": Kind.DENSE,
    "contiguous": Kind.CONTIGUOUS,
    "psum": Kind.ENDS,
    "masked": Kind.MASKED,
    "weight_gradients": Kind.K_GROUPED,
}
KINDS = tuple(_KINDS)


@dataclass(frozen=True)
class Kernel:
    """One that is compiled on its own.

    Attributes:
        base: its name, but for debug.
        tile: what it multiplies by; None for a small one beside those.
        debug: as in a process with DG_JIT_DEBUG=1.
    """

    base: str
    tile: Tile | Strip | None = None
    debug: bool = False

    @property
    def name(self) -> str:
        """What it is called in the cache, by profilers and `deep-gemm compile --list`."""
        return kernel_name(self.base, self.debug) if self.tile else self.base

    @property
    def work(self) -> int:
        """About how long it takes to compile, beside others; without a unit (docs/facts.md, the tool chain)."""
        tile = self.tile
        if tile is None:
            return 1500 if self.base == _QUANTIZE else 200
        return 300 + (tile.width * tile.unroll if isinstance(tile, Strip) else tile.block_n * tile.unroll * tile.ranges)

    def source(self) -> Source:
        """Its text, ready to be compiled."""
        if self.tile:
            return self.tile.source(DEBUG_WAIT_SECONDS if self.debug else 0)
        small = {_LAYOUT: transpose.source, _QUANTIZE: quantization.source}
        return (small | {DESCRIBE: describing_source, REPORT: reporting_source})[self.base]()


@dataclass(frozen=True)
class Layer:
    """Multiplications that a deployment makes: of one kind, with one N and K, and any number of rows in a range.

    Attributes:
        kind: one of KINDS: dense; contiguous, by a group for every row; psum, the same by running ends; masked;
            weight_gradients, with recipe (1, 1, 128), dense and grouped along K.
        n, k: columns of d, and of a.
        groups: of grouped kinds; None: any number.
        ms: the least and the most of M; with "masked" of expected_m.
        max_m: with "masked", rows that each group has room for; None: any number.
        name: what it is in a model.
    """

    kind: str
    n: int
    k: int
    groups: int | None = None
    ms: tuple[int, int] = MOST_MS
    max_m: int | None = None
    name: str = ""


def kernels_for(
    layers: Iterable[Layer | tuple[int, int]] | None = None,
    *,
    kinds: Iterable[str] = KINDS,
    ms: tuple[int, int] | None = None,
    num_sms: int | None = None,
    tc_util: int = 100,
    block_size_multiple_of: int | tuple[int, int] = 1,
    alignment: int | None = None,
    gpus: Iterable[Device | str] = GPUS,
    debug: bool = False,
) -> tuple[Kernel, ...]:
    """Every kernel that a deployment can ever need, whatever it is asked for: the closed set, or the part of it that is
    left by what is given. Pure and deterministic.

    Args:
        layers: pairs (N, K), of all kinds; or `Layer`s, which say more. None: all there can be. Of grouped kinds whose
            groups are not known, and of ranges that are too long to go through, all that is legal is listed.
        kinds: those that are meant: dense, contiguous, psum (contiguous by running ends), masked, weight_gradients.
        ms: the least and the most of M (masked: of expected_m) of pairs and of what has no layers; None: (1, 16384) for
            pairs, else any. A `Layer` has its own kind and ms.
        num_sms, tc_util, block_size_multiple_of: as given to `set_num_sms`, `set_tc_util` and
            `set_block_size_multiple_of`; None: all SMs.
        alignment: as set by `set_mk_alignment_for_contiguous_layout`; None: 128 for layers, else any.
        gpus: names, h100 and h200 among them, or what `runtime.device.MODELS` has for them.
        debug: the kernels of a process with DG_JIT_DEBUG=1.

    Returns: those needed with `set_pdl` and `set_batch_invariant` on and off, always in one order.
    Raises: InvalidInputError for kinds, sizes and GPUs that there are not.
    """
    block_m, block_n = block_size(block_size_multiple_of)
    config = Config(num_sms=num_sms, tc_util=percent(tc_util), block_m=block_m, block_n=block_n)
    alignment = None if alignment is None else alignment_of_groups(alignment)
    devices, kinds = _devices(gpus), _checked(kinds)
    _check_range("ms", ms)
    found: set[Tile | Strip] = set()
    if layers is None:
        for kind, device in product(kinds, devices):
            layer = Layer(kind, _LARGE, _LARGE, ms=ms or (1, _LARGE))
            found |= _legal(layer, alignment, device, _config(config, device))
    else:
        for x in layers:
            for layer in [x] if isinstance(x, Layer) else [Layer(kind, *_pair(x), ms=ms or MOST_MS) for kind in kinds]:
                _check(layer)
                for device in devices:
                    found |= _of_layer(layer, alignment or 128, device, _config(config, device))
    return _listed(found, debug)


def kernels_of_records(records: Iterable[Record], debug: bool = False) -> tuple[Kernel, ...]:
    """Every kernel that these problems need, with set_pdl and set_batch_invariant on and off."""
    counts: dict[tuple[Problem, Device, Config], set[int]] = {}
    for problem, device, config in records:
        hint = problem.expected_m
        like = replace(problem, m=1) if hint is None else replace(problem, expected_m=1)
        counts.setdefault((like, device, config), set()).add(problem.m if hint is None else hint)
    found: set[Tile | Strip] = set()
    for (like, device, config), of_like in counts.items():
        found |= _chosen(_split(like, np.array(sorted(of_like))), device, config)
    return _listed(found, debug)


def kernel_named(name: str) -> Kernel:
    """The kernel of that name (`Kernel.name`), also one of those for set_block_size_multiple_of.

    Raises: InvalidInputError where there is none.
    """
    known = {kernel.name: kernel for debug in (False, True) for kernel in every_kernel(debug)}
    if name not in known:
        some = ", ".join(kernel.name for kernel in every_kernel(False)[:3])
        raise InvalidInputError(f"{name!r} is no kernel, expected one such as {some}: see deep-gemm compile --list")
    return known[name]


@cache
def every_kernel(debug: bool = False) -> tuple[Kernel, ...]:
    """All that there are, those for set_block_size_multiple_of as well."""
    multiplying = (*kernels(), *kernels(True), *spare_tiles())
    small = (Kernel(_LAYOUT), Kernel(_QUANTIZE), Kernel(DESCRIBE), *([Kernel(REPORT)] if debug else []))
    return (*(Kernel(tile.name, tile, debug) for tile in multiplying), *small)


def _listed(found: set[Tile | Strip], debug: bool) -> tuple[Kernel, ...]:
    """In one order, with the small kernels: groups along K, which have column scales, are described by one."""
    needed = {_LAYOUT, _QUANTIZE, REPORT, *([DESCRIBE] if any(tile.column_scales for tile in found) else [])}
    return tuple(x for x in every_kernel(debug) if (x.tile in found if x.tile else x.base in needed))


def _checked(kinds: Iterable[str]) -> tuple[str, ...]:
    kinds = tuple(kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise InvalidInputError(f"got the kind {kind!r}, expected some of {', '.join(KINDS)}")
    return kinds


def _devices(gpus: Iterable[Device | str]) -> list[Device]:
    models = {**MODELS, **{model.name: model for model in MODELS.values()}}
    found = [] if isinstance(gpus, str) else [models.get(gpu) if isinstance(gpu, str) else gpu for gpu in gpus]
    if not found or not all(isinstance(device, Device) for device in found):
        raise InvalidInputError(f"gpus is {gpus!r}, expected a list of Devices, or of {', '.join(MODELS)}")
    return [device for device in found if device]


def _pair(x: object) -> tuple[int, int]:
    if not (isinstance(x, (tuple, list)) and len(x) == 2 and all(map(is_whole, x))):
        raise InvalidInputError(f"got {x!r} among the layers, expected pairs (N, K), or Layers")
    return x[0], x[1]


def _check_range(name: str, ms: object) -> None:
    fits = isinstance(ms, (tuple, list)) and len(ms) == 2 and all(map(is_whole, ms)) and 1 <= ms[0] <= ms[1] < 2**31
    if ms is not None and not fits:
        raise InvalidInputError(f"{name} is {ms!r}, expected the least and the most number of rows, 1 or more")


def _check(layer: Layer) -> None:
    _checked([layer.kind])
    _check_range("ms", layer.ms)
    for name, size in (("groups", layer.groups), ("max_m", layer.max_m)):
        if size is not None and not (is_whole(size) and size > 0):
            raise InvalidInputError(f"{name} is {size!r}, expected a number of 1 or more, or None for any")
    if not (is_whole(layer.n) and is_whole(layer.k) and layer.n > 0):
        raise InvalidInputError(f"N, K are {layer.n!r}, {layer.k!r}, expected whole numbers of 1 or more")
    check_shape(max(layer.ms[1], layer.max_m or 1), layer.n, layer.k, layer.groups or 1)


def _config(config: Config, device: Device) -> Config:
    """num_sms as set_num_sms keeps it."""
    if config.num_sms is not None and not (is_whole(config.num_sms) and 1 <= config.num_sms <= device.num_sms):
        raise InvalidInputError(
            f"num_sms is {config.num_sms!r}, expected 1 to {device.num_sms}, the SMs of {device.name}, or None for all"
        )
    return replace(config, num_sms=None) if config.num_sms == device.num_sms else config


def _legal(layer: Layer, alignment: int | None, device: Device, config: Config) -> set[Tile | Strip]:
    """All that is legal for a layer, whatever its groups are."""
    kind, columns = _KINDS[layer.kind], layer.kind == "weight_gradients"
    most = layer.max_m or _LARGE if layer.kind == "masked" else layer.ms[1]
    # Tiles of 64, 128 and 192 rows: which divide the alignment is all that it says.
    alignments = [1] if kind != Kind.CONTIGUOUS else [alignment] if alignment else [64, 128, 192, 384]
    found: set[Tile | Strip] = set()
    for each in alignments:
        problem = Problem(most, layer.n, layer.k, kind, alignment=each, column_scales=columns)
        families = (tiles(columns),) if columns else (tiles(), spare_tiles())
        legal = ({tile for tile in family if is_legal(tile, problem, device, config)} for family in families)
        found |= next(filter(None, legal), set())
    if layer.kind == "dense" and layer.ms[0] <= MOST_ROWS and config.num_sms is None and config.tc_util == 100:
        found |= {x for x in strips() if x.block_m % config.block_m == x.block_n % config.block_n == 0}
    return found


def _of_layer(layer: Layer, alignment: int, device: Device, config: Config) -> set[Tile | Strip]:
    """All that is chosen for a layer with some number of rows of its range."""
    if layer.kind == "dense":
        like = Problem(1, layer.n, layer.k)
    elif layer.kind == "contiguous" and layer.groups:
        like = Problem(1, layer.n, layer.k, Kind.CONTIGUOUS, layer.groups, alignment=alignment)
    elif layer.kind == "masked" and layer.groups and layer.max_m:
        like = Problem(layer.max_m, layer.n, layer.k, Kind.MASKED, layer.groups, expected_m=1)
    else:  # there are too many to go through
        return _legal(layer, alignment, device, config)
    # Of contiguous groups all rows that fill up to the same multiple of the alignment are planned alike.
    step = like.alignment
    first, last = (-(-x // step) * step for x in layer.ms)
    if like.expected_m is not None:
        first, last = min(first, like.m), min(last, like.m)
    if (last - first) // step >= MOST_COUNTS:
        return _legal(layer, alignment, device, config)
    return _chosen(_split(like, np.arange(first, last + 1, step)), device, config)


def _split(like: Problem, counts: Any) -> Iterator[Problems]:
    """Problems with ascending numbers of rows, many at a time: few rows apart from more."""
    for some in (counts[counts <= MOST_ROWS], counts[counts > MOST_ROWS]):
        for start in range(0, len(some), _BLOCK):
            yield Problems(like, some[start : start + _BLOCK])


def _chosen(many: Iterable[Problems], device: Device, config: Config) -> set[Tile | Strip]:
    """All that is chosen for them, whether launches overlap or not, and K may be split or not."""
    found: set[Tile | Strip] = set()
    for problems in many:
        few = problems.like.kind == Kind.DENSE and bool((problems.m <= MOST_ROWS).all())
        for invariant in (False, True) if few else (False,):  # more rows never split K
            for chosen in choices(problems, device, replace(config, batch_invariant=invariant)):
                found.update(chosen)
    return found
