"""What Stable Diffusion 3 and FLUX share: an MMDiT told by CLIP and T5, packed latents, a flow. Not a system itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polymodal.backbones.encdec import EncDecConfig, TextEncoder, t5_init_
from polymodal.backbones.mmdit import MMDiT, MMDiTConfig
from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Sample
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.clip_text import CLIPText, CLIPTextConfig
from polymodal.heads.flow import LogitNormal, Shifted
from polymodal.nn.patches import pack
from polymodal.samplers.flow import Dynamic, Flow
from polymodal.systems.latent_painting import LatentPainter, empty_ids, ids_spec, read_tokenizer
from polymodal.systems.painting import Condition
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.tokenizers.text import TextTokenizer
from polymodal.tokenizers.vae import VAE, VAEConfig

PATCH = 2
T5_END = 1  # what T5 ends every text with


@dataclass(frozen=True, kw_only=True)
class FlowPainterConfig:
    """What reads the text, the Transformer, the autoencoder of its latents, and how the flow goes.

    Attributes:
        clip: OpenAI's text tower.
        t5: an encoder of words, or None: zeros stand for them.
        t5_tokens: as long every text is made for it; what is longer is refused.
        side: patches of a picture's sides, where no size is asked for.
    """

    clip: CLIPTextConfig
    t5: EncDecConfig | None
    backbone: MMDiTConfig
    vae: VAEConfig
    sampling: Flow = field(default_factory=Flow)
    t5_tokens: int = 256
    side: int = 64

    def __post_init__(self) -> None:
        values = self.vae.pyramid.latent_dim * PATCH**2
        if not self.backbone.values == self.backbone.out_values == values:
            raise ConfigError(f"patches of {self.backbone.values} values, and latents whose patches have {values}")
        if self.t5 is not None and self.t5.dim != self.backbone.context_dim:
            raise ConfigError(f"a T5 of {self.t5.dim} dimensions for a context of {self.backbone.context_dim}")


class FlowPainter(LatentPainter):
    """Text encoders and autoencoder are frozen; the flow goes from noise (1) to latents (0)."""

    config: FlowPainterConfig
    tokenizer: TextTokenizer | None = None  # of `clip`
    t5_tokenizer: LanguageTokenizer | None = None
    t5_folder = "tokenizer_2"  # where a pipeline has it

    def __init__(self, config: FlowPainterConfig) -> None:
        super().__init__(config)
        self.clip = CLIPText(config.clip).requires_grad_(False)
        self.t5 = None if config.t5 is None else TextEncoder(config.t5).requires_grad_(False)
        self.backbone = MMDiT(config.backbone)
        self.vae = VAE(config.vae).requires_grad_(False)
        self.sampling: Flow = config.sampling

    def init_weights(self) -> None:
        """DiT's; what is frozen is drawn as for its own training."""
        for made in (self.clip, self.backbone, self.vae):
            made.init_weights()
        if self.t5 is not None:
            t5_init_(self.t5)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c, (width, height) = self.config, self.size
        spec = {
            "pixels": TensorSpec(shape=(c.vae.pyramid.channels, height, width)),
            "ids": ids_spec(c.clip),
        }  # fmt: skip
        if c.t5 is not None:
            spec["t5_ids"] = TensorSpec(shape=(c.t5_tokens,), dtype=torch.int64, high=c.t5.vocab_size)
        return spec

    # -- texts

    def clip_ids(self, tokenizer: TextTokenizer | None, texts: Sequence[str]) -> Int[Tensor, "batch tokens"]:
        """Ids for a tower of CLIP, which reads the beginning of a text that T5 reads the whole of.

        Raises:
            UnsupportedError: there is no tokenizer.
            MediaError: a text is longer, and there is no T5.
        """
        if tokenizer is None:
            raise UnsupportedError(f"{type(self).__name__} ({self.source}) reads no text: a tokenizer is missing")
        longest = max(map(tokenizer.count, texts), default=0)
        if self.t5 is None and longest > tokenizer.length:
            raise MediaError(f"a text of {longest} tokens; without a T5 this model reads at most {tokenizer.length}")
        return tokenizer(texts)[0]

    def t5_ids(self, texts: Sequence[str]) -> Int[Tensor, "batch tokens"]:
        """Ids for T5, filled up: it reads its padding, too, as the official code has it.

        Raises:
            UnsupportedError: there is no tokenizer.
            MediaError: a text is longer than T5 is given.
        """
        if self.t5_tokenizer is None:
            raise UnsupportedError(f"{type(self).__name__} ({self.source}) reads no text: T5's tokenizer is missing")
        rows, most = [self.t5_tokenizer.encode(text, special=True) for text in texts], self.config.t5_tokens
        if (longest := max(map(len, rows), default=0)) > most:
            raise MediaError(f"a text of {longest} tokens; this model reads at most {most}")
        assert self.config.t5 is not None
        return torch.tensor([row + [self.config.t5.pad_id] * (most - len(row)) for row in rows])

    def prompt(self, texts: Sequence[str]) -> Batch:
        words = Batch() if self.t5 is None else Batch(t5_ids=self.t5_ids(texts))  # what is too long is refused first
        return Batch(words, ids=self.clip_ids(self.tokenizer, texts))

    def drop(self, batch: Batch, rows: Bool[Tensor, " batch"]) -> Batch:
        out = Batch(batch)
        for name, empty in self.empty().items():
            out[name] = torch.where(rows[:, None], empty.to(rows.device), batch[name])
        return out

    def empty(self) -> dict[str, Int[Tensor, " tokens"]]:
        """What `prompt` makes of the empty text."""
        out = {"ids": empty_ids(self.tokenizer, self.clip)}
        if (t5 := self.config.t5) is not None:
            out["t5_ids"] = torch.full((self.config.t5_tokens,), t5.pad_id)
            out["t5_ids"][0] = T5_END
        return out

    @property
    def text_tokens(self) -> int:
        """Tokens that the Transformer reads of any text: all are filled up."""
        raise NotImplementedError

    def count(self, sample: Sample) -> int:
        """What the Transformer reads of texts, and of pictures of the size that it paints."""
        return self.text_tokens * len(sample.texts) + self.places(self.size) * len(sample.images)

    def words(self, batch: Batch) -> Float[Tensor, "batch tokens dim"]:
        """What T5 makes of a text; zeros without one."""
        if self.t5 is None:
            width = self.config.backbone.context_dim
            return self.clip.tower.norm.weight.new_zeros(batch.size, self.config.t5_tokens, width)
        ids = batch["t5_ids"]
        return self.t5(ids, torch.ones_like(ids, dtype=torch.bool))

    # -- pictures

    @property
    def multiple(self) -> int:
        return PATCH * self.config.vae.pyramid.factor

    @property
    def size(self) -> tuple[int, int]:
        side = self.config.side * self.multiple
        return side, side

    def places(self, size: tuple[int, int]) -> int:
        return (size[0] // self.multiple) * (size[1] // self.multiple)

    def unpacked(
        self, patches: Float[Tensor, "batch patches values"], height: int, width: int
    ) -> Float[Tensor, "batch channels height width"]:
        """Latents of the patches that the Transformer gives."""
        raise NotImplementedError

    def denoise(
        self, x: Float[Tensor, "batch *latents"], when: Float[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch *latents"]:
        height, width = x.shape[2:]
        grid = height // PATCH, width // PATCH
        patches = self.backbone(
            pack(x, PATCH), grid, condition["context"], condition["pooled"], when, condition.get("guidance")
        )
        return self.unpacked(patches, height, width)

    def loss(self, batch: Batch) -> Loss:
        """Times are drawn around the middle and moved as those of sampling are, by the size of the pictures."""
        if "when" not in batch:
            painted = batch["latents" if "latents" in batch else "pixels"]
            apart = PATCH if "latents" in batch else self.multiple
            shift = self.sampling.shift
            k = shift.at(painted[0, 0].numel() // apart**2) if isinstance(shift, Dynamic) else shift
            batch = Batch(batch, when=Shifted(times=LogitNormal(), k=k).draw(len(painted), painted.device))
        return super().loss(batch)

    # -- files

    def load_processors(self, folder: Path) -> None:
        self.tokenizer = read_tokenizer(folder / "tokenizer", self.config.clip)
        if self.t5 is not None and (folder / self.t5_folder).is_dir():
            self.t5_tokenizer = LanguageTokenizer.from_folder(folder / self.t5_folder)

    def save_processors(self, folder: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save(folder / "tokenizer")
        if self.t5_tokenizer is not None:
            self.t5_tokenizer.save(folder / self.t5_folder)
