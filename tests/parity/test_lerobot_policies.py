"""ACT and Diffusion Policy against formulas written out over the names of LeRobot's files.

LeRobot cannot be installed beside our torch. The references below are plain functions of a table of tensors: they share
no module with ours, and read every tensor by the name that it has in LeRobot's files, so that names, layouts, outputs,
losses and gradients are held at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import polymodal
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, WeightsError
from polymodal.encoders.resnet import ResNet, ResNetConfig, load_torchvision
from polymodal.nn.noise import add_noise, squared_cosine
from polymodal.systems.act import ACT
from polymodal.systems.act import PRESETS as ACT_PRESETS
from polymodal.systems.acting import Policy
from polymodal.systems.diffusion_policy import PRESETS as DIFFUSION_PRESETS
from polymodal.systems.diffusion_policy import DiffusionPolicy
from polymodal.weights.rules import unplan
from tests.nano import nano, nano_batch
from tests.parity.harness import randomise

Weights = Mapping[str, Tensor]


def resnet(w: Weights, at: Callable[[str], str], x: Tensor, *, group: bool) -> Tensor:
    """ResNet-18's definition; ``at`` gives the name of one of torchvision's layers."""

    def conv(name: str, x: Tensor, stride: int, padding: int) -> Tensor:
        return F.conv2d(x, w[at(f"{name}.weight")], None, stride, padding)

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = w[at(f"{name}.weight")], w[at(f"{name}.bias")]
        if group:
            return F.group_norm(x, x.shape[1] // 16, weight, bias)
        mean, variance = (w[at(f"{name}.running_{what}")].detach() for what in ("mean", "var"))
        return F.batch_norm(x, mean, variance, weight, bias)

    x = F.max_pool2d(F.relu(norm("bn1", conv("conv1", x, 2, 3))), 3, 2, 1)
    for stage in range(1, 5):
        for block in range(2):
            name = f"layer{stage}.{block}"
            if at(f"{name}.conv1.weight") not in w:
                break
            stride = 2 if stage > 1 and block == 0 else 1
            out = F.relu(norm(f"{name}.bn1", conv(f"{name}.conv1", x, stride, 1)))
            out = norm(f"{name}.bn2", conv(f"{name}.conv2", out, 1, 1))
            if at(f"{name}.downsample.0.weight") in w:
                x = norm(f"{name}.downsample.1", conv(f"{name}.downsample.0", x, stride, 0))
            x = F.relu(out + x)
    return x


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def detr_layer(
    w: Weights, name: str, x: Tensor, place: Tensor, heads: int, memory: tuple[Tensor, Tensor] | None = None,
    ignored: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One layer on (tokens, batch, dim), as torch's own attention computes it."""

    def attend(part: str, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None = None) -> Tensor:
        p = f"{name}.{part}"
        return F.multi_head_attention_forward(
            q, k, v, q.shape[-1], heads, w[f"{p}.in_proj_weight"], w[f"{p}.in_proj_bias"], None, None, False, 0.0,
            w[f"{p}.out_proj.weight"], w[f"{p}.out_proj.bias"], training=False, key_padding_mask=ignored,
            need_weights=False,
        )[0]  # fmt: skip

    def norm(number: int, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.norm{number}.weight"], w[f"{name}.norm{number}.bias"])

    x = norm(1, x + attend("self_attn", x + place, x + place, x, ignored))
    if memory is not None:
        context, context_place = memory
        x = norm(2, x + attend("multihead_attn", x + place, context + context_place, context))
    hidden = linear(w, f"{name}.linear2", F.relu(linear(w, f"{name}.linear1", x)))
    return norm(2 if memory is None else 3, x + hidden)


def act_reference(w: Weights, c: Any, batch: Batch, style: Tensor) -> Tensor:
    """The published network: [style, state, pixels of all cameras] -> encoder -> decoder of learned queries."""
    tokens = [linear(w, "model.encoder_latent_input_proj", style)[None]]
    tokens += [linear(w, "model.encoder_robot_state_input_proj", batch["state"])[None]]
    places = [w["model.encoder_1d_feature_pos_embed.weight"][:, None]]
    dim = c.transformer.dim
    for camera in range(len(c.cameras)):
        seen = resnet(w, "model.backbone.{}".format, batch["pixels"][:, camera], group=False)
        name = "model.encoder_img_feat_input_proj"
        seen = F.conv2d(seen, w[f"{name}.weight"], w[f"{name}.bias"])
        rows, columns = seen.shape[2:]
        table = torch.zeros(rows, columns, dim)
        for i in range(dim // 4):
            frequency = 10_000 ** (2 * i / (dim // 2))
            for axis, (length, offset) in enumerate(((rows, 0), (columns, dim // 2))):
                angle = torch.arange(1, length + 1) / (length + 1e-6) * 2 * math.pi / frequency
                angle = angle[:, None] if axis == 0 else angle[None]
                table[..., offset + 2 * i], table[..., offset + 2 * i + 1] = angle.sin(), angle.cos()
        tokens.append(seen.flatten(2).permute(2, 0, 1))
        places.append(table.flatten(0, 1)[:, None])
    x, place = torch.cat(tokens), torch.cat(places)
    for layer in range(c.num_encoder_layers):
        x = detr_layer(w, f"model.encoder.layers.{layer}", x, place, c.transformer.num_heads)
    queries = w["model.decoder_pos_embed.weight"][:, None]
    out = torch.zeros(c.horizon, x.shape[1], dim)
    for layer in range(c.num_decoder_layers):
        out = detr_layer(w, f"model.decoder.layers.{layer}", out, queries, c.transformer.num_heads, (x, place))
    out = F.layer_norm(out, (dim,), w["model.decoder.norm.weight"], w["model.decoder.norm.bias"])
    return linear(w, "model.action_head", out.transpose(0, 1))


def style_reference(w: Weights, c: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    first = w["model.vae_encoder_cls_embed.weight"].expand(len(batch["state"]), -1)
    state = linear(w, "model.vae_encoder_robot_state_input_proj", batch["state"])
    actions = linear(w, "model.vae_encoder_action_input_proj", batch["actions"])
    x = torch.cat([first[:, None], state[:, None], actions], 1).transpose(0, 1)
    ignored = torch.cat([torch.zeros(len(state), 2, dtype=torch.bool), ~batch["actions_valid"]], 1)
    place = w["model.vae_encoder_pos_enc"].transpose(0, 1)
    for layer in range(c.num_style_layers):
        x = detr_layer(w, f"model.vae_encoder.layers.{layer}", x, place, c.transformer.num_heads, ignored=ignored)
    mean, log_variance = linear(w, "model.vae_encoder_latent_output_proj", x[0]).chunk(2, 1)
    return mean, log_variance


def unet_reference(w: Weights, c: Any, x: Tensor, step: Tensor, known: Tensor) -> Tensor:
    """ConditionalUnet1D with scales, three convolutions deep for each residual block."""
    u, root = c.backbone, "diffusion.unet"
    half = u.step_dim // 2
    angle = step[:, None] * torch.exp(torch.arange(half) * -math.log(10_000) / (half - 1))
    when = torch.cat([angle.sin(), angle.cos()], 1)
    when = linear(w, f"{root}.diffusion_step_encoder.1", when)
    when = linear(w, f"{root}.diffusion_step_encoder.3", F.mish(when))
    known = torch.cat([when, known], 1)

    def conv(name: str, x: Tensor, groups: int = u.num_groups) -> Tensor:
        x = F.conv1d(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"], padding=u.kernel_size // 2)
        return F.mish(F.group_norm(x, groups, w[f"{name}.1.weight"], w[f"{name}.1.bias"]))

    def block(name: str, x: Tensor) -> Tensor:
        film = linear(w, f"{name}.cond_encoder.1", F.mish(known))[..., None]
        hidden = conv(f"{name}.conv1.block", x)
        hidden = film[:, : hidden.shape[1]] * hidden + film[:, hidden.shape[1] :]
        if f"{name}.residual_conv.weight" in w:
            x = F.conv1d(x, w[f"{name}.residual_conv.weight"], w[f"{name}.residual_conv.bias"])
        return conv(f"{name}.conv2.block", hidden) + x

    x, kept = x.transpose(1, 2), []
    for level in range(len(u.widths)):
        name = f"{root}.down_modules.{level}"
        x = block(f"{name}.1", block(f"{name}.0", x))
        kept.append(x)
        if level < len(u.widths) - 1:
            x = F.conv1d(x, w[f"{name}.2.weight"], w[f"{name}.2.bias"], stride=2, padding=1)
    for number in range(2):
        x = block(f"{root}.mid_modules.{number}", x)
    for level in range(len(u.widths) - 1):
        name = f"{root}.up_modules.{level}"
        x = block(f"{name}.1", block(f"{name}.0", torch.cat([x, kept.pop()], 1)))
        x = F.conv_transpose1d(x, w[f"{name}.2.weight"], w[f"{name}.2.bias"], stride=2, padding=1)
    x = conv(f"{root}.final_conv.0.block", x, 8)
    return F.conv1d(x, w[f"{root}.final_conv.1.weight"], w[f"{root}.final_conv.1.bias"]).transpose(1, 2)


def known_reference(w: Weights, c: Any, batch: Batch) -> Tensor:
    """[state, then each camera's 2 x keypoints] of every moment; pictures cut in the middle."""
    places = ("conv1", "bn1", "", "", "layer1", "layer2", "layer3", "layer4")
    (rows, columns), parts = c.crop, []
    top, left = round((c.image_height - rows) / 2), round((c.image_width - columns) / 2)
    for moment in range(c.history):
        parts.append(batch["state"][:, moment])
        for camera in range(len(c.cameras)):
            root = f"diffusion.rgb_encoder.{camera}"

            def at(name: str, root: str = root) -> str:
                head, _, rest = name.partition(".")
                return f"{root}.backbone.{places.index(head)}.{rest}"

            pixels = batch["pixels"][:, moment, camera, :, top : top + rows, left : left + columns]
            x = resnet(w, at, pixels, group=True)
            x = F.conv2d(x, w[f"{root}.pool.nets.weight"], w[f"{root}.pool.nets.bias"]).flatten(2).softmax(-1)
            parts.append(F.relu(linear(w, f"{root}.out", (x @ w[f"{root}.pool.pos_grid"]).flatten(1))))
    return torch.cat(parts, 1)


def ragged(model: Policy) -> Batch:
    batch = nano_batch(model)
    batch["actions_valid"][1, 3:] = False
    batch["actions_valid"][4, 1:] = False
    return batch


def prepared(name: str) -> tuple[Any, Batch, dict[str, Tensor]]:
    """A model in which nothing is zero, a batch, and its weights under LeRobot's names, as leaves."""
    model: Any = nano(name).eval()
    randomise(model)
    generator = torch.Generator().manual_seed(3)
    for key, buffer in model.named_buffers():
        if "pos_grid" not in key:
            buffer.add_(torch.rand(buffer.shape, generator=generator) * 0.2)
    weights = {n: t.clone().requires_grad_() for n, t in model.to_hub(model.state_dict()).items()}
    return model, ragged(model), weights


def compare(model: Any, ours: Tensor, expected: Tensor, weights: Mapping[str, Tensor]) -> None:
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
    ours.square().sum().backward()
    expected.square().sum().backward()
    gradients = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.state_dict(keep_vars=True).items()
    }
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad} | {n for n, _ in model.named_buffers()}
    skipped = {theirs for step in unplan(model.formats["hf"].rules(model.config), model.state_dict())
               if frozen & set(step.ours) for theirs in step.theirs}  # fmt: skip
    for name, gradient in model.to_hub(gradients).items():
        theirs = weights[name].grad
        if name in skipped:
            continue
        want = torch.zeros_like(gradient) if theirs is None else theirs
        scale = max(1.0, float(want.abs().max()))
        assert float((gradient - want).abs().max()) / scale < 1e-4, name


@pytest.mark.proves("act", "parity: outputs, loss and first gradients, over LeRobot's names (formulas of the test)")
def test_act_is_what_was_published() -> None:
    model, batch, weights = prepared("act")
    style = torch.randn(len(batch["state"]), model.config.latent_dim)
    compare(model, model(batch, style), act_reference(weights, model.config, batch, style), weights)
    plain = model(batch)  # acting takes the mean style
    torch.testing.assert_close(plain, act_reference(weights, model.config, batch, torch.zeros_like(style)))


@pytest.mark.proves("act", "training: the loss is L1 plus 10 times the divergence of the style, of valid steps alone")
def test_acts_loss_is_what_was_published() -> None:
    model, batch, weights = prepared("act")
    mean, log_variance = style_reference(weights, model.config, batch)
    torch.testing.assert_close(
        model.style(batch["state"], batch["actions"], batch["actions_valid"]), (mean, log_variance)
    )
    torch.manual_seed(5)
    loss = model.loss(batch)
    torch.manual_seed(5)
    style = mean + (log_variance / 2).exp() * torch.randn_like(mean)
    error = (act_reference(weights, model.config, batch, style) - batch["actions"]).abs()
    valid = batch["actions_valid"]
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    assert loss.weight == int(valid.sum()) * model.config.action_width
    torch.testing.assert_close(loss.mean, error[valid].mean() + 10 * divergence.sum(1).mean())
    other = Batch(batch, actions=batch["actions"].masked_fill(~valid[..., None], 99.0))
    torch.manual_seed(5)
    torch.testing.assert_close(model.loss(other).total, loss.total)


@pytest.mark.proves(
    "diffusion_policy", "parity: outputs, loss, first gradients over LeRobot's names (formulas of the test)"
)
def test_diffusion_policy_is_what_was_published() -> None:
    model, batch, weights = prepared("diffusion_policy")
    c, step = model.config, torch.tensor([0, 3, 7, 11, 15, 19])
    known = known_reference(weights, c, batch)
    torch.testing.assert_close(model(batch), known, atol=1e-5, rtol=1e-5)
    noise = torch.randn_like(batch["actions"])
    noisy = add_noise(batch["actions"], noise, step, squared_cosine(c.steps))
    expected = unet_reference(weights, c, noisy, step, known)
    compare(model, model.backbone(noisy, step, model(batch)), expected, weights)
    torch.manual_seed(5)
    loss = model.loss(batch)
    torch.manual_seed(5)
    noise, step = torch.randn_like(batch["actions"]), torch.randint(c.steps, (6,))
    noisy = add_noise(batch["actions"], noise, step, squared_cosine(c.steps))
    valid = batch["actions_valid"]
    error = (unet_reference(weights, c, noisy, step, known) - noise).square()
    torch.testing.assert_close(loss.mean, error[valid].mean())


@pytest.mark.parametrize("norm", ["frozen_batch", "batch"])
def test_torchvisions_weights_load_totally(norm: Any, tmp_path: Path) -> None:
    model = ResNet(ResNetConfig(depths=(1, 1, 1, 1), widths=(4, 4, 8, 8), norm=norm)).eval()
    source = {name: torch.rand(t.shape) + 0.1 if t.is_floating_point() else t for name, t in model.state_dict().items()}
    counts = {
        f"{n.removesuffix('.running_var')}.num_batches_tracked": torch.tensor(7) for n in source if "running_var" in n
    }
    classifier = {"fc.weight": torch.rand(3, 8), "fc.bias": torch.rand(3)}
    save_file(source | counts | classifier, tmp_path / "model.safetensors")
    load_torchvision(model, tmp_path)
    pixels = torch.randn(2, 3, 40, 56)
    expected = resnet(source, str, pixels, group=False)
    torch.testing.assert_close(model(pixels), expected)
    assert expected.shape[2:] == model.config.grid(40, 56)
    del source["layer4.0.bn2.bias"]
    save_file(source | counts | classifier | {"layer5.0.conv1.weight": torch.rand(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="2 problems") as caught:
        load_torchvision(model, tmp_path)
    assert "layer4.0.bn2.bias" in str(caught.value)
    assert "layer5.0.conv1.weight" in str(caught.value)


def lerobots_names(kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of lerobot/act_aloha_sim_transfer_cube_human or lerobot/diffusion_pusht, without statistics."""
    out: dict[str, tuple[int, ...]] = {}

    def put(name: str, *shape: int, bias: bool = True) -> None:
        out[f"{name}.weight"] = shape
        if bias:
            out[f"{name}.bias"] = shape[:1]

    def vision(root: str, at: Callable[[str], str], norms: tuple[str, ...]) -> None:
        def block(name: str, dim: int, source: int, size: int) -> None:
            out[f"{root}.{at(name[0])}{name[1:]}.weight"] = (dim, source, size, size)

        def norm(name: str, dim: int) -> None:
            out.update({f"{root}.{at(name[0])}{name[1:]}.{part}": (dim,) for part in norms})

        out[f"{root}.{at('c')}.weight"] = (64, 3, 7, 7)
        out.update({f"{root}.{at('b')}.{part}": (64,) for part in norms})
        source = 64
        for stage, dim in enumerate((64, 128, 256, 512), 1):
            for number in range(2):
                for conv in (1, 2):
                    block(f"{stage}.{number}.conv{conv}", dim, source if (conv, number) == (1, 0) else dim, 3)
                    norm(f"{stage}.{number}.bn{conv}", dim)
            if stage > 1:
                block(f"{stage}.0.downsample.0", dim, source, 1)
                norm(f"{stage}.0.downsample.1", dim)
            source = dim

    if kind == "act":
        frozen = ("weight", "bias", "running_mean", "running_var")
        vision("model.backbone", lambda c: {"c": "conv1", "b": "bn1"}.get(c, f"layer{c}"), frozen)
        for stack, count in (("vae_encoder", 4), ("encoder", 4), ("decoder", 1)):
            for layer in range(count):
                name, attentions = f"model.{stack}.layers.{layer}", ("self_attn", "multihead_attn")
                for attention in attentions[: 1 + (stack == "decoder")]:
                    out[f"{name}.{attention}.in_proj_weight"] = (1536, 512)
                    out[f"{name}.{attention}.in_proj_bias"] = (1536,)
                    put(f"{name}.{attention}.out_proj", 512, 512)
                put(f"{name}.linear1", 3200, 512)
                put(f"{name}.linear2", 512, 3200)
                for norm in range(1, 3 + (stack == "decoder")):
                    put(f"{name}.norm{norm}", 512)
        put("model.decoder.norm", 512)
        out["model.vae_encoder_pos_enc"] = (1, 102, 512)
        put("model.vae_encoder_cls_embed", 1, 512, bias=False)
        for name, *shape in (
            ("vae_encoder_robot_state_input_proj", 512, 14), ("vae_encoder_action_input_proj", 512, 14),
            ("vae_encoder_latent_output_proj", 64, 512), ("encoder_robot_state_input_proj", 512, 14),
            ("encoder_latent_input_proj", 512, 32), ("encoder_img_feat_input_proj", 512, 512, 1, 1),
            ("action_head", 14, 512),
        ):  # fmt: skip
            put(f"model.{name}", *shape)
        put("model.encoder_1d_feature_pos_embed", 2, 512, bias=False)
        put("model.decoder_pos_embed", 100, 512, bias=False)
        return out
    root = "diffusion.rgb_encoder"
    vision(f"{root}.backbone", lambda c: {"c": "0", "b": "1"}.get(c) or str(int(c) + 3), ("weight", "bias"))
    put(f"{root}.pool.nets", 32, 512, 1, 1)
    out[f"{root}.pool.pos_grid"] = (9, 2)
    put(f"{root}.out", 64, 64)
    known = 128 + 2 * (2 + 64)

    def residual(name: str, source: int, dim: int) -> None:
        for conv, width in (("conv1", source), ("conv2", dim)):
            put(f"diffusion.unet.{name}.{conv}.block.0", dim, width, 5)
            put(f"diffusion.unet.{name}.{conv}.block.1", dim)
        put(f"diffusion.unet.{name}.cond_encoder.1", 2 * dim, known)
        if source != dim:
            put(f"diffusion.unet.{name}.residual_conv", dim, source, 1)

    put("diffusion.unet.diffusion_step_encoder.1", 512, 128)
    put("diffusion.unet.diffusion_step_encoder.3", 128, 512)
    for level, (source, dim) in enumerate(((2, 512), (512, 1024), (1024, 2048))):
        residual(f"down_modules.{level}.0", source, dim)
        residual(f"down_modules.{level}.1", dim, dim)
        if level < 2:
            put(f"diffusion.unet.down_modules.{level}.2", dim, dim, 3)
    for number in range(2):
        residual(f"mid_modules.{number}", 2048, 2048)
    for level, (source, dim) in enumerate(((4096, 1024), (2048, 512))):
        residual(f"up_modules.{level}.0", source, dim)
        residual(f"up_modules.{level}.1", dim, dim)
        put(f"diffusion.unet.up_modules.{level}.2", dim, dim, 4)
    put("diffusion.unet.final_conv.0.block.0", 512, 512, 5)
    put("diffusion.unet.final_conv.0.block.1", 512)
    put("diffusion.unet.final_conv.1", 2, 512, 1)
    return out


@pytest.mark.parametrize(
    ("kind", "cls", "presets"), [("act", ACT, ACT_PRESETS), ("diffusion", DiffusionPolicy, DIFFUSION_PRESETS)]
)
def test_published_files_fit_name_by_name(kind: str, cls: Any, presets: Mapping[str, Any]) -> None:
    config = next(iter(presets.values()))()
    with torch.device("meta"):
        model = cls(config)
        theirs = {name: torch.empty(shape) for name, shape in lerobots_names(kind).items()}
        theirs |= {
            f"{n}.mean": torch.empty(2)
            for n in ("normalize_inputs.buffer_observation_state", "unnormalize_outputs.buffer_action")
        }
    plan = model.plan(cls.formats["hf"], theirs)
    assert plan.problems == []
    assert len(plan.dropped) == 2
    written = model.to_hub(model.state_dict())
    assert {n: tuple(t.shape) for n, t in written.items()} == lerobots_names(kind)


@pytest.mark.parametrize("name", ["act", "diffusion_policy"])
@pytest.mark.parametrize("old", [False, True])
def test_statistics_of_lerobots_files_are_read(name: str, old: bool, tmp_path: Path) -> None:
    model: Any = nano(name).eval()
    folder = model.save(tmp_path)
    (folder / "preprocessor_config.json").unlink()
    kinds = ("mean", "std") if name == "act" else ("min", "max")
    found = {
        f"observation.state.{kinds[0]}": torch.tensor([1.0, 2.0, 3.0]),
        f"observation.state.{kinds[1]}": torch.full((3,), 4.0),
        f"action.{kinds[0]}": torch.full((5,), -1.0),
        f"action.{kinds[1]}": torch.full((5,), 2.0),
        "observation.images.wrist.mean": torch.full((3, 1, 1), 0.4),
        "observation.images.wrist.std": torch.full((3, 1, 1), 0.3),
    }
    if old:
        renamed = {}
        for key, tensor in found.items():
            feature, _, what = key.rpartition(".")
            place = "unnormalize_outputs" if feature == "action" else "normalize_inputs"
            renamed[f"{place}.buffer_{feature.replace('.', '_')}.{what}"] = tensor
        save_file(load_file(folder / "model.safetensors") | renamed, folder / "model.safetensors")
    else:
        save_file(found, folder / "policy_preprocessor_step_3_normalizer_processor.safetensors")
    loaded: Any = polymodal.load(folder)
    assert loaded.dataset == "lerobot"
    centre, scale = ((1.0, 2.0, 3.0), 4.0) if name == "act" else ((2.5, 3.0, 3.5), None)
    normalised = loaded.state_normaliser.normalise(torch.tensor(centre))
    torch.testing.assert_close(normalised, torch.zeros(3))
    if scale is not None:
        assert float(loaded.state_normaliser.normalise(torch.tensor(centre) + scale)[0]) == pytest.approx(1)
    assert loaded.images.mean == pytest.approx((0.4,) * 3)


def test_fields_that_are_not_understood_are_refused(tmp_path: Path) -> None:
    folder = nano("act").save(tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    for change, complaint in (
        ({"pre_norm": True}, "pre_norm"), ({"new_option": 1}, "new_option"), ({"n_obs_steps": 2}, "n_obs_steps"),
        ({"input_features": {"observation.environment_state": {"type": "ENV", "shape": [3]}}}, "type"),
        ({"normalization_mapping": {"STATE": "MIN_MAX"}}, "normalization_mapping"), ({"chunk_size": 0}, "chunk_size"),
    ):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(ConfigError, match=complaint):
            polymodal.load(folder)
