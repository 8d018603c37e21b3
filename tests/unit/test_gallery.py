"""The page needs nothing beside itself and shows hostile names as what they are: text."""

from __future__ import annotations

import base64
import datetime as dt
import io
from html.parser import HTMLParser

import pytest
from PIL import Image as PILImage

from polymodal.retrieve.gallery import Shelf, page, size_text
from polymodal.retrieve.reader import Hit


def jpeg(colour: str) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (16, 12), colour).save(buffer, "JPEG")
    return buffer.getvalue()


class Reads(HTMLParser):
    """Every element with its attributes, the text, and whether the tags close as they open."""

    VOID = {"meta", "img"}

    def __init__(self, document: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(document)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


HOSTILE = [
    "/p/<script>alert(1);<svg onload=x>.png",
    '/p/"onerror="alert(1).png',
    "/p/' onmouseover='x.png",
    "/p/--><img src=x onerror=x>.png",
    "/p/&lt;b&gt;&amp;.png",
    "/p/\u202egnp.exe.png",
    "/p/a\nb\tc.png",
    "/p/javascript:alert(1).png",
    "/p/{{7*7}}${x}%s%.png",
    "/p/🍎 été.png",
]


def hit(path: str, score: float = 0.5, duplicates: tuple[str, ...] = ()) -> Hit:
    return Hit(
        path=path, score=score, size=(640, 480), bytes=123456, time=dt.datetime(2020, 1, 1), duplicates=duplicates
    )


@pytest.fixture
def read() -> Reads:
    hits = [hit(p, 0.9 - i / 20, (p, p + "2")) for i, p in enumerate(HOSTILE)]
    badges = {HOSTILE[0]: "<i>new</i>"}
    shelf = Shelf(query="<b>q</b>", hits=hits, note="<u>n</u>", picture=jpeg("red"), badges=badges)
    thumbnails = {p: jpeg("blue") for p in HOSTILE}
    return Reads(page('<h1 onclick="x">', "<p>&amp;", [shelf, Shelf(query="none", hits=[])], thumbnails))


def test_all_text_is_escaped(read: Reads) -> None:
    for path in HOSTILE:
        name = path.split("/", 2)[2]
        assert name in read.text
    for literal in ('<h1 onclick="x">', "<p>&amp;", "<b>q</b>", "<u>n</u>", "<i>new</i>"):
        assert literal in read.text
    tags = [tag for tag, _ in read.elements]
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "b>q", "u"} & set(tags)
    assert tags.count("img") == len(HOSTILE) + 1
    assert not any(name.startswith("on") for _, attributes in read.elements for name in attributes)


def test_nothing_is_fetched(read: Reads) -> None:
    for tag, attributes in read.elements:
        if source := attributes.get("src"):
            kind, data = source.split(",", 1)
            assert (tag, kind) == ("img", "data:image/jpeg;base64")
            with PILImage.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
                assert picture.format == "JPEG"
        if target := attributes.get("href"):
            assert tag == "a"
            assert target.startswith("file:///p/")
    policies = [a["content"] for t, a in read.elements if t == "meta" and a.get("http-equiv")]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    document = page("t", "a", [], {})
    assert "http:" not in document
    assert "https:" not in document
    assert "url(" not in document
    assert "@import" not in document
    assert "prefers-color-scheme" in document


def test_it_shows_what_was_found(read: Reads) -> None:
    assert "0.900" in read.text
    assert "640 \u00d7 480 \u00b7 123 kB" in read.text
    assert "2 near-duplicates" in read.text
    assert "Nothing was found." in read.text
    assert [a["alt"] for t, a in read.elements if t == "img"][1] == "<script>alert(1);<svg onload=x>.png"


def test_one_search_has_its_query_once_as_the_title() -> None:
    document = page("a red fruit", "3 pictures", [Shelf(query="a red fruit", hits=[hit("/p/1.png")])], {})
    assert document.count("a red fruit") == 2  # the heading and the window's title
    assert "<img" not in document, "a picture without a thumbnail leaves its place empty"
    assert "near-duplicate" not in document


@pytest.mark.parametrize("score", [0.0, -0.2, 1e-9])
def test_scores_of_nothing(score: float) -> None:
    Reads(page("q", "a", [Shelf(query="q", hits=[hit("/p/1.png", score), hit("/p/2.png", score - 0.1)])], {}))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9_940, "9.9 kB"),
        (9_960, "10 kB"),
        (999_600, "1.0 MB"),
        (3 * 10**12, "3000 GB"),
    ],
)
def test_size_text(count: int, text: str) -> None:
    assert size_text(count) == text
