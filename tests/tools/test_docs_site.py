"""The documentation as a site: all pages are reachable and load from disk, nothing is fetched, broken links fail."""

from __future__ import annotations

import html
import json
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
    pages = documents | {Path("contributing.html"), Path("changelog.html")}
    home = (site / "index.html").read_text(encoding="utf-8")
    navigation = home[home.index('class="md-nav') :]
    for page in pages:
        assert (site / page).exists()
        assert page == Path("index.html") or f'href="{page}"' in navigation, f"nothing leads to {page}"


def test_links_lead_to_pages_and_to_copies_of_files(site: Path) -> None:
    assert 'href="core.html#quickstart"' in (site / "index.html").read_text(encoding="utf-8")
    copies = {
        link for page in site.glob("*.html") for link in re.findall(r'href="(files/[^"#]+)', page.read_text("utf-8"))
    }
    assert len(copies) > 5
    for copy in copies:
        if not copy.endswith(".html"):  # documents outside docs/ become pages
            assert (site / copy).read_bytes() == (ROOT / copy.removeprefix("files/")).read_bytes()
    assert (site / "files/benchmarks/results/speed.html").is_file()  # linked by a copied page only


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


def test_broken_links_fail_the_build(tmp_path: Path) -> None:
    _copy(tmp_path)
    with open(tmp_path / "docs" / "core.md", "a", encoding="utf-8") as file:
        file.write("\n[gone](gone.md), [file](../configs/gone.yaml), [heading](methods.md#gone)\n")
    run = _build(tmp_path, tmp_path / "site")
    assert run.returncode != 0
    for target in ("gone.md", "../configs/gone.yaml", "methods.md#gone"):
        assert target in run.stderr, run.stderr


# Loads every page in a frame as wide as a phone's screen, one of them with a search term; the title becomes the result.
_LOAD_ALL = """<!DOCTYPE html><meta charset="utf-8"><body><script>
const pages = PAGES, found = {};
const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
async function load(page) {
  const frame = document.createElement("iframe");
  frame.style.cssText = "width: 390px; height: 800px; border: 0";
  const loaded = new Promise((resolve) => frame.addEventListener("load", resolve));
  frame.src = page;
  document.body.append(frame);
  await loaded;
  const inner = frame.contentDocument;
  for (let tries = 0; tries < 500 && page.includes("?q=") && !inner.querySelector(".md-search-result__item"); tries++)
    await wait(100);
  found[page] = {
    heading: inner.querySelector("h1")?.textContent ?? "",
    width: inner.documentElement.scrollWidth,
    missing: [...inner.images].filter((image) => !image.naturalWidth).map((image) => image.src),
    results: inner.querySelectorAll(".md-search-result__item").length,
  };
  frame.remove();
}
(async () => {
  for (const page of pages) await load(page);
  document.title = JSON.stringify(found);
})();
</script></body>"""


def test_every_page_loads_from_disk_in_a_browser_as_wide_as_a_phone(site: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    pages = sorted(str(page.relative_to(site)) for page in site.rglob("*.html") if page.name != "404.html")
    searched = "index.html?q=reducer"
    (site / "load_all.html").write_text(_LOAD_ALL.replace("PAGES", json.dumps([*pages, searched])), encoding="utf-8")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        "--virtual-time-budget=600000",
        "--dump-dom",
    ]
    run = subprocess.run(
        [*command, (site / "load_all.html").as_uri()], capture_output=True, text=True, timeout=240, check=True
    )
    title = re.search(r"<title>(.*?)</title>", run.stdout)
    assert title, run.stderr[-2000:]
    found = json.loads(html.unescape(title[1]))
    assert set(found) == {*pages, searched}
    for page, state in found.items():
        assert state["heading"], page
        assert state["width"] <= 390, f"{page} is {state['width']} px wide"
        assert not state["missing"], page
    assert found[searched]["results"] > 0
    assert not re.findall(r"CONSOLE.*(?:Uncaught|ERR_|Failed to load)[^\n]*", run.stderr)
