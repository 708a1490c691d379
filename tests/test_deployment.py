"""The closed set of kernels: whatever is asked for, the planner chooses from it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import deep_gemm
from deep_gemm.config import Config
from deep_gemm.decode import strips
from deep_gemm.deployment import (
    KINDS,
    Kernel,
    Layer,
    kernel_named,
    kernels_for,
    kernels_of_records,
)
from deep_gemm.errors import InvalidInputError
from deep_gemm.heuristics import choices, choose, kernels, spare_tiles, tiles
from deep_gemm.plan import Strip, Tile
from deep_gemm.problem import Kind, Problem, Problems
from deep_gemm.recorded import Record
from deep_gemm.runtime.device import H200, MODELS, Device

DEEPSEEK = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
OF_KIND = {
    Kind.DENSE: "dense", Kind.CONTIGUOUS: "contiguous", Kind.ENDS: "psum", Kind.MASKED: "masked",
    Kind.K_GROUPED: "weight_gradients", Kind.K_ENDS: "weight_gradients",
}  # fmt: skip


def tiles_of(found: tuple[Kernel, ...]) -> set[Tile | Strip]:
    return {kernel.tile for kernel in found if kernel.tile}


def random_problem(rng: random.Random, kind: Kind, layer: tuple[int, int] | None = None) -> Problem:
    n, k = layer or (rng.choice(DEEPSEEK) if rng.random() < 0.3 else (8 * size(rng, 4096), 16 * size(rng, 1800)))
    m = rng.randint(1, 160) if rng.random() < 0.4 else size(rng, 40000)
    groups = 1 if kind == Kind.DENSE else rng.choice([1, 2, 7, 8, 32, 128, 256])
    columns = kind in (Kind.K_GROUPED, Kind.K_ENDS) or (kind == Kind.DENSE and layer is None and rng.random() < 0.1)
    hint = rng.randint(0, m) if kind == Kind.MASKED or (kind == Kind.ENDS and rng.random() < 0.5) else None
    alignment = rng.choice([64, 128, 192, 256, 320, 384]) if kind == Kind.CONTIGUOUS else 1
    return Problem(m, n, k, kind, groups, hint, alignment, columns)


def size(rng: random.Random, most: int) -> int:
    """As likely small as large."""
    return int(most ** rng.random())


def random_config(rng: random.Random, device: Device) -> Config:
    return Config(
        num_sms=rng.choice([None, None, None, rng.randint(1, device.num_sms - 1)]),
        tc_util=rng.choice([100, 100, 100, rng.randint(1, 99)]),
        pdl=rng.random() < 0.5,
        batch_invariant=rng.random() < 0.3,
    )


def test_how_many_there_are():
    every = kernels_for()
    assert len(every) == 44
    assert tiles_of(every) == {*kernels(), *kernels(True)}
    assert [kernel.name for kernel in every if not kernel.tile] == ["layout", "quantize", "describe"]
    assert len({kernel.name for kernel in every}) == len({kernel.source() for kernel in every}) == 44
    assert deep_gemm.kernels_for is kernels_for


@pytest.mark.parametrize("kind", Kind)
def test_closure(kind: Kind):
    """What is chosen for any problem, on any GPU, whatever is set, is in the set of that kind."""
    rng = random.Random(kind)
    closed = {name: tiles_of(kernels_for(kinds=[name], gpus=MODELS.values())) for name in KINDS}
    everything = tiles_of(kernels_for())
    met: set[Tile | Strip] = set()
    for _ in range(1500):
        device = rng.choice(list(MODELS.values()))
        problem = random_problem(rng, kind)
        chosen = choose(problem, device, random_config(rng, device)).tile
        name = "weight_gradients" if problem.column_scales else OF_KIND[kind]
        assert chosen in closed[name], (problem, device)
        assert chosen in everything
        met.add(chosen)
    assert len(met) > 3


@pytest.mark.parametrize("name", ["dense", "contiguous", "masked"])
def test_closure_of_tiles_that_are_multiples(name: str):
    """The spare ones are taken where none of the others is left, and only there."""
    rng = random.Random(0)
    (kind,) = [kind for kind, of in OF_KIND.items() if of == name]
    spare = 0
    for block_m, block_n in [(1, 112), (64, 112), (64, 176), (128, 144), (64, 224), (192, 80), (192, 112), (1, 16)]:
        for alignment in (64, 128, 192, 384):
            closed = tiles_of(kernels_for(kinds=[name], block_size_multiple_of=(block_m, block_n), alignment=alignment))
            spare += bool(closed & {*spare_tiles()})
            assert not (closed & {*spare_tiles()} and closed & {*tiles()})
            for _ in range(20):
                problem = replace(random_problem(rng, kind), column_scales=False)
                problem = replace(problem, alignment=alignment) if kind == Kind.CONTIGUOUS else problem
                if closed:
                    assert choose(problem, H200, Config(block_m=block_m, block_n=block_n)).tile in closed
                elif kind == Kind.CONTIGUOUS:
                    with pytest.raises(InvalidInputError, match=r"^no tile is left"):
                        choose(problem, H200, Config(block_m=block_m, block_n=block_n))
    assert spare


def narrowed() -> Iterator[tuple[dict[str, Any], Any]]:
    """Arguments, and how a problem of that deployment is drawn."""
    for n, k in ((2112, 7168), (7168, 16384), (576, 7168), (7168, 256), (24, 400)):
        for first, last in ((1, 16384), (1, 64), (100, 300), (4096, 4096)):
            layer = Layer("dense", n, k, ms=(first, last))
            yield {"layers": [layer]}, lambda rng, n=n, k=k, a=first, b=last: Problem(rng.randint(a, b), n, k)
    for groups, alignment in ((8, 128), (256, 64), (3, 192)):
        layer = Layer("contiguous", 4096, 7168, groups, (1, 40000))
        yield (
            {"layers": [layer], "alignment": alignment},
            lambda rng, groups=groups, alignment=alignment: Problem(
                size(rng, 40000), 4096, 7168, Kind.CONTIGUOUS, groups, alignment=alignment
            ),
        )
    for groups, max_m, last in ((32, 4096, 4096), (9, 100, 100), (128, 256, 20)):
        layer = Layer("masked", 7168, 2048, groups, (1, last), max_m)
        yield (
            {"layers": [layer]},
            lambda rng, groups=groups, max_m=max_m, last=last: Problem(
                max_m, 7168, 2048, Kind.MASKED, groups, rng.randint(1, last)
            ),
        )


@pytest.mark.parametrize("num_sms, tc_util", [(None, 100), (70, 100), (None, 60)])
def test_closure_of_what_is_narrowed(num_sms: int | None, tc_util: int):
    """Of layers with ranges of rows: all that is chosen is listed, on both GPUs; and little else."""
    rng, fewer = random.Random(1), 0
    for arguments, draw in narrowed():
        found = kernels_for(num_sms=num_sms, tc_util=tc_util, **arguments)
        assert "layout" in [kernel.name for kernel in found] and "describe" not in [kernel.name for kernel in found]
        for _ in range(60):
            config = Config(num_sms, tc_util, pdl=rng.random() < 0.5, batch_invariant=rng.random() < 0.5)
            device = MODELS[rng.choice(["h100", "h200"])]
            assert choose(draw(rng), device, config).tile in tiles_of(found)
        fewer += len(found) < 21
    assert fewer > 20


def test_what_is_narrowed_has_nothing_else():
    """Each kernel of one layer is chosen for some M, on some GPU, with some setting."""
    met: set[Tile | Strip] = set()
    for m in range(1, 400):
        for device in (MODELS["h100"], H200):
            for pdl in (False, True):
                for invariant in (False, True):
                    met.add(choose(Problem(m, 4096, 7168), device, Config(pdl=pdl, batch_invariant=invariant)).tile)
    assert tiles_of(kernels_for([Layer("dense", 4096, 7168, ms=(1, 399))])) == met


def test_pairs_are_of_all_kinds_unless_some_are_named():
    pair = (4096, 7168)
    assert kernels_for([pair], kinds=["dense"], ms=(1, 64)) == kernels_for([Layer("dense", *pair, ms=(1, 64))])
    assert kernels_for([pair], kinds=["dense"]) == kernels_for([Layer("dense", *pair)])
    assert tiles_of(kernels_for([pair])) > {*tiles(True)}
    assert tiles_of(kernels_for([pair], kinds=["masked"])) == {*tiles()}  # of any number of groups
    assert [kernel.name for kernel in kernels_for([])] == ["layout", "quantize"]


@pytest.mark.parametrize(
    "arguments, missing",
    [
        ({"kinds": ["masked", "contiguous", "psum"]}, {*strips(), *tiles(True)}),
        ({"kinds": ["dense"], "ms": (129, 4096)}, {*strips(), *tiles(True)}),
        ({"num_sms": 131}, {*strips()}),
        ({"num_sms": 1}, {*strips(), *(tile for tile in tiles() if tile.cluster > 1)}),
        ({"tc_util": 99}, {*strips()}),
        (
            {"kinds": ["contiguous"], "alignment": 64},
            {*strips(), *tiles(True), *(t for t in tiles() if t.block_m > 64)},
        ),
    ],
    ids=str,
)
def test_parts_of_the_closed_set(arguments: dict[str, Any], missing: set[Tile | Strip]):
    assert tiles_of(kernels_for()) - tiles_of(kernels_for(**arguments)) == missing


def test_gpus_go_by_their_names():
    layer = [Layer("dense", 4096, 7168, ms=(1, 400))]
    for name, model in MODELS.items():
        assert (
            kernels_for(layer, gpus=[name]) == kernels_for(layer, gpus=[model.name]) == kernels_for(layer, gpus=[model])
        )
    assert kernels_for(layer, gpus=["h20"]) != kernels_for(layer, gpus=["h100"]) != kernels_for(layer, gpus=["h200"])


def test_ranges_that_are_too_long_to_go_through():
    """Get all that is legal."""
    large = Layer("masked", 4096, 7168, 8, (1, 2**30), 2**30)
    assert tiles_of(kernels_for([large])) == {*tiles()}
    assert len(kernels_for([Layer("dense", 4096, 7168, ms=(1, 2**31 - 1))])) == len(kernels_for(kinds=["dense"]))


def test_all_sms_are_as_good_as_none_named():
    assert kernels_for(num_sms=132) == kernels_for()
    assert kernels_for([(4096, 7168)], num_sms=78, gpus=[MODELS["h20"]]) == kernels_for(
        [(4096, 7168)], gpus=[MODELS["h20"]]
    )


@pytest.mark.parametrize("seed", range(3))
def test_many_problems_are_planned_as_each_alone(seed: int):
    rng = random.Random(seed)
    for kind in Kind:
        for _ in range(12):
            like, device = random_problem(rng, kind), rng.choice(list(MODELS.values()))
            config, few = random_config(rng, device), rng.random() < 0.5
            counts = np.array(rng.sample(range(1, 129) if few else range(129, 5000), 40))
            together = choices(Problems(like, counts), device, config)
            for pdl, many in zip((False, True), together, strict=True):
                for count, got in zip(counts.tolist(), many, strict=True):
                    one = replace(like, m=count) if like.expected_m is None else replace(like, expected_m=count)
                    assert got == choose(one, device, replace(config, pdl=pdl)).tile, (one, config)


def test_kernels_of_records():
    problem = Problem(100, 2112, 7168)
    found = kernels_of_records([Record(problem, H200, Config())])
    many = [Record(replace(problem, m=m), H200, Config()) for m in range(1, 400)]
    assert kernels_of_records(many) == kernels_for([Layer("dense", 2112, 7168, ms=(1, 399))], gpus=["h200"])
    want = {
        choose(problem, H200, Config(pdl=pdl, batch_invariant=invariant)).tile
        for pdl in (False, True)
        for invariant in (False, True)
    }
    assert tiles_of(found) == want and len(found) == len(want) + 2
    along_k = Problem(2048, 768, 4096 * 8, Kind.K_GROUPED, 8, column_scales=True)
    assert [kernel.name for kernel in kernels_of_records([Record(along_k, H200, Config())])][-3:] == [
        "layout", "quantize", "describe",
    ]  # fmt: skip
    assert [kernel.name for kernel in kernels_of_records([])] == ["layout", "quantize"]


def test_kernels_of_debug_mode():
    """Have names and texts of their own, and one more of them reports."""
    release, debug = kernels_for(), kernels_for(debug=True)
    assert [kernel.name for kernel in debug if not kernel.tile] == ["layout", "quantize", "describe", "report"]
    assert all(kernel.name.endswith(" debug") for kernel in debug if kernel.tile)
    assert not {kernel.source() for kernel in release if kernel.tile} & {kernel.source() for kernel in debug}


def test_kernels_go_by_their_names():
    for debug in (False, True):
        for kernel in kernels_for(debug=debug):
            assert kernel_named(kernel.name) == kernel or not kernel.tile
            assert kernel.source().label == kernel.name
    assert kernel_named("64x176").tile in spare_tiles()
    with pytest.raises(InvalidInputError) as caught:
        kernel_named("64x176 swapped")
    assert str(caught.value) == (
        "'64x176 swapped' is no kernel, expected one such as 64x32, 64x48, 64x64: see deep-gemm compile --list"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"kinds": ["sparse"]},
            "got the kind 'sparse', expected some of dense, contiguous, psum, masked, weight_gradients",
        ),
        ({"layers": [Layer("fp4", 8, 16)]}, "got the kind 'fp4', expected some of dense, contiguous, psum, masked, "),
        ({"ms": (0, 8)}, "ms is (0, 8), expected the least and the most number of rows, 1 or more"),
        ({"ms": (8, 7)}, "ms is (8, 7), expected the least and the most number of rows, 1 or more"),
        ({"layers": [Layer("dense", 8, 16, ms=(1, 2.5))]}, "ms is (1, 2.5), expected the least and the most number"),  # type: ignore[arg-type]
        ({"layers": [(12, 7168)]}, "N is 12, expected a multiple of 8"),
        ({"layers": [Layer("masked", 8, 16, 0)]}, "groups is 0, expected a number of 1 or more, or None for any"),
        ({"layers": [Layer("masked", 8, 16, 1, max_m=-1)]}, "max_m is -1, expected a number of 1 or more, or None"),
        (
            {"num_sms": 133},
            "num_sms is 133, expected 1 to 132, the SMs of NVIDIA H100, or None for all",
        ),
        ({"layers": [Layer("dense", 8, 16, ms=(1, 2**31))]}, "ms is (1, 2147483648), expected the least and the most"),
        ({"layers": [Layer("masked", 8, 16, 1, max_m=2**31)]}, "M, N, K are 2147483648, 8, 16, expected less than"),
        ({"layers": [Layer("dense", 0, 16)]}, "N, K are 0, 16, expected whole numbers of 1 or more"),
        ({"layers": [(4096, 7168, 1)]}, "got (4096, 7168, 1) among the layers, expected pairs (N, K), or Layers"),
        ({"layers": (4096, 7168)}, "got 4096 among the layers, expected pairs (N, K), or Layers"),
        ({"layers": [("4096", 7168)]}, "got ('4096', 7168) among the layers, expected pairs (N, K), or Layers"),
        ({"ms": 5}, "ms is 5, expected the least and the most number of rows"),
        ({"tc_util": 0}, "tc_util is 0, expected a whole number of percent, 1 to 100"),
        ({"alignment": 63}, "alignment is 63, expected a multiple of 64 from 64 to 65536"),
        ({"block_size_multiple_of": 0}, "the block size is to be a multiple of 0, expected divisors of 64, 128 or 192"),
        ({"block_size_multiple_of": 7}, "the block size is to be a multiple of 7, expected divisors of 64, 128 or 192"),
        ({"gpus": ["NVIDIA A100"]}, "gpus is ['NVIDIA A100'], expected a list of Devices, or of h200, h100, "),
        ({"gpus": "h100"}, "gpus is 'h100', expected a list of Devices"),
        ({"gpus": []}, "gpus is [], expected a list of Devices"),
        ({"num_sms": 100, "gpus": [MODELS["h20"]]}, "num_sms is 100, expected 1 to 78, the SMs of NVIDIA H20"),
    ],
    ids=str,
)
def test_what_cannot_be_meant(arguments: dict[str, Any], message: str):
    with pytest.raises(InvalidInputError) as caught:
        kernels_for(**arguments)
    assert str(caught.value).startswith(message)
    assert kernels_for(kinds=["dense"])  # and the next good call works
