"""Writes docs/api.md, all that is public, from docstrings: `python docs/api.py`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from textwrap import dedent
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
ALL = ("*",)
WIDTH = 100  # a longer signature has a line for every parameter
INTRODUCTION = """\
Written by `python docs/api.py` from the docstrings: change those, not this page. Names stand as they follow
`deep_gemm.`, and `Pair` for `tuple[torch.Tensor, torch.Tensor]`, values and scales. `[M, K]` is a shape, in elements,
`[.., M, K]` one with any dimensions before. E4M3 is `torch.float8_e4m3fn`, FP32 `torch.float32`, BF16 `torch.bfloat16`,
int32 `torch.int32`. `deep_gemm.__version__` is the version, a `str`."""
BLOCK = re.compile(r"(?:^|\n|(?<=\. ))(Args|Attributes|Returns|Result|Raises|Source):(?: |\n)")
ITEM = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*)((?: \([^)]*\))?): ")
CODE = re.compile(r"(`[^`]+`|\b[A-Z]\w*Error\b|https?://\S+)")
OLDER = re.compile(r"`\w+` under the name of")


class Entry(NamedTuple):
    """A public function or class, and its names behind `deep_gemm.`; the first is the one it was defined by."""

    name: str
    others: list[str]
    thing: Any
    heading: str


class Section(NamedTuple):
    """All that is public and lives in a module, which need not be there yet. Its docstring opens the section.

    own: what is public there, though not in `deep_gemm.__all__`. ALL: what the module's `__all__` has, or else all that
    it defines without an underscore. body: writes what comes below the docstring.
    """

    heading: str
    module: str = ""
    own: tuple[str, ...] = ()
    body: Callable[[list[Entry]], Iterator[str]] = lambda entries: described(entries)


def described(entries: list[Entry]) -> Iterator[str]:
    for name, others, thing, _ in entries:
        bases = [base.__name__ for base in getattr(thing, "__bases__", ()) if base is not object]
        yield from (f"### `{name}`", signature(name, thing), code_names("Bases", bases), markdown(thing.__doc__))
        yield code_names("Also as", sorted(others))
        for method, member in methods(thing).items():
            yield signature(f"{thing.__name__}.{method}", getattr(thing, method), isinstance(member, FunctionType))
            yield markdown(member.__doc__)


def code_names(title: str, names: list[str]) -> str:
    return f"{title}: {', '.join(inline(f'`{name}`') for name in names)}" if names else ""


def operators(entries: list[Entry]) -> Iterator[str]:
    import torch

    # torch.ops lists those alone that were called.
    schemas = sorted(str(s).partition("::")[2] for s in torch._C._jit_get_all_schemas() if "deep_gemm::" in str(s))
    rows = (schema.partition("(") for schema in schemas)
    yield table("`torch.ops.deep_gemm`", "schema", ((f"`{name}`", f"`({rest}`") for name, _, rest in rows))


def elsewhere(entries: list[Entry]) -> Iterator[str]:
    utils = importlib.import_module("deep_gemm.utils")
    inner = [x for x in map(vars(utils).get, utils.__all__) if isinstance(x, ModuleType)]
    for module in (utils, *inner):
        names = (f"`{name}`" for name in module.__all__ if vars(module)[name] not in inner)
        yield f"`{module.__name__}`: {', '.join(names)}."


def refused(entries: list[Entry]) -> Iterator[str]:
    rows: dict[str, list[str]] = {}
    for entry in entries:
        rows.setdefault(refusal(entry.thing).rpartition("is not offered: ")[2], []).append(f"`{entry.name}`")
    yield "Names of DeepGEMM that can be imported and looked for. A call raises `NotImplementedError`, which says:"
    callable_names = re.compile(r"\b\w+_gemm_\w+")
    texts = (inline(callable_names.sub(r"`\g<0>`", text)) for text in rows)
    yield table("name", "instead", zip(map(", ".join, rows.values()), texts, strict=True))


def table(left: str, right: str, rows: Iterable[tuple[str, str]]) -> str:
    return f"| {left} | {right} |\n|---|---|\n" + "\n".join(f"| {x} | {y} |" for x, y in rows)


SECTIONS = (
    Section("Multiplications", "gemm"),
    Section("Older names", "compat"),
    Section("Quantisation", "quantize"),
    Section("Layouts", "layout"),
    Section("Settings", "config"),
    Section("Kernels of a deployment", "deployment", ("Layer", "Kernel")),
    Section("Layers", "nn", ALL),
    Section("Functions", "functional", ("linear", "grouped_linear")),
    Section("Operators of PyTorch", "operators", body=operators),
    Section("Testing", "testing", ALL),
    Section("Errors", "errors", ALL),
    Section("The same by other paths", "utils", body=elsewhere),
    Section("Known, not offered", body=refused),
)


def public() -> list[Entry]:
    """Everything public once, in the order of the source. Raises: LookupError for what falls under no section."""
    package = importlib.import_module("deep_gemm")
    names = {name: getattr(package, name) for name in package.__all__ if name != "__version__"}
    modules = []
    for section in SECTIONS:
        if module := module_of(section):
            modules.append(module)
            own = section.own if section.own != ALL else getattr(module, "__all__", None) or defined_in(module)
            names |= {f"{section.module}.{name}": getattr(module, name) for name in own}
    found: dict[int, Entry] = {}
    for name, thing in sorted(names.items(), key=lambda x: (not x[0].endswith(x[1].__name__), x[0].count("."), x[0])):
        if id(thing) in found:
            found[id(thing)].others.append(name)
        elif thing not in modules:
            found[id(thing)] = Entry(name, [], thing, heading_of(name, thing))
    return sorted(
        found.values(), key=lambda x: (x.thing.__module__, inspect.getsourcelines(inspect.unwrap(x.thing))[1])
    )


def module_of(section: Section) -> ModuleType | None:
    name = f"deep_gemm.{section.module}"
    return importlib.import_module(name) if section.module and importlib.util.find_spec(name) else None


def defined_in(module: ModuleType) -> list[str]:
    """The public functions and classes that are the module's own."""
    return [
        name
        for name, x in vars(module).items()
        if isinstance(x, (FunctionType, type)) and x.__module__ == module.__name__ and not name.startswith("_")
    ]


def heading_of(name: str, thing: Any) -> str:
    home = f"{getattr(thing, '__module__', '')}."
    if refusal(thing):
        return SECTIONS[-1].heading
    if OLDER.match(thing.__doc__ or ""):
        home = "deep_gemm.compat."
    for section in SECTIONS:
        if section.module and home.startswith(f"deep_gemm.{section.module}."):
            return section.heading
    raise LookupError(f"deep_gemm.{name} falls under no section, expected its module in SECTIONS of docs/api.py")


def refusal(thing: Any) -> str:
    """What a function says that does nothing else."""
    if re.match(r"(Not offered\. )?Raises: NotImplementedError", thing.__doc__ or ""):
        parameters = inspect.signature(thing).parameters.values()
        try:
            thing(*(None for x in parameters if x.kind == x.POSITIONAL_OR_KEYWORD))
        except NotImplementedError as error:
            return str(error)
    return ""


def methods(thing: Any) -> dict[str, Any]:
    """What a class has that is public; what it overrides without a docstring is documented where it comes from."""
    found: dict[str, Any] = {}
    owners = [x for x in getattr(thing, "__mro__", ()) if x.__module__.startswith("deep_gemm.")]
    foreign = {name for x in getattr(thing, "__mro__", ()) if x not in owners for name in vars(x)}
    for name, member in (item for owner in owners for item in vars(owner).items()):
        kinds = (FunctionType, property, classmethod, staticmethod)
        if isinstance(member, kinds) and name[0] != "_" and (member.__doc__ or name not in foreign):
            found.setdefault(name, member)
    return found


class Written(str):
    """An annotation as the source has it, which `from __future__ import annotations` makes a string."""

    __repr__ = str.__str__


def signature(name: str, thing: Any, method: bool = False) -> str:
    """As a block of code. method: without its first parameter, self."""
    if isinstance(thing, property):
        return f"```python\n{name}: {thing.fget.__annotations__['return']}\n```"
    is_class = isinstance(thing, type)
    if is_class and not any("__init__" in vars(x) for x in thing.__mro__ if x.__module__.startswith("deep_gemm.")):
        return ""
    found, parts = inspect.signature(thing), []
    for p in list(found.parameters.values())[method:]:
        if p.kind == p.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        parts.append(str(p.replace(annotation=Written(p.annotation)) if isinstance(p.annotation, str) else p))
    returns = f" -> {found.return_annotation}" if isinstance(found.return_annotation, str) and not is_class else ""
    line = f"{name}({', '.join(parts)}){returns}"
    if len(line) > WIDTH:
        line = f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"
    return f"```python\n{line}\n```"


def markdown(docstring: str | None) -> str:
    """A docstring's paragraphs; its blocks (Args: and such) as lists, what is indented by itself as it stands."""
    written = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring or "")):
        if all(line.startswith("    ") for line in paragraph.split("\n")):
            written.append(f"```text\n{dedent(paragraph)}\n```")
            continue
        text, *blocks = BLOCK.split(paragraph)
        written.append(inline(text.strip()))
        for title, body in zip(blocks[::2], blocks[1::2], strict=True):
            written += [f"**{title}**", "\n".join(f"- {listed(item)}" for item in items(body))]
    return "\n\n".join(filter(None, written))


def items(block: str) -> list[str]:
    """Those of a block, which are indented, or the one behind its title."""
    found = re.split(r"\n(?=\S)", dedent(block)) if block.startswith(" ") else [block]
    return ["\n  ".join(line.strip() for line in item.strip().split("\n")) for item in found]


def listed(item: str) -> str:
    head = ITEM.match(item)
    if not head:
        return inline(item)
    names = ", ".join(inline(f"`{name}`") for name in head[1].split(", "))
    return f"{names}{inline(head[2])}: {inline(item[head.end() :])}"


def inline(text: str) -> str:
    """Prose, with what Markdown would take for its own escaped; code names that have an entry lead there."""
    pieces = CODE.split(text)
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            piece = re.sub(r"[*<]|(?<!\w)_|_(?!\w)|(?<=\])(?=\()", lambda special: f"\\{special[0]}", piece)
            pieces[i] = re.sub(r"(?m)^(\d*)([-+#>.] )", r"\1\\\2", piece)  # would be lists and such
        elif not piece.startswith("http"):
            code = piece.strip("`")
            name = code.partition("(")[0]
            pieces[i] = f"[`{code}`](#{anchors()[name]})" if name in anchors() else f"`{code}`"
    return "".join(pieces)


@lru_cache
def anchors() -> dict[str, str]:
    """Where on the page every name is described."""
    found: dict[str, str] = {}
    for entry in public():
        if entry.heading != SECTIONS[-1].heading:
            for name in (entry.name, *entry.others):
                found[name] = anchor_of(entry.name)
                found.setdefault(name.rpartition(".")[2], anchor_of(entry.name))
    return found


def anchor_of(heading: str) -> str:
    """What GitHub makes of it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def page() -> str:
    everything, contents, parts = public(), [], []
    for section in SECTIONS:
        module, entries = module_of(section), [x for x in everything if x.heading == section.heading]
        if entries or module:
            contents.append(f"- [{section.heading}](#{anchor_of(section.heading)})")
            parts += [f"## {section.heading}", markdown(module and module.__doc__), *section.body(entries)]
    return "\n\n".join(filter(None, ["# API", INTRODUCTION, "\n".join(contents), *parts])) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page())
