"""The worlds: what they say is true, splits leak nothing, hostile files stay closed."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from polymodal.core.errors import DataError, MediaError
from polymodal.data.worlds import pictograms, raster, shapes, sources
from polymodal.data.worlds.pictograms import Pictogram, Pictograms, caption, compose, plain
from polymodal.data.worlds.redraw import grey, ink, outline, redraw

# ------------------------------------------------------------------------------------------------------------ shapes


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_scenes_and_captions_depend_on_the_generator_only() -> None:
    def draw(seed: int) -> list[tuple[shapes.Scene, str]]:
        generator = rng(seed)
        scenes = [shapes.scene(generator) for _ in range(20)]
        return [(scene, shapes.describe(scene, generator)) for scene in scenes]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    scene = draw(1)[0][0]
    np.testing.assert_array_equal(shapes.render(scene, 64), shapes.render(scene, 64))


def test_the_scenes_and_captions_of_the_shipped_tokenizer_stay() -> None:
    digest = hashlib.sha256()
    for seed in range(500):
        generator = rng(seed)
        scene = shapes.scene(generator, objects=None if seed % 3 else 1 + seed % 8, held_out=seed % 5 == 0)
        digest.update(
            f"{scene} {shapes.describe(scene, generator, bare=0.3 * (seed % 2))} {generator.random()}".encode()
        )
    assert digest.hexdigest() == "2f2e661ed19291a6b2b1c5f6489d220de36e4d4c9c5fc2d77681f8ae3bf4065d"


def test_held_out_pairs_never_occur_in_training_and_always_in_the_held_out_scenes() -> None:
    generator = rng()
    seen = set()
    for _ in range(600):
        pairs = {(t.colour, t.shape) for t in shapes.scene(generator).things}
        assert not pairs & shapes.HELD_OUT
        seen |= pairs
    everything = set(itertools.product(shapes.COLOURS, shapes.SHAPES))
    assert seen == everything - shapes.HELD_OUT
    assert 0.1 <= len(shapes.HELD_OUT) / len(everything) <= 0.15
    held = [shapes.scene(generator, held_out=True) for _ in range(300)]
    counts = [sum((t.colour, t.shape) in shapes.HELD_OUT for t in scene.things) for scene in held]
    assert set(counts) == {1}
    assert {(t.colour, t.shape) for s in held for t in s.things} >= shapes.HELD_OUT


@pytest.mark.parametrize("objects", range(1, shapes.MAX_OBJECTS + 1))
def test_every_object_lies_in_the_picture_and_is_seen_in_its_box(objects: int) -> None:
    generator = rng(objects)
    for _ in range(40):
        scene = shapes.scene(generator, objects=objects)
        assert len(scene.things) == objects
        picture = shapes.render(scene, 96).astype(int)
        drawn = np.abs(picture - scene.background).max(-1) > 30
        outside = drawn.copy()
        for thing in scene.things:
            left, top, right, bottom = thing.box(96)
            assert 0 <= left < right <= 96
            assert 0 <= top < bottom <= 96
            inside = drawn[top:bottom, left:right]
            assert inside.mean() > 0.2, thing
            outside[top:bottom, left:right] = False
        assert not outside.any()


def test_boxes_are_tight() -> None:
    for shape in shapes.SHAPES:
        thing = shapes.Thing(shape=shape, colour="red", size="large", material="plain", x=0.5, y=0.5, width=0.6)
        picture = shapes.render(shapes.Scene(things=(thing,), background=(255, 255, 255)), 200)
        rows, columns = np.nonzero((picture != 255).any(-1))
        found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert np.abs(np.subtract(found, thing.box(200))).max() <= 3, (shape, found, thing.box(200))


def test_each_attribute_changes_the_picture() -> None:
    base = shapes.Thing(shape="cup", colour="red", size="large", material="plain", x=0.5, y=0.5, width=0.5)

    def picture(**changes: str) -> bytes:
        thing = dataclasses.replace(base, **changes)
        return shapes.render(shapes.Scene(things=(thing,), background=(0, 0, 0)), 64).tobytes()

    assert len({picture(shape=s) for s in shapes.SHAPES}) == len(shapes.SHAPES)
    assert len({picture(colour=c) for c in shapes.COLOURS}) == len(shapes.COLOURS)
    assert len({picture(material=m) for m in shapes.MATERIALS}) == len(shapes.MATERIALS)


PHRASE = re.compile(
    rf"(an?) ((?:({'|'.join(shapes.SIZES)}) )?(?:({'|'.join(shapes.COLOURS)}) )?"
    rf"(?:({'|'.join(shapes.MATERIALS)}) )?({'|'.join(shapes.SHAPES)}))$"
)
COUNT = re.compile(r"(one|two|three|four|five|six|seven|eight) (?:(\w+) )?(\w+)$")
RELATION = re.compile(rf"(.+) ({'|'.join(shapes.RELATIONS)}) (.+)$")


def matching(scene: shapes.Scene, phrase: str) -> set[int]:
    """Indices of the objects that a noun phrase describes."""
    found = PHRASE.match(phrase)
    assert found, phrase
    article, noun, size, colour, material, shape = found.groups()
    assert article == ("an" if noun[0] in "aeiou" else "a"), phrase
    return {
        i
        for i, t in enumerate(scene.things)
        if colour in (None, t.colour) and shape == t.shape and size in (None, t.size) and material in (None, t.material)
    }


def holds(scene: shapes.Scene, text: str) -> bool:
    """Whether a caption is true of a scene, worked out from the words and the boxes alone."""
    if counted := COUNT.match(text):
        number, colour, noun = counted.groups()
        stem = re.sub(r"(?<=crosse)s$", "", noun).removesuffix("s") if noun != "cross" else noun
        stem = "cross" if stem == "crosse" else stem
        things = [t for t in scene.things if colour in (None, t.colour) and stem in ("object", t.shape)]
        return number == shapes._NUMBERS[len(things)]
    if related := RELATION.match(text):
        first, relation, second = related.groups()
        for i, j in itertools.product(matching(scene, first), matching(scene, second)):
            a, b = scene.things[i].box(1000), scene.things[j].box(1000)
            right, down = (b[0] + b[2]) - (a[0] + a[2]), (b[1] + b[3]) - (a[1] + a[3])
            if {"left of": right, "right of": -right, "above": down, "below": -down}[relation] > 190:
                return True
        return False
    if text.startswith("there is "):
        return bool(matching(scene, text.removeprefix("there is ")))
    # A list names every object once: some assignment of phrases to objects must use all of both.
    options = [matching(scene, phrase) for phrase in re.split(r", | and ", text)]
    everyone = set(range(len(scene.things)))
    return any(set(choice) == everyone and len(choice) == len(everyone) for choice in itertools.product(*options))


def test_captions_are_true_of_their_scene_and_can_be_false_of_another() -> None:
    generator = rng(5)
    scenes = [shapes.scene(generator) for _ in range(1000)]
    texts = [shapes.describe(scene, generator) for scene in scenes]
    wrong = [(text, scene) for scene, text in zip(scenes, texts, strict=True) if not holds(scene, text)]
    assert not wrong, wrong[:3]
    shuffled = [holds(scene, text) for scene, text in zip(scenes, texts[1:] + texts[:1], strict=True)]
    assert np.mean(shuffled) < 0.2  # the check itself can fail
    for form in (COUNT, RELATION, re.compile("there is"), re.compile(".* and ")):
        assert sum(bool(form.match(text)) for text in texts) > 50


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_phrases_names_the_shape_alone(share: float) -> None:
    generator = rng(8)
    scenes = [shapes.scene(generator, objects=1) for _ in range(600)]
    texts = [shapes.describe(scene, generator, bare=share) for scene in scenes]
    assert all(holds(scene, text) for scene, text in zip(scenes, texts, strict=True))
    found = [match.groups()[2:] for text in texts if (match := PHRASE.match(text))]  # the others count
    bare = np.mean([not any((size, colour, material)) for size, colour, material, _ in found])
    assert abs(bare - share) < 0.06
    assert all(colour for size, colour, material, _ in found if size or material)


def test_relations_are_antisymmetric_and_transitive() -> None:
    generator = rng(6)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for _ in range(200):
        found = {(f.subject, f.relation, f.object) for f in shapes.facts(shapes.scene(generator))}
        for a, relation, b in found:
            assert (b, opposite[relation], a) in found
            assert (b, relation, a) not in found
            assert all((a, relation, d) in found for c, r, d in found if (c, r) == (b, relation))


# ------------------------------------------------------------------------------------------------- files of strangers

SQUARE = '<rect x="8" y="8" width="48" height="48" fill="{}"/>'


def svg(body: str, head: str = "", attributes: str = 'width="64" height="64"') -> bytes:
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"<?xml version='1.0'?>{head}<svg {names} {attributes}>{body}</svg>".encode()


def drawable() -> None:
    pytest.importorskip("cairosvg", reason="pip install 'polymodal[worlds]'", exc_type=ImportError)
    if sources.version("libcairo2") is None:
        pytest.skip(f"needs libcairo2: {sources.install_command(['libcairo2'])}")


@pytest.mark.parametrize(
    "attributes",
    ['width="64" height="64"', 'viewBox="0 0 64 64"', 'width="10cm" height="10cm" viewBox="0,0,64,64"',
     'width="100%" height="100%" viewBox="0 0 64 64"', 'width="6400" height="6400" viewBox="0 0 6400 6400"'],
)  # fmt: skip
def test_svg_is_cut_to_what_is_drawn(attributes: str) -> None:
    drawable()
    pixels = raster.draw_svg(svg(SQUARE.format("red"), attributes=attributes), 32)
    assert pixels.shape == (32, 32, 4)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels[16, 16], [255, 0, 0, 255])
    assert (pixels[..., 3] > 128).mean() > 0.65


def test_an_svg_reads_nothing_but_itself(tmp_path: Path) -> None:
    drawable()
    from PIL import Image

    (tmp_path / "secret.txt").write_text("SECRET")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "secret.png")
    (tmp_path / "secret.svg").write_bytes(svg('<g id="g">' + SQUARE.format("red") + "</g>"))
    (tmp_path / "secret.css").write_text("rect { fill: red }")
    frame = '<rect width="64" height="64" fill="blue"/>'
    for body in (
        f'{frame}<image width="64" height="64" xlink:href="file://{tmp_path}/secret.png"/>',
        f'{frame}<image width="64" height="64" xlink:href="{tmp_path}/secret.png"/>',
        f'{frame}<use xlink:href="file://{tmp_path}/secret.svg#g"/>',
        f'<style>@import url("file://{tmp_path}/secret.css");</style>{frame}',
    ):
        try:
            pixels = raster.draw_svg(svg(body), 32)
        except MediaError:
            continue
        assert not ((pixels[..., 0] > 100) & (pixels[..., 3] > 0)).any(), body
    entity = f'<!DOCTYPE svg [<!ENTITY secret SYSTEM "file://{tmp_path}/secret.txt">]>'
    with pytest.raises(MediaError, match="Forbidden"):
        raster.draw_svg(svg("<text>&secret;</text>", entity), 32)


def bomb() -> bytes:
    levels = "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(9))
    return svg("<text>&l9;</text>", f'<!DOCTYPE svg [<!ENTITY l0 "ha">{levels}]>')


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (bomb(), "EntitiesForbidden"),
        (b"<svg", "not a safe SVG"),
        (b"\x89PNG\r\n", "not a safe SVG"),
        (b"", "not a safe SVG"),
        (svg(""), "empty"),
        (svg(SQUARE.format("white")), "cannot be seen"),
        (svg(SQUARE.format("red"), attributes='width="1e9" height="1"'), "impossible size"),
        (svg(SQUARE.format("red"), attributes='width="0" height="0"'), "impossible size"),
        (svg(" " * (raster.MAX_FILE_BYTES + 1)), "bytes of SVG"),
        (svg("<g>" * 50_000 + "</g>" * 50_000), "Recursion|cairosvg|not a safe"),
    ],
    ids=["bomb", "cut", "png", "nothing", "empty", "white", "wide", "flat", "long", "deep"],
)
def test_broken_and_hostile_svg_is_refused(document: bytes, message: str) -> None:
    drawable()
    with pytest.raises(MediaError, match=message):
        raster.draw_svg(document, 32)


def test_a_bad_file_costs_only_itself(tmp_path: Path) -> None:
    drawable()
    from PIL import Image

    endless = '<g id="a0">' + SQUARE.format("red") + "</g>"
    for level in range(1, 9):
        uses = f'<use xlink:href="#a{level - 1}" x="1"/>' * 30
        endless += f'<g id="a{level}">{uses}</g>'
    Image.new("RGB", (64, 32), "green").save(tmp_path / "b.png")
    for name, content in {
        "a.svg": svg(SQUARE.format("red")),
        "c.svg": bomb(),
        "d.svg": svg(endless),
        "e.svg": svg(SQUARE.format("blue")),
        "g.png": b"not a picture",
    }.items():
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in ("a.svg", "b.png", "c.svg", "d.svg", "e.svg", "missing.svg", "g.png")]
    rendered = list(raster.render_files(paths, 32, processes=1, time_limit=3.0))
    assert [r.path for r in rendered] == paths
    assert [r.pixels is not None for r in rendered] == [True, True, False, False, True, False, False]
    assert all(bool(r.problem) == (r.pixels is None) for r in rendered)
    assert rendered[4].pixels is not None
    np.testing.assert_array_equal(rendered[4].pixels[16, 16], [0, 0, 255, 255])


def test_metadata_of_an_svg() -> None:
    drawable()
    body = (
        '<metadata><r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
        ' xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title> A Cow </dc:title><dc:subject><r:Bag>'
        "<r:li>mammal</r:li><r:li>farm</r:li></r:Bag></dc:subject></r:RDF></metadata>"
    )
    assert raster.metadata(svg(body)) == ("A Cow", ("mammal", "farm"))
    assert raster.metadata(svg("")) == ("", ())


# ---------------------------------------------------------------------------------------------------------- packages


def test_missing_packages_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="apt-get install -y --no-install-recommends no-such-package-here"):
        sources.require(["dpkg", "no-such-package-here"] if sources.version("dpkg") else ["no-such-package-here"])
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(DataError, match="apt-get install"):
        sources.ensure(["no-such-package-here"])
    with pytest.raises(DataError, match="apt-get install"):
        sources.files("no-such-package-here", ".svg")


def test_a_machine_without_dpkg_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match=r"apt-get install .*fonts-noto-color-emoji"):
        Pictograms.load(artists=["noto"])


def test_unknown_names_are_answered_with_a_hint() -> None:
    with pytest.raises(DataError, match="Did you mean 'symbola'"):
        Pictograms.load(artists=["symbol"])


# -------------------------------------------------------------------------------------------------------- pictograms


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Pictograms:
    """Emoji, outlines and one icon theme, drawn small into a cache of their own."""
    artists = ("noto", "symbola", "tango")
    packages = sorted({p for artist in artists for p in pictograms.PACKAGES[artist]})
    if absent := sources.missing(packages):
        pytest.skip(f"needs {', '.join(absent)}: {sources.install_command(absent)}")
    drawable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYMODAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        first = Pictograms.load(artists=artists, size=32, languages=("en", "de", "ca"))
        again = Pictograms.load(artists=artists, size=32, languages=("en", "de", "ca"))
    assert first.records == again.records
    np.testing.assert_array_equal(first.rgba(range(50)), again.rgba(range(50)))
    return first


def test_the_world_holds_what_the_packages_hold(world: Pictograms) -> None:
    count = {artist: sum(r.artist == artist for r in world.records) for artist in ("noto", "symbola", "tango")}
    assert count["noto"] > 2000
    assert count["symbola"] > 1000
    assert count["tango"] > 150
    apple = next(r for r in world.records if r.artist == "noto" and r.concept == "1F34E")
    assert apple.names == {"en": ("red apple",), "de": ("roter apfel",), "ca": ("poma vermella",)}
    assert "fruit" in apple.keywords["en"]
    wave = [r for r in world.records if r.concept == "1F44B" and r.artist == "noto"]
    assert sorted(str(r.tone) for r in wave) == ["1", "2", "3", "4", "5", "None"]
    names = {r.name for r in world.records if r.artist == "tango"}
    assert "edit find" in names
    assert not any(re.search(r"[_\d]|symbolic|-", name) for name in names)


def test_pictures_are_distinct_and_in_the_order_of_their_records(world: Pictograms) -> None:
    everything = world.rgba(range(len(world)))
    assert len({picture.tobytes() for picture in everything}) == len(world)
    some = [len(world) - 1, 0, len(world) // 2, 0]
    np.testing.assert_array_equal(world.rgba(some), everything[some])


def test_splits_are_disjoint_and_hold_out_concepts_across_artists(world: Pictograms) -> None:
    split = {name: world.split(name) for name in pictograms.SPLITS}
    everything = np.concatenate(list(split.values()))
    assert len(everything) == len(set(everything.tolist()))

    def records(name: str) -> list[Pictogram]:
        return [world.records[i] for i in split[name]]

    trained = {r.concept for r in records("train")}
    held = {r.concept for r in records("concepts")}
    assert not trained & held
    assert not held & {r.concept for r in records("artists") + records("combinations")}
    assert not {n for r in records("train") for n in r.names["en"]} & {r.name for r in records("concepts")}
    assert {r.artist for r in records("train")} == {"noto", "tango"}
    assert {r.artist for r in records("artists")} == {"symbola"}
    assert {r.concept for r in records("artists")} <= trained
    singles = {r.concept for r in world.records if r.artist == "noto" and "-" not in r.concept}
    assert 0.05 < len(held & singles) / len(singles) < 0.11
    with pytest.raises(DataError, match="no split"):
        world.split("test")


@pytest.mark.parametrize("artist", [artist for artist in pictograms.BLACK_FONTS if artist != pictograms.OUTLINES])
def test_a_black_font_draws_known_emoji_and_holds_out_the_same_concepts(
    artist: str, world: Pictograms, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if absent := sources.missing(pictograms.PACKAGES[artist]):
        pytest.skip(f"needs {', '.join(absent)}: {sources.install_command(absent)}")
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path))
    font = Pictograms.load(artists=[artist], size=32, languages=("en", "de"))
    assert len(font) > 50
    pictures = font.rgba(range(len(font)))
    assert not pictures[..., :3][pictures[..., 3] > 0].any()
    assert (pictures[..., 3] > 128).any((1, 2)).all()
    assert len({picture.tobytes() for picture in pictures}) == len(font)  # no box in place of what a font lacks
    emoji = {r.concept: i for i, r in enumerate(world.records) if r.artist == "noto" and r.tone is None}
    split = {int(i): name for name in pictograms.SPLITS for i in world.split(name)}
    mine = {int(i): name for name in pictograms.SPLITS for i in font.split(name)}
    for i, record in enumerate(font.records):
        same = emoji[record.concept]
        assert record.names["en"] == world.records[same].names["en"]
        assert mine[i] == split[same]
    assert set(mine.values()) == {"train", "concepts"}


def test_held_out_cells_of_the_grid_have_a_seen_concept_and_a_seen_tone(world: Pictograms) -> None:
    train = {(world.records[i].concept, world.records[i].tone) for i in world.split("train")}
    cells = {(world.records[i].concept, world.records[i].tone) for i in world.split("combinations")}
    assert not cells & train
    for concept, tone in cells:
        assert tone is not None
        assert sum(c == concept and t is not None for c, t in train) >= 3
    assert {tone for _, tone in cells} == {1, 2, 3, 4, 5}
    grid = sum(tone is not None for _, tone in train)
    assert 0.1 < len(cells) / (len(cells) + grid) < 0.2


def test_splits_do_not_depend_on_what_else_was_loaded(world: Pictograms) -> None:
    alone = Pictograms(world.records[::7], world._pixels, [(int(a), int(b)) for a, b in world._rows[::7]])
    for name in pictograms.SPLITS:
        assert set(alone.split(name) * 7) == {i for i in world.split(name).tolist() if i % 7 == 0}


def test_other_artists_do_not_show_held_out_concepts_under_their_names() -> None:
    held = frozenset({"1F350"}), frozenset({"pear"})

    def split(name: str, *tags: str, artist: str = "openclipart") -> str:
        record = Pictogram(artist=artist, concept=name, names={"en": (name,)}, keywords={"en": tags})
        return pictograms._split_of(record, held)

    assert split("pear") == split("pears") == "concepts"
    assert split("fruit bowl", "pears") == "none"
    assert split("pear", artist="faenza") == "none"
    assert split("bear", "pearl") == "train"
    assert split("bear", artist="faenza") == "artists"
    assert split("1F350", artist="noto") == split("1F350-200D-2642", artist="noto") == "concepts"


def test_captions_are_known_words_in_training_languages(world: Pictograms) -> None:
    generator = rng()
    apple = next(r for r in world.records if r.artist == "noto" and r.concept == "1F34E")
    texts = [caption(apple, generator) for _ in range(400)]
    assert texts == [caption(apple, g) for g in [rng()] for _ in range(400)]
    assert all(text == text.lower() and text for text in texts)
    assert not any("poma" in text for text in texts)  # Catalan is held out
    assert 0.3 < np.mean(["apfel" in t or "obst" in t or "frucht" in t for t in texts]) < 0.6
    assert {"red apple", "roter apfel"} <= set(texts)
    assert any(text.endswith("colour emoji") for text in texts)
    toned = [r for r in world.records if r.tone == 5][:50]
    untold = [t for t in (caption(r, generator) for r in toned) if "dark" not in t and "dunkle" not in t]
    assert not untold


# ------------------------------------------------------------------------------------------------------------- views


def squares(count: int, size: int = 48) -> np.ndarray:
    """Opaque red squares in the middle of nothing."""
    rgba = np.zeros((count, size, size, 4), np.uint8)
    rgba[:, size // 4 : -size // 4, size // 4 : -size // 4] = (255, 0, 0, 255)
    return rgba


def noise(count: int, size: int = 8) -> np.ndarray:
    """Pictures of random pixels, opaque but for a frame of nothing."""
    rgba = rng(9).integers(0, 256, (count, size, size, 4), np.uint8)
    rgba[..., 3] = 0
    rgba[:, 1:-1, 1:-1, 3] = 255
    return rgba


@pytest.mark.parametrize("draw", [outline, ink])
def test_outlines_and_ink_are_black_and_nothing_else(draw: Callable[[np.ndarray], np.ndarray]) -> None:
    rgba = noise(20)
    drawn = draw(rgba)
    assert drawn.shape == rgba.shape
    assert drawn.dtype == np.uint8
    assert not drawn[..., :3].any()
    assert drawn[..., 3].any((1, 2)).all()


def test_outlines_run_along_edges_and_leave_areas_empty() -> None:
    alpha = outline(squares(1, 32))[0, ..., 3]
    assert (alpha[8, 8:24] > 200).all()
    assert (alpha[8:24, 23] > 200).all()
    assert not alpha[11:21, 11:21].any()
    assert not alpha[:6].any()


def test_ink_fills_what_is_darker_than_the_mean_and_stays_inside_the_picture() -> None:
    rgba = squares(1, 32)
    rgba[:, :16, :, :3] = 255  # the upper half is white, the lower half red
    alpha = ink(rgba)[0, ..., 3]
    assert (alpha[16:24, 8:24] == 255).all()
    assert not alpha[:16].any()
    assert not alpha[24:].any()
    assert not alpha[:, :8].any()


def test_grey_keeps_the_luminance_and_the_alpha() -> None:
    rgba = noise(20)
    rgba[0, 2, 2], rgba[0, 2, 3], rgba[0, 3, 3] = (0, 255, 0, 255), (0, 0, 255, 255), (90, 90, 90, 255)
    drawn = grey(rgba)
    np.testing.assert_array_equal(drawn[..., 3], rgba[..., 3])
    np.testing.assert_array_equal(drawn[..., 0], drawn[..., 1])
    np.testing.assert_array_equal(drawn[..., 0], drawn[..., 2])
    assert drawn[0, 2, 2, 0] > 4 * drawn[0, 2, 3, 0] > 0  # green is lighter than blue
    assert drawn[0, 3, 3, 0] == 90


def test_two_pictures_in_five_are_redrawn_and_the_others_are_left_alone() -> None:
    rgba = noise(3000)
    before = rgba.copy()
    drawn = redraw(rgba, rng(1))
    np.testing.assert_array_equal(rgba, before)
    np.testing.assert_array_equal(drawn, redraw(rgba, rng(1)))
    assert not np.array_equal(drawn, redraw(rgba, rng(2)))
    hands = {"none": rgba, "outline": outline(rgba), "ink": ink(rgba), "grey": grey(rgba)}
    share = {name: (drawn == theirs).all((1, 2, 3)).mean() for name, theirs in hands.items()}
    assert sum(share.values()) == pytest.approx(1)
    assert share == pytest.approx({"none": 0.6, "outline": 0.2, "ink": 0.1, "grey": 0.1}, abs=0.03)
    assert redraw(rgba[:0], rng()).shape == (0, 8, 8, 4)


@pytest.mark.parametrize(("stored", "size"), [(48, 32), (48, 64), (96, 16), (97, 33)])
def test_compose_gives_pictures_that_depend_on_the_generator_only(stored: int, size: int) -> None:
    rgba = squares(16, stored)
    before = rgba.copy()
    views = compose(rgba, rng(3), size)
    assert views.shape == (16, 3, size, size)
    assert views.dtype == torch.uint8
    assert torch.equal(views, compose(rgba, rng(3), size))
    assert not torch.equal(views, compose(rgba, rng(4), size))
    assert len({view.numpy().tobytes() for view in views}) == 16
    np.testing.assert_array_equal(rgba, before)


def test_compose_keeps_the_picture_in_view_and_its_colour() -> None:
    views = compose(squares(200), rng(), 32).float()
    red = (views[:, 0] > 190) & (views[:, 1:].amax(1) < 60)
    share = red.float().mean((1, 2))
    assert share.min() > 0.04
    assert 0.1 < share.mean() < 0.35


def test_outlines_stay_visible_on_every_background() -> None:
    black = squares(300)
    black[..., :3] = 0
    views = compose(black, rng(), 32).float().mean(1).flatten(1)
    assert (views.quantile(0.98, dim=1) - views.quantile(0.02, dim=1)).min() > 40


def test_plain_is_the_picture_on_white() -> None:
    view = plain(squares(2), 24)
    assert view.shape == (2, 3, 24, 24)
    assert view[0, :, 0, 0].tolist() == [255, 255, 255]
    assert view[0, :, 12, 12].tolist() == [255, 0, 0]
    half = np.full((1, 8, 8, 4), (0, 0, 0, 128), np.uint8)
    assert plain(half, 8).unique().tolist() == [127]
