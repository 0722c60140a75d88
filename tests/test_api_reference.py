"""docs/api/: it has every public name once, and the docstrings that it shows say what the site's readers need.

`make docs` builds the site; these tests need nothing of it.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "api"
PACKAGES = ("sdattn_fast", "sdattn_fast.guidance", "sdattn_fast.training", "sdattn_fast.tuning")
BLOCK = re.compile(r"^::: (\S+)$((?:\n(?: .*)?$)*)", re.MULTILINE)
SECTIONS = ("Args", "Attributes", "Examples", "Raises", "Returns", "Warns", "Yields")
# Its docstring goes with the backend's files; the page says the rest.
SAID_ON_PAGE = {"backends"}


def resolved(name: str) -> Any:
    """The object of a dotted name."""
    for parts in range(name.count(".") + 1, 0, -1):
        path = name.split(".")
        try:
            found = importlib.import_module(".".join(path[:parts]))
        except ModuleNotFoundError:
            continue
        for attribute in path[parts:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


def blocks() -> list[tuple[str, str]]:
    """(name, options) of every block of mkdocstrings."""
    return [(b[1], b[2]) for page in sorted(FOLDER.glob("*.md")) for b in BLOCK.finditer(page.read_text("utf-8"))]


def shown() -> Iterator[tuple[str, Any]]:
    """Everything that the reference shows: the objects, and their public methods and properties."""
    for name, options in blocks():
        found = resolved(name)
        yield name, found
        if not inspect.isclass(found):
            continue
        chosen = re.search(r"members: \[(.*)\]", options)
        members = chosen[1].split(", ") if chosen else [m for m in vars(found) if not m.startswith("_")]
        for member in members:
            x = inspect.getattr_static(found, member)
            x = x.__func__ if isinstance(x, (classmethod, staticmethod)) else x
            if inspect.isfunction(x) or isinstance(x, property):
                yield f"{name}.{member}", x


def section(text: str, title: str) -> str:
    """A section of a docstring without its title, empty where there is none."""
    found = re.search(rf"^{title}:\n((?: .*\n|\n)+)", f"{text}\n", re.MULTILINE)
    return found[1] if found else ""


def parameters(x: Any) -> list[str]:
    """The parameters of a function or of a class's constructor, as a docstring writes them."""
    found = inspect.signature(x).parameters.values()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [stars.get(p.kind, "") + p.name for p in found if p.name not in ("self", "cls")]


def check(of: Callable[[str, Any], list[str]]) -> None:
    missing = [f"{name}: {what}" for name, x in shown() for what in of(name, x)]
    assert not missing, "\n".join(["", *missing])


def test_every_public_name_is_in_one_block():
    of_blocks = [resolved(name) for name, _ in blocks()]
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            count = sum(x is getattr(package, name) for x in of_blocks)
            assert count == 1, f"{package.__name__}.{name} is in {count} blocks of {FOLDER.name}/"
    assert len({name for name, _ in blocks()}) == len(of_blocks)


@pytest.mark.parametrize("name", [name for name, _ in blocks()])
def test_every_block_names_something(name: str):
    resolved(name)


def test_everything_has_a_docstring_of_its_own():
    check(lambda name, x: [] if (x.__doc__ or "").strip() else ["no docstring"])


def test_every_parameter_is_described():
    def undescribed(name: str, x: Any) -> list[str]:
        text = inspect.getdoc(x) or ""
        if isinstance(x, property) or (inspect.isclass(x) and name.endswith((".Patch", "Maps"))):
            return []  # nobody but the package makes a Patch or Maps
        described = re.findall(r"^    (\*{0,2}\w+): \S", section(text, "Args") + section(text, "Attributes"), re.M)
        return [f"parameter {p}" for p in parameters(x) if p not in described]

    check(undescribed)


def test_functions_say_what_they_return():
    def unsaid(name: str, x: Any) -> list[str]:
        if not inspect.isfunction(x) or x.__name__ in SAID_ON_PAGE:
            return []
        if str(inspect.signature(x).return_annotation) == "None":
            return []
        text = inspect.getdoc(x) or ""
        return [] if section(text, "Returns") or section(text, "Yields") else ["no section Returns"]

    check(unsaid)


def test_public_names_have_examples_and_all_examples_parse():
    public = {id(getattr(p, name)) for p in map(importlib.import_module, PACKAGES) for name in p.__all__}

    def broken(name: str, x: Any) -> list[str]:
        text = inspect.getdoc(x) or ""
        examples = doctest.DocTestParser().get_examples(text)
        if not examples and id(x) in public and x.__name__ not in SAID_ON_PAGE:
            return ["no example"]
        for example in examples:
            ast.parse(example.source)
        return []

    check(broken)


def test_sections_are_written_as_the_site_reads_them():
    def odd(name: str, x: Any) -> list[str]:
        text = inspect.getdoc(x) or ""
        titles = "|".join((*SECTIONS, "Arg", "Arguments", "Example", "Note", "Parameters", "Return", "Yield"))
        found = re.findall(rf"^\s*((?:{titles})\b:.*)$", text, re.MULTILINE)
        return [f"section {line!r}" for line in found if line.removesuffix(":") not in SECTIONS]

    check(odd)
