"""Putting a vision-language model together: any tower, connector and language model that fit.

>>> import polymodal
>>> from polymodal.composition import stages
>>> model = polymodal.compose(vision="siglip", connector="pixel_shuffle", backbone="smollm2")
>>> [(stage.name, stage.rates) for stage in stages(model)]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

from tokenizers import AddedToken, Tokenizer
from torch import nn

from polymodal.api import load
from polymodal.backbones.decoder import Decoder, DecoderConfig
from polymodal.backbones.encdec import EncDec, EncDecConfig
from polymodal.backbones.families import ControlIds
from polymodal.connectors.gated import GatedConfig
from polymodal.connectors.grid import PixelShuffle, Pooling
from polymodal.connectors.mlp import MLP, Linear
from polymodal.connectors.qformer import QFormerConfig
from polymodal.connectors.resampler import ResamplerConfig
from polymodal.core.errors import ConfigError, did_you_mean
from polymodal.core.verbs import Generates
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.modalities.image import ImageProcessor
from polymodal.modalities.tiles import TileProcessor
from polymodal.systems.base import System
from polymodal.systems.composed import Composed, ComposedConfig, InPrompt
from polymodal.systems.composed_crossed import ComposedCrossed, ComposedCrossedConfig
from polymodal.systems.tower import TowerConfig
from polymodal.tokenizers.language import LanguageTokenizer

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Gated cross-attention between the layers of the language model, instead of tokens in its prompt.

    Attributes:
        gated: its blocks; eight heads of 64 and a feed-forward layer four times as wide as the text if None.
        resampler: None where text sees the tower's features themselves.
        every: there is one block for so many layers.
    """

    gated: GatedConfig | None = None
    resampler: ResamplerConfig | None = ResamplerConfig()  # noqa: RUF009  # frozen
    every: int = 1


CONNECTORS: Final[Mapping[str, InPrompt | Gates]] = {
    "linear": Linear(), "mlp": MLP(), "pixel_shuffle": PixelShuffle(), "pooling": Pooling(), "qformer": QFormerConfig(),
    "resampler": ResamplerConfig(), "gated": Gates(),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A training stage as the paper of a connector ran it.

    Attributes:
        data: what is learned from.
        rates: glob of parameters -> peak learning rate; what none matches is frozen.
        source: where the rates are from.
    """

    name: str
    data: str
    rates: Mapping[str, float]
    source: str

    @property
    def lr(self) -> float:
        """The largest rate: what a `train.Stage` takes."""
        return max(self.rates.values())

    @property
    def trainable(self) -> dict[str, float]:
        """The parts of it, as a `train.Stage` takes them."""
        return {parameters: rate / self.lr for parameters, rate in self.rates.items()}


_CAPTIONS, _CHATS = "pictures with captions", "instructions and conversations about pictures"
_LLAVA15, _INTERNVL = "LLaVA 1.5, arXiv 2310.03744", "InternVL 2.5, arXiv 2412.05271"
_QWEN = "Qwen-VL, arXiv 2308.12966"
_EVERYTHING = ("vision.*", "connector.*", "backbone.*")
_LLAVA = (
    Advice(name="align", data=_CAPTIONS, rates={"connector.*": 1e-3}, source=_LLAVA15),
    Advice(name="instruct", data=_CHATS, rates=dict.fromkeys(_EVERYTHING[1:], 2e-5), source=_LLAVA15),
)
_STAGES: Final[Mapping[type, tuple[Advice, ...]]] = {
    Linear: _LLAVA,
    MLP: _LLAVA,
    Pooling: _LLAVA,
    PixelShuffle: (
        Advice(name="align", data=_CAPTIONS, rates={"connector.*": 2e-4}, source=_INTERNVL),
        Advice(
            name="instruct", data=_CHATS, rates=dict.fromkeys(_EVERYTHING, 4e-5), source=_INTERNVL
        ),
    ),
    QFormerConfig: (
        Advice(
            name="align", data=f"{_CAPTIONS}; before it, the Q-Former alone with text: the system blip2_qformer",
            rates={"connector.*": 1e-4, "vision.norm.*": 1e-4}, source="BLIP-2, arXiv 2301.12597",
        ),
        Advice(name="instruct", data=_CHATS, rates={"connector.*": 1e-5}, source="InstructBLIP, arXiv 2305.06500"),
    ),
    ResamplerConfig: (
        Advice(
            name="align", data=_CAPTIONS, rates=dict.fromkeys(_EVERYTHING[:2], 2e-4), source=_QWEN
        ),
        Advice(
            name="tasks", data="questions, boxes and texts of pictures", rates=dict.fromkeys(_EVERYTHING, 5e-5),
            source=_QWEN,
        ),
        Advice(
            name="instruct", data=_CHATS, rates=dict.fromkeys(_EVERYTHING[1:], 1e-5), source=_QWEN
        ),
    ),
    Gates: (
        Advice(
            name="interleave", data="pages of pictures and text, and pictures with captions",
            rates={"resampler.*": 1e-4, "gated_blocks.*": 1e-4, "new_*": 1e-4}, source="OpenFlamingo, arXiv 2308.01390",
        ),
    ),
}  # fmt: skip
_PRETRAIN: Final = {
    "vision": Advice(
        name="pretrain vision", data="pictures and texts, contrasted: the systems clip and siglip",
        rates={"vision.*": 5e-4}, source="CLIP, arXiv 2103.00020",
    ),
    "backbone": Advice(
        name="pretrain backbone", data="text alone", rates={"backbone.*": 3e-4}, source="LLaMA, arXiv 2302.13971"
    ),
}  # fmt: skip


def stages(model: System) -> tuple[Advice, ...]:
    """The stages that a composition is trained by, in order: fresh parts first, then as the paper of its connector did.

    What was trained already is not known: a composition that was loaded has its connector's stages, too.

    Raises:
        ConfigError: the model is no composition.
    """
    if not isinstance(model, Composed | ComposedCrossed):
        raise ConfigError(f"{type(model).__name__} is no composition: its own file says how it is trained")
    kind = type(model.config.connector) if isinstance(model, Composed) else Gates
    out = [_PRETRAIN[part] for part in ("vision", "backbone") if part in model.untrained]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for advice in _STAGES[kind]:
        there = {p: rate for p, rate in advice.rates.items() if any(n.startswith(p.removesuffix("*")) for n in names)}
        out.append(replace(advice, rates=there))
    return tuple(out)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A part, its weights if it came with any, and where from."""

    config: Any
    source: str
    module: nn.Module | None = None
    system: System | None = None

    @property
    def trained(self) -> bool:
        """Whether it came with weights of a checkpoint."""
        return self.system is not None and self.source != System.source


def compose(
    *,
    vision: str | Path | System | ViTConfig,
    connector: str | Path | System | InPrompt | Gates = "mlp",
    backbone: str | Path | System | DecoderConfig | EncDecConfig,
    layers: int | None = None,
    keep_class: bool | None = None,
) -> Composed | ComposedCrossed:
    """A model of a tower, a connector and a language model, ready to be trained, asked and saved.

    A part that is named, or is of a system, comes with its weights; of a config its weights are fresh. `stages` says
    what has to be trained.

    Args:
        vision: whose tower.
        connector: one of `CONNECTORS`, a config, or whose connector; its weights are only of use between the parts that
            it was trained between.
        backbone: whose language model, with its tokenizer and chat template; it gets tokens for pictures and clips.
        layers: how many of the tower's layers are read. If None it is as a connector of the same tower reads it; as
            LLaVA has it for CLIP's tower (all but one) in front of a projection; and all with the last norm else.
        keep_class: whether the class token is a feature, too. If None it is as a connector of the same tower has it;
            else in front of a Q-Former alone.

    Raises:
        ConfigError: the parts do not fit; the message says why and what has to be trained again when one is changed.
    """
    tower, text, joint = _tower(vision), _language_model(backbone), _connector(connector)
    try:
        model = _build(tower, joint, text, layers, keep_class)
    except ConfigError as error:
        raise _refusal(str(error), joint.config) from None
    _fill(model, "vision", tower)
    _fill(model, "backbone", text)
    if isinstance(model, Composed) and joint.module is not None:
        _fill(model, "connector", joint)
    model.untrained = tuple(name for name, part in (("vision", tower), ("backbone", text)) if not part.trained)
    images = None if tower.system is None else tower.system.images
    if isinstance(images, TileProcessor):
        assert isinstance(model.images, ImageProcessor)
        model.images = replace(images.colour, resize=model.images.resize, crop=None)
    elif isinstance(images, ImageProcessor):
        model.images = images
    names = [f"{stage.name} ({', '.join(f'{p} at {r:g}' for p, r in stage.rates.items())})" for stage in stages(model)]
    model.source = f"composed of {tower.source}, {joint.source} and {text.source}; stages: {', then '.join(names)}"
    return model.eval()


def _build(
    tower: _Part, joint: _Part, text: _Part, layers: int | None, keep_class: bool | None
) -> Composed | ComposedCrossed:
    v, c = tower.config, joint.config
    tokenizer = text.system.tokenizer if text.system is not None else None
    image_id, video_id = text.config.vocab_size, text.config.vocab_size + 1
    if isinstance(tokenizer, LanguageTokenizer):
        tokenizer, image_id, video_id = _with_places(tokenizer)
    stop = text.system.stop_ids if isinstance(text.system, Generates) else ()
    common = {"vision": v, "backbone": text.config, "image_id": image_id, "control": ControlIds(stop=tuple(stop))}
    model: Composed | ComposedCrossed
    if isinstance(c, Gates):
        if layers is not None or keep_class:
            raise ConfigError("gated cross-attention reads all patches of the last layer: no layers, no keep_class")
        if isinstance(text.config, EncDecConfig):
            raise ConfigError(
                "gated cross-attention stands between the layers of a decoder, in which the text behind a picture sees "
                "it; here the encoder reads a prompt both ways, and the decoder has cross-attention of its own: take a "
                "connector that puts tokens into the prompt"
            )
        gated = c.gated or GatedConfig(num_heads=8, head_dim=64, hidden_dim=4 * text.config.dim)
        new = max(image_id + 1 - text.config.vocab_size, 0)
        crossed = ComposedCrossedConfig(**common, resampler=c.resampler, gated=gated, every=c.every, new_tokens=new)
        model = ComposedCrossed.build(crossed)
    else:
        whose = joint.system.config if joint.system is not None else None
        projects = isinstance(c, Linear | MLP | PixelShuffle | Pooling)
        if isinstance(whose, TowerConfig | ComposedConfig) and whose.vision == v:  # as the connector was trained
            read = whose.read_layers if isinstance(whose, TowerConfig) else whose.layers
            layers = read if layers is None else layers
            keep_class = whose.keep_class if keep_class is None else keep_class
        elif layers is None and v.pre_norm and projects and v.num_layers > 1:
            layers = v.num_layers - 1
        if keep_class is None:
            keep_class = isinstance(c, QFormerConfig) and v.num_prefix > 0
        config = ComposedConfig(**common, connector=c, layers=layers, keep_class=keep_class)
        model = Composed.build(replace(config, video_id=video_id) if config.frames else config)
    if isinstance(tokenizer, LanguageTokenizer):
        model.use_tokenizer(tokenizer)
    return model


def _refusal(reason: str, connector: Any) -> ConfigError:
    again = ", then ".join(stage.name for stage in _STAGES[type(connector)])
    return ConfigError(f"these parts do not fit: {reason}. Whichever part is changed, train again: {again}")


def _fill(model: System, name: str, part: _Part) -> None:
    if part.module is None:
        return
    ours, theirs = model.get_submodule(name), part.module.state_dict()
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    wrong = sorted(
        key for key in shapes.keys() | theirs.keys() if key not in theirs or shapes.get(key) != theirs[key].shape
    )
    if wrong:
        raise _refusal(
            f"the {name} of {part.source} was made between parts of other widths ({wrong[0]} differs): pass its "
            f"config, {part.config}, for a fresh one",
            part.config,
        )
    ours.load_state_dict(theirs)


# -------------------- whose parts


def _system(value: str | Path | System) -> System:
    return value if isinstance(value, System) else load(value)


def _tower(value: str | Path | System | ViTConfig) -> _Part:
    if isinstance(value, ViTConfig):
        return _Part(config=value, source="a fresh tower")
    system = _system(value)
    part = dict(system.named_children()).get("vision")
    if isinstance(part, ViT):
        return _Part(config=part.config, source=system.source, module=part, system=system)
    if part is None:
        raise ConfigError(f"{system.source} ({type(system).__name__}) has no vision tower")
    raise ConfigError(
        f"the tower of {system.source} ({type(part).__name__}) is not one ViT over one square grid, which connectors "
        "here read: it takes pictures of any size, or is several towers. Take that of a CLIP, SigLIP, DINOv2, MAE or "
        "ViT, and train align, then instruct"
    )


def _language_model(value: str | Path | System | DecoderConfig | EncDecConfig) -> _Part:
    if isinstance(value, DecoderConfig | EncDecConfig):
        return _Part(config=value, source="a fresh language model")
    system = _system(value)
    part = dict(system.named_children()).get("backbone")
    if isinstance(part, Decoder | EncDec):
        return _Part(config=part.config, source=system.source, module=part, system=system)
    raise ConfigError(
        f"{system.source} ({type(system).__name__}) has no language model that writes: take a decoder or an "
        "encoder-decoder, and train align, then instruct"
    )


def _connector(value: str | Path | System | InPrompt | Gates) -> _Part:
    if isinstance(value, str) and value in CONNECTORS:
        value = CONNECTORS[value]
    if isinstance(value, (*get_args(InPrompt), Gates)):
        return _Part(config=value, source=f"a fresh {type(value).__name__}")
    if isinstance(value, str) and "/" not in value and not Path(value).exists():
        raise ConfigError(f"no connector is called {value!r}{did_you_mean(value, CONNECTORS)}")
    assert isinstance(value, str | Path | System)
    system = _system(value)
    part = dict(system.named_children()).get("connector")
    configs = [field for field in vars(system.config).values() if isinstance(field, get_args(InPrompt))]
    if part is None or not configs:
        raise ConfigError(
            f"{system.source} ({type(system).__name__}) has no connector that could be taken out: gated layers and "
            "mergers belong to the language model or the tower that they were trained with. Take a fresh one: "
            f"{', '.join(CONNECTORS)}"
        )
    return _Part(config=configs[0], source=system.source, module=part, system=system)


def _with_places(tokenizer: LanguageTokenizer) -> tuple[LanguageTokenizer, int, int]:
    """The tokenizer with tokens for pictures and clips, and their ids: those that it has, or new ones."""
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    ids = []
    for kind in ("image", "video"):
        names = (f"<|{kind}|>", f"<{kind}>")
        name = next((name for name in names if name in tokenizer.added), names[0])
        backend.add_special_tokens([AddedToken(name, normalized=False, special=True)])
        ids.append(backend.get_vocab(with_added_tokens=True)[name])
    return replace(tokenizer, backend=backend), ids[0], ids[1]
