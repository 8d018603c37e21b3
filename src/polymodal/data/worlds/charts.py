"""Charts of made-up numbers whose every value is known, drawn by matplotlib in many styles, and questions about them.

Words (names of categories and series), combinations of style and wordings of questions are each split by hash or by
number: what evaluation asks for never occurs in training. Values that are not written on the chart lie on quarters of
the axis' ticks, so that they can be read off.

Axes objects of matplotlib take 25 ms a chart more than the artists that they hold: the charts are laid out here, in
pixels, from rectangles, lines, wedges and texts on a bare figure.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import ImageFont

from polymodal.core.errors import DataError, MissingDependency, did_you_mean
from polymodal.data.worlds.asked import Asked, chance, wording

if TYPE_CHECKING:
    from matplotlib.artist import Artist

KINDS: Final = ("bar", "grouped", "line", "pie")
MIN_SIZE: Final = 56

_HELD_OUT_WORDS = 0.3
_HELD_OUT_STYLES = 0.12
_SMALLEST_TEXT = 8.5  # pixels; below it, digits run together
_SMALL = 100  # pixels; charts below it are kept simple
_GRID = 20  # values without a label are multiples of one in so many of the highest that the axis shows

_TOPICS: Final[Mapping[str, str]] = {
    "fruit": (
        "apple pear plum cherry grape lemon orange banana mango peach melon kiwi fig lime apricot papaya "
        "quince berry date olive guava coconut"
    ),
    "animal": (
        "cat dog horse cow sheep goat pig duck goose hen fox wolf bear deer lion tiger zebra camel otter seal "
        "whale shark frog toad"
    ),
    "city": (
        "paris rome london berlin madrid vienna oslo lisbon athens dublin prague warsaw cairo lima tokyo "
        "delhi seoul quito boston denver dallas miami"
    ),
    "sport": (
        "tennis soccer rugby golf hockey boxing rowing skiing judo karate chess cricket squash polo diving "
        "surfing fencing archery sailing running"
    ),
    "job": (
        "baker cook pilot nurse doctor lawyer farmer tailor judge clerk driver painter singer actor writer "
        "miner teacher barber butcher plumber"
    ),
    "drink": ("tea coffee water milk juice cocoa soda beer wine cider punch rum gin cola mate sake broth nectar shake"),
    "metal": "iron gold silver copper tin zinc lead nickel cobalt steel brass bronze chrome titan tungsten mercury",
    "plant": (
        "oak elm ash fir pine birch maple cedar willow poplar rose tulip lily daisy iris moss fern ivy clover thistle"
    ),
    "furniture": "chair table sofa bed desk lamp shelf stool bench mirror carpet drawer cradle couch rack cabinet",
}
_YEARS: Final = " ".join(str(year) for year in range(1960, 2040))
_SERIES: Final = (
    "north south east west old new plan actual online store home away men women urban rural public private adults "
    "children summer winter import export"
)
_MEASURES: Final = (
    "sales cost price visitors score weight votes profit users hours orders tons staff output demand stock"
)
_PALETTES: Final[Mapping[str, str]] = {
    "primary": "1f77b4 ff7f0e 2ca02c d62728 9467bd 8c564b e377c2 17becf",
    "safe": "0072b2 e69f00 009e73 cc79a7 56b4e9 c04000 8a8a00 7a5fa0",
    "muted": "4878cf d65f5f 6acc65 b47cc7 c4ad66 77bedb 8c613c 808080",
    "vivid": "e6194b 3cb44b 4363d8 f58231 911eb4 00a5a5 f032e6 9a6324",
    "earth": "8c510a cf9a3d 35978f b2182b 7a8f2e 6fc7bd 5c6b8a d98a73",
    "sea": "08519c 41ab5d 9e9ac8 3fa7d6 1b7837 6a51a3 00c2a8 7f8fa9",
    "warm": "b10026 fd8d3c e7298a 993404 c98500 ff5a36 d67ab1 7a4b8c",
    "candy": "ff006e 06a77d 118ab2 f78c6b 8338ec d4a017 6b4226 8ecae6",
    "ink": "44546a 5b9bd5 c55a11 70ad47 d0a000 7030a0 a9a9b5 a05252",
}
_THEMES: Final[Mapping[str, str]] = {  # paper, plotting area, text
    "white": "ffffff ffffff 111111",
    "gray": "ffffff e9e9ee 222222",
    "cream": "fbf6e6 fbf6e6 3a2f1b",
    "blue": "eef4fb ffffff 16324f",
    "dark": "1c1f26 1c1f26 f0f0f0",
    "slate": "f4f4f4 dfe6ea 2a2a2a",
}
_FONTS: Final = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")  # files that matplotlib carries along
_MARKERS: Final = ("o", "s", "D", "^")
_TOPS: Final = (10, 20, 40, 50, 80, 100, 200, 400, 500, 1000, 2000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """How a chart is drawn.

    Attributes:
        scale: of the text, around 1.
        labelled: values are written beside the bars and points, and as per cent on the slices.
        ticks: the axis shows its values; always where it is the only way to read them.
        filled: share of its slot that a bar fills.
        colourful: bars of one series differ in colour.
        legend: slices are named in a legend instead of beside them.
        turn: the colour that comes first, and where a pie starts.
    """

    palette: str
    theme: str
    font: str
    scale: float
    labelled: bool
    ticks: bool
    grid: bool
    horizontal: bool
    filled: float
    edged: bool
    colourful: bool
    legend: bool
    marker: str
    capitals: bool
    turn: int

    @property
    def held_out(self) -> bool:
        """Whether training never sees this palette, theme and font together."""
        return chance("style", self.palette, self.theme, self.font) < _HELD_OUT_STYLES


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Numbers and how they are drawn.

    Attributes:
        kind: one of ``KINDS``.
        title: empty where there is no room for one.
        categories: names of the bars, groups, points or slices.
        series: names of the bars of a group or of the lines; one empty name where there is one series.
        values: by series, then by category; those of a pie are per cent and sum to 100.
        top: the highest value that the axis shows.
    """

    kind: str
    title: str
    categories: tuple[str, ...]
    series: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    top: float
    style: Style


# --------------------------------------------------------------------------------------------------------- numbers


def held_out_word(word: str) -> bool:
    """Whether training never sees a category or series of this name."""
    return chance("chart word", word) < _HELD_OUT_WORDS


@functools.lru_cache(maxsize=256)
def _words(names: str, held_out: bool, longest: int) -> tuple[str, ...]:
    return tuple(name for name in names.split() if held_out_word(name) == held_out and len(name) <= longest)


def _one(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _some(rng: np.random.Generator, options: Sequence[str], number: int) -> tuple[str, ...]:
    return tuple(options[i] for i in rng.permutation(len(options))[:number])


def _style(rng: np.random.Generator, kind: str, small: bool, held_out: bool) -> Style:
    while True:
        labelled = bool(rng.random() < 0.5) and not (small and kind in ("grouped", "line"))
        style = Style(
            palette=_one(rng, tuple(_PALETTES)),
            theme=_one(rng, tuple(_THEMES)),
            font=_one(rng, _FONTS[:1] if small else _FONTS),
            scale=float(rng.uniform(0.9, 1.15)),
            labelled=labelled,
            ticks=not labelled or (bool(rng.random() < 0.6) and not small),
            grid=bool(rng.random() < 0.5),
            horizontal=kind == "bar" and bool(rng.random() < (0.7 if small else 0.35)),
            filled=float(rng.uniform(0.8 if kind == "grouped" else 0.55, 0.9)),
            edged=bool(rng.random() < 0.25),
            colourful=bool(rng.random() < 0.4),
            legend=small or bool(rng.random() < 0.5),
            marker=_one(rng, _MARKERS),
            capitals=bool(rng.random() < 0.4),
            turn=int(rng.integers(8)),
        )
        if style.held_out == held_out:
            return style


def _numbers(rng: np.random.Generator, count: int, top: int, labelled: bool) -> tuple[float, ...]:
    """Different values that can be told apart, on the grid of the axis unless they are written on the chart."""
    steps = rng.permutation(np.arange(2, _GRID + 1))[:count]
    if not labelled:
        return tuple(float(step * top / _GRID) for step in steps)
    unit = 1.0 if top >= 40 else 0.1
    near = (steps - 0.5 + rng.uniform(-0.25, 0.25, count)) * top / _GRID
    return tuple(float(round(round(value / unit) * unit, 1)) for value in near)


def _shares(rng: np.random.Generator, count: int) -> tuple[float, ...]:
    """Whole per cents that sum to 100 and of which no two are nearly the same."""
    while True:
        weights = rng.uniform(1.25, 1.7) ** np.arange(count)
        shares = np.round(100 * weights / weights.sum()).astype(int)
        shares[-1] += 100 - shares.sum()
        ordered = np.sort(shares)
        if ordered[0] >= 6 and (ordered[1:] >= 1.2 * ordered[:-1]).all():
            return tuple(float(share) for share in rng.permutation(shares))


def chart(rng: np.random.Generator, *, kind: str | None = None, size: int = 224, held_out: bool = False) -> Chart:
    """A random chart.

    Args:
        kind: one of ``KINDS``; drawn at random where not given.
        size: the side in pixels at which it will be drawn: small charts have fewer bars and shorter names.
        held_out: words and style are those that training never sees.

    Raises:
        DataError: there is no such kind, or the size is below ``MIN_SIZE``.
    """
    if size < MIN_SIZE:
        raise DataError(f"a chart of {size} px cannot be read: at least {MIN_SIZE}")
    if kind is None:
        kind = _one(rng, KINDS if size >= _SMALL else ("bar", "pie"))
    elif kind not in KINDS:
        raise DataError(f"no kind of chart {kind!r}{did_you_mean(kind, KINDS)}")
    small = size < _SMALL
    style = _style(rng, kind, small, held_out)
    most = min(max(size // 24, 2), 8)
    longest = 4 if small else 8
    known = {topic: _words(words, held_out, longest) for topic, words in _TOPICS.items()}
    topic = "year" if kind == "line" else _one(rng, [topic for topic, words in known.items() if len(words) >= 2])
    series: tuple[str, ...] = ("",)
    tops = [top for top in _TOPS if top <= (100 if small else 500 if kind == "grouped" else 2000)]
    top = int(tops[rng.integers(len(tops))])
    if kind == "pie":
        most = min(most, 6)
    elif kind == "grouped" or (kind == "line" and not small and rng.random() < 0.4):
        number = int(rng.integers(2, 4)) if most >= 6 else 2
        series = _some(rng, _words(_SERIES, held_out, longest), number)
        if kind == "grouped":
            most = max((min(most, 6) if style.labelled else most) // number, 2)
    count = int(rng.integers(2, most + 1))
    if kind == "line":
        # Three or four years even in a small chart: their names are short, and two points are hardly a line.
        count = max(count, 3)
        categories = tuple(sorted(_some(rng, _words(_YEARS, held_out, longest), count)))
        if len(series) > 1:  # numbers beside crossing lines would lie upon each other
            style = dataclasses.replace(style, labelled=False, ticks=True)
    else:
        categories = _some(rng, known[topic], count)
    while True:
        if kind == "pie":
            values: tuple[tuple[float, ...], ...] = (_shares(rng, len(categories)),)
        else:
            values = tuple(_numbers(rng, len(categories), top, style.labelled) for _ in series)
        if all(len(set(column)) == len(series) for column in zip(*values, strict=True)):
            break  # series differ in every category, too
    title = f"{_one(rng, _MEASURES.split())} by {topic}" if not small else ""
    return Chart(
        kind=kind, title=title, categories=categories, series=series, values=values, top=float(top), style=style
    )


# --------------------------------------------------------------------------------------------------------- drawing


def _file(font: str) -> Path:
    """By path, never by name: what is found by name depends on the machine's fonts and on a cache of them."""
    from matplotlib import get_data_path

    return Path(get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"


@functools.lru_cache(maxsize=8)
def _measure(font: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_file(font), 100)


def _distance(a: str, b: str) -> float:
    return math.dist(*(tuple(int(colour[i : i + 2], 16) for i in (0, 2, 4)) for colour in (a, b)))


def _colours(style: Style) -> list[str]:
    """The palette without what can hardly be seen on the plotting area, as ``#rrggbb``."""
    area = _THEMES[style.theme].split()[1]
    seen = [colour for colour in _PALETTES[style.palette].split() if _distance(colour, area) > 90]
    turn = style.turn % len(seen)
    return ["#" + colour for colour in seen[turn:] + seen[:turn]]


def number_text(value: float) -> str:
    """A value as charts and answers write it: without needless zeros."""
    return f"{round(value, 6):g}"


class _Sheet:
    """A figure that is drawn on in pixels from its lower left corner."""

    def __init__(self, size: int, style: Style) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.transforms import IdentityTransform

        self.size, self.style, self.count = float(size), style, 0
        self.paper, self.area, self.ink = ("#" + colour for colour in _THEMES[style.theme].split())
        self.figure = Figure(figsize=(size / 100, size / 100), dpi=100, facecolor=self.paper)
        self.canvas = FigureCanvasAgg(self.figure)
        self.pixels = IdentityTransform()
        self.height = max(0.042 * size * style.scale, _SMALLEST_TEXT)
        self.stroke = max(size / 224, 0.6)
        self.letters: list[tuple[str, float, float]] = []

    def add(self, artist: Artist) -> None:
        artist.set_transform(self.pixels)
        self.count += 1
        artist.set_zorder(self.count)  # in the order of drawing, whatever the kind
        self.figure.add_artist(artist)

    def width(self, text: str, height: float) -> float:
        return _measure(self.style.font).getlength(text) * height / 100

    def fitting(self, texts: Sequence[str], room: float, height: float) -> float:
        """A height at which each text is at most ``room`` wide, where that can be read."""
        widest = max(self.width(text, height) for text in texts)
        return max(min(height, height * room / widest), min(height, _SMALLEST_TEXT))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        height: float,
        *,
        across: Literal["left", "center", "right"] = "center",
        down: Literal["top", "center", "bottom", "baseline"] = "center",
        colour: str | None = None,
        upright: bool = False,
    ) -> None:
        from matplotlib.text import Text

        if not upright:
            left = x - {"left": 0.0, "center": 0.5, "right": 1.0}[across] * self.width(text, height)
            middle = y + {"top": -0.5, "center": 0.0, "bottom": 0.5, "baseline": 0.3}[down] * height
            ends = [left + self.width(text[:n], height) for n in range(len(text) + 1)]
            self.letters += [
                (letter, (a + b) / 2, self.size - middle) for letter, a, b in zip(text, ends, ends[1:], strict=False)
            ]
            self.letters.append((" ", ends[-1], self.size - middle))
        self.add(
            Text(
                x, y, text, fontsize=height * 0.72, font=_file(self.style.font), color=colour or self.ink,
                rotation=90 if upright else 0, horizontalalignment=across, verticalalignment=down, parse_math=False,
            )
        )  # fmt: skip

    def box(self, left: float, bottom: float, width: float, height: float, colour: str, *, edged: bool = False) -> None:
        from matplotlib.patches import Rectangle

        edge = dict(edgecolor=self.ink, linewidth=0.5 * self.stroke) if edged else dict(linewidth=0)
        self.add(Rectangle((left, bottom), width, height, facecolor=colour, **edge))

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: str, width: float, marker: str = "") -> None:
        from matplotlib.lines import Line2D

        self.add(
            Line2D(xs, ys, color=colour, linewidth=width * self.stroke, marker=marker, markersize=3.5 * self.stroke)
        )

    def named(self, name: str) -> str:
        return name.capitalize() if self.style.capitals else name

    def pixels_drawn(self) -> UInt8[np.ndarray, "size size 3"]:
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()


def render(chart: Chart, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The picture of a chart; equal charts give equal pictures.

    Raises:
        DataError: the size is below ``MIN_SIZE``.
        MissingDependency: matplotlib is not installed.
    """
    if size < MIN_SIZE:
        raise DataError(f"a chart of {size} px cannot be read: at least {MIN_SIZE}")
    return _drawn(chart, size).pixels_drawn()


def letters(chart: Chart, size: int) -> list[tuple[str, float, float]]:
    """Each letter and digit that stands upright, and about where its middle is (x, y); a blank ends each text."""
    return _drawn(chart, size).letters


def _drawn(chart: Chart, size: int) -> _Sheet:
    try:
        sheet = _Sheet(size, chart.style)
    except ImportError as error:
        raise MissingDependency("drawing charts", "matplotlib", "train") from error
    ceiling = size - 0.3 * sheet.height
    if chart.title:
        height = sheet.fitting([chart.title], 0.96 * size, 1.1 * sheet.height)
        sheet.text(size / 2, ceiling, sheet.named(chart.title), height, down="top")
        ceiling -= 1.4 * height
    if chart.kind == "pie":
        _pie(chart, sheet, ceiling)
        return sheet
    colours = _colours(chart.style)
    if len(chart.series) > 1:
        ceiling = _legend_row(chart.series, colours, sheet, ceiling)
    (_rows if chart.style.horizontal else _columns)(chart, sheet, ceiling)
    return sheet


def _legend_row(names: Sequence[str], colours: Sequence[str], sheet: _Sheet, ceiling: float) -> float:
    """Coloured squares with names in one row; returns the height that is left below."""
    texts = [sheet.named(name) for name in names]

    def widths(height: float) -> list[float]:
        return [sheet.width(text, height) + 2 * height for text in texts]

    height = sheet.height
    height = min(height, height * 0.98 * sheet.size / sum(widths(height)))
    left = (sheet.size - sum(widths(height)) + 0.6 * height) / 2
    for text, colour, width in zip(texts, colours, widths(height), strict=False):
        sheet.box(left, ceiling - 1.05 * height, 0.8 * height, 0.8 * height, colour, edged=sheet.style.edged)
        sheet.text(left + 1.1 * height, ceiling - 0.65 * height, text, height, across="left")
        left += width
    return ceiling - 1.5 * height


def _ticks(top: float, length: float, height: float) -> list[float]:
    """Zero and as many steps to the top, of five, two or one, as there is room for."""
    steps = next((n for n in (5, 2) if length / n >= 1.5 * height), 1)
    return [top * i / steps for i in range(steps + 1)]


def _columns(chart: Chart, sheet: _Sheet, ceiling: float) -> None:
    """Bars that stand, groups of them, or lines."""
    style, size, height = chart.style, sheet.size, sheet.height
    small = max(0.9 * height, _SMALLEST_TEXT)
    tick_room = max(sheet.width(number_text(v), small) for v in _ticks(chart.top, size, small)) + 0.8 * height
    left = tick_room if style.ticks else 0.6 * height
    right = size - 0.6 * height
    slot = (right - left) / len(chart.categories)
    names = [sheet.named(name) for name in chart.categories]
    name_height = sheet.fitting(names, 0.94 * slot, height)
    widest = max(sheet.width(name, name_height) for name in names)
    upright = widest > 0.98 * slot
    if upright:
        name_height = max(0.9 * height, _SMALLEST_TEXT)
        widest = max(sheet.width(name, name_height) for name in names)
    floor = (widest if upright else name_height) + 0.8 * height
    roof = ceiling - (1.3 * height if style.labelled else 0.5 * height)
    rise = (roof - floor) / chart.top

    sheet.box(left, floor, right - left, ceiling - floor, sheet.area)
    if style.ticks:
        for tick in _ticks(chart.top, roof - floor, small):
            at = floor + tick * rise
            if style.grid:
                sheet.line([left, right], [at, at], "#a0a0a0", 0.4)
            sheet.line([left - 0.25 * height, left], [at, at], sheet.ink, 0.6)
            sheet.text(left - 0.4 * height, at, number_text(tick), small, across="right")
        sheet.line([left, left], [floor, ceiling], sheet.ink, 0.6)
    for i, name in enumerate(names):
        x = left + (i + 0.5) * slot
        sheet.text(x, floor - 0.3 * height, name, name_height, down="top", upright=upright)

    colours = _colours(style)
    if chart.kind == "line":
        xs = [left + (i + 0.5) * slot for i in range(len(names))]
        for values, colour in zip(chart.values, colours, strict=False):
            sheet.line(xs, [floor + v * rise for v in values], colour, 1.3, style.marker)
            if style.labelled:
                fits = sheet.fitting([number_text(v) for v in values], 0.95 * slot, small)
                for i, (x, value) in enumerate(zip(xs, values, strict=True)):
                    # Where the line comes down from both sides, the room is below.
                    beside = values[max(i - 1, 0) : i] + values[i + 1 : i + 2]
                    under = value < min(beside) and value * rise > 2 * height
                    y = floor + value * rise + (-0.4 if under else 0.4) * height
                    sheet.text(x, y, number_text(value), fits, down="top" if under else "bottom")
    else:
        width = style.filled * slot / len(chart.series)
        texts = [number_text(v) for values in chart.values for v in values]
        fits = sheet.fitting(texts, 0.97 * (width if len(chart.series) > 1 else slot), small)
        for j, values in enumerate(chart.values):
            for i, value in enumerate(values):
                x = left + (i + 0.5) * slot + (j - len(chart.series) / 2) * width
                colour = colours[(i if style.colourful and len(chart.series) == 1 else j) % len(colours)]
                sheet.box(x, floor, width, value * rise, colour, edged=style.edged)
                if style.labelled:
                    y = floor + value * rise + 0.15 * height
                    sheet.text(x + width / 2, y, number_text(value), fits, down="bottom")
    sheet.line([left, right], [floor, floor], sheet.ink, 0.8)


def _rows(chart: Chart, sheet: _Sheet, ceiling: float) -> None:
    """Bars that lie; the first category is on top."""
    style, size, height = chart.style, sheet.size, sheet.height
    names = [sheet.named(name) for name in chart.categories]
    small = max(0.9 * height, _SMALLEST_TEXT)
    name_height = sheet.fitting(names, 0.4 * size, height)
    left = max(sheet.width(name, name_height) for name in names) + 0.9 * height
    (values,) = chart.values
    most = number_text(chart.top)
    label_room = max(sheet.width(number_text(v), small) for v in values)
    right = size - max(0.6 * height, 0.6 * sheet.width(most, small) if style.ticks else 0.0)
    wall = right - (label_room if style.labelled else 0)
    floor = (1.6 if style.ticks else 0.5) * height
    run = (wall - left) / chart.top
    slot = (ceiling - floor) / len(names)

    sheet.box(left, floor, right - left, ceiling - floor, sheet.area)
    if style.ticks:
        for tick in _ticks(chart.top, wall - left, 1.1 * sheet.width(most, small)):
            at = left + tick * run
            if style.grid:
                sheet.line([at, at], [floor, ceiling], "#a0a0a0", 0.4)
            sheet.line([at, at], [floor - 0.25 * height, floor], sheet.ink, 0.6)
            sheet.text(at, floor - 0.4 * height, number_text(tick), small, down="top")
        sheet.line([left, right], [floor, floor], sheet.ink, 0.6)
    colours = _colours(style)
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        y = ceiling - (i + 0.5) * slot
        width = style.filled * slot
        colour = colours[(i if style.colourful else 0) % len(colours)]
        sheet.box(left, y - width / 2, value * run, width, colour, edged=style.edged)
        sheet.text(left - 0.35 * height, y, name, name_height, across="right")
        if style.labelled:
            sheet.text(left + value * run + 0.25 * height, y, number_text(value), small, across="left")
    sheet.line([left, left], [floor, ceiling], sheet.ink, 0.8)


def _pie(chart: Chart, sheet: _Sheet, ceiling: float) -> None:
    from matplotlib.patches import Wedge

    style, size, height = chart.style, sheet.size, sheet.height
    names = [sheet.named(name) for name in chart.categories]
    widest = max(sheet.width(name, height) for name in names)
    colours = _colours(style)
    below = style.legend and size < 100  # no room beside
    if style.legend and not below:
        room_x, room_y = size - widest - 2.2 * height, ceiling
        centre_x = room_x / 2
    elif style.legend:
        room_x, room_y = size, ceiling - 1.25 * height * len(names)
        centre_x = size / 2
    else:
        room_x, room_y = size - 2 * widest - 0.8 * height, ceiling - 2.4 * height
        centre_x = size / 2
    radius = 0.47 * min(room_x, room_y)
    centre_y = ceiling - (room_y / 2 if style.legend else room_y / 2 + 1.2 * height)
    start = 45.0 * style.turn
    for i, (name, share) in enumerate(zip(names, chart.values[0], strict=True)):
        end = start + 3.6 * share
        sheet.add(
            Wedge(
                (centre_x, centre_y), radius, start, end, facecolor=colours[i], edgecolor=sheet.paper,
                linewidth=sheet.stroke,
            )
        )  # fmt: skip
        along, up = math.cos(math.radians((start + end) / 2)), math.sin(math.radians((start + end) / 2))
        if style.labelled:
            inside = "#000000" if _distance(colours[i][1:], "000000") > 260 else "#ffffff"
            text = f"{number_text(share)}%"
            reach = (0.68 if radius > 4 * height else 0.5) * radius  # in small pies nearer to the centre
            sheet.text(
                centre_x + reach * along, centre_y + reach * up, text, max(0.9 * height, _SMALLEST_TEXT), colour=inside
            )
        if not style.legend:
            reach = radius + 0.3 * height
            across: Literal["left", "center", "right"] = "center"
            if abs(along) > 0.35:
                across = "left" if along > 0 else "right"
            y = centre_y + (reach + 0.4 * height) * up
            sheet.text(centre_x + reach * along, y, name, height, across=across)
        start = end
    if style.legend:
        left = (size - widest - 1.3 * height) / 2 if below else room_x + 0.4 * height
        top = 1.25 * height * len(names) if below else (ceiling + 1.25 * height * len(names)) / 2
        for i, name in enumerate(names):
            y = top - 1.25 * height * (i + 0.5)
            sheet.box(left, y - 0.4 * height, 0.8 * height, 0.8 * height, colours[i])
            sheet.text(left + 1.2 * height, y, name, height, across="left")


# ------------------------------------------------------------------------------------------------------- questions

WORDINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "value": (
        "what is the value of {a}?",
        "what value does {a} have?",
        "how much is {a}?",
        "which value is shown for {a}?",
        "read the value of {a}.",
        "give the value for {a}.",
        "{a} stands at what value?",
    ),
    "highest": (
        "which {noun} is the highest{within}?",
        "which {noun} has the highest value{within}?",
        "which {noun} has the most{within}?",
        "what {noun} has the largest value{within}?",
        "name the {noun} with the highest value{within}.",
        "which {noun} is at the top{within}?",
        "what {noun} reaches the maximum{within}?",
    ),
    "lowest": (
        "which {noun} is the lowest{within}?",
        "which {noun} has the lowest value{within}?",
        "which {noun} has the least{within}?",
        "what {noun} has the smallest value{within}?",
        "name the {noun} with the lowest value{within}.",
        "which {noun} is at the bottom{within}?",
        "what {noun} reaches the minimum{within}?",
    ),
    "difference": (
        "what is the difference between {a} and {b}?",
        "by how much do {a} and {b} differ?",
        "how far apart are {a} and {b}?",
        "how large is the difference of {a} and {b}?",
        "what is the gap between {a} and {b}?",
        "give the difference between {a} and {b}.",
        "{a} and {b} differ by how much?",
    ),
    "sum": (
        "what is the sum of {a} and {b}?",
        "how much are {a} and {b} together?",
        "what do {a} and {b} add up to?",
        "what is the total of {a} and {b}?",
        "add {a} and {b}.",
        "give the sum of {a} and {b}.",
        "{a} and {b} make how much in total?",
    ),
    "count": (
        "how many {noun} are there?",
        "how many {noun} are in the chart?",
        "count the {noun}.",
        "how many {noun} does the chart show?",
        "what is the number of {noun}?",
        "give the number of {noun} in the chart.",
        "the chart has how many {noun}?",
    ),
    "larger": (
        "which is larger, {a} or {b}?",
        "{a} or {b}: which is larger?",
        "which one is larger: {a} or {b}?",
        "which has the larger value, {a} or {b}?",
        "which is higher, {a} or {b}?",
        "of {a} and {b}, which one is larger?",
        "out of {a} and {b}, which has more?",
    ),
}
QUESTIONS: Final = tuple(WORDINGS)
NOUNS: Final = {"bar": "bar", "grouped": "group", "line": "year", "pie": "slice"}


def _exact(chart: Chart) -> bool:
    """Whether the numbers can be read: from an axis or from labels."""
    return chart.kind != "pie" or chart.style.labelled


def questions(chart: Chart) -> tuple[str, ...]:
    """The kinds of question that a chart allows: the angles of a pie without numbers tell no value."""
    return tuple(k for k in QUESTIONS if _exact(chart) or k not in ("value", "difference", "sum"))


def ask(chart: Chart, rng: np.random.Generator, *, kind: str | None = None, reworded: bool = False) -> Asked | None:
    """A question about a chart.

    Args:
        kind: one of ``QUESTIONS``; by default any that the chart allows.
        reworded: one of the wordings that training never sees.

    Returns:
        The question, None where the chart allows none of that kind. Numbers are answered exactly, names in lower case;
        the tolerance is the metric's.

    Raises:
        DataError: there is no such kind.
    """
    if kind is not None and kind not in QUESTIONS:
        raise DataError(f"no kind of question {kind!r}{did_you_mean(kind, QUESTIONS)}")
    allowed = questions(chart)
    if kind is None:
        kind = _one(rng, allowed)
    elif kind not in allowed:
        return None
    slots, answer = _ANSWERS[kind](chart, rng)
    paraphrase, template = wording(rng, WORDINGS[kind], reworded=reworded)
    return Asked(kind=kind, question=template.format(**slots), answer=answer, paraphrase=paraphrase)


_Answered = tuple[dict[str, str], str]


def _one_series(chart: Chart, rng: np.random.Generator) -> tuple[str, tuple[float, ...]]:
    i = int(rng.integers(len(chart.series)))
    return chart.series[i], chart.values[i]


def _two(chart: Chart, rng: np.random.Generator) -> tuple[str, str, float, float]:
    """Names and values of two marks: of two categories, or of two series in one category."""
    if len(chart.series) > 1 and rng.random() < 0.5:
        i, j = rng.permutation(len(chart.series))[:2]
        k = int(rng.integers(len(chart.categories)))
        ends = [(chart.series[s], chart.categories[k], chart.values[s][k]) for s in (i, j)]
    else:
        name, values = _one_series(chart, rng)
        k, n = rng.permutation(len(chart.categories))[:2]
        ends = [(name, chart.categories[c], values[c]) for c in (k, n)]
    (a, b) = (f"{series} in {category}" if series else category for series, category, _ in ends)
    return a, b, ends[0][2], ends[1][2]


def _value(chart: Chart, rng: np.random.Generator) -> _Answered:
    name, values = _one_series(chart, rng)
    i = int(rng.integers(len(values)))
    category = chart.categories[i]
    return {"a": f"{name} in {category}" if name else category}, number_text(values[i])


def _extreme(pick: Callable[[Sequence[float]], float]) -> Callable[[Chart, np.random.Generator], _Answered]:
    def answer(chart: Chart, rng: np.random.Generator) -> _Answered:
        name, values = _one_series(chart, rng)
        slots = {"noun": NOUNS[chart.kind], "within": f" for {name}" if name else ""}
        return slots, chart.categories[values.index(pick(values))]

    return answer


def _difference(chart: Chart, rng: np.random.Generator) -> _Answered:
    a, b, first, second = _two(chart, rng)
    return {"a": a, "b": b}, number_text(abs(first - second))


def _sum(chart: Chart, rng: np.random.Generator) -> _Answered:
    a, b, first, second = _two(chart, rng)
    return {"a": a, "b": b}, number_text(first + second)


def _larger(chart: Chart, rng: np.random.Generator) -> _Answered:
    a, b, first, second = _two(chart, rng)
    return {"a": a, "b": b}, a if first > second else b


def _count(chart: Chart, rng: np.random.Generator) -> _Answered:
    number, noun = len(chart.categories), f"{NOUNS[chart.kind]}s"
    if len(chart.series) > 1 and rng.random() < 0.5:
        if chart.kind == "line":
            number, noun = len(chart.series), "lines"
        else:
            number, noun = number * len(chart.series), "bars"
    return {"noun": noun}, str(number)


_ANSWERS: Final[Mapping[str, Callable[[Chart, np.random.Generator], _Answered]]] = {
    "value": _value,
    "highest": _extreme(max),
    "lowest": _extreme(min),
    "difference": _difference,
    "sum": _sum,
    "count": _count,
    "larger": _larger,
}
