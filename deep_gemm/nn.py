"""Layers for models: Linear in the place of torch.nn.Linear, and GroupedExperts, a mixture of experts.

Weights are in one of two states:

    master   a float Parameter that is trained, and quantised in every call; `quantize_()` is what gives speed
    frozen   E4M3 values and FP32 scales per 128x128, as in DeepSeek's checkpoints, without a gradient

A state dict has DeepSeek's names and the layer's own sizes, whatever is filled up inside. `.to(dtype)`, `.half()` and
their like move frozen weights, and leave their bits as they are.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import torch

from . import functional, gemm
from .errors import InvalidInputError
from .functional import BLOCK, FLOATS
from .layout import align, ceil_div, get_mk_alignment_for_contiguous_layout, is_whole
from .problem import E4M3, Pair
from .quantize import per_block_cast_to_fp8, swiglu_cast_to_fp8

Source: TypeAlias = "str | Path | Mapping[str, torch.Tensor]"

SCALES = "_scale_inv"  # behind the name of a weight, that of its scales; they multiply, whatever the name says
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes: what .half() leaves alone
_READ_WEIGHTS_THEMSELVES = torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer
_SLAB = 4096  # rows that are quantised at once: in FP32 all of a vocabulary fills gigabytes


class _Layer(torch.nn.Module):
    """What layers share whose weights `name` have scales in `name_scale_inv`, or None there.

    Attributes:
        bits_stay: names of other tensors whose dtype stays what it is.
    """

    bits_stay: tuple[str, ...] = ()

    def _whole(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A master weight as it is multiplied with."""
        return weight

    def _freeze(self, name: str, pair: Pair) -> None:
        for each, x in zip((name, name + SCALES), pair, strict=True):
            setattr(self, each, torch.nn.Parameter(x, requires_grad=False))

    def _operand(self, name: str) -> functional.Weight:
        """What a call multiplies with."""
        weight, scales = getattr(self, name), getattr(self, name + SCALES)
        return self._whole(name, weight) if scales is None else (weight, scales)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Layer:
        """As of torch.nn.Module, but of tensors whose bits stay fn sees integers."""
        frozen = [x for name in self._parameters if (x := getattr(self, name)) is not None and name.endswith(SCALES)]
        frozen += [x for x in self._parameters.values() if x is not None and x.dtype == E4M3]
        stay = {id(x) for x in (*frozen, *(getattr(self, name) for name in self.bits_stay)) if x is not None}

        def apply(x: torch.Tensor) -> torch.Tensor:
            if id(x) not in stay:
                return fn(x)
            bits = x.view(_INTEGERS[x.element_size()])
            moved = fn(bits)
            return (moved if moved.dtype == bits.dtype else bits.to(moved.device)).view(x.dtype)

        return super()._apply(apply, recurse)


class Linear(_Layer):
    """y = x @ weight.T + bias in FP8, as `functional.linear`: in the place of torch.nn.Linear.

    Args:
        in_features, out_features: any sizes. Where they are no multiples of 16 and 8, a call fills up with zeros.
        bias: whether there is one; it is a float Parameter in either state.
        device, dtype: of the master weight and the bias; BF16, FP16 or FP32.

    x: [.., in_features] BF16, FP16 or FP32; result: [.., out_features] in x's dtype.

    A new layer has a master weight. `load_state_dict` takes a float weight, or `weight` in E4M3 with
    `weight_scale_inv`, which freezes the layer; a frozen one stays so, and quantises a float weight that it is given.

    Attributes:
        weight: [out_features, in_features], float, or E4M3 if frozen.
        weight_scale_inv: FP32 [ceil(out_features / 128), ceil(in_features / 128)] if frozen, else None.

    Raises: InvalidInputError.
    """

    weight: torch.nn.Parameter
    weight_scale_inv: torch.nn.Parameter | None
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_dtype(dtype)
        self.in_features, self.out_features = in_features, out_features
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.register_parameter("weight_scale_inv", None)
        vector = torch.nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", vector)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws a new master weight and bias as torch.nn.Linear does. Raises: InvalidInputError if frozen."""
        if self.is_frozen:
            raise InvalidInputError("the layer is frozen in FP8, expected a master weight: make a new Linear")
        if self.weight.numel():
            torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
            torch.nn.init.uniform_(self.bias, -bound, bound)

    @property
    def is_frozen(self) -> bool:
        """Whether the weight is FP8, without a gradient."""
        return self.weight_scale_inv is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._operand("weight"), self.bias)

    def quantize_(self) -> Linear:
        """Freezes the layer in FP8; returns it. The master weight is let go of."""
        if not self.is_frozen:
            self._freeze("weight", _cast(self.weight))
        return self

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, keep_master: bool = False) -> Linear:
        """A layer in the place of linear, with its bias, the same Parameter.

        Args:
            linear: of BF16, FP16 or FP32.
            keep_master: its weight, the same Parameter, becomes the master weight; otherwise it is quantised.

        Raises: InvalidInputError for another dtype.
        """
        _check_dtype(linear.weight.dtype)
        weight: Any = linear.weight  # a Parameter, whatever its annotation
        bias: Any = linear.bias  # or None
        layer = cls(linear.in_features, linear.out_features, bias is not None, "meta", weight.dtype)
        layer.weight, layer.bias = weight, bias
        layer.train(linear.training)
        return layer if keep_master else layer.quantize_()

    @classmethod
    def from_checkpoint(
        cls,
        source: Source,
        prefix: str = "",
        keep_master: bool = False,
        device: torch.device | str | None = None,
    ) -> Linear:
        """The layer that a checkpoint has under `prefix`: prefix.weight, prefix.weight_scale_inv, prefix.bias.

        Args:
            source: a safetensors file, a folder that has model.safetensors or model.safetensors.index.json, of which
                nothing else is read; or a state dict.
            prefix: such as "model.layers.0.self_attn.o_proj".
            keep_master: a float weight becomes the master weight; otherwise it is quantised.
            device: where the layer is to be.

        Raises: InvalidInputError for what is not there, or does not fit, and for a master weight of FP8.
        """
        checkpoint = _Checkpoint(source, prefix)
        weight = checkpoint.read("weight", device)
        if weight.dim() != 2:
            raise checkpoint.misfit("weight", weight, "[out_features, in_features]")
        bias = checkpoint.read_float("bias", device, weight.shape[:1]) if checkpoint.has("bias") else None
        layer = cls(weight.shape[1], weight.shape[0], bias is not None, "meta", torch.float32)
        layer.bias = None if bias is None else torch.nn.Parameter(bias)
        if weight.dtype == E4M3:
            if keep_master:
                raise InvalidInputError(f"{checkpoint} has an FP8 weight, expected a float one: pass keep_master=False")
            layer._freeze("weight", (weight, checkpoint.scales_of("weight", weight, device)))
            return layer
        _check_dtype(weight.dtype)
        layer.weight = torch.nn.Parameter(weight)
        return layer if keep_master else layer.quantize_()

    def extra_repr(self) -> str:
        weight = "FP8" if self.is_frozen else str(self.weight.dtype).removeprefix("torch.")
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, weight={weight}"

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        weight: Any = state_dict.get(name)
        scales: Any = state_dict.get(name + SCALES)
        fits = isinstance(weight, torch.Tensor) and weight.shape == self.weight.shape  # torch tells if it does not
        if fits and weight.dtype == E4M3:
            if complaint := _why_not(weight, scales):
                error_msgs.append(f"{name} is E4M3, but {name}{SCALES} {complaint}")
                return
            if not self.is_frozen:
                device = self.weight.device
                empty = scales.new_empty(scales.shape, dtype=torch.float32, device=device)
                self._freeze("weight", (torch.empty_like(weight, device=device), empty))
        elif fits and self.is_frozen:
            values, scales = _cast(weight)
            state_dict = {**state_dict, name: values, name + SCALES: scales}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        weight, scales = self.weight, self.weight_scale_inv
        if scales is not None and (_settled(weight) is not weight or scales.dtype != torch.float32):
            self._freeze("weight", (_settled(weight.detach()), scales.detach().float()))  # assigned as they came


def replace_linear(
    module: torch.nn.Module, keep_master: bool = False, skip: Collection[str] | Callable[[str], bool] = ()
) -> torch.nn.Module:
    """Puts a Linear in the place of every torch.nn.Linear of a model, and returns the model.

    Left alone are subclasses of it, and what is within torch.nn.MultiheadAttention and TransformerEncoderLayer, which
    read weights themselves, and layers with hooks. What is there twice stays one layer.

    Args:
        module: changed in place; if it is a torch.nn.Linear itself, only what is returned is new.
        keep_master: whether weights stay float, to be trained; as in `Linear.from_linear`.
        skip: names as of `named_modules()`, of layers or of what they are in; or what tells of a name whether to skip.

    Raises: InvalidInputError.
    """
    if isinstance(skip, str):
        raise InvalidInputError(f"skip is the str {skip!r}, expected names, or a function of one: pass [{skip!r}]")
    if _is_plain(module):
        return Linear.from_linear(module, keep_master)
    is_skipped = skip if callable(skip) else skip.__contains__
    new: dict[torch.nn.Module, Linear] = {}
    left: tuple[str, ...] = ()  # how the names begin of what is within layers that are left alone
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if name.startswith(left):
            continue
        if isinstance(child, _READ_WEIGHTS_THEMSELVES) or (name and is_skipped(name)):
            left += (f"{name}." if name else "",)
        elif _is_plain(child):
            if child not in new:
                new[child] = Linear.from_linear(child, keep_master)
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, new[child])
    return module


class Router(_Layer):
    """Chooses top_k experts for every token, in FP32: the gate of GroupedExperts.

    hidden, num_experts, top_k, scoring, renormalize, correction_bias, n_group, topk_group, scaling, device, dtype: as
    there, which has checked them.

    Attributes:
        weight: [num_experts, hidden].
        e_score_correction_bias: FP32 [num_experts] or None: what is added to scores to choose by, and not to weigh by;
            whoever trains changes it, for it has no gradient.
    """

    weight: torch.nn.Parameter
    e_score_correction_bias: torch.Tensor | None
    bits_stay = ("e_score_correction_bias",)

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        scoring: str,
        renormalize: bool,
        correction_bias: bool,
        n_group: int,
        topk_group: int,
        scaling: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.top_k, self.scoring, self.renormalize = top_k, scoring, renormalize
        self.n_group, self.topk_group, self.scaling = n_group, topk_group, scaling
        self.weight = torch.nn.Parameter(torch.empty(num_experts, hidden, device=device, dtype=dtype))
        bias = torch.zeros(num_experts, dtype=torch.float32, device=device) if correction_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden], any float dtype -> experts int64 [T, top_k], what each counts FP32 [T, top_k].

        Raises: what torch.nn.functional.linear raises.
        """
        device = x.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            logits = torch.nn.functional.linear(x.float(), self.weight.float())
        scores = logits.softmax(-1) if self.scoring == "softmax" else logits.sigmoid()
        chosen_by = scores.detach()
        if self.e_score_correction_bias is not None:
            chosen_by = chosen_by + self.e_score_correction_bias
        if self.n_group > 1:
            groups = chosen_by.unflatten(-1, (self.n_group, -1))
            best = groups.topk(min(2, groups.shape[-1])).values.sum(-1).topk(self.topk_group).indices
            kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
            chosen_by = groups.masked_fill(~kept[..., None], -math.inf).flatten(-2)
        experts = chosen_by.topk(self.top_k).indices
        weights = scores.gather(-1, experts)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * self.scaling

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, top_k={self.top_k}, scoring={self.scoring!r}"


class GroupedExperts(_Layer):
    """A mixture of experts in FP8: every token goes through top_k MLPs, down(silu(gate(x)) * up(x)), which a router
    chooses and weighs.

    Args:
        hidden, intermediate, num_experts, top_k: any sizes; top_k at most num_experts.
        scoring: "softmax" over all experts, or "sigmoid" of each as in DeepSeek-V3.
        renormalize: what the chosen experts count adds up to 1, before scaling.
        correction_bias: the router has an e_score_correction_bias as in DeepSeek-V3.
        n_group, topk_group: experts are n_group groups, and chosen from the topk_group groups whose two best experts
            have the highest sum; DeepSeek-V3's.
        scaling: what all weights are multiplied by; DeepSeek-V3's routed_scaling_factor.
        device, dtype: of the master weights; BF16, FP16 or FP32.

    A new layer has master weights. It is trained in the contiguous layout. States as of Linear; the router's weight is
    a float Parameter in either. Names in a state dict: gate.weight (and gate.e_score_correction_bias),
    experts.{i}.gate_proj.weight, .up_proj. and .down_proj., with weight_scale_inv if frozen.

    Attributes:
        gate: the Router.
        gate_up_proj: [num_experts, 2 * intermediate, hidden], gates and then ups. If frozen, E4M3, with intermediate
            rounded up to 128 and zeros there; gate_up_proj_scale_inv has its scales.
        down_proj: [num_experts, hidden, intermediate], likewise.

    Source: DeepSeek-V3 report (arXiv 2412.19437), sections 2.1.2 and 3.3.
    """

    gate_up_proj: torch.nn.Parameter
    gate_up_proj_scale_inv: torch.nn.Parameter | None
    down_proj: torch.nn.Parameter
    down_proj_scale_inv: torch.nn.Parameter | None

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: str = "softmax",
        renormalize: bool = True,
        correction_bias: bool = False,
        n_group: int = 1,
        topk_group: int = 1,
        scaling: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_dtype(dtype)
        _check_routing(num_experts, top_k, scoring, n_group, topk_group)
        self.hidden, self.intermediate, self.num_experts, self.top_k = hidden, intermediate, num_experts, top_k
        options = scoring, renormalize, correction_bias, n_group, topk_group, scaling
        self.gate = Router(hidden, num_experts, top_k, *options, device, dtype)
        for name, shape in (("gate_up_proj", (2 * intermediate, hidden)), ("down_proj", (hidden, intermediate))):
            weight = torch.empty(num_experts, *shape, device=device, dtype=dtype)
            setattr(self, name, torch.nn.Parameter(weight))
            self.register_parameter(name + SCALES, None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new master weights, uniform as torch.nn.Linear's. Raises: InvalidInputError if frozen."""
        if self.is_frozen:
            raise InvalidInputError("the layer is frozen in FP8, expected master weights: make a new GroupedExperts")
        for weight in (self.gate.weight, self.gate_up_proj, self.down_proj):
            bound = 1 / math.sqrt(max(weight.shape[-1], 1))
            torch.nn.init.uniform_(weight, -bound, bound)

    @property
    def is_frozen(self) -> bool:
        """Whether the experts' weights are FP8, without a gradient."""
        return self.gate_up_proj_scale_inv is not None

    def forward(self, x: torch.Tensor, layout: str = "contiguous", max_m: int | None = None) -> torch.Tensor:
        """What the experts of each token make of it.

        Args:
            x: BF16, FP16 or FP32 [.., hidden].
            layout: "contiguous": the rows of all experts one behind the other, tokens * top_k and what pads each of
                them, as many as there may be at most; for prefill, and for training. "masked": max_m rows for each
                expert; for decode, without gradients.
            max_m: the most rows of an expert in the masked layout; None: as many as there are tokens, which always
                fit. Of a token that an expert had no room for the result is NaN: nothing is quietly left out.

        Result: [.., hidden] in x's dtype (under autocast, in its dtype). Nothing is read back from the device, and
        shapes depend on x's alone: CUDA graphs can capture either layout. A row that an expert multiplies has the same
        bits in both, and with gradients or without, but where FP16 has no room for what gates and ups are.

        Raises: InvalidInputError, as `functional.grouped_linear`.
        """
        if layout not in ("contiguous", "masked"):
            raise InvalidInputError(f"layout is {layout!r}, expected 'contiguous' or 'masked'")
        if max_m is not None and (layout != "masked" or not is_whole(max_m) or max_m < 1):
            raise InvalidInputError(
                f"max_m is {max_m!r} with layout {layout!r}, expected a positive whole number with 'masked', else None"
            )
        multiplied = functional.multiplied(x, self.hidden)
        shape, tokens = multiplied.shape, multiplied.reshape(-1, self.hidden)
        if not tokens.numel():
            return multiplied.new_zeros(shape)
        experts, counts = self.gate(x.reshape(-1, self.hidden))
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            if layout == "masked":
                raise InvalidInputError(
                    "layout is 'masked' where gradients are recorded, expected 'contiguous': use torch.no_grad()"
                )
            rows = self._train(tokens, experts)
        elif layout == "contiguous":
            rows = self._prefill(tokens, experts)
        else:
            rows = self._decode(tokens, experts, tokens.shape[0] if max_m is None else min(max_m, tokens.shape[0]))
        rows = rows.view(*experts.shape, self.hidden)
        return (rows.float() * counts[..., None]).sum(1).to(multiplied.dtype).view(shape)

    def _train(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """What every chosen expert makes of every token, [T * top_k, hidden]. Gradients are sums of fixed order."""
        position, layout = _contiguous(experts, self.num_experts)
        copies = x[:, None].expand(-1, self.top_k, -1).reshape(-1, self.hidden)
        rows = x.new_zeros(layout.shape[0], self.hidden).index_copy(0, position, copies)
        inner = functional.grouped_linear(rows, self._operand("gate_up_proj"), layout)
        outer = functional.grouped_linear(inner, self._operand("down_proj"), layout, swiglu=True)
        return outer.index_select(0, position)

    def _prefill(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """The same without gradients: tokens are quantised before they are copied."""
        position, layout = _contiguous(experts, self.num_experts)
        values, scales = functional.activations(x)
        token = torch.arange(position.shape[0], device=x.device) // self.top_k
        token = torch.zeros_like(layout, dtype=torch.int64).index_copy_(0, position, token)
        a = values.view(torch.uint8)[token].view(E4M3), scales.mT.index_select(1, token).mT
        gate_up, down = self._pairs()
        inner = x.new_empty(layout.shape[0], gate_up[0].shape[1], dtype=torch.bfloat16)
        gemm.m_grouped_fp8_gemm_nt_contiguous(a, gate_up, inner, layout)
        outer = x.new_empty(layout.shape[0], down[0].shape[1], dtype=torch.bfloat16)
        gemm.m_grouped_fp8_gemm_nt_contiguous(swiglu_cast_to_fp8(inner), down, outer, layout)
        return outer[:, : self.hidden].index_select(0, position)

    def _decode(self, x: torch.Tensor, experts: torch.Tensor, max_m: int) -> torch.Tensor:
        """The same in the masked layout. A group behind the others takes the rows that do not fit, and is not read."""
        expert, rank, count = _ranks(experts, self.num_experts)
        fits = rank < max_m
        expert, rank = torch.where(fits, expert, self.num_experts), torch.where(fits, rank, 0)
        masked_m = count.clamp_max(max_m).int()
        values, scales = functional.activations(x)
        token = torch.arange(expert.shape[0], device=x.device) // self.top_k
        groups = self.num_experts + 1
        a = values.new_empty(groups, max_m, values.shape[1], dtype=torch.uint8)
        a[expert, rank] = values.view(torch.uint8)[token]
        a_scales = scales.new_empty(groups, scales.shape[1], align(max_m, 4)).mT[:, :max_m]
        a_scales[expert, rank] = scales[token]
        a, a_scales = a[:-1].view(E4M3), a_scales[:-1]
        gate_up, down = self._pairs()
        expected_m = ceil_div(expert.shape[0], self.num_experts)
        inner = x.new_empty(self.num_experts, max_m, gate_up[0].shape[1], dtype=torch.bfloat16)
        gemm.m_grouped_fp8_gemm_nt_masked((a, a_scales), gate_up, inner, masked_m, expected_m)
        outer = x.new_empty(self.num_experts, max_m, down[0].shape[1], dtype=torch.bfloat16)
        gated = swiglu_cast_to_fp8(inner, masked_m=masked_m)
        gemm.m_grouped_fp8_gemm_nt_masked(gated, down, outer, masked_m, expected_m)
        rows = outer[expert.clamp_max(self.num_experts - 1), rank, : self.hidden]
        return torch.where(fits[:, None], rows, math.nan)

    def _pairs(self) -> tuple[Pair, Pair]:
        """Both weights as operands of a multiplication, quantised now if they must be."""
        gate_up, down = self._operand("gate_up_proj"), self._operand("down_proj")
        gate_up, down = (w if isinstance(w, tuple) else (w, None) for w in (gate_up, down))
        return functional.weights(*gate_up), functional.weights(*down)

    def _whole(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """With intermediate rounded up to 128, so that gates and ups share no scale."""
        missing = -self.intermediate % BLOCK
        if not missing:
            return weight
        if name == "down_proj":
            return torch.nn.functional.pad(weight, (0, missing))
        halves = weight.unflatten(1, (2, self.intermediate))
        return torch.nn.functional.pad(halves, (0, 0, 0, missing)).flatten(1, 2)

    def quantize_(self) -> GroupedExperts:
        """Freezes the experts in FP8; returns the layer. The master weights are let go of."""
        if not self.is_frozen:
            for name in ("gate_up_proj", "down_proj"):
                self._freeze(name, _cast(self._whole(name, getattr(self, name))))
        return self

    @classmethod
    def from_checkpoint(
        cls,
        source: Source,
        prefix: str,
        top_k: int,
        keep_master: bool = False,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> GroupedExperts:
        """The experts that a checkpoint has under `prefix`, such as "model.layers.3.mlp".

        source, keep_master, device: as of `Linear.from_checkpoint`. options: scoring and so on, which a checkpoint does
        not tell; DeepSeek-V3 has top_k 8, scoring "sigmoid", n_group 8, topk_group 4, scaling 2.5. What is read are the
        names that the class lists, one expert at a time. Raises: InvalidInputError.
        """
        checkpoint = _Checkpoint(source, prefix)
        first = checkpoint.read("experts.0.gate_proj.weight", "cpu")
        if first.dim() != 2:
            raise checkpoint.misfit("experts.0.gate_proj.weight", first, "[I, H]")
        router = checkpoint.read_float("gate.weight", device, (None, first.shape[1]))
        options.setdefault("correction_bias", checkpoint.has("gate.e_score_correction_bias"))
        options.setdefault("dtype", torch.float32)
        layer = cls(first.shape[1], first.shape[0], router.shape[0], top_k, device="meta", **options)
        layer.gate.weight = torch.nn.Parameter(router)
        if layer.gate.e_score_correction_bias is not None:
            bias = checkpoint.read_float("gate.e_score_correction_bias", device, router.shape[:1])
            layer.gate.e_score_correction_bias = bias.float()
        if first.dtype == E4M3 and keep_master:
            raise InvalidInputError(f"{checkpoint} has FP8 weights, expected float ones: pass keep_master=False")
        layer._allocate(not keep_master, router.device if device is None else device, first.dtype)
        layer._take(lambda name: checkpoint.read(name, device))
        return layer

    def _experts(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
        """Name, weight and scales of every expert's every part, as views of what all have together."""
        for i in range(self.num_experts):
            for part, name in (("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj"), ("down_proj", "down_proj")):
                views: list[torch.Tensor | None] = []
                for together, size in ((name, self.intermediate), (name + SCALES, ceil_div(self.intermediate, BLOCK))):
                    x = getattr(self, together)
                    if x is None:
                        views.append(None)
                    elif part == "down_proj":
                        views.append(x[i, :, :size])
                    else:
                        first = 0 if part == "gate_proj" else x.shape[1] // 2
                        views.append(x[i, first : first + size])
                yield f"experts.{i}.{part}.weight", views[0], views[1]  # type: ignore[misc]

    def _allocate(self, frozen: bool, device: torch.device | str, dtype: torch.dtype) -> None:
        """New weights, not set."""
        inner = align(self.intermediate, BLOCK) if frozen else self.intermediate
        for name, shape in (("gate_up_proj", (2 * inner, self.hidden)), ("down_proj", (self.hidden, inner))):
            if frozen:
                values = torch.empty(self.num_experts, *shape, dtype=E4M3, device=device)
                blocks = [ceil_div(size, BLOCK) for size in shape]
                scales = torch.empty(self.num_experts, *blocks, dtype=torch.float32, device=device)
                self._freeze(name, (values, scales))
            else:
                weight = torch.empty(self.num_experts, *shape, dtype=dtype, device=device)
                setattr(self, name, torch.nn.Parameter(weight))

    @torch.no_grad()
    def _take(self, read: Callable[[str], torch.Tensor]) -> None:
        """Copies every expert's weights. Raises: InvalidInputError for what does not fit."""
        if self.is_frozen:
            for x in (self.gate_up_proj, self.down_proj):
                x.view(torch.uint8).zero_()  # what is filled up
        for name, weight, scales in self._experts():
            x, x_scales = _fitting(read, name, weight.shape, scales is not None)
            if scales is not None:
                x, x_scales = _cast(x) if x_scales is None else (x, x_scales)
                scales.copy_(x_scales)
            weight.copy_(x)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, weight, scales in self._experts():
            for key, x in ((name, weight), (name + SCALES, scales)):
                if x is not None:
                    destination[prefix + key] = x if keep_vars else x.detach().contiguous()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [prefix + name for name, _, _ in self._experts()]
        known = {*names, *(name + SCALES for name in names)}
        mine = [key for key in state_dict if key.startswith(prefix) and not key.startswith(f"{prefix}gate.")]
        unexpected_keys += [key for key in mine if strict and key not in known]
        missing = [name for name in names if name not in state_dict]
        missing_keys += missing
        if missing:
            return
        first: torch.Tensor = state_dict[names[0]]
        frozen = self.is_frozen or any(state_dict[name].dtype == E4M3 for name in names)
        device, dtype = self.gate_up_proj.device, self.gate_up_proj.dtype
        if local_metadata.get("assign_to_params_buffers") and device.type == "meta":
            device, dtype = first.device, first.dtype

        def read(name: str) -> torch.Tensor:
            if prefix + name not in state_dict:
                raise InvalidInputError(f"{prefix}{name} is missing, expected the scales of FP8 weights")
            return state_dict[prefix + name]

        try:
            for name, weight, _ in self._experts():  # all of them, before anything changes
                _fitting(read, name, weight.shape, frozen)
        except InvalidInputError as error:
            error_msgs.append(f"{prefix}{error}")
            return
        if (self.is_frozen, self.gate_up_proj.device) != (frozen, device):
            self._allocate(frozen, device, dtype)
        self._take(read)

    def extra_repr(self) -> str:
        weight = "FP8" if self.is_frozen else str(self.gate_up_proj.dtype).removeprefix("torch.")
        sizes = f"{self.hidden}, {self.intermediate}, num_experts={self.num_experts}, top_k={self.top_k}"
        return f"{sizes}, weight={weight}"


class _Checkpoint:
    """Tensors by name below a prefix: of a state dict, or of safetensors files, read one by one."""

    def __init__(self, source: Source, prefix: str) -> None:
        self._prefix = f"{prefix}." if prefix and not prefix.endswith(".") else prefix
        self._files: dict[Path, Any] = {}
        self._where: Mapping[str, torch.Tensor | Path]
        if isinstance(source, Mapping):
            self._name, self._where = "the state dict", source
        else:
            self._name, self._where = str(source), self._found(Path(source))

    def __str__(self) -> str:
        return self._name

    def has(self, name: str) -> bool:
        return self._prefix + name in self._where

    def read(self, name: str, device: torch.device | str | None) -> torch.Tensor:
        """A copy of its own, for in a file nothing lies on 16 bytes. Raises: InvalidInputError."""
        key = self._prefix + name
        if key not in self._where:
            similar = ", ".join(difflib.get_close_matches(key, self._where)) or "nothing like it"
            raise InvalidInputError(f"{self} has no {key}, expected it below the prefix: there is {similar}")
        where = self._where[key]
        x = self._in_file(where, key) if isinstance(where, Path) else where.detach()
        return x.to(x.device if device is None else device, copy=True).contiguous()

    def read_float(self, name: str, device: torch.device | str | None, shape: Sequence[int | None]) -> torch.Tensor:
        """What has no scales, of this shape (None: any size). Raises: InvalidInputError."""
        x = self.read(name, device)
        fits = x.dim() == len(shape) and all(want in (None, size) for size, want in zip(x.shape, shape, strict=True))
        if not fits or x.dtype not in FLOATS:
            want = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.misfit(name, x, f"[{want}] of BF16, FP16 or FP32")
        return x

    def scales_of(self, name: str, weight: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
        """The scales that an E4M3 weight has, in FP32. Raises: InvalidInputError."""
        scales = self.read(name + SCALES, device).float()
        if complaint := _why_not(weight, scales):
            raise InvalidInputError(f"{self}: {self._prefix}{name}{SCALES} {complaint}")
        return scales

    def misfit(self, name: str, x: torch.Tensor, want: str) -> InvalidInputError:
        return InvalidInputError(
            f"{self}: {self._prefix}{name} has shape {tuple(x.shape)} and is {x.dtype}, expected {want}: "
            "is the prefix that of a layer?"
        )

    def _found(self, path: Path) -> dict[str, torch.Tensor | Path]:
        """The file that every tensor is in."""
        index = path / "model.safetensors.index.json" if path.is_dir() else path
        if index.name.endswith(".index.json") and index.is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                outside = [file for file in names.values() if Path(file).name != file]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InvalidInputError(
                    f"{index} has no weight_map, expected an index of safetensors: {error}"
                ) from None
            if outside:
                raise InvalidInputError(
                    f"{index} names {outside[0]!r}, expected names of files beside it: nothing elsewhere is read"
                )
            return {name: index.parent / file for name, file in names.items()}
        file = path / "model.safetensors" if path.is_dir() else path
        return dict.fromkeys(self._open(file).keys(), file)

    def _in_file(self, file: Path, key: str) -> torch.Tensor:
        from safetensors import SafetensorError

        try:
            return self._open(file).get_tensor(key)
        except SafetensorError as error:
            raise InvalidInputError(f"{file} gives no {key}, expected what the index says: {error}") from None

    def _open(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._files:
            try:
                self._files[file] = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise InvalidInputError(
                    f"{file} cannot be read, expected a safetensors file, or a folder with model.safetensors or "
                    f"model.safetensors.index.json: {error}"
                ) from None
        return self._files[file]


def _cast(weight: torch.Tensor) -> Pair:
    """weight [.., N, K] quantised per 128x128, without a gradient; under autocast, too, which torch.cat is not."""
    rows, columns = weight.shape[-2:]
    batch = weight.detach() if weight.dim() == 3 else weight.detach()[None]
    blocks = ceil_div(rows, BLOCK), ceil_div(columns, BLOCK)
    values = torch.empty(batch.shape, dtype=E4M3, device=weight.device)
    scales = torch.empty(batch.shape[0], *blocks, dtype=torch.float32, device=weight.device)
    for each, own, own_scales in zip(batch, values, scales, strict=True):
        for first in range(0, rows, _SLAB):
            slab = per_block_cast_to_fp8(each[first : first + _SLAB])
            own[first : first + _SLAB].copy_(slab[0])
            own_scales[first // BLOCK : (first + _SLAB) // BLOCK].copy_(slab[1])
    return (values, scales) if weight.dim() == 3 else (values[0], scales[0])


def _fitting(
    read: Callable[[str], torch.Tensor], name: str, shape: torch.Size, frozen: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An expert's weight, and if it is E4M3 its scales. Raises: InvalidInputError for what does not fit."""
    x = read(name)
    if x.shape != shape or x.dtype not in (E4M3, *FLOATS):
        raise InvalidInputError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)}, expected {tuple(shape)}, E4M3 or a float: "
            "all experts have the sizes of the layer"
        )
    if x.dtype != E4M3:
        return x, None
    if not frozen:
        raise InvalidInputError(f"{name} is FP8, expected a float as the others: pass keep_master=False")
    scales = read(name + SCALES)
    if complaint := _why_not(x, scales):
        raise InvalidInputError(f"{name} is E4M3, but {name}{SCALES} {complaint}")
    return x, scales


def _settled(values: torch.Tensor) -> torch.Tensor:
    """values as the multiplications take them: contiguous, on 16 bytes."""
    fits = values.is_contiguous() and (values.is_meta or values.data_ptr() % 16 == 0)
    return values if fits else values.clone(memory_format=torch.contiguous_format)


def _why_not(values: torch.Tensor, scales: object) -> str | None:
    """What is wrong with the scales of values [N, K]; None: nothing."""
    want = tuple(ceil_div(size, BLOCK) for size in values.shape)
    if not isinstance(scales, torch.Tensor):
        return f"is missing, expected FP32 of shape {want}: a scale per 128x128 belongs to FP8 weights"
    if tuple(scales.shape) != want:
        return f"has shape {tuple(scales.shape)}, expected {want}: a scale per 128x128"
    return None if scales.is_floating_point() else f"is {scales.dtype}, expected FP32"


def _is_plain(module: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether a module is a torch.nn.Linear that does nothing else."""
    hooks = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
    return type(module) is torch.nn.Linear and not any(getattr(module, name) for name in hooks)


def _check_dtype(dtype: torch.dtype | None) -> None:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in FLOATS:
        raise InvalidInputError(f"dtype is {dtype}, expected BF16, FP16 or FP32: convert with .float() or .bfloat16()")


def _check_routing(num_experts: int, top_k: int, scoring: str, n_group: int, topk_group: int) -> None:
    if scoring not in ("softmax", "sigmoid"):
        raise InvalidInputError(f"scoring is {scoring!r}, expected 'softmax' or 'sigmoid'")
    if n_group < 1 or num_experts % n_group or not 1 <= topk_group <= n_group:
        raise InvalidInputError(
            f"num_experts, n_group and topk_group are {num_experts}, {n_group} and {topk_group}, expected n_group to "
            "divide num_experts, and topk_group from 1 to n_group: 1 and 1 are no groups"
        )
    if not 1 <= top_k <= num_experts // n_group * topk_group:
        raise InvalidInputError(
            f"top_k is {top_k}, expected 1 to {num_experts // n_group * topk_group}: so many experts can be chosen from"
        )


def _ranks(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of experts [T, top_k]: flat; how many choices before each are of the same expert; how many each expert has."""
    flat = experts.flatten()
    chosen, order = flat.sort(stable=True)
    bounds = torch.searchsorted(chosen, torch.arange(num_experts + 1, device=flat.device))
    rank = torch.arange(flat.shape[0], device=flat.device) - bounds[chosen]
    return flat, torch.empty_like(rank).index_copy_(0, order, rank), bounds.diff()


def _contiguous(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row of each choice in a contiguous layout, and the layout, with as many rows as there may be at most."""
    alignment = get_mk_alignment_for_contiguous_layout()
    flat, rank, count = _ranks(experts, num_experts)
    padded = (count + alignment - 1) // alignment * alignment
    position = (padded.cumsum(0) - padded)[flat] + rank
    most = flat.shape[0] + min(num_experts, flat.shape[0]) * (alignment - 1)
    most = -(-most // alignment) * alignment  # not align(), for torch.export may not know the number
    layout = torch.full((most,), -1, dtype=torch.int32, device=flat.device)
    return position, layout.index_copy_(0, position, flat.int())
