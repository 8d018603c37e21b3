"""Pages of rendered text whose every word and its place are known, and questions about them.

The fonts are those of installed Debian packages; families are split by hash, so that evaluation reads letters of a
shape that training never saw. Pages are laid out for one size in pixels, so that boxes are exact there.
"""

from __future__ import annotations

import functools
import math
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from polymodal.core.errors import DataError, did_you_mean
from polymodal.data.worlds import sources
from polymodal.data.worlds.asked import Asked, chance, wording

KINDS: Final = ("article", "columns", "form", "table", "receipt")
FONTS: Final = Path("/usr/share/fonts")
# Families of Latin text and the package that has them; other fonts of a system are often of symbols or other scripts.
FAMILIES: Final[Mapping[str, str]] = {
    "DejaVu Sans": "fonts-dejavu-core",
    "DejaVu Sans Mono": "fonts-dejavu-core",
    "DejaVu Serif": "fonts-dejavu-core",
    "FreeMono": "fonts-freefont-ttf",
    "FreeSans": "fonts-freefont-ttf",
    "FreeSerif": "fonts-freefont-ttf",
    "Liberation Mono": "fonts-liberation",
    "Liberation Sans": "fonts-liberation",
    "Liberation Sans Narrow": "fonts-liberation",
    "Liberation Serif": "fonts-liberation",
    "Caladea": "fonts-crosextra-caladea",
    "Comic Neue": "fonts-comic-neue",
    "EB Garamond": "fonts-ebgaramond",
    "Inconsolata": "fonts-inconsolata",
    "Lato": "fonts-lato",
    "Open Sans": "fonts-open-sans",
    "Open Sans Condensed": "fonts-open-sans",
    "Roboto": "fonts-roboto-unhinted",
    "Roboto Condensed": "fonts-roboto-unhinted",
}
PACKAGES: Final = tuple(sorted(set(FAMILIES.values())))
MIN_SIZE: Final = 112  # of a page
MIN_LINE_SIZE: Final = 48

_HELD_OUT_FAMILIES = 0.25
_FAINT = ("Hairline", "Thin", "ExtraLight")  # faces that vanish when they are small
_SMALLEST = 9  # pixels from the top of the tallest letter to the foot of the lowest, about
_MARGIN = 0.03  # of the side: what the greatest rotation moves beyond the edge
_MAX_ANGLE = 3.0
_TRIES = 200

_VOCABULARY: Final = (
    "able above acid after again air alarm alley amber angle animal answer apple april arch arm arrow artist aunt "
    "autumn baby bag ball band bank barn basket beach bean bed bell bench bird blanket block board boat body bone "
    "book border bottle bowl box brain branch brass bread breath brick bridge broom brother brush bucket bulb "
    "butter button cable cake camera camp candle canvas captain card carpet cart castle cause chain chair chalk "
    "cheese chest child circle clay clock cloth cloud coal coast coat coffee colour comb copper cord cork corner "
    "cotton country cover crown cup curtain cushion daughter dawn desert desk dinner dish distance doctor door "
    "dream dress drop dust ear earth east edge egg engine evening event farm father feather fence field finger "
    "fire fish flag flame floor flower fog food forest fork frame friend frost fruit garden gate gift giant glass "
    "glove gold grain grass ground guest hair hammer hand harbour hat heart hill history hole home honey hook "
    "horse hospital hour house humour ice idea inch ink insect iron island jacket jewel journey judge juice "
    "jungle kettle key kitchen kite knee knife knot ladder lake lamp land language leaf leather lemon letter "
    "level library light line lion lip list lock lunch machine map marble market mask match meal metal middle "
    "milk minute mirror mist money month moon morning mother motor mountain mouth music nail name needle nerve "
    "night noise north nose note number oak ocean office oil onion orange orchard oven owl page paint palace "
    "paper parcel park pearl pen pencil pepper person piano picture pipe plane plant plate pocket point poison "
    "pond potato powder prison puzzle queen quiet quilt rabbit rail rain reason record ribbon rice ring river "
    "road rock roof room root rose rubber salt sand scale school science screw sea season secret seed shadow "
    "sheep shelf ship shirt shoe shop shoulder signal silk silver sister skin sky sleep smile smoke snake snow "
    "soap sock song soup spade spider sponge spoon spring square stamp star station steam steel stem stick "
    "stocking stomach stone store storm story street string sugar summer sun table tail teacher thread throat "
    "thumb thunder ticket tiger time tin toe tongue tooth town toy trade train tree truth turtle umbrella uncle "
    "valley velvet verse village violin voice wagon wall water wave wax weather week west wheel whistle wind "
    "window wine wing winter wire wood wool word work yard year yellow zebra zone "
)
WORDS: Final = tuple(_VOCABULARY.split())
_KEYS: Final = (
    "name", "city", "street", "colour", "age", "phone", "code", "class", "room", "date", "team", "size", "weight",
    "order", "seat", "gate", "owner", "model",
)  # fmt: skip
_NUMERIC_KEYS: Final = frozenset({"age", "phone", "code", "room", "size", "weight", "order", "seat", "gate"})
_COLUMNS: Final = ("price", "stock", "score", "age", "rank", "weight", "units", "cost", "hits", "days")
_TOTALS: Final = ("Total", "TOTAL", "Sum", "To pay", "Amount due")

Box = tuple[int, int, int, int]
_Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Word:
    """A word as it is drawn.

    Attributes:
        box: left, top, right, bottom of its ink in pixels of the page; right and bottom are exclusive.
        origin: where its baseline begins.
        face: the file of the font.
        height: of the font, in pixels.
    """

    text: str
    box: Box
    origin: tuple[int, int]
    face: str
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Words that stand beside each other."""

    words: tuple[Word, ...]

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    @property
    def box(self) -> Box:
        lefts, tops, rights, bottoms = zip(*(word.box for word in self.words), strict=True)
        return min(lefts), min(tops), max(rights), max(bottoms)


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A page as it is drawn, and what it says.

    Attributes:
        kind: one of ``KINDS``, or ``line``.
        size: the side in pixels for which it is laid out.
        lines: in reading order: columns one after the other, tables by rows.
        rules: filled rectangles: the lines of tables and receipts.
        title: as written; empty where there is none.
        fields: what the page says a thing is, by lower-case name: entries of a form, cells of a table, prices.
        total: of a receipt, as written; empty elsewhere.
    """

    kind: str
    size: int
    lines: tuple[Line, ...]
    rules: tuple[Box, ...]
    ink: _Colour
    paper: _Colour
    title: str
    fields: Mapping[str, str]
    total: str

    @property
    def words(self) -> tuple[Word, ...]:
        """All words in reading order."""
        return tuple(word for line in self.lines for word in line.words)

    @property
    def text(self) -> str:
        """All words in reading order, one line of the page to a line."""
        return "\n".join(line.text for line in self.lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wear:
    """What happens to a page before it is seen.

    Attributes:
        angle: of rotation about the centre, in degrees; boxes are those of the straight page.
        fade: 0 to 1, how far the ink is moved towards the paper.
        uneven: greatest change of the paper's brightness by slow shadows, in levels of 255.
        noise: standard deviation of each pixel, in levels of 255.
        seed: of the shadows and the noise.
    """

    angle: float = 0.0
    fade: float = 0.0
    uneven: float = 0.0
    noise: float = 0.0
    seed: int = 0


# ----------------------------------------------------------------------------------------------------------- fonts


def held_out_family(family: str) -> bool:
    """Whether training never sees a font of this family."""
    return chance("font family", family) < _HELD_OUT_FAMILIES


@functools.lru_cache(maxsize=8)
def _faces(folder: Path) -> Mapping[str, tuple[str, ...]]:
    """Family -> its font files below a folder, sorted by name."""
    found: dict[str, list[str]] = {}
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf")]
    for path in sorted(paths, key=lambda p: p.name):
        try:
            family, style = ImageFont.truetype(path, 24).getname()
        except OSError:
            continue  # pictures, or of one size only: no font of text
        if family is not None and family in FAMILIES and not any(faint in (style or "") for faint in _FAINT):
            found.setdefault(family, []).append(str(path))
    return {family: tuple(files) for family, files in sorted(found.items())}


def fonts(*, held_out: bool, folder: Path = FONTS) -> Mapping[str, tuple[str, ...]]:
    """Font files by family: the families of training, or those that it never sees.

    Raises:
        DataError: there is none; the message is the command that installs the packages.
    """
    found = {family: files for family, files in _faces(folder).items() if held_out_family(family) == held_out}
    if not found:
        which = "held out" if held_out else "for training"
        raise DataError(f"no fonts {which} in {folder}. Run: {sources.install_command(PACKAGES)}")
    return found


def _face(rng: np.random.Generator, held_out: bool, folder: Path) -> str:
    """A font file: families are equally frequent, however many faces they have."""
    families = fonts(held_out=held_out, folder=folder)
    return _one(rng, families[_one(rng, tuple(families))])


@functools.lru_cache(maxsize=1024)
def _font(face: str, height: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(face, height, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=4096)
def _ink(text: str, face: str, height: int) -> Box:
    """The box of what is drawn of a word whose baseline begins at (0, 0)."""
    mask, (x, y) = _font(face, height).getmask2(text, mode="L", anchor="ls")
    left, top, right, bottom = mask.getbbox()
    return x + left, y + top, x + right, y + bottom


def letters(page: Page) -> list[tuple[str, float, float]]:
    """Each letter of a page and about where its middle is (x, y), in reading order; a blank ends each word."""
    found = []
    for word in page.words:
        font, (x, baseline) = _font(word.face, word.height), word.origin
        ends = [x + font.getlength(word.text[:n]) for n in range(len(word.text) + 1)]
        y = baseline - 0.3 * word.height
        found += [(letter, (a + b) / 2, y) for letter, a, b in zip(word.text, ends, ends[1:], strict=False)]
        found.append((" ", ends[-1], y))
    return found


# ---------------------------------------------------------------------------------------------------------- words


def _one(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _some(rng: np.random.Generator, options: Sequence[str], number: int) -> list[str]:
    return [options[i] for i in rng.permutation(len(options))[:number]]


def _new_word(rng: np.random.Generator) -> str:
    """A word that no dictionary has, so that it can only be read letter by letter."""
    syllables = [
        _one(rng, "bcdfghjklmnprstvwz") + _one(rng, "aeiou") + (_one(rng, "lmnrstkx") if rng.random() < 0.4 else "")
        for _ in range(rng.integers(2, 4))
    ]
    return "".join(syllables)


def _reading_word(rng: np.random.Generator) -> str:
    draw = rng.random()
    if draw < 0.12:
        return str(rng.integers(10, 10_000))
    return _new_word(rng) if draw < 0.4 else _one(rng, WORDS)


def _price(rng: np.random.Generator) -> int:
    """In hundredths."""
    return int(rng.integers(50, 4000))


def _money(hundredths: int) -> str:
    return f"{hundredths // 100}.{hundredths % 100:02d}"


# --------------------------------------------------------------------------------------------------------- layout


class _TooLong(Exception):
    """The text has no room on the page."""


class _Sheet:
    """Places words from the top of a page down."""

    def __init__(self, size: int, face: str, height: int, margin: int) -> None:
        self.size, self.face, self.height, self.margin = size, face, height, margin
        self.left, self.right, self.y = margin, size - margin, margin
        self.lines: list[Line] = []
        self.rules: list[Box] = []

    def width(self, text: str, face: str, height: int) -> int:
        return round(_font(face, height).getlength(text))

    def words(self, text: str, x: int, *, face: str = "", height: int = 0) -> list[Word]:
        """The words of a text from ``x`` on at the present height."""
        face, height = face or self.face, height or self.height
        font = _font(face, height)
        baseline = self.y + _font(self.face, height).getmetrics()[0]  # the same for all faces of a line
        space = max(round(font.getlength(" ")), 2)
        placed = []
        for text_ in text.split():
            left, top, right, bottom = _ink(text_, face, height)
            x -= min(left, 0)  # slanted letters reach back: not beyond the margin, nor over the word before
            box = (x + left, baseline + top, x + right, baseline + bottom)
            if box[2] > self.right or box[3] > self.size - self.margin:
                raise _TooLong(text)
            placed.append(Word(text=text_, box=box, origin=(x, baseline), face=face, height=height))
            x += max(round(font.getlength(text_)), right) + space
        return placed

    def add(self, words: Sequence[Word]) -> None:
        self.lines.append(Line(words=tuple(words)))

    def feed(self, lines: float = 1.0, height: int = 0) -> None:
        self.y += round(lines * 1.3 * (height or self.height))

    def heading(self, text: str, face: str, height: int, *, centred: bool) -> None:
        """A line of its own, or as many as it needs."""
        rows: list[str] = []
        for word in text.split():
            longer = f"{rows[-1]} {word}" if rows else word
            if rows and self.width(longer, face, height) <= self.right - self.left:
                rows[-1] = longer
            else:
                rows.append(word)
        for row in rows:
            x = self.left
            if centred:
                x = max((self.left + self.right - self.width(row, face, height)) // 2, self.left)
            self.add(self.words(row, x, face=face, height=height))
            self.feed(height=height)

    def paragraph(self, text: str, *, indent: int = 0) -> None:
        """Words in lines between the margins."""
        row: list[Word] = []
        x = self.left + indent
        font = _font(self.face, self.height)
        space = max(round(font.getlength(" ")), 2)
        for word in text.split():
            left, _, right, _ = _ink(word, self.face, self.height)
            if row and x + right - min(left, 0) > self.right:
                self.add(row)
                self.feed()
                row, x = [], self.left
            row += self.words(word, x)
            x = row[-1].origin[0] + max(round(font.getlength(word)), right) + space
        self.add(row)
        self.feed()

    def rule(self) -> None:
        thick = max(1, self.size // 224)
        self.rules.append((self.left, self.y, self.right, self.y + thick))
        self.y += thick + max(2, self.height // 4)


_Said = tuple[str, dict[str, str], str]  # title, fields and total


def _title(rng: np.random.Generator, sheet: _Sheet, face: str, words: int = 0) -> str:
    title = " ".join(_some(rng, WORDS, words or int(rng.integers(1, 4))))
    title = (str.title, str.upper, str.capitalize)[rng.integers(3)](title)
    height = round(sheet.height * rng.uniform(1.2, 1.6))
    sheet.heading(title, face, height, centred=bool(rng.random() < 0.5))
    sheet.feed(0.4)
    return title


def _prose(rng: np.random.Generator, words: int) -> str:
    """Sentences of random words."""
    text: list[str] = []
    while words > 0:
        sentence = [_one(rng, WORDS) for _ in range(min(int(rng.integers(4, 9)), words))]
        words -= len(sentence)
        text += [sentence[0].capitalize(), *sentence[1:]]
        text[-1] += "."
    return " ".join(text)


def _room(sheet: _Sheet) -> int:
    """About how many words fit between here and the foot of the page."""
    rows = (sheet.size - sheet.y - sheet.margin) / (1.3 * sheet.height)
    return max(int(rows * (sheet.right - sheet.left) / sheet.width("average ", sheet.face, sheet.height)), 1)


def _article(rng: np.random.Generator, sheet: _Sheet, face: str) -> _Said:
    title = _title(rng, sheet, face)
    room = _room(sheet) * rng.uniform(0.3, 0.8)
    indent = sheet.height if rng.random() < 0.3 else 0
    for _ in range(rng.integers(1, 4)):
        sheet.paragraph(_prose(rng, max(int(room / 3), 3)), indent=indent)
        sheet.feed(0.4)
    return title, {}, ""


def _columns(rng: np.random.Generator, sheet: _Sheet, face: str) -> _Said:
    title = _title(rng, sheet, face)
    top, left, right = sheet.y, sheet.left, sheet.right
    gap = 2 * sheet.height
    width = (right - left - gap) // 2
    for start in (left, left + width + gap):
        sheet.left, sheet.right, sheet.y = start, start + width, top
        sheet.paragraph(_prose(rng, max(int(_room(sheet) * rng.uniform(0.4, 0.75)), 3)))
    return title, {}, ""


def _form(rng: np.random.Generator, sheet: _Sheet, face: str) -> _Said:
    title = _title(rng, sheet, face) if rng.random() < 0.7 else ""
    rows = int((sheet.size - sheet.margin - sheet.y) / (1.8 * sheet.height))
    keys = _some(rng, _KEYS, int(rng.integers(2, max(min(rows, 8), 2) + 1)))
    aligned = rng.random() < 0.5
    shown = [f"{key.capitalize()}:" for key in keys]
    tab = max(sheet.width(f"{key}  ", face, sheet.height) for key in shown)
    fields = {}
    for key, label in zip(keys, shown, strict=True):
        if key in _NUMERIC_KEYS:
            value = str(rng.integers(10, 10_000))
        elif rng.random() < 0.5:
            value = _new_word(rng).capitalize()
        else:
            value = " ".join(_some(rng, WORDS, int(rng.integers(1, 3))))
        words = sheet.words(label, sheet.left, face=face)
        x = sheet.left + (tab if aligned else sheet.width(f"{label} ", face, sheet.height) + 2)
        sheet.add([*words, *sheet.words(value, x)])
        sheet.feed(rng.uniform(1.2, 1.4))
        fields[key] = value.lower()
    return title, fields, ""


def _row(sheet: _Sheet, cells: Sequence[str], edges: Sequence[int], face: str = "") -> None:
    """The first cell at the left edge, the others flush with the right ends of their columns."""
    words = sheet.words(cells[0], sheet.left, face=face)
    for cell, edge in zip(cells[1:], edges, strict=True):
        x = edge - sheet.width(cell, face or sheet.face, sheet.height)
        if x < words[-1].box[2] + sheet.height // 2:
            raise _TooLong(cell)
        words += sheet.words(cell, x, face=face)
    sheet.add(words)
    sheet.feed()


def _table(rng: np.random.Generator, sheet: _Sheet, face: str) -> _Said:
    title = _title(rng, sheet, face) if rng.random() < 0.7 else ""
    columns = _some(rng, _COLUMNS, int(rng.integers(1, 3 if sheet.size < 200 else 4)))
    rows = int((sheet.size - sheet.margin - sheet.y) / (1.7 * sheet.height)) - 1
    names = _some(rng, WORDS, int(rng.integers(2, max(min(rows, 7), 2) + 1)))
    ruled = rng.random() < 0.5
    # A third of the width for the names, the rest for the columns.
    first = sheet.left + (sheet.right - sheet.left) // 3
    edges = [first + (sheet.right - first) * (i + 1) // len(columns) - 1 for i in range(len(columns))]
    _row(sheet, ["Item", *(column.capitalize() for column in columns)], edges, face)
    sheet.rule()
    fields: dict[str, str] = {}
    for name in names:
        cells = [str(rng.integers(1, 1000)) for _ in columns]
        _row(sheet, [name, *cells], edges)
        if ruled:
            sheet.rule()
        fields |= {f"{column} of {name}": cell for column, cell in zip(columns, cells, strict=True)}
    return title, fields, ""


def _receipt(rng: np.random.Generator, sheet: _Sheet, face: str) -> _Said:
    title = _title(rng, sheet, face, words=int(rng.integers(1, 3)))
    rows = int((sheet.size - sheet.margin - sheet.y) / (1.35 * sheet.height)) - 2
    items = _some(rng, WORDS, int(rng.integers(2, max(min(rows, 8), 2) + 1)))
    prices = [_price(rng) for _ in items]
    edges = [sheet.right - 1]
    for item, price in zip(items, prices, strict=True):
        _row(sheet, [item, _money(price)], edges)
    sheet.rule()
    total = _money(sum(prices))
    _row(sheet, [_one(rng, _TOTALS), total], edges, face)
    return title, {f"price of {item}": _money(price) for item, price in zip(items, prices, strict=True)}, total


_LAYOUTS: Final[Mapping[str, Callable[[np.random.Generator, _Sheet, str], _Said]]] = {
    "article": _article,
    "columns": _columns,
    "form": _form,
    "table": _table,
    "receipt": _receipt,
}


def _inks(rng: np.random.Generator) -> tuple[_Colour, _Colour]:
    """Ink and paper: dark on light, now and then light on dark."""
    light, dark = rng.integers(205, 256, 3).tolist(), rng.integers(0, 90, 3).tolist()
    pair = ((dark[0], dark[1], dark[2]), (light[0], light[1], light[2]))
    return pair if rng.random() < 0.85 else (pair[1], pair[0])


def page(
    rng: np.random.Generator,
    *,
    kind: str | None = None,
    size: int = 224,
    held_out: bool = False,
    folder: Path = FONTS,
) -> Page:
    """A random page.

    Args:
        kind: one of ``KINDS``; drawn at random where not given.
        size: the side in pixels.
        held_out: its fonts are of the families that training never sees.
        folder: where fonts lie.

    Raises:
        DataError: there is no such kind, no font, or the size is below ``MIN_SIZE``.
    """
    if size < MIN_SIZE:
        raise DataError(f"a page of {size} px has no room for text: at least {MIN_SIZE}, or a line")
    if kind is None:
        kind = _one(rng, KINDS)
    elif kind not in KINDS:
        raise DataError(f"no kind of page {kind!r}{did_you_mean(kind, KINDS)}")
    ink, paper = _inks(rng)
    for attempt in range(_TRIES):
        body = _face(rng, held_out, folder)
        heading = body if rng.random() < 0.5 else _face(rng, held_out, folder)
        height = max(round(size / rng.uniform(13, 24)) - attempt // 10, _SMALLEST)
        sheet = _Sheet(size, body, height, margin=math.ceil(size * rng.uniform(_MARGIN, 0.07)))
        try:
            title, fields, total = _LAYOUTS[kind](rng, sheet, heading)
        except _TooLong:
            continue
        return Page(
            kind=kind, size=size, lines=tuple(sheet.lines), rules=tuple(sheet.rules), ink=ink, paper=paper,
            title=title, fields=fields, total=total,
        )  # fmt: skip
    raise AssertionError(f"no {kind} of {size} px was found in {_TRIES} tries")


def line(
    rng: np.random.Generator,
    *,
    words: int | None = None,
    size: int = 224,
    held_out: bool = False,
    folder: Path = FONTS,
) -> Page:
    """One to three words alone, large or small, anywhere in the picture: the test of reading.

    Some are words of no language and some are numbers, so that knowing the words does not help. Longer texts go on in
    a second or third row.

    Args:
        words: how many, 1 to 3; drawn at random where not given.
        size: the side in pixels.
        held_out: the font is of a family that training never sees.
        folder: where fonts lie.

    Raises:
        DataError: there is no font, or the size is below ``MIN_LINE_SIZE``.
    """
    if size < MIN_LINE_SIZE:
        raise DataError(f"a picture of {size} px has no room for a word: at least {MIN_LINE_SIZE}")
    count = int(rng.integers(1, 4)) if words is None else words
    assert 1 <= count <= 3, f"{count} words; a line has 1 to 3"
    ink, paper = _inks(rng)
    case = (str, str, str.capitalize, str.upper)[rng.integers(4)]
    least = max(_SMALLEST + 1, size // 22)
    for _ in range(_TRIES):
        face = _face(rng, held_out, folder)
        text = case(" ".join(_reading_word(rng) for _ in range(count)))
        # Small and large letters are equally frequent on a scale of ratios.
        height = round(least * (size / 3 / least) ** rng.random())
        for fitting in range(height, least - 1, -1):
            sheet = _Sheet(size, face, fitting, margin=math.ceil(_MARGIN * size))
            try:
                sheet.paragraph(text)
            except _TooLong:
                continue
            lines = _moved(rng, sheet.lines, size)
            if lines is None:
                continue
            return Page(
                kind="line", size=size, lines=lines, rules=(), ink=ink, paper=paper, title="", fields={}, total=""
            )
    raise AssertionError(f"no words for {size} px were found in {_TRIES} tries")


def _moved(rng: np.random.Generator, lines: Sequence[Line], size: int) -> tuple[Line, ...] | None:
    """The lines together at a random place inside the picture; None where their ink, slanted perhaps, is too wide."""
    lefts, tops, rights, bottoms = zip(*(line.box for line in lines), strict=True)
    margin = math.ceil(_MARGIN * size)
    if max(max(rights) - min(lefts), max(bottoms) - min(tops)) > size - 2 * margin:
        return None
    across = int(rng.integers(margin - min(lefts), size - margin - max(rights) + 1))
    down = int(rng.integers(margin - min(tops), size - margin - max(bottoms) + 1))

    def moved(word: Word) -> Word:
        left, top, right, bottom = word.box
        return Word(
            text=word.text,
            box=(left + across, top + down, right + across, bottom + down),
            origin=(word.origin[0] + across, word.origin[1] + down),
            face=word.face,
            height=word.height,
        )

    return tuple(Line(words=tuple(moved(word) for word in line.words)) for line in lines)


# --------------------------------------------------------------------------------------------------------- drawing


def wear(rng: np.random.Generator) -> Wear:
    """A page as it comes out of a scanner or camera; about a third of them are hardly touched."""
    strength = max(0.0, float(rng.uniform(-0.5, 1)))
    return Wear(
        angle=float(rng.uniform(-_MAX_ANGLE, _MAX_ANGLE)) * strength,
        fade=float(rng.uniform(0, 0.5)) * strength,
        uneven=float(rng.uniform(0, 40)) * strength,
        noise=float(rng.uniform(0, 14)) * strength,
        seed=int(rng.integers(2**31)),
    )


def render(page: Page, size: int, wear: Wear | None = None) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The picture of a page, resized where ``size`` is not the one for which it was laid out."""
    worn = wear or Wear()
    ink = tuple(round(i + (p - i) * worn.fade) for i, p in zip(page.ink, page.paper, strict=True))
    canvas = Image.new("RGB", (page.size, page.size), page.paper)
    pen = ImageDraw.Draw(canvas)
    for left, top, right, bottom in page.rules:
        pen.rectangle((left, top, right - 1, bottom - 1), fill=ink)
    for word in page.words:
        pen.text(word.origin, word.text, fill=ink, font=_font(word.face, word.height), anchor="ls")
    if worn.angle:
        canvas = canvas.rotate(worn.angle, Image.Resampling.BICUBIC, fillcolor=page.paper)
    if size != page.size:
        canvas = canvas.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(canvas)
    if not worn.uneven and not worn.noise:
        return pixels
    rng = np.random.default_rng(worn.seed)
    changed = pixels + worn.uneven * _shadows(rng, size) + worn.noise * rng.standard_normal(pixels.shape, np.float32)
    return changed.round().clip(0, 255).astype(np.uint8)


def _shadows(rng: np.random.Generator, size: int) -> Float[np.ndarray, "{size} {size} 1"]:
    """A slow change between -1 and 1."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (4, 4)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BILINEAR))[..., None]


# ------------------------------------------------------------------------------------------------------- questions

WORDINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "read": (
        "what does it say?",
        "what is written here?",
        "read the text.",
        "what does the picture say?",
        "which words do you see?",
        "what is the text in the image?",
        "transcribe what is written.",
    ),
    "title": (
        "what is the title?",
        "read the title.",
        "what is the title of the page?",
        "what does the title say?",
        "which title does the page have?",
        "what is the page called?",
        "give the title of this document.",
    ),
    "value": (
        "what is the {a}?",
        "what {a} is given?",
        "read the {a}.",
        "which {a} does the page show?",
        "tell me the {a}.",
        "give the {a}.",
        "what does the page say for the {a}?",
    ),
    "next": (
        'what word follows "{a}"?',
        'which word comes after "{a}"?',
        'what is the word after "{a}"?',
        'what comes right after "{a}"?',
        'read the word that follows "{a}".',
        '"{a}" is followed by which word?',
        'after "{a}", what is the next word?',
    ),
    "total": (
        "what is the total?",
        "how much is the total?",
        "what does it cost in total?",
        "read the total.",
        "which total does the receipt show?",
        "how much has to be paid?",
        "what does everything cost together?",
    ),
}
QUESTIONS: Final = tuple(WORDINGS)


def _bare(word: str) -> str:
    return word.strip(string.punctuation).lower()


def _followers(page: Page) -> list[tuple[str, str]]:
    """Each word that the page has once, and the next one in its line, where no sentence ends between them."""
    counts = Counter(_bare(word.text) for word in page.words)
    return [
        (_bare(first.text), _bare(second.text))
        for line in page.lines
        for first, second in zip(line.words, line.words[1:], strict=False)
        if counts[_bare(first.text)] == 1 and not first.text.endswith(".")
    ]


def _candidates(page: Page) -> dict[str, list[tuple[str, str]]]:
    """By kind of question, what it is about and the answer."""
    reading = page.kind == "line"
    found = {
        "read": [("", page.text.replace("\n", " ").lower())] if reading else [],
        "title": [("", page.title.lower())] if page.title else [],
        "value": sorted(page.fields.items()),
        "next": _followers(page) if page.kind in ("article", "columns") else [],
        "total": [("", page.total)] if page.total else [],
    }
    return {kind: options for kind, options in found.items() if options}


def ask(page: Page, rng: np.random.Generator, *, kind: str | None = None, reworded: bool = False) -> Asked | None:
    """A question about a page; answers are in lower case.

    Args:
        kind: one of ``QUESTIONS``; by default any that the page allows.
        reworded: one of the wordings that training never sees.

    Returns:
        The question, None where the page allows none of that kind.

    Raises:
        DataError: there is no such kind.
    """
    if kind is not None and kind not in QUESTIONS:
        raise DataError(f"no kind of question {kind!r}{did_you_mean(kind, QUESTIONS)}")
    found = _candidates(page)
    kind = kind or (_one(rng, tuple(found)) if found else "")
    if kind not in found:
        return None
    about, answer = found[kind][rng.integers(len(found[kind]))]
    paraphrase, template = wording(rng, WORDINGS[kind], reworded=reworded)
    return Asked(kind=kind, question=template.format(a=about), answer=answer, paraphrase=paraphrase)
