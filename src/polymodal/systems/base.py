"""What every system shares: building, total loading, saving, embedding. Not a system itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.files import write_json
from polymodal.core.precision import Precision
from polymodal.core.sample import IMAGE_SUFFIXES, Sample, samples
from polymodal.core.verbs import TensorSpec
from polymodal.heads.contrastive import ContrastiveHead, SigmoidHead
from polymodal.modalities.image import ImageProcessor, Processor, load_processor
from polymodal.nn.precision import cast
from polymodal.nn.skeleton import skeleton
from polymodal.tokenizers.text import Pad, TextTokenizer
from polymodal.weights.format import Format, Reference
from polymodal.weights.rules import Copy, Plan, Squeeze, plan, to_theirs, unplan

PREPROCESSOR = "preprocessor_config.json"
S = TypeVar("S", bound="System")


class System(nn.Module):
    """Base of the systems. A subclass is final and gives a config, parts, formats and the verbs it has."""

    formats: ClassVar[dict[str, Format]]
    reference: ClassVar[Reference | None] = None
    images: Processor | None = None
    tokenizer: TextTokenizer | None = None
    source: str = "built from a config: random weights"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self._fingerprint: str | None = None

    # -- what subclasses give

    def init_weights(self) -> None:
        """Initialises every parameter as the paper does."""
        raise NotImplementedError

    def inputs_spec(self) -> dict[str, TensorSpec]:
        """What `loss` reads, by name."""
        raise NotImplementedError

    def load_processors(self, folder: Path) -> None:
        """Reads the pre-processing that a checkpoint's folder declares beside that of images."""

    def save_processors(self, folder: Path) -> None:
        """Writes what `load_processors` reads."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder)

    def load_images(self, folder: Path, fmt: Format) -> Processor | None:
        """The image processor of a checkpoint's folder; what follows from the config where it declares none."""
        if fmt.read_images is not None:
            return fmt.read_images(folder, self.config)
        declared = (folder / PREPROCESSOR).is_file() or (folder / "processor_config.json").is_file()
        return load_processor(folder) if declared else self.default_images()

    def default_images(self) -> Processor | None:
        """The pre-processing that follows from the config alone, for a system built without a checkpoint."""
        return None

    # -- training: defaults of the Trains protocol

    def after_step(self, step: int, total_steps: int) -> None:
        """Nothing to do for most systems."""

    def no_decay(self) -> Iterable[str]:
        return ()

    def blocks(self) -> Iterator[nn.Module]:
        """The repeated blocks, for sharding."""
        for name, module in self.named_modules():
            if isinstance(module, nn.ModuleList) and name.endswith("blocks"):
                yield from module

    # -- building

    @classmethod
    def build(cls: type[S], config: Any) -> S:
        """A system with freshly initialised weights."""
        model = cls(config)
        model.init_weights()
        model.images = model.default_images()
        return model

    @classmethod
    def from_folder(cls: type[S], folder: Path, format_name: str, *, precision: Precision = "fp32") -> S:
        """A system with the weights of a folder, all of them, or an error that lists every problem.

        The module is made on the meta device and filled tensor by tensor: a checkpoint is never in memory twice.
        """
        fmt = cls.formats[format_name]
        raw = fmt.config(folder)
        config, _ = fmt.read(raw)
        with skeleton():
            model = cls(config)
        with fmt.open(folder, raw) as checkpoint:
            todo = model.plan(fmt, checkpoint.meta())
            for name, tensor in todo.tensors(checkpoint.read, str(folder)):
                model._fill(name, tensor)
        assert not todo.initialised, "no system of this release initialises a parameter beside a checkpoint"
        left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
        assert not left, f"still without a value: {left}"
        model.source = str(folder)
        model.images = model.load_images(folder, fmt)
        model.load_processors(folder)
        return cast(model.eval(), precision)

    def plan(self, fmt: Format, theirs: Mapping[str, Tensor]) -> Plan:
        return plan(fmt.rules(self.config), theirs, self.state_dict())

    def _fill(self, name: str, tensor: Tensor) -> None:
        *path, leaf = name.split(".")
        module = self.get_submodule(".".join(path))
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        if leaf in module._parameters:
            old = module._parameters[leaf]
            assert old is not None
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=old.requires_grad))
        else:
            module._buffers[leaf] = tensor

    def save(
        self,
        folder: str | Path,
        *,
        format_name: str = "hf",
        dtype: torch.dtype = torch.float32,
        shard_bytes: int = 5 << 30,
    ) -> Path:
        """Writes config, processors and weights in a format of the Hub; in a new folder a cut leaves no model.

        Args:
            folder: to write to; it is made.
            format_name: one of ``formats``.
            dtype: of the floating-point tensors in the file.
            shard_bytes: a larger model is split into files of at most this size, with an index.

        Raises:
            UnsupportedError: the model has adapters, which the format has no names for.
        """
        if any(".lora_" in name for name, _ in self.named_parameters()):
            raise UnsupportedError("this model has LoRA adapters: merge_lora(model) first, or save_peft(model, folder)")
        folder = Path(folder)
        fmt = self.formats[format_name]
        state = self.state_dict()
        rules = fmt.rules(self.config)

        def stream() -> Iterator[tuple[str, Tensor]]:
            for step in unplan(rules, state):
                tensors = [state[n].detach().cpu() for n in step.ours]
                for name, tensor in zip(step.theirs, step.op.to_theirs(tensors), strict=True):
                    yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor

        raw = fmt.write(self.config)
        if self.images is not None and fmt.write_images is not None:
            raw |= fmt.write_images(self.images)
        elif self.images is not None:
            write_json(folder / PREPROCESSOR, self.images.to_hf())
        self.save_processors(folder)
        fmt.store(folder, raw, stream(), shard_bytes=shard_bytes)
        return folder

    def to_hub(self, tensors: Mapping[str, Tensor], format_name: str = "hf") -> dict[str, Tensor]:
        """Tensors by our names (weights or their gradients) under the names and layouts of a format."""
        return to_theirs(self.formats[format_name].rules(self.config), tensors)

    def hub_layers(self, format_name: str = "hf") -> dict[str, str]:
        """Our names of the layers that a format holds unchanged, or as 1x1 convolutions -> their names there (for LoRA
        adapters)."""
        return {ours: theirs for ours, theirs, _ in self._hub_layers(format_name)}

    def hub_convolutions(self, format_name: str = "hf") -> frozenset[str]:
        """Our names of those among `hub_layers` that the format holds as 1x1 convolutions."""
        return frozenset(ours for ours, _, op in self._hub_layers(format_name) if op == Squeeze((2, 3)))

    def _hub_layers(self, format_name: str) -> Iterator[tuple[str, str, Copy | Squeeze]]:
        end = ".weight"
        for step in unplan(self.formats[format_name].rules(self.config), self.state_dict()):
            if isinstance(step.op, Copy | Squeeze) and step.ours[0].endswith(end):
                yield step.ours[0].removesuffix(end), step.theirs[0].removesuffix(end), step.op

    # -- identity

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(p.dtype for p in self.parameters() if p.ndim > 1)

    @property
    def fingerprint(self) -> str:
        """Hash of the weights, the config and the pre-processing."""
        if self._fingerprint is None or self.training:
            digest = hashlib.sha256(repr((type(self).__name__, asdict(self.config), self.images)).encode())
            if self.tokenizer is not None:
                digest.update(self.tokenizer.fingerprint.encode())
            for name, tensor in sorted(self.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().to(torch.bfloat16).flatten().view(torch.uint8).numpy().tobytes())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def train(self, mode: bool = True) -> System:
        if mode:
            self._fingerprint = None  # the weights are about to change
        return super().train(mode)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A block in evaluation mode; behind it the mode is what it was before."""
        if not self.training:
            yield
            return
        self.eval()
        try:
            yield
        finally:
            self.train()


class Embedder(System):
    """Base of the systems that give one vector a sample: the `Embeds` protocol."""

    suffixes: ClassVar[frozenset[str]] = IMAGE_SUFFIXES

    @property
    def embedding_dim(self) -> int:
        raise UnsupportedError(f"{type(self).__name__} gives no vectors")

    def prepare_images(self, items: Sequence[Sample]) -> Batch:
        if not isinstance(self.images, ImageProcessor):
            raise UnsupportedError(
                f"{type(self).__name__} ({self.source}) has no image processor: its folder has no {PREPROCESSOR}"
            )
        return Batch(pixels=self.images([s.images[0] for s in items]))

    def prepare_audio(self, items: Sequence[Sample]) -> Batch:
        raise UnsupportedError(f"{type(self).__name__} ({self.source}) hears no sound; take a CLAP")

    def prepare_texts(self, items: Sequence[Sample]) -> Batch:
        if self.tokenizer is None:
            raise UnsupportedError(
                f"{type(self).__name__} ({self.source}) reads no text: it has no text tower, or no tokenizer.json was "
                "beside its weights (set model.tokenizer)"
            )
        ids, _ = self.tokenizer([s.texts[0].text for s in items])
        return Batch(ids=ids)

    def prepare(self, items: Sequence[Sample]) -> Batch:
        """Decodes and pre-processes samples that are all one picture, all one sound, or all one text, each.

        Raises:
            MediaError: a sample is mixed, holds several parts, or cannot be decoded.
        """
        for item in items:
            if len(item.parts) != 1:
                raise MediaError(
                    f"{type(self).__name__} gives one vector to one picture, sound or text; this sample has "
                    f"{len(item.parts)} parts"
                )
        kinds = {type(item.parts[0]) for item in items}
        assert len(kinds) == 1, "prepare takes samples of one kind"
        if items[0].videos:
            raise UnsupportedError(f"{type(self).__name__} reads no clips: embed their frames (modalities.video.read)")
        if items[0].audios:
            return self.prepare_audio(items)
        return self.prepare_images(items) if items[0].images else self.prepare_texts(items)

    def encode(self, batch: Batch) -> Float[Tensor, "samples dim"]:
        """Unit vectors in fp32, where the weights are, for what `prepare` made."""
        raise UnsupportedError(f"{type(self).__name__} gives no vectors")

    @torch.no_grad()
    def embed(
        self, items: Any, *, batch_size: int = 64, progress: Callable[[int], None] | None = None
    ) -> Float[Tensor, "samples dim"]:
        """One unit vector an item; media and texts may be mixed, order is kept. ``progress`` gets counts done."""
        todo = samples(items)
        out = torch.empty(len(todo), self.embedding_dim)
        kinds = [type(s.parts[0]) for s in todo]
        groups = [[i for i, kind in enumerate(kinds) if kind is each] for each in dict.fromkeys(kinds)]
        with self.evaluating():
            for group in groups:
                for start in range(0, len(group), batch_size):
                    rows = group[start : start + batch_size]
                    out[rows] = self.encode(self.prepare([todo[i] for i in rows])).cpu()
                    if progress is not None:
                        progress(len(rows))
        return out


class DualEncoder(Embedder):
    """Base of the systems that put pictures and texts into one space; a batch has the names of the encoders' inputs."""

    head: ContrastiveHead | SigmoidHead
    padding: ClassVar[Pad] = "longest"  # what texts are padded to: "max" where the text tower reads the last position

    encode_images: Callable[..., Tensor]  # unit vectors of pictures; takes what `prepare_images` makes
    encode_texts: Callable[..., Tensor]  # unit vectors of texts from their ids

    def load_processors(self, folder: Path) -> None:
        """Reads the tokenizer, where the folder has one; texts are cut at the context of the text tower."""
        if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
            length = self.config.text.context
            self.tokenizer = TextTokenizer.from_folder(folder, length=length, pad=self.padding)

    def encode(self, batch: Batch) -> Float[Tensor, "samples dim"]:
        batch = batch.to(self.device)
        return self.encode_texts(**batch) if "ids" in batch else self.encode_images(**batch)

    def _both(self, batch: Batch) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
        pictures = {name: tensor for name, tensor in batch.items() if name != "ids"}
        return self.encode_images(**pictures), self.encode_texts(batch["ids"])

    def logits(
        self, images: Float[Tensor, "images dim"], texts: Float[Tensor, "texts dim"]
    ) -> Float[Tensor, "images texts"]:
        """Scores of unit vectors, as the head defines them."""
        return self.head.logits(images.to(self.device), texts.to(self.device)).to(images.device)

    def forward(self, batch: Batch) -> Float[Tensor, "images texts"]:
        return self.head.logits(*self._both(batch))

    def loss(self, batch: Batch) -> Loss:
        return self.head.loss(*self._both(batch))
