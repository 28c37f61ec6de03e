"""What MkDocs does besides: see mkdocs.yml. Documents stay as the repository's pages show them, with links to any file.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages. A link to a document leads to its page; to any other file of
the repository, to a copy of it in the site. A link to a file that does not exist stays as it is, and the strict build
fails. Docstrings' cross-references, written for readers of the code (``:class:`~package.Name```), become links where
there is an entry to lead to.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "front_page.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
COPIES = "files"  # folder of the site
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")
_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(?P<short>~)?(?P<name>[\w.]+)`")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Docstrings are Markdown, but for their cross-references. Documents that ``nav`` does not name precede the API."""
    config.markdown_extensions.append(_CrossReferences())  # type: ignore[arg-type]  # names and instances, as Markdown
    nav = config.nav or []
    named = {page for entry in nav for page in entry.values() if isinstance(page, str)}
    others = [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in named]
    place = next(index for index, entry in enumerate(nav) if "API" in entry)
    nav[place:place] = others
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents of the root, and whatever the documents link to."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    pages, copied = [*files.documentation_pages()], set[str]()
    while pages:  # a document that is copied has links, too
        linked = sorted({path for file in pages for path in _linked_files(file)} - copied)
        copies = [File.generated(config, f"{COPIES}/{path}", abs_src_path=str(ROOT / path)) for path in linked]
        for copy in copies:
            files.append(copy)
        copied.update(linked)
        pages = [copy for copy in copies if copy.is_documentation_page()]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the repository's links into the site's."""
    source = _source(page.file)

    def site_link(found: re.Match[str]) -> str:
        target = _target(source, found["path"])
        if target is None:
            return found.group()
        return posixpath.relpath(_place(target), posixpath.dirname(page.file.src_uri)) + (found["anchor"] or "")

    return _LINK.sub(site_link, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A docstring may name what has no entry of its own, for those who read the code: that stays text."""
    return html.replace("<autoref ", "<autoref optional ")


def _source(file: File) -> str:
    """A page's file, from the root of the repository."""
    return os.path.relpath(str(file.abs_src_path), ROOT).replace(os.sep, "/")


def _target(source: str, link: str) -> str | None:
    """What a link of a document leads to, from the root of the repository; None where there is no such file."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def _place(path: str) -> str:
    """Where a file of the repository is in the site's sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path, f"{COPIES}/{path}")


def _linked_files(file: File) -> set[str]:
    """Files of the repository that a page links to, and that are neither documents nor beside them."""
    links = (_target(_source(file), found["path"]) for found in _LINK.finditer(file.content_string))
    return {link for link in links if link is not None and link not in PAGES and not link.startswith("docs/")}


class _CrossReferences(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Roles(md), "cross_references", priority=15)


class _Roles(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        # a line of two colons announces a block of code, which Markdown knows by its indent
        return [_ROLE.sub(_reference, line) for line in lines if line.strip() != "::"]


def _reference(role: re.Match[str]) -> str:
    name = role["name"]
    text = f"`{name.rpartition('.')[2] if role['short'] else name}`"
    return f"[{text}][{name}]"
