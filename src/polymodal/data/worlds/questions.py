"""Questions about scenes of coloured shapes; every answer follows from the scene.

``pose`` draws a scene and a question together, so that the answers of a kind are about equally frequent; ``ask`` asks
about a scene that is already there. A scene with a held-out pair of colour and shape is one of evaluation: its
questions are about that pair wherever the kind names objects. Questions about other scenes never name such a pair.
A shape has one or two held-out colours only: whoever knows the list can guess the colour from the shape. Models that
were trained on other pairs cannot, but a blind guess must not be fitted to the answers of evaluation either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final

import numpy as np

from polymodal.core.errors import DataError, did_you_mean
from polymodal.data.worlds import shapes
from polymodal.data.worlds.asked import Asked, wording
from polymodal.data.worlds.shapes import COLOURS, HELD_OUT, MAX_OBJECTS, SHAPES, Scene, Thing, plural

UNKNOWN: Final = "unknown"  # the answer to a question about something that is not there
MAX_COUNT: Final = 5

_FURTHER = {"left of": "further left", "right of": "further right", "above": "higher", "below": "lower"}
THIRDS: Final = (("left", "middle", "right"), ("top", "middle", "bottom"))  # across, down
_CLEAR = 0.04  # of the side: objects nearer than this to the border of a third are not asked for their place
_SHAPE_ALONE = 0.2  # how often an object is called "the cup" where there is only one cup

WORDINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "existence": (
        "is there {a}?",
        "is there {a} in the picture?",
        "can you see {a}?",
        "does the picture show {a}?",
        "do you see {a} here?",
        "does {a} appear in the image?",
        "is {a} present?",
    ),
    "colour": (
        "what colour is {a}?",
        "what is the colour of {a}?",
        "which colour does {a} have?",
        "what color is {a}?",
        "tell me the colour of {a}.",
        "name the colour of {a}.",
        "{a} is of which colour?",
    ),
    "shape": (
        "what shape is {a}?",
        "what is the shape of {a}?",
        "which shape does {a} have?",
        "what is {a}?",
        "tell me the shape of {a}.",
        "name the shape of {a}.",
        "{a} is of which shape?",
    ),
    "count": (
        "how many {a} are there?",
        "how many {a} are in the picture?",
        "count the {a}.",
        "how many {a} do you see?",
        "what is the number of {a}?",
        "give the number of {a} in the image.",
        "the picture contains how many {a}?",
    ),
    "relation": (
        "is {a} {relation} {b}?",
        "is {a} {relation} {b} in the picture?",
        "does {a} lie {relation} {b}?",
        "do you see {a} {relation} {b}?",
        "can {a} be found {relation} {b}?",
        "would you say that {a} is {relation} {b}?",
        "is it true that {a} is {relation} {b}?",
    ),
    "which": (
        "which is {further}, {a} or {b}?",
        "{a} or {b}: which is {further}?",
        "which one is {further}: {a} or {b}?",
        "which object is {further}, {a} or {b}?",
        "what is {further}, {a} or {b}?",
        "of {a} and {b}, which one lies {further}?",
        "out of {a} and {b}, which is {further}?",
    ),
    "place": (
        "where is {a}: {choices}?",
        "{choices}: where is {a}?",
        "in which part is {a}, {choices}?",
        "where do you see {a}: {choices}?",
        "which part holds {a}: {choices}?",
        "{a} is in which part: {choices}?",
        "where does {a} lie, {choices}?",
    ),
    "comparison": (
        "are there more {a} than {b}?",
        "do you see more {a} than {b}?",
        "does the picture show more {a} than {b}?",
        "is the number of {a} larger than the number of {b}?",
        "are the {a} more numerous than the {b}?",
        "do the {a} outnumber the {b}?",
        "are there fewer {b} than {a}?",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """A question that could be asked; forms of one kind are asked equally often."""

    answer: str
    form: str
    slots: Mapping[str, str]


class _View:
    """A scene with the names that tell its objects apart."""

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.scene, self.things, self.rng = scene, scene.things, rng
        self.pairs = Counter((t.colour, t.shape) for t in scene.things)
        self.colours = Counter(t.colour for t in scene.things)
        self.shapes = Counter(t.shape for t in scene.things)
        self.held_out = not HELD_OUT.isdisjoint(self.pairs)
        self.names: dict[int, str] = {}  # by index; objects that share colour and shape have none
        for i, t in enumerate(scene.things):
            if self.pairs[t.colour, t.shape] == 1:
                short = self.shapes[t.shape] == 1 and not self.is_subject(t) and rng.random() < _SHAPE_ALONE
                self.names[i] = t.shape if short else f"{t.colour} {t.shape}"
        # What is not there but could be: one of colour and shape is seen on something else.
        self.absent = [
            (colour, shape)
            for colour in COLOURS
            for shape in SHAPES
            if (colour in self.colours or shape in self.shapes) and (colour, shape) not in self.pairs
        ]

    def is_subject(self, thing: Thing) -> bool:
        """Whether the pair is held out; in a scene that has such a pair, the questions are about it."""
        return (thing.colour, thing.shape) in HELD_OUT

    def subjects(self) -> list[int]:
        return [i for i, t in enumerate(self.things) if self.is_subject(t) == self.held_out]


def _with_article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def _existence(view: _View) -> list[_Candidate]:
    present = sorted({(view.things[i].colour, view.things[i].shape) for i in view.subjects()})
    absent = [pair for pair in view.absent if (pair in HELD_OUT) == view.held_out]
    return [
        _Candidate(answer=answer, form="existence", slots={"a": _with_article(f"{colour} {shape}")})
        for answer, pairs in (("yes", present), ("no", absent))
        for colour, shape in pairs
    ]


def _colour(view: _View) -> list[_Candidate]:
    subjects = [view.things[i] for i in view.subjects()]
    return [
        _Candidate(answer=t.colour, form="colour", slots={"a": f"the {t.shape}"})
        for t in subjects
        if view.shapes[t.shape] == 1
    ]


def _shape(view: _View) -> list[_Candidate]:
    subjects = [view.things[i] for i in view.subjects()]
    return [
        _Candidate(answer=t.shape, form="shape", slots={"a": f"the {t.colour} object"})
        for t in subjects
        if view.colours[t.colour] == 1
    ]


def _groups(view: _View) -> list[tuple[str, str, int]]:
    """The form, plural noun and number of everything that can be counted."""
    return [
        ("objects", "objects", len(view.things)),
        *(("colours", f"{colour} objects", view.colours[colour]) for colour in COLOURS),
        *(("shapes", plural(shape), view.shapes[shape]) for shape in SHAPES),
    ]


def _count(view: _View) -> list[_Candidate]:
    return [
        _Candidate(answer=str(number), form=form, slots={"a": noun})
        for form, noun, number in _groups(view)
        if number <= MAX_COUNT
    ]


def _relation(view: _View) -> list[_Candidate]:
    found = []
    for fact in _named_facts(view):
        a, b = f"the {view.names[fact.subject]}", f"the {view.names[fact.object]}"
        yes = {"a": a, "b": b, "relation": fact.relation}
        no = {"a": b, "b": a, "relation": fact.relation}
        found += [_Candidate(answer=answer, form="relation", slots=s) for answer, s in (("yes", yes), ("no", no))]
    return found


def _which(view: _View) -> list[_Candidate]:
    found = []
    for fact in _named_facts(view):
        pair = view.names[fact.subject], view.names[fact.object]
        for a, b in (pair, pair[::-1]):
            slots = {"a": f"the {a}", "b": f"the {b}", "further": _FURTHER[fact.relation]}
            found.append(_Candidate(answer=pair[0], form="which", slots=slots))
    return found


def _named_facts(view: _View) -> list[shapes.Fact]:
    subjects = set(view.subjects())
    return [
        fact
        for fact in shapes.facts(view.scene)
        if {fact.subject, fact.object} <= view.names.keys() and not subjects.isdisjoint((fact.subject, fact.object))
    ]


def _place(view: _View) -> list[_Candidate]:
    found = []
    for i in view.subjects():
        if i not in view.names:
            continue
        for at, thirds in zip((view.things[i].x, view.things[i].y), THIRDS, strict=True):
            if min(abs(at - 1 / 3), abs(at - 2 / 3)) > _CLEAR:
                choices = f"{thirds[0]}, {thirds[1]} or {thirds[2]}"
                slots = {"a": f"the {view.names[i]}", "choices": choices}
                found.append(_Candidate(answer=thirds[int(3 * at)], form=thirds[0], slots=slots))
    return found


def _comparison(view: _View) -> list[_Candidate]:
    return [
        _Candidate(answer="yes" if first > second else "no", form=form, slots={"a": a, "b": b})
        for (form, a, first), (other, b, second) in permutations(_groups(view)[1:], 2)
        if form == other and first and second
    ]


def _unanswerable(view: _View) -> list[_Candidate]:
    found = [
        _Candidate(answer=UNKNOWN, form="colour", slots={"a": f"the {shape}"})
        for shape in SHAPES
        if shape not in view.shapes
    ]
    absent = [pair for pair in view.absent if pair not in HELD_OUT]
    present = [view.names[i] for i in view.subjects() if i in view.names]
    if absent and present:  # one of very many
        colour, shape = absent[view.rng.integers(len(absent))]
        names = [f"the {colour} {shape}", f"the {present[view.rng.integers(len(present))]}"]
        a, b = (names[i] for i in view.rng.permutation(2))
        relation = shapes.RELATIONS[view.rng.integers(len(shapes.RELATIONS))]
        found.append(_Candidate(answer=UNKNOWN, form="relation", slots={"a": a, "b": b, "relation": relation}))
    return found


_CANDIDATES: Final[Mapping[str, Callable[[_View], list[_Candidate]]]] = {
    "existence": _existence,
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "relation": _relation,
    "which": _which,
    "place": _place,
    "comparison": _comparison,
    "unanswerable": _unanswerable,
}
KINDS: Final = tuple(_CANDIDATES)


def ask(scene: Scene, rng: np.random.Generator, *, kind: str | None = None, reworded: bool = False) -> Asked | None:
    """A question about a scene.

    Args:
        kind: one of ``KINDS``; by default any that the scene allows. ``shape`` and ``place`` are what teaches a model
            to take colour and shape apart, and to find relations. ``unanswerable`` has the wordings of ``colour`` and
            ``relation``, and the answer ``UNKNOWN``.
        reworded: one of the wordings that training never sees.

    Returns:
        The question; None where the scene allows none of that kind, such as a relation in a scene of one object.

    Raises:
        DataError: there is no such kind.
    """
    kinds = [kind] if kind is not None else [KINDS[i] for i in rng.permutation(len(KINDS))]
    for name in kinds:
        if found := _candidates(scene, rng, name):
            return _asked(name, found, rng, reworded)
    return None


def _candidates(scene: Scene, rng: np.random.Generator, kind: str) -> list[_Candidate]:
    if kind not in _CANDIDATES:
        raise DataError(f"no kind of question {kind!r}{did_you_mean(kind, KINDS)}")
    return _CANDIDATES[kind](_View(scene, rng))


def _asked(kind: str, found: Sequence[_Candidate], rng: np.random.Generator, reworded: bool) -> Asked:
    """One of ``found``: first a form, then an answer, then a question, each at random."""
    for key in (lambda c: c.form, lambda c: c.answer):
        values = sorted({key(c) for c in found})
        value = values[rng.integers(len(values))]
        found = [c for c in found if key(c) == value]
    chosen = found[int(rng.integers(len(found)))]
    words = WORDINGS[chosen.form if kind == "unanswerable" else kind]
    paraphrase, template = wording(rng, words, reworded=reworded)
    return Asked(kind=kind, question=template.format(**chosen.slots), answer=chosen.answer, paraphrase=paraphrase)


def pose(
    rng: np.random.Generator, *, kind: str | None = None, held_out: bool = False, reworded: bool = False
) -> tuple[Scene, Asked]:
    """A scene and a question about it, with the answers of the kind about equally frequent.

    Args:
        kind: one of ``KINDS``; drawn at random where not given.
        held_out: the scene has one object of a pair of colour and shape that training never sees.
        reworded: the question has one of the wordings that training never sees.

    Raises:
        DataError: there is no such kind.
    """
    if kind is None:
        kind = KINDS[rng.integers(len(KINDS))]
    while True:
        scene, wanted = _DRAW.get(kind, _any_scene)(rng, held_out)
        found = [c for c in _candidates(scene, rng, kind) if wanted(c)]
        if found:
            return scene, _asked(kind, found, rng, reworded)


_Wanted = Callable[[_Candidate], bool]


def _any_scene(rng: np.random.Generator, held_out: bool) -> tuple[Scene, _Wanted]:
    return shapes.scene(rng, held_out=held_out), lambda candidate: True


def _crowd(rng: np.random.Generator, form: str, numbers: Mapping[str, int], held_out: bool) -> Scene:
    """A scene with given numbers of some colours (or shapes), and a random number of others."""
    of = 0 if form == "colours" else 1
    total = sum(numbers.values())
    others = int(rng.integers(0 if total else 1, MAX_OBJECTS - total + 1))
    names = [name for name, number in numbers.items() for _ in range(number)]
    everything = [name for name in (tuple(COLOURS), SHAPES)[of] if name not in numbers]
    names += [everything[i] for i in rng.integers(len(everything), size=others)]
    special = int(rng.integers(len(names))) if held_out else -1
    kinds = []
    for i, name in enumerate(names):
        pairs = [(c, s) for c in COLOURS for s in SHAPES if ((c, s) in HELD_OUT) == (i == special)]
        pairs = [pair for pair in pairs if pair[of] == name]
        kinds.append(pairs[rng.integers(len(pairs))])
    return shapes.arrange([kinds[i] for i in rng.permutation(len(kinds))], rng)


def _some(rng: np.random.Generator, number: int) -> tuple[str, list[str]]:
    """A form of counting and that many different colours or shapes."""
    form, names = (("colours", tuple(COLOURS)), ("shapes", SHAPES))[rng.integers(2)]
    return form, [names[i] for i in rng.permutation(len(names))[:number]]


def _noun(form: str, name: str) -> str:
    return f"{name} objects" if form == "colours" else plural(name)


def _counted_scene(rng: np.random.Generator, held_out: bool) -> tuple[Scene, _Wanted]:
    if rng.random() < 0.2:
        scene = shapes.scene(rng, objects=int(rng.integers(1, MAX_COUNT + 1)), held_out=held_out)
        return scene, lambda candidate: candidate.form == "objects"
    form, (name,) = _some(rng, 1)
    scene = _crowd(rng, form, {name: int(rng.integers(MAX_COUNT + 1))}, held_out)
    return scene, lambda candidate: candidate.slots["a"] == _noun(form, name)


def _compared_scene(rng: np.random.Generator, held_out: bool) -> tuple[Scene, _Wanted]:
    form, (a, b) = _some(rng, 2)
    low, high = sorted(int(i) for i in rng.choice(np.arange(1, 5), 2, replace=False))
    draw = rng.random()
    # More, fewer, and now and then as many: "more" is true one time in two.
    numbers = {a: high, b: low} if draw < 0.5 else {a: low, b: high if draw < 0.85 else low}
    scene = _crowd(rng, form, numbers, held_out)
    return scene, lambda candidate: (candidate.slots["a"], candidate.slots["b"]) == (_noun(form, a), _noun(form, b))


_DRAW: Final[Mapping[str, Callable[[np.random.Generator, bool], tuple[Scene, _Wanted]]]] = {
    "count": _counted_scene,
    "comparison": _compared_scene,
}
