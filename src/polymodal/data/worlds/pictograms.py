"""Pictures that people drew for other purposes: emoji, icons and clip art, with names in many languages.

Each *artist* is one Debian package (or font) that is installed by name; nothing is vendored. Pictures are rendered
once into a cache and memory-mapped. The splits hold out concepts, artists, languages and cells of the skin-tone grid by
hash, so that they are the same on every machine and for every choice of artists.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont, features
from rich.console import Console
from rich.progress import track
from torch import Tensor

from polymodal.core.errors import DataError, did_you_mean
from polymodal.core.files import atomic_path, atomic_write, cache_dir
from polymodal.data.worlds import sources
from polymodal.data.worlds.raster import fit, render_files

EMOJI: Final = "noto"
OUTLINES: Final = "symbola"
# Fonts that draw emoji in black, each by other hands: the package and the files, later ones for what earlier ones lack.
BLACK_FONTS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    OUTLINES: ("fonts-symbola", ("Symbola_hint.ttf",)),
    "unifont": ("fonts-unifont", ("unifont.otf", "unifont_upper.otf")),
    "dejavu": ("fonts-dejavu-core", ("DejaVuSans.ttf",)),
    "freeserif": ("fonts-freefont-ttf", ("FreeSerif.ttf",)),
}
CLIP_ART: Final = "openclipart"
# Theme -> the folder below /usr/share/icons. mate and adwaita are left out: they redraw or copy gnome's pictures.
ICON_THEMES: Final[Mapping[str, str]] = {
    "tango": "Tango",
    "gnome": "gnome",
    "oxygen": "oxygen",
    "papirus": "Papirus",
    "breeze": "breeze",
    "faenza": "Faenza",
}
PACKAGES: Final[Mapping[str, tuple[str, ...]]] = {
    EMOJI: ("fonts-noto-color-emoji", "unicode-cldr-core"),
    **{font: (package, "fonts-noto-color-emoji", "unicode-cldr-core") for font, (package, _) in BLACK_FONTS.items()},
    **{theme: (f"{theme}-icon-theme", "libcairo2") for theme in ICON_THEMES},
    CLIP_ART: ("openclipart-svg", "libcairo2"),
}
ARTISTS: Final = tuple(PACKAGES)
HELD_OUT_ARTISTS: Final = (OUTLINES, "faenza")
TRAINING_LANGUAGES: Final = ("en", "de", "fr", "es", "it", "pt", "nl")
HELD_OUT_LANGUAGES: Final = ("ca", "da", "gl", "ro", "sv", "af", "pl")
LANGUAGES: Final = TRAINING_LANGUAGES + HELD_OUT_LANGUAGES
SPLITS: Final = ("train", "concepts", "artists", "combinations")
STYLES: Final[Mapping[str, str]] = {
    EMOJI: "colour emoji",
    OUTLINES: "black outline",
    "unifont": "pixel drawing",
    "dejavu": "black symbol",
    "freeserif": "black symbol",
    CLIP_ART: "clip art",
    **{theme: f"{theme} icon" for theme in ICON_THEMES},
}

_HELD_OUT_CONCEPTS = 0.08  # of the emoji of one code point
_HELD_OUT_CELLS = 0.15  # of the skin-tone grid
_RENDERING = 1  # raise when a picture or its record comes out differently from the same package: the cache is made anew
_TONES = {chr(0x1F3FB + tone): tone + 1 for tone in range(5)}
_CLDR = Path("/usr/share/unicode/cldr/common")

# Icons show programs, tray states and colour variants too; these are the contexts and prefixes whose names mean much.
_CONTEXTS = {"actions", "categories", "devices", "emblems", "emotes", "mimetypes", "places", "status", "legacy"}
_GENERIC_APPS = (
    "accessories-",
    "applications-",
    "graphics-",
    "help-",
    "internet-",
    "multimedia-",
    "office-",
    "utilities-",
)
_COLOURS = (
    "black|blue|bluegrey|breeze|brown|carmine|cyan|darkcyan|deeporange|green|grey|indigo|magenta|nordic|orange|palebrown|"
    "paleorange|pink|red|teal|violet|white|yaru|yellow|custom|adwaita"
)
_VARIANT = re.compile(rf"^(folder|user)-({_COLOURS})(-|$)|-rtl$|-symbolic$")
_NOISE_WORDS = {"x", "symbolic", "gnome", "gtk", "kde", "kdenlive", "vnd", "mate", "xfce", "stock", "svn", "vcs"}
_LONGEST_NAME = 4  # words
_COLLECTION = 10  # clip art that shares its title with this many others


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictogram:
    """One picture and what is known of it.

    Attributes:
        concept: equal for two pictures of the same thing: hexadecimal code points without the skin tone, or the icon's
            name, or the title of the clip art.
        names: by language, the best first; English is always there.
        keywords: by language.
        tone: skin tone 1 (light) to 5 (dark), None where the picture has none.
    """

    artist: str
    concept: str
    names: Mapping[str, tuple[str, ...]]
    keywords: Mapping[str, tuple[str, ...]]
    tone: int | None = None

    @property
    def name(self) -> str:
        return self.names["en"][0]


def _chance(kind: str, key: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"pictograms/{kind}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _words(name: str) -> str:
    """``Edit-Find_2`` -> ``edit find``: what a person would say for the name of a file."""
    name = re.sub(r"\.(svg|png)$", "", unicodedata.normalize("NFC", name), flags=re.IGNORECASE)
    words = re.split(r"[\s_\-.:;,/()\[\]\"#]+", name.lower())
    return " ".join(w for w in words if w and w not in _NOISE_WORDS and not w.isdigit())


def _singular(name: str) -> str:
    return name[:-1] if len(name) > 3 and name.endswith("s") and not name.endswith("ss") else name


# --------------------------------------------------------------------------------------------------------- names


_Names = dict[str, tuple[str, tuple[str, ...]]]


def _cldr(language: str) -> _Names:
    """Short name and keywords of each emoji sequence (without variation selectors) in one language of CLDR."""
    version = sources.version("unicode-cldr-core")
    cached = cache_dir() / "worlds" / f"cldr-{language}-{_file_safe(version)}-{_RENDERING}.json"
    if not cached.exists():
        from xml.etree import ElementTree as ET  # a file of the system, not of a stranger

        names: dict[str, str] = {}
        keywords: dict[str, tuple[str, ...]] = {}
        for folder in ("annotations", "annotationsDerived"):
            path = _CLDR / folder / f"{language}.xml"
            if not path.exists():
                raise DataError(f"CLDR has no emoji names for the language {language!r} ({path} does not exist)")
            for annotation in ET.parse(path).iter("annotation"):
                text, sequence = annotation.text or "", (annotation.get("cp") or "").replace("\ufe0f", "")
                if "↑" in text or not text:  # "the same as the parent language"
                    continue
                if annotation.get("type") == "tts":
                    names[sequence] = " ".join(text.replace(":", ",").lower().split())
                else:
                    keywords[sequence] = tuple(k.strip().lower() for k in text.split("|") if k.strip())
        known = {sequence: (name, keywords.get(sequence, ())) for sequence, name in names.items()}
        atomic_write(cached, json.dumps(known, ensure_ascii=False))
    loaded = json.loads(cached.read_text(encoding="utf-8"))
    return {sequence: (name, tuple(words)) for sequence, (name, words) in loaded.items()}


def _emoji_sequences() -> dict[str, str]:
    """Sequence -> English name of everything that CLDR names, without letters, digits and bare modifiers."""
    return {
        sequence: name
        for sequence, (name, _) in _cldr("en").items()
        if sequence[0] not in _TONES
        and unicodedata.category(sequence[0]) in {"So", "Sk"} | ({"Sm"} if len(sequence) == 1 else set())
        and not (len(sequence) == 1 and "\U0001f1e6" <= sequence <= "\U0001f1ff")
        and len({c for c in sequence if c in _TONES}) <= 1  # two people of two tones have no place in the grid
    }


def _emoji_record(artist: str, sequence: str, cldr: Mapping[str, _Names]) -> Pictogram:
    tones = [_TONES[c] for c in sequence if c in _TONES]
    names: dict[str, tuple[str, ...]] = {
        language: (known[sequence][0],) for language, known in cldr.items() if sequence in known
    }
    english = names["en"][0]
    also = f"flag of {english[6:]}" if english.startswith("flag, ") else ""
    if len(sequence) == 1:
        also = unicodedata.name(sequence, "").lower()
    if also and also != english:
        names["en"] = (english, also)
    return Pictogram(
        artist=artist,
        concept="-".join(f"{ord(c):X}" for c in sequence if c not in _TONES),
        names=names,
        keywords={language: tuple(known[sequence][1]) for language, known in cldr.items() if sequence in known},
        tone=tones[0] if tones else None,
    )


# ----------------------------------------------------------------------------------------------------- rendering

# What the cache keeps of a picture: enough to make its record, and the hash of its pixels.
_Entry = dict[str, object]
_Rendered = tuple[_Entry, UInt8[np.ndarray, "size size 4"] | None, str]


def _font_file(package: str, name: str) -> Path:
    found = [path for path in sources.files(package, ".ttf", ".otf") if path.name == name]
    if not found:
        raise DataError(f"{package} {sources.version(package)} does not hold {name}")
    return found[0]


def _noto_glyphs(longest: int = 16) -> Iterator[tuple[str, Image.Image]]:
    """The sequences of at most ``longest`` code points that Noto draws as one picture, with the picture.

    The font holds bitmaps of one size only. Sequences become one glyph through raqm; without it they are left out.
    """
    font = ImageFont.truetype(_font_file("fonts-noto-color-emoji", "NotoColorEmoji.ttf"), 109)

    def draw(text: str) -> Image.Image:
        image = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(image).text((0, 0), text, font=font, embedded_color=True)
        return image

    absent = draw("\U0010ffff").tobytes()
    for sequence in _emoji_sequences():
        if len(sequence) > longest:
            continue
        if len(sequence) > 1 and (not features.check("raqm") or font.getlength(sequence) > 140):
            continue
        image = draw(sequence)
        if image.getbbox() is not None and image.tobytes() != absent:
            yield sequence, image


def _draw_noto(size: int) -> Iterator[_Rendered]:
    for sequence, image in _noto_glyphs():
        yield {"sequence": sequence}, fit(image, size), ""


def _draw_black(artist: str, size: int) -> Iterator[_Rendered]:
    package, names = BLACK_FONTS[artist]
    fonts = [ImageFont.truetype(_font_file(package, name), 2 * size) for name in names]
    absent = {bytes(font.getmask("\U0010ffff")) for font in fonts} | {b""}
    # Only what Noto draws too: these artists are there to show the same things in another style.
    for sequence, _ in _noto_glyphs(longest=1):
        font = next((font for font in fonts if bytes(font.getmask(sequence)) not in absent), None)
        if font is None:
            continue
        image = Image.new("RGBA", (4 * size, 4 * size))
        ImageDraw.Draw(image).text((size, size), sequence, font=font, fill="black")
        yield {"sequence": sequence}, fit(image, size), ""


def _icon_files(theme: str) -> dict[str, Path]:
    """The best file of each named icon: the smallest bitmap of at least 96 px, else a drawing, else 48 px and up."""
    best: dict[str, tuple[float, Path]] = {}
    for path in sources.files(f"{theme}-icon-theme", ".png", ".svg"):
        parts = path.parts[1:-1]
        if ICON_THEMES[theme] not in parts or "symbolic" in parts or _VARIANT.search(path.stem):
            continue
        contexts = set(parts)
        if not (contexts & _CONTEXTS or ("apps" in contexts and path.stem.startswith(_GENERIC_APPS))):
            continue
        nominal = max((int(m[1]) for p in parts if (m := re.fullmatch(r"(\d+)(x\d+)?", p))), default=48)
        if path.suffix == ".svg":
            rank = 1000.0 - nominal  # drawings for larger sizes hold more detail
        elif nominal >= 96:
            rank = float(nominal)
        elif nominal >= 48:
            rank = 2000.0 - nominal
        else:
            continue
        if path.stem not in best or rank < best[path.stem][0]:
            best[path.stem] = (rank, path)
    return {stem: path for stem, (_, path) in sorted(best.items())}


def _draw_icons(theme: str, size: int) -> Iterator[_Rendered]:
    chosen: dict[str, Path] = {}
    for stem, path in _icon_files(theme).items():
        name = _words(stem)
        if 1 <= len(name.split()) <= _LONGEST_NAME and any(c.isalpha() for c in name):
            chosen.setdefault(name, path)
    for (name, _), raster in zip(chosen.items(), render_files(list(chosen.values()), size), strict=True):
        yield {"name": name}, raster.pixels, f"{raster.path}: {raster.problem}"


def _draw_openclipart(size: int) -> Iterator[_Rendered]:
    paths = [
        path
        for path in sources.files("openclipart-svg", ".svg")
        if not {"icons", "stars", "gradients", "patterns", "buttons"} & set(path.parts)
    ]
    for raster in render_files(paths, size):
        entry: _Entry = {"title": raster.title, "tags": raster.tags, "stem": raster.path.stem}
        yield entry, raster.pixels, f"{raster.path}: {raster.problem}"


def _draw(artist: str, size: int) -> Iterator[_Rendered]:
    if artist == EMOJI:
        return _draw_noto(size)
    if artist in BLACK_FONTS:
        return _draw_black(artist, size)
    if artist == CLIP_ART:
        return _draw_openclipart(size)
    return _draw_icons(artist, size)


def _file_safe(version: str | None) -> str:
    return re.sub(r"[^\w.+-]", "_", version or "none")


def _rendered(artist: str, size: int) -> tuple[UInt8[np.ndarray, "pictures size size 4"], list[_Entry], list[str]]:
    """The pictures of one artist from the cache, rendered into it when they are not there yet."""
    sources.require(PACKAGES[artist])
    stem = f"pictograms-{artist}-{_file_safe(sources.version(PACKAGES[artist][0]))}-{size}-{_RENDERING}"
    pixels_file, facts_file = (cache_dir() / "worlds" / f"{stem}{suffix}" for suffix in (".npy", ".json"))
    if not facts_file.exists():
        pictures, entries, problems = [], [], []
        seen: set[str] = set()
        console = Console(stderr=True)
        for entry, pixels, problem in track(_draw(artist, size), f"drawing {artist}", console=console, transient=True):
            if pixels is None:
                problems.append(problem)
                continue
            digest = hashlib.sha256(pixels.tobytes()).hexdigest()[:16]
            if digest not in seen:
                seen.add(digest)
                pictures.append(pixels)
                entries.append({**entry, "hash": digest})
        if not pictures:
            raise DataError(f"{artist}: no picture could be drawn; first problems: {problems[:3]}")
        with atomic_path(pixels_file) as temporary, temporary.open("wb") as f:
            np.save(f, np.stack(pictures))
        # Written last: it says that the pixels are complete.
        atomic_write(facts_file, json.dumps({"entries": entries, "problems": problems}, ensure_ascii=False))
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    return np.load(pixels_file, mmap_mode="r"), facts["entries"], facts["problems"]


# ------------------------------------------------------------------------------------------------------ the world


class Pictograms:
    """All pictures of some artists: ``records[i]`` belongs to ``rgba([i])``.

    Attributes:
        size: side of the stored pictures in pixels.
        skipped: by artist, one line for each file that could not be drawn.
    """

    def __init__(
        self,
        records: Sequence[Pictogram],
        pixels: Sequence[UInt8[np.ndarray, "_ size size 4"]],
        rows: Sequence[tuple[int, int]],
    ) -> None:
        """Use `Pictograms.load`. ``rows`` gives, for each record, the array in ``pixels`` and the row in it."""
        assert len(records) == len(rows)
        self.records = list(records)
        self.size = int(pixels[0].shape[1])
        self.skipped: dict[str, list[str]] = {}
        self._pixels = list(pixels)
        self._rows = np.asarray(rows, np.int64)

    @classmethod
    def load(
        cls, *, artists: Sequence[str] = ARTISTS, size: int = 96, languages: Sequence[str] = LANGUAGES
    ) -> Pictograms:
        """Loads the pictures of ``artists``; the first call draws them (minutes for clip art), later ones map a file.

        Args:
            size: side in pixels at which pictures are kept; compose at this size or below.
            languages: of the names of emoji, as CLDR writes them. Icons and clip art have English names only.

        Raises:
            DataError: an artist or language is unknown, or packages are missing (the message has the command).
        """
        for artist in artists:
            if artist not in PACKAGES:
                raise DataError(f"no artist {artist!r}{did_you_mean(artist, ARTISTS)}")
        sources.require(sorted({package for artist in artists for package in PACKAGES[artist]}))
        emoji = {EMOJI, *BLACK_FONTS} & set(artists)
        cldr = {language: _cldr(language) for language in dict.fromkeys(("en", *languages))} if emoji else {}
        records: list[Pictogram] = []
        rows: list[tuple[int, int]] = []
        pixels, skipped = [], {}
        seen: set[str] = set()
        # In the fixed order, so that of two artists with one picture the same one keeps it whatever was asked for.
        for number, artist in enumerate(a for a in ARTISTS if a in artists):
            drawn, entries, skipped[artist] = _rendered(artist, size)
            pixels.append(drawn)
            titles = Counter(str(entry.get("title", "")) for entry in entries)
            for row, entry in enumerate(entries):
                if entry["hash"] in seen:
                    continue
                seen.add(str(entry["hash"]))
                record = _record(artist, entry, cldr, titles)
                if record is not None:
                    records.append(record)
                    rows.append((number, row))
        world = cls(records, pixels, rows)
        world.skipped = skipped
        return world

    def __len__(self) -> int:
        return len(self.records)

    def rgba(self, indices: Sequence[int] | Int[np.ndarray, " batch"]) -> UInt8[np.ndarray, "batch size size 4"]:
        """The stored pictures (straight alpha) of ``indices``."""
        rows = self._rows[np.asarray(indices, np.int64)]
        out = np.empty((len(rows), self.size, self.size, 4), np.uint8)
        for number, pixels in enumerate(self._pixels):
            here = np.flatnonzero(rows[:, 0] == number)
            out[here] = pixels[rows[here, 1]]
        return out

    @cached_property
    def _split_of(self) -> list[str]:
        held = _held_out_concepts()
        return [_split_of(record, held) for record in self.records]

    def split(self, name: str) -> Int[np.ndarray, " pictures"]:
        """Indices of one split; the splits are disjoint, and pictures held out in two ways are in none.

        - ``train``: known concepts of known artists, without the held-out cells of the skin-tone grid;
        - ``concepts``: never-seen concepts, drawn by known artists;
        - ``artists``: concepts that are not held out, drawn by the never-seen artists;
        - ``combinations``: a known concept in a known skin tone that was never seen on it.

        Raises:
            DataError: there is no such split.
        """
        if name not in SPLITS:
            raise DataError(f"no split {name!r}{did_you_mean(name, SPLITS)}")
        return np.flatnonzero(np.asarray(self._split_of) == name).astype(np.int64)


def _record(
    artist: str,
    entry: _Entry,
    cldr: Mapping[str, _Names],
    titles: Mapping[str, int],
) -> Pictogram | None:
    """What is known of one cached picture; None where it has no words."""
    if "sequence" in entry:
        return _emoji_record(artist, str(entry["sequence"]), cldr)
    if "name" in entry:
        name = str(entry["name"])
        return Pictogram(artist=artist, concept=name, names={"en": (name,)}, keywords={"en": ()})
    title, tags = str(entry["title"]), entry["tags"]
    assert isinstance(tags, list)
    if titles[title] >= _COLLECTION:  # the title of a collection; its files say what each picture is
        title = str(entry["stem"])
    title = _clip_art_words(title)
    keywords = sorted({_clip_art_words(tag) for tag in tags} - {"", "unsorted", "clip art", "clipart", "svg", "hash"})
    names = [title] if len(title) > 1 and len(title.split()) <= 2 * _LONGEST_NAME else keywords[:1]
    if not names:
        return None
    return Pictogram(artist=artist, concept=names[0], names={"en": tuple(names)}, keywords={"en": tuple(keywords)})


def _clip_art_words(text: str) -> str:
    words = _words(text).removeprefix("clipart by nicu buculei ").removeprefix("aiga ")
    return re.sub(r"(?<=[a-z]{2})\d+\b", "", words)


def _held_out_concepts() -> tuple[frozenset[str], frozenset[str]]:
    """Code points that training never sees, and the names under which other artists draw the same things."""
    if sources.version("unicode-cldr-core") is None:
        return frozenset(), frozenset()
    sequences = _emoji_sequences()
    # A code point that many sequences are built from (woman, man, heart) cannot be held out without losing all of them.
    used = Counter(
        c for sequence in sequences for c in set(sequence) if len(sequence) > 1 and sequence[1:2] not in _TONES
    )
    held = {
        sequence: name
        for sequence, name in sequences.items()
        if len(sequence) == 1 and used[sequence] <= 6 and _chance("concept", f"{ord(sequence):X}") < _HELD_OUT_CONCEPTS
    }
    names = {_singular(_words(name)) for name in held.values()}
    names |= {_singular(_words(unicodedata.name(sequence, ""))) for sequence in held}
    return frozenset(f"{ord(sequence):X}" for sequence in held), frozenset(names - {""})


def _split_of(record: Pictogram, held: tuple[frozenset[str], frozenset[str]]) -> str:
    codes, names = held
    if record.artist == EMOJI or record.artist in BLACK_FONTS:
        concept_held = not codes.isdisjoint(record.concept.split("-"))
        tagged = False
    else:
        concept_held = any(_singular(name) in names for name in record.names["en"])
        # Tags are captions too: such a picture would show the held-out concept, and is no clean test of it either.
        tagged = any(_singular(tag) in names for tag in record.keywords["en"])
    if record.artist in HELD_OUT_ARTISTS:
        return "none" if concept_held or tagged else "artists"
    if concept_held:
        return "concepts"
    if tagged:
        return "none"
    return "combinations" if record.tone in _held_out_tones(record.concept) else "train"


def _held_out_tones(concept: str) -> set[int]:
    """The skin tones that training never sees on a concept: at most two of the five."""
    chances = sorted((_chance("cell", f"{concept}/{tone}"), tone) for tone in range(1, 6))
    return {tone for chance, tone in chances[:2] if chance < _HELD_OUT_CELLS}


# ------------------------------------------------------------------------------------------------ captions, views


_TEMPLATES = (
    "a picture of {name}",
    "an icon of {name}",
    "an image of {name}",
    "a drawing of {name}",
    "a small picture of {name}",
    "the symbol {name}",
    "{name}, {style}",
    "{style} of {name}",
)


def caption(record: Pictogram, rng: np.random.Generator) -> str:
    """A training text: names and keywords in the training languages, in English about 60 % of the time."""
    others = [language for language in TRAINING_LANGUAGES[1:] if language in record.names]
    language = "en"
    if others and rng.random() > 0.6:
        language = others[rng.integers(len(others))]
    names, keywords = record.names[language], record.keywords.get(language, ())
    name = names[0] if rng.random() < 0.8 else names[rng.integers(len(names))]
    # The titles of clip art are in many languages, or jokes; its tags say more.
    tagged = 0.5 if record.artist == CLIP_ART else 0.2
    form = rng.random()
    if form < tagged and keywords:
        chosen = rng.permutation(len(keywords))[: rng.integers(1, 4)]
        text = ", ".join(keywords[i] for i in chosen)
        # Keywords alone do not tell the tones apart.
        return text.lower() if record.tone is None else f"{text}, {name}".lower()
    if form < tagged + 0.3 and language == "en":
        return _TEMPLATES[rng.integers(len(_TEMPLATES))].format(name=name, style=STYLES[record.artist]).lower()
    return name.lower()


def _premultiplied(rgba: UInt8[np.ndarray, "batch height width 4"]) -> Float[Tensor, "batch 4 height width"]:
    x = torch.from_numpy(np.ascontiguousarray(rgba)).permute(0, 3, 1, 2).float() / 255
    x[:, :3] *= x[:, 3:]
    return x


def _halved(x: Float[Tensor, "batch 4 height width"]) -> Float[Tensor, "batch 4 _ _"]:
    # Means of 2 x 2 pixels, an odd last row or column left out; faster on one core than avg_pool2d.
    x = x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) * 0.25


def plain(rgba: UInt8[np.ndarray, "batch height width 4"], size: int) -> UInt8[Tensor, "batch 3 {size} {size}"]:
    """The view for evaluation: the whole picture on white, nothing random."""
    x = F.interpolate(_premultiplied(rgba), (size, size), mode="bilinear", antialias=True, align_corners=False)
    return _to_bytes(x[:, :3] + 1 - x[:, 3:])


def _to_bytes(x: Float[Tensor, "batch 3 height width"]) -> UInt8[Tensor, "batch 3 height width"]:
    return x.clamp(0, 1).mul(255).round().to(torch.uint8)


def compose(
    rgba: UInt8[np.ndarray, "batch height width 4"], rng: np.random.Generator, size: int
) -> UInt8[Tensor, "batch 3 {size} {size}"]:
    """Random views for training: place, scale, small rotation, background and a little colour; never mirrored.

    Colours move little, since captions name them (a red heart, a medium skin tone). Equal generators give equal views.
    """
    batch, source = rgba.shape[0], rgba.shape[1]
    draw = torch.from_numpy(rng.random((batch, 12), np.float32))

    # Each output pixel looks up its place in the picture: inverse rotation and scale about a moved centre.
    scale = 0.55 + 0.5 * draw[:, 0]
    angle = (draw[:, 1] * 2 - 1) * 0.26
    reach = (1 - scale).clamp_min(0) + 0.05
    shift = (draw[:, 2:4] * 2 - 1) * reach[:, None]
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    across, down = axis - shift[:, :1], axis - shift[:, 1:]
    cos, sin = cos[:, None, None], sin[:, None, None]
    grid = torch.stack(
        [across[:, None, :] * cos + down[:, :, None] * sin, down[:, :, None] * cos - across[:, None, :] * sin], -1
    )
    levels = (torch.log2(source / (size * scale)) + 0.3).floor().clamp_min(0).long()
    x = torch.empty(batch, 4, size, size)
    for level in levels.unique().tolist():
        here = (levels == level).nonzero().flatten()
        pictures = _premultiplied(rgba[here.numpy()])
        for _ in range(level):
            # Smaller copies first where the picture shrinks by half or more: bilinear look-up alone would alias.
            pictures = _halved(pictures)
        x[here] = F.grid_sample(pictures, grid[here], align_corners=False)

    colour, alpha = x[:, :3], x[:, 3:]
    colour = colour * (1 + 0.3 * (draw[:, 4:5, None, None] - 0.5)) + 0.1 * (draw[:, 5:6, None, None] - 0.5) * alpha
    colour = colour * (1 + 0.12 * (draw[:, 6:9, None, None] - 0.5))
    return _to_bytes(colour + (1 - alpha) * _backgrounds(colour, alpha, draw[:, 9], rng))


def _backgrounds(
    colour: Float[Tensor, "batch 3 size size"],
    alpha: Float[Tensor, "batch 1 size size"],
    kind: Float[Tensor, " batch"],
    rng: np.random.Generator,
) -> Float[Tensor, "batch 3 size size"]:
    """White, flat, gradient or blobs, moved away from the brightness of the picture where it would hide it."""
    batch, size = colour.shape[0], colour.shape[-1]
    cells = 5
    ends = torch.from_numpy(rng.random((batch, 2, 3, 1, 1), np.float32))
    direction = torch.from_numpy(rng.random((batch, 1), np.float32)) * 2 * np.pi
    axis = torch.linspace(-0.5, 0.5, cells)
    ramp = torch.cos(direction)[..., None] * axis[None, None, :] + torch.sin(direction)[..., None] * axis[None, :, None]
    ramp = (ramp[:, None] + 0.5).clamp(0, 1)
    noise = torch.from_numpy(rng.random((batch, 3, cells, cells), np.float32))
    kind = kind[:, None, None, None]
    coarse = ends[:, 0].expand(batch, 3, cells, cells)
    coarse = torch.where(kind > 0.55, ends[:, 0] * (1 - ramp) + ends[:, 1] * ramp, coarse)
    coarse = torch.where(kind > 0.75, 0.5 * ends[:, 0] + 0.5 * noise, coarse)
    # A brightness that differs from the picture's by at least a third, so that outlines stay visible on any ground.
    bright = (
        colour.mean(1, keepdim=True).sum((2, 3), keepdim=True) / alpha.sum((2, 3), keepdim=True).clamp_min(1)
    ).clamp(0, 1)
    ground = coarse.mean((1, 2, 3), keepdim=True)
    target = torch.where(bright > 0.5, bright - 0.35, bright + 0.35)
    hides = (ground - bright).abs() < 0.3
    coarse = torch.where(hides, (coarse + target - ground).clamp(0, 1), coarse)
    coarse = torch.where(kind < 0.3, torch.ones_like(coarse), coarse)
    return F.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)
