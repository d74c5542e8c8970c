"""The HTML frame of a report: one file, no external resource, readable on a phone and on paper."""

from __future__ import annotations

import html
from collections.abc import Sequence

STYLE = """
:root { --ink: #202124; --soft: #5f6368; --line: #e2e2e6; --accent: #2f5f9e; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 60px; }
h1 { font-size: 27px; line-height: 1.25; font-weight: 650; letter-spacing: -.01em; margin: 0 0 6px; max-width: 880px; }
h2 { font-size: 19px; font-weight: 650; margin: 46px 0 8px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; font-weight: 650; margin: 22px 0 4px; }
p { margin: 4px 0 10px; max-width: 760px; }
.kicker, .note, .cap, .side { color: var(--soft); font-size: 13px; }
.kicker { margin-bottom: 14px; }
.facts { display: flex; flex-wrap: wrap; gap: 14px 30px; margin: 22px 0 0; }
.facts div { min-width: 110px; }
.facts b { display: block; font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 6px 0 4px; }
th { font-weight: 500; color: var(--soft); font-size: 13px; vertical-align: bottom; white-space: nowrap; }
th, td { padding: 5px 22px 5px 0; border-bottom: 1px solid var(--line); }
th.t, td.t { text-align: left; } th.n, td.n { text-align: right; white-space: nowrap; }
tr.strong td { font-weight: 650; }
td.t { min-width: 104px; max-width: 520px; overflow-wrap: anywhere; }
svg.map { width: 100%; height: auto; min-width: 760px; display: block; margin: 8px 0; }
svg.map text { font-size: 12px; fill: var(--ink); }
svg.map .n { font-family: ui-monospace, Menlo, Consolas, monospace; }
svg.map .v { fill: var(--soft); }
.legends { display: flex; flex-wrap: wrap; gap: 16px 44px; font-size: 13px; margin: 10px 0 14px; }
.legends > div { max-width: 430px; }
.key { display: inline-flex; align-items: center; margin: 2px 14px 2px 0; }
.key i { width: 12px; height: 12px; margin-right: 6px; display: inline-block; }
.bar { position: relative; width: 260px; height: 34px; margin-top: 6px; }
.bar div { height: 12px; } .bar span { position: absolute; top: 14px; transform: translateX(-50%); font-size: 12px; }
.ball { display: flex; gap: 10px; align-items: center; max-width: 230px; color: var(--soft); }
.ball img { width: 56px; height: 56px; flex: none; image-rendering: auto; }
.frame { display: grid; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); gap: 6px 8px; margin: 0 0 26px; }
.frame img { width: 100%; display: block; image-rendering: pixelated; }
.heads { margin: 0 0 4px; font-weight: 600; font-size: 13px; }
.cap { margin-top: 2px; font-size: 12px; line-height: 1.35; }
.words, .none { font-size: 14px; padding: 6px 8px; background: #f5f5f7; min-height: 40px; }
.none { color: var(--soft); }
ul { margin: 6px 0; padding-left: 20px; max-width: 760px; } li { margin: 3px 0; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; border-top: 1px solid var(--line); padding-top: 12px; }
@media (max-width: 640px) { main { padding: 22px 14px; } h1 { font-size: 22px; } .frame { gap: 4px; }
  .cap, .side { font-size: 10px; } .facts { gap: 12px 24px; } th, td { padding-right: 14px; } }
@media print { .frame, tr { break-inside: avoid; } }
"""


def facts(items: Sequence[tuple[str, str]]) -> str:
    """Large figures in a row: (figure, what it is)."""
    cells = "".join(f"<div><b>{html.escape(big)}</b><span>{html.escape(small)}</span></div>" for big, small in items)
    return f'<div class="facts">{cells}</div>'


def bullets(lines: Sequence[str]) -> str:
    """A plain list."""
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{f' class={kind}' if kind else ''}>{html.escape(text)}</p>"


def page(title: str, kicker: str, headline: str, intro: str, sections: Sequence[tuple[str, str]], footer: str) -> str:
    """The whole file: `intro` and section bodies are HTML, the rest plain text; empty sections are left out."""
    body = "".join(f"<section><h2>{html.escape(name)}</h2>{content}</section>" for name, content in sections if content)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<p class=kicker>{html.escape(kicker)}</p>\n<h1>{html.escape(headline)}</h1>\n{intro}\n{body}\n"
        f"<footer>{html.escape(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )
