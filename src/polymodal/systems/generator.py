"""What the systems share that write text with a decoder. Not a system itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image as PILImage
from torch import Tensor

from polymodal.backbones.decoder import Decoder
from polymodal.core.batch import Batch, Loss, padded, text_batch
from polymodal.core.chat import Chat
from polymodal.core.distributed import is_distributed
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Audio, Image, Sample, Text, Video
from polymodal.core.tokens import Modality, Tokens
from polymodal.heads.lm import IGNORE, next_token_log_probs, next_token_loss
from polymodal.modalities.image import ImageProcessor, decode_still
from polymodal.modalities.marks import Notation
from polymodal.modalities.stacked import StackedProcessor
from polymodal.nn.cache import KVCache
from polymodal.nn.feature_cache import FeatureCache, content_key
from polymodal.systems.base import System
from polymodal.tokenizers.chat import ChatTemplate, Placeholder
from polymodal.tokenizers.language import LanguageTokenizer


class Generator(System):
    """Base of the systems that write text with a `Decoder`: the `Generates` protocol, media included.

    A batch has ``ids``, ``valid`` where rows are padded at the end, ``labels`` for training, and what `see` makes of
    media. A subclass with media gives `see` and `features`; the places of pictures in the ids hold `media_id`, those of
    clips `clip_id`, those of sounds `sound_id`.
    """

    backbone: Decoder
    tokenizer: LanguageTokenizer | None = None  # type: ignore[assignment]
    template: ChatTemplate | None = None
    stop_ids: tuple[int, ...] = ()
    media_id: int | None = None
    clip_id: int | None = None  # of a system that reads clips
    sound_id: int | None = None  # of a system that hears
    has_template: bool = True  # prompts are written by the checkpoint's chat template
    notation: ClassVar[Notation | None] = None  # of boxes and points in its answers
    feature_cache: FeatureCache | None = None  # set it, and the same media go through their tower once

    @property
    def vocab_size(self) -> int:
        return self.backbone.config.vocab_size

    @property
    def context(self) -> int:
        """The longest prompt in tokens."""
        return self.backbone.config.context

    @property
    def fingerprint(self) -> str:
        """Hash of the weights, the config, the pre-processing, the chat template and the tokens that end an answer."""
        t = self.template
        written = (super().fingerprint, None if t is None else (t.source, t.with_tools), self.stop_ids)
        return hashlib.sha256(repr(written).encode()).hexdigest()[:16]

    def room(self, batch: Batch) -> list[int]:
        """The tokens that an answer to each prompt of a batch may have."""
        return [self.context - length for length in batch["valid"].sum(1).tolist()]

    # -- what subclasses with media give

    def see(self, pictures: Sequence[PILImage.Image]) -> tuple[list[list[int]], Batch]:
        """For each picture the ids that stand for it in a prompt; and the tensors of all, ragged over ``rows``.

        The one count of tokens: `features` makes as many vectors as there are `places` among these ids. A system with a
        `clip_id` also takes `Video`s among the pictures, one with a `sound_id` takes `Audio`s; what may not fit in
        memory it decodes itself.
        """
        raise UnsupportedError(f"{type(self).__name__} reads no pictures")

    def see_whole(self, pictures: Sequence[PILImage.Image], tokens: int) -> tuple[list[list[int]], Batch]:
        """`see` where each picture is read whole, in one size, and becomes so many tokens."""
        if not isinstance(self.images, ImageProcessor | StackedProcessor):
            raise UnsupportedError(f"{self.source} has no image processor")
        assert self.media_id is not None
        media = Batch(pixels=self.images.from_pil(pictures), pixels_row=torch.arange(len(pictures)))
        return [[self.media_id] * tokens for _ in pictures], media

    def features(self, batch: Batch) -> Float[Tensor, "features dim"]:
        """The vectors of all media of a batch, in order, as the backbone reads them."""
        raise UnsupportedError(f"{type(self).__name__} reads no media")

    def layout(self, batch: Batch, x: Float[Tensor, "batch tokens dim"]) -> Tokens:
        """Blocks and positions of the embedded tokens: causal text unless a system says otherwise."""
        return Tokens.of(x, causal=True, modality=Modality.TEXT, valid=batch.get("valid"))

    # -- reading

    def places(self, ids: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """Where the vectors of media go."""
        return torch.isin(ids, ids.new_tensor(self._media_ids))

    @property
    def _media_ids(self) -> list[int]:
        return [i for i in (self.media_id, self.clip_id, self.sound_id) if i is not None]

    def read(self, batch: Batch) -> Tokens:
        """The tokens of a batch, embedded, with the features of media in their places."""
        ids = batch["ids"]
        places = self.places(ids)
        # The table may have no row for the placeholder: what stands there is replaced.
        tokens = self.layout(batch, self.backbone.embed(ids.masked_fill(places, 0)))
        if not any(len(tensor) for name, tensor in batch.items() if name.endswith("_row")):
            assert not bool(places.any()), "places for media, and no media in the batch"
            return tokens.with_x(tokens.x + self.features(self.blank()).sum() * 0.0) if self.must_see else tokens
        return tokens.scatter(places, self._known_features(batch))

    @property
    def must_see(self) -> bool:
        """Whether the tower has to run for a batch without media, too.

        Where several processes train together, each has to give every parameter a gradient (DDP) and to gather every
        block (FSDP), whatever is in its rows.
        """
        return self.training and torch.is_grad_enabled() and bool(self._media_ids) and is_distributed()

    def blank(self) -> Batch:
        """The tensors of one black picture, which belongs to the first row."""
        return self.see([PILImage.new("RGB", (32, 32))])[1].to(self.device)

    def _known_features(self, batch: Batch) -> Tensor:
        """`features`, or what was computed for the same media before."""
        if self.feature_cache is None or torch.is_grad_enabled():
            return self.features(batch)
        names = sorted(name for name in batch if f"{name}_row" in batch)
        key = "".join(content_key(batch[name], name) for name in names)
        return self.feature_cache.get(key, lambda: self.features(batch))

    def train(self, mode: bool = True) -> Generator:
        if mode and self.feature_cache is not None:
            self.feature_cache.clear()  # the weights are about to change
        super().train(mode)
        return self

    def forward(self, batch: Batch) -> Float[Tensor, "batch tokens vocab"]:
        return self.backbone.logits(self.backbone(self.read(batch)).x)

    def supervised(self, batch: Batch) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Vectors after the last norm, a label for each, and the output layer: `loss` and `log_probs` read them."""
        return self.backbone(self.read(batch)).x, batch["labels"], self.backbone.logits

    def loss(self, batch: Batch) -> Loss:
        """Of the next token: of ``labels``, `IGNORE` where nothing is learned, weighted by the rows' ``weights``."""
        return next_token_loss(*self.supervised(batch), batch.get("weights"))

    def log_probs(self, batch: Batch) -> Float[Tensor, "batch tokens"]:
        """Of each label given what stands before it, in fp32; 0 where nothing is learned."""
        return next_token_log_probs(*self.supervised(batch))

    # -- prompts

    def write_prompt(self, chat: Chat) -> list[int]:
        """The ids of a chat up to where the assistant answers, `media_id` once for each medium."""
        if self.tokenizer is None or self.template is None:
            lacks = "tokenizer" if self.tokenizer is None else "chat template"
            raise UnsupportedError(
                f"{type(self).__name__} ({self.source}) has no {lacks}: its folder lacks tokenizer.json, or "
                "chat_template.jinja (set model.tokenizer and model.template)"
            )
        return self._by_template(chat)

    def _by_template(self, chat: Chat, *, add_generation_prompt: bool = True) -> list[int]:
        """What the chat template writes; a `MediaError` if it leaves out the tools, or calls of them."""
        assert self.template is not None
        assert self.tokenizer is not None
        others = [replace(chat, tools=())] if chat.tools else []
        if any(turn.calls for turn in chat.turns):
            named = [tuple(replace(call, name=f"{call.name}_") for call in turn.calls) for turn in chat.turns]
            turns = tuple(replace(turn, calls=calls) for turn, calls in zip(chat.turns, named, strict=True))
            others.append(replace(chat, turns=turns))
        ids, *rest = (
            self.template.tokenize(each, self.tokenizer, add_generation_prompt=add_generation_prompt)
            for each in (chat, *others)
        )
        if ids in rest:
            raise MediaError(f"the chat template of {self.source} has no place for tools, or for calls of them")
        return ids

    def prompt(self, chats: Sequence[Chat]) -> Batch:
        """Prompts padded at the end, with the tensors of their pictures.

        Raises:
            MediaError: a picture cannot be decoded, or a prompt is longer than the context: nothing is cut.
        """
        if not chats:
            raise MediaError("there is no chat to make a prompt of")
        return self._assemble(chats, [self.write_prompt(chat) for chat in chats])

    def lesson(self, chats: Sequence[Chat]) -> Batch:
        """Chats to learn from: what the assistant says is labelled, its end token too, and nothing else.

        Raises:
            MediaError: as `prompt`, or the assistant does not speak last, or speaks first.
            ConfigError: the chat template writes earlier turns differently once there are later ones.
        """
        rows, labels = [], []
        for number, chat in enumerate(chats):
            if chat.turns[-1].role != "assistant" or chat.turns[0].role == "assistant":
                raise MediaError(f"chat {number} is no lesson: a user speaks first and the assistant last")
            ids: list[int] = []
            marks: list[bool] = []
            for i, turn in enumerate(chat.turns):
                if turn.role != "assistant":
                    continue
                before = self.write_prompt(replace(chat, turns=chat.turns[:i]))
                after = before + self.write_answer(replace(chat, turns=chat.turns[: i + 1]))
                if after[: len(ids)] != ids:
                    raise ConfigError("a chat template that rewrites earlier turns cannot be trained on")
                marks += [False] * (len(before) - len(ids)) + [True] * (len(after) - len(before))
                ids = after
            rows.append(ids)
            labels.append(marks)
        return self._assemble(chats, rows, labels)

    def write_answer(self, chat: Chat) -> list[int]:
        """The ids of what the assistant said last, and of the token that ends it, as the chat template writes it."""
        assert self.tokenizer is not None
        if not self.stop_ids:
            raise ConfigError(f"{self.source} names no token that ends an answer")
        end, said = self.stop_ids[0], self.tokenizer.encode(chat.turns[-1].text, special=False)
        if self.template is not None:
            written = self._by_template(chat, add_generation_prompt=False)
            end = next((i for i in reversed(written) if i in self.stop_ids), end)
            if chat.turns[-1].calls:
                asked = self._by_template(replace(chat, turns=chat.turns[:-1]))
                if written[: len(asked)] != asked:
                    raise ConfigError("the chat template does not write calls of tools behind its prompt")
                said = written[len(asked) :]
                said = said[: len(said) - 1 - said[::-1].index(end)] if end in said else said
        return [*said, end]

    def _assemble(
        self, chats: Sequence[Chat], rows: Sequence[list[int]], marks: Sequence[list[bool]] | None = None
    ) -> Batch:
        if self.template is None and any(chat.tools or any(turn.calls for turn in chat.turns) for chat in chats):
            raise MediaError(f"{type(self).__name__} ({self.source}) knows no tools, and no calls of them")
        parts = [[part for turn in chat.turns for part in turn.parts if not isinstance(part, Text)] for chat in chats]
        spelled, media = self._see([part for row in parts for part in row])
        queue = iter(spelled)
        wide, owners, learned = [], [], []
        for number, (mine, prompt) in enumerate(zip(parts, rows, strict=True)):
            places = sum(i in self._media_ids for i in prompt)
            if places != len(mine):
                raise MediaError(
                    f"{len(mine)} pictures and clips, and {places} places for them in the prompt: the chat template "
                    "does not write one for each"
                )
            row: list[int] = []
            label: list[int] = []
            for place, i in enumerate(prompt):
                new = next(queue) if i in self._media_ids else [i]
                row += new
                label += new if marks is not None and marks[number][place] else [IGNORE] * len(new)
            if len(row) > self.context:
                raise MediaError(
                    f"a prompt of {len(row)} tokens; {type(self).__name__} reads at most {self.context}: fewer or "
                    "smaller pictures, or a shorter text"
                )
            wide.append(row)
            learned.append(label)
            owners += [number] * len(mine)
        out = text_batch(wide)
        if marks is not None:
            out["labels"] = padded(learned, fill=IGNORE)
        for name, tensor in media.items():
            # Entries are numbered by picture; a batch numbers them by row.
            out[name] = torch.tensor(owners)[tensor] if name.endswith("_row") else tensor
        return out

    def count(self, sample: Sample) -> int:
        """Tokens that the parts of a sample become, without what a chat template adds."""
        if self.tokenizer is None and sample.texts:
            raise UnsupportedError(f"{type(self).__name__} ({self.source}) has no tokenizer to count texts with")
        texts = sum(len(self.tokenizer.encode(t.text, special=False)) for t in sample.texts) if self.tokenizer else 0
        return texts + sum(map(len, self._see([part for part in sample.parts if not isinstance(part, Text)])[0]))

    def picture(self, image: Image) -> PILImage.Image:
        """A picture, decoded as the system's image processor wants what is transparent to be treated."""
        return decode_still(image, alpha="white" if self.images is None else self.images.alpha)

    def _see(self, parts: Sequence[Image | Video | Audio]) -> tuple[list[list[int]], Batch]:
        for part in parts:
            if isinstance(part, Audio) and self.sound_id is None:
                raise MediaError(f"{part.where}: {type(self).__name__} hears no sound")
            if isinstance(part, Video) and self.clip_id is None:
                raise MediaError(f"{part.where}: {type(self).__name__} reads no clips; give it some frames as pictures")
        media: list[Any] = [self.picture(part) if isinstance(part, Image) else part for part in parts]
        return self.see(media) if media else ([], Batch())

    def load_processors(self, folder: Path) -> None:
        """The tokenizer, the chat template and the tokens that end an answer, where the folder has them."""
        if not (folder / "tokenizer.json").is_file():
            return
        self.use_tokenizer(LanguageTokenizer.from_folder(folder))
        if self.has_template:
            self.template = ChatTemplate.find(folder, media=self._media())

    def use_tokenizer(self, tokenizer: LanguageTokenizer) -> None:
        """Takes a tokenizer, its chat template if it has one, and its end tokens."""
        self.tokenizer = tokenizer
        self.stop_ids = tuple(dict.fromkeys([*tokenizer.eos_ids, *self.stop_ids]))
        if self.has_template and tokenizer.config.get("chat_template"):
            self.template = ChatTemplate.of(tokenizer, media=self._media())

    def _media(self) -> dict[str, Placeholder]:
        if self.media_id is None:
            return {}
        assert self.tokenizer is not None
        token = self.tokenizer.backend.id_to_token(self.media_id)
        if token is None:
            raise ConfigError(f"{self.source}: the tokenizer has no token {self.media_id}, which stands for a picture")
        return {"image": Placeholder(token, after="\n")}

    def save_processors(self, folder: Path) -> None:
        super().save_processors(folder)
        if self.template is not None:
            self.template.save(folder)

    # -- generation

    def new_memory(self, rows: int, capacity: int) -> KVCache:
        return self.backbone.new_cache(rows, capacity)

    @torch.no_grad()
    def prefill(self, batch: Batch, memory: KVCache) -> Float[Tensor, "rows vocab"]:
        """Reads whole prompts; scores of the token after the last valid one of each row, in fp32."""
        tokens = self.read(batch.to(self.device))
        x = self.backbone(tokens, memory).x
        last = tokens.valid.sum(1) - 1
        return self.backbone.logits(x[torch.arange(len(x), device=x.device), last]).float()

    def plain_from(self, batch: Batch) -> int:
        """From which token on a lone prompt is plain causal text: behind its last medium."""
        if not self._media_ids:
            return 0
        places = self.places(batch["ids"][:1])[0].nonzero()
        return int(places[-1]) + 1 if len(places) else 0

    @torch.no_grad()
    def resume(self, ids: Int[Tensor, "rows tokens"], memory: KVCache) -> Float[Tensor, "rows vocab"]:
        """Reads more plain text behind what the rows hold; scores of the token after it, in fp32."""
        tokens = memory.after(self.backbone.text(ids.to(self.device)))
        return self.backbone.logits(self.backbone(tokens, memory).x[:, -1]).float()

    @torch.no_grad()
    def step(self, ids: Int[Tensor, " rows"], memory: KVCache) -> Float[Tensor, "rows vocab"]:
        """Reads one more token a row; scores of the next, in fp32."""
        x = self.backbone.embed(ids.to(self.device)[:, None])
        return self.backbone.logits(self.backbone(memory.next_tokens(x, Modality.TEXT), memory).x[:, 0]).float()
