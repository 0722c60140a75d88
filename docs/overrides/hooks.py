"""MkDocs hooks of the site: links that lead out of docs/, and links in the API reference."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.utils import get_relative_url
from pymdownx.slugs import slugify

_API = "api/"
_LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s]+)\)")
_TITLE = re.compile(r'(?:"|&quot;)([^"&]+)(?:"|&quot;)')
_CITATION = re.compile(rf"docs/(\w+\.md)((?:(?:,| and)\s*{_TITLE.pattern})*)")
_ARXIV = re.compile(r"arXiv\s+(\d{4}\.\d{4,5})")
_NAME = re.compile(r"<code>(?:(?:sdattn_fast|guidance|training|tuning|clip_gate)\.)*(\w+)((?:\.\w+)?)</code>")
_slug = slugify(case="lower")


def on_page_markdown(markdown, page, config, files):
    """A link to a file outside docs/, such as ../CONTRIBUTING.md, becomes its text: the site does not have the file."""

    def kept(link):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[2]))
        return link[1] if target.startswith("..") else link[0]

    return _LINK.sub(kept, markdown)


def on_page_content(html, page, config, files):
    """In the API reference, `docs/design.md, "A section"`, `Patch.update` and papers on arXiv become links."""
    if not page.file.src_uri.startswith(_API):
        return html
    documented = _documented(Path(config.docs_dir) / _API)

    def cited(found):
        target = files.get_file_from_path(found[1])
        if target is None:
            return found[0]
        url = get_relative_url(target.url, page.url)
        titles = _TITLE.sub(lambda t: f'<a href="{url}#{_slug(" ".join(t[1].split()), "-")}">{t[0]}</a>', found[2])
        return f'<a href="{url}">docs/{found[1]}</a>{titles}'

    def named(found):
        if found[1] not in documented:
            return found[0]
        # The plugin autorefs, which runs later, makes a link of what it finds, and leaves the rest.
        return f'<autoref optional identifier="{documented[found[1]]}{found[2]}">{found[0]}</autoref>'

    html = _CITATION.sub(cited, html)
    html = _ARXIV.sub(r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', html)
    return _NAME.sub(named, html)


def _documented(folder):
    """What the reference documents: the last part of each name -> the whole name."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted(folder.glob("*.md")))
    return {name.rpartition(".")[2]: name for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}
