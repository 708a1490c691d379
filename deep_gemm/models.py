"""From a model's config.json, as Hugging Face has it, to the FP8 multiplications that a rank makes in a forward pass.

By fields, not by names of models. Left out is what FP8 checkpoints keep in BF16: embeddings, the routers of experts,
the head, what joins the inputs of multi-token prediction, and the weights of the indexer's heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from .deployment import Layer
from .errors import InvalidInputError
from .layout import is_whole
from .problem import check_shape

EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")  # DeepSeek and GLM; Qwen; Mixtral and MiniMax
# How fields begin that tell of layers not known here: Qwen3-Next's and Kimi-Linear's; Mamba's; MiMo-V2's, which differ
# from one another; DeepSeek-V4's; Llama 4's.
OTHERS = ("linear_", "mamba_", "swa_", "o_lora_rank", "intermediate_size_mlp")
# Groups of the contiguous layout start at multiples of 128 rows, so that each may be padded by as much as this.
PADDING = 127
REMEDY = "pass N and K of its layers with --shape"


@dataclass(frozen=True)
class Parallel:
    """How a model is spread over ranks. Nothing relates ep to tp * dp.

    Raises: InvalidInputError unless all are positive whole numbers.

    Attributes:
        tp: ranks that attention, dense MLPs and shared experts are split over, as in Megatron: what makes heads or
            intermediates by columns (N), what takes them by rows (K). What has neither (q_a, kv_a, the indexer) is
            whole on every rank, and so is a KV head where there are fewer than ranks.
        ep: ranks that routed experts are spread over, each of them whole. 1: every rank has a part of every expert,
            split over all tp * dp.
        dp: replicas of attention, of tp ranks each, which send their tokens to the same experts. As vLLM means it:
            with expert parallelism ep is tp * dp there. SGLang's `--tp T --dp D --enable-dp-attention` has the
            attention of `--tp T/D --dp D` here.
    """

    tp: int = 1
    ep: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_positive(field.name, getattr(self, field.name), "1 is one rank, no parallelism")


class Weight(NamedTuple):
    """What every token is multiplied with: [n, k] on one rank."""

    name: str
    n: int
    k: int


def read(path: Path) -> dict[str, Any]:
    """The config in a file, or in config.json of a folder; of a multimodal wrapper its text_config.

    Raises: InvalidInputError.
    """
    file = path
    try:
        file = path / "config.json" if path.is_dir() else path
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        what = "a model's config.json or the folder it is in"
        raise InvalidInputError(f"{file} cannot be read, expected {what}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{file} is not JSON, expected a model's config.json: {error}") from None
    if not isinstance(config, dict):
        raise InvalidInputError(
            f"{file} holds a {type(config).__name__}, expected an object: pass the config.json of a model"
        )
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and "hidden_size" in inner else config


def layers_of(
    config: Mapping[str, Any], parallel: Parallel, tokens: int = 16384, decode_tokens: int = 128
) -> tuple[Layer, ...]:
    """All multiplications with FP8 weights that a rank makes, each once, under the first of its names.

    Experts come in both layouts, but not by running ends (psum). The most rows of the contiguous one are those of the
    worst case, which a router seldom comes near: every token of every replica goes to as many experts of this rank as
    it can, and every group is padded.

    tokens: the most of one forward pass on a rank, of prefill. decode_tokens: the most of decode. Every rank that
    experts are spread over may send as many to each of them, which is the room of the masked layout.

    Raises: InvalidInputError where fields are missing or unknown, sizes do not divide, or a shape cannot be multiplied.
    """
    _check_positive("tokens", tokens, "the most of one forward pass on a rank")
    _check_positive("decode_tokens", decode_tokens, "the most of one step of decode on a rank")
    _check_fields(config)
    weights = [*_attention(config, parallel.tp), *_mlps(config, parallel.tp)]
    layers = [Layer("dense", w.n, w.k, ms=(1, tokens), name=w.name) for w in weights]
    layers += _experts(config, parallel, tokens, decode_tokens)
    distinct: dict[Layer, Layer] = {}
    for layer in layers:
        try:
            check_shape(layer.ms[1], layer.n, layer.k, layer.groups or 1)
        except InvalidInputError as error:
            where = ", ".join(f"{field.name} {getattr(parallel, field.name)}" for field in fields(parallel))
            raise InvalidInputError(f"{layer.name}, {where}: {error}") from None
        distinct.setdefault(replace(layer, name=""), layer)
    return tuple(distinct.values())


def _attention(config: Mapping[str, Any], tp: int) -> Iterator[Weight]:
    hidden = _size(config, "hidden_size")
    all_heads = _size(config, "num_attention_heads")
    heads = _share("num_attention_heads", all_heads, "tp", tp)
    if config.get("kv_lora_rank") is not None:
        yield from _latent_attention(config, hidden, heads)
        return
    if config.get("head_dim") is None:
        head_dim = _share("hidden_size", hidden, "num_attention_heads", all_heads, "add head_dim to the config")
    else:
        head_dim = _size(config, "head_dim")
    kv_heads = _size(config, "num_key_value_heads", "num_attention_heads")
    if kv_heads % tp and tp % kv_heads:
        raise InvalidInputError(
            f"num_key_value_heads is {kv_heads}, expected a multiple or a divisor of tp {tp}: choose another --tp"
        )
    yield Weight("attention qkv", (heads + 2 * max(1, kv_heads // tp)) * head_dim, hidden)
    yield Weight("attention o", hidden, heads * head_dim)


def _latent_attention(config: Mapping[str, Any], hidden: int, heads: int) -> Iterator[Weight]:
    """DeepSeek's: queries, unless q_lora_rank is null, and keys with values come out of a space of low rank.

    Some frameworks multiply with q_a and kv_a at once, others one after the other.
    """
    q_rank, kv_rank = _count(config, "q_lora_rank"), _size(config, "kv_lora_rank")
    nope, rope = _size(config, "qk_nope_head_dim"), _size(config, "qk_rope_head_dim")
    v_dim = _size(config, "v_head_dim")
    if q_rank:
        yield Weight("attention q_a + kv_a", q_rank + kv_rank + rope, hidden)
        yield Weight("attention q_a", q_rank, hidden)
    else:
        yield Weight("attention q", heads * (nope + rope), hidden)
    yield Weight("attention kv_a", kv_rank + rope, hidden)
    if q_rank:
        yield Weight("attention q_b", heads * (nope + rope), q_rank)
    yield Weight("attention kv_b", heads * (nope + v_dim), kv_rank)
    yield Weight("attention o", hidden, heads * v_dim)
    if index_heads := _count(config, "index_n_heads"):  # which keys a query attends to, from DeepSeek-V3.2 on
        index_dim = _size(config, "index_head_dim")
        yield Weight("indexer q_b", index_heads * index_dim, _size(config, "q_lora_rank"))
        yield Weight("indexer k", index_dim, hidden)


def _mlps(config: Mapping[str, Any], tp: int) -> Iterator[Weight]:
    """Dense ones, if a layer has one, and those of shared experts, which are one MLP together."""
    hidden = _size(config, "hidden_size")
    if not _count(config, *EXPERTS) or _some_are_dense(config):
        size = _share("intermediate_size", _size(config, "intermediate_size"), "tp", tp)
        yield Weight("dense gate + up", 2 * size, hidden)
        yield Weight("dense down", hidden, size)
    if shared := _count(config, "n_shared_experts", "num_shared_experts"):
        shared *= _size(config, *_expert_sizes(config))
    else:
        shared = _count(config, "shared_expert_intermediate_size")  # Qwen2-MoE
    if shared:
        size = _share("the intermediate size of the shared experts", shared, "tp", tp)
        yield Weight("shared expert gate + up", 2 * size, hidden)
        yield Weight("shared expert down", hidden, size)


def _some_are_dense(config: Mapping[str, Any]) -> bool:
    """Whether a model with experts has layers without."""
    steps = (_count(config, "decoder_sparse_step"), _count(config, "moe_layer_freq"))
    types = config.get("mlp_layer_types")
    listed = bool(config.get("mlp_only_layers")) or (isinstance(types, list) and "dense" in types)
    return listed or _count(config, "first_k_dense_replace") > 0 or max(steps) > 1


def _experts(config: Mapping[str, Any], parallel: Parallel, tokens: int, decode_tokens: int) -> Iterator[Layer]:
    experts = _count(config, *EXPERTS)
    if not experts:
        return
    hidden, top = _size(config, "hidden_size"), _size(config, "num_experts_per_tok")
    groups = _share("the number of routed experts", experts, "ep", parallel.ep)
    size = _size(config, *_expert_sizes(config))
    if parallel.ep == 1:
        size = _share("the intermediate size of the routed experts", size, "tp * dp", parallel.tp * parallel.dp)
    senders = max(parallel.dp, parallel.ep // parallel.tp)  # with tokens of their own
    rows = tokens * senders * min(top, groups) + PADDING * groups
    max_m = decode_tokens * (parallel.ep if parallel.ep > 1 else parallel.dp)
    for part, n, k in (("gate + up", 2 * size, hidden), ("down", hidden, size)):
        yield Layer("contiguous", n, k, groups, (1, rows), name=f"experts {part}, contiguous")
        yield Layer("masked", n, k, groups, (1, max_m), max_m, f"experts {part}, masked")


def _expert_sizes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields that may say an expert's intermediate size: in Mixtral and MiniMax all MLPs are experts."""
    mixtral = config.get("num_local_experts") is not None
    return ("moe_intermediate_size", "intermediate_size") if mixtral else ("moe_intermediate_size",)


def _check_fields(config: Mapping[str, Any]) -> None:
    """Rejects what would pass for a model that it is not, and get layers that it does not have."""
    known = any(name in config for name in EXPERTS)
    for name, value in config.items():
        experts = "moe" in name or "expert" in name
        if value and (name.startswith(OTHERS) or (experts and not known)):
            raise InvalidInputError(
                f"{_owner(config)} has {name}, expected the fields of DeepSeek-V3, GLM, Qwen3 or Llama: {REMEDY}"
            )


def _size(config: Mapping[str, Any], *names: str) -> int:
    """The first of the fields that is given."""
    name = _given(config, names)
    if name is None:
        raise InvalidInputError(
            f"{_owner(config)} has no {' or '.join(names)}, expected a positive whole number: add it, or {REMEDY}"
        )
    return _whole(config, name, 1)


def _count(config: Mapping[str, Any], *names: str) -> int:
    """The first of the fields that is given; 0 where none is."""
    name = _given(config, names)
    return 0 if name is None else _whole(config, name, 0)


def _given(config: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """null is as good as nothing."""
    return next((name for name in names if config.get(name) is not None), None)


def _whole(config: Mapping[str, Any], name: str, least: int) -> int:
    value = config[name]
    if not is_whole(value) or value < least:
        raise InvalidInputError(
            f"{name} is {value!r} in {_owner(config)}, expected a whole number from {least} on: mend it, or {REMEDY}"
        )
    return int(value)


def _owner(config: Mapping[str, Any]) -> str:
    return f"the config of model_type {config.get('model_type')!r}"


def _share(what: str, size: int, axis: str, ranks: int, remedy: str = "") -> int:
    if size % ranks:
        options = " or ".join(f"--{name}" for name in axis.split(" * "))
        raise InvalidInputError(
            f"{what} is {size}, expected a multiple of {axis} {ranks}: {remedy or f'choose another {options}'}"
        )
    return size // ranks


def _check_positive(name: str, value: int, meaning: str) -> None:
    if not is_whole(value) or value <= 0:
        raise InvalidInputError(f"{name} is {value!r}, expected a positive whole number: {meaning}")
