"""The pages of docs/: what they link to and what cites them exists, and the design's example gives what it shows."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdattn_fast import __version__

ROOT = Path(__file__).parents[1]
DESIGN = ROOT / "docs" / "design.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/results/*.md")])
SOURCES = sorted(
    path
    for folder in ("benchmarks", "csrc", "kernels", "sdattn_fast", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".h", ".cuh", ".cu", ".inl", ".cpp") and path != Path(__file__)
)
TITLE = r'(?:,| and)\s*(?://|#)?\s*"([^"]+)"'


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)


def citations() -> Iterator[tuple[Path, list[str]]]:
    """Every mention of the design in a source file, with the titles of the sections that it names."""
    for path in SOURCES:
        for mention in re.finditer(rf"docs/design\.md((?:{TITLE})*)", path.read_text()):
            yield path, [" ".join(title.split()) for title in re.findall(TITLE, mention[1])]


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_citation_names_a_section_of_the_design():
    known = set(headings(DESIGN))
    cited = list(citations())
    assert len(cited) > 30
    for path, titles in cited:
        assert titles, f"{path.relative_to(ROOT)} cites the design without a section"
        assert set(titles) <= known, f"{path.relative_to(ROOT)} cites {set(titles) - known}"


def test_the_definition_has_every_step_in_order():
    steps = [heading for heading in headings(DESIGN) if heading.startswith("Step ")]
    assert [step.split(":")[0] for step in steps] == [f"Step {n}" for n in range(1, 9)]
    reference = (ROOT / "sdattn_fast/reference.py").read_text()
    for step in steps:
        assert re.search(rf"^\s*# {step}\.", reference, re.MULTILINE), step


def test_the_worked_example():
    result = doctest.testfile(str(DESIGN), module_relative=False)
    assert result.attempted >= 12 and result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, place = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        if place:
            assert place in map(anchor, headings(target)), f"{page.name}: {link}"


def test_the_citation_is_of_this_version():
    cited = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {__version__}\n" in cited and "license: Apache-2.0" in cited


def test_files_that_the_design_names_exist():
    text = DESIGN.read_text()
    named = re.findall(r"`((?:sdattn_fast|benchmarks|unet|guidance|csrc)/[\w/.]*)`|`(plan\.py)`", text)
    assert len(named) > 6
    for path in (one or other for one, other in named):
        assert (ROOT / path).exists() or (ROOT / "sdattn_fast" / path).exists(), path
