"""Reports of trainings and comparisons, written as Markdown and as one self-contained HTML page.

The page needs no other file and no network: pictures are data URIs, and there is no script. Titles, paragraphs and
cells may contain `` `code` `` and ``**bold**`` as in Markdown; all other characters are plain text.
"""

from __future__ import annotations

import base64
import html
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Bar:
    """A bar of :meth:`Report.bars`.

    Args:
        label: what was measured.
        value: not negative; None if it was not measured.
        colour: of the bar, as in CSS.
    """

    label: str
    value: float | None
    colour: str


@dataclass
class Report:
    """A report, to which parts are added in order; :meth:`write` writes the files.

    Args:
        title: of the page; its ``**bold**`` part, such as the gain with its unit, is printed largest.
        lead: one or two sentences below it, with the result.
    """

    title: str
    lead: str = ""
    _markdown: list[str] = field(default_factory=list)
    _html: list[str] = field(default_factory=list)
    _pictures: dict[str, bytes] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        """The title as plain text."""
        return _plain(self.title)

    def heading(self, text: str) -> None:
        """Start a section."""
        self._add(f"## {text}", f"<h2>{_inline(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._add(text, f"<p>{_inline(text)}</p>")

    def bars(self, bars: Sequence[Bar], unit: str = "", digits: int = 1) -> None:
        """Add horizontal bars on a common scale; in Markdown, a list.

        Args:
            bars: from top to bottom.
            unit: after each value.
            digits: decimals of the values. Bars are as long as the rounded value, so equal numbers have equal bars.
        """
        values = [None if bar.value is None else round(bar.value, digits) for bar in bars]
        texts = ["-" if value is None else f"{value:.{digits}f} {unit}".rstrip() for value in values]
        largest = max((value for value in values if value), default=1.0)
        rows = [
            f'<div class="bar"><span class="label">{_inline(bar.label)}</span><span class="track">'
            f'<span class="fill" style="width:{100 * (value or 0.0) / largest:.1f}%;background:{bar.colour}"></span>'
            f'</span><span class="value">{_inline(text)}</span></div>'
            for bar, value, text in zip(bars, values, texts)
        ]
        lines = [f"- {bar.label}: **{text}**" for bar, text in zip(bars, texts)]
        self._add("\n".join(lines), f'<div class="bars">{"".join(rows)}</div>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], emphasised: Sequence[int] = ()) -> None:
        """Add a table; the first column contains names, the others numbers.

        Args:
            header: names of the columns.
            rows: cells.
            emphasised: indices of emphasised rows.

        Raises:
            ValueError: a row and the header differ in length.
        """
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"a row has {len(row)} cells and the header has {len(header)}: {list(row)}.")
        lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        head = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
        body = "".join(
            f"<tr{' class=strong' if number in emphasised else ''}>"
            + "".join(f"<td>{_inline(cell)}</td>" for cell in row)
            + "</tr>"
            for number, row in enumerate(rows)
        )
        page = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        self._add("\n".join(lines), page)

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        """Add a picture with a caption; Markdown links to it as ``figures/<name>.png``."""
        self._pictures[name] = _png(figure)
        source = f"data:image/png;base64,{_base64(self._pictures[name])}"
        width = round(figure.get_size_inches()[0] * figure.dpi)
        plain = _plain(caption)
        self._add(
            f"![{plain}](figures/{name}.png)\n\n{caption}",
            f'<figure><img width="{width}" alt="{html.escape(plain, quote=True)}" src="{source}">'
            f"<figcaption>{_inline(caption)}</figcaption></figure>",
        )

    def code(self, text: str) -> None:
        """Add commands or a config, verbatim."""
        self._add(f"```\n{text.strip()}\n```", f"<pre>{html.escape(text.strip())}</pre>")

    def write(self, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write ``report.md`` with ``figures/``, and ``report.html``.

        Returns:
            tuple: the two paths.
        """
        target = Path(folder)
        (target / "figures").mkdir(parents=True, exist_ok=True)
        for name, png in self._pictures.items():
            (target / "figures" / f"{name}.png").write_bytes(png)
        lead = [self.lead] if self.lead else []
        markdown = "\n\n".join([f"# {self.headline}", *lead, *self._markdown]) + "\n"
        (target / "report.md").write_text(markdown, encoding="utf-8")
        (target / "report.html").write_text(self._page(), encoding="utf-8")
        return target / "report.md", target / "report.html"

    def _add(self, markdown: str, page: str) -> None:
        self._markdown.append(markdown)
        self._html.append(page)

    def _page(self) -> str:
        lead = f'<p class="lead">{_inline(self.lead)}</p>' if self.lead else ""
        body = "\n".join(self._html)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.headline)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>{_inline(self.title)}</h1>\n{lead}\n{body}\n</main>\n</body>\n</html>\n"
        )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", dpi=figure.dpi)
    return buffer.getvalue()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _plain(text: str) -> str:
    return re.sub(r"[`*]", "", text)


def _inline(text: str) -> str:
    """Convert text with `` `code` `` and ``**bold**`` to HTML."""
    escaped = html.escape(text, quote=False)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped)


_CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2329; --soft: #5b6671; --line: #e2e6ea; --wash: #f5f7f9;
  --accent: #0072b2; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #14191e; --ink: #e3e8ec; --soft: #a3afba; --line: #37414b; --wash: #1f272e; --accent: #58b0e6; }
  img { background: #fff; border-radius: 4px; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h1 strong { display: block; font-size: 3.4rem; line-height: 1.15; color: var(--accent); }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 46rem; }
.lead { font-size: 1.12rem; color: var(--soft); }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--wash);
  padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere; }
pre { font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--wash);
  border: 1px solid var(--line); border-radius: 6px; padding: .9rem 1.1rem; overflow-x: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .85rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-size: .85rem; font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--line);
  vertical-align: bottom; line-height: 1.25; }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; white-space: nowrap; }
tr.strong td { font-weight: 600; background: var(--wash); }
figure { margin: 1.2rem 0 1.8rem; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .4rem; max-width: 46rem; }
.bars { margin: 1.4rem 0; max-width: 46rem; }
.bar { display: grid; grid-template-columns: 11rem 1fr 6.5rem; align-items: center; gap: .9rem; margin: .5rem 0; }
.track { background: var(--wash); border-radius: 4px; height: 1.35rem; overflow: hidden; }
.fill { display: block; height: 100%; border-radius: 4px; }
.value { font-weight: 600; font-variant-numeric: tabular-nums; }
@media (max-width: 34rem) { .bar { grid-template-columns: 1fr 5rem; } .track { grid-row: 2; grid-column: 1 / 3; }
  .value { text-align: right; } figure { overflow-x: auto; } figure img { max-width: none; width: 42rem; } }
@media print { main { padding: 0; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""
