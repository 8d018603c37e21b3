"""What holds for every system of the table, at nano size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage

import polymodal
from polymodal.core.batch import Batch
from polymodal.core.errors import UnsupportedError, WeightsError
from polymodal.core.sample import Audio, Sample
from polymodal.core.verbs import Counts, Embeds, Generates, HasInputs, Trains, verbs_of
from polymodal.systems import TABLE
from polymodal.systems.base import DualEncoder, Embedder, System
from polymodal.systems.generator import Generator
from polymodal.systems.prefix import PrefixGenerator
from tests.nano import NANO, every_system, nano, nano_batch

RATES = (16_000, 48_000, 8_000)


def pictures() -> list[PILImage.Image]:
    """Pictures of several shapes and modes."""
    noise = torch.randint(0, 256, (3, 20, 20, 3), dtype=torch.uint8).numpy()
    first, second, third = (PILImage.fromarray(array) for array in noise)
    return [first, second.resize((37, 11)), third.convert("L")]


def sounds() -> list[Audio]:
    """Noise of several lengths and rates."""
    noise = 0.1 * torch.randn(3, 60_000, generator=torch.Generator().manual_seed(0)).numpy()
    return [
        Audio(wave[:size], rate=rate) for wave, size, rate in zip(noise, (9_000, 60_000, 3_000), RATES, strict=True)
    ]


def media(model: System) -> list[Any]:
    """What a system that embeds gives vectors to, beside texts."""
    return sounds() if isinstance(model, Embedder) and ".wav" in model.suffixes else pictures()


def test_every_system_has_a_nano_config() -> None:
    assert set(NANO) == set(TABLE)


@pytest.mark.parametrize("name", NANO)
def test_verbs_are_those_that_it_has(name: str) -> None:
    cls = TABLE[name].resolve()
    verbs = verbs_of(cls)
    compares = issubclass(cls, DualEncoder) or name == "clap"  # sounds and texts
    assert ("embed" in verbs, "classify" in verbs) == (issubclass(cls, Embedder), compares)
    assert ("ask" in verbs) == isinstance(nano(name), Generates)


@every_system("building: every weight is initialised, the same from the same seed")
def test_every_weight_is_initialised(name: str) -> None:
    torch.use_deterministic_algorithms(True)  # fills memory that was never written to with NaN
    try:
        model, twin, other = nano(name), nano(name), nano(name, seed=1)
    finally:
        torch.use_deterministic_algorithms(False)
    for key, tensor in model.state_dict().items():
        assert bool(torch.isfinite(tensor).all()), f"{key} is not initialised"
        assert torch.equal(tensor, twin.state_dict()[key]), key
    assert any(not torch.equal(t, other.state_dict()[key]) for key, t in model.state_dict().items())
    assert "random" in model.source


@every_system("training: the loss falls")
def test_loss_falls(name: str) -> None:
    model = nano(name).train()
    assert isinstance(model, HasInputs)
    assert isinstance(model, Trains)
    batch, steps, losses = nano_batch(model), 12, []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        torch.manual_seed(0)  # the same masks at each step
        loss = model.loss(batch)
        assert loss.weight > 0
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in loss.metrics.values())
        losses.append(loss.mean.item())
        optimizer.zero_grad()
        loss.mean.backward()
        optimizer.step()
        model.after_step(step + 1, steps)
    assert losses[-1] < 0.9 * losses[0], losses


@every_system("training: every weight that trains gets a gradient")
def test_every_weight_that_trains_gets_a_gradient(name: str) -> None:
    model = nano(name).train()
    with torch.no_grad():
        for parameter in model.parameters():  # zero gates and zero biases would hide a gradient, or its absence
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.loss(nano_batch(model)).mean.backward()
    without = [key for key, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # What TokenLearner adds to the scores of all places alike, its softmax over them takes away: rounding is left.
    assert set(without) <= ({"connector.down_proj.bias"} if name == "rt1" else set())
    assert [key for key, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []


@every_system("training: the no-decay list names weights that exist")
def test_no_decay_names_weights_that_exist(name: str) -> None:
    model = nano(name)
    assert set(model.no_decay()) <= {key for key, _ in model.named_parameters()}


@every_system("embedding: unit vectors, the same in any batch", Embedder)
def test_vectors_are_of_unit_length_and_do_not_depend_on_the_batch(name: str) -> None:
    model = nano(name).eval()
    items = media(model)
    assert isinstance(model, Embeds)
    vectors = model.embed(items)
    assert vectors.dtype == torch.float32
    assert vectors.shape == (len(items), model.embedding_dim)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(items)))
    alone = torch.cat([model.embed([item]) for item in reversed(items)]).flip(0)
    torch.testing.assert_close(vectors, alone, atol=1e-5, rtol=0)
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-4), "different pictures have different vectors"


@every_system("weights: what is saved loads as the same system")
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model = nano(name).eval()
    loaded = polymodal.load(model.save(tmp_path / "model"))
    assert type(loaded) is type(model)
    if isinstance(model, Embedder):
        assert isinstance(loaded, Embedder)
        items = media(model)
        torch.testing.assert_close(loaded.embed(items), model.embed(items), atol=0, rtol=0)
    else:
        losses = []
        for system in (model, loaded):
            torch.manual_seed(0)  # some draw their negatives at random
            losses.append(system.loss(nano_batch(system)).total)
        torch.testing.assert_close(losses[0], losses[1], atol=0, rtol=0)
    again = polymodal.load(loaded.save(tmp_path / "again"))
    assert again.config == loaded.config
    assert again.fingerprint == loaded.fingerprint
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in loaded.state_dict().items())


def corrupt(model: System, folder: Path) -> Path:
    """A checkpoint cut short in the middle of its tensors."""
    file = sorted(model.save(folder).rglob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return folder


@every_system("weights: a truncated file is refused")
def test_a_truncated_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError):
        polymodal.load(corrupt(nano(name), tmp_path / "model"))


@every_system("building: presets have the sizes that they are named for")
def test_presets_build_on_the_meta_device(name: str) -> None:
    import importlib

    presets = importlib.import_module(TABLE[name].module).PRESETS
    assert presets
    for preset in presets.values():
        with torch.device("meta"):
            model = TABLE[name].resolve()(preset())
        assert sum(p.numel() for p in model.parameters()) > 4_000_000


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (15, 33), (300, 5), (1, 1)])
@every_system("token accounting: count equals what the tower computes, at odd sizes", Embedder)
def test_count_is_what_the_tower_computes(name: str, size: tuple[int, int]) -> None:
    model = nano(name).eval()
    assert isinstance(model, Counts)
    hears = ".wav" in model.suffixes
    medium = Audio(sounds()[1].source[: 3000 * size[0]], rate=48_000) if hears else PILImage.new("RGB", size)
    sample = Sample.of(medium)
    batch = model.prepare([sample])
    seen: list[int] = []
    first = model.get_submodule("audio.stages.0.blocks.0" if hears else "vision.blocks.0")
    hook = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1, -2).shape[1]))
    with torch.inference_mode():
        model.encode(batch)
    hook.remove()
    padding = int((~batch["mask"]).sum()) if "mask" in batch else 0
    assert [model.count(sample)] == [tokens - padding for tokens in seen]
    assert model.count(Sample.of([medium] * 3)) == 3 * model.count(sample)


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (15, 33), (90, 40)])
@every_system("token accounting: count equals the features of media, at odd sizes", Generator)
def test_count_is_the_number_of_features(name: str, size: tuple[int, int]) -> None:
    model = nano(name).eval()
    assert isinstance(model, Generator)
    if model.media_id is None:
        with pytest.raises(UnsupportedError, match="no pictures"):
            model.see([PILImage.new("RGB", size)])
        return
    sample = Sample.of([PILImage.new("RGB", size), PILImage.new("RGB", (20, 20))])
    spelled, media = model.see([PILImage.new("RGB", size), PILImage.new("RGB", (20, 20))])
    with torch.inference_mode():
        features = model.features(media)
    assert len(features) == sum(ids.count(model.media_id) for ids in spelled)
    assert model.count(sample) == sum(map(len, spelled))


@every_system("generation: a text read token by token from the cache scores as one read at once", Generator)
def test_generation_with_a_cache(name: str) -> None:
    model = nano(name).eval()
    assert isinstance(model, Generates)
    batch = nano_batch(model, size=3)
    del batch["labels"]
    text = torch.randint(3, 30, (3, 5), generator=torch.Generator().manual_seed(1))
    memory = model.new_memory(3, 96)
    scores = [model.prefill(batch, memory)] + [model.step(text[:, i], memory) for i in range(5)]
    if isinstance(model, PrefixGenerator):  # what is read at once is a prefix and sees itself whole
        return
    with torch.inference_mode():
        whole = model(Batch(batch | {"ids": torch.cat([batch["ids"], text], 1)}))[:, -6:]
    torch.testing.assert_close(torch.stack(scores, 1), whole, atol=1e-5, rtol=1e-5)
