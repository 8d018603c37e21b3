"""What a system costs before it runs: tokens, parameters, operations, memory, and how long this machine takes.

>>> from polymodal.plan import Input, price
>>> print(price("llava-hf/llava-1.5-7b-hf", Input(images=((640, 480),), text=32, new=64)).text())

Nothing is loaded and nothing is computed: the system is run without numbers (`nn.dryrun`), by its own code, so the
counts are those of a real run. Tokens come from the functions that make prompts. Latency is that of the commands, whose
linear layers are packed (`nn.packed`); a training step has plain ones.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor, nn

from polymodal.api import identify
from polymodal.core.batch import Batch
from polymodal.core.drawing import Drawing, Settled
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError, did_you_mean
from polymodal.core.sample import Image, Sample, Video
from polymodal.core.verbs import Generates, Trains
from polymodal.heads.lm import IGNORE
from polymodal.machine import Machine
from polymodal.modalities.image import MAX_PIXELS
from polymodal.nn.dryrun import DryRun, Held, Work
from polymodal.nn.packed import can_pack
from polymodal.nn.precision import cast
from polymodal.systems import TABLE
from polymodal.systems.acting import Policy
from polymodal.systems.base import DualEncoder, Embedder, System
from polymodal.systems.generator import Generator
from polymodal.systems.painting import Painter
from polymodal.weights.hub import resolve, shipped

DType = Literal["fp32", "bf16", "int8"]
PICTURE = (640, 480)
_ADAM = 2  # numbers that AdamW keeps for each parameter that trains


@dataclass(frozen=True, kw_only=True)
class Input:
    """What is priced.

    Attributes:
        images: width and height of each picture before pre-processing; if None one of 640 x 480 (of each camera of a
            policy), unless there is a clip or the system reads no pictures. Policies that do not write read theirs. Of
            a system that paints, one picture that is painted; if None in the system's own size.
        frames: of a clip as large as the first picture (640 x 480 without one), at ``fps``; a system without clips
            reads them as so many pictures.
        text: tokens of the prompt beside the media, or of each text that is embedded.
        new: tokens of the answer.
        steps: of a picture that is painted; None leaves it to the system.
        batch: so many such inputs at once.
    """

    images: tuple[tuple[int, int], ...] | None = None
    frames: int = 0
    fps: float = 2.0
    text: int = 32
    new: int = 64
    steps: int | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        for width, height in self.images or ():
            if min(width, height) < 1:
                raise MediaError(f"a picture of {width} x {height} pixels has no pixels")
            if width * height > MAX_PIXELS:
                raise MediaError(
                    f"a picture of {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded: resize it first"
                )
        wrong = [f"{n} is {v}" for n, v in asdict(self).items() if n in ("text", "new", "batch") and v < 1]
        wrong += [f"steps is {self.steps}"] * (self.steps is not None and self.steps < 1)
        wrong += [f"frames is {self.frames}"] * (self.frames < 0)
        wrong += [f"fps is {self.fps}"] * (not 0 < self.fps < math.inf)
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: text, new, steps, batch and fps are positive")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One call of a system. ``activations`` are the bytes that it holds at most, beside weights, inputs and cache."""

    flops: int
    activations: int
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `price` found; bytes and floating-point operations (a multiplication and an addition are two).

    Attributes:
        tokens: of each kind of part; ``context`` is what the backbone reads at most.
        parameters: of each part.
        phases: by name: ``prefill``, ``step`` (a token in the middle of the answer) and ``answer`` of a system that
            writes, ``pictures`` and ``texts`` of one that embeds, ``condition``, ``step`` (with both predictions of
            guidance), ``decode`` and ``drawing`` (all of it) of one that paints, ``train`` of a training step.
        weights: bytes; of training in fp32 with gradients in the phase's activations and AdamW's numbers in
            ``optimizer``.
        cache: bytes of keys and values for the whole answer; ``cache_per_token`` of one more token a row.
        peak: bytes that are held at most.
        note: why there is no latency.
    """

    name: str
    system: str
    dtype: DType
    input: Input
    tokens: Mapping[str, int]
    parameters: Mapping[str, int]
    phases: Mapping[str, Phase]
    weights: int
    inputs: int
    cache: int = 0
    cache_per_token: int = 0
    optimizer: int = 0
    peak: int = 0
    machine: str | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for `json.dumps`."""
        return asdict(self) | {"parameters": {**self.parameters, "total": sum(self.parameters.values())}}

    def rows(self) -> list[tuple[str, str, str]]:
        """Section, what, and how much: a table to read."""
        out = [("tokens", name, f"{count:,}") for name, count in self.tokens.items()]
        out += [("parameters", part, f"{count:,}") for part, count in self.parameters.items()]
        out.append(("parameters", "total", f"{sum(self.parameters.values()):,}"))
        out += [("operations", name, _scaled(phase.flops, "FLOP", 1000)) for name, phase in self.phases.items()]
        memory = {
            "weights": self.weights,
            "inputs": self.inputs,
            "AdamW": self.optimizer,
            "cache": self.cache,
        }
        out += [("memory", name, _scaled(count, "B", 1024)) for name, count in memory.items() if count]
        if self.cache_per_token:
            out.append(("memory", "cache of one token", _scaled(self.cache_per_token, "B", 1024)))
        out += [
            ("memory", f"activations, {name}", _scaled(phase.activations, "B", 1024))
            for name, phase in self.phases.items()
            if name not in ("answer", "drawing")
        ]
        out.append(("memory", f"peak in {self.dtype}", _scaled(self.peak, "B", 1024)))
        for name, phase in self.phases.items():
            if phase.seconds is not None:
                out.append((f"time on {self.machine}", name, _time(phase.seconds)))
        return out

    def text(self) -> str:
        """The table as plain text."""
        rows = self.rows()
        lines = [f"{self.name}: {self.system}, {self.dtype}, batch {self.input.batch}"]
        width = max(len(what) for _, what, _ in rows)
        for section, group in itertools.groupby(rows, key=lambda row: row[0]):
            lines += ["", section, *(f"  {what:<{width}}  {much:>16}" for _, what, much in group)]
        return "\n".join([*lines, *(["", self.note] if self.note else [])])


def _scaled(value: int, unit: str, base: int) -> str:
    steps = ["", "k", "M", "G", "T", "P"] if base == 1000 else ["", "Ki", "Mi", "Gi", "Ti", "Pi"]
    place = min(int(math.log(value, base)), len(steps) - 1) if value else 0
    return f"{value / base**place:.{2 if place else 0}f} {steps[place]}{unit}"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


# ---- which system


@dataclass(frozen=True)
class _Found:
    name: str
    cls: type[System]
    config: Any
    folder: tuple[Path, str] | None = None  # with the name of its format

    def build(self, dry: DryRun, dtype: DType) -> System:
        model = dry.build(lambda: cast(self.cls(self.config), "bf16" if dtype == "bf16" else "fp32"))
        assert isinstance(model, System)
        if self.folder is None:
            model.images = model.default_images()
        else:
            folder, format_name = self.folder
            model.images = model.load_images(folder, self.cls.formats[format_name])
        return model.eval()


def presets() -> dict[str, tuple[type[System], Any]]:
    """The presets of all systems of the table: their class, and what makes their config."""
    out: dict[str, tuple[type[System], Any]] = {}
    for entry in TABLE.values():
        cls = entry.resolve()
        out |= {name: (cls, make) for name, make in getattr(sys.modules[cls.__module__], "PRESETS", {}).items()}
    return out


def find(what: Any) -> _Found:
    """The class and the config that a preset's name, a folder, a shipped model or a config stands for.

    Raises:
        ConfigError: nothing has this name. Nothing is downloaded.
    """
    if not isinstance(what, str | Path):
        for entry in TABLE.values():
            cls = entry.resolve()
            if cls.__annotations__.get("config") in (type(what), type(what).__name__):
                return _Found(entry.name, cls, what)
        raise ConfigError(f"{type(what).__name__} is not the config of a system")
    name, known = str(what), presets()
    if Path(what).expanduser().is_dir() or name in shipped():
        folder = resolve(what)
        cls, format_name = identify(folder)
        fmt = cls.formats[format_name]
        config, _ = fmt.read(fmt.config(folder))
        return _Found(name, cls, config, (folder, format_name))
    if name in known:
        cls, make = known[name]
        return _Found(name, cls, make())
    if name in TABLE:
        here = [preset for preset, (cls, _) in known.items() if cls is TABLE[name].resolve()]
        raise ConfigError(f"{name} is a system of several sizes; say which: {', '.join(here) or 'a folder'}")
    raise ConfigError(
        f"{name}: no folder, no preset and no shipped model is called so{did_you_mean(name, [*known, *shipped()])} "
        "(polymodal ls SYSTEM lists presets; other models are priced from a folder with their config.json)"
    )


def parameters(model: nn.Module) -> dict[str, int]:
    """Exact counts of a system's parts; what two parts share is counted in the first."""
    seen: set[int] = set()

    def count(tensors: Sequence[nn.Parameter]) -> int:
        new = [p for p in tensors if id(p) not in seen and not seen.add(id(p))]  # type: ignore[func-returns-value]
        return sum(p.numel() for p in new)

    parts = {name: count(list(part.parameters())) for name, part in model.named_children()}
    parts |= {name: count([p]) for name, p in model.named_parameters(recurse=False)}
    return {name: number for name, number in parts.items() if number}


# ---- the price


def price(what: Any, given: Input | None = None, *, dtype: DType = "fp32", train: bool = False) -> Plan:
    """The cost of a system on an input.

    Args:
        what: the name of a preset or of a shipped model, a folder, or a config.
        given: the input; a picture of 640 x 480 with 32 tokens of text and 64 of an answer if not given.
        dtype: of weights and activations; "int8" quantises linear layers as `nn.quantise` does.
        train: also a training step, which is in fp32 whatever ``dtype`` is.

    Raises:
        ConfigError: nothing has this name, or the input is impossible.
        MediaError: the input is longer than the context, or the system does not take such a picture.
        UnsupportedError: the system reads no such input.
    """
    if dtype not in ("fp32", "bf16", "int8"):
        raise ConfigError(f"dtype is 'fp32', 'bf16' or 'int8', not {dtype!r}")
    run = _Run(find(what), given or Input(), dtype)
    given, found = run.given, run.found
    with torch.no_grad():
        run.use()
    if train:
        run.train()
    machine, note = None, ""
    try:
        machine = Machine.read()
    except ConfigError as error:
        note = str(error)
    phases = {
        name: Phase(
            flops=sum(item.flops * times for item, times in part.work.items()) // part.shares,
            activations=part.activations,
            seconds=None if machine is None else machine.seconds(part.work, part.weights) / part.shares,
        )
        for name, part in run.parts.items()
    }
    held = [part.activations for name, part in run.parts.items() if name != "train"]
    peak = run.weights + run.inputs + run.cache + max(held, default=0)
    optimizer = 0
    if train:
        optimizer = 4 * _ADAM * run.trainable
        peak = max(peak, run.parts["train"].weights + optimizer + run.train_inputs + phases["train"].activations)
    return Plan(
        name=found.name, system=found.cls.__name__, dtype=dtype, input=given, tokens=run.tokens,
        parameters=run.parameters, phases=phases, weights=run.weights, inputs=run.inputs, cache=run.cache,
        cache_per_token=run.cache_per_token, optimizer=optimizer, peak=peak,
        machine=machine.name if machine else None, note=note,
    )  # fmt: skip


@dataclass
class _Part:
    """The work of a phase, ``shares`` times as much as the phase has."""

    work: Counter[Work]
    activations: int
    weights: int
    shares: int = 1


@dataclass
class _Run:
    """A system run without numbers, phase by phase."""

    found: _Found
    given: Input
    dtype: DType
    parts: dict[str, _Part] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    inputs: int = 0
    train_inputs: int = 0
    trainable: int = 0
    cache: int = 0
    cache_per_token: int = 0

    def __post_init__(self) -> None:
        self.dry = DryRun()
        self.model = self.found.build(self.dry, self.dtype)
        self.parameters = parameters(self.model)
        self.weights = _weight_bytes(self.model, int8=self.dtype == "int8")
        weights = torch.bfloat16 if self.dtype == "bf16" else torch.float32
        if self.dtype == "int8":
            self.dry.quantise(self.model)
        elif can_pack(weights) and not isinstance(self.model, Policy):  # as commands do
            self.dry.pack(self.model)
        self.given = settled(self.model, self.given)

    def add(self, name: str, counted: tuple[Counter[Work], Held], weights: int | None = None) -> None:
        work, held = counted
        self.parts[name] = _Part(Counter(work), held.peak, self.weights if weights is None else weights)

    def use(self) -> None:
        """What the system is for: to write, to embed, or to be read from."""
        model = self.model
        if isinstance(model, Generates):
            self._write(model, self._dry(prompt(model, self.given, self.tokens)))
        elif isinstance(model, Embedder) and "mel" not in model.inputs_spec():
            self._embed(model)
        elif isinstance(model, Policy):
            self._act(model)
        elif isinstance(model, Painter):
            self._paint(model)
        elif other := [n for n in model.inputs_spec() if n not in ("ids", "valid", "types", "labels")]:
            raise UnsupportedError(f"{type(model).__name__} reads {', '.join(other)}, which has no price yet")
        else:
            ids = torch.zeros(self.given.batch, self.given.text, dtype=torch.int64)
            self.tokens |= {"text": self.given.text, "total": self.given.text}
            batch = self._dry(Batch(ids=ids, valid=torch.ones_like(ids, dtype=torch.bool)))
            with self.dry.counted() as counted:
                model(batch)
            self.add("forward", counted)

    def _dry(self, batch: Batch) -> Batch:
        out = Batch(self.dry.like(batch))
        self.inputs += _bytes(out)
        return out

    # -- writing

    def _write(self, model: Any, batch: Batch) -> None:
        given, dry, length = self.given, self.dry, batch["ids"].shape[1]
        with dry:
            memory = model.new_memory(given.batch, length + given.new)
            spare = model.new_memory(given.batch, length + given.new + 1)
        with dry.counted() as counted:
            model.prefill(batch, memory)
        self.add("prefill", counted)
        # The cache holds what the prefill put beside it, too: what a decoder reads of an encoder.
        self.cache = memory.nbytes
        self.cache_per_token = spare.keys.nbytes // spare.capacity // given.batch * 2
        start = memory.lengths[0]
        # A step's work grows by the same from token to token: the first and the last tell all.
        ends = (start, start + given.new - 1)
        counters = []
        for place in ends:
            memory.lengths = [place] * given.batch
            with dry.counted() as (work, held):
                model.step(torch.zeros(given.batch, dtype=torch.int64), memory)
            counters.append(work)
            if place == ends[-1]:
                both = counters[0] + counters[1]
                self.parts["step"] = _Part(both, held.peak, self.weights, 2)
        answer: Counter[Work] = Counter()
        for item, times in self.parts["prefill"].work.items():
            answer[item] += 2 * times
        for item, times in self.parts["step"].work.items():
            answer[item] += (given.new - 1) * times  # the prefill gives the first token
        most = max(self.parts[name].activations for name in ("prefill", "step"))
        self.parts["answer"] = _Part(answer, most, self.weights, 2)

    # -- embedding

    def _embed(self, model: Any) -> None:
        given = self.given
        pictures = [Sample((Image(PILImage.new("RGB", size)),)) for size in given.images or ()]
        if given.frames:
            raise UnsupportedError(f"{self.found.name} embeds pictures; price a frame as a picture")
        if pictures:
            batch = self._dry(_repeated(model.prepare_images(pictures), given.batch))
            self.tokens["pictures"] = sum(model.count(sample) for sample in pictures)
            with self.dry.counted() as counted:
                model.encode(batch)
            self.add("pictures", counted)
        if isinstance(model, DualEncoder):
            context = model.config.text.context
            if given.text > context:
                raise MediaError(f"{given.text} tokens of text; {self.found.name} reads at most {context}")
            length = context if model.padding == "max" else given.text
            spec = replace(model.inputs_spec()["ids"], shape=(length,))
            batch = self._dry(Batch(ids=spec.random(given.batch, torch.Generator().manual_seed(0))))
            self.tokens |= {"text": length, "context": context}
            with self.dry.counted() as counted:
                model.encode(batch)
            self.add("texts", counted)

    # -- acting

    def _act(self, model: Policy) -> None:
        """A chunk for observations as the spec has them; of a head that writes, a trunk and tokens."""
        generator = torch.Generator().manual_seed(0)
        specs = {n: spec for n, spec in model.inputs_spec().items() if not n.startswith(("actions", "labels"))}
        batch = self._dry(Batch({name: spec.random(self.given.batch, generator) for name, spec in specs.items()}))
        writer = next((part for part in model.children() if isinstance(part, Generates)), None)
        with self.dry.counted() as counted, model.acting():
            condition = model.chunk(batch) if writer is None else model(batch)
        self.add("chunk" if writer is None else "trunk", counted)
        if writer is not None:
            ids = torch.zeros(self.given.batch, 1, dtype=torch.int64)
            with model.acting():
                self._write(writer, Batch(ids=ids, condition=condition))

    # -- painting

    def _paint(self, model: Painter) -> None:
        """A picture of each text, as long as the spec has it, with the model's own guidance."""
        given, generator = self.given, torch.Generator().manual_seed(0)
        if given.frames or len(given.images or ()) > 1:
            raise UnsupportedError(f"{self.found.name} paints one picture of a text: give one size, and no frames")
        size = given.images[0] if given.images else None
        d = model.settled(Drawing(size=size, steps=given.steps, seed=0))
        guided = d.guidance != 1 and not model.embeds_guidance
        rows, specs = given.batch * (1 + guided), model.inputs_spec()
        told = {n: spec for n, spec in specs.items() if not spec.dtype.is_floating_point and n != "chance"}
        batch = self._dry(Batch({name: spec.random(rows, generator) for name, spec in told.items()}))
        self.tokens |= {name: t.shape[1] for name, t in batch.items() if t.ndim == 2 and name.endswith("ids")}
        self.tokens[f"picture, {d.size[0]} x {d.size[1]}"] = model.places(d.size)
        with self.dry.counted() as counted:
            condition = model.condition(batch)
            if "control" in specs:
                condition = model.look_at(condition, self.dry.empty((rows, specs["control"].shape[0], *d.size[::-1])))
        self.add("condition", counted)
        if model.embeds_guidance:
            condition = Batch(condition, guidance=torch.ones(rows))
        latents = self.dry.empty((rows, *model.latents(d.size)), model.dtype)
        with self.dry.counted() as counted:
            model.denoise(latents, torch.ones(rows), condition)
        self.add("step", counted)
        with self.dry.counted() as counted:
            model.decode_latents(self.dry.empty((given.batch, *latents.shape[1:])))
        self.add("decode", counted)
        times = Counter({"condition": 1, "step": _asked(model, d), "decode": 1})
        work: Counter[Work] = Counter()
        for name, number in times.items():
            work.update({item: number * count for item, count in self.parts[name].work.items()})
        most = max(self.parts[name].activations for name in times)
        self.parts["drawing"] = _Part(work, most, self.weights)

    # -- training

    def train(self) -> None:
        """A step on a batch of such inputs with their answers; systems that do not write get what their spec says."""
        given, dry = self.given, DryRun()
        model = self.found.build(dry, "fp32").train()
        if not isinstance(model, Trains):
            raise UnsupportedError(f"{self.found.name} has no loss to train with")
        if isinstance(model, Generator):
            batch = prompt(model, replace(given, text=given.text + given.new), {})
            labels = batch["ids"].clone()
            labels[:, : -given.new] = IGNORE
            batch = Batch(dry.like(batch | {"labels": labels}))
        else:  # with values: what a system draws at random decides which of its tokens it computes
            generator = torch.Generator().manual_seed(0)
            specs = model.inputs_spec()
            if isinstance(model, Generates):
                lengths = {"ids": given.text, "valid": given.text, "labels": given.new}
                specs = {name: replace(spec, shape=(lengths[name],)) for name, spec in specs.items()}
            batch = Batch({name: spec.random(given.batch, generator) for name, spec in specs.items()})
        self.train_inputs = _bytes(batch)
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        with dry.counted() as counted:
            model.loss(batch).mean.backward()
        self.add("train", counted, _weight_bytes(model, int8=False))


def _asked(model: Painter, drawing: Settled) -> int:
    """How often a picture asks the model: solvers of a higher order do so more than once a step."""
    calls = 0

    def predict(x: Tensor, when: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x

    x = torch.zeros(1, 1, 1, 1)
    points = model.sampling.points(drawing.steps, model.places(drawing.size))
    model.sampling.sample(predict, x, points, fresh=lambda: x)
    return calls


def _bytes(batch: Mapping[str, Tensor]) -> int:
    return sum(t.nbytes for t in batch.values())


def _weight_bytes(model: nn.Module, *, int8: bool) -> int:
    """Of parameters and buffers; a layer in int8 has a scale for each output and what the kernel adds to its sums."""
    every = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    total = sum(t.nbytes for t in every.values())
    layers = [m for m in model.modules() if type(m) is nn.Linear] if int8 else []
    return total - sum(layer.weight.nbytes - layer.weight.numel() - 12 * layer.out_features for layer in layers)


def _repeated(batch: Batch, count: int) -> Batch:
    return Batch({name: t.repeat(count, *[1] * (t.ndim - 1)) for name, t in batch.items()})


def settled(model: nn.Module, given: Input) -> Input:
    """The input with its default picture, where the system reads pictures."""
    if given.images is not None:
        return given
    reads = isinstance(model, Embedder) or (isinstance(model, Generator) and model.media_id is not None)
    pictures = len(model.cameras) if isinstance(model, Policy) else 1
    return replace(given, images=(PICTURE,) * pictures if reads and not given.frames else ())


def prompt(model: Any, given: Input, tokens: dict[str, int]) -> Batch:
    """The prompts of an input as the system makes them of media, the text left blank; ``tokens`` gets the counts.

    Raises:
        UnsupportedError: the system reads no media.
        MediaError: prompt and answer are longer than the context.
    """
    spelled: list[list[int]] = []
    media, seen = Batch(), _media(model, settled(model, given))
    if seen:
        if not isinstance(model, Generator):
            raise UnsupportedError(f"{type(model).__name__} reads no pictures: give text alone")
        spelled, media = model.see(seen)
        tokens |= {_called(n, seen): len(ids) for n, ids in enumerate(spelled)}
    places = [i for ids in spelled for i in ids]
    blank = next(i for i in itertools.count() if i not in {*places, getattr(model, "media_id", None)})
    row = [*places, *[blank] * given.text]
    total = len(row) + given.new
    tokens |= {"text": given.text, "answer": given.new, "total": total}
    if isinstance(model, Generator):
        context = tokens["context"] = model.backbone.config.context
        if total > context:
            raise MediaError(
                f"{len(row)} tokens ({len(places)} of media) and {given.new} of an answer; {type(model).__name__} "
                f"reads at most {context}: fewer or smaller pictures, or a shorter text"
            )
    ids = torch.tensor([row] * given.batch)
    out = Batch(ids=ids, valid=torch.ones_like(ids, dtype=torch.bool))
    for name, tensor in media.items():  # all entries of a copy belong to its row
        owner = torch.arange(given.batch).repeat_interleave(len(tensor))
        out[name] = owner if name.endswith("_row") else tensor.repeat(given.batch, *[1] * (tensor.ndim - 1))
    return out


def _media(model: Any, given: Input) -> list[Any]:
    sizes = given.images or ()
    pictures: list[Any] = [PILImage.new("RGB", size) for size in sizes]
    if not given.frames:
        return pictures
    width, height = sizes[0] if sizes else PICTURE
    if isinstance(model, Generator) and model.clip_id is not None:
        blank = np.broadcast_to(np.zeros((1, 1, 1, 3), dtype=np.uint8), (given.frames, height, width, 3))
        return [Video(blank, fps=given.fps)]
    return [PILImage.new("RGB", (width, height))] * given.frames


def _called(number: int, media: Sequence[Any]) -> str:
    medium = media[number]
    if isinstance(medium, Video):
        frames, height, width = medium.source.shape[:3]
        return f"clip of {frames} frames of {width} x {height}"
    return f"picture {number + 1}, {medium.width} x {medium.height}"
