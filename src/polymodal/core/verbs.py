"""The verbs. A system has a verb by implementing its protocol; callers know these and no concrete system."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.core.batch import Batch, Loss
from polymodal.core.drawing import Drawing, Glimpse, Settled
from polymodal.core.filming import Filming, SettledFilm
from polymodal.core.observation import Observation
from polymodal.core.sample import Sample
from polymodal.core.sounding import Sounding, Voice
from polymodal.core.transcript import Heard, Listening

if TYPE_CHECKING:
    from polymodal.core.chat import Chat


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Shape (without the batch axis), dtype and, for integers, the range (``high`` excluded) of one input tensor.

    ``last`` is what each row ends in: an end token that a system looks for. ``head`` is what each row begins with:
    the places of media. ``rows`` numbers the rows: one entry of a ragged tensor for each.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    low: int = 0
    high: int = 1
    last: int | None = None
    head: tuple[int, ...] = ()
    rows: bool = False

    def random(self, batch: int, generator: torch.Generator) -> Tensor:
        if self.rows:
            return torch.arange(batch)
        if self.dtype == torch.bool:
            return torch.ones(batch, *self.shape, dtype=torch.bool)
        if self.dtype.is_floating_point:
            return torch.randn(batch, *self.shape, generator=generator, dtype=self.dtype)
        out = torch.randint(self.low, self.high, (batch, *self.shape), generator=generator, dtype=self.dtype)
        if self.last is not None:
            out[..., -1] = self.last
        if self.head:
            out[..., : len(self.head)] = torch.tensor(self.head)
        return out


@runtime_checkable
class HasInputs(Protocol):
    """Says what it reads, so that inputs can be made up."""

    def inputs_spec(self) -> dict[str, TensorSpec]:
        """What `loss` reads, by name: makes generic tests, benchmarks and documentation free."""
        ...


@runtime_checkable
class Embeds(Protocol):
    """Gives one vector a sample."""

    @property
    def embedding_dim(self) -> int: ...

    @property
    def suffixes(self) -> frozenset[str]:
        """Endings of the files, beside texts, that it gives vectors to, with their dots."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the weights, the config and the pre-processing: vectors of equal fingerprints may be compared."""
        ...

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        """Decodes and pre-processes samples of one kind (pictures, sounds or texts). Thread-safe, no learned layer.

        Raises:
            MediaError: a sample cannot be decoded; the message names it.
        """
        ...

    def encode(self, batch: Batch) -> Float[Tensor, "samples dim"]:
        """Vectors of unit length in fp32, on the model's device, for what `prepare` made (on any device)."""
        ...

    def embed(
        self, items: Any, *, batch_size: int = 64, progress: Callable[[int], None] | None = None
    ) -> Float[Tensor, "samples dim"]:
        """`prepare` and `encode` in batches, without gradients, for anything that `samples` takes; order is kept."""
        ...


@runtime_checkable
class Trains(Protocol):
    """Can be trained by the one loop."""

    def loss(self, batch: Batch) -> Loss: ...

    def after_step(self, step: int, total_steps: int) -> None:
        """Runs after each optimiser step (clamps, EMA teachers)."""
        ...

    def no_decay(self) -> Iterable[str]:
        """Names of parameters that take no weight decay beside those with fewer than two axes."""
        ...

    def blocks(self) -> Iterable[nn.Module]:
        """The repeated layers: the units that sharding gathers and frees one at a time.

        What others call of a block is `forward` or named ``forward_...``: those are where it is gathered.
        """
        ...


@runtime_checkable
class Counts(Protocol):
    """Says how many tokens each part of a sample becomes: the one count that everybody uses."""

    def count(self, sample: Sample) -> int: ...


@runtime_checkable
class Classifies(Protocol):
    """Can score pictures against texts (zero-shot)."""

    def logits(
        self, images: Float[Tensor, "images dim"], texts: Float[Tensor, "texts dim"]
    ) -> Float[Tensor, "images texts"]: ...


@runtime_checkable
class Memory(Protocol):
    """What a running generation remembers: a row for each sequence."""

    lengths: list[int]

    @property
    def capacity(self) -> int:
        """The most tokens that a row can hold."""
        ...

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keeps these rows in this order, some perhaps more than once, and frees the others."""
        ...

    def put(self, row: int, other: Any, source: int = 0) -> None:
        """Copies a row of another memory of the same model over a row of this one."""
        ...

    def cut(self, row: int, length: int) -> None:
        """Forgets all but the first ``length`` tokens of a row; what is forgotten is plain text."""
        ...


@runtime_checkable
class Generates(Protocol):
    """Writes text after a prompt, one token at a time; `samplers.autoregressive` is the loop over it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens after which an answer is complete."""
        ...

    def prompt(self, chats: Sequence[Chat]) -> Batch:
        """Prompts as ``ids`` and ``valid`` (padded at the end) with the pixels or features of their media.

        Raises:
            MediaError: a medium cannot be read, or a prompt is longer than the context: nothing is ever cut.
        """
        ...

    def new_memory(self, rows: int, capacity: int) -> Memory: ...

    def prefill(self, batch: Batch, memory: Any) -> Float[Tensor, "rows vocab"]:
        """Reads the prompts into an empty memory; scores of the token after each prompt."""
        ...

    def step(self, ids: Int[Tensor, " rows"], memory: Any) -> Float[Tensor, "rows vocab"]:
        """Reads one more token a row; scores of the token after it."""
        ...


@runtime_checkable
class Scores(Protocol):
    """Says how probable texts are: what preferences and rewards train."""

    def log_probs(self, batch: Batch) -> Float[Tensor, "batch tokens"]:
        """Of each label (of ``labels``) given what stands before it, in fp32; 0 where there is none."""
        ...

    def places(self, ids: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """Which of these ids stand for media and not for text."""
        ...


@runtime_checkable
class Acts(Protocol):
    """Answers an observation with the actions of the next steps."""

    @property
    def horizon(self) -> int:
        """Steps of a chunk of actions."""
        ...

    @property
    def action_dim(self) -> int: ...

    def observe(self, observations: Sequence[Observation]) -> Batch:
        """Pictures, state and instruction as tensors, normalised. Thread-safe, no learned layer.

        Raises:
            MediaError: a camera is missing, or the state has another length.
        """
        ...

    def act(
        self, batch: Batch, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch horizon action_dim"]:
        """Actions in the robot's own units for what `observe` made; ``generator`` seeds policies that sample."""
        ...

    def lesson(
        self,
        observations: Sequence[Observation],
        actions: Float[Tensor, "batch horizon action_dim"],
        valid: Bool[Tensor, "batch horizon"],
    ) -> Batch:
        """What `loss` reads: observations with the actions (in the robot's units) that a demonstrator took next.

        ``valid`` is False for steps past the end of an episode: they are not learned.
        """
        ...


@runtime_checkable
class Remembers(Protocol):
    """Acts on several observations: on the one that it is shown, and on those before it (`Observation.past`)."""

    @property
    def history(self) -> int:
        """How many, the last one included."""
        ...


def history_of(policy: Acts) -> int:
    """Observations that a policy looks at: one, unless it says otherwise."""
    return policy.history if isinstance(policy, Remembers) else 1


@runtime_checkable
class Continues(Protocol):
    """Can go on from a chunk that is still being carried out (real-time chunking)."""

    def continue_chunk(
        self,
        batch: Batch,
        previous: Float[Tensor, "batch steps action_dim"],
        frozen: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch horizon action_dim"]:
        """`act`, in agreement with what the robot is doing meanwhile.

        Args:
            batch: what `observe` made.
            previous: what is left of the chunk before, from the step of the observation on, in the robot's units; at
                most a horizon.
            frozen: so many steps of it will have been carried out before the new chunk is there.
            generator: seeds policies that sample.
        """
        ...


@runtime_checkable
class Resumes(Protocol):
    """Can read a prompt in pieces, so that long ones do not hold up others and common beginnings are read once."""

    def plain_from(self, batch: Batch) -> int:
        """From which token on a lone prompt is plain causal text; 0 if all of it is, its length if none of it."""
        ...

    def resume(self, ids: Int[Tensor, "rows tokens"], memory: Any) -> Float[Tensor, "rows vocab"]:
        """Reads more plain text behind what the rows hold; scores of the token after it."""
        ...


@runtime_checkable
class Codes(Protocol):
    """Writes sound as whole numbers and reads them back (a neural codec)."""

    @property
    def sample_rate(self) -> int:
        """Samples a second of the waveforms."""
        ...

    @property
    def frame_rate(self) -> float:
        """Frames of codes a second."""
        ...

    @property
    def num_codebooks(self) -> int:
        """Codes of a frame, the coarsest first."""
        ...

    @property
    def codebook_size(self) -> int: ...

    def quantize(self, wave: Float[Tensor, "batch channels samples"]) -> Int[Tensor, "batch codebooks frames"]:
        """Codes of waveforms in [-1, 1] of `sample_rate`."""
        ...

    def reconstruct(self, codes: Int[Tensor, "batch codebooks frames"]) -> Float[Tensor, "batch channels samples"]:
        """Waveforms of codes; fewer codebooks than `num_codebooks` give a coarser sound.

        Whole frames come back: cut what is past the samples that `quantize` was given.
        """
        ...


@runtime_checkable
class PictureCodes(Protocol):
    """Writes pictures, or films, as whole numbers and reads them back."""

    @property
    def codebook_size(self) -> int: ...

    @property
    def factor(self) -> int:
        """Pixels along each side of a code's square."""
        ...

    def quantize(self, pixels: Float[Tensor, "batch channels *size"]) -> Int[Tensor, "batch *grid"]:
        """Codes of pixels in [-1, 1]; those of films have frames before the height.

        Raises:
            MediaError: the sides, or the frames, are no multiples of what a code stands for.
        """
        ...

    def reconstruct(self, codes: Int[Tensor, "batch *grid"]) -> Float[Tensor, "batch channels *size"]:
        """Pixels of codes.

        Raises:
            UnsupportedError: the weights have no decoder.
        """
        ...


@runtime_checkable
class Transcribes(Protocol):
    """Writes down what is said in a sound of any length."""

    @property
    def sample_rate(self) -> int:
        """Samples a second of the waveform that it hears."""
        ...

    def transcribe_stream(
        self, blocks: Iterable[Float[Tensor, " samples"]], listening: Listening, *, after: Heard | None = None
    ) -> Iterator[Heard]:
        """What is said, window by window, as soon as it is certain; no more than a window is in memory.

        Args:
            blocks: the sound from its first sample on, in pieces of any length, one channel in [-1, 1].
            listening: how to hear it.
            after: goes on behind what was heard before, to the same words as if it had never stopped; the samples
                up to there are skipped.

        Raises:
            UnsupportedError: the model knows no such language or task, or gives no times of words.
        """
        ...


@runtime_checkable
class Sounds(Protocol):
    """Makes sound of a text: music that it describes, or speech that says it."""

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        ...

    @property
    def channels(self) -> int: ...

    def sound(
        self, text: str, sounding: Sounding, *, voice: Voice | None = None
    ) -> Iterator[Float[Tensor, "channels samples"]]:
        """Blocks of a waveform in [-1, 1], the first ones before the last ones are made.

        Args:
            text: what is to be heard.
            sounding: how to make it.
            voice: who is to speak.

        Raises:
            MediaError: the text is empty, or the sound would be longer than the model can make.
            UnsupportedError: the model speaks with no given voice, or reads no text.
        """
        ...


@runtime_checkable
class Draws(Protocol):
    """Makes pictures of texts, anew or of other pictures."""

    @property
    def multiple(self) -> int:
        """Pixels that the sides of a picture are multiples of."""
        ...

    def settled(self, drawing: Drawing, *, begun: tuple[int, int] | None = None, masked: bool = False) -> Settled:
        """The drawing with all that is left to the model filled in, a seed among it.

        Args:
            drawing: what is asked for.
            begun: width and height of a picture to begin with.
            masked: whether only a part of it is made anew.

        Raises:
            ConfigError: the size is no multiple of what the model paints, or there is a strength and no picture.
        """
        ...

    def draw(
        self,
        prompts: Sequence[str],
        drawing: Drawing,
        *,
        image: Float[Tensor, "images 3 height width"] | None = None,
        mask: Float[Tensor, "masks 1 mask_height mask_width"] | None = None,
        control: Float[Tensor, "controls 3 control_height control_width"] | None = None,
        watch: Callable[[Glimpse], None] | None = None,
    ) -> Float[Tensor, "pictures 3 height width"]:
        """A picture for each prompt, in [0, 1], on the CPU.

        Args:
            prompts: what is to be seen.
            drawing: how to make them; the seed of each is the one before it and one.
            image: pictures to begin with, in [0, 1]; one for all, or one each. They give the size.
            mask: 1 where a picture is made anew and 0 where it is kept; of the size of ``image``, which it needs.
            control: pictures of what has to be where, for models that look at such.
            watch: is told after each step.

        Raises:
            ConfigError: the size is no multiple of what the model paints, or something is out of range.
            MediaError: a prompt is longer than the model reads, or a mask has another size than the picture.
            UnsupportedError: the model cannot read texts, or looks at no control.
        """
        ...


@runtime_checkable
class Films(Protocol):
    """Makes films, of texts or of a picture that they begin with."""

    def settled_film(self, filming: Filming, *, begun: tuple[int, int] | None = None) -> SettledFilm:
        """The settings with all that is left to the model filled in, a seed among them.

        Args:
            filming: what is asked for.
            begun: width and height of a picture that it is to begin with.

        Raises:
            ConfigError: the size or the number of frames is none that the model makes.
            UnsupportedError: something is asked for that the model is not told.
        """
        ...

    def film(
        self,
        prompt: str,
        filming: Filming,
        *,
        image: Float[Tensor, "3 height width"] | None = None,
        watch: Callable[[Glimpse], None] | None = None,
    ) -> Float[Tensor, "frames 3 height width"]:
        """The frames of one film, in [0, 1], on the CPU.

        Args:
            prompt: what is to be seen; empty for models that read no text.
            filming: how to make it.
            image: a picture to begin with, in [0, 1], of the size of the film.
            watch: is told after each step; its pictures are the frames.

        Raises:
            ConfigError: see `settled_film`.
            MediaError: the text is longer than the model reads, or the picture has another size.
            UnsupportedError: the model reads no text, or begins with no picture, or with nothing else.
        """
        ...


@runtime_checkable
class Imagines(Protocol):
    """Foresees what will be seen if something is done: a world model."""

    @property
    def action_dim(self) -> int: ...

    @property
    def history(self) -> int:
        """Frames of the past that it makes use of; there may be fewer or more."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the frames that it reads and makes."""
        ...

    def imagine(
        self,
        frames: Float[Tensor, "batch context 3 height width"],
        actions: Float[Tensor, "batch steps action"],
        *,
        seed: int | Sequence[int] = 0,
    ) -> Float[Tensor, "batch future 3 height width"]:
        """The frames that come next, in [0, 1], on the CPU.

        Args:
            frames: what was seen, in [0, 1].
            actions: what is done between each frame and the next, those that are known first: there are ``context - 1``
                of these, and one more for each frame to come.
            seed: of the first row, the next ones have the numbers behind it; or one for each row. Each is the same
                alone and among others.

        Raises:
            ConfigError: seeds that are negative, or not one for each row.
            MediaError: frames of another size, actions of another number, or none for a frame to come; no rows; or
                what is not finite.
        """
        ...


def verbs_of(system: type) -> Sequence[str]:
    """The names of the verbs that a class implements."""
    names = {
        "encode": "embed",
        "prefill": "ask",
        "loss": "train",
        "logits": "classify",
        "count": "count",
        "act": "act",
        "sound": "sound",
        "draw": "draw",
        "film": "film",
        "imagine": "imagine",
        "transcribe_stream": "transcribe",
    }
    return [verb for method, verb in names.items() if getattr(system, method, None) is not None]
