"""DiT, Stable Diffusion 3 and FLUX against diffusers' pipelines, saved in their own format: conditions, loss, first
gradients, pictures, files both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor

import polymodal
from polymodal.core.batch import Batch
from polymodal.core.drawing import Drawing
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Sample
from polymodal.nn.patches import pack
from polymodal.samplers.guidance import Dice
from polymodal.systems.dit import DiT
from polymodal.systems.flux import Flux
from polymodal.systems.painting import Painter
from polymodal.systems.sd3 import SD3
from polymodal.tokenizers.text import TextTokenizer
from tests.parity.harness import _close, randomise

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CLAIM = "parity: conditions, loss, first gradients, pictures, files both ways (diffusers)"
CONTEXT, WORDS = 12, 20
TEXTS = ["a red cup on a table", "two cats"]
KINDS = {"dit": DiT, "sd3": SD3, "sd3 without T5": SD3, "flux": Flux, "flux undistilled": Flux}


def clip_tokenizer(folder: Path) -> Any:
    TextTokenizer.train_bpe([*TEXTS, "a cup and a cat"] * 4, 540, length=CONTEXT).save(folder)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def t5_tokenizer(folder: Path) -> Any:
    """Pieces with scores, ended as T5 ends them."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    own = ["<pad>", "</s>", "<unk>"]
    backend.train_from_iterator(
        TEXTS * 4, trainers.UnigramTrainer(vocab_size=60, special_tokens=own, unk_token="<unk>", show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5TokenizerFast", **names}))
    return transformers.T5TokenizerFast.from_pretrained(folder)


def clip(tokens: Any, dim: int, embed_dim: int | None = None) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=3, num_attention_heads=2,
        vocab_size=len(tokens), max_position_embeddings=CONTEXT, projection_dim=embed_dim or dim,
        bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config) if embed_dim else transformers.CLIPTextModel(config)


def t5(tokens: Any, dim: int) -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(tokens), d_model=dim, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )
    )  # fmt: skip


def vae(**fields: Any) -> Any:
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return diffusers.AutoencoderKL(block_out_channels=[4, 8], norm_num_groups=2, **levels, **fields)


def pipeline(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5, "shift_factor": 0.06}
    if kind == "dit":
        transformer = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, out_channels=8, num_layers=2, sample_size=8,
            num_embeds_ada_norm=3,
        )  # fmt: skip
        parts = {"transformer": transformer, "vae": vae()}
        scheduler = diffusers.DDIMScheduler(clip_sample=False)
        pipe_of = diffusers.DiTPipeline
        others: dict[str, Any] = {}
    else:
        tokens, words = clip_tokenizer(folder / "made"), t5_tokenizer(folder / "made_t5")
        others = {"tokenizer": tokens, "image_encoder": None, "feature_extractor": None}
        if kind.startswith("sd3"):
            transformer = diffusers.SD3Transformer2DModel(
                sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
                num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=18,
                pos_embed_max_size=12, qk_norm="rms_norm", dual_attention_layers=(0,),
            )  # fmt: skip
            parts = {"text_encoder": clip(tokens, 12, 10), "text_encoder_2": clip(tokens, 16, 8)}
            whole = kind == "sd3"
            parts |= {"text_encoder_3": t5(words, 32)} if whole else {}
            others |= {"tokenizer_2": tokens, "tokenizer_3": words if whole else None}
            others |= {} if whole else {"text_encoder_3": None}
            scheduler, pipe_of = (
                diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
                diffusers.StableDiffusion3Pipeline,
            )
        else:
            distilled = kind == "flux"
            transformer = diffusers.FluxTransformer2DModel(
                in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=12, num_attention_heads=2,
                joint_attention_dim=20, pooled_projection_dim=12, axes_dims_rope=(2, 4, 6), guidance_embeds=distilled,
            )  # fmt: skip
            parts = {"text_encoder": clip(tokens, 12), "text_encoder_2": t5(words, 20)}
            others |= {"tokenizer_2": words}
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=distilled)
            pipe_of = diffusers.FluxPipeline
        parts |= {"transformer": transformer, "vae": vae(**plain)}
    for model in parts.values():
        model.eval()
        randomise(model, 0.1)
    for name, parameter in transformer.named_parameters():  # copies of what is one tensor in DiT's paper
        if ".norm1.emb." in name:
            first = "transformer_blocks.0.norm1.emb." + name.split(".norm1.emb.")[1]
            parameter.data.copy_(transformer.get_parameter(first))
    named = {"id2label": {"0": "cup, mug", "1": "cat", "2": "table"}} if kind == "dit" else {}
    pipe = pipe_of(**parts, **others, **named, scheduler=scheduler)
    if kind == "dit":
        pipe.register_to_config(**named)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "theirs")
    return pipe


Pair = tuple[Any, Any, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Each pipeline once, and its folder."""

    @cache
    def make(kind: str) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp("made")
        return pipeline(kind, folder), folder

    return make


@pytest.fixture(
    params=[pytest.param(kind, marks=pytest.mark.proves(kind.split()[0], CLAIM), id=kind) for kind in KINDS]
)
def pair(request: pytest.FixtureRequest, made: Callable[[str], tuple[Any, Path]]) -> Pair:
    pipe, folder = made(request.param)
    system = polymodal.load(folder / "theirs")
    assert isinstance(system, KINDS[request.param])
    if isinstance(system, SD3 | Flux):  # what no file of theirs says
        system.config = replace(system.config, t5_tokens=WORDS)
    return system, pipe, folder


def conditions(pipe: Any, texts: list[str]) -> dict[str, Tensor]:
    """What their pipeline makes of prompts."""
    if isinstance(pipe, diffusers.FluxPipeline):
        context, pooled, _ = pipe.encode_prompt(texts, None, max_sequence_length=WORDS)
    else:
        context, _, pooled, _ = pipe.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, max_sequence_length=WORDS
        )
    return {"context": context.detach(), "pooled": pooled.detach()}


def prompts(system: Painter) -> list[str]:
    return ["Mug", "1"] if isinstance(system, DiT) else TEXTS


def test_conditions(pair: Pair) -> None:
    system, pipe, _ = pair
    if isinstance(system, DiT):
        assert system.prompt(["cup", " MUG ", "2", ""])["label"].tolist() == [0, 0, 2, 3]
        for wrong in ("dog", "3", "-1", "1e0", "x" * 10_000):
            with pytest.raises(MediaError, match="no class"):
                system.prompt([wrong])
        return
    mine = system.text_condition(TEXTS)
    for name, expected in conditions(pipe, TEXTS).items():
        torch.testing.assert_close(mine[name], expected, rtol=0, atol=1e-5)
    assert system.count(Sample.of([TEXTS[0]])) == mine["context"].shape[1]
    assert system.count(Sample.of(TEXTS)) == 2 * mine["context"].shape[1]
    with pytest.raises(MediaError, match="at most"):
        system.prompt(["cup " * 30])


def theirs(pipe: Any, x: Tensor, when: Tensor, texts: list[str]) -> Tensor:
    """What their Transformer says of latents."""
    if isinstance(pipe, diffusers.DiTPipeline):
        return pipe.transformer(x, timestep=when, class_labels=torch.tensor([0, 1])).sample
    told = conditions(pipe, texts)
    if not isinstance(pipe, diffusers.FluxPipeline):
        return pipe.transformer(x, told["context"], told["pooled"], when * 1000).sample
    height, width = x.shape[2:]
    places = pipe._prepare_latent_image_ids(len(x), height // 2, width // 2, "cpu", torch.float32)
    guidance = torch.ones(len(x)) if pipe.transformer.config.guidance_embeds else None
    text_places = torch.zeros(told["context"].shape[1], 3)
    out = pipe.transformer(pack(x, 2), told["context"], told["pooled"], when, places, text_places, guidance).sample
    return pipe._unpack_latents(out, height * 8, width * 8, 8)


def test_loss_and_first_gradients(pair: Pair) -> None:
    """Of pictures; DiT's hybrid loss by the official code's terms in fp64."""
    system, pipe, _ = pair
    dit = isinstance(system, DiT)
    pixels = torch.rand(2, 3, 16, 16 if dit else 20) * 2 - 1
    noise, posterior = (torch.randn(2, 4, 8, 8 if dit else 10) for _ in range(2))
    when = torch.tensor([0, 430]) if dit else torch.tensor([0.11, 0.83])
    batch = Batch(system.prompt(prompts(system)), pixels=pixels, noise=noise, posterior=posterior, when=when)
    drawn = pipe.vae.encode(pixels).latent_dist
    c = pipe.vae.config
    latents = (drawn.mean + drawn.std * posterior - (c.shift_factor or 0)) * c.scaling_factor
    latents = latents.detach()
    if dit:
        # Not by the scheduler's own numbers, which were multiplied in fp32: the first step's variance shows it.
        share = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).float()[when].view(-1, 1, 1, 1)
        noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
        both = theirs(pipe, noisy, when, [])
        torch.testing.assert_close(system(batch), both[:, :4], rtol=0, atol=1e-5)
        expected = hybrid(latents, noisy, noise, both, when)
    else:
        share = when.view(-1, 1, 1, 1)
        said = theirs(pipe, (1 - share) * latents + share * noise, when, TEXTS)
        torch.testing.assert_close(system(batch), said, rtol=0, atol=1e-5)
        expected = (said - (noise - latents)).square().mean()
    mine = system.loss(batch).mean
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=0)
    mine.backward()
    pipe.transformer.zero_grad()
    expected.backward()
    gradients = system.to_hub(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in system.named_parameters()}
        | {n: torch.zeros_like(b) for n, b in system.named_buffers() if n in system.state_dict()}
    )
    shared: dict[str, Tensor] = {}
    for name, parameter in pipe.transformer.named_parameters():
        if ".norm1.emb." in name:
            inner = name.split(".norm1.emb.")[1]
            shared[inner] = shared.get(inner, 0) + parameter.grad
    for name, parameter in pipe.transformer.named_parameters():
        expected = shared[name.split(".norm1.emb.")[1]] if ".norm1.emb." in name else parameter.grad
        _close(name, gradients[f"transformer.{name}"], expected, 1e-5)
    assert all(p.grad is None for n, p in system.named_parameters() if not n.startswith("backbone."))


def hybrid(x: Tensor, noisy: Tensor, noise: Tensor, both: Tensor, step: Tensor) -> Tensor:
    """Improved diffusion's, from torch's distributions; the first row is at the first step, where data are said."""
    added = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    left = (1 - added).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), left[:-1]])
    posterior = added * (1 - before) / (1 - left)
    posterior[0] = posterior[1]

    def at(values: Tensor) -> Tensor:
        return values[step].view(-1, 1, 1, 1)

    guess, said = both.double().chunk(2, 1)
    share = (said + 1) / 2
    log = share * at(added.log()) + (1 - share) * at(posterior.log())
    seen = (noisy - (1 - at(left)).sqrt() * guess.detach()) / at(left).sqrt()
    means = [
        (at(added * before.sqrt()) * data + at((1 - before) * (1 - added).sqrt()) * noisy) / (1 - at(left))
        for data in (x, seen)
    ]
    normal = torch.distributions.Normal(means[1], (0.5 * log).exp())
    divergence = torch.distributions.kl_divergence(torch.distributions.Normal(means[0], at(posterior).sqrt()), normal)

    def below(y: Tensor) -> Tensor:
        z = (y - means[1]) * (-0.5 * log).exp()
        return 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))

    upper, lower = below(x + 1 / 255), below(x - 1 / 255)
    chance = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    cost = torch.where(at(torch.arange(1000)) == 0, -chance.clamp(min=1e-12).log(), divergence)
    bits = cost.flatten(1).mean(1) / torch.log(torch.tensor(2.0))
    return ((guess - noise).square().flatten(1).mean(1) + bits).mean().float()


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_pictures(pair: Pair, guidance: float) -> None:
    system, pipe, _ = pair
    if isinstance(pipe, diffusers.FluxPipeline) and not system.embeds_guidance and guidance > 1:
        how: dict[str, Any] = {"true_cfg_scale": guidance, "negative_prompt": ["", ""]}
    else:
        how = {"guidance_scale": guidance}
    size = (16, 16) if isinstance(system, DiT) else (20, 16)
    noise = torch.cat([Dice([seed])((4, 8, size[0] // 2), torch.device("cpu")) for seed in (7, 8)])
    if isinstance(system, DiT):
        made = dit_pictures(pipe, noise, guidance)
    else:
        flux = isinstance(pipe, diffusers.FluxPipeline)
        made = pipe(
            TEXTS, num_inference_steps=4, latents=pack(noise, 2) if flux else noise, output_type="pt", height=16,
            width=20, max_sequence_length=WORDS, **how,
        ).images  # fmt: skip
    mine = system.draw(prompts(system), Drawing(steps=4, guidance=guidance, seed=7, size=size))
    torch.testing.assert_close(mine, made, rtol=0, atol=1e-4)


def dit_pictures(pipe: Any, noise: Tensor, guidance: float) -> Tensor:
    """Their pipeline's loop, which always has 1,000 classes and draws its own noise."""
    pipe.scheduler.set_timesteps(4)
    x, none = noise, torch.tensor([3, 3])
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            asked, against = (
                pipe.transformer(x, timestep=t.expand(2), class_labels=label).sample[:, :4]
                for label in (torch.tensor([0, 1]), none)
            )
            x = pipe.scheduler.step(against + guidance * (asked - against), t, x).prev_sample
        return (pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.parent.name}.{name}": tensor
        for file in folder.glob("*/*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_files_both_ways(pair: Pair, tmp_path: Path) -> None:
    _, pipe, folder = pair
    system = polymodal.load(folder / "theirs")  # as the file says
    system.save(tmp_path / "ours")
    before, after = tensors(folder / "theirs"), tensors(tmp_path / "ours")
    if isinstance(system, Flux):  # transformers 5 leaves a word out where there is no projection
        before = {n.replace("text_encoder.", "text_encoder.text_model."): t for n, t in before.items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    without = {name: None for name in ("text_encoder_3", "tokenizer_3") if getattr(pipe, name, 1) is None}
    again = type(pipe).from_pretrained(tmp_path / "ours", **without)
    assert type(again.scheduler) is type(pipe.scheduler)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        one = getattr(pipe, name, None)
        if one is not None:
            other = getattr(again, name).state_dict()
            assert all(torch.equal(tensor, other[key]) for key, tensor in one.state_dict().items())
    loaded = polymodal.load(tmp_path / "ours")
    assert loaded.config == system.config
    assert loaded.fingerprint == system.fingerprint
    texts = prompts(system)
    for name, tensor in system.prompt(texts).items():
        assert torch.equal(loaded.prompt(texts)[name], tensor)


def test_dropped_texts_are_the_empty_one(pair: Pair) -> None:
    system, _, _ = pair
    batch, none = system.prompt(prompts(system)), system.prompt([""])
    dropped = system.drop(batch, torch.tensor([True, False]))
    for name in batch:
        assert torch.equal(dropped[name], torch.cat([none[name], batch[name][1:]]))
    if not isinstance(system, DiT):  # and without tokenizers, too
        system.tokenizer = system.t5_tokenizer = system.tokenizer_large = None
        again = system.drop(batch, torch.tensor([True, False]))
        told = [system.condition(Batch(b)) for b in (dropped, again)]
        assert torch.equal(told[0]["pooled"][0], told[1]["pooled"][0])
        # Behind the end of a text, CLIP's own padding differs from file to file: its tokens there are not compared.
        for seen in (slice(0, 2), slice(-system.config.t5_tokens, None)):
            assert torch.equal(told[0]["context"][0, seen], told[1]["context"][0, seen])
        with pytest.raises(UnsupportedError, match="tokenizer"):
            system.draw(TEXTS, Drawing())


def test_sizes_that_are_not_painted_are_refused(pair: Pair) -> None:
    system, _, _ = pair
    sizes = [(16, 18), (20, 16)] if isinstance(system, DiT) else [(16, 18), (16, 4 * 2 * 13)]
    for size in sizes[: 1 if isinstance(system, Flux) else 2]:
        with pytest.raises((ConfigError, MediaError), match=r"multiples|paints|positions"):
            system.draw(prompts(system), Drawing(size=size, steps=1))
