"""Text, pictures and sound written by one loop, where media are runs of code tokens.

A span of a medium is a begin token, whole rounds of codes, an end token. `Interleaved` says which tokens may come next:
a constraint for `autoregressive.Settings`. `events` takes apart what was written, as it comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.events import Event, Kind


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How spans of one kind are written.

    Attributes:
        kind: what they are.
        begin, end: stand around the codes.
        books: the token of each code, for each of the books that take turns.
        rounds: how often each book has its turn in a span; None: any number of times, at least once.
    """

    kind: Kind
    begin: int
    end: int
    books: tuple[tuple[int, ...], ...]
    rounds: int | None = None

    @property
    def shortest(self) -> int:
        """Tokens of the shortest span, its frame included."""
        return 2 + len(self.books) * (self.rounds or 1)

    @cached_property
    def places(self) -> tuple[dict[int, int], ...]:
        """The code of each token, book by book."""
        return tuple({token: code for code, token in enumerate(book)} for book in self.books)

    def codes(self, tokens: Sequence[int]) -> Int[Tensor, "books rounds"]:
        """The codes that whole rounds of tokens stand for."""
        turns = len(self.books)
        return torch.tensor([self.places[i % turns][token] for i, token in enumerate(tokens)]).view(-1, turns).t()


@dataclass(frozen=True, kw_only=True)
class Interleaved:
    """Text in which there may be whole spans of other kinds.

    Attributes:
        modes: how those are written.
        vocab_size: how many scores the model gives.
        room: tokens of an answer (``max_new_tokens``): a span that would not fit is not begun, one of any length ends
            in time.
        most: spans of a kind in an answer; any number of those that it does not name.
        only: an answer is one span of this kind, and nothing else.
        never: tokens that are not written (placeholders, which the vocabulary may lack).

    Raises:
        ConfigError: the one span does not fit.
    """

    modes: tuple[Mode, ...]
    vocab_size: int
    room: int
    most: Mapping[Kind, int] = field(default_factory=dict)
    only: Kind | None = None
    never: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode.kind == self.only and mode.shortest > self.room:
                raise ConfigError(f"{self.room} tokens to write {mode.kind}, which takes {mode.shortest} at least")

    def start(self) -> ModeGuide:
        return ModeGuide(self)


class ModeGuide:
    """Where an answer stands: in text, or so many codes into a span."""

    def __init__(self, rules: Interleaved) -> None:
        self._rules, self._written, self._inside = rules, 0, 0
        self._mode: Mode | None = None  # of the span that is being written
        self._begun: dict[Kind, int] = {mode.kind: 0 for mode in rules.modes}
        self._codes = {mode.kind: [self._mask(book) for book in mode.books] for mode in rules.modes}
        self._text = ~self._mask([token for token in rules.never if token < rules.vocab_size])
        for mode in rules.modes:
            self._text &= ~torch.stack([self._mask([mode.begin, mode.end]), *self._codes[mode.kind]]).any(0)

    def _mask(self, ids: Sequence[int]) -> Bool[Tensor, " vocab"]:
        mask = torch.zeros(self._rules.vocab_size, dtype=torch.bool)
        mask[list(ids)] = True
        return mask

    def _may_begin(self, mode: Mode) -> bool:
        r, begun = self._rules, self._begun[mode.kind]
        if r.only is not None:
            return mode.kind == r.only and not begun
        return begun < r.most.get(mode.kind, begun + 1) and self._written + mode.shortest <= r.room

    def allowed(self) -> Bool[Tensor, " vocab"]:
        """In a span the next code, or its end where it may end; outside what is text, or a begin."""
        r, mode = self._rules, self._mode
        if mode is None:
            begin = self._mask([m.begin for m in r.modes if self._may_begin(m)])
            return begin if r.only is not None else self._text | begin
        rounds, turn = divmod(self._inside, len(mode.books))
        codes, end = self._codes[mode.kind][turn], self._mask([mode.end])
        if mode.rounds is not None:
            return end if rounds == mode.rounds else codes
        if turn or not rounds:
            return codes
        return codes | end if self._written + len(mode.books) < r.room else end

    def take(self, token: int) -> None:
        self._written += 1
        if self._mode is None:
            self._mode, self._inside = next((m for m in self._rules.modes if m.begin == token), None), 0
            if self._mode is not None:
                self._begun[self._mode.kind] += 1
        elif token == self._mode.end:
            self._mode = None
        else:
            self._inside += 1

    @property
    def ended(self) -> bool:
        only = self._rules.only
        return only is not None and self._mode is None and self._begun[only] == 1

    def copy(self) -> ModeGuide:
        other = ModeGuide.__new__(ModeGuide)
        other.__dict__.update(self.__dict__, _begun=dict(self._begun))
        return other


def events(tokens: Iterable[int], modes: Sequence[Mode]) -> Iterator[Event[tuple[int, ...]]]:
    """What tokens are, as soon as it is known: text one by one, spans of a fixed length whole, others round by round.

    Payloads are tokens, without those that begin and end spans: nothing else is left out, so they say it all.

    Args:
        tokens: of one answer, without the one that ends it.
        modes: how spans are written; every token that begins none is text.

    Raises:
        MediaError: a span is not written as its mode says, or is cut.
    """
    begins = {mode.begin: mode for mode in modes}
    mode: Mode | None = None
    index, texts, given, held = 0, 0, 0, list[int]()
    for token in tokens:
        if mode is None and token not in begins:
            texts += 1
            yield Event(kind="text", index=index, payload=(token,))
        elif mode is None:
            if texts:
                yield Event(kind="text", index=index, payload=(), done=True)
                index += 1
            mode, texts, given = begins[token], 0, 0
        elif token == mode.end and given and not held:
            if mode.rounds is None:
                yield Event(kind=mode.kind, index=index, payload=(), done=True)
            mode, index = None, index + 1
        else:
            whole = given and mode.rounds is not None
            if whole or token not in mode.places[len(held) % len(mode.books)]:
                raise MediaError(f"token {token} in a span of {mode.kind}, behind {len(held) + given} of its codes")
            held.append(token)
            if len(held) == len(mode.books) * (mode.rounds or 1):
                yield Event(kind=mode.kind, index=index, payload=tuple(held), done=mode.rounds is not None)
                given, held = given + len(held), []
    if mode is not None:
        raise MediaError(f"a span of {mode.kind} is cut behind {len(held) + given} of its codes")
    if texts:
        yield Event(kind="text", index=index, payload=(), done=True)


class Wordless:
    """A tokenizer and its stream for answers that are no text."""

    def stream(self) -> Wordless:
        return self

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""
