"""docs/api.md is what docs/api.py makes of the docstrings, and those say what a caller has to know."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import deep_gemm

ROOT = Path(__file__).resolve().parents[1]
SHAPE = re.compile(r"\[[^\]]*\]")
DTYPE = re.compile(r"\b(FP32|FP16|BF16|E4M3|int32|int64|bool|dtype|dtypes)\b")
REFERENCE = re.compile(r"\bas (?:for |in )?`(?:\w+\.)*(\w+)`|`(?:\w+\.)*(\w+)` (?:with|under)")


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


api = _load("api")
ENTRIES = {entry.name: entry for entry in api.public()}


def callables() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """What can be called, with the docstrings that speak of it: a class's are its own and that of __init__."""
    for name, entry in ENTRIES.items():
        if entry.heading in ("Errors", "Known, not offered"):
            continue
        doc = inspect.getdoc(entry.thing) or ""
        if not isinstance(entry.thing, type):
            yield name, entry.thing, doc
            continue
        yield name, entry.thing, f"{doc}\n\n{inspect.cleandoc(entry.thing.__init__.__doc__ or '')}"
        for method, member in api.methods(entry.thing).items():
            if not isinstance(member, property):
                own = inspect.cleandoc(member.__doc__ or "")
                yield f"{name}.{method}", getattr(entry.thing, method), f"{own}\n\n{doc}"


def with_references(doc: str) -> str:
    """A docstring, and those of the functions that it refers to."""
    docs, wanted = [doc], [doc]
    while wanted:
        for name in filter(None, (x for pair in REFERENCE.findall(wanted.pop()) for x in pair)):
            thing = next((e.thing for e in ENTRIES.values() if name in (e.name.rpartition(".")[2], *e.others)), None)
            if thing is not None and (other := inspect.getdoc(thing) or "") not in docs:
                docs.append(other)
                wanted.append(other)
    return "\n\n".join(docs)


def arguments(doc: str) -> dict[str, str]:
    """What is said of each name in Args and Attributes."""
    found: dict[str, str] = {}
    for paragraph in re.split(r"\n\s*\n", doc):
        _, *blocks = api.BLOCK.split(paragraph)
        for title, body in zip(blocks[::2], blocks[1::2], strict=True):
            for head, item in ((api.ITEM.match(item), item) for item in api.items(body)):
                if title in ("Args", "Attributes") and head:
                    for name in head[1].split(", "):
                        found[name] = f"{found.get(name, '')} {item[head.end() :]}"
    return found


def gaps(function: Callable[..., Any], doc: str) -> set[str]:
    """What the docstrings lack: "docstring", "Raises" or the name of a parameter, ":shape" or ":dtype" behind it."""
    doc = with_references(doc)
    missing = set() if doc.strip() else {"docstring"}
    described = arguments(doc)
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "self":
            continue
        prose = " ".join(re.findall(rf"\b{name}\b\|? \[[^;\n]*", doc))
        if not re.search(r"Tensor|Pair|Weight", str(parameter.annotation)):
            missing |= set() if name in described or re.search(rf"\b{name}\b", doc) else {name}
        elif not (text := described.get(name, "") + prose):
            missing.add(name)
        else:
            missing |= set() if SHAPE.search(text) else {f"{name}:shape"}
            missing |= set() if DTYPE.search(text) else {f"{name}:dtype"}
            missing |= set() if "Raises:" in doc else {"Raises"}
    return missing


def test_the_page_is_fresh():
    assert api.PAGE.read_text() == api.page(), "docs/api.md is not what the docstrings say: run `python docs/api.py`"


@pytest.mark.parametrize(("name", "function", "doc"), [pytest.param(*x, id=x[0]) for x in callables()])
def test_docstrings_are_whole(name: str, function: Callable[..., Any], doc: str):
    assert sorted(gaps(function, doc)) == [], f"what {name} lacks"


def test_all_that_is_public_has_a_docstring():
    things = {name: entry.thing for name, entry in ENTRIES.items()}
    things |= {f"{name}.{x}": member for name, thing in things.items() for x, member in api.methods(thing).items()}
    made = {name: f"{getattr(thing, '__name__', '')}(" for name, thing in things.items()}  # by dataclasses themselves
    assert [x for x, thing in things.items() if not thing.__doc__ or thing.__doc__.startswith(made[x])] == []


def test_every_public_name_has_its_place():
    listed = {name for entry in ENTRIES.values() for name in (entry.name, *entry.others)}
    modules = {section.module for section in api.SECTIONS}
    assert set(deep_gemm.__all__) - {"__version__"} <= listed | modules
    assert all(f"`{name}`" in api.PAGE.read_text() for name in listed)


def test_links_lead_somewhere():
    page = api.page()
    headings = {api.anchor_of(heading.strip("`")) for heading in re.findall(r"(?m)^##+ (.*)$", page)}
    links = set(re.findall(r"\]\(#([^)]*)\)", page))
    assert "fp8_gemm_nt" in links and links <= headings


def test_a_name_without_a_section_is_an_error(monkeypatch: pytest.MonkeyPatch):
    def stray() -> None:
        """Nothing."""

    monkeypatch.setattr(deep_gemm, "stray", stray, raising=False)
    monkeypatch.setattr(deep_gemm, "__all__", [*deep_gemm.__all__, "stray"])
    with pytest.raises(LookupError, match=r"^deep_gemm\.stray falls under no section, "):
        api.public()


def test_a_module_without_a_section_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deep_gemm, "__all__", [*deep_gemm.__all__, "errors", "settings"])
    with pytest.raises(LookupError, match=r"^deep_gemm\.settings falls under no section, "):
        api.public()


def test_gaps_are_found():
    def call(x: torch.Tensor, mask: torch.Tensor, count: int, scale: float) -> None: ...

    assert gaps(call, "") == {"docstring", "x", "mask", "count", "scale"}
    doc = "x [M, K] times scale.\n\nArgs:\n    mask: int32, of the rows."
    assert gaps(call, doc) == {"x:dtype", "mask:shape", "count", "Raises"}
    doc = "x [M, K] FP32, times scale.\n\nArgs:\n    mask: int32 [M].\n    count: of rows.\n\nRaises: as `fp8_gemm_nt`."
    assert gaps(call, doc) == set()
    assert gaps(deep_gemm.fp8_gemm_nn, "This is as `fp8_gemm_nt`.") == set()


def test_markdown():
    docstring = """x * 2 for `fp8_gemm_nt`, of _x and <y>.

        a    b [M](K)

    Args:
        x, y (once z): BF16 [M, K],
            any strides.
        The others as there.

    - no list. Raises: InvalidInputError for none.
    Source: https://docs.nvidia.com/a_*
    """
    assert api.markdown(docstring) == (
        "x \\* 2 for [`fp8_gemm_nt`](#fp8_gemm_nt), of \\_x and \\<y>.\n\n"
        "```text\na    b [M](K)\n```\n\n"
        "**Args**\n\n- `x`, `y` (once z): BF16 [M, K],\n  any strides.\n- The others as there.\n\n"
        "\\- no list.\n\n**Raises**\n\n- [`InvalidInputError`](#errorsinvalidinputerror) for none.\n\n"
        "**Source**\n\n- https://docs.nvidia.com/a_*"
    )


def test_signatures():
    class Layer:
        """One."""

        def forward(self, x: torch.Tensor, *sizes: int, scale: float | None = None, **more: object) -> torch.Tensor: ...

    def call(name: str = "nk", *, sizes: tuple[int, ...] = (1, 128), other=None) -> None: ...

    assert api.signature("call", call) == (
        "```python\ncall(name: str = 'nk', *, sizes: tuple[int, ...] = (1, 128), other=None) -> None\n```"
    )
    assert api.signature("Layer.forward", Layer.forward, method=True) == (
        "```python\nLayer.forward(\n    x: torch.Tensor,\n    *sizes: int,\n    scale: float | None = None,\n"
        "    **more: object,\n) -> torch.Tensor\n```"
    )
    assert api.signature("Layer", Layer) == ""
    assert "b: Pair" in api.signature("fp8_gemm_nt", deep_gemm.fp8_fp4_gemm_nt)
    assert "grouped_layout: torch.Tensor," in api.signature("x", deep_gemm.m_grouped_fp8_gemm_nt_contiguous)  # wrapped
