"""MkDocs hooks that build a site from documents whose links are relative to the repository (see mkdocs.yml).

CONTRIBUTING.md and CHANGELOG.md become pages. Links to a document become links to its page. Other linked files of the
repository are copied into the site. A link to a file that does not exist is not changed, so the strict build fails.
Cross-references in docstrings (``:class:`~package.Name```) become links if the API pages have that entry.
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
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
COPIES = "files"  # folder of the site
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")
_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(?P<short>~)?(?P<name>[\w.]+)`")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make Markdown resolve the cross-references of docstrings, and add pages that ``nav`` omits, before the API."""
    config.markdown_extensions.append(_CrossReferences())  # type: ignore[arg-type]  # names and instances, as Markdown
    nav = config.nav or []
    named = {page for entry in nav for page in entry.values() if isinstance(page, str)}
    others = [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in named]
    place = next(index for index, entry in enumerate(nav) if "API" in entry)
    nav[place:place] = others
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents of the repository's root and all files that documents link to."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    pages, copied = [*files.documentation_pages()], set[str]()
    while pages:  # copied documents contain links too
        linked = sorted({path for file in pages for path in _linked_files(file)} - copied)
        copies = [File.generated(config, f"{COPIES}/{path}", abs_src_path=str(ROOT / path)) for path in linked]
        for copy in copies:
            files.append(copy)
        copied.update(linked)
        pages = [copy for copy in copies if copy.is_documentation_page()]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links between files of the repository by links between pages of the site."""
    source = _source(page.file)

    def site_link(found: re.Match[str]) -> str:
        target = _target(source, found["path"])
        if target is None:
            return found.group()
        return posixpath.relpath(_place(target), posixpath.dirname(page.file.src_uri)) + (found["anchor"] or "")

    return _LINK.sub(site_link, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave cross-references without an entry in the API as text, instead of failing the build."""
    return html.replace("<autoref ", "<autoref optional ")


def _source(file: File) -> str:
    """Return the path of a page's source, relative to the repository."""
    return os.path.relpath(str(file.abs_src_path), ROOT).replace(os.sep, "/")


def _target(source: str, link: str) -> str | None:
    """Return the target of a document's link, relative to the repository, or None if that file does not exist."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def _place(path: str) -> str:
    """Return the path of a file of the repository within the site's sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path, f"{COPIES}/{path}")


def _linked_files(file: File) -> set[str]:
    """Return the files that a page links to, except documents and files in docs/."""
    links = (_target(_source(file), found["path"]) for found in _LINK.finditer(file.content_string))
    return {link for link in links if link is not None and link not in PAGES and not link.startswith("docs/")}


class _CrossReferences(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Roles(md), "cross_references", priority=15)


class _Roles(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        # drop reStructuredText's marker of a code block: Markdown recognises the block by its indent
        return [_ROLE.sub(_reference, line) for line in lines if line.strip() != "::"]


def _reference(role: re.Match[str]) -> str:
    name = role["name"]
    text = f"`{name.rpartition('.')[2] if role['short'] else name}`"
    return f"[{text}][{name}]"
