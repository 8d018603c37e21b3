"""Continuous batching: requests come and go while one thread writes a token of every running answer at a time.

A request waits until the memory has room for its longest answer, is read in chunks between the steps of the others, and
joins them; it leaves at once when it is finished or cancelled. What answers look like is the loop's
(`polymodal.samplers.autoregressive`): a request's greedy tokens are the same alone and among others.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.verbs import Generates, Memory, Resumes
from polymodal.nn.feature_cache import content_key
from polymodal.samplers.autoregressive import (
    Completion,
    Search,
    Settings,
    Step,
    Tokenizer,
    advance,
    collect,
    prompts,
    search,
)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine may use.

    Attributes:
        tokens: that the memory of running requests holds: sequences times the room that the longest one needs.
        chunk: of a prompt that is read at a time, if the model can (`Resumes`).
        prefixes: how many tokens of prompts that were read are kept, for prompts that begin alike.
        shortest_prefix: tokens that two prompts must have in common for that.
    """

    tokens: int = 16384
    chunk: int = 512
    prefixes: int = 8192
    shortest_prefix: int = 16

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.chunk < 1 or self.prefixes < 0 or self.shortest_prefix < 1:
            raise ConfigError(f"an engine needs tokens, chunk and shortest_prefix of at least 1: {self}")


class Handle:
    """A request on its way: its steps as they come, or its whole answers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._queue: queue.SimpleQueue[Step | Exception | None] = queue.SimpleQueue()
        self._steps: list[Step] = []
        self._end: Exception | None = None
        self._over = False
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """Ends the answers where they are; their last steps say so. May be called at any time from any thread."""
        self.cancelled.set()

    def __iter__(self) -> Iterator[Step]:
        """Each step once, from one thread; ends with the request.

        Raises:
            PolymodalError: what went wrong with this request.
        """
        while not self._over:
            item = self._queue.get()
            if isinstance(item, Step):
                self._steps.append(item)
                yield item
            else:
                self._over, self._end = True, item
        if self._end is not None:
            raise self._end

    def result(self) -> list[Completion]:
        """Waits for the end.

        Raises:
            PolymodalError: what went wrong with this request.
        """
        for _ in self:
            pass
        return collect(self._steps, self._settings)

    def give(self, item: Step | Exception | None) -> None:
        """For the engine: a step, what went wrong, or the end."""
        self._queue.put(item)


@dataclass(eq=False)
class _Request:
    handle: Handle
    batches: list[Batch]  # the prompt, and the one that guidance leads away from
    settings: Settings
    need: int  # tokens that a row of it may come to
    search: Search


@dataclass(eq=False)
class _Reading:
    """A request whose prompts are being read, each into a memory of one row."""

    request: _Request
    memories: list[Memory]
    scores: list[Tensor]
    read: int = 0  # of the last of the memories

    @property
    def done(self) -> bool:
        return len(self.scores) == len(self.request.batches)


@dataclass(eq=False)
class _Prefix:
    ids: Tensor
    memory: Memory
    plain_from: int


class PrefixCache:
    """Prompts that were read, for those that begin alike.

    Media are part of a beginning: it counts only for prompts with the same media tensors, to the byte, and from where
    on plain text follows.
    """

    def __init__(self, model: Resumes, generates: Generates, limit: int, shortest: int) -> None:
        self._model, self._generates, self._limit, self._shortest = model, generates, limit, shortest
        self._kept: OrderedDict[str, tuple[str, _Prefix]] = OrderedDict()
        self.hits = 0

    @property
    def tokens(self) -> int:
        return sum(len(prefix.ids) for _, prefix in self._kept.values())

    def find(self, batch: Batch, ids: Tensor, capacity: int) -> tuple[Memory, int] | None:
        """A memory that holds as much of this prompt's beginning as is known, and how many tokens that is."""
        media, start = _media_key(batch), self._model.plain_from(batch)
        best: tuple[int, str] | None = None
        for key, (theirs, prefix) in self._kept.items():
            if theirs != media:
                continue
            most = min(len(ids) - 1, len(prefix.ids))  # one token is left to read: its scores are wanted
            differs = (ids[:most] != prefix.ids[:most]).nonzero()
            common = int(differs[0]) if len(differs) else most
            if common >= max(start, prefix.plain_from, self._shortest) and (best is None or common > best[0]):
                best = common, key
        if best is None:
            return None
        common, key = best
        self._kept.move_to_end(key)
        self.hits += 1
        prefix = self._kept[key][1]
        memory = self._generates.new_memory(1, max(capacity, len(prefix.ids)))
        memory.put(0, prefix.memory)
        memory.cut(0, common)
        return memory, common

    def keep(self, batch: Batch, ids: Tensor, memory: Memory) -> None:
        """Remembers a prompt that was just read."""
        length, media, start = len(ids), _media_key(batch), self._model.plain_from(batch)
        if not max(self._shortest, start) < length <= self._limit or memory.lengths[0] != length:
            return
        key = content_key(ids, media)
        if key not in self._kept:
            own = self._generates.new_memory(1, length)
            own.put(0, memory)
            self._kept[key] = media, _Prefix(ids, own, start)
        self._kept.move_to_end(key)
        while self.tokens > self._limit:
            self._kept.popitem(last=False)


def _media_key(batch: Batch) -> str:
    names = sorted(batch.keys() - {"ids", "valid"})
    return hashlib.sha256("".join(content_key(batch[name], name) for name in names).encode()).hexdigest()


class Engine:
    """Answers requests together; `close` it, or use it in a ``with``.

    Args:
        model: writes; called by the engine's thread only.
        tokenizer: turns ids into text.
        config: what may be used.
    """

    def __init__(self, model: Generates, tokenizer: Tokenizer, config: EngineConfig | None = None) -> None:
        self.config = EngineConfig() if config is None else config
        self._model, self._tokenizer = model, tokenizer
        self._resumes = model if isinstance(model, Resumes) else None
        c = self.config
        self.prefixes = (
            None if self._resumes is None else PrefixCache(self._resumes, model, c.prefixes, c.shortest_prefix)
        )
        self._waiting: deque[_Request] = deque()
        self._reading: _Reading | None = None
        self._running: list[tuple[_Request, int]] = []  # with the rows that each has in memory
        self._memory: Memory | None = None
        self._scores: Tensor | None = None
        self._lock = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="polymodal-engine", daemon=True)
        self._thread.start()

    # -- for any thread --

    def submit(self, batch: Batch, settings: Settings, *, against: Batch | None = None) -> Handle:
        """Takes a request; its answers come to the handle.

        Args:
            batch: one prompt, as `Generates.prompt` makes it, on the model's device.
            settings: how it is answered.
            against: the prompt that guidance leads away from.

        Raises:
            ConfigError: the engine is closed, or guidance and ``against`` do not come together.
            MediaError: the request does not fit into the engine's memory even alone.
        """
        if (against is None) == (settings.guidance != 1):
            raise ConfigError("guidance needs a second prompt, and only guidance does: pass it as against=")
        batches = [batch] if against is None else [batch, against]
        if any(b.size != 1 for b in batches):
            raise ConfigError(f"a request is one prompt, not {batch.size}")
        texts = [text for b in batches for text in prompts(b)]
        need = max(map(len, texts)) + settings.max_new_tokens
        if need * settings.most_rows > self.config.tokens:
            raise MediaError(
                f"the request may need {settings.most_rows} x {need} tokens; this engine holds {self.config.tokens}: "
                "shorten the prompt, ask for fewer new tokens or answers, or give the engine more"
            )
        handle = Handle(settings)
        begun = search(0, texts[0], settings, self._model.stop_ids, self._tokenizer)
        with self._lock:
            if self._closed:
                raise ConfigError("the engine is closed")
            self._waiting.append(_Request(handle, batches, settings, need, begun))
            self._lock.notify()
        return handle

    @property
    def load(self) -> tuple[int, int]:
        """Requests that wait, and sequences that run."""
        return len(self._waiting), sum(rows for _, rows in self._running)

    def close(self) -> None:
        """Cancels everything and ends the thread."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the engine's thread --

    @torch.no_grad()
    def _work(self) -> None:
        error: Exception | None = None
        try:
            while self._admit():
                if self._reading is not None:
                    self._read(self._reading)
                if self._running:
                    self._step()
        except Exception as unexpected:
            error = unexpected
        finally:  # nobody waits for a thread that is gone
            with self._lock:
                self._closed = True
            held = [*self._waiting, *([self._reading.request] if self._reading else []), *(r for r, _ in self._running)]
            for request in held:
                self._finish(request, request.search.cancel(), error)
            self._waiting.clear()
            self._reading, self._running, self._memory, self._scores = None, [], None, None

    def _admit(self) -> bool:
        """Waits for work and takes the next request up if it fits; false when the engine is closed."""
        with self._lock:
            while not (self._waiting or self._reading or self._running or self._closed):
                self._lock.wait()
            for request in [r for r in self._waiting if r.handle.cancelled.is_set()]:
                self._waiting.remove(request)
                self._finish(request, request.search.cancel())
            if self._reading is None and self._waiting and self._fits(self._waiting[0]):
                self._reading = _Reading(self._waiting.popleft(), [], [])
            return not self._closed

    def _fits(self, request: _Request) -> bool:
        there = [r for r, _ in self._running]
        rows = sum(r.settings.most_rows for r in [*there, request])
        return rows * max(r.need for r in [*there, request]) <= self.config.tokens

    def _finish(self, request: _Request, steps: list[Step], error: Exception | None = None) -> None:
        for step in steps:
            request.handle.give(step)
        request.handle.give(error)

    def _read(self, reading: _Reading) -> None:
        """One chunk more of a request's prompts; then it joins those that run."""
        request = reading.request
        if request.handle.cancelled.is_set():
            self._reading = None
            self._finish(request, request.search.cancel())
            return
        try:
            self._read_chunk(reading)
            if reading.done:
                self._reading = None
                self._join(reading)
        except Exception as error:
            self._reading = None
            self._finish(request, [], error)

    def _read_chunk(self, reading: _Reading) -> None:
        batch, need = reading.request.batches[len(reading.scores)], reading.request.need
        ids = batch["ids"][0, batch["valid"][0].bool()]
        if len(reading.memories) == len(reading.scores):  # nothing of this prompt was read yet
            found = None if self.prefixes is None else self.prefixes.find(batch, ids, need)
            memory, reading.read = found if found is not None else (self._model.new_memory(1, need), 0)
            reading.memories.append(memory)
        memory, size = reading.memories[-1], self.config.chunk
        if self._resumes is not None and reading.read:
            scores = self._resumes.resume(ids[None, reading.read : reading.read + size], memory)
            reading.read += size
        elif (
            self._resumes is not None
            and batch.keys() == {"ids", "valid"}
            and len(ids) > size
            and self._resumes.plain_from(batch) == 0
        ):
            first = Batch(ids=ids[None, :size], valid=batch["valid"].new_ones(1, size))
            scores, reading.read = self._model.prefill(first, memory), size
        else:
            scores, reading.read = self._model.prefill(batch, memory), len(ids)
        if reading.read >= len(ids):
            reading.scores.append(scores)
            reading.read = 0
            if self.prefixes is not None:
                self.prefixes.keep(batch, ids, memory)

    def _join(self, reading: _Reading) -> None:
        """Gives a request its rows behind those of the others."""
        request, new = reading.request, len(reading.memories)
        rows = sum(count for _, count in self._running)
        if self._memory is None or self._memory.capacity < min(request.need, reading.memories[0].capacity):
            grown = self._model.new_memory(rows + new, max([request.need, *(r.need for r, _ in self._running)]))
            for row in range(rows):
                assert self._memory is not None
                grown.put(row, self._memory, row)
            self._memory = grown
        else:
            self._memory.select(torch.tensor([*range(rows), *[0] * new]))
        for place, memory in enumerate(reading.memories):
            self._memory.put(rows + place, memory)
        scores = torch.cat(reading.scores)
        self._scores = scores if self._scores is None else torch.cat([self._scores, scores])
        self._running.append((request, new))

    def _step(self) -> None:
        """The next token of every running answer."""
        assert self._memory is not None
        assert self._scores is not None
        start = 0
        for request, rows in self._running:
            self._choose(request, self._scores[start : start + rows], self._memory.lengths[start : start + rows])
            start += rows
        searches = [(request.search, rows) for request, rows in self._running]
        try:
            alive, self._scores = advance(self._model, self._memory, searches, self._scores)
        except Exception as error:  # of the step of all: whose fault it is cannot be told
            for request, _ in self._running:
                if request.search.following:
                    self._finish(request, [], error)
            alive = []
        counts = {id(one): rows for one, rows in alive}
        self._running = [(r, counts[id(r.search)]) for r, _ in self._running if id(r.search) in counts]
        if not self._running:
            self._memory = self._scores = None

    def _choose(self, request: _Request, scores: Float[Tensor, "rows vocab"], lengths: list[int]) -> None:
        assert self._memory is not None
        one, room = request.search, min(self._memory.capacity, request.need)
        if request.handle.cancelled.is_set():
            self._finish(request, one.cancel())
            return
        try:
            steps = one.advance(scores, max(lengths) < room)
        except Exception as error:
            one.cancel()
            self._finish(request, [], error)
            return
        for step in steps:
            request.handle.give(step)
        if not one.following:
            request.handle.give(None)
