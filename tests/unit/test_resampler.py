"""The Perceiver resampler and gated cross-attention: what they read, what they must not see, and what they start as."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polymodal.connectors.gated import GatedBlock, GatedConfig, MediaCache, MediaSight
from polymodal.connectors.resampler import PerceiverAttention, Resampler, ResamplerConfig
from polymodal.core.errors import ConfigError, MediaError
from polymodal.nn.norm import RMS

CONFIG = ResamplerConfig(num_latents=3, num_layers=2, num_heads=2, head_dim=5)


def resampler(config: ResamplerConfig = CONFIG, dim: int = 8) -> Resampler:
    torch.manual_seed(0)
    model = Resampler(config, dim)
    model.init_weights()
    return model


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_by_numpy(qk_norm: bool) -> None:
    """Keys and values of the media and of the latents, each after a norm of its own, in one softmax."""
    torch.manual_seed(0)
    layer = PerceiverAttention(ResamplerConfig(num_heads=2, head_dim=5, qk_norm=qk_norm), 8)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    media, latents = torch.randn(2, 6, 8), torch.randn(2, 3, 8)
    w = {name: t.detach().numpy().astype(np.float64) for name, t in layer.named_parameters()}

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        out = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return np.asarray(out * w[f"{name}.weight"] + w[f"{name}.bias"])

    for one in range(2):
        queries = norm("latents_norm", latents[one].numpy().astype(np.float64))
        source = np.concatenate([norm("media_norm", media[one].numpy().astype(np.float64)), queries])
        heads = []
        for head in (slice(0, 5), slice(5, 10)):
            q, k = queries @ w["q_proj.weight"][head].T, source @ w["k_proj.weight"][head].T
            if qk_norm:
                q, k = norm("q_norm", q), norm("k_norm", k)
            scores = np.exp(q @ k.T / np.sqrt(5))
            heads.append(scores / scores.sum(1, keepdims=True) @ (source @ w["v_proj.weight"][head].T))
        expected = np.concatenate(heads, 1) @ w["o_proj.weight"].T
        np.testing.assert_allclose(layer(media, latents)[one].detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 4, 257])
def test_as_many_tokens_as_latents(tokens: int) -> None:
    """Whatever it reads; places of features have no meaning but what the tower gave them."""
    model, x = resampler(), torch.randn(2, tokens, 8)
    assert model(x).shape == (2, 3, 8)
    assert CONFIG.count(tokens) == 3
    torch.testing.assert_close(model(x.flip(1)), model(x))
    torch.testing.assert_close(model(x)[1:], model(x[1:]))
    assert not torch.allclose(model(x)[0], model(x)[1], atol=1e-3)


def test_frames_are_told_apart_by_learned_vectors() -> None:
    model = resampler(ResamplerConfig(num_latents=3, num_layers=1, num_heads=2, head_dim=5, num_frames=4))
    assert model.frames is not None
    clip = torch.randn(2, 3, 6, 8)
    assert not torch.allclose(model(clip), model(clip.flip(1)), atol=1e-3)
    plain = Resampler(ResamplerConfig(num_latents=3, num_layers=1, num_heads=2, head_dim=5), 8)
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if n != "frames"})
    moved = clip + model.frames[:3].reshape(1, 3, 1, 8)
    torch.testing.assert_close(model(clip), plain(moved.reshape(2, 18, 8)))
    torch.testing.assert_close(model(clip[:, :1]), model(clip[:, 0]))  # a picture is a clip of one frame
    with pytest.raises(MediaError, match="5 frames"):
        model(torch.randn(1, 5, 6, 8))


def test_as_a_connector() -> None:
    torch.manual_seed(0)
    connector = CONFIG.build(8, 12)
    connector.init_weights()
    assert connector(torch.randn(2, 9, 8)).shape == (2, 3, 12)


def block(dim: int = 8, source: int = 6, **more: Any) -> GatedBlock:
    torch.manual_seed(0)
    config = GatedConfig(num_heads=2, head_dim=5, hidden_dim=16, **more)
    model = GatedBlock(config, dim, source)
    model.init_weights()
    return model


VARIANTS: list[dict[str, Any]] = [{}, {"mlp": "swiglu", "norm": RMS(), "qk_norm": RMS(), "vector_gate": True}]


@pytest.mark.parametrize("more", VARIANTS, ids=["openflamingo", "idefics"])
def test_closed_gates_change_nothing_and_still_learn(more: dict[str, Any]) -> None:
    model, x, media = block(**more), torch.randn(2, 4, 8), torch.randn(2, 6, 6)
    sight = MediaSight.of_last(torch.tensor([[0, 1, 1, 2], [1, 1, 2, 2]]), 2, 3)
    out = model(x, model.forward_media(media), sight)
    assert torch.equal(out, x)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in model.named_parameters():
        moves = parameter.grad is not None and bool(parameter.grad.any())
        assert moves == name.endswith("_gate"), name
    assert model.attn_gate.shape == model.mlp_gate.shape == ((8,) if more else (1,))


@pytest.mark.parametrize("more", VARIANTS, ids=["openflamingo", "idefics"])
def test_each_token_sees_its_picture_alone(more: dict[str, Any]) -> None:
    """By the gradient: of each token's output with respect to each picture; before any, exactly zero is added."""
    model = block(**more)
    torch.nn.init.constant_(model.attn_gate, 0.7)
    x, media = torch.randn(1, 5, 8), torch.randn(1, 9, 6, requires_grad=True)
    order = torch.tensor([[0, 1, 1, 3, 0]])
    out = model(x, model.forward_media(media), MediaSight.of_last(order, 3, 3))
    for place, number in enumerate(order[0].tolist()):
        (gradient,) = torch.autograd.grad(out[0, place].sum(), media, retain_graph=True)
        seen = gradient[0].reshape(3, 18).any(1).tolist()
        assert seen == [number == picture for picture in (1, 2, 3)]
        assert torch.equal(out[0, place], x[0, place]) == (number == 0)
    alone = model(x[:, 1:2], model.forward_media(media[:, :3]), MediaSight.of_last(order[:, 1:2], 1, 3))
    torch.testing.assert_close(alone[:, 0], out[:, 1])


def test_attention_and_feed_forward_have_gates_of_their_own() -> None:
    x, media, sight = torch.randn(1, 2, 8), torch.randn(1, 3, 6), MediaSight.of_last(torch.ones(1, 2).long(), 1, 3)

    def run(attention: float, feed_forward: float) -> Tensor:
        model = block()
        torch.nn.init.constant_(model.attn_gate, attention)
        torch.nn.init.constant_(model.mlp_gate, feed_forward)
        return model(x, model.forward_media(media), sight).detach()

    model = block()
    attended = model.attn(model.attn_norm(x), *model.forward_media(media), sight)
    torch.testing.assert_close(run(0.5, 0.0), x + np.tanh(0.5) * attended)
    torch.testing.assert_close(run(0.0, -0.5), x - np.tanh(0.5) * model.mlp(model.mlp_norm(x)))
    torch.testing.assert_close(run(0.5, 0.5), run(0.5, 0.0) + np.tanh(0.5) * model.mlp(model.mlp_norm(run(0.5, 0.0))))
    assert not torch.allclose(run(0.5, 0.0), x)


def test_the_cache_keeps_the_picture_that_is_seen_from_now_on() -> None:
    cache = MediaCache(
        media_shape=(2, 2, 3, 5), num_layers=1, rows=3, capacity=8, num_kv_heads=1, head_dim=4
    )  # fmt: skip
    assert cache.sight_of(2) is None
    k, v = torch.randn(2, 3, 2, 6, 5)  # two pictures of three vectors a row
    for layer in range(2):
        cache.keep(layer, k + layer, v + layer, torch.tensor([2, 0, 1]))
    keys, values = cache.recall(1)
    assert torch.equal(keys[0], k[0, :, 3:] + 1)
    assert torch.equal(values[2], v[2, :, :3] + 1)
    sight = cache.sight_of(2)
    assert sight is not None
    assert sight.sees[..., 0].tolist() == [[True, True], [False, False], [True, True]]
    assert sight.mask.shape == (3, 1, 2, 3)
    assert bool(sight.mask.all())  # also of the row that sees nothing: its softmax is not empty


def test_shapes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="at least one latent"):
        ResamplerConfig(num_latents=0)
    with pytest.raises(ConfigError, match="at least one head"):
        GatedConfig(num_heads=0, head_dim=1, hidden_dim=1)
