"""The few pieces that a page is made of; every text is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 16px; background: #fff; color: #1a1a1a;
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 8px 0 4px; }
h2 { font-size: 1.2rem; margin: 32px 0 8px; padding-top: 12px; border-top: 2px solid #1a1a1a; }
p { margin: 6px 0; max-width: 85ch; }
.note { color: #555; font-size: .9rem; }
.warning { border-left: 4px solid #d55e00; padding: 6px 10px; background: #fdf3ec; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 8px; margin: 12px 0; }
.tile { border: 1px solid #ccc; border-radius: 6px; padding: 8px 10px; }
.tile b { display: block; font-size: 1.25rem; line-height: 1.3; }
.tile span { color: #555; font-size: .82rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); gap: 22px 20px; }
figure { margin: 0; }
figcaption { font-weight: 600; font-size: .95rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th { border-bottom: 1px solid #1a1a1a; vertical-align: bottom; }
th:first-child, td:first-child, .left { text-align: left; }
td.long { white-space: normal; min-width: 260px; text-align: left; }
pre { overflow-x: auto; background: #f6f6f6; padding: 10px; font-size: .82rem; border-radius: 6px; }
summary { cursor: pointer; padding: 4px 0; }
"""


def page(title: str, *parts: str) -> str:
    """Return a whole page, which may load nothing from anywhere."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Return a heading and what stands below it, nothing if nothing does."""
    return "\n".join([f"<h2>{escape(title)}</h2>", *filter(None, parts)]) if any(parts) else ""


def heading(text: str) -> str:
    """Return the heading of the page."""
    return f"<h1>{escape(text)}</h1>"


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph: plain, a `note`, or a `warning`."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def tiles(numbers: Sequence[tuple[str, str]]) -> str:
    """Return names and numbers that are seen first."""
    cells = [f'<div class="tile"><span>{escape(name)}</span><b>{escape(number)}</b></div>' for name, number in numbers]
    return f'<div class="tiles">{"".join(cells)}</div>'


def charts(figures: Sequence[tuple[str, str]]) -> str:
    """Return pictures with their titles, side by side where there is room; a picture is SVG and goes in as it is."""
    cells = [f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in figures]
    return f'<div class="charts">{"".join(cells)}</div>' if cells else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], long: str = "") -> str:
    """Return a table that scrolls where it is too wide; the column named `long` may break its lines."""
    if not rows:
        return ""
    kind = [' class="long"' if name == long else "" for name in head]
    titles = "".join(f'<th class="left">{escape(t)}</th>' if t == long else f"<th>{escape(t)}</th>" for t in head)
    body = "".join(
        f"<tr>{''.join(f'<td{k}>{escape(cell)}</td>' for k, cell in zip(kind, row, strict=True))}</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{titles}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def folded(title: str, text: str) -> str:
    """Return text that is read only by who asks for it, nothing of none."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>" if text.strip() else ""
