"""English sentences of common words: plain statements, questions, requests, numbers, and words in no order at all.

Every part of a sentence is drawn, so their number has no end to speak of; a tenth of all sentences and a tenth of the
content words are held out by the hash of their letters alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

import numpy as np

from polymodal.data.worlds.asked import chance


def listed(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


NOUNS: Final = listed(
    """
    apple arm army artist aunt baby baker ball banana bank basket bath beach bear bed bell bench bicycle bird boat
    bone book border bottle bowl box boy branch bread brick bridge brother brush bucket building bus butter button
    cake camera candle captain car carpet castle cat cave chair cheese chicken child church circle city clock cloud
    coat coffee coin comb corner cotton country cousin cow cup curtain daughter desk dinner doctor dog dollar door
    dream dress driver duck eagle ear egg engine evening eye face factory family farmer father feather fence field
    finger fire fish flag floor flower fly forest fork fox friend frog garden gate gift girl glass glove goat
    grandmother grape grass guest guitar hammer hand harbor hat head heart hill holiday horse hospital hotel hour
    house hunter island jacket jar journey judge juice kettle key king kitchen knife ladder lake lamp leaf lemon
    lesson letter library light lion machine map market meal meeting message milk mirror monkey moon morning mother
    mountain mouse mouth museum music nail neighbor nest net newspaper night nose notebook nurse ocean office onion
    orange oven page paint palace paper parcel parent park party pencil person phone piano picture pig pillow pilot
    plane plant plate pocket poem police potato prize prince queen question rabbit radio rain restaurant rice ring
    river road rock roof room rope rose sailor salad salt sand scarf school scissors sea season seat sheep shelf ship
    shirt shoe shop shoulder sister skirt sky smile snake snow soap sock soldier song soup spider spoon spring square
    stable stage stamp star station stone storm story stove stranger street student sugar suitcase summer sun table
    tailor tea teacher team tent test theater thief ticket tiger tongue tool tooth towel tower town toy train tree
    truck uncle valley vegetable village violin visitor voice wagon waiter wall watch water wheel wife wind window
    winter wolf woman wood word worker world year
    """
)
ADJECTIVES: Final = listed(
    """
    angry bad beautiful big bitter black blue brave bright broken brown busy careful cheap clean clear clever cold
    cool crowded curious dangerous dark deep dirty dry early easy empty expensive famous fast fat fine flat foreign
    free fresh friendly full funny gentle glad golden good gray great green happy hard heavy high hot huge hungry
    important kind large late lazy light little lonely long loud lovely low lucky modern narrow new nice noisy old
    open orange pale patient perfect pink plain pleasant polite poor pretty proud purple quick quiet rare ready red
    rich rough round rude sad safe serious sharp short shy sick silent silver simple slow small smooth soft special
    square steep strange strong sudden sunny sweet tall thick thin tiny tired ugly useful warm weak wet white wide
    wild wise wonderful wooden wrong yellow young
    """
)
# Base, third person, past.
VERBS: Final = tuple(
    tuple(forms.split("/"))
    for forms in listed(
        """
        answer/answers/answered ask/asks/asked break/breaks/broke bring/brings/brought build/builds/built
        buy/buys/bought call/calls/called carry/carries/carried catch/catches/caught change/changes/changed
        choose/chooses/chose clean/cleans/cleaned close/closes/closed collect/collects/collected cook/cooks/cooked
        count/counts/counted cover/covers/covered cut/cuts/cut describe/describes/described draw/draws/drew
        drop/drops/dropped enjoy/enjoys/enjoyed examine/examines/examined fill/fills/filled find/finds/found
        finish/finishes/finished fix/fixes/fixed follow/follows/followed forget/forgets/forgot give/gives/gave
        guard/guards/guarded hate/hates/hated hear/hears/heard help/helps/helped hide/hides/hid hold/holds/held
        keep/keeps/kept kick/kicks/kicked know/knows/knew leave/leaves/left lift/lifts/lifted like/likes/liked
        lose/loses/lost love/loves/loved make/makes/made meet/meets/met miss/misses/missed move/moves/moved
        need/needs/needed notice/notices/noticed offer/offers/offered open/opens/opened order/orders/ordered
        paint/paints/painted pay/pays/paid pick/picks/picked plan/plans/planned prepare/prepares/prepared
        promise/promises/promised pull/pulls/pulled push/pushes/pushed reach/reaches/reached read/reads/read
        receive/receives/received remember/remembers/remembered repair/repairs/repaired return/returns/returned
        save/saves/saved see/sees/saw sell/sells/sold send/sends/sent share/shares/shared show/shows/showed
        start/starts/started steal/steals/stole stop/stops/stopped study/studies/studied take/takes/took
        taste/tastes/tasted teach/teaches/taught throw/throws/threw touch/touches/touched trade/trades/traded
        trust/trusts/trusted turn/turns/turned understand/understands/understood use/uses/used visit/visits/visited
        want/wants/wanted wash/washes/washed watch/watches/watched win/wins/won write/writes/wrote
        """
    )
)
PATHS: Final = tuple(
    tuple(forms.split("/"))
    for forms in listed(
        """
        arrive/arrives/arrived come/comes/came dance/dances/danced fall/falls/fell go/goes/went hurry/hurries/hurried
        jump/jumps/jumped laugh/laughs/laughed live/lives/lived play/plays/played rest/rests/rested ride/rides/rode
        run/runs/ran sing/sings/sang sit/sits/sat sleep/sleeps/slept smile/smiles/smiled speak/speaks/spoke
        stand/stands/stood stay/stays/stayed swim/swims/swam travel/travels/traveled wait/waits/waited
        walk/walks/walked work/works/worked
        """
    )
)
NAMES: Final = listed(
    """
    Alice Anna Ben Carol Clara Daniel David Emma Frank George Grace Harry Helen Henry Jack James Jane John Julia Kate
    Laura Lucy Mark Martha Mary Michael Nancy Oliver Paul Peter Robert Rosa Sarah Simon Sophie Susan Thomas Tom Victor
    William
    """
)
PLACES: Final = listed(
    """
    London Paris Berlin Rome Boston Dublin Moscow Tokyo Cairo Africa China India Canada
    """
)
DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS: Final = listed(
    """
    January February March April May June July August September October November December
    """
)
ADVERBS: Final = listed(
    """
    again already always badly carefully early easily finally gently happily here home late later loudly never now
    often once outside perhaps quickly quietly really sadly slowly sometimes soon suddenly there together twice
    usually well
    """
)
WHERE: Final = listed(
    """
    above across after before behind below beside in inside near on over under with without
    """
)
WHEN: Final = (
    "today", "yesterday", "tomorrow", "this morning", "last night", "every day", "last week", "next year",
    "in the evening", "after lunch", "at noon", "before dinner", "once a week", "all day",
)  # fmt: skip
_PRONOUNS: Final = ("I", "you", "we", "they", "he", "she", "it")
_OBJECTS: Final = ("me", "you", "us", "them", "him", "her", "it")
_OWN: Final = listed("my your our their his her the the the the this that every a")
_ONES: Final = listed(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
    """
)
_TENS: Final = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_PLURALS: Final = {
    "child": "children", "goat": "goats", "knife": "knives", "leaf": "leaves", "man": "men", "mouse": "mice",
    "person": "people", "sheep": "sheep", "shelf": "shelves", "thief": "thieves", "tooth": "teeth", "wife": "wives",
    "wolf": "wolves", "woman": "women", "fish": "fish", "scissors": "scissors", "police": "police",
}  # fmt: skip
_MASS: Final = frozenset(
    listed(
        """
        bread butter cotton milk music rain rice salt sand snow soap sugar tea water wood
        """
    )
)

HELD_OUT_SHARE: Final = 0.1
_T = TypeVar("_T")
_COUNTS: Final = ("some", "many", "few", "these", "those", "all")
_UNCOUNTED: Final = frozenset(["police", "scissors"])


def number(n: int) -> str:
    """``twenty three`` for 23: whole numbers below a million."""
    assert 0 <= n < 1_000_000, n
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10 - 2] + (f" {_ONES[n % 10]}" if n % 10 else "")
    unit, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    rest = n % unit
    return f"{number(n // unit)} {name}" + (f" {number(rest)}" if rest else "")


def plural(noun: str) -> str:
    """``cities``, ``boxes``, ``mice``."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun in ("potato", "tomato") else "s")


def held_out_words() -> frozenset[str]:
    """Nouns and adjectives (with their plurals) that no training sentence holds."""
    chosen = {word for word in (*NOUNS, *ADJECTIVES) if chance("word", word) < HELD_OUT_SHARE}
    return frozenset(chosen | {plural(word) for word in chosen if word in NOUNS})


def held_out(sentence: str) -> bool:
    """Whether a sentence (whatever its capitals and marks) is one that training never sees."""
    letters = "".join(c for c in sentence.lower() if c.isalpha() or c == " ")
    return chance("sentence", letters) < HELD_OUT_SHARE


class Sentences:
    """Draws sentences.

    Args:
        new_words: each sentence holds one of the held-out words at least; else none does.
        unseen: only sentences that training never sees; else only others.
    """

    def __init__(self, *, new_words: bool = False, unseen: bool = False) -> None:
        hidden = held_out_words()
        self.new_words, self.unseen, self._hidden = new_words, unseen, hidden
        self._nouns = tuple(w for w in NOUNS if new_words or w not in hidden)
        self._adjectives = tuple(w for w in ADJECTIVES if new_words or w not in hidden)
        self._singular = tuple(w for w in self._nouns if w not in _UNCOUNTED)
        self._countable = tuple(w for w in self._singular if w not in _MASS)
        self._anything = (
            *self._nouns, *(plural(w) for w in self._countable), *self._adjectives, *NAMES, *PLACES, *DAYS, *MONTHS,
            *ADVERBS, *WHERE, *(form for verb in (*VERBS, *PATHS) for form in verb), *_ONES, *_TENS,
            "the", "a", "and", "but", "because", "not", "of", "to", "who", "what", "where", "why", "how", *_PRONOUNS,
        )  # fmt: skip

    def draw(self, rng: np.random.Generator) -> str:
        """A sentence with its capital and its full stop."""
        while True:
            text = self._any(rng)
            words = {word.strip(",.?!").lower() for word in text.split()}
            if bool(words & self._hidden) == self.new_words and (self.new_words or held_out(text) == self.unseen):
                return text

    def _any(self, rng: np.random.Generator) -> str:
        form = rng.random()
        if form < 0.2:  # no grammar to guess from
            words = [_one(rng, self._anything) for _ in range(int(rng.integers(3, 11)))]
            return _capital(" ".join(words)) + "."
        if form < 0.6:
            text = self._statement(rng)
            if rng.random() < 0.3:
                text += f"{_one(rng, (', and', ', but', ' because', ' when', ' while'))} {self._statement(rng)}"
            return _capital(text) + "."
        if form < 0.75:
            return _capital(self._question(rng)) + "?"
        if form < 0.87:
            return _capital(self._number(rng)) + "."
        text = f"{_one(rng, VERBS)[0]} {self._thing(rng)} {self._place(rng)}"
        return _capital(_one(rng, ("please ", "do not ", "let us ", "")) + text) + "."

    def _thing(self, rng: np.random.Generator) -> str:
        """``the old red boat``, ``three apples``, ``Anna``, ``her brother's hat``."""
        form = rng.random()
        if form < 0.12:
            return _one(rng, NAMES)
        described = [_one(rng, self._adjectives)] if rng.random() < 0.45 else []
        if form < 0.3:
            count = _one(rng, ("some", "many", "few", "these", "those", "all", number(int(rng.integers(2, 30)))))
            return " ".join([count, *described, plural(_one(rng, self._countable))])
        owner = _one(rng, _OWN)
        if form < 0.38:
            owner = f"{_one(rng, NAMES)}'s"
        phrase = [*described, _one(rng, self._countable if owner in ("a", "every") else self._singular)]
        if owner == "a" and phrase[0][0] in "aeiou" and phrase[0] != "useful":
            owner = "an"
        return " ".join([owner, *phrase])

    def _place(self, rng: np.random.Generator) -> str:
        if rng.random() < 0.15:
            return f"{_one(rng, ('in', 'to', 'from', 'near'))} {_one(rng, PLACES)}"
        return f"{_one(rng, WHERE)} {self._thing(rng)}"

    def _statement(self, rng: np.random.Generator) -> str:
        third, past = True, bool(rng.random() < 0.55)
        if rng.random() < 0.3:
            subject = _one(rng, _PRONOUNS)
            third = subject in ("he", "she", "it")
        else:
            subject = self._thing(rng)
            past = past or subject.split()[0] in (*_COUNTS, *_ONES, *_TENS)  # no third person for many
        form = rng.random()
        if form < 0.15:
            be = ("was" if third or subject == "I" else "were") if past else "is" if third else "are"
            be = "am" if subject == "I" and not past else be
            if subject.split()[0] in (*_COUNTS, *_ONES, *_TENS):
                be = "were"
            return f"{subject} {be} {_one(rng, ('very ', 'too ', 'not ', 'quite ', ''))}{_one(rng, self._adjectives)}"
        base, present, before = _one(rng, VERBS if form < 0.7 else PATHS)
        verb = before if past else present if third else base
        helper = rng.random()
        if helper < 0.25:
            verb = f"{_one(rng, ('will', 'can', 'must', 'should', 'could', 'would', 'did not', 'may'))} {base}"
        often = f"{_one(rng, ('often', 'never', 'always', 'sometimes', 'usually'))} " if rng.random() < 0.12 else ""
        rest = [f"{subject} {often}{verb}"]
        if form < 0.7:
            rest.append(self._thing(rng) if rng.random() < 0.85 else _one(rng, _OBJECTS))
        if rng.random() < 0.5:
            rest.append(self._place(rng))
        if rng.random() < 0.25:
            rest.append(_one(rng, WHEN) if rng.random() < 0.5 else _one(rng, ADVERBS))
        return " ".join(rest)

    def _question(self, rng: np.random.Generator) -> str:
        base = _one(rng, VERBS)[0]
        form = int(rng.integers(5))
        if form == 0:
            return f"{_one(rng, ('did', 'can', 'will', 'should'))} {self._thing(rng)} {base} {self._thing(rng)}"
        if form == 1:
            asks = _one(rng, ("why", "when", "where", "how"))
            return f"{asks} did {_one(rng, _PRONOUNS[:6])} {base} {self._thing(rng)}"
        if form == 2:
            return f"who {_one(rng, VERBS)[2]} {self._thing(rng)} {_one(rng, WHEN)}"
        if form == 3:
            return f"where is {self._thing(rng)}"
        return f"how many {plural(_one(rng, self._countable))} are {self._place(rng)}"

    def _number(self, rng: np.random.Generator) -> str:
        n = int(rng.integers(2, 10 ** int(rng.integers(1, 5)) + 2))
        form = int(rng.integers(6))
        if form == 0:
            return f"{_one(rng, NAMES)} is {number(int(rng.integers(2, 100)))} years old"
        if form == 1:
            return f"there are {number(n)} {plural(_one(rng, self._countable))} {self._place(rng)}"
        if form == 2:
            return f"it costs {number(n)} dollars"
        if form == 3:
            return f"the meeting is on {_one(rng, DAYS)} at {number(int(rng.integers(1, 13)))}"
        if form == 4:
            return f"{_one(rng, NAMES)} was born in {_one(rng, MONTHS)} nineteen {number(int(rng.integers(10, 100)))}"
        return "the number is " + " ".join(_one(rng, _ONES[:10]) for _ in range(int(rng.integers(2, 8))))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _one(rng: np.random.Generator, of: Sequence[_T]) -> _T:
    return of[int(rng.integers(len(of)))]
