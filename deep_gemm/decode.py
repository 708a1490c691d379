"""Which strip of the kernel for few rows (kernels/decode.cu), into how many parts K is split, and what that costs.

The cost model's constants were fitted to sweeps on an H100, those of launches alone on an H200 as well (docs/facts.md,
planner). Pure, like heuristics.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .config import Config
from .plan import BLOCK_K, IN_PAIRS, PAIR, Cost, Plan, Strip, make_strip, norm
from .problem import Kind, Problems
from .runtime.device import Device

MOST_ROWS = 128
SPLITS = (1, 2, 4, 8)
SM_SMEM_BYTES = 233472  # for all CTAs of an SM, with
RESERVED_SMEM_BYTES = 1024  # of each
AGAIN = 0.047  # of memory's time, for every further row of strips, since it reads b once more
TALL = 1.73  # times what the copy engine brings into an SM, for two warpgroups' rows of a
CLUSTERS_LOSE = 0.13  # of the SMs, if clusters of 8 CTAs are to find room in every GPC; with several CTAs on an SM less


class Rates(NamedTuple):
    """What the cost model consists of: times in ns, rates in bytes per ns, and numbers, where it says so."""

    start: float  # from one launch to the next, with a CTA on every SM
    idle: float  # less, if no SM had one
    cta: float  # more, for every CTA of the busiest SM
    split: float  # to send sums to another CTA, and
    send: float  # that rate
    store: float  # of the result
    memory: float  # of the rate at which weights can be streamed (a number)
    sm: float  # what the copy engine brings into an SM
    l2: float  # what L2 delivers to all of them
    latency: float  # of memory, for every set of stages
    block: float  # of a K block, and
    area: float  # more, for every 64x64 of output of a warpgroup, and
    swapped: float  # more, for every 32 rows of a, where each column of wgmma has a scale
    unready: float  # for what is not in flight at once
    sharpness: float  # of the norm that stands for "the slowest decides" (a number)
    crowd: float  # more of it, if a CTA has an SM's whole shared memory in flight (a number)
    uneven: float  # more of memory's time, if the last turn of CTAs leaves room for as many as there are (a number)


ALONE = Rates(1824, 150, 318, 131, 10.9, 13.8, 1.023, 102, 19_200, 1174, 118, 9.6, 17.6, 79.6, 5.13, 0.157, 0.161)
OVERLAPPING = Rates(186, 1111, 370, 72.5, 13.7, 20.9, 1.079, 144, 137_000, 1073, 12.5, 12, 29.4, 542, 1.76, 0, 0.084)
_BOTH: Any = Rates(*np.array([ALONE, OVERLAPPING]).T[:, :, None, None])  # of each figure both, for all problems


@cache
def strips() -> tuple[Strip, ...]:
    """Every strip that the planner chooses from. None spills registers."""
    shapes = [(tokens, warpgroups) for tokens in (8, 16, 32) for warpgroups in (1, 2, 3)]
    swapped = (make_strip(True, *shape) for shape in shapes if shape != (32, 3))  # which spills
    tall = (make_strip(False, width, warpgroups=2) for width in (32, 64))
    return *swapped, *(make_strip(False, width) for width in (32, 64, 112, 128)), *tall


class Variant(NamedTuple):
    """A strip, and how it is launched: `residents` CTAs find room on an SM, which decides how many stages there are."""

    strip: Strip
    split: int
    residents: int
    stages: int


@cache
def variants() -> tuple[Variant, ...]:
    found: list[Variant] = []
    for strip in strips():
        for split in SPLITS:
            if 4 * strip.warpgroups % split or (strip.block_m > 64 and split > 2):  # whose sums would take too long
                continue
            for residents in range(1, strip.ctas_per_sm + 1):
                room = min(SM_SMEM_BYTES // residents - RESERVED_SMEM_BYTES, strip.smem_bytes)
                stages = max((s for s in range(1, 65) if strip.smem_bytes_of(s, split) <= room), default=0)
                if stages >= 2:
                    found.append(Variant(strip, split, residents, stages))
    return tuple(found)


class _Table:
    """Variants as columns of numbers."""

    def __init__(self, variants: tuple[Variant, ...]) -> None:
        def column(number: Callable[[Variant], float]) -> Any:
            return np.array([number(variant) for variant in variants])

        self.variants = variants
        self.numbers: dict[str, list[int]] = {}  # by strip and split
        for i, v in enumerate(variants):
            self.numbers.setdefault(f"{v.strip.name} K/{v.split}", []).append(i)
        pairs = zip(variants, (*variants[1:], None), strict=True)
        self.alike = np.array([after is not None and after[:2] == v[:2] for v, after in pairs])  # as the next
        self.block_m, self.block_n = column(lambda v: v.strip.block_m), column(lambda v: v.strip.block_n)
        self.swapped = column(lambda v: v.strip.swapped)
        self.split, self.room = column(lambda v: v.split), column(lambda v: v.residents)
        self.stages, self.warpgroups = column(lambda v: v.stages), column(lambda v: v.strip.warpgroups)
        self.reused = column(lambda v: v.stages // v.strip.unroll * v.strip.unroll)  # stages that are used again
        self.area = self.block_m * self.block_n
        self.stage_bytes = column(lambda v: v.strip.smem_bytes_of(v.stages, v.split) / v.stages)


@cache
def _table() -> _Table:
    return _Table(variants())


class Costs:
    """What problems cost on each variant, with and without overlap of launches: a row for each problem."""

    def __init__(self, problems: Problems, device: Device, config: Config) -> None:
        self._problem, self._m, self._config, self.table = problems.like, problems.m, config, _table()
        t, m = self.table, problems.m
        self.ctas = -(-m // t.block_m) * -(-problems.like.n // t.block_n) * t.split
        self.blocks = -(-problems.like.k_blocks // t.split)
        self.stages = np.where(self.blocks <= t.stages, self.blocks, t.reused)
        self._same = t.alike & (self.stages == np.roll(self.stages, -1))  # launch as the next, of which more fit
        self._sms = device.num_sms
        room = self._sms * t.room * np.where(t.split > 2, 1 - CLUSTERS_LOSE * t.split / 8 / t.room, 1)
        self.waves = np.maximum(1, np.ceil(self.ctas / room))
        self._uneven = np.where(self.waves > 1, self.waves * room / self.ctas - 1, 0)
        self.memory_us = problems.bytes / device.memory_gbps / 1e3
        self._us = self._total(_BOTH)

        # Half a strip of nobody's rows is never best; nor are few rows on wgmma's m side.
        few = (m <= t.block_m) & ((m > t.block_m // 2) | (t.block_m == 8))
        fits = np.where(t.swapped, few, m > np.where(t.block_m == 64, 16, 64)) & (t.split <= problems.like.k_blocks)
        fits &= (self.stages > 0) & ~self._same & (t.block_m % config.block_m == 0) & (t.block_n % config.block_n == 0)
        fits &= (t.split <= device.num_sms) & ((m <= t.block_m) | (device.num_sms >= PAIR))
        self.legal = fits & ((t.split == 1) | (not config.batch_invariant))

    def _total(self, rates: Any) -> Any:
        """In us, for each of the rates."""
        t, work = self.table, self.waves * self.blocks
        size = (np.minimum(t.block_m, self._m) + t.block_n) * BLOCK_K  # of a stage
        busiest = np.ceil(self.ctas / self._sms)
        swapped = rates.swapped * t.swapped * t.block_m / 32
        terms = (
            self.memory_us * 1e3 / rates.memory * (1 + rates.uneven * self._uneven),
            busiest * self.blocks * size / (rates.sm * np.where(t.block_m > 64, TALL, 1)),
            self.ctas * self.blocks * size / rates.l2,
            work * (rates.block + rates.area * t.area / 4096 / np.minimum(t.warpgroups, 2) + swapped),
            self.waves * np.ceil(self.blocks / np.maximum(1, self.stages)) * rates.latency,
        )
        loop = norm(rates.sharpness, *terms)
        loop *= 1 + rates.crowd * self.stages * t.stage_bytes / SM_SMEM_BYTES
        sums = np.where(t.split > 1, rates.split + t.area * 4 * (t.split - 1) / t.split / rates.send, 0)
        unready = rates.unready * (1 - np.minimum(1, self.stages / self.blocks / self.waves))
        start = rates.start - rates.idle * np.maximum(0, 1 - self.ctas / self._sms) + rates.cta * busiest
        again = AGAIN * self.memory_us * 1e3 * (-(-self._m // t.block_m) - 1)
        return (start + unready + loop + again + sums + t.area * 2 / rates.store) / 1e3

    def us(self, pdl: bool) -> Any:
        return self._us[int(pdl)]

    def find(self, name: str) -> int | None:
        """The number of the plan of that name (`Plan.name`)."""
        strip_and_split, _, stages = name.removesuffix(IN_PAIRS).partition(" stages ")
        numbers = self.table.numbers.get(strip_and_split, ())
        return next((i for i in numbers if self.stages[i] == int(stages) and not self._same[i]), None)

    def plan(self, i: int) -> Plan:
        """The plan of the first problem with variant number i."""
        variant, pdl = self.table.variants[i], self._config.pdl
        rates = OVERLAPPING if pdl else ALONE
        us, start_us, end_us = (
            self.us(pdl)[0, i].item(),
            rates.start / 1e3,
            self.table.area[i].item() * 2 / rates.store / 1e3,
        )
        block_ns = (us - start_us - end_us) * 1e3 / self.blocks[i].item()
        cost = Cost(us, start_us, self.waves[0, i].item(), block_ns, 0.0, self.memory_us[0, 0].item(), 0.0, end_us)
        ctas, stages = int(self.ctas[0, i]), int(self.stages[i])
        return Plan(self._problem, variant.strip, ctas, 1, 100, pdl, cost, stages, variant.split)


def takes(problems: Problems, device: Device, config: Config) -> bool:
    """Whether the kernel for few rows multiplies such problems. It spreads over all SMs, as fast as it can."""
    problem, few = problems.like, bool((problems.m <= MOST_ROWS).all())
    dense = problem.kind == Kind.DENSE and not problem.column_scales and few and problem.k > 0
    return dense and config.num_sms in (None, device.num_sms) and config.tc_util == 100
