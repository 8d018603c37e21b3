"""What the systems share that write text with a decoder. Not a system itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image as PILImage
from torch import Tensor

from polymodal.backbones.decoder import Decoder, DecoderConfig
from polymodal.backbones.families import FAMILIES, ControlIds
from polymodal.connectors.mlp import MLP, Connector, init_connector
from polymodal.core.batch import Batch, Loss
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Image, Sample, Text, Video
from polymodal.core.tokens import Modality, Tokens
from polymodal.encoders.vision_families import VISION_FAMILIES
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.heads.lm import IGNORE, next_token_loss
from polymodal.modalities.image import decode
from polymodal.nn.cache import KVCache
from polymodal.nn.feature_cache import FeatureCache, content_key
from polymodal.systems.base import System
from polymodal.tokenizers.chat import ChatTemplate, Placeholder
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.weights.fields import ACTIVATIONS, Fields
from polymodal.weights.rules import Rule, rule


class Generator(System):
    """Base of the systems that write text with a `Decoder`: the `Generates` protocol, media included.

    A batch has ``ids``, ``valid`` where rows are padded at the end, ``labels`` for training, and what `see` makes of
    media. A subclass with media gives `see` and `features`; the places of pictures in the ids hold `media_id`, those of
    clips `clip_id`.
    """

    backbone: Decoder
    tokenizer: LanguageTokenizer | None = None  # type: ignore[assignment]
    template: ChatTemplate | None = None
    stop_ids: tuple[int, ...] = ()
    media_id: int | None = None
    clip_id: int | None = None  # of a system that reads clips
    has_template: ClassVar[bool] = True  # prompts are written by the checkpoint's chat template
    feature_cache: FeatureCache | None = None  # set it, and the same media go through their tower once

    @property
    def vocab_size(self) -> int:
        return self.backbone.config.vocab_size

    @property
    def context(self) -> int:
        """The longest prompt in tokens."""
        return self.backbone.config.context

    # -- what subclasses with media give

    def see(self, pictures: Sequence[PILImage.Image]) -> tuple[list[list[int]], Batch]:
        """For each picture the ids that stand for it in a prompt; and the tensors of all, ragged over ``rows``.

        The one count of tokens: `features` makes as many vectors as there are `places` among these ids. A system with a
        `clip_id` also takes `Video`s among the pictures; their frames, which may not fit in memory, it decodes itself.
        """
        raise UnsupportedError(f"{type(self).__name__} reads no pictures")

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
        return [i for i in (self.media_id, self.clip_id) if i is not None]

    def read(self, batch: Batch) -> Tokens:
        """The tokens of a batch, embedded, with the features of media in their places."""
        ids = batch["ids"]
        places = self.places(ids)
        # The table may have no row for the placeholder: what stands there is replaced.
        tokens = self.layout(batch, self.backbone.embed(ids.masked_fill(places, 0)))
        if not any(name.endswith("_row") for name in batch):
            assert not bool(places.any()), "places for media, and no media in the batch"
            return tokens
        return tokens.scatter(places, self._known_features(batch))

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

    def loss(self, batch: Batch) -> Loss:
        """Of the next token: of ``labels``, `IGNORE` where nothing is learned."""
        return next_token_loss(self.backbone(self.read(batch)).x, batch["labels"], self.backbone.logits)

    # -- prompts

    def write_prompt(self, chat: Chat) -> list[int]:
        """The ids of a chat up to where the assistant answers, `media_id` once for each medium."""
        if self.tokenizer is None or self.template is None:
            lacks = "tokenizer" if self.tokenizer is None else "chat template"
            raise UnsupportedError(
                f"{type(self).__name__} ({self.source}) has no {lacks}: its folder lacks tokenizer.json, or "
                "chat_template.jinja (set model.tokenizer and model.template)"
            )
        return self.template.tokenize(chat, self.tokenizer)

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
        end = self.stop_ids[0]
        if self.template is not None:
            written = self.template.tokenize(chat, self.tokenizer, add_generation_prompt=False)
            end = next((i for i in reversed(written) if i in self.stop_ids), end)
        return [*self.tokenizer.encode(chat.turns[-1].text, special=False), end]

    def _assemble(
        self, chats: Sequence[Chat], rows: Sequence[list[int]], marks: Sequence[list[bool]] | None = None
    ) -> Batch:
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
            mark: list[bool] = []
            for place, i in enumerate(prompt):
                new = next(queue) if i in self._media_ids else [i]
                row += new
                mark += [marks is not None and marks[number][place]] * len(new)
            if len(row) > self.context:
                raise MediaError(
                    f"a prompt of {len(row)} tokens; {type(self).__name__} reads at most {self.context}: fewer or "
                    "smaller pictures, or a shorter text"
                )
            wide.append(row)
            learned.append(mark)
            owners += [number] * len(mine)
        longest = max(map(len, wide))
        ids = torch.zeros(len(wide), longest, dtype=torch.int64)
        valid = torch.zeros(len(wide), longest, dtype=torch.bool)
        labels = torch.full((len(wide), longest), IGNORE)
        for number, (row, mark) in enumerate(zip(wide, learned, strict=True)):
            ids[number, : len(row)] = torch.tensor(row)
            valid[number, : len(row)] = True
            labels[number, : len(row)][torch.tensor(mark)] = ids[number, : len(row)][torch.tensor(mark)]
        out = Batch(ids=ids, valid=valid) | ({"labels": labels} if marks is not None else {})
        for name, tensor in media.items():
            # Entries are numbered by picture; a batch numbers them by row.
            out[name] = torch.tensor(owners)[tensor] if name.endswith("_row") else tensor
        return Batch(out)

    def count(self, sample: Sample) -> int:
        """Tokens that the parts of a sample become, without what a chat template adds."""
        if self.tokenizer is None and sample.texts:
            raise UnsupportedError(f"{type(self).__name__} ({self.source}) has no tokenizer to count texts with")
        texts = sum(len(self.tokenizer.encode(t.text, special=False)) for t in sample.texts) if self.tokenizer else 0
        return texts + sum(map(len, self._see([part for part in sample.parts if not isinstance(part, Text)])[0]))

    def picture(self, image: Image) -> PILImage.Image:
        """A picture, decoded as the system's image processor wants what is transparent to be treated."""
        return decode(image, alpha=getattr(self.images, "alpha", "white"))

    def _see(self, parts: Sequence[Image | Video]) -> tuple[list[list[int]], Batch]:
        for part in parts:
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
        if self.media_id is None:
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


# -------------------- a tower, a connector and a decoder: the LLaVA family


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """A tower, a connector and a decoder.

    Attributes:
        vision_family: the `model_type` under whose names the Hub keeps the tower.
        layers: how many of the tower's layers are read.
        keep_class: whether the class token is a feature, too.
        family: the `model_type` of the language model.
        image_id: the token in whose place a feature is put.
    """

    vision_family: str
    vision: ViTConfig
    layers: int
    connector: Connector
    family: str
    backbone: DecoderConfig
    image_id: int
    control: ControlIds = field(default_factory=ControlIds)
    keep_class: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.layers <= self.vision.num_layers:
            raise ConfigError(f"features of layer {self.layers} of a tower of {self.vision.num_layers}")
        if not 0 <= self.image_id < self.backbone.vocab_size:
            raise ConfigError(f"the placeholder {self.image_id} is not in a vocabulary of {self.backbone.vocab_size}")

    @property
    def num_features(self) -> int:
        """Vectors that a picture becomes."""
        prefix = 0 if self.keep_class else self.vision.num_prefix
        side = self.vision.image_size
        return self.connector.count(self.vision.count(side, side) - prefix)


class TowerGenerator(Generator):
    """Base of the LLaVA family: `TowerConfig`'s parts, built and initialised."""

    config: TowerConfig

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        c = config
        self.vision = ViT(c.vision)
        self.connector = c.connector.build(c.vision.dim, c.backbone.dim)
        self.backbone = Decoder(c.backbone)
        self.media_id, self.stop_ids = c.image_id, c.control.stop
        # Nothing reads them; they are kept for the file's sake.
        self.vision.blocks[c.layers :].requires_grad_(False)
        self.vision.norm.requires_grad_(False)

    @torch.no_grad()
    def init_weights(self) -> None:
        VISION_FAMILIES[self.config.vision_family].init(self.vision)
        init_connector(self.connector)
        self.backbone.init_weights()

    def write_prompt(self, chat: Chat) -> list[int]:
        """As the Hub's processors of this family do: the token that begins every text comes first."""
        ids = super().write_prompt(chat)
        assert self.tokenizer is not None
        start = list(self.tokenizer.prefix)
        return ids if ids[: len(start)] == start else start + ids

    def project(self, pixels: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images tokens dim"]:
        """The features of pictures or tiles, as the backbone reads them."""
        x = self.vision(pixels, layers=self.config.layers).x
        return self.connector(x if self.config.keep_class else x[:, self.config.vision.num_prefix :])


def read_parts(f: Fields) -> dict[str, Any]:
    """What LLaVA and LLaVA-NeXT have in common, from the fields of their configs."""
    v, t = f.child("vision_config"), f.child("text_config")
    tower = VISION_FAMILIES[v.choose("model_type", {n: n for n in VISION_FAMILIES}, "clip_vision_model")]
    family = FAMILIES[t.choose("model_type", {n: n for n in FAMILIES}, "llama")]
    vision, backbone = tower.read(v), family.read(t)
    layer = f.take("vision_feature_layer", int, -2, least=-vision.num_layers - 1)
    select = f.choose("vision_feature_select_strategy", {"default": False, "full": True}, "default")
    if not (select or vision.class_token):
        f.problems.append("vision_feature_select_strategy default drops a patch of a tower without class token")
    f.ignore("it follows from the tower and the connector", "image_seq_length")
    f.ignore("the placeholder has a row in the text's vocabulary", "ignore_index", "vocab_size", "pad_token_id")
    connector = MLP(
        activation=f.choose("projector_hidden_act", ACTIVATIONS, "gelu"),
        bias=f.take("multimodal_projector_bias", bool, True),
    )
    image_id = f.take("image_token_id" if "image_token_id" in f else "image_token_index", int, 32000)
    return {
        "vision_family": tower.model_type, "vision": vision, "connector": connector, "family": family.model_type,
        "backbone": backbone, "image_id": image_id, "control": ControlIds.read(t, family.control),
        "keep_class": select and vision.class_token,
        "layers": layer if layer >= 0 else vision.num_layers + 1 + layer,
    }  # fmt: skip


def write_parts(c: Any) -> dict[str, Any]:
    """The fields of `read_parts`."""
    if not isinstance(c.connector, MLP) or c.connector.layers != 2:
        raise UnsupportedError("the Hub's format of LLaVA has a connector of two linear layers only")
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    text = {"model_type": c.family, **FAMILIES[c.family].write(c.backbone), **c.control.write()}
    return {
        "vision_config": VISION_FAMILIES[c.vision_family].write(c.vision), "text_config": text,
        "vision_feature_layer": c.layers - c.vision.num_layers - 1,
        "vision_feature_select_strategy": "default" if c.vision.class_token and not c.keep_class else "full",
        "projector_hidden_act": names[c.connector.activation], "multimodal_projector_bias": c.connector.bias,
        "image_token_index": c.image_id, "image_seq_length": c.num_features,
        "tie_word_embeddings": c.backbone.tied,
    }  # fmt: skip


def rules_of_parts(c: TowerConfig) -> list[Rule]:
    """The names of tower, connector and decoder."""
    family = FAMILIES[c.family]
    return [
        *VISION_FAMILIES[c.vision_family].rules("vision_tower", "vision"),
        *(rule(f"multi_modal_projector.linear_{n + 1}.{{p}}", f"connector.layers.{n}.{{p}}") for n in range(2)),
        *family.rules(c.backbone, f"language_model.{family.base}", "language_model.lm_head", "backbone"),
    ]
