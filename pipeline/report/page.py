"""The page: one HTML file that asks the network for nothing, on a phone, on a desk, in the dark, on paper.

A Content-Security-Policy inside it forbids every request but the pictures it carries, so that a careless word in
a recording cannot fetch anything either. No scripts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
GENERATOR = "dpipe report"  # what tells a page of ours, which may be written over, from anyone else's

STYLE = """
:root{color-scheme:light dark;--page:#fbfbf9;--card:#fff;--ink:#1c1d1f;--soft:#5c6066;--rule:#e2e2dc;
--accent:#0072b2;--bar:#4c8fbd;--bad:#b33a00;--good:#00724f;
--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#cc79a7;--s4:#b58500;--s5:#56b4e9;--s6:#777}
@media(prefers-color-scheme:dark){:root{--page:#15171a;--card:#1d2024;--ink:#e8e8e4;--soft:#a0a5ad;
--rule:#33373d;--accent:#56b4e9;--bar:#4d86ad;--bad:#ff8a5c;--good:#3ecf9b;
--s0:#56b4e9;--s1:#f0803c;--s2:#2fbf95;--s3:#e39cc4;--s4:#e6b93f;--s5:#8ccdf2;--s6:#aaa}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
overflow-wrap:anywhere}
header,main,footer{max-width:1240px;margin:0 auto;padding:0 16px}
header{padding-top:28px}h1{font-size:26px;line-height:1.2;margin:0 0 6px}
h2{font-size:22px;margin:40px 0 4px;padding-top:14px;border-top:2px solid var(--ink)}
h3{font-size:16px;margin:30px 0 8px}h4{font-size:14px;margin:18px 0 6px}
p{margin:6px 0;max-width:75ch}.soft,figcaption,small{color:var(--soft)}a{color:var(--accent)}
nav ul{list-style:none;padding:0;margin:12px 0;display:flex;flex-wrap:wrap;gap:6px 18px}
code{font:0.92em ui-monospace,Consolas,monospace}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:10px;margin:14px 0}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:6px;padding:9px 12px}
.tile b{display:block;font-size:20px;line-height:1.25;font-weight:600}.tile span{color:var(--soft);font-size:13px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;width:100%}
th,td{overflow-wrap:break-word;text-align:left;padding:5px 12px 5px 0;vertical-align:top;
border-bottom:1px solid var(--rule)}
th{font-weight:600;color:var(--soft);font-size:13px}td.n,th.n{text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums}td.k{white-space:nowrap;color:var(--soft)}td.id{min-width:11em}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,280px),1fr));gap:16px}
.grid.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,168px),1fr));gap:10px}
.grid.large{grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr))}
.middle{max-width:520px}
.cell{background:var(--card);border:1px solid var(--rule);border-radius:6px;padding:10px 12px;min-width:0}
.cell h4{margin:0 0 4px}
svg{display:block;width:100%;height:auto}svg text{font-size:11px;fill:var(--soft)}
.bar{fill:var(--bar)}svg .rule{stroke:var(--rule)}svg .axis{stroke:var(--soft)}
.frame{fill:none;stroke:var(--rule)}.mark{stroke:var(--ink);stroke-dasharray:2 2;opacity:.6}
.mark.q50{stroke-dasharray:none}
.line{fill:none;stroke-width:2}.trace{fill:none;stroke-width:1.1;opacity:.75}
.s0{stroke:var(--s0)}.s1{stroke:var(--s1)}.s2{stroke:var(--s2)}.s3{stroke:var(--s3)}.s4{stroke:var(--s4)}
.s5{stroke:var(--s5)}.s6{stroke:var(--s6)}
.dot{stroke:none}.dot.s0{fill:var(--s0)}.dot.s1{fill:var(--s1)}.dot.s2{fill:var(--s2)}.dot.s3{fill:var(--s3)}
.dot.s4{fill:var(--s4)}.dot.s5{fill:var(--s5)}.dot.s6{fill:var(--s6)}
svg.band{height:30px}.band .curve{fill:none;stroke:#111;stroke-width:1.4}
.bands{display:grid;grid-template-columns:minmax(76px,max-content) 1fr;gap:3px 10px;align-items:center;font-size:13px}
.bands .strip{margin:0 0 4px}
.strip{display:grid;grid-template-columns:repeat(6,1fr);gap:3px}figure{margin:0 0 12px}
.strip img,.strip svg{width:100%;display:block;border-radius:2px}figcaption{font-size:13px;margin-top:3px}
.four{display:grid;grid-template-columns:repeat(4,1fr);gap:4px}.four img{width:100%;display:block;border-radius:2px}
.row{display:grid;grid-template-columns:minmax(0,230px) 1fr;gap:18px;align-items:start}
.row>figure img{width:100%;max-width:230px;border-radius:4px;display:block}
details{margin:8px 0}summary{cursor:pointer;color:var(--accent)}
.bad{color:var(--bad)}.good{color:var(--good)}
.state{font-weight:600}footer{padding:36px 16px 40px;color:var(--soft);font-size:13px}
@media(max-width:640px){.row{grid-template-columns:1fr}.strip{grid-template-columns:repeat(3,1fr)}
.bands .strip{grid-template-columns:repeat(6,1fr)}h1{font-size:22px}h2{font-size:19px}}
@media print{details>*{display:block}.cell,figure{break-inside:avoid}}
"""


def text(value: object) -> str:
    """Words from anywhere, made harmless."""
    return escape(str(value), quote=True)


def page(title: str, intro: str, links: Sequence[tuple[str, str]], sections: Iterable[str], foot: str) -> str:
    """A whole document; `links` are (anchor, words) of its sections."""
    items = "".join(f'<li><a href="#{text(anchor)}">{text(words)}</a></li>' for anchor, words in links)
    nav = f"<nav><ul>{items}</ul></nav>" if len(links) > 1 else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="generator" content="{GENERATOR}">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style></head>\n<body>"
        f"<header><h1>{text(title)}</h1>{intro}{nav}</header>\n<main>"
        + "\n".join(sections)
        + f"</main>\n<footer>{foot}</footer></body></html>\n"
    )


def tiles(numbers: Sequence[tuple[str, str]]) -> str:
    inner = "".join(
        f'<div class="tile"><b>{text(value)}</b><span>{text(name)}</span></div>' for name, value in numbers
    )
    return f'<div class="tiles">{inner}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[int] = ()) -> str:
    """Words in, escaped; columns of `numeric` stand to the right."""

    def cells(values: Sequence[object], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in numeric else ''}>{text(value)}</{tag}>"
            for i, value in enumerate(values)
        )

    head_row = f"<thead><tr>{cells(head, 'th')}</tr></thead>" if any(head) else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table>{head_row}<tbody>{body}</tbody></table></div>'


def pairs(rows: Iterable[tuple[object, object]]) -> str:
    """A table of names and values."""
    body = "".join(f'<tr><td class="k">{text(a)}</td><td>{text(b)}</td></tr>' for a, b in rows)
    return f'<div class="wide"><table><tbody>{body}</tbody></table></div>'


def folded(summary: str, inner: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{inner}</details>"


def image(address: str, words: str) -> str:
    return f'<img src="{address}" alt="{text(words)}" loading="lazy" decoding="async">'


def cell(title: str, inner: str, note: str = "") -> str:
    told = f"<small>{text(note)}</small>" if note else ""
    return f'<div class="cell"><h4>{text(title)}</h4>{inner}{told}</div>'


def grid(cells: Iterable[str], small: bool = False) -> str:
    return f'<div class="grid{" small" if small else ""}">{"".join(cells)}</div>'


def size_text(size: float) -> str:
    """Bytes with three figures."""
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.5:
            return f"{size:.3g} {unit}"
    return f"{size / 1000:.3g} TB"
