"""Layers: values beside float layers, both states of their weights and the ways between, checkpoints, and training."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import deep_gemm
from deep_gemm import functional, nn
from deep_gemm.errors import InvalidInputError
from deep_gemm.quantize import per_block_cast_to_fp8

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)
E4M3 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().cpu().contiguous().view(torch.uint8)


def same(x: torch.nn.Module, y: torch.nn.Module) -> bool:
    one, other = x.state_dict(), y.state_dict()
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(bits(one[name]), bits(other[name])) for name in one
    )


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


# Linear


@on_each_device
@pytest.mark.parametrize("dtype", functional.FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_beside_a_float_layer(device: str, dtype: torch.dtype, bias: bool) -> None:
    linear = torch.nn.Linear(70, 33, bias=bias, device=device, dtype=dtype)
    x = torch.randn(4, 50, 70, device=device, dtype=dtype)
    want = linear(x)
    master, frozen = nn.Linear.from_linear(linear, keep_master=True), nn.Linear.from_linear(linear)
    for layer in (master, frozen):
        y = layer(x)
        assert y.shape == want.shape and y.dtype == dtype
        assert relative(y, want) < 0.045
    assert torch.equal(master(x), frozen(x))
    assert torch.equal(frozen(x), functional.linear(x, per_block_cast_to_fp8(linear.weight), linear.bias))
    assert (
        master.weight is linear.weight and not frozen.weight.requires_grad and not frozen.weight_scale_inv.requires_grad
    )


def test_a_new_layer_is_as_pytorch_s() -> None:
    layer, linear = nn.Linear(300, 200), torch.nn.Linear(300, 200)
    assert not layer.is_frozen and layer.weight.requires_grad and layer.weight.shape == linear.weight.shape
    bound = 1 / math.sqrt(300)
    for x in (layer.weight, layer.bias):
        assert 0.9 * bound < float(x.detach().abs().max()) <= bound
    assert torch.equal(nn.Linear(0, 4)(torch.ones(3, 0)), torch.zeros(3, 4)) and nn.Linear(4, 0)(
        torch.ones(3, 4)
    ).shape == (3, 0)
    assert repr(layer) == "Linear(300, 200, bias=True, weight=float32)"
    assert repr(nn.Linear(3, 4, bias=False, dtype=torch.bfloat16).quantize_()) == "Linear(3, 4, bias=False, weight=FP8)"
    with pytest.raises(InvalidInputError, match=r"the layer is frozen in FP8, expected a master weight"):
        layer.quantize_().reset_parameters()
    with pytest.raises(InvalidInputError, match=r"dtype is torch\.float64, expected BF16, FP16 or FP32"):
        nn.Linear(3, 4, dtype=torch.float64)


@on_each_device
def test_in_eval_master_weights_are_quantised_in_every_call(device: str) -> None:
    layer, x = nn.Linear(64, 32, device=device).eval(), torch.randn(8, 64, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, fused=True)  # which does not raise _version

    def check() -> None:
        with torch.no_grad():
            assert torch.equal(layer(x), functional.linear(x, layer.weight.detach(), layer.bias))

    check()
    layer(x).sum().backward()
    optimizer.step()
    check()
    layer.weight.data += 1
    check()
    with torch.inference_mode():
        layer.weight.mul_(2)
    check()


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layers_under_autocast(device: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(64, 5000, device=device).eval()  # more rows than are quantised at once
    experts = nn.GroupedExperts(64, 70, 4, 2, device=device).eval()
    x = torch.randn(5, 64, device=device)
    with torch.no_grad(), torch.autocast(device, dtype):
        for layer, calls in ((linear, [()]), (experts, [("contiguous",), ("masked",)])):
            frozen = copy.deepcopy(layer).quantize_()
            for args in calls:
                y = layer(x, *args)
                assert y.dtype == dtype and torch.equal(frozen(x, *args), y)
    assert same(frozen, copy.deepcopy(experts).quantize_())
    values, scales = per_block_cast_to_fp8(linear.weight)
    linear.quantize_()
    assert torch.equal(bits(linear.weight), bits(values)) and torch.equal(linear.weight_scale_inv, scales)


def test_meta_layers_are_called() -> None:
    x = torch.ones(5, 64, device="meta")
    for layer in (nn.Linear(64, 32, device="meta"), nn.GroupedExperts(64, 64, 4, 2, device="meta")):
        assert layer(x).shape[0] == layer.quantize_()(x).shape[0] == 5


@pytest.fixture
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def test_the_default_dtype_is_that_of_new_layers_only(float64: None) -> None:
    linear = torch.nn.Linear(64, 32, dtype=torch.float32)
    assert nn.Linear.from_linear(linear, keep_master=True).weight is linear.weight
    assert nn.Linear.from_checkpoint(linear.state_dict()).is_frozen
    experts = nn.GroupedExperts(64, 64, 2, 1, dtype=torch.float32)
    assert nn.GroupedExperts.from_checkpoint(experts.state_dict(), "", 1).is_frozen


@on_each_device
@pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "double", "to", "type", "share", "empty"])
def test_conversions_leave_the_bits_of_frozen_weights(device: str, convert: str) -> None:
    layer = nn.Linear(300, 200, device=device).quantize_()
    before = [bits(layer.weight), bits(layer.weight_scale_inv)]
    ways: dict[str, Callable[[], Any]] = {
        "to": lambda: layer.to("cpu", torch.float16).to(device),
        "type": lambda: layer.type(torch.float16),
        "share": layer.cpu().share_memory if convert == "share" else lambda: None,
        "empty": lambda: layer.to_empty(device=device),
    }
    ways.get(convert, lambda: getattr(layer, convert)())()
    dtype = {"bfloat16": torch.bfloat16, "float": torch.float32, "double": torch.float64, "share": torch.float32}
    assert layer.weight.dtype == E4M3 and layer.weight_scale_inv.dtype == torch.float32
    assert not layer.weight.requires_grad and isinstance(layer.weight, torch.nn.Parameter)
    assert layer.bias.dtype == (torch.float32 if convert == "empty" else dtype.get(convert, torch.float16))
    if convert == "share":
        assert layer.weight.is_shared() and layer.weight_scale_inv.is_shared()
    if convert != "empty":
        assert all(map(torch.equal, before, [bits(layer.weight), bits(layer.weight_scale_inv)]))


@on_each_device
def test_masters_are_converted(device: str) -> None:
    layer = nn.Linear(30, 20, device=device).half()
    assert layer.weight.dtype == layer.bias.dtype == torch.float16
    assert layer(torch.ones(1, 30, device=device)).dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_state_dicts(assign: bool, meta: bool) -> None:
    master, frozen = nn.Linear(300, 200), nn.Linear(300, 200).quantize_()
    assert list(frozen.state_dict()) == ["weight", "weight_scale_inv", "bias"]
    assert frozen.state_dict()["weight"].shape == (200, 300)
    device = "meta" if meta and assign else "cpu"

    def loaded(source: torch.nn.Module, into_frozen: bool) -> nn.Linear:
        layer = nn.Linear(300, 200, device=device)
        layer = layer.quantize_() if into_frozen else layer
        layer.load_state_dict(source.state_dict(), assign=assign)
        return layer

    for into_frozen in (False, True):
        assert same(loaded(frozen, into_frozen), frozen)
    assert same(loaded(master, False), master)
    assert same(loaded(master, True), copy.deepcopy(master).quantize_())
    assert same(loaded(torch.nn.Linear(300, 200), False), loaded(torch.nn.Linear(300, 200), False)) is False
    x = torch.randn(5, 300)
    assert torch.equal(loaded(frozen, False)(x), frozen(x))


def test_what_is_loaded_is_settled() -> None:
    frozen = nn.Linear(300, 200, bias=False).quantize_()
    memory = torch.empty(200 * 300 + 1, dtype=torch.uint8)
    odd = memory[1:].view(200, 300).copy_(frozen.weight.view(torch.uint8)).view(E4M3)  # as safetensors may map it
    layer = nn.Linear(300, 200, bias=False)
    layer.load_state_dict({"weight": odd, "weight_scale_inv": frozen.weight_scale_inv.double()}, assign=True)
    assert layer.weight.data_ptr() % 16 == 0 and layer.weight_scale_inv.dtype == torch.float32
    assert torch.equal(bits(layer.weight), bits(frozen.weight))
    weight = layer.weight
    layer.load_state_dict(frozen.state_dict())
    assert layer.weight is weight  # optimizers and others hold on to it
    strided = frozen.weight.detach().mT.contiguous().mT
    layer.load_state_dict({**frozen.state_dict(), "weight": strided}, assign=True)
    assert layer.weight.is_contiguous() and torch.equal(bits(layer.weight), bits(frozen.weight))


def test_state_dicts_that_do_not_fit() -> None:
    good = nn.Linear(300, 200).quantize_().state_dict()
    scales = good["weight_scale_inv"]
    for change, message in (
        (
            {"weight_scale_inv": None},
            r"weight is E4M3, but weight_scale_inv is missing, expected FP32 of shape \(2, 3\)",
        ),
        (
            {"weight_scale_inv": scales[:1]},
            r"weight_scale_inv has shape \(1, 3\), expected \(2, 3\): a scale per 128x128",
        ),
        ({"weight_scale_inv": scales.int()}, r"weight_scale_inv is torch\.int32, expected FP32"),
        ({"weight": good["weight"][:100]}, r"size mismatch for weight"),
        ({"weight": None}, r"Missing key\(s\) in state_dict: \"weight\""),
        ({"other": scales}, r"Unexpected key\(s\) in state_dict: \"other\""),
    ):
        state = {name: x for name, x in {**good, **change}.items() if x is not None}
        layer = nn.Linear(300, 200)
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state)
        assert layer.is_frozen == ("other" in change)


def test_layers_are_saved_and_copied() -> None:
    x = torch.randn(5, 70)
    for layer in (nn.Linear(70, 33).eval(), nn.Linear(70, 33).quantize_()):
        with torch.no_grad():
            want = layer(x)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for other in (torch.load(file, weights_only=False), copy.deepcopy(layer)):
            assert same(other, layer) and torch.equal(other(x), want)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        fresh = nn.Linear(70, 33)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert same(fresh, layer)


# Checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with an index and two files, as DeepSeek's; one layer FP8, one BF16, with a bias."""
    values, scales = per_block_cast_to_fp8(torch.randn(200, 300))
    parts = [
        {"model.a.weight": values, "odd": torch.zeros(1, dtype=torch.uint8)},
        {
            "model.a.weight_scale_inv": scales,
            "model.b.weight": torch.randn(64, 48).bfloat16(),
            "model.b.bias": torch.randn(64),
        },
    ]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for part, name in zip(parts, names, strict=True):
        save_file(part, tmp_path / name)
    index = {"weight_map": {key: name for part, name in zip(parts, names, strict=True) for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path, {**parts[0], **parts[1]}


def test_linear_from_checkpoints(checkpoint: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, state = checkpoint
    single = tmp_path / "single"
    single.mkdir()
    save_file(state, single / "model.safetensors")
    for source in (
        folder,
        str(folder),
        folder / "model.safetensors.index.json",
        single,
        single / "model.safetensors",
        state,
    ):
        a = nn.Linear.from_checkpoint(source, "model.a")
        assert a.is_frozen and a.bias is None and (a.in_features, a.out_features) == (300, 200)
        assert torch.equal(bits(a.weight), bits(state["model.a.weight"]))
        assert torch.equal(a.weight_scale_inv, state["model.a.weight_scale_inv"])
        assert a(torch.ones(2, 300)).shape == (2, 200)
        b = nn.Linear.from_checkpoint(source, "model.b.", keep_master=True)
        assert torch.equal(b.weight, state["model.b.weight"]) and torch.equal(b.bias, state["model.b.bias"])
        assert same(nn.Linear.from_checkpoint(source, "model.b"), copy.deepcopy(b).quantize_())
    assert a.weight.data_ptr() != state["model.a.weight"].data_ptr()


def test_only_what_is_asked_for_is_read(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors

    read: list[str] = []

    class Watched:
        def __init__(self, path: Path, framework: str) -> None:
            self.file = original(path, framework=framework)

        def keys(self) -> Any:
            return self.file.keys()

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    original = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Watched)
    nn.Linear.from_checkpoint(checkpoint[0], "model.a")
    assert sorted(read) == ["model.a.weight", "model.a.weight_scale_inv"]


def test_checkpoints_that_do_not_fit(checkpoint: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, state = checkpoint
    read = nn.Linear.from_checkpoint
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.index.json"
    broken.write_text("{}")
    outside, lacks = tmp_path / "outside.index.json", tmp_path / "lacks.index.json"
    outside.write_text(json.dumps({"weight_map": {"weight": "../x.safetensors"}}))
    lacks.write_text(json.dumps({"weight_map": {"weight": "x.safetensors"}}))
    save_file({"other": torch.ones(1)}, tmp_path / "x.safetensors")
    for args, message in (
        ((folder, "model.c"), r"has no model\.c\.weight, expected it below the prefix: there is .*model\.a\.weight"),
        ((state, "elsewhere"), r"the state dict has no elsewhere\.weight"),
        ((folder, "model.a", True), r"has an FP8 weight, expected a float one: pass keep_master=False"),
        (
            ({"weight": torch.ones(3)},),
            r"weight has shape \(3,\) and is torch\.float32, expected \[out_features, in_features\]",
        ),
        (({"weight": state["model.a.weight"]},), r"the state dict has no weight_scale_inv"),
        (({"weight": torch.ones(3, 3).double()},), r"dtype is torch\.float64, expected BF16, FP16 or FP32"),
        (
            ({"weight": state["model.a.weight"], "weight_scale_inv": torch.ones(2, 2)},),
            r"weight_scale_inv has shape \(2, 2\), expected \(2, 3\): a scale per 128x128",
        ),
        ((empty,), r"model\.safetensors cannot be read, expected a safetensors file, or a folder with"),
        ((tmp_path / "nothing",), r"nothing cannot be read, expected a safetensors file"),
        ((outside,), r"outside\.index\.json names '\.\./x\.safetensors', expected names of files beside it"),
        ((lacks,), r"x\.safetensors gives no weight, expected what the index says"),
        (({"weight": torch.ones(3, 3), "bias": torch.ones(4)},), r"bias has shape \(4,\) and is .*, expected \[3\]"),
        (({"weight": torch.ones(3, 3), "bias": torch.ones(3).int()},), r"bias has shape \(3,\) and is torch\.int32"),
        ((broken,), r"broken\.index\.json has no weight_map, expected an index of safetensors"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            read(*args)


# Models


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32, bias=False))
        self.shared = self.inner[0]
        self.attention = torch.nn.MultiheadAttention(32, 2, batch_first=True)
        self.block = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.head = torch.nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.inner(x) + self.inner[2](self.shared(x))
        return self.head(self.block(self.attention(x, x, x)[0]))


def test_replacing_linear_layers() -> None:
    model = Model().eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        want = model(x)
    replaced = nn.replace_linear(model)
    assert replaced is model and model.inner[0] is model.shared
    kinds = {name: type(module) for name, module in model.named_modules() if "inner." in name or name == "head"}
    assert kinds == {"inner.0": nn.Linear, "inner.1": torch.nn.ReLU, "inner.2": nn.Linear, "head": nn.Linear}
    assert type(model.block.linear1) is torch.nn.Linear and not model.inner[0].training
    with torch.no_grad():
        assert 0 < relative(model(x), want) < 0.1
    for skip in ({"head", "inner"}, lambda name: name in ("head", "inner")):
        model = nn.replace_linear(Model(), keep_master=True, skip=skip)
        assert type(model.head) is type(model.inner[2]) is torch.nn.Linear and type(model.shared) is nn.Linear
        assert not model.shared.is_frozen
    with pytest.raises(InvalidInputError, match=r"skip is the str 'head', expected names, .*: pass \['head'\]"):
        nn.replace_linear(Model(), skip="head")
    model = Model()
    model.head.register_forward_hook(lambda *args: None)
    model.inner[2].register_full_backward_hook(lambda *args: None)
    nn.replace_linear(model)
    assert type(model.head) is type(model.inner[2]) is torch.nn.Linear and type(model.shared) is nn.Linear
    single = torch.nn.Linear(3, 4)
    assert isinstance(nn.replace_linear(single), nn.Linear)
    attention = torch.nn.MultiheadAttention(32, 2)
    assert nn.replace_linear(attention) is attention and not any(isinstance(m, nn.Linear) for m in attention.modules())


def check_training(
    kind: str,
    models: list[torch.nn.Module],
    x: torch.Tensor,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    rate: float,
    record_property: Callable[[str, object], None],
) -> None:
    """Trains two models, the second in floats, with all data at once; the losses may differ by a fifth."""
    curves: list[list[float]] = []
    for model in models:
        optimizer = torch.optim.Adam(model.parameters(), rate)
        curves.append([])
        for _ in range(120):
            optimizer.zero_grad()
            loss = loss_of(model(x))
            loss.backward()
            optimizer.step()
            curves[-1].append(float(loss.detach()))
    losses, wanted = curves
    figures = {"first": losses[0], "last": losses[-1], "first_float": wanted[0], "last_float": wanted[-1]}
    for name, figure in figures.items():
        record_property(name, figure)
    print(f"\n{x.device}, {kind}: {figures}")
    assert losses[-1] < 0.2 * losses[0] and abs(losses[0] - wanted[0]) < 0.02 * wanted[0]
    assert all(abs(loss - want) < 0.2 * want + 0.002 for loss, want in zip(losses, wanted, strict=True))


@on_each_device
def test_linear_layers_are_trained(device: str, record_property: Callable[[str, object], None]) -> None:
    x = torch.randn(1024, 20)
    target = torch.sin(x @ torch.randn(20, 3) / 2) + 0.3 * torch.randn(1024, 3)
    x, target = x.to(device), target.to(device)
    float_model = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3)).to(device)
    model = nn.replace_linear(copy.deepcopy(float_model), keep_master=True)
    loss_of = partial(torch.nn.functional.mse_loss, target=target)
    check_training("regression", [model, float_model], x, loss_of, 1e-2, record_property)


@on_each_device
def test_linear_layers_are_compiled(device: str) -> None:
    x = torch.randn(24, 70, device=device)
    for layer in (nn.Linear(70, 33, device=device).eval(), nn.Linear(70, 33, device=device).quantize_()):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
            if not layer.is_frozen:
                layer.weight.mul_(2)
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.gpu
def test_linear_layers_are_captured() -> None:
    for layer in (nn.Linear(256, 128, device="cuda").eval(), nn.Linear(256, 128, device="cuda").quantize_()):
        x = torch.randn(32, 256, device="cuda")
        with torch.no_grad():
            layer(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
            if not layer.is_frozen:
                layer.weight.mul_(2)  # a graph sees the weight that there is
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, layer(x))


# Experts

OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {"scoring": "softmax"},
    "plain": {"scoring": "softmax", "renormalize": False, "scaling": 0.5},
    "deepseek": {"scoring": "sigmoid", "correction_bias": True, "n_group": 4, "topk_group": 2, "scaling": 2.5},
}
SIZES = {"whole": (128, 256, 8, 3), "odd": (70, 33, 8, 2)}


def experts_of(sizes: str, options: str, device: str = "cpu", **more: Any) -> nn.GroupedExperts:
    layer = nn.GroupedExperts(*SIZES[sizes], **OPTIONS[options], device=device, **more)
    if layer.gate.e_score_correction_bias is not None:
        layer.gate.e_score_correction_bias.normal_(0, 0.05)
    return layer


def one_by_one(layer: nn.GroupedExperts, x: torch.Tensor) -> torch.Tensor:
    """The same in floats, expert by expert, with the router's choices."""
    tokens = x.flatten(0, -2)
    state = layer.state_dict(keep_vars=True)
    experts, weights = layer.gate(tokens)
    result = torch.zeros_like(tokens)
    for i in range(layer.num_experts):
        gate, up, down = (state[f"experts.{i}.{part}_proj.weight"].to(x.dtype) for part in ("gate", "up", "down"))
        inner = torch.nn.functional.silu(tokens @ gate.T) * (tokens @ up.T)
        result = result + (inner @ down.T) * (weights * (experts == i)).sum(-1, keepdim=True).to(x.dtype)
    return result.view(x.shape)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_router_token_by_token(options: str) -> None:
    layer = experts_of("whole", options)
    router, given = layer.gate, OPTIONS[options]
    x = torch.randn(50, 128)
    experts, weights = router(x)
    for token, row in enumerate(x.double() @ router.weight.double().T):
        scores = (row.softmax(0) if given["scoring"] == "softmax" else row.sigmoid()).tolist()
        bias = [0.0] * 8 if router.e_score_correction_bias is None else router.e_score_correction_bias.tolist()
        chosen_by = [score + extra for score, extra in zip(scores, bias, strict=True)]
        if (groups := given.get("n_group", 1)) > 1:
            size = 8 // groups
            sums = [sum(sorted(chosen_by[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
            best = sorted(range(groups), key=sums.__getitem__)[-given["topk_group"] :]
            chosen_by = [c if i // size in best else -math.inf for i, c in enumerate(chosen_by)]
        want = sorted(range(8), key=chosen_by.__getitem__)[-3:]
        assert sorted(experts[token].tolist()) == sorted(want)
        total = sum(scores[i] for i in want) if given.get("renormalize", True) else 1.0
        for i, weight in zip(experts[token].tolist(), weights[token].tolist(), strict=True):
            assert weight == pytest.approx(scores[i] / total * given.get("scaling", 1.0), rel=1e-5)


def test_what_the_chosen_count_adds_up_to_one() -> None:
    router = experts_of("whole", "softmax").gate
    router.scoring = "sigmoid"
    with torch.no_grad():
        router.weight.fill_(-1)
        _, weights = router(torch.full((2, 128), 0.2))  # sigmoids of -26
        assert torch.allclose(weights.sum(-1), torch.ones(2), rtol=1e-5)
        _, weights = router(torch.full((2, 128), 100.0))  # sigmoids that are zero
    assert not weights.any()


@on_each_device
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
def test_experts_beside_floats(device: str, sizes: str, options: str) -> None:
    layer = experts_of(sizes, options, device)
    x = torch.randn(2, 40, layer.hidden, device=device, requires_grad=True)
    y, want = layer(x), one_by_one(layer, x)
    dy = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    assert len(inputs) == 4
    for got, truth in zip(
        (y, *torch.autograd.grad(y, inputs, dy)), (want, *torch.autograd.grad(want, inputs, dy)), strict=True
    ):
        assert got.shape == truth.shape and relative(got, truth) < 0.09  # two layers, one behind the other
        assert float(torch.nn.functional.cosine_similarity(got.detach().flatten(), truth.detach().flatten(), 0)) > 0.995


@on_each_device
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", functional.FLOATS, ids=str)
def test_layouts_and_states_agree(device: str, sizes: str, dtype: torch.dtype) -> None:
    layer = experts_of(sizes, "deepseek", device)
    x = torch.randn(3, 7, layer.hidden, device=device, dtype=dtype)
    want = layer(x).detach()
    assert want.dtype == dtype and want.shape == x.shape
    frozen = copy.deepcopy(layer).quantize_()
    assert frozen.is_frozen and frozen.gate.weight.requires_grad and not frozen.down_proj.requires_grad
    for each in (layer.eval(), frozen):
        with torch.no_grad():
            results = [each(x), each(x, "masked"), each(x, "masked", max_m=21), each(x, "masked", max_m=99)]
        if each.is_frozen:
            results.append(each(x).detach())
        for y in results:  # on a CPU the order of sums depends on the shape
            assert torch.equal(y, want) if device == "cuda" else relative(y, want) < 1e-3
    with torch.no_grad():
        token = x[1, 2]
        assert relative(layer(token), want[1, 2]) < 1e-3 and layer(token, "masked").shape == token.shape


@on_each_device
def test_what_has_no_room_is_nan(device: str) -> None:
    layer = experts_of("whole", "softmax", device).eval()
    x = torch.randn(30, layer.hidden, device=device)
    experts, _ = layer.gate(x)
    with torch.no_grad():
        want = layer(x)
        for max_m in (1, 5, 12, 30):
            full = [0] * layer.num_experts
            lost: list[bool] = []
            for row in experts.tolist():  # rooms are given to tokens in order
                lost.append(any(full[i] >= max_m for i in row))
                for i in row:
                    full[i] += 1
            y = layer(x, "masked", max_m=max_m)
            assert y.isnan().any(-1).tolist() == y.isnan().all(-1).tolist() == lost
            assert relative(y[~y.isnan()], want[~y.isnan()]) < 1e-3 if not all(lost) else max_m == 1
    assert any(lost) is False


@on_each_device
def test_no_tokens(device: str) -> None:
    layer = experts_of("whole", "softmax", device)
    x = torch.zeros(0, 5, 128, device=device)
    assert layer(x).shape == (0, 5, 128)
    with torch.no_grad():
        assert layer(x, "masked").shape == (0, 5, 128)


def test_the_alignment_is_anything() -> None:
    layer = experts_of("odd", "softmax")
    x = torch.randn(60, layer.hidden)
    want = layer(x).detach()
    try:
        for alignment in (64, 256):
            deep_gemm.set_mk_alignment_for_contiguous_layout(alignment)
            y = layer(x)
            assert relative(y, want) < 1e-3
            y.sum().backward()
            assert layer.down_proj.grad.isfinite().all()
    finally:
        deep_gemm.set_mk_alignment_for_contiguous_layout(128)


@pytest.mark.parametrize("sizes", SIZES)
def test_states_of_experts(sizes: str) -> None:
    layer = experts_of(sizes, "deepseek")
    frozen = copy.deepcopy(layer).quantize_()
    hidden, intermediate, count, _ = SIZES[sizes]
    state = frozen.state_dict()
    assert len(state) == 2 + 6 * count
    assert state["experts.7.up_proj.weight"].shape == (intermediate, hidden)
    assert state["experts.7.down_proj.weight"].shape == (hidden, intermediate)
    values, scales = per_block_cast_to_fp8(layer.state_dict()["experts.7.up_proj.weight"])
    assert torch.equal(bits(state["experts.7.up_proj.weight"]), bits(values))
    assert torch.equal(state["experts.7.up_proj.weight_scale_inv"], scales)
    for source, into_frozen, want in ((frozen, 0, frozen), (frozen, 1, frozen), (layer, 0, layer), (layer, 1, frozen)):
        for assign in (False, True):
            other = experts_of(sizes, "deepseek", "meta" if assign and not into_frozen else "cpu")
            other = other.quantize_() if into_frozen else other
            other.load_state_dict(source.state_dict(), assign=assign)
            assert same(other, want)
    x = torch.randn(5, hidden)
    assert torch.equal(other(x), frozen(x))
    for each in (other.gate_up_proj, other.down_proj):
        each.data.view(torch.uint8).fill_(0x7F)  # NaN, also where sizes are filled up
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other(x), frozen(x))
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=False), frozen)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        frozen.to(dtype)
        assert frozen.gate.weight.dtype == dtype and frozen.gate.e_score_correction_bias.dtype == torch.float32
        assert frozen.gate_up_proj.dtype == E4M3 and frozen.down_proj_scale_inv.dtype == torch.float32
    assert all(torch.equal(bits(state[name]), bits(frozen.state_dict()[name])) for name in state if "experts" in name)
    assert f"{hidden}, {intermediate}, num_experts=8" in repr(frozen) and "weight=FP8" in repr(frozen)


@pytest.mark.parametrize("sizes", SIZES)
def test_experts_from_checkpoints(sizes: str, tmp_path: Path) -> None:
    layer = experts_of(sizes, "deepseek")
    frozen = copy.deepcopy(layer).quantize_()
    hidden, top_k = SIZES[sizes][0], SIZES[sizes][3]
    options = {name: x for name, x in OPTIONS["deepseek"].items() if name != "correction_bias"}
    for each, keep_master, want in ((frozen, False, frozen), (layer, False, frozen), (layer, True, layer)):
        state = {f"model.layers.3.mlp.{name}": x for name, x in each.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
        got = nn.GroupedExperts.from_checkpoint(tmp_path, "model.layers.3.mlp", top_k, keep_master, **options)
        assert same(got, want)
        x = torch.randn(4, layer.hidden)
        with torch.no_grad():
            assert torch.equal(got(x), want(x))
    with pytest.raises(InvalidInputError, match=r"has FP8 weights, expected float ones: pass keep_master=False"):
        nn.GroupedExperts.from_checkpoint(frozen.state_dict(), "", top_k, keep_master=True, **options)
    state = frozen.state_dict()
    for change, message in (
        ({"experts.5.up_proj.weight": None}, r"has no experts\.5\.up_proj\.weight, expected it below the prefix"),
        (
            {"experts.5.up_proj.weight": torch.ones(3, 3)},
            r"experts\.5\.up_proj\.weight is torch\.float32 of shape \(3, 3\)",
        ),
        ({"experts.5.up_proj.weight_scale_inv": torch.ones(3, 9)}, r"weight_scale_inv has shape \(3, 9\), expected"),
        ({"gate.weight": torch.ones(3)}, r"gate\.weight has shape \(3,\) and is torch\.float32, expected \[any, "),
        ({"gate.weight": torch.ones(8, hidden).to(E4M3)}, r"gate\.weight has shape .* and is torch\.float8_e4m3fn"),
        ({"gate.e_score_correction_bias": torch.ones(7)}, r"correction_bias has shape \(7,\) .*, expected \[8\]"),
    ):
        broken = {name: x for name, x in {**state, **change}.items() if x is not None}
        with pytest.raises(InvalidInputError, match=message):
            nn.GroupedExperts.from_checkpoint(broken, "", top_k, **options)
        if not any("gate." in name for name in change):
            with pytest.raises(RuntimeError, match=r"experts\.5\.up_proj\.weight"):
                experts_of(sizes, "deepseek").load_state_dict(broken)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"shared\.weight\""):
        layer.load_state_dict({**layer.state_dict(), "shared.weight": torch.ones(1)})


def test_mixed_checkpoints(tmp_path: Path) -> None:
    layer = nn.GroupedExperts(64, 64, 2, 1)
    frozen = copy.deepcopy(layer).quantize_()
    mixed = {k: x for k, x in {**layer.state_dict(), **frozen.state_dict()}.items() if "experts.1" in k}
    mixed = {**layer.state_dict(), **mixed}
    assert same(nn.GroupedExperts.from_checkpoint(mixed, "", 1), frozen)
    with pytest.raises(
        InvalidInputError, match=r"experts\.1\.gate_proj\.weight is FP8, expected a float as the others"
    ):
        nn.GroupedExperts.from_checkpoint(mixed, "", 1, keep_master=True)
    del mixed["experts.1.down_proj.weight_scale_inv"]
    with pytest.raises(InvalidInputError, match=r"has no experts\.1\.down_proj\.weight_scale_inv"):
        nn.GroupedExperts.from_checkpoint(mixed, "", 1)


def test_experts_stay_as_they_were_where_loading_fails() -> None:
    x = torch.randn(6, 64)
    state = nn.GroupedExperts(64, 64, 2, 1).quantize_().state_dict()
    del state["experts.1.down_proj.weight_scale_inv"]
    for layer in (nn.GroupedExperts(64, 64, 2, 1), nn.GroupedExperts(64, 64, 2, 1).quantize_()):
        parameters = {name: (p, p.detach().clone()) for name, p in layer.named_parameters() if "gate." not in name}
        with pytest.raises(RuntimeError, match=r"experts\.1\.down_proj\.weight_scale_inv is missing"):
            layer.load_state_dict(state)
        now = {name: p for name, p in layer.named_parameters() if "gate." not in name}
        assert now.keys() == parameters.keys()
        for name, (p, before) in parameters.items():
            assert now[name] is p and torch.equal(bits(p), bits(before))
        assert layer(x).isfinite().all()


def test_experts_go_where_the_router_is() -> None:
    state = {name: x.to("meta") for name, x in nn.GroupedExperts(64, 64, 2, 1).state_dict().items()}
    state["experts.0.gate_proj.weight"] = torch.ones(64, 64)
    layer = nn.GroupedExperts.from_checkpoint(state, "", 1, keep_master=True)
    assert layer.gate.weight.is_meta and layer.gate_up_proj.is_meta and layer.down_proj.is_meta


@pytest.mark.parametrize("frozen", [False, True])
def test_experts_are_exported(frozen: bool) -> None:
    layer = nn.GroupedExperts(64, 64, 4, 2).eval()
    layer = layer.quantize_() if frozen else layer
    shapes = {"x": {0: torch.export.Dim("m", min=2, max=4096)}}
    x = torch.randn(30, 64)
    program = torch.export.export(layer, (torch.randn(9, 64),), dynamic_shapes=shapes)
    assert torch.equal(program.module()(x), layer(x))
    with torch.no_grad():
        shapes = {"x": {0: torch.export.Dim.AUTO}}
        program = torch.export.export(layer, (torch.randn(9, 64),), dynamic_shapes=shapes)
        assert torch.equal(program.module()(x), layer(x))


class FloatExperts(torch.nn.Module):
    def __init__(self, layer: nn.GroupedExperts) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return one_by_one(self.layer, x)


@on_each_device
def test_experts_are_trained(device: str, record_property: Callable[[str, object], None]) -> None:
    centres = torch.randn(12, 32)
    labels = torch.arange(192) % 12
    x = (centres[labels] + 2 * torch.randn(192, 32)).to(device)
    labels = (labels % 4).to(device)  # three clusters to a class
    layer = nn.GroupedExperts(32, 64, 4, 2, device=device)
    heads = [torch.nn.Linear(32, 4, device=device)]
    heads.append(copy.deepcopy(heads[0]))
    models = [torch.nn.Sequential(each, head) for each, head in zip((layer, FloatExperts(layer)), heads, strict=True)]
    loss_of = partial(torch.nn.functional.cross_entropy, target=labels)
    check_training("classification", models, x, loss_of, 1e-3, record_property)


@on_each_device
def test_experts_are_compiled(device: str) -> None:
    layer = experts_of("odd", "deepseek", device)
    frozen = copy.deepcopy(layer).quantize_()
    x = torch.randn(9, layer.hidden, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, compiled):
        y = call(x)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), list(layer.parameters()))))
    assert all(map(torch.equal, *results))
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for arguments in (("contiguous",), ("masked",), ("masked", 4)):
            got, want = compiled(x, *arguments), frozen(x, *arguments)
            assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True])
def test_experts_wait_for_nothing_and_are_captured(frozen: bool) -> None:
    layer = experts_of("whole", "deepseek", "cuda", dtype=torch.bfloat16).eval()
    layer = layer.quantize_() if frozen else layer
    x = torch.randn(40, 128, device="cuda", dtype=torch.bfloat16)
    for arguments in (("contiguous",), ("masked", 24)):
        with torch.no_grad():
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                layer(x, *arguments)
                torch.cuda.set_sync_debug_mode("error")
                try:
                    layer(x, *arguments)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x, *arguments)
            for _ in range(2):
                x.copy_(torch.randn_like(x))  # other tokens, other experts
                y.fill_(7)
                graph.replay()
                assert torch.equal(y.nan_to_num(3.0), layer(x, *arguments).nan_to_num(3.0))


@pytest.mark.gpu
def test_training_of_experts_waits_for_nothing() -> None:
    layer = experts_of("whole", "softmax", "cuda")
    x = torch.randn(40, 128, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "args, options, message",
    [
        ((64, 64, 8, 9), {}, r"top_k is 9, expected 1 to 8: so many experts can be chosen from"),
        ((64, 64, 8, 0), {}, r"top_k is 0, expected 1 to 8"),
        ((64, 64, 8, 5), {"n_group": 4, "topk_group": 2}, r"top_k is 5, expected 1 to 4"),
        ((64, 64, 8, 2), {"n_group": 3}, r"n_group and topk_group are 8, 3 and 1, expected n_group to divide"),
        ((64, 64, 8, 2), {"n_group": 4, "topk_group": 5}, r"are 8, 4 and 5, expected"),
        ((64, 64, 8, 2), {"scoring": "tanh"}, r"scoring is 'tanh', expected 'softmax' or 'sigmoid'"),
        ((64, 64, 8, 2), {"dtype": torch.float64}, r"dtype is torch\.float64, expected BF16, FP16 or FP32"),
    ],
)
def test_experts_that_cannot_be(args: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        nn.GroupedExperts(*args, **options)


def test_calls_of_experts_that_cannot_be() -> None:
    layer, x = nn.GroupedExperts(64, 64, 4, 2), torch.ones(3, 64)
    for args, message in (
        ((x, "sorted"), r"layout is 'sorted', expected 'contiguous' or 'masked'"),
        ((x, "contiguous", 4), r"max_m is 4 with layout 'contiguous', expected a positive whole number with 'masked'"),
        ((x, "masked", 0), r"max_m is 0 with layout 'masked'"),
        ((x, "masked"), r"layout is 'masked' where gradients are recorded, expected 'contiguous': use torch\.no_grad"),
        ((torch.ones(3, 63),), r"x has shape \(3, 63\), expected \[\.\., 64\]"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            layer(*args)
    with pytest.raises(InvalidInputError, match=r"the layer is frozen in FP8, expected master weights"):
        layer.quantize_().reset_parameters()
