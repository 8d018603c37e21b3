"""ACT, Action Chunking with Transformers: a chunk of actions at once, from a style that is drawn while training.

Paper: Zhao et al., "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware", 2023,
https://arxiv.org/abs/2304.13705. Official code: tonyzhaozh/act. Hub: lerobot/act_aloha_sim_transfer_cube_human,
lerobot/act_aloha_sim_insertion_human.

    cameras -> ResNet-18 -> 1 x 1 convolution --+
    state -> linear ----------------------------+-> encoder -> decoder, a query for each step -> linear -> actions
    style z -> linear --------------------------+
    training: [class token, state, actions] -> encoder -> mean and variance of z; acting: z = 0

Training details kept here: DETR's layers (norms after additions, places in queries and keys of every layer, ReLU,
dropout of 0.1) and Xavier-uniform matrices in the two stacks, torch's own in the style encoder; frozen batch norm;
absolute error plus 10 times the divergence of z from a unit normal; z-scores; chunks of 100. The paper's rate is 1e-5.

Deviations: one decoder layer, since the official code reads the first of its seven only (LeRobot's finding); the error
is averaged over the steps that are there, as in LeRobot, where the official code counts missing ones as right; no
dropout on the weights of attention; the head that should tell missing steps, which nothing trains, is not here. Files
are LeRobot's; the official ones are pickles. It knows one task and reads no instruction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polymodal.backbones.detr import DetrConfig, DetrDecoder, DetrEncoder, detr_rules, sincos_grid, sincos_line
from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import ConfigError
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.resnet import ResNet, ResNetConfig, resnet_rules
from polymodal.heads.action import masked
from polymodal.systems import lerobot
from polymodal.weights.fields import Fields, FieldTable, read_fields, write_fields
from polymodal.weights.format import Format, write_whole
from polymodal.weights.rules import Rule, Squeeze, rule


@dataclass(frozen=True, kw_only=True)
class ACTConfig:
    """Attributes:
    horizon: steps of a chunk.
    kl_weight: of the divergence of the style.
    """

    cameras: tuple[str, ...]
    image_height: int
    image_width: int
    state_width: int
    action_width: int
    horizon: int = 100
    vision: ResNetConfig = field(default_factory=ResNetConfig)
    transformer: DetrConfig = field(default_factory=DetrConfig)
    num_encoder_layers: int = 4
    num_decoder_layers: int = 1
    num_style_layers: int = 4
    latent_dim: int = 32
    kl_weight: float = 10.0

    def __post_init__(self) -> None:
        if self.vision.norm != "frozen_batch" or not self.cameras:
            raise ConfigError("ACT looks through at least one camera, by a ResNet with frozen batch norm")
        if min(self.num_encoder_layers, self.num_decoder_layers, self.num_style_layers) < 1:
            raise ConfigError("every stack of ACT has a layer")


class StyleEncoder(nn.Module):
    """What is particular to a demonstration, as a normal distribution: BERT-like, read at its class token."""

    def __init__(self, config: ACTConfig) -> None:
        super().__init__()
        c, dim = config, config.transformer.dim
        self.class_token = nn.Embedding(1, dim)
        self.state_proj = nn.Linear(c.state_width, dim)
        self.action_proj = nn.Linear(c.action_width, dim)
        self.encoder = DetrEncoder(c.transformer, c.num_style_layers)
        self.latent_proj = nn.Linear(dim, 2 * c.latent_dim)
        # Waves that nothing trains, and that files hold.
        self.position = nn.Parameter(torch.empty(2 + c.horizon, dim), requires_grad=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        self.encoder.init_weights(xavier=False)
        self.position.copy_(sincos_line(*reversed(self.position.shape)))

    def forward(
        self,
        state: Float[Tensor, "batch state_width"],
        actions: Float[Tensor, "batch horizon action_width"],
        valid: Bool[Tensor, "batch horizon"],
    ) -> tuple[Float[Tensor, "batch latent"], Float[Tensor, "batch latent"]]:
        """Mean and logarithm of the variance; steps that are not ``valid`` are not looked at."""
        first = self.class_token.weight.expand(len(state), 1, -1)
        x = torch.cat([first, self.state_proj(state)[:, None], self.action_proj(actions)], 1)
        valid = torch.cat([valid.new_ones(len(valid), 2), valid], 1)
        mean, log_variance = self.latent_proj(self.encoder(x, self.position[None], valid)[:, 0]).chunk(2, 1)
        return mean, log_variance


@final
class ACT(lerobot.LeRobotPolicy):
    """Action Chunking with Transformers."""

    config: ACTConfig
    normalisation = "zscore"

    def __init__(self, config: ACTConfig) -> None:
        super().__init__(config)
        c, dim = config, config.transformer.dim
        self.horizon, self.cameras = c.horizon, c.cameras
        self.state_width, self.action_width = c.state_width, c.action_width
        self.style = StyleEncoder(c)
        self.vision = ResNet(c.vision)
        self.connector = nn.Conv2d(c.vision.dim, dim, 1)
        self.latent_proj = nn.Linear(c.latent_dim, dim)
        self.state_proj = nn.Linear(c.state_width, dim)
        self.places = nn.Embedding(2, dim)  # of the style and of the state
        self.encoder = DetrEncoder(c.transformer, c.num_encoder_layers)
        self.decoder = DetrDecoder(c.transformer, c.num_decoder_layers, c.horizon)
        self.head = nn.Linear(dim, c.action_width)

    @torch.no_grad()
    def init_weights(self) -> None:
        """The official code's; the paper starts the ResNet from ImageNet (`encoders.resnet.load_torchvision`)."""
        self.vision.init_weights()
        self.style.init_weights()
        self.encoder.init_weights(xavier=True)
        self.decoder.init_weights(xavier=True)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c = self.config
        return {
            "pixels": TensorSpec(shape=(len(c.cameras), 3, c.image_height, c.image_width)),
            "state": TensorSpec(shape=(c.state_width,)),
            "actions": TensorSpec(shape=(c.horizon, c.action_width)),
            "actions_valid": TensorSpec(shape=(c.horizon,), dtype=torch.bool),
        }

    def forward(
        self, batch: Batch, style: Float[Tensor, "batch latent"] | None = None
    ) -> Float[Tensor, "batch horizon action_width"]:
        """Normalised actions of a style; of the mean one where none is given."""
        state, pixels = batch["state"], batch["pixels"]
        style = state.new_zeros(len(state), self.config.latent_dim) if style is None else style
        maps = self.connector(self.vision(pixels.flatten(0, 1)))
        grid = sincos_grid(maps.shape[1], maps.shape[2], maps.shape[3], maps.device).to(maps.dtype)
        seen = maps.flatten(2).mT.unflatten(0, pixels.shape[:2]).flatten(1, 2)
        x = torch.cat([self.latent_proj(style)[:, None], self.state_proj(state)[:, None], seen], 1)
        place = torch.cat([self.places.weight[None], grid.repeat(1, pixels.shape[1], 1)], 1)
        return self.head(self.decoder(self.encoder(x, place), place))

    def loss(self, batch: Batch) -> Loss:
        """Absolute error summed over the numbers of valid steps, and the divergence for each of these numbers."""
        valid = batch["actions_valid"]
        mean, log_variance = self.style(batch["state"], batch["actions"], valid)
        style = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        error = masked((self(batch, style).float() - batch["actions"]).abs(), valid[..., None])
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).float().mean()
        total = error.total + self.config.kl_weight * divergence * error.weight
        metrics = {"l1": error.mean.detach(), "divergence": divergence.detach()}
        return Loss(total=total, weight=error.weight, metrics=metrics)

    def chunk(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch horizon action_width"]:
        return self(batch)


_STACKS: Final = (
    ("n_encoder_layers", "num_encoder_layers", 4), ("n_decoder_layers", "num_decoder_layers", 1),
    ("n_vae_encoder_layers", "num_style_layers", 4), ("chunk_size", "horizon", 100), ("latent_dim", "latent_dim", 32),
    ("kl_weight", "kl_weight", 10.0),
)  # fmt: skip
_LAYERS: FieldTable = (
    ("dim_model", "dim", 512), ("n_heads", "num_heads", 8), ("dim_feedforward", "hidden_dim", 3200),
    ("feedforward_activation", "activation", "relu"), ("dropout", "dropout", 0.1),
)  # fmt: skip
_FIXED: Final = {
    "type": "act", "n_obs_steps": 1, "pre_norm": False, "use_vae": True, "replace_final_stride_with_dilation": False,
}  # fmt: skip


def read_lerobot(raw: Mapping[str, Any]) -> tuple[ACTConfig, dict[str, str]]:
    f = Fields(raw)
    for name, value in _FIXED.items():
        f.require(name, value)
    lerobot.read_common(f, "MEAN_STD")
    f.ignore("whether chunks are averaged is said to the runner", "temporal_ensemble_coeff")
    parts = lerobot.read_features(f) | read_fields(f, _STACKS)
    backbone, layers = lerobot.read_backbone(f), read_fields(f, _LAYERS)
    report = f.done()
    return ACTConfig(**parts, vision=ResNetConfig(**backbone), transformer=DetrConfig(**layers)), report


def write_lerobot(c: ACTConfig) -> dict[str, Any]:
    mapping = dict.fromkeys(("VISUAL", "STATE", "ACTION"), "MEAN_STD")
    own = write_fields(c, _STACKS) | write_fields(c.transformer, _LAYERS) | lerobot.write_backbone(c.vision)
    raw = {**_FIXED, "normalization_mapping": mapping, **lerobot.write_features(c), **own, "n_action_steps": c.horizon}
    return write_whole(c, raw, read_lerobot)


def rules_lerobot(config: ACTConfig) -> list[Rule]:
    names = {
        "vae_encoder_robot_state_input_proj": "style.state_proj", "vae_encoder_action_input_proj": "style.action_proj",
        "vae_encoder_latent_output_proj": "style.latent_proj", "vae_encoder_cls_embed": "style.class_token",
        "encoder_robot_state_input_proj": "state_proj", "encoder_latent_input_proj": "latent_proj",
        "encoder_img_feat_input_proj": "connector", "encoder_1d_feature_pos_embed": "places",
        "decoder_pos_embed": "decoder.queries", "decoder.norm": "decoder.norm", "action_head": "head",
    }  # fmt: skip
    return [
        *lerobot.statistics_rules(),
        *(rule(f"model.{theirs}.{{p}}", f"{ours}.{{p}}") for theirs, ours in names.items()),
        rule("model.vae_encoder_pos_enc", "style.position", Squeeze((0,))),
        *resnet_rules("model.backbone", "vision"),
        *detr_rules("model.vae_encoder", "style.encoder"),
        *detr_rules("model.encoder", "encoder"),
        *detr_rules("model.decoder", "decoder", decoder=True),
    ]


ACT.formats = {"hf": Format(read=read_lerobot, write=write_lerobot, rules=rules_lerobot)}

PRESETS = {
    "lerobot/act_aloha_sim_transfer_cube_human": lambda: ACTConfig(
        cameras=("top",), image_height=480, image_width=640, state_width=14, action_width=14
    )
}
