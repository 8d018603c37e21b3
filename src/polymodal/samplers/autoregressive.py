"""The generation loop: token by token, for rows of different lengths, rules and ends.

Rules apply to the scores of the next token in the order of the field (transformers, vLLM): guidance, repetition
penalty, frequency and presence penalties, repeated n-grams, constraint; then, unless greedy, temperature,
top-k, top-p, min-p. Every row has its own rules, random numbers and end, so that its answer is the same alone and in a
batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError
from polymodal.core.verbs import Generates, Memory

Reason: TypeAlias = Literal["stop", "length", "string", "cancel", "constraint"]


@runtime_checkable
class Stream(Protocol):
    """Decodes ids as they come."""

    def push(self, token: int) -> str:
        """The text that this id makes certain."""
        ...

    def finish(self) -> str:
        """The text that was held back."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """What the loop needs of a tokenizer."""

    def stream(self) -> Stream: ...


@runtime_checkable
class Guide(Protocol):
    """The state of a constraint in one answer."""

    def allowed(self) -> Bool[Tensor, " vocab"]:
        """The tokens that may come next; an end token only where the answer may end."""
        ...

    def take(self, token: int) -> None: ...

    @property
    def ended(self) -> bool:
        """Nothing but an end may follow."""
        ...

    def copy(self) -> Guide: ...


@runtime_checkable
class ScoredGuide(Protocol):
    """A `Guide` that looks at the scores, too."""

    def allowed_by(self, scores: Float[Tensor, " vocab"]) -> Bool[Tensor, " vocab"]:
        """The tokens that may come next, given their scores."""
        ...

    def take(self, token: int) -> None: ...

    @property
    def ended(self) -> bool: ...

    def copy(self) -> ScoredGuide: ...


@runtime_checkable
class Constraint(Protocol):
    """A language that answers must belong to."""

    def start(self) -> Guide | ScoredGuide: ...


@runtime_checkable
class Steps(Protocol):
    """What the loop needs of a model once its prompts are read."""

    def step(self, ids: Int[Tensor, " rows"], memory: Any) -> Float[Tensor, "rows vocab"]: ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one prompt is answered.

    Attributes:
        temperature: 0 takes the best token.
        top_k: sample from the best ``k`` only.
        top_p: sample from the fewest tokens that have this probability together.
        min_p: sample from tokens of at least this share of the best one's probability.
        repetition_penalty: divides positive scores and multiplies negative ones of every token of prompt and answer.
        frequency_penalty: taken off a token's score for each time that it was written.
        presence_penalty: taken off the score of a token that was written.
        no_repeat_ngram: no n-gram of prompt and answer comes twice; 0 allows it.
        stop: an answer ends before the first of these strings.
        seed: of this answer's random numbers; None draws one from torch's global generator.
        logprobs: how many of the best tokens are reported with each token.
        n: answers to give.
        best_of: answers to sample, of which the ``n`` with the highest mean log-probability are given.
        beams: width of a beam search; 1 is none.
        length_penalty: the score of a finished beam is divided by its length to this power.
        guidance: ``guided = other + guidance * (prompt - other)`` of log-probabilities, ``other`` being those after a
            second prompt, without the medium or the condition; 1 is none.
        constraint: what the answer must look like.

    Raises:
        ConfigError: a value is out of its range, or two do not go together.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int = 0
    n: int = 1
    best_of: int | None = None
    beams: int = 1
    length_penalty: float = 1.0
    guidance: float = 1.0
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        ranges: list[tuple[str, bool, str]] = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or a positive number"),
            ("top_k", self.top_k is None or self.top_k >= 1, "None or at least 1"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "a positive number"),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "0 or more"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "strings that are not empty"),
            ("stop", not isinstance(self.stop, str), "a tuple of strings"),
            ("logprobs", self.logprobs >= 0, "0 or more"),
            ("n", self.n >= 1, "at least 1"),
            ("best_of", self.best_of is None or self.best_of >= self.n, "None or at least n"),
            ("beams", self.beams >= 1, "at least 1"),
            ("guidance", abs(self.guidance) < float("inf"), "a finite number"),
        ]
        for name, fine, wanted in ranges:
            if not fine:
                raise ConfigError(f"{name} must be {wanted}, not {getattr(self, name)!r}")
        if self.beams > 1 and (self.temperature > 0 or self.best_of is not None or self.n > self.beams):
            raise ConfigError("a beam search is greedy: temperature 0, no best_of, and n at most beams")

    @property
    def most_rows(self) -> int:
        """The most sequences that it takes at a time."""
        wide = self.beams if self.beams > 1 else max(self.n, self.best_of or 1)
        return wide * (1 if self.guidance == 1 else 2)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One more token of one answer.

    Attributes:
        row: which prompt.
        choice: which of its answers.
        token: None when the answer was cancelled.
        text: what became certain: it cannot be part of a stop string nor of an unfinished character any more.
        logprob: of the token by the model (with guidance), before any rule.
        ruled: the same among the tokens that the rules left, before temperature.
        top: the best tokens by the same measure, with theirs.
        finished: why the answer ends here; None if it goes on.
    """

    row: int
    choice: int
    token: int | None
    text: str = ""
    logprob: float = 0.0
    ruled: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    finished: Reason | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole answer; ``steps`` are its tokens, an end token among them."""

    row: int
    choice: int
    text: str
    steps: tuple[Step, ...]
    finished: Reason

    @property
    def ids(self) -> list[int]:
        return [step.token for step in self.steps if step.token is not None]

    @property
    def logprob(self) -> float:
        return sum(step.logprob for step in self.steps)


# ---- rules ----


def ruled(
    scores: Float[Tensor, " vocab"],
    settings: Settings,
    ids: Sequence[int],
    prompt: int,
    guide: Guide | ScoredGuide | None,
) -> Float[Tensor, " vocab"]:
    """Scores after penalties, bans and the constraint.

    Args:
        scores: fp32.
        settings: whose rules.
        ids: prompt and answer so far.
        prompt: how many of them are the prompt.
        guide: the constraint's state.
    """
    s = settings
    if s.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(ids)), device=scores.device)
        old = scores[seen]
        old = torch.where(old < 0, old * s.repetition_penalty, old / s.repetition_penalty)
        scores = scores.index_put((seen,), old)
    written = ids[prompt:]
    if (s.frequency_penalty or s.presence_penalty) and written:
        seen, times = torch.tensor(written, device=scores.device).unique(return_counts=True)
        scores = scores.index_put((seen,), scores[seen] - s.frequency_penalty * times - s.presence_penalty)
    if s.no_repeat_ngram and (banned := repeated(ids, s.no_repeat_ngram)):
        scores = scores.index_fill(0, torch.tensor(banned, device=scores.device), -torch.inf)
    if guide is not None:
        allowed = guide.allowed_by(scores) if isinstance(guide, ScoredGuide) else guide.allowed()
        scores = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
    return scores


def repeated(ids: Sequence[int], size: int) -> list[int]:
    """The tokens that would end an n-gram of this size that ``ids`` already holds."""
    if len(ids) < size:
        return []
    last = list(ids[len(ids) - size + 1 :])
    return sorted({ids[i + size - 1] for i in range(len(ids) - size + 1) if list(ids[i : i + size - 1]) == last})


def filtered(scores: Float[Tensor, " vocab"], settings: Settings) -> Float[Tensor, " vocab"]:
    """Scores after temperature, top-k, top-p and min-p; what is not sampled from is minus infinity."""
    s = settings
    scores = scores / s.temperature
    if s.top_k is not None and s.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(s.top_k).values[-1], -torch.inf)
    if s.top_p < 1:
        worst_first, order = scores.sort()
        tail = worst_first.softmax(0).cumsum(0) <= 1 - s.top_p
        tail[-1] = False
        scores = scores.masked_fill(torch.zeros_like(tail).scatter(0, order, tail), -torch.inf)
    if s.min_p > 0:
        chances = scores.softmax(0)
        scores = scores.masked_fill(chances < s.min_p * chances.max(), -torch.inf)
    return scores


def draw(scores: Float[Tensor, " vocab"], generator: torch.Generator) -> int:
    """One token by its probability, from one random number: a last bit of a score hardly ever changes it."""
    chances = scores.double().softmax(0).cumsum(0)
    place = torch.rand((), dtype=torch.float64, generator=generator).to(chances.device) * chances[-1]
    place = place.clamp(max=torch.nextafter(chances[-1], torch.zeros_like(place)))
    return int(torch.searchsorted(chances, place, right=True))


def generator(settings: Settings, choice: int) -> torch.Generator:
    """The random numbers of one answer; the choices of a prompt have different ones."""
    seed = int(torch.randint(2**62, ())) if settings.seed is None else settings.seed
    words = np.random.SeedSequence([abs(seed), int(seed < 0), choice]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


class Writer:
    """The text of one answer, given out as soon as nothing that may follow can take it back."""

    def __init__(self, stream: Stream, stop: Sequence[str]) -> None:
        self._stream, self._stop, self._held = stream, stop, ""

    def push(self, token: int) -> tuple[str, bool]:
        """New text, and whether a stop string ended the answer."""
        return self._give(self._stream.push(token))

    def finish(self) -> tuple[str, bool]:
        """The rest, and whether a stop string was in it after all."""
        text, stopped = self._give(self._stream.finish())
        if not stopped:
            text, self._held = text + self._held, ""
        return text, stopped

    def _give(self, more: str) -> tuple[str, bool]:
        held = self._held + more
        # The string that is complete first ends the answer, however the text was cut into tokens.
        found = min(((at + len(s), at) for s in self._stop if (at := held.find(s)) >= 0), default=None)
        if found is not None:
            self._held = ""
            return held[: found[1]], True
        keep = max((n for s in self._stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False


# ---- searches ----


class Search(ABC):
    """All answers to one prompt while they are written.

    `advance` reads the scores after each of its sequences and says which go on, and with which token.
    """

    row: int
    following: list[tuple[int, int]]  # (sequence that goes on, its next token); none: the search is over

    @abstractmethod
    def advance(self, scores: Float[Tensor, "sequences vocab"], room: bool) -> list[Step]:
        """One more token of every answer.

        Args:
            scores: of the next token, after each sequence: at first one, the prompt, then those of ``following``.
            room: whether the memory holds another token.

        Raises:
            ConfigError: the rules leave no token to choose from.
        """

    @abstractmethod
    def cancel(self) -> list[Step]:
        """Ends all that still runs."""


def _checked(scores: Tensor, row: int) -> Tensor:
    """The best score is a number: rules left a token, and the model did not break down."""
    best = float(scores.max())
    if best == float("-inf"):
        raise ConfigError(f"prompt {row}: the rules (no_repeat_ngram, constraint) leave no token to choose from")
    if not abs(best) < float("inf"):
        raise ConfigError(f"prompt {row}: the model's scores are {best}; run it in a higher precision")
    return scores


def _best(log_probs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    values, ids = log_probs.topk(min(count, len(log_probs)))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


class Sampling(Search):
    """Answers that know nothing of each other: greedy or sampled."""

    def __init__(
        self, row: int, prompt: Sequence[int], settings: Settings, stop_ids: Sequence[int], tokenizer: Tokenizer
    ) -> None:
        self.row, self._settings, self._stop_ids, self._prompt = row, settings, frozenset(stop_ids), len(prompt)
        count = max(settings.n, settings.best_of or 1)
        self._live = list(range(count))
        self._ids = [list(prompt) for _ in range(count)]
        self._writers = [Writer(tokenizer.stream(), settings.stop) for _ in range(count)]
        self._generators = [generator(settings, choice) for choice in range(count)]
        c = settings.constraint
        self._guides: list[Guide | ScoredGuide | None] = [None if c is None else c.start() for _ in range(count)]
        self.following = []

    def advance(self, scores: Float[Tensor, "sequences vocab"], room: bool) -> list[Step]:
        scores = scores.float().expand(len(self._live), -1)  # the first scores are those of all choices
        steps, following, live = [], [], []
        for place, choice in enumerate(self._live):
            step = self._choose(choice, scores[place], room)
            steps.append(step)
            if step.finished is None:
                assert step.token is not None
                live.append(choice)
                following.append((place if self.following else 0, step.token))
        self._live, self.following = live, following
        return steps

    def _choose(self, choice: int, scores: Tensor, room: bool) -> Step:
        s, ids, guide = self._settings, self._ids[choice], self._guides[choice]
        allowed = _checked(ruled(scores, s, ids, self._prompt, guide), self.row)
        if s.temperature == 0:
            token = int(allowed.argmax())
        else:
            token = draw(filtered(allowed, s), self._generators[choice])
        log_probs = scores.log_softmax(0)
        left = log_probs if allowed is scores else allowed.log_softmax(0)
        ids.append(token)
        finished: Reason | None = None
        if token in self._stop_ids:
            finished = "stop"
            text, stopped = self._writers[choice].finish()
        else:
            text, stopped = self._writers[choice].push(token)
            if guide is not None:
                guide.take(token)
                finished = "constraint" if guide.ended else None
            if finished is None and (not room or len(ids) - self._prompt >= s.max_new_tokens):
                finished = "length"
            if finished and not stopped:
                rest, stopped = self._writers[choice].finish()
                text += rest
        return Step(
            row=self.row, choice=choice, token=token, text=text, logprob=float(log_probs[token]),
            ruled=float(left[token]), top=_best(log_probs, s.logprobs) if s.logprobs else (),
            finished="string" if stopped else finished,
        )  # fmt: skip

    def cancel(self) -> list[Step]:
        live, self._live, self.following = self._live, [], []
        return [Step(row=self.row, choice=choice, token=None, finished="cancel") for choice in live]


@dataclass(frozen=True)
class _Beam:
    score: float
    steps: tuple[Step, ...]
    guide: Guide | ScoredGuide | None
    finished: Reason | None = None


class BeamSearch(Search):
    """The most probable answers: the best ``beams`` beginnings at each length, their finished ones kept aside.

    It ends when no running beam, at its present length, beats the worst of ``beams`` finished ones (the default of
    transformers). Its steps come all at the end, best answer first.
    """

    def __init__(
        self, row: int, prompt: Sequence[int], settings: Settings, stop_ids: Sequence[int], tokenizer: Tokenizer
    ) -> None:
        self.row, self._settings, self._prompt = row, settings, list(prompt)
        self._stop_ids, self._tokenizer = frozenset(stop_ids), tokenizer
        c = settings.constraint
        self._beams = [_Beam(0.0, (), None if c is None else c.start())]
        self._done: list[_Beam] = []
        self.following = []

    def advance(self, scores: Float[Tensor, "sequences vocab"], room: bool) -> list[Step]:
        s, vocab = self._settings, scores.shape[1]
        raw = scores.float().log_softmax(1)
        allowed = torch.stack([self._ruled(beam, row) for beam, row in zip(self._beams, raw, strict=True)])
        total = (allowed + torch.tensor([[beam.score] for beam in self._beams], device=raw.device)).flatten()
        count = max(2, 1 + len(self._stop_ids)) * s.beams  # enough that ``beams`` of them go on
        best, places = _checked(total, self.row).topk(min(count, len(total)))
        length = len(self._beams[0].steps) + 1
        room = room and length < s.max_new_tokens
        running: list[tuple[int, _Beam]] = []
        for rank, (score, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
            if score == float("-inf"):
                break
            parent, token = divmod(place, vocab)
            beam = self._extended(self._beams[parent], token, raw[parent], allowed[parent], score, room)
            if beam.finished is None:
                running.append((parent, beam))
            elif rank < s.beams:
                self._done.append(beam)
        self._done = sorted(self._done, key=self._final, reverse=True)[: s.beams]
        running = running[: s.beams]
        if running and len(self._done) == s.beams:
            promise = running[0][1].score / length**s.length_penalty
            if promise <= self._final(self._done[-1]):
                running = []
        self._beams = [beam for _, beam in running]
        self.following = [(parent, beam.steps[-1].token or 0) for parent, beam in running]
        return [] if running else self._answers()

    def _ruled(self, beam: _Beam, log_probs: Tensor) -> Tensor:
        ids = [*self._prompt, *(step.token for step in beam.steps if step.token is not None)]
        return ruled(log_probs, self._settings, ids, len(self._prompt), beam.guide)

    def _extended(self, beam: _Beam, token: int, log_probs: Tensor, allowed: Tensor, score: float, room: bool) -> _Beam:
        s, guide = self._settings, beam.guide
        finished: Reason | None = None if room else "length"
        top = _best(log_probs, s.logprobs) if s.logprobs else ()
        ruled = float(allowed[token] - allowed.logsumexp(0))
        step = Step(row=self.row, choice=0, token=token, logprob=float(log_probs[token]), ruled=ruled, top=top)
        steps = (*beam.steps, step)
        if token in self._stop_ids:
            finished = "stop"
        else:
            if guide is not None:
                guide = guide.copy()
                guide.take(token)
                finished = "constraint" if guide.ended else finished
            if s.stop and any(stopped for _, stopped in self._written(steps)):
                finished = "string"
        return _Beam(score, steps, guide, finished)

    def _written(self, steps: Sequence[Step]) -> list[tuple[str, bool]]:
        writer = Writer(self._tokenizer.stream(), self._settings.stop)
        tokens = [step.token for step in steps if step.token is not None]
        return [("", False) if token in self._stop_ids else writer.push(token) for token in tokens] + [writer.finish()]

    def _final(self, beam: _Beam) -> float:
        return beam.score / len(beam.steps) ** self._settings.length_penalty

    def _answers(self) -> list[Step]:
        out = []
        for choice, beam in enumerate(self._done[: self._settings.n]):
            *texts, rest = self._written(beam.steps)
            for place, (step, (text, _)) in enumerate(zip(beam.steps, texts, strict=True)):
                last = place == len(beam.steps) - 1
                out.append(
                    Step(
                        row=self.row, choice=choice, token=step.token, text=text + (rest[0] if last else ""),
                        logprob=step.logprob, ruled=step.ruled, top=step.top,
                        finished=beam.finished if last else None,
                    )
                )  # fmt: skip
        return out

    def cancel(self) -> list[Step]:
        self._beams, self.following = [], []
        return [Step(row=self.row, choice=c, token=None, finished="cancel") for c in range(self._settings.n)]


class Guided(Search):
    """Another search on scores that are guided away from a second prompt, whose sequences follow the first one's."""

    def __init__(self, search: Search, scale: float) -> None:
        self.row, self._search, self._scale = search.row, search, scale
        self.following = []

    def advance(self, scores: Float[Tensor, "sequences vocab"], room: bool) -> list[Step]:
        asked, other = scores.float().log_softmax(1).chunk(2)
        mixed = other + self._scale * (asked - other)
        # Infinities less infinities are not numbers: what either side rules out is left to the prompt.
        mixed = torch.where(asked.isfinite() & other.isfinite(), mixed, asked)
        steps = self._search.advance(mixed, room)
        go_on = self._search.following
        self.following = [*go_on, *((len(asked) + parent, token) for parent, token in go_on)]
        return steps

    def cancel(self) -> list[Step]:
        self.following = []
        return self._search.cancel()


def search(
    row: int, prompt: Sequence[int], settings: Settings, stop_ids: Sequence[int], tokenizer: Tokenizer
) -> Search:
    """What answers a prompt with these settings.

    Raises:
        ConfigError: a token of the prompt or the constraint cannot be used.
    """
    kind = BeamSearch if settings.beams > 1 else Sampling
    inner = kind(row, prompt, settings, stop_ids, tokenizer)
    return inner if settings.guidance == 1 else Guided(inner, settings.guidance)


# ---- the loop ----


def prompts(batch: Batch) -> list[list[int]]:
    """The ids of each prompt, without padding."""
    return [ids[valid].tolist() for ids, valid in zip(batch["ids"], batch["valid"].bool(), strict=True)]


@torch.no_grad()
def advance(
    model: Steps, memory: Memory, searches: list[tuple[Search, int]], scores: Tensor
) -> tuple[list[tuple[Search, int]], Tensor]:
    """Reads the next token of all sequences of these searches; gives those that go on, and their next scores.

    Each search comes with the number of its sequences; those of the first come first in ``memory`` and ``scores``.
    """
    order, tokens, running, start = [], [], [], 0
    for one, width in searches:
        order += [start + parent for parent, _ in one.following]
        tokens += [token for _, token in one.following]
        if one.following:
            running.append((one, len(one.following)))
        start += width
    if order != list(range(start)):
        memory.select(torch.tensor(order, dtype=torch.int64, device=scores.device))
    if not running:
        return [], scores[:0]
    return running, model.step(torch.tensor(tokens, device=scores.device), memory)


@torch.no_grad()
def _begin(
    model: Generates, batch: Batch, rules: Sequence[Settings], tokenizer: Tokenizer, against: Batch | None
) -> tuple[Memory, Tensor, list[tuple[Search, int]]]:
    """Reads the prompts, each guided one followed by its other one."""
    guided = [row for row, s in enumerate(rules) if s.guidance != 1]
    if guided and (against is None or against.size != batch.size):
        raise ConfigError("guidance needs a second prompt for each row: pass them as against=")
    texts = prompts(batch)
    others = [[] for _ in rules] if against is None else prompts(against)
    need = max(
        max(len(text), len(others[row]) if row in guided else 0) + s.max_new_tokens
        for row, (text, s) in enumerate(zip(texts, rules, strict=True))
    )
    memory = model.new_memory(batch.size, need)
    scores = model.prefill(batch, memory)
    if guided:
        assert against is not None
        second = model.new_memory(batch.size, need)
        other_scores = model.prefill(against, second)
        order = torch.tensor([row for row in range(batch.size) for _ in range(1 + (row in guided))])
        memory.select(order.to(scores.device))
        scores = scores[order]
        for place, row in enumerate(order.tolist()):
            if place and row == order[place - 1]:
                memory.put(place, second, row)
                scores[place] = other_scores[row]
    return (
        memory,
        scores,
        [
            (search(row, text, s, model.stop_ids, tokenizer), 1 + (row in guided))
            for row, (text, s) in enumerate(zip(texts, rules, strict=True))
        ],
    )


def sample(
    model: Generates,
    batch: Batch,
    settings: Settings | Sequence[Settings],
    tokenizer: Tokenizer,
    *,
    against: Batch | None = None,
    cancel: Callable[[int], bool] | None = None,
) -> Iterator[Step]:
    """Answers prompts, token by token.

    Args:
        model: writes.
        batch: what `Generates.prompt` made; ``ids`` and ``valid`` with as many tokens as the memory will hold.
        settings: of all rows, or one for each.
        tokenizer: turns ids into text.
        against: the prompts that guidance leads away from, a row for each row of ``batch``.
        cancel: asked with a row before each of its tokens; true ends its answers, and they give up their memory.

    Yields:
        A step of every running answer in turn; beams come all together when their search ends.

    Raises:
        ConfigError: settings that do not fit the batch, or rules that leave no token.
        MediaError: a prompt fills the context.
    """
    rules = [settings] * batch.size if isinstance(settings, Settings) else list(settings)
    if len(rules) != batch.size:
        raise ConfigError(f"{len(rules)} settings for {batch.size} prompts")
    memory, scores, running = _begin(model, batch, rules, tokenizer, against)
    while running:
        start = 0
        for one, width in running:
            if cancel is not None and cancel(one.row):
                yield from one.cancel()
            else:
                room = max(memory.lengths[start : start + width]) < memory.capacity
                yield from one.advance(scores[start : start + width], room)
            start += width
        running, scores = advance(model, memory, running, scores)


def complete(
    model: Generates,
    batch: Batch,
    settings: Settings | Sequence[Settings],
    tokenizer: Tokenizer,
    *,
    against: Batch | None = None,
    cancel: Callable[[int], bool] | None = None,
) -> list[Completion]:
    """Whole answers: ``n`` for each prompt, in the order of the prompts; see `sample`."""
    rules = [settings] * batch.size if isinstance(settings, Settings) else list(settings)
    steps = list(sample(model, batch, rules, tokenizer, against=against, cancel=cancel))
    return [answer for row, s in enumerate(rules) for answer in collect([x for x in steps if x.row == row], s)]


def collect(steps: Sequence[Step], settings: Settings) -> list[Completion]:
    """The ``n`` answers that all the steps of one prompt make."""
    answers = []
    for choice in sorted({step.choice for step in steps}):
        mine = tuple(step for step in steps if step.choice == choice)
        finished = mine[-1].finished
        assert finished is not None, "an answer without an end"
        text = "".join(step.text for step in mine)
        answers.append(Completion(row=mine[0].row, choice=choice, text=text, steps=mine, finished=finished))
    if settings.best_of is not None:
        answers.sort(key=lambda a: a.logprob / max(1, len(a.ids)), reverse=True)
    return answers[: settings.n]
