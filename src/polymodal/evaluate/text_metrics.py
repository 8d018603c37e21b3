"""Scores of answers and captions in words, each as its benchmark defines it, and how sure a mean of them is.

Every score is a share from 0 to 1 except CIDEr-D, which runs from 0 to 10. What an official script does by accident is
followed where it changes published numbers, and the deviation is written where it is not.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from polymodal.core.errors import DataError
from polymodal.core.interval import wilson

# ---- how sure ----


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean of ``n`` scores with its 95 % interval, and how the interval was found."""

    value: float
    low: float
    high: float
    n: int
    method: str

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def estimate(
    scores: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
) -> Estimate:
    """The mean of ``scores`` with its 95 % interval.

    Zeros and ones of independent questions take Wilson's interval; everything else a bootstrap that draws whole groups,
    because questions about one picture are right or wrong together. Zeros and ones in groups take the hull of both.
    Where a bootstrap has no width, because all scores are equal, the interval is what so many equal scores leave open;
    one lone group leaves all of ``bounds``.

    Args:
        scores: one a question.
        groups: what each question shares with others, e.g. its picture; without it, each stands alone.
        bounds: the least and the greatest score that there is.
        seed: of the bootstrap.

    Raises:
        DataError: there are no scores, one is not finite, or the groups are of another number.
    """
    if not scores or not all(map(math.isfinite, scores)):
        raise DataError("an estimate needs at least one score, and finite ones")
    if groups is None:
        groups = range(len(scores))
    if len(groups) != len(scores):
        raise DataError(f"{len(scores)} scores in {len(groups)} groups: give one group a score")
    n, value, number = len(scores), math.fsum(scores) / len(scores), len(set(groups))
    share = wilson(int(sum(scores)), n) if set(scores) <= {0, 1} and bounds == (0, 1) else None
    if share and number == n:
        return Estimate(value=value, low=share.low, high=share.high, n=n, method="Wilson")
    if number == 1:
        return Estimate(value=value, low=bounds[0], high=bounds[1], n=n, method="unknown: one group")
    low, high = bootstrap(scores, groups=groups, seed=seed)
    method = "bootstrap" if number == n else "bootstrap over groups"
    if len(set(scores)) == 1:
        other = wilson(0, number).high  # the share that may yet be different
        low, high = value - other * (value - bounds[0]), value + other * (bounds[1] - value)
        method = "Wilson over groups"
    elif share:
        low, high, method = min(low, share.low), max(high, share.high), f"Wilson and {method}"
    return Estimate(value=value, low=min(low, value), high=max(high, value), n=n, method=method)


def bootstrap(
    scores: Sequence[float], *, groups: Sequence[Hashable], seed: int = 0, rounds: int = 2000
) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the mean when whole groups are drawn with putting back."""
    index = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    where = [index[group] for group in groups]
    sums = np.bincount(where, weights=np.asarray(scores, dtype=float))
    sizes = np.bincount(where).astype(float)
    rng = np.random.default_rng(seed)
    means: list[float] = []
    for start in range(0, rounds, 100):  # in parts, so that thousands of pictures do not need gigabytes
        drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=min(100, rounds - start))
        means.extend((drawn @ sums) / (drawn @ sizes))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


# ---- strings ----


def tidy(text: str) -> str:
    """Without outer spaces, and with every inner run of white space as one space."""
    return " ".join(text.split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance in code points."""
    if len(a) > len(b):
        a, b = b, a
    codes = np.frombuffer(b.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    places = np.arange(len(b) + 1)
    row = places.copy()
    for i, letter in enumerate(a, 1):
        change = np.minimum(row[1:] + 1, row[:-1] + (codes != ord(letter)))
        # A run of insertions from place j to k costs k - j, so it is a running minimum of (cost - place).
        row = np.minimum.accumulate(np.concatenate([[i], change]) - places) + places
    return int(row[-1])


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if a reference equals the answer, apart from case and white space."""
    return float(tidy(answer).casefold() in {tidy(r).casefold() for r in references})


def character_edits(answer: str, reference: str) -> tuple[int, int]:
    """Edits from the reference to the answer, and the characters of the reference; case counts, Unicode forms do not.

    The character error rate of a corpus is the sum of the first over the sum of the second; it can be above 1.
    """
    answer, reference = (tidy(unicodedata.normalize("NFC", text)) for text in (answer, reference))
    return edit_distance(answer, reference), len(reference)


def character_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 - edits / length of the reference, at least 0, for the reference that fits best."""
    pairs = [character_edits(answer, reference) for reference in references]
    return max(max(0.0, 1 - edits / length) if length else float(not edits) for edits, length in pairs)


def anls(answer: str, references: Sequence[str], *, threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one question; below ``threshold`` it is 0, at it, it is kept.

    The distance is between lower-cased texts with collapsed spaces, its divisor the length of the texts as they came,
    as both big harnesses have it.

    Source: Biten et al. 2019, https://arxiv.org/abs/1905.13648.
    """
    best = 0.0
    for reference in references:
        length = max(len(answer), len(reference))
        distance = edit_distance(tidy(answer).lower(), tidy(reference).lower())
        best = max(best, 1 - distance / length if length else 1.0)
    return best if best >= threshold else 0.0


# ---- VQA ----

_VQA_MARKS: Final = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS: Final = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"} | {
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_VQA_ARTICLES: Final = frozenset({"a", "an", "the"})
_CONTRACTIONS: Final = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# The official table holds exactly the spellings that lack one apostrophe, and one entry that is the wrong way round.
_VQA_CONTRACTIONS: Final = {
    full[:i] + full[i + 1 :]: full for full in _CONTRACTIONS.split() for i, letter in enumerate(full) if letter == "'"
} | {"somebody'd": "somebodyd"}


def vqa_normalise(text: str) -> str:
    """An answer as the VQA challenge compares it: marks, number words, articles and contractions evened out.

    A mark is dropped if a space stands beside one of its kind or if the text has a digit, a comma and a digit; else it
    becomes a space. A full stop is dropped unless a digit follows.

    Deviations: of the published lists of marks, the one that challenge servers and harnesses use (with ``{ } - !``,
    without ``: '``); the code in the VQA repository has the other.

    Source: https://visualqa.org/evaluation.html
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    thousands = re.search(r"\d,\d", text) is not None
    for mark in _VQA_MARKS:
        dropped = thousands or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if dropped else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = [_VQA_NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(_VQA_CONTRACTIONS.get(word, word) for word in words if word not in _VQA_ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The mean, over the people left out one by one, of min(1, how many of the others gave the answer / 3).

    With ten people, 1 who agrees is worth 0.3, 2 are 0.6, 3 are 0.9 and 4 are 1.

    Deviation: the answers of people are normalised like the model's; the official script evens out only their marks,
    and that only where people differ.

    Source: Antol et al. 2015, https://arxiv.org/abs/1505.00468.
    """
    said = vqa_normalise(answer)
    agree = [vqa_normalise(reference) == said for reference in references]
    return math.fsum(min(1, (sum(agree) - own) / 3) for own in agree) / len(agree)


# ---- ChartQA ----


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if a reference is met: within 5 % (inclusive) for numbers, equal but for case for everything else.

    This is the definition that the community copies, with its quirks: ``x%`` is x / 100, so "45%" misses "45" and meets
    "0.45"; a reference of 0 has to be met letter by letter, so "0.0" misses it; thousands commas, currency signs and a
    closing full stop make a number a text; and 2010 meets 2019. `relaxed_lenient` and `relaxed_strict_years` judge
    these cases otherwise.

    Source: Masry et al. 2022, https://arxiv.org/abs/2203.10244; there is no official code.
    """
    return float(any(_relaxed(answer, reference) for reference in references))


def relaxed_strict_years(answer: str, references: Sequence[str]) -> float:
    """`relaxed_accuracy`, but a reference that looks like a year (1500 to 2100) has to be met exactly."""
    return float(
        any(
            answer.strip() == reference.strip()
            if re.fullmatch(r"1[5-9]\d\d|20\d\d|2100", reference.strip())
            else _relaxed(answer, reference)
            for reference in references
        )
    )


def relaxed_lenient(answer: str, references: Sequence[str]) -> float:
    """`relaxed_accuracy` that reads numbers as people write them.

    A currency sign, thousands commas, outer spaces and a closing full stop do not count; a per cent sign on one side
    only is met on either scale ("45%" meets "45" and "0.45"); 0 is met by any zero.
    """
    return float(any(_relaxed_lenient(answer, reference) for reference in references))


def _relaxed(answer: str, reference: str) -> bool:
    found, truth = _number(answer), _number(reference)
    if found is not None and truth:
        return abs(found - truth) / abs(truth) <= 0.05
    return answer.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _relaxed_lenient(answer: str, reference: str) -> bool:
    (found, found_percent), (truth, truth_percent) = _written_number(answer), _written_number(reference)
    if found is None or truth is None:
        return tidy(answer).rstrip(".").casefold() == tidy(reference).rstrip(".").casefold()
    scales = [1.0] if found_percent == truth_percent else [1.0, 0.01 if found_percent else 100.0]
    return any(abs(found * scale - truth) <= 0.05 * abs(truth) for scale in scales)


def _written_number(text: str) -> tuple[float | None, bool]:
    """A number as people write it, and whether it has a per cent sign."""
    bare = tidy(text).rstrip(".")
    percent = bare.endswith("%")
    match = re.fullmatch(r"([-+\u2212]?)\s?[$€£¥]?\s?(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)\s?%?", bare)
    if match is None:
        return None, percent
    value = float(match[2].replace(",", ""))
    return (-value if match[1] in {"-", "\u2212"} else value), percent


# ---- yes or no ----


@dataclass(frozen=True, kw_only=True)
class YesNo:
    """POPE's numbers with yes as the positive class. Undefined shares are None."""

    accuracy: float
    precision: float | None
    recall: float | None
    f1: float | None
    yes_ratio: float  # of the model's answers; the official harness of many papers counts the labels instead
    unparsed: int


def yes_no_scores(answers: Sequence[str | None], references: Sequence[str]) -> YesNo:
    """Accuracy, precision, recall, F1 and the share of yes among the answers.

    An answer that is neither is wrong, and no yes: it lowers accuracy and recall, not precision.

    Source: Li et al. 2023, https://arxiv.org/abs/2305.10355.

    Raises:
        DataError: there are no answers, a reference or an answer is neither ``yes`` nor ``no``, or the numbers differ.
    """
    if not answers or len(answers) != len(references):
        raise DataError(f"{len(answers)} answers to {len(references)} questions: yes/no scores need one each")
    if odd := (set(references) - {"yes", "no"}) | (set(answers) - {"yes", "no", None}):
        raise DataError(f"{sorted(map(str, odd))[0]!r} is neither 'yes' nor 'no'; parse answers first")
    pairs = Counter(zip(answers, references, strict=True))
    tp, fp = pairs["yes", "yes"], pairs["yes", "no"]
    positives = sum(reference == "yes" for reference in references)
    fn = positives - tp
    return YesNo(
        accuracy=(tp + pairs["no", "no"]) / len(answers),
        precision=tp / (tp + fp) if tp + fp else None,
        recall=tp / positives if positives else None,
        f1=2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None,
        yes_ratio=(tp + fp) / len(answers),
        unparsed=sum(answer is None for answer in answers),
    )


# ---- captions ----

_ABBREVIATIONS: Final = "mr|mrs|ms|dr|prof|st|jr|sr|vs|mt|ave|inc|co|corp|ltd|etc|no|sgt|gen|capt|lt|col|rev|gov|sen"
_PTB: Final = re.compile(
    rf"""
    https?://\S+ | [\w.+-]{{1,64}}@[\w-]+(?:\.[\w-]+)+ | @\w+
    | (?:{_ABBREVIATIONS})\.(?=\s+\S) | \betc\. | \b(?:[a-z]\.)+(?=\W|$)   # dr. smith, u.s., plan b.
    | [-+]?\d+(?:[.,:/]\d+)*(?:-[^\W_]+)* (?:(?=')|[^\W_]*\b) | (?<!\w)(?:\.\d+ | '\d\ds?\b | 'n'(?!\w))
    | [^\W_]+ (?:[-'&./_][^\W_]+)* | (?<=\d)'s\b
    | \.{{2,}} | -{{2,}} | [?!]{{2,}} | '' | `` | \S
    """,
    re.VERBOSE,
)
_CLITIC: Final = re.compile(r"(.+?)(n't|'(?:s|re|ve|ll|d|m))")
_SPLIT: Final = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "lemme": ("lem", "me"),
    "gimme": ("gim", "me"),
}
_DROPPED: Final = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", ";", "-", "--", "---", "..."))
_SPELLED: Final = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "€": "$"}


def tokenise(text: str) -> list[str]:
    """Lower-case words as the Penn Treebank splits them, without the marks that coco-caption drops.

    Clitics stand alone (``is n't``), hyphened words stay whole, and round brackets stay as ``-lrb-`` and ``-rrb-``:
    coco-caption means to drop them but looks for capitals.

    Deviation: a page of rules instead of the Java tokeniser; rare abbreviations, fractions and quotation marks differ.

    Source: the coco-caption evaluation, https://arxiv.org/abs/1504.00325.
    """
    text = re.sub("[\u2018\u2019]", "'", text.lower()).replace("\u2026", "...")
    out: list[str] = []
    for word in _PTB.findall(re.sub('["\u201c\u201d]', " '' ", text)):
        if word in _SPLIT:
            out.extend(_SPLIT[word])
        elif clitic := _CLITIC.fullmatch(word):
            out.extend(clitic.groups())
        else:
            out.append(_SPELLED.get(word, word))
    return [word for word in out if word not in _DROPPED and set(word) != {"."}]


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, from 0 to 10; the score of a corpus is the mean (papers multiply it by 100).

    N-grams of 1 to 4 words, weighted by count and by log(captions / captions whose references hold it), clipped to the
    reference, with a Gaussian penalty (sigma 6) on the difference in length. As in the official scorer, a length is the
    number of two-word pieces. The weights come from the references of this call: a lone caption scores 0, and scores of
    different sets cannot be compared.

    Args:
        candidates: one caption a picture.
        references: what people wrote for each picture; at least one.

    Source: Vedantam et al. 2015, https://arxiv.org/abs/1411.5726.

    Raises:
        DataError: the numbers differ, or a picture has no reference.
    """
    if len(candidates) != len(references) or not all(references):
        raise DataError(f"{len(candidates)} captions and {len(references)} sets of references: give one set each")
    truths = [[_ngrams(reference) for reference in many] for many in references]
    held: Counter[tuple[str, ...]] = Counter()
    for many in truths:
        held.update({gram for sizes in many for grams in sizes for gram in grams})
    total = math.log(len(candidates)) if candidates else 0.0
    idf = {gram: total - math.log(count) for gram, count in held.items()}

    def weigh(sizes: list[Counter[tuple[str, ...]]]) -> list[tuple[dict[tuple[str, ...], float], float]]:
        vectors = [{gram: count * idf.get(gram, total) for gram, count in grams.items()} for grams in sizes]
        return [(vector, math.sqrt(math.fsum(v * v for v in vector.values()))) for vector in vectors]

    scores = []
    for candidate, many in zip(candidates, truths, strict=True):
        found = _ngrams(candidate)
        weighed, length = weigh(found), found[1].total()
        similarity = 0.0
        for sizes in many:
            penalty = math.exp(-((length - sizes[1].total()) ** 2) / (2 * 6**2))
            for (ours, our_norm), (theirs, their_norm) in zip(weighed, weigh(sizes), strict=True):
                shared = math.fsum(min(v, theirs[g]) * theirs[g] for g, v in ours.items() if g in theirs)
                if our_norm and their_norm:
                    similarity += penalty * shared / (our_norm * their_norm)
        scores.append(10 * similarity / (4 * len(many)))
    return scores


def _ngrams(text: str) -> list[Counter[tuple[str, ...]]]:
    words = tokenise(text)
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, 5)]


class ObjectWords:
    """Finds the objects that a caption mentions.

    Words are matched in the singular, phrases before words and longer ones first. "Seat" is no chair beside a toilet.

    Deviations from CHAIR's script: a few rules for plurals, tried until a known word is found, in place of a library.

    Args:
        synonyms: word or phrase -> object; to an empty text for a phrase that means no object.
    """

    def __init__(self, synonyms: Mapping[str, str]) -> None:
        self.objects = {tuple(phrase.lower().split()): name for phrase, name in synonyms.items() if phrase.strip()}
        if not self.objects:
            raise DataError("there are no object words: give synonyms as {'puppy': 'dog', 'dog': 'dog'}")
        self._words = {word for phrase in self.objects for word in phrase}
        self._longest = max(map(len, self.objects))

    def __call__(self, caption: str) -> list[str]:
        """The objects in the order of their mentions, repetitions included."""
        found: list[tuple[str, str]] = []
        for clause in re.split(r"[,;:.!?()]", caption):  # "it is hot, dog" holds no hot dog
            words = [self._singular(word) for word in tokenise(clause)]
            i = 0
            while i < len(words):
                sizes = range(min(self._longest, len(words) - i), 0, -1)
                size = next((n for n in sizes if tuple(words[i : i + n]) in self.objects), 0)
                if size:
                    phrase = tuple(words[i : i + size])
                    found.append((" ".join(phrase), self.objects[phrase]))
                i += size or 1
        toilet = any(name == "toilet" for _, name in found)
        return [name for phrase, name in found if name and not (toilet and phrase == "seat")]

    def _singular(self, word: str) -> str:
        return next((form for form in _singulars(word) if form in self._words), word)


_IRREGULAR: Final = {"mice": "mouse", "geese": "goose", "teeth": "tooth", "feet": "foot"}


def _singulars(word: str) -> list[str]:
    """The word, then what it may be the plural of, likeliest first."""
    forms = [word]
    for ending, singular in (("men", "man"), ("people", "person"), ("children", "child")):
        if word.endswith(ending):
            forms.append(word.removesuffix(ending) + singular)
    if word in _IRREGULAR:
        forms.append(_IRREGULAR[word])
    if word.endswith("s") and not word.endswith("ss"):
        forms.append(word[:-1])
        for ending, singular in (("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe")):
            if word.endswith(ending):
                forms.append(word.removesuffix(ending) + singular)
    return forms


@dataclass(frozen=True, kw_only=True)
class Chair:
    """Objects that captions mention and pictures do not show. Undefined shares are None.

    Longer captions mention more: compare only beside ``recall`` and ``mean_words``.
    """

    sentences: float  # CHAIR_s: captions with at least one such object
    instances: float | None  # CHAIR_i: mentions of such objects among all mentions; repetitions count
    recall: float | None  # objects of the pictures that were mentioned, over the corpus
    mentions: int
    mean_words: float
    hallucinated: tuple[bool, ...]  # by caption


def chair(captions: Sequence[str], objects: Sequence[Sequence[str]], words: Callable[[str], list[str]]) -> Chair:
    """CHAIR_s and CHAIR_i with recall and length beside them.

    Args:
        captions: one a picture.
        objects: what each picture shows: its annotated objects and those that people's captions mention.
        words: the objects that a caption mentions, e.g. an `ObjectWords`.

    Source: Rohrbach et al. 2018, https://arxiv.org/abs/1809.02156.

    Raises:
        DataError: there are no captions, or the numbers differ.
    """
    if not captions or len(captions) != len(objects):
        raise DataError(f"{len(captions)} captions of {len(objects)} pictures: CHAIR needs one each")
    said = [words(caption) for caption in captions]
    shown = [set(names) for names in objects]
    wrong = [sum(name not in truth for name in names) for names, truth in zip(said, shown, strict=True)]
    mentions = sum(map(len, said))
    there = sum(map(len, shown))
    return Chair(
        sentences=sum(count > 0 for count in wrong) / len(captions),
        instances=sum(wrong) / mentions if mentions else None,
        recall=sum(len(truth & set(names)) for names, truth in zip(said, shown, strict=True)) / there
        if there
        else None,
        mentions=mentions,
        mean_words=sum(len(tokenise(caption)) for caption in captions) / len(captions),
        hallucinated=tuple(count > 0 for count in wrong),
    )
