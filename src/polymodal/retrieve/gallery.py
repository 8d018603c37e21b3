"""Search results as one HTML file that needs nothing beside itself."""

from __future__ import annotations

import base64
import datetime as dt
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polymodal.retrieve.reader import Hit

# Nothing may be fetched and nothing may run, even if a file name found a way out of its quotes.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --page:#f6f5f2; --card:#fff; --well:#eeece7; --ink:#1d1c1a; --soft:#76726a;
  --line:#e3e0d9; --mark:#b4471f; --fresh:#1f7a54; --shade:0 1px 2px #0000000d, 0 6px 20px #0000000a }
@media (prefers-color-scheme: dark) { :root { --page:#141416; --card:#1d1d20; --well:#26262a; --ink:#eceae6;
  --soft:#98958e; --line:#2d2d32; --mark:#ff9a6b; --fresh:#6fd6a5; --shade:0 1px 2px #0006 } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink);
  font:15px/1.45 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
main { max-width:1280px; margin:0 auto; padding:clamp(20px,4vw,56px) clamp(16px,4vw,48px) 64px }
header { margin-bottom:clamp(20px,3vw,40px) }
h1 { margin:0; font-size:clamp(26px,4vw,42px); line-height:1.15; letter-spacing:-.02em; font-weight:650;
  overflow-wrap:anywhere }
.about { margin:10px 0 0; color:var(--soft) }
section { margin:0 0 clamp(28px,4vw,52px) }
.ask { display:flex; align-items:center; gap:14px; margin:0 0 16px; padding-bottom:12px;
  border-bottom:1px solid var(--line) }
.ask img { width:56px; height:56px; object-fit:cover; border-radius:10px }
h2 { margin:0; font-size:20px; font-weight:600; letter-spacing:-.01em; overflow-wrap:anywhere }
.ask .about { margin:2px 0 0; font-size:13.5px }
.grid { display:grid; gap:18px; grid-template-columns:repeat(auto-fill,minmax(min(196px,42vw),1fr)); margin:0;
  padding:0; list-style:none }
.card { display:flex; flex-direction:column; background:var(--card); border:1px solid var(--line); border-radius:14px;
  overflow:hidden; box-shadow:var(--shade) }
.well { position:relative; aspect-ratio:1; background:var(--well) }
.well img { position:absolute; left:10px; top:10px; width:calc(100% - 20px); height:calc(100% - 20px);
  object-fit:contain }
.rank { position:absolute; left:8px; top:8px; min-width:24px; padding:1px 7px; border-radius:99px;
  background:var(--card); color:var(--soft); font-size:12px; font-weight:600; text-align:center;
  font-variant-numeric:tabular-nums }
.text { padding:10px 12px 12px; min-width:0 }
.name { display:block; color:inherit; font-weight:550; text-decoration:none; white-space:nowrap; overflow:hidden;
  text-overflow:ellipsis }
a.name:hover, a.name:focus-visible { text-decoration:underline }
.facts { display:flex; flex-wrap:wrap; justify-content:space-between; gap:0 8px; margin:2px 0 8px;
  color:var(--soft); font-size:12.5px; font-variant-numeric:tabular-nums; white-space:nowrap }
.facts b { color:var(--mark); font-weight:650 }
.bar { height:3px; border-radius:3px; background:var(--well) }
.bar i { display:block; height:100%; border-radius:3px; background:var(--mark) }
.badge { margin:8px 0 0; color:var(--fresh); font-size:12.5px; font-weight:550 }
details { margin-top:8px; color:var(--soft); font-size:12.5px }
summary { cursor:pointer }
details ul { margin:4px 0 0; padding:0; list-style:none; overflow-wrap:anywhere }
.none { color:var(--soft) }
footer { color:var(--soft); font-size:12.5px }
"""


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """One search on a page."""

    query: str
    hits: Sequence[Hit]
    note: str = ""
    picture: bytes | None = None  # JPEG of the picture that was asked with
    badges: Mapping[str, str] = field(default_factory=dict)  # what to say under a picture, by its path


def page(title: str, about: str, shelves: Sequence[Shelf], thumbnails: Mapping[str, bytes]) -> str:
    """An HTML document with a shelf of pictures a search.

    Everything is inside: thumbnails as data URIs, no scripts, no fonts, no addresses but links to the original files.
    All texts are escaped. It follows the reader's light or dark setting and the width of the window.

    Args:
        title: the heading.
        about: the line below it.
        shelves: the searches; the heading of a lone one is left out, for it is the title.
        thumbnails: JPEG bytes by path.
    """
    body = "\n".join(_shelf(shelf, thumbnails, lone=len(shelves) == 1) for shelf in shelves)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="referrer" content="no-referrer">
<title>{html.escape(title)} - Polymodal</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header><h1>{html.escape(title)}</h1><p class="about">{html.escape(about)}</p></header>
{body}
<footer>Found by Polymodal on this machine, {dt.date.today():%d %B %Y}.</footer>
</main>
</body>
</html>
"""


def _shelf(shelf: Shelf, thumbnails: Mapping[str, bytes], *, lone: bool) -> str:
    picture = f'<img src="{_data(shelf.picture)}" alt="the picture that was asked with">' if shelf.picture else ""
    words = "" if lone else f"<h2>{html.escape(shelf.query)}</h2>"
    note = f'<p class="about">{html.escape(shelf.note)}</p>' if shelf.note else ""
    ask = f'<div class="ask">{picture}<div>{words}{note}</div></div>' if picture or words or note else ""
    if not shelf.hits:
        return f'<section>{ask}<p class="none">Nothing was found.</p></section>'
    best = max(shelf.hits[0].score, 1e-6)
    cards = "\n".join(
        _card(rank, hit, thumbnails.get(hit.path), max(0.0, hit.score / best), shelf.badges.get(hit.path, ""))
        for rank, hit in enumerate(shelf.hits, 1)
    )
    return f'<section>{ask}<ol class="grid">\n{cards}\n</ol></section>'


def _card(rank: int, hit: Hit, thumbnail: bytes | None, share: float, badge: str) -> str:
    path = Path(hit.path)
    name = f"<bdi>{html.escape(path.name)}</bdi>"
    image = f'<img src="{_data(thumbnail)}" alt="{html.escape(path.name)}" loading="lazy">' if thumbnail else ""
    copies = "".join(f"<li><bdi>{html.escape(p)}</bdi></li>" for p in hit.duplicates)
    count = len(hit.duplicates)
    like = f"<details><summary>{count} near-duplicate{'s' * (count > 1)}</summary><ul>{copies}</ul></details>" * bool(
        count
    )
    return (
        f'<li class="card"><div class="well">{image}<span class="rank">{rank}</span></div><div class="text">'
        f'<a class="name" href="{html.escape(path.as_uri())}" title="{html.escape(hit.path)}">{name}</a>'
        f'<div class="facts"><span><b>{hit.score:.3f}</b></span>'
        f"<span>{_pixels(hit)}{size_text(hit.bytes)}</span></div>"
        f'<div class="bar"><i style="width:{100 * share:.0f}%"></i></div>'
        f"{f'<p class=badge>{html.escape(badge)}</p>' if badge else ''}{like}</div></li>"
    )


def _pixels(hit: Hit) -> str:
    return f"{hit.size[0]} &times; {hit.size[1]} · " if hit.size[0] else ""  # sound has none


def _data(jpeg: bytes | None) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg or b"").decode()


def size_text(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 9.95 else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")
