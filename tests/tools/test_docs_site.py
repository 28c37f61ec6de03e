"""The documentation as a site: all of it is reachable, nothing is fetched, and what leads nowhere fails the build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="MkDocs is not installed")

ROOT = Path(__file__).resolve().parents[2]


def _build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    run = _build(ROOT, folder)
    assert run.returncode == 0, run.stderr
    return folder


def test_every_document_is_a_page_that_leads_to_all_others(site: Path) -> None:
    documents = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    pages = documents | {Path("front_page.html"), Path("contributing.html"), Path("changelog.html")}
    home = (site / "index.html").read_text(encoding="utf-8")
    navigation = home[home.index('class="md-nav') :]
    for page in pages:
        assert (site / page).exists()
        assert page == Path("index.html") or f'href="{page}"' in navigation, f"nothing leads to {page}"


def test_links_of_the_front_page_lead_to_pages_and_to_copies_of_files(site: Path) -> None:
    text = (site / "front_page.html").read_text(encoding="utf-8")
    assert 'href="core.html#quickstart"' in text
    copies = re.findall(r'href="(files/[^"]+)"', text)
    assert len(copies) > 5
    pages = [copy for copy in copies if copy.endswith(".html")]  # documents outside docs/
    for copy in set(copies) - set(pages):
        assert (site / copy).read_bytes() == (ROOT / copy.removeprefix("files/")).read_bytes()
    assert pages == ["files/benchmarks/results/speed.html"]
    assert (site / "files/benchmarks/results/speed_scaling.png").is_file()  # what it shows comes with it
    assert 'src="speed_scaling.png"' in (site / pages[0]).read_text(encoding="utf-8")


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//", text), page


def test_docstrings_become_entries_with_links(site: Path) -> None:
    text = (site / "api" / "distill.html").read_text(encoding="utf-8")
    assert 'id="d2_mgd.distill.MatchingGuidedDistiller.rematch"' in text
    assert re.search(r'href="matching\.html#d2_mgd\.matching\.solve_matching"', text)
    for page in (site / "api").glob("*.html"):
        assert not re.search(r":(?:class|func|meth):<|<p>::</p>", page.read_text(encoding="utf-8"))


def _copy(root: Path) -> None:
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, root / name)
    for name in ("docs", "tools", "d2_mgd", "configs", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))


def test_a_new_page_needs_no_line_in_the_nav(tmp_path: Path) -> None:
    _copy(tmp_path)
    (tmp_path / "docs" / "newcomer.md").write_text("# A newcomer\n", encoding="utf-8")
    run = _build(tmp_path, tmp_path / "site")
    assert run.returncode == 0, run.stderr
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert home.index("results.html") < home.index("newcomer.html") < home.index("api/index.html", home.index("nav"))


def test_what_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    _copy(tmp_path)
    with open(tmp_path / "docs" / "core.md", "a", encoding="utf-8") as file:
        file.write("\n[gone](gone.md), [file](../configs/gone.yaml), [heading](methods.md#gone)\n")
    run = _build(tmp_path, tmp_path / "site")
    assert run.returncode != 0
    for offence in ("gone.md", "../configs/gone.yaml", "methods.md#gone"):
        assert offence in run.stderr, run.stderr
