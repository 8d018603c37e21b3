"""What Prismatic and the policies on its trunk share: towers side by side, an MLP, a decoder. Not a system itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from PIL import Image as PILImage
from torch import Tensor, nn

from polymodal.backbones.decoder import Decoder, DecoderConfig
from polymodal.backbones.families import FAMILIES, ControlIds
from polymodal.connectors.mlp import MLP, WideMLP
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.files import read_json
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.timm import TOWERS, PatchTower, activations, timm_rules
from polymodal.encoders.vit import ViTConfig
from polymodal.modalities.image import declared_processor
from polymodal.modalities.stacked import FITS, Fit, StackedProcessor
from polymodal.systems.acting import Policy, parse_statistics
from polymodal.systems.base import System
from polymodal.systems.generator import Generator
from polymodal.systems.tower import colours
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.weights.fields import IMAGE_FIELDS, TRANSFORMER_FIELDS, Fields, read_fields, write_fields
from polymodal.weights.format import Format
from polymodal.weights.rules import Rule, renames

_DINO = "vit_large_patch14_reg4_dinov2.lvd142m"
_SIGLIP, _CLIP = "vit_so400m_patch14_siglip_", "vit_large_patch14_clip_"
# What the files call one tower or a pair -> timm's names, and the size of pictures.
BACKBONES: Final[Mapping[str, tuple[tuple[str, ...], int]]] = {
    "dinosiglip-vit-so-224px": ((_DINO, f"{_SIGLIP}224"), 224),
    "dinosiglip-vit-so-384px": ((_DINO, f"{_SIGLIP}384"), 384),
    "dinoclip-vit-l-336px": ((_DINO, f"{_CLIP}336.openai"), 336),
    "siglip-vit-so400m": ((f"{_SIGLIP}224",), 224), "siglip-vit-so400m-384px": ((f"{_SIGLIP}384",), 384),
    "clip-vit-l": ((f"{_CLIP}224.openai",), 224), "clip-vit-l-336px": ((f"{_CLIP}336.openai",), 336),
    "dinov2-vit-l": ((_DINO,), 224), "in1k-vit-l": (("vit_large_patch16_224.augreg_in21k_ft_in1k",), 224),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a language model is asked: what stands before the first question, before each, and behind each."""

    system: str
    before: str
    after: str


_VICUNA = Style(
    system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. ",
    before="USER: ", after=" ASSISTANT:",
)  # fmt: skip
_PURE = Style(system="", before="In: ", after="\nOut:")
# What the files call a language model -> transformers' name of it, and its prompts.
LANGUAGE_MODELS: Final[Mapping[str, tuple[str, Style]]] = {
    "vicuna-v15-7b": ("lmsys/vicuna-7b-v1.5", _VICUNA), "vicuna-v15-13b": ("lmsys/vicuna-13b-v1.5", _VICUNA),
    "llama2-7b-pure": ("meta-llama/Llama-2-7b-hf", _PURE), "llama2-13b-pure": ("meta-llama/Llama-2-13b-hf", _PURE),
    "mistral-v0.1-7b-pure": ("mistralai/Mistral-7B-v0.1", _PURE),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FusedConfig:
    """One tower or two, a language model, and how pictures are made square.

    Attributes:
        vision_id: what the files call the towers, one of `BACKBONES`; ``towers`` are their sizes.
        language_id: what they call the language model, one of `LANGUAGE_MODELS`: it says how it is asked.
        family: the `model_type` of the language model.
    """

    vision_id: str
    towers: tuple[ViTConfig, ...]
    language_id: str
    family: str
    backbone: DecoderConfig
    fit: Fit = "letterbox"
    control: ControlIds = field(default_factory=ControlIds)

    def __post_init__(self) -> None:
        if len({(tower.grid, tower.image_size) for tower in self.towers}) != 1:
            raise ConfigError(f"towers side by side have as many patches of pictures of one size: {self.towers}")
        if len(self.towers) != len(BACKBONES[self.vision_id][0]) or self.language_id not in LANGUAGE_MODELS:
            raise ConfigError(f"{self.vision_id} and {self.language_id} are not what these towers are called")

    @property
    def connector(self) -> MLP | WideMLP:
        return MLP() if len(self.towers) == 1 else WideMLP()

    @property
    def num_features(self) -> int:
        """Vectors that a picture becomes."""
        return self.towers[0].grid ** 2

    @property
    def image_id(self) -> int:
        """Stands for a patch in prompts; it is behind the vocabulary, since theirs have no placeholder."""
        return self.backbone.vocab_size


class FusedSystem(System):
    """Base of the systems of `FusedConfig`'s parts, built and initialised."""

    config: FusedConfig
    backbone: Decoder

    def __init__(self, config: FusedConfig) -> None:
        super().__init__(config)
        c = config
        self.vision = nn.ModuleList(PatchTower(tower) for tower in c.towers)
        self.connector = c.connector.build(sum(tower.dim for tower in c.towers), c.backbone.dim)
        self.backbone = Decoder(c.backbone)

    @torch.no_grad()
    def init_weights(self) -> None:
        for tower in self.vision:
            assert isinstance(tower, PatchTower)
            tower.init_weights()
        for layer in self.connector.layers:
            layer.reset_parameters()  # type: ignore[operator]
        self.backbone.init_weights()

    def project(self, pixels: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images patches dim"]:
        """The patches of pictures (three channels for each tower), as the backbone reads them."""
        parts = zip(self.vision, pixels.split(3, 1), strict=True)
        return self.connector(torch.cat([tower(part) for tower, part in parts], -1))

    def default_images(self) -> StackedProcessor:
        """With the colours that each tower was trained with."""
        means, stds = zip(*map(colours, self.config.towers), strict=True)
        return StackedProcessor(size=self.config.towers[0].image_size, fit=self.config.fit, means=means, stds=stds)

    def load_images(self, folder: Path, fmt: Format) -> StackedProcessor:
        declared = declared_processor(folder)
        built = self.default_images()
        images = built if declared is None else StackedProcessor.from_hf(declared)
        if (images.size, len(images.means)) != (built.size, len(built.means)):
            raise ConfigError(f"{folder}: preprocessor_config.json and config.json name different towers")
        return images


class FusedGenerator(FusedSystem, Generator):
    """Base of those that write text: each picture is so many tokens of the prompt."""

    has_template = False

    def __init__(self, config: FusedConfig) -> None:
        super().__init__(config)
        self.media_id, self.stop_ids = config.image_id, config.control.stop

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c, n, side = self.config, self.config.num_features, self.config.towers[0].image_size
        text = TensorSpec(shape=(n + 6,), dtype=torch.int64, low=3, high=self.vocab_size)
        return {
            "ids": replace(text, head=(c.control.start or 0, *[c.image_id] * n)),
            "labels": text,
            "pixels": TensorSpec(shape=(3 * len(c.towers), side, side)),
            "pixels_row": TensorSpec(shape=(), dtype=torch.int64, rows=True),
        }

    def features(self, batch: Batch) -> Float[Tensor, "features dim"]:
        return self.project(batch["pixels"]).flatten(0, 1)

    def see(self, pictures: Sequence[PILImage.Image]) -> tuple[list[list[int]], Batch]:
        return self.see_whole(pictures, self.config.num_features)

    def write_prompt(self, chat: Chat) -> list[int]:
        """``start patches question answer end question ...``, each turn tokenized by itself, as in training."""
        if self.tokenizer is None:
            raise UnsupportedError(f"{self.source} has no tokenizer.json (see use_tokenizer)")
        turns, style = list(chat.turns), LANGUAGE_MODELS[self.config.language_id][1]
        system = style.system
        if turns[0].role == "system":
            if not system:
                raise MediaError(f"{self.config.language_id} was trained without a system's turn")
            system = turns.pop(0).text.strip() + " "
        if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2):
            raise MediaError("chats of Prismatic models are turns of the user and the assistant, one after the other")
        if len(chat.images) > 1 or chat.tools:
            raise MediaError("Prismatic models read one picture a chat, which comes first; and they call no tools")
        start = [] if self.config.control.start is None else [self.config.control.start]
        ids = start + [self.config.image_id] * len(chat.images)
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                ids += self.write_answer(Chat((turn,)))
            else:
                asked = f"{style.before}{turn.text.strip()}{style.after}"
                ids += self.tokenizer.encode(asked if number else system + asked, special=False)
        return ids


_SIZES: Final = (*TRANSFORMER_FIELDS, IMAGE_FIELDS[1])
_PREFIXES: Final = ("featurizer", "fused_featurizer")


def read_parts(f: Fields) -> dict[str, Any]:
    """The fields of a trunk, which OpenVLA's configs have, too."""
    vision_id = f.choose("vision_backbone_id", {n: n for n in BACKBONES})
    language_id = f.choose("llm_backbone_id", {n: n for n in LANGUAGE_MODELS})
    (names, size), fused = BACKBONES[vision_id], len(BACKBONES[vision_id][0]) > 1
    sizes = f.numbers("image_sizes", int) if f.has("image_sizes") else (size,) * len(names)
    f.require("timm_model_ids", list(names))
    f.require("timm_override_act_layers", activations(names))
    f.require("use_fused_vision_backbone", fused)
    f.require("hf_llm_id", LANGUAGE_MODELS[language_id][0])
    mlp = f"{'fused-' if fused else ''}gelu-mlp"
    f.choose("arch_specifier", dict.fromkeys((mlp, f"no-align+{mlp}")), mlp)  # aligned first, or not
    reason = "how training texts were cut, how the vocabulary was rounded, what a call gives back"
    f.ignore(reason, "llm_max_length", "pad_to_multiple_of", "output_projector_states")
    if len(sizes) != len(names):
        f.problems.append(f"config.json: image_sizes {sizes} are not one for each of {', '.join(names)}")
    towers: list[ViTConfig] = []
    for prefix, name, side in zip(_PREFIXES, names, (*sizes, size, size), strict=False):
        known = tuple((theirs, ours, getattr(TOWERS[name], ours)) for theirs, ours, _ in _SIZES)
        own = read_fields(f.child("vision_config").child(f"{prefix}_config"), known)
        towers.append(replace(TOWERS[name], image_size=max(side, own["patch_size"]), **own))
    t = f.child("text_config")
    family = FAMILIES[t.choose("model_type", {n: n for n in ("llama", "mistral")}, "llama")]
    return {
        "vision_id": vision_id, "towers": tuple(towers), "language_id": language_id, "family": family.model_type,
        "backbone": family.read(t), "control": ControlIds.read(t, family.control),
        "fit": f.choose("image_resize_strategy", {fit: fit for fit in FITS}, "letterbox"),
    }  # fmt: skip


def write_parts(c: FusedConfig) -> dict[str, Any]:
    """The fields of `read_parts`."""
    names, fused = BACKBONES[c.vision_id][0], len(c.towers) > 1
    own = [replace(TOWERS[name], image_size=t.image_size) != t for name, t in zip(names, c.towers, strict=True)]
    sizes = {f"{prefix}_config": write_fields(t, _SIZES) for prefix, t in zip(_PREFIXES, c.towers, strict=False)}
    return ({"vision_config": sizes} if any(own) else {}) | {
        "vision_backbone_id": c.vision_id, "timm_model_ids": list(names), "use_fused_vision_backbone": fused,
        "timm_override_act_layers": activations(names),
        "image_sizes": [tower.image_size for tower in c.towers], "image_resize_strategy": c.fit,
        "llm_backbone_id": c.language_id, "hf_llm_id": LANGUAGE_MODELS[c.language_id][0],
        "arch_specifier": f"no-align+{'fused-' if fused else ''}gelu-mlp", "pad_token_id": c.control.pad,
        "text_config": {"model_type": c.family, **FAMILIES[c.family].write(c.backbone), **c.control.write()},
    }  # fmt: skip


def rules_of_parts(c: FusedConfig) -> list[Rule]:
    """The names of towers, connector and decoder."""
    family = FAMILIES[c.family]
    return [
        *(r for number, name in enumerate(_PREFIXES[: len(c.towers)])
          for r in timm_rules(f"vision_backbone.{name}", f"vision.{number}", scale="scale_factor")),
        *renames("projector", "connector.layers", {"fc1": "0", "fc2": "1", "fc3": "2"}),
        *family.rules(c.backbone, f"language_model.{family.base}", "language_model.lm_head", "backbone"),
    ]  # fmt: skip


# ---- what the policies on this trunk have in common


def task_ids(c: FusedConfig, tokenizer: LanguageTokenizer | None, instruction: str, empty_id: int | None) -> list[int]:
    """``start question``, as in training; behind Llama's, the empty token with which an answer's text goes on."""
    if tokenizer is None:
        raise UnsupportedError("a policy that is told what to do in words needs its tokenizer.json (use_tokenizer)")
    style = LANGUAGE_MODELS[c.language_id][1]
    asked = f"What action should the robot take to {instruction.lower()}?"
    ids = tokenizer.encode(f"{style.system}{style.before}{asked}{style.after}", special=False)
    start = [] if c.control.start is None else [c.control.start]
    return start + ids + ([] if empty_id is None or ids[-1] == empty_id else [empty_id])


def read_policy(f: Fields, cameras: tuple[str, ...]) -> dict[str, Any]:
    """What says how a robot is wired; published configs say nothing of it and hold statistics instead."""
    f.ignore("read where there is no dataset_statistics.json", "norm_stats")
    return {
        "action_dim": f.take("action_dim", int, 7),
        "cameras": f.numbers("cameras", str) if f.has("cameras") else cameras,
        "empty_id": f.optional("empty_id", int) if "empty_id" in f else 29871,
    }


def write_policy(c: Any) -> dict[str, Any]:
    """The fields of `read_policy`."""
    return {"action_dim": c.action_dim, "cameras": list(c.cameras), "empty_id": c.empty_id}


def declared_statistics(policy: Policy, folder: Path) -> None:
    """Takes the statistics of a published config, where no file beside it has newer ones."""
    declared = read_json(folder / "config.json").get("norm_stats")
    if declared and not policy.statistics:
        policy.use_statistics(parse_statistics(declared, str(folder / "config.json")))
