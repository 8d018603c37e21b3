"""The recipes on data of your own, at nano size on the shapes world: what each stage learns, and what it leaves."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import polymodal
from polymodal.connectors.resampler import ResamplerConfig
from polymodal.core.batch import IGNORE
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, DataError
from polymodal.core.sample import Image, Sample
from polymodal.data.lessons import Lessons
from polymodal.data.worlds import shapes
from polymodal.systems.base import System
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.train import Run, fit
from polymodal.train.log import read_curve
from polymodal.train.loop import mixed
from recipes import flamingo, llava
from recipes.blip2 import stage1, stage2
from recipes.nano.scenes import close_up
from tests.nano import NANO


@cache
def words() -> LanguageTokenizer:
    return LanguageTokenizer.of_words(
        ["a", "what", "user", "assistant", *shapes.SIZES, *shapes.COLOURS, *shapes.SHAPES]
    )


@cache
def pictures() -> list[tuple[Image, str]]:
    """Lone shapes and what they are."""
    rng = np.random.default_rng(0)
    things = [(scene, scene.things[0]) for scene in (close_up(rng) for _ in range(32))]
    return [(Image(shapes.render(scene, 16)), f"a {thing.colour} {thing.shape}") for scene, thing in things]


def captions(question: str = "") -> list[Chat]:
    return [Chat.of([picture, question]).reply(caption) for picture, caption in pictures()]


def pages() -> list[Chat]:
    """Two pictures and what they are."""
    shown = pictures()
    return [Chat.of([a[0]]).reply(a[1]).ask([b[0]]).reply(b[1]) for a, b in zip(shown[::2], shown[1::2], strict=True)]


@cache
def tower(name: str = "clip") -> System:
    torch.manual_seed(1)
    return polymodal.build(NANO[name])


@cache
def language() -> System:
    torch.manual_seed(2)
    c = NANO["language"]
    model = polymodal.build(replace(c, backbone=replace(c.backbone, vocab_size=words().vocab_size + 2, std=0.2)))
    model.use_tokenizer(words())  # type: ignore[attr-defined]
    return model


def started(run: Run) -> dict[str, Tensor]:
    """The weights that a run begins with."""
    torch.manual_seed(mixed(run.seed))
    return run.model().state_dict()


def moved(before: dict[str, Tensor], after: nn.Module) -> set[str]:
    """The parts with a weight that changed; the others are the same to the bit."""
    assert before.keys() == after.state_dict().keys()
    return {name.split(".")[0] for name, tensor in after.state_dict().items() if not torch.equal(tensor, before[name])}


def fell(folder: Path, stage: str, least: float = 0.05) -> None:
    losses = [r["loss"] for r in read_curve(folder / "metrics.jsonl") if r["stage"] == stage]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - least, losses


def test_the_files_load_and_hold_the_published_numbers() -> None:
    from polymodal.train import load_run

    first, second = load_run("recipes/llava.py").stages
    assert (first.steps, first.batch_size, first.lr, first.weight_decay) == (2180, 256, 1e-3, 0)
    assert (second.steps, second.batch_size, second.lr, second.weight_decay) == (5197, 128, 2e-5, 0)
    assert [stage.schedule.warmup for stage in (first, second)] == [65, 156]  # 3 %
    assert [stage.batch_size for stage in llava.run(numbers=llava.V1_0).stages] == [128, 32]
    assert [stage.lr for stage in llava.run(numbers=llava.V1_0).stages] == [2e-3, 2e-5]
    for file, final in (("recipes/blip2/stage1.py", 0.0), ("recipes/blip2/stage2.py", 0.5)):
        (stage,) = load_run(file).stages
        assert (stage.lr, stage.betas, stage.weight_decay, stage.clip) == (1e-4, (0.9, 0.98), 0.05, None)
        assert (stage.schedule.warmup, stage.schedule.final) == (2000, final)  # type: ignore[union-attr]
    (stage,) = load_run("recipes/flamingo.py").stages
    assert (stage.lr, stage.weight_decay, stage.clip, stage.schedule.warmup) == (1e-4, 0.1, 1.0, 1875)
    assert [(share.rows, share.weight) for share in flamingo.SHARES] == [(1, 1.0), (2, 0.2)]


@pytest.mark.parametrize("file", ["llava.py", "blip2/stage1.py", "flamingo.py"])
def test_data_that_is_not_there_is_named(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polymodal.train import load_run

    run = load_run(f"recipes/{file}")
    monkeypatch.chdir(tmp_path)
    part = {"llava.py": llava.captions, "blip2/stage1.py": stage1.captions, "flamingo.py": flamingo.SHARES[0].chats}
    assert run.stages
    with pytest.raises(DataError, match="data/"):
        part[file]()


# ---- LLaVA


def test_llava_aligns_and_then_instructs(tmp_path: Path) -> None:
    numbers = llava.Numbers(steps=(20, 6), batch_sizes=(16, 16), lrs=(2e-2, 2e-5))
    run = llava.run(
        model=lambda: llava.model(tower(), backbone=language()), align=captions, instruct=lambda: captions("what"),
        numbers=numbers,
    )  # fmt: skip
    start = started(run)
    aligned = fit(run, tmp_path, until_step=20, device="cpu").model
    assert moved(start, aligned) == {"connector"}
    fell(tmp_path, "align")
    before = {name: tensor.clone() for name, tensor in aligned.state_dict().items()}
    instructed = fit(run, tmp_path, device="cpu").model
    assert moved(before, instructed) == {"connector", "backbone"}
    # Adam's steps are no longer than the learning rate: it went on from there, and from nowhere else.
    far = max(float((tensor - before[name]).abs().max()) for name, tensor in instructed.state_dict().items())
    assert 0 < far < 6 * 2e-5 * 1.1
    assert torch.equal(
        instructed.get_parameter("vision.patch_embed.weight"), tower().get_parameter("vision.patch_embed.weight")
    )


# ---- BLIP-2


@cache
def bert() -> System:
    torch.manual_seed(3)
    c = NANO["bert"].text
    model = polymodal.build(replace(NANO["bert"], text=replace(c, vocab_size=words().vocab_size)))
    model.tokenizer = words()  # type: ignore[assignment]
    return model


def small_q_former() -> Any:
    return stage1.model(tower("vit"), bert(), num_queries=4, embed_dim=16)


def test_a_tower_that_files_of_blip2_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="no place for the first norm"):
        stage1.model(tower(), bert())


def test_the_q_former_starts_as_bert() -> None:
    made, theirs = small_q_former(), bert().state_dict()
    block, ours = "blocks.1.", made.qformer.state_dict()
    for name in ("attn.q_proj.weight", "attn_norm.bias", "mlp.up_proj.weight", "mlp_norm.weight"):
        assert torch.equal(ours[block + name], theirs[f"text.{block}{name}"])
    assert torch.equal(ours[f"{block}text_mlp.up_proj.weight"], theirs[f"text.{block}mlp.up_proj.weight"])
    assert torch.equal(ours["embed_tokens.weight"][:-1], theirs["text.embed_tokens.weight"])
    assert torch.equal(made.words.bias[:-1], theirs["head.bias"])
    assert made.config.start_id == made.tokenizer.backend.token_to_id("[DEC]")


def test_blip2_goes_from_its_first_stage_to_its_second(tmp_path: Path) -> None:
    pairs = [Sample.of([picture, caption]) for picture, caption in pictures()]
    run = stage1.run(
        model=small_q_former, pairs=lambda: pairs, steps=25, batch_size=16, warmup=2, lr=3e-3, longest=8
    )  # fmt: skip
    start = started(run)
    first = fit(run, tmp_path / "1", device="cpu").model
    changed = {n for n, tensor in first.state_dict().items() if not torch.equal(tensor, start[n])}
    assert {n for n in changed if n.startswith("vision.")} == {"vision.norm.weight", "vision.norm.bias"}
    assert {"qformer", "image_projection", "text_projection", "matching", "words"} <= {n.split(".")[0] for n in changed}
    fell(tmp_path / "1", "represent")
    assert isinstance(first, System)
    folder = first.save(tmp_path / "1" / "model")

    run = stage2.run(
        model=lambda: stage2.model(folder, language()), chats=captions, steps=25, batch_size=16, warmup=2, lr=3e-3
    )  # fmt: skip
    start = started(run)
    for name, tensor in first.state_dict().items():
        ours = f"connector.{name}" if name.startswith("qformer.") else name
        if ours in start:
            assert torch.equal(start[ours], tensor), name
    assert sum(name.startswith("connector.qformer.blocks") for name in start) > 20
    second = fit(run, tmp_path / "2", device="cpu").model
    changed = {n for n, tensor in second.state_dict().items() if not torch.equal(tensor, start[n])}
    assert not any(n.startswith("backbone.") for n in changed)
    assert {n for n in changed if n.startswith("vision.")} == {"vision.norm.weight", "vision.norm.bias"}
    assert {"connector.proj.weight", "connector.qformer.queries"} <= changed
    fell(tmp_path / "2", "generate")


# ---- Flamingo


def small_flamingo() -> Any:
    latents = ResamplerConfig(num_latents=4, num_layers=2, num_heads=2, head_dim=8)
    return flamingo.model(tower(), language(), resampler=latents, heads=2, head_dim=8)


SHARES = (
    flamingo.Share(chats=pages, rows=1, weight=1.0),
    flamingo.Share(chats=captions, rows=2, weight=0.2),
)


def flamingo_run(**more: Any) -> Run:
    return flamingo.run(
        **{"model": small_flamingo, "shares": SHARES, "steps": 25, "batch_size": 12, "warmup": 2, "lr": 1e-2} | more
    )


def test_flamingo_learns_between_frozen_parts(tmp_path: Path) -> None:
    run = flamingo_run(accumulate=3)
    start = started(run)
    model = fit(run, tmp_path, device="cpu").model
    assert moved(start, model) == {"resampler", "gated_blocks", "new_tokens"}
    fell(tmp_path, "interleave")
    assert torch.equal(
        model.get_parameter("backbone.embed_tokens.weight"),
        language().get_parameter("backbone.embed_tokens.weight")[: words().vocab_size],
    )


def test_each_data_set_counts_by_its_own_mean_and_its_weight() -> None:
    model = small_flamingo().eval()
    sources = [Lessons(share.chats(), model.lesson) for share in SHARES]
    batch = flamingo.Joint(sources, [1, 2], [1.0, 0.2]).batch(range(12), np.random.default_rng(0))
    ours = model.loss(batch)
    losses = -model.log_probs(batch).detach()
    learned = batch["labels"] != IGNORE
    means = [float(losses[part].sum() / learned[part].sum()) for part in (slice(0, 4), slice(4, 12))]
    assert (batch["pixels_row"] < 4).sum() == 8  # the four pages come first, with two pictures each
    assert float(ours.total.detach()) == pytest.approx(means[0] + 0.2 * means[1], rel=1e-5)
    assert ours.weight == pytest.approx(1.2)
    thirds = [model.loss(batch.rows(start, start + 4)) for start in (0, 4, 8)]  # micro-batches: pages, pairs, pairs
    assert sum(float(part.total.detach()) for part in thirds) == pytest.approx(float(ours.total.detach()), rel=1e-5)
    assert sum(part.weight for part in thirds) == pytest.approx(ours.weight)


def test_rows_that_do_not_share_out_are_refused() -> None:
    joint = flamingo.Joint([Lessons(pages(), lambda chats: None)] * 2, [1, 2], [1.0, 0.2])  # type: ignore[arg-type, return-value]
    with pytest.raises(DataError, match=r"10 rows do not divide into \[1, 2\]"):
        joint.batch(range(10), np.random.default_rng(0))
