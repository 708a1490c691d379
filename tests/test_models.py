"""Layers of published models, by hand; how they are split; and every config that is rejected, by its text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deep_gemm import cli
from deep_gemm.deployment import Layer
from deep_gemm.errors import InvalidInputError
from deep_gemm.models import Parallel, layers_of, read

# Of each model's config.json on Hugging Face, the fields that say of its layers, and some beside them.
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "tie_word_embeddings": False,
    "v_head_dim": 128,
}
DEEPSEEK_V32 = DEEPSEEK_V3 | {
    "model_type": "deepseek_v32",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
}
KIMI_K2 = DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "first_k_dense_replace": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
}
GLM_5 = DEEPSEEK_V32 | {
    "model_type": "glm_moe_dsa",
    "hidden_size": 6144,
    "index_n_heads": 32,
    "intermediate_size": 12288,
    "num_attention_heads": 64,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
}
QWEN3_235B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "mlp_only_layers": [],
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
}
GLM_4_5: dict[str, Any] = {
    "model_type": "glm4_moe",
    "first_k_dense_replace": 3,
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 8,
}
LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
LLAMA_8B = LLAMA_70B | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
QWEN3_32B: dict[str, Any] = {
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
QWEN2_57B: dict[str, Any] = {  # Qwen2-57B-A14B
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "mlp_only_layers": [],
    "moe_intermediate_size": 2560,
    "num_attention_heads": 28,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "shared_expert_intermediate_size": 20480,
}
MINIMAX_M2: dict[str, Any] = {
    "model_type": "minimax_m2",
    "head_dim": 128,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "shared_intermediate_size": 0,
}

Table = dict[str, tuple[str, int, int, int | None]]


def experts(groups: int, hidden: int, intermediate: int) -> Table:
    return {
        f"experts {part}, {kind}": (kind, n, k, groups)
        for part, n, k in (("gate + up", 2 * intermediate, hidden), ("down", hidden, intermediate))
        for kind in ("contiguous", "masked")
    }


def dense(**weights: tuple[int, int]) -> Table:
    return {NAMES[name]: ("dense", n, k, None) for name, (n, k) in weights.items()}


NAMES = {
    "a": "attention q_a + kv_a",
    "q_a": "attention q_a",
    "kv_a": "attention kv_a",
    "q": "attention q",
    "q_b": "attention q_b",
    "kv_b": "attention kv_b",
    "qkv": "attention qkv",
    "o": "attention o",
    "index_q": "indexer q_b",
    "index_k": "indexer k",
    "up": "dense gate + up",
    "down": "dense down",
    "shared_up": "shared expert gate + up",
    "shared_down": "shared expert down",
}
V3_A: dict[str, tuple[int, int]] = {"a": (2112, 7168), "q_a": (1536, 7168), "kv_a": (576, 7168)}
V3_ATTENTION = V3_A | {"q_b": (24576, 1536), "kv_b": (32768, 512), "o": (7168, 16384)}
V3_MLPS: dict[str, tuple[int, int]] = {
    "up": (36864, 7168),
    "down": (7168, 18432),
    "shared_up": (4096, 7168),
    "shared_down": (7168, 2048),
}
INDEXER: dict[str, tuple[int, int]] = {"index_q": (8192, 1536), "index_k": (128, 7168)}
WHOLE: dict[str, tuple[dict[str, Any], Table]] = {  # on one rank
    "DeepSeek-V3": (DEEPSEEK_V3, dense(**V3_ATTENTION, **V3_MLPS) | experts(256, 7168, 2048)),
    "DeepSeek-V3.2": (DEEPSEEK_V32, dense(**V3_ATTENTION, **INDEXER, **V3_MLPS) | experts(256, 7168, 2048)),
    "Kimi-K2": (
        KIMI_K2,
        dense(**V3_A, q_b=(12288, 1536), kv_b=(16384, 512), o=(7168, 8192), **V3_MLPS) | experts(384, 7168, 2048),
    ),
    "GLM-5": (
        GLM_5,
        dense(
            a=(2624, 6144),
            q_a=(2048, 6144),
            kv_a=(576, 6144),
            q_b=(16384, 2048),
            kv_b=(28672, 512),
            o=(6144, 16384),
            index_q=(4096, 2048),
            index_k=(128, 6144),
            up=(24576, 6144),
            down=(6144, 12288),
            shared_up=(4096, 6144),
            shared_down=(6144, 2048),
        )
        | experts(256, 6144, 2048),
    ),
    "Qwen3-235B-A22B": (QWEN3_235B, dense(qkv=(9216, 4096), o=(4096, 8192)) | experts(128, 4096, 1536)),
    "GLM-4.5": (
        GLM_4_5,
        dense(
            qkv=(14336, 5120),
            o=(5120, 12288),
            up=(24576, 5120),  # down is as attention o
            shared_up=(3072, 5120),
            shared_down=(5120, 1536),
        )
        | experts(160, 5120, 1536),
    ),
    "Llama-3.1-70B": (
        LLAMA_70B,
        dense(qkv=(10240, 8192), o=(8192, 8192), up=(57344, 8192), down=(8192, 28672)),
    ),
    "Llama-3.1-8B": (LLAMA_8B, dense(qkv=(6144, 4096), o=(4096, 4096), up=(28672, 4096), down=(4096, 14336))),
    "Qwen3-32B": (QWEN3_32B, dense(qkv=(10240, 5120), o=(5120, 8192), up=(51200, 5120), down=(5120, 25600))),
    "Qwen2-57B-A14B": (
        QWEN2_57B,
        dense(qkv=(4608, 3584), o=(3584, 3584), shared_up=(40960, 3584), shared_down=(3584, 20480))
        | experts(64, 3584, 2560),
    ),
    "MiniMax-M2": (MINIMAX_M2, dense(qkv=(8192, 3072), o=(3072, 6144)) | experts(256, 3072, 1536)),
}


def table(layers: tuple[Layer, ...]) -> Table:
    assert len({layer.name for layer in layers}) == len(layers)
    return {layer.name: (layer.kind, layer.n, layer.k, layer.groups) for layer in layers}


def named(config: dict[str, Any], parallel: Parallel = Parallel(), **tokens: int) -> dict[str, Layer]:  # noqa: B008
    return {layer.name: layer for layer in layers_of(config, parallel, **tokens)}


@pytest.mark.parametrize("model", WHOLE)
def test_layers_on_one_rank(model: str) -> None:
    config, want = WHOLE[model]
    layers = layers_of(config, Parallel())
    assert list(table(layers).items()) == list(want.items())  # in this order
    assert layers == layers_of(dict(reversed(config.items())), Parallel())


def test_the_command_line_has_the_same_layers() -> None:
    layers = {(layer.name, layer.n, layer.k) for layer in layers_of(DEEPSEEK_V3, Parallel())}
    assert set(cli.LAYERS) <= layers


def test_split_over_tp() -> None:
    v32 = dense(
        **V3_A,  # whole, as is the indexer
        q_b=(3072, 1536),
        kv_b=(4096, 512),
        o=(7168, 2048),
        **INDEXER,
        up=(4608, 7168),
        down=(7168, 2304),
        shared_up=(512, 7168),
        shared_down=(7168, 256),
    )
    assert table(layers_of(DEEPSEEK_V32, Parallel(tp=8))) == v32 | experts(256, 7168, 256)
    # Whole experts are not split. A rank's part of attention o is as an expert's down, which is of another kind.
    assert table(layers_of(DEEPSEEK_V32, Parallel(tp=8, ep=8))) == v32 | experts(32, 7168, 2048)
    # Of 4 KV heads every rank of 8 has one. 1536 / 8 is no multiple of 128, and need not be.
    qwen = dense(qkv=(1280, 4096), o=(4096, 1024))
    assert table(layers_of(QWEN3_235B, Parallel(tp=8))) == qwen | experts(128, 4096, 192)
    assert table(layers_of(QWEN3_235B, Parallel(tp=4)))["attention qkv"] == ("dense", 2304, 4096, None)
    llama = dense(qkv=(1280, 8192), o=(8192, 1024), up=(7168, 8192), down=(8192, 3584))
    assert table(layers_of(LLAMA_70B, Parallel(tp=8))) == llama
    shared = table(layers_of(QWEN2_57B, Parallel(tp=4)))["shared expert down"]
    assert shared == ("dense", 3584, 5120, None)


def test_rows_of_experts() -> None:
    """ms and max_m: who sends how much to the experts of a rank, and what padding adds."""
    alone = named(DEEPSEEK_V3)
    assert alone["attention o"].ms == (1, 16384) and alone["attention o"].max_m is None
    assert alone["experts down, contiguous"] == Layer(
        "contiguous", 7168, 2048, 256, (1, 16384 * 8 + 256 * 127), None, "experts down, contiguous"
    )
    assert alone["experts down, masked"] == Layer("masked", 7168, 2048, 256, (1, 128), 128, "experts down, masked")
    deployed = named(DEEPSEEK_V3, Parallel(tp=1, ep=32, dp=32), tokens=4096, decode_tokens=64)
    assert deployed["attention o"].ms == (1, 4096) and deployed["attention o"].k == 16384
    up, masked = deployed["experts gate + up, contiguous"], deployed["experts gate + up, masked"]
    assert (up.n, up.k, up.groups, up.ms) == (4096, 7168, 8, (1, 4096 * 32 * 8 + 8 * 127))
    assert (masked.groups, masked.ms, masked.max_m) == (8, (1, 64 * 32), 64 * 32)
    # Two experts of a rank cannot be 8 of a token's; where dp is not given every rank has tokens of its own.
    wide = named(DEEPSEEK_V3, Parallel(ep=128), tokens=100, decode_tokens=16)
    assert wide["experts down, contiguous"].ms == (1, 100 * 128 * 2 + 2 * 127)
    assert wide["experts down, masked"].max_m == 16 * 128
    # Without expert parallelism the replicas send their tokens, and experts are split over all ranks.
    replicas = named(QWEN3_235B, Parallel(tp=2, dp=4), tokens=100, decode_tokens=16)
    assert replicas["experts down, contiguous"].ms == (1, 100 * 4 * 8 + 128 * 127)
    assert replicas["experts down, masked"].ms == (1, 64) and replicas["experts down, masked"].max_m == 64
    assert (replicas["experts down, masked"].groups, replicas["experts down, masked"].k) == (128, 192)


def test_layers_with_a_dense_mlp() -> None:
    for some in (
        {"mlp_only_layers": [0]},
        {"decoder_sparse_step": 2},
        {"moe_layer_freq": 2},
        {"mlp_layer_types": ["dense", "sparse"]},
        {"num_experts": 0},
        {"num_experts": None},
    ):
        assert named(QWEN3_235B | some)["dense gate + up"].n == 2 * 12288, some
        assert ("experts down, masked" in named(QWEN3_235B | some)) == ("num_experts" not in some), some
    for none in ({}, {"first_k_dense_replace": 0}, {"moe_layer_freq": 1}, {"mlp_layer_types": ["sparse"]}):
        assert "dense down" not in named(QWEN3_235B | none), none


def test_shared_experts() -> None:
    assert named(DEEPSEEK_V3 | {"n_shared_experts": 2})["shared expert down"].k == 4096
    assert named(QWEN3_235B | {"num_shared_experts": 2})["shared expert gate + up"].n == 6144
    for none in ({"n_shared_experts": None}, {"n_shared_experts": 0}):
        assert "shared expert down" not in named(DEEPSEEK_V3 | none)
    assert "shared expert down" not in named(QWEN3_235B)


def test_queries_of_full_rank() -> None:
    """DeepSeek-V2-Lite's and Moonlight's, which are split, while kv_a is whole."""
    layers = table(layers_of(DEEPSEEK_V3 | {"q_lora_rank": None}, Parallel(tp=2)))
    want = dense(q=(12288, 7168), kv_a=(576, 7168), kv_b=(16384, 512), o=(7168, 8192))
    assert {name: layers[name] for name in layers if name.startswith("attention")} == want


def test_defaults_of_attention() -> None:
    """Every head has its own keys; heads share the hidden size. null is as good as nothing."""
    few = {name: value for name, value in LLAMA_8B.items() if name != "num_key_value_heads"}
    for config in (few, few | {"num_key_value_heads": None, "head_dim": None, "kv_lora_rank": None}):
        assert named(config)["attention qkv"].n == 3 * 4096
    assert named(few | {"head_dim": 256})["attention qkv"].n == 3 * 32 * 256
    assert named(few | {"head_dim": 256})["attention o"].k == 32 * 256


def test_identical_layers_are_listed_once() -> None:
    layers = layers_of(LLAMA_8B | {"intermediate_size": 2048}, Parallel())
    assert [layer.name for layer in layers] == ["attention qkv", "attention o", "dense down"]
    layers = layers_of(DEEPSEEK_V32, Parallel(tp=2, ep=4, dp=3))
    assert len({replace(layer, name="") for layer in layers}) == len(layers)


def test_an_unknown_model_with_known_fields() -> None:
    config = DEEPSEEK_V3 | {"model_type": "of tomorrow", "novelty": {"linear": 1}, "hidden_size": np.int64(7168)}
    layers = layers_of(config, Parallel())
    assert layers == layers_of(DEEPSEEK_V3, Parallel())
    assert {type(size) for layer in layers for size in (layer.n, layer.k)} == {int}


SHAPE = "pass N and K of its layers with --shape"
FIELDS = f"expected the fields of DeepSeek-V3, GLM, Qwen3 or Llama: {SHAPE}"
V3 = "the config of model_type 'deepseek_v3'"
QWEN = "the config of model_type 'qwen3_moe'"
LLAMA = "the config of model_type 'llama'"


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize(
    ("config", "parallel", "message"),
    [
        *(
            (
                without(config, name),
                {},
                f"{owner} has no {name}, expected a positive whole number: add it, or {SHAPE}",
            )
            for config, owner, names in (
                (DEEPSEEK_V3, V3, ["hidden_size", "num_attention_heads", "intermediate_size", "moe_intermediate_size"]),
                (DEEPSEEK_V3, V3, ["num_experts_per_tok", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]),
                (QWEN3_235B, QWEN, ["hidden_size", "moe_intermediate_size", "num_experts_per_tok"]),
                (LLAMA_70B, LLAMA, ["hidden_size", "num_attention_heads", "intermediate_size"]),
            )
            for name in names
        ),
        (
            without(MINIMAX_M2, "intermediate_size"),
            {},
            "the config of model_type 'minimax_m2' has no moe_intermediate_size or intermediate_size, expected a "
            f"positive whole number: add it, or {SHAPE}",
        ),
        (
            {},
            {},
            f"the config of model_type None has no hidden_size, expected a positive whole number: add it, or {SHAPE}",
        ),
        (
            DEEPSEEK_V32 | {"q_lora_rank": None},
            {},
            "the config of model_type 'deepseek_v32' has no q_lora_rank, expected a positive whole number: add it, "
            f"or {SHAPE}",
        ),
        (
            without(DEEPSEEK_V32, "index_head_dim"),
            {},
            "the config of model_type 'deepseek_v32' has no index_head_dim, expected a positive whole number: add "
            f"it, or {SHAPE}",
        ),
        *(
            (
                config | {name: value},
                {},
                f"{name} is {value!r} in {owner}, expected a whole number from {least} on: mend it, or {SHAPE}",
            )
            for config, owner, name, value, least in (
                (LLAMA_70B, LLAMA, "hidden_size", 0, 1),
                (LLAMA_70B, LLAMA, "hidden_size", 8192.0, 1),
                (LLAMA_70B, LLAMA, "num_attention_heads", "64", 1),
                (LLAMA_70B, LLAMA, "num_key_value_heads", 0, 1),
                (LLAMA_70B, LLAMA, "head_dim", -128, 1),
                (LLAMA_70B, LLAMA, "intermediate_size", [28672], 1),
                (LLAMA_70B, LLAMA, "intermediate_size", True, 1),
                (DEEPSEEK_V3, V3, "kv_lora_rank", 0, 1),
                (DEEPSEEK_V3, V3, "n_routed_experts", -1, 0),
                (DEEPSEEK_V3, V3, "n_shared_experts", 0.5, 0),
                (DEEPSEEK_V3, V3, "first_k_dense_replace", "3", 0),
                (DEEPSEEK_V3, V3, "num_experts_per_tok", 0, 1),
                (QWEN3_235B, QWEN, "decoder_sparse_step", [1], 0),
            )
        ),
        *(
            (config | {name: value}, {}, f"{owner} has {name}, {FIELDS}")
            for config, owner, name, value in (
                (LLAMA_70B, LLAMA, "moe_num_experts", 64),
                (LLAMA_70B, LLAMA, "moe_topk", 8),
                (LLAMA_70B, LLAMA, "num_experts_per_tok", 8),
                (QWEN3_235B, QWEN, "linear_num_value_heads", 32),
                (QWEN3_235B, QWEN, "mamba_num_heads", 64),
                (QWEN3_235B, QWEN, "swa_head_dim", 192),
                (QWEN3_235B, QWEN, "o_lora_rank", 1024),
                (QWEN3_235B, QWEN, "intermediate_size_mlp", 16384),
            )
        ),
        *(
            (config, parallel, f"{what}: choose another --{axis}")
            for config, parallel, axis, what in (
                (DEEPSEEK_V3, {"tp": 3}, "tp", "num_attention_heads is 128, expected a multiple of tp 3"),
                (GLM_4_5, {"tp": 12}, "tp", "num_key_value_heads is 8, expected a multiple or a divisor of tp 12"),
                (
                    LLAMA_8B | {"intermediate_size": 14340},
                    {"tp": 8},
                    "tp",
                    "intermediate_size is 14340, expected a multiple of tp 8",
                ),
                (
                    QWEN2_57B | {"shared_expert_intermediate_size": 20482},
                    {"tp": 4},
                    "tp",
                    "the intermediate size of the shared experts is 20482, expected a multiple of tp 4",
                ),
                (
                    QWEN3_235B | {"moe_intermediate_size": 1540},
                    {"tp": 8},
                    "tp or --dp",
                    "the intermediate size of the routed experts is 1540, expected a multiple of tp * dp 8",
                ),
                (GLM_4_5, {"ep": 64}, "ep", "the number of routed experts is 160, expected a multiple of ep 64"),
                (GLM_4_5, {"ep": 320}, "ep", "the number of routed experts is 160, expected a multiple of ep 320"),
            )
        ),
        (
            LLAMA_8B | {"hidden_size": 4100},
            {},
            "hidden_size is 4100, expected a multiple of num_attention_heads 32: add head_dim to the config",
        ),
        (
            LLAMA_8B | {"head_dim": 1, "num_attention_heads": 16, "num_key_value_heads": 2},
            {},
            "attention qkv, tp 1, ep 1, dp 1: N is 20, expected a multiple of 8: pad b, its scales and d, and slice "
            "the result",
        ),
        (
            QWEN3_235B | {"moe_intermediate_size": 1408},
            {"tp": 8, "dp": 2},
            "experts down, contiguous, tp 8, ep 1, dp 2: K is 88, expected a positive multiple of 16: pad a and b "
            "with zeros",
        ),
        (
            DEEPSEEK_V3,
            {"ep": 32, "dp": 2**14},
            "experts gate + up, contiguous, tp 1, ep 32, dp 16384: M, N, K are 2147484664, 4096, 7168, expected less "
            "than 2^31 each: multiply in parts",
        ),
    ],
)
def test_rejected_configs(config: dict[str, Any], parallel: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{re.escape(message)}$"):
        layers_of(config, Parallel(**parallel))


def test_fields_that_say_nothing_are_no_obstacle() -> None:
    nothing = {"num_experts_per_tok": None, "moe_layer_freq": 0, "linear_attn_config": None, "swa_head_dim": 0}
    assert layers_of(LLAMA_8B | nothing, Parallel()) == layers_of(LLAMA_8B, Parallel())


@pytest.mark.parametrize("value", [0, -8, 1.0, "8", True, None])
def test_rejected_parallelism(value: Any) -> None:
    for name in ("tp", "ep", "dp"):
        message = f"{name} is {value!r}, expected a positive whole number: 1 is one rank, no parallelism"
        with pytest.raises(InvalidInputError, match=f"^{re.escape(message)}$"):
            Parallel(**{name: value})
    for name, what in (("tokens", "forward pass"), ("decode_tokens", "step of decode")):
        message = f"{name} is {value!r}, expected a positive whole number: the most of one {what} on a rank"
        with pytest.raises(InvalidInputError, match=f"^{re.escape(message)}$"):
            layers_of(LLAMA_8B, Parallel(), **{name: value})


def test_read_a_file_or_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(DEEPSEEK_V3 | {"author": "深度求索"}, ensure_ascii=False), encoding="utf-8")
    assert read(file) == read(tmp_path) == DEEPSEEK_V3 | {"author": "深度求索"}
    other = tmp_path / "glm.json"
    other.write_text(json.dumps(GLM_4_5))
    assert read(other) == GLM_4_5


def test_read_a_wrapper(tmp_path: Path) -> None:
    """Kimi-K2.5's numbers are those of its text_config; where that has none, the outer ones hold."""
    file = tmp_path / "config.json"
    wrapper = {"model_type": "kimi_k25", "text_config": KIMI_K2, "vision_config": {"hidden_size": 1152}}
    file.write_text(json.dumps(wrapper))
    assert layers_of(read(file), Parallel()) == layers_of(KIMI_K2, Parallel())
    file.write_text(json.dumps(wrapper | {"hidden_size": 1}))
    assert read(tmp_path) == KIMI_K2
    for inner in ({"model_type": "llama"}, None, ["hidden_size"]):
        file.write_text(json.dumps(LLAMA_8B | {"text_config": inner}))
        assert read(tmp_path) == LLAMA_8B | {"text_config": inner}


def test_rejected_files(tmp_path: Path) -> None:
    def rejects(path: Path, message: str) -> None:
        with pytest.raises(InvalidInputError, match=f"^{re.escape(message)}"):
            read(path)

    file = tmp_path / "config.json"
    cannot = "cannot be read, expected a model's config.json or the folder it is in: "
    rejects(file, f"{file} {cannot}No such file or directory")
    rejects(tmp_path, f"{file} {cannot}No such file or directory")
    file.write_text('{"hidden_size": 7168,')
    rejects(file, f"{file} is not JSON, expected a model's config.json: Expecting property name")
    file.write_bytes(b"\xff\xfe\x00")
    rejects(tmp_path, f"{file} is not JSON, expected a model's config.json: 'utf-8' codec can't decode")
    file.write_text("[1, 2]")
    rejects(file, f"{file} holds a list, expected an object: pass the config.json of a model")
    file.unlink()
    file.mkdir()
    rejects(tmp_path, f"{file} {cannot}Is a directory")
