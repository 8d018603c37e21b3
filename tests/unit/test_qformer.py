"""The Q-Former, its heads, and what the two stages of BLIP-2 train."""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from polymodal.backbones.decoder import Learned
from polymodal.backbones.families import ControlIds
from polymodal.connectors.qformer import QFormer, QFormerConfig, TextTables
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat, Turn
from polymodal.core.errors import ConfigError, MediaError, TrainError, UnsupportedError
from polymodal.core.sample import Image, Part, Sample, Text
from polymodal.encoders.vit import ViTConfig
from polymodal.heads.matching import QueryContrastiveHead, best_cosines, hard_negatives
from polymodal.systems.blip2 import BLIP2, BLIP2Config
from polymodal.systems.blip2_qformer import BLIP2QFormer, BLIP2QFormerConfig
from polymodal.tokenizers.language import LanguageTokenizer
from tests.nano import NANO

SHAPE = QFormerConfig(num_queries=4, dim=32, num_layers=3, num_heads=4, hidden_dim=64)
READER = replace(SHAPE, text=TextTables(vocab_size=40, context=12))
VISION = ViTConfig(image_size=16, patch_size=4, dim=24, num_layers=2, num_heads=4, hidden_dim=64)
OPT = replace(NANO["blip2"].backbone, context=24, position=Learned(count=24, offset=2), std=0.02)
T5 = NANO["t5"].backbone
SECOND = {
    "opt": BLIP2Config(
        vision=VISION, qformer=SHAPE, family="opt", backbone=OPT, image_id=39, control=ControlIds(start=2, stop=(3,))
    ),
    "t5": BLIP2Config(
        vision=VISION, qformer=SHAPE, family="t5", backbone=T5, image_id=39, control=ControlIds(stop=(1,), pad=0)
    ),
}
FIRST = BLIP2QFormerConfig(vision=VISION, qformer=READER, embed_dim=16)


def built(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return cls.build(config)


def batch_of(model: BLIP2 | BLIP2QFormer, rows: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch({name: spec.random(rows, generator) for name, spec in model.inputs_spec().items()})


def qformer(config: QFormerConfig = READER) -> QFormer:
    torch.manual_seed(0)
    model = QFormer(config, 24)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def text(seed: int = 0, rows: int = 3, length: int = 7) -> Tensor:
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- masks


@torch.no_grad()
def test_queries_see_text_under_the_bidirectional_mask_only() -> None:
    model, image = qformer(), torch.randn(3, 17, 24)
    one, other = model.read_both(image, text(0)), model.read_both(image, text(1))
    assert not torch.allclose(one, other, atol=1e-3)
    assert not torch.allclose(one, model(image).x, atol=1e-3)


@torch.no_grad()
def test_the_words_of_a_pair_do_not_change_its_picture_under_the_unimodal_mask() -> None:
    model, batch = built(BLIP2QFormer, FIRST), batch_of(built(BLIP2QFormer, FIRST))
    before = model(batch)
    batch["ids"][0] = (batch["ids"][0] + 1) % 40
    after = model(batch)
    assert torch.equal(before[:, 1:], after[:, 1:])
    assert not torch.allclose(before[:, 0], after[:, 0])
    batch["pixels"][1] += 1
    assert torch.equal(after[[0, 2, 3]], model(batch)[[0, 2, 3]])


@torch.no_grad()
@pytest.mark.parametrize("place", range(7))
def test_a_caption_sees_the_queries_and_its_own_beginning(place: int) -> None:
    model, image, ids = qformer(), torch.randn(3, 17, 24), text()
    seen = model(image)
    before = model.tell(ids, seen)
    changed = ids.clone()
    changed[:, place] = (changed[:, place] + 1) % 40
    after = model.tell(changed, seen)
    torch.testing.assert_close(after[:, :place], before[:, :place], atol=1e-6, rtol=0)
    assert bool(((after - before).abs().amax(2)[:, place:] > 1e-4).all())
    elsewhere = model.tell(ids, model(image + 1))
    assert bool(((elsewhere - before).abs().amax(2) > 1e-4).all()), "every word sees the picture, the first too"


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    model, image, ids = qformer(), torch.randn(3, 17, 24), text()
    padded = F.pad(ids, (0, 4), value=0)
    valid = torch.arange(11).expand(3, -1) < 7
    seen = model(image)
    torch.testing.assert_close(model.read(padded, valid)[:, :7], model.read(ids), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.read_both(image, padded, valid), model.read_both(image, ids), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.tell(padded, seen, valid)[:, :7], model.tell(ids, seen), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_picture_is_read_in_every_other_layer(every: int) -> None:
    model = qformer(replace(READER, cross_every=every))
    reads = [name for name, _ in model.named_modules() if name.endswith("cross_attn.q_proj")]
    assert reads == [f"blocks.{i}.cross_attn.q_proj" for i in range(0, 3, every)]


def test_feed_forward_layers_are_separate_and_start_as_copies() -> None:
    torch.manual_seed(0)
    model = QFormer(READER, 24)
    model.init_weights()
    for block in model.blocks:
        mine, copy = block.mlp.state_dict(), block.text_mlp.state_dict()  # type: ignore[union-attr]
        assert all(torch.equal(mine[name], copy[name]) for name in mine)
    model.read(text()).square().sum().backward()
    assert all(block.mlp.up_proj.weight.grad is None for block in model.blocks)  # type: ignore[union-attr]
    assert "text_mlp" not in "".join(dict(QFormer(SHAPE, 24).named_parameters()))


# ---- heads


def test_the_best_query_counts() -> None:
    images = F.normalize(torch.randn(5, 4, 8), dim=-1)
    texts = F.normalize(torch.randn(3, 8), dim=-1)
    by_hand = [[max(float(q @ t) for q in image) for t in texts] for image in images]
    torch.testing.assert_close(best_cosines(images, texts), torch.tensor(by_hand))


@pytest.mark.parametrize("groups", [[0, 1, 2, 3], [0, 0, 1, 2]])
def test_contrast_by_hand(groups: list[int]) -> None:
    """A temperature of 0.07 that divides, and labels of which a tenth is spread over all columns."""
    head = QueryContrastiveHead()
    images, texts = F.normalize(torch.randn(4, 5, 8), dim=-1), F.normalize(torch.randn(4, 8), dim=-1)
    group = torch.tensor(groups)
    same = group[:, None] == group
    got = head.contrast(images, texts, images, texts, same)
    scores, total = (best_cosines(images, texts) / 0.07).tolist(), 0.0
    for matrix in (scores, list(zip(*scores, strict=True))):
        for row in range(4):
            norm = math.log(sum(math.exp(s) for s in matrix[row]))
            share = 0.9 / groups.count(groups[row])
            total -= sum(
                (share * (groups[row] == groups[column]) + 0.1 / 4) * (matrix[row][column] - norm)
                for column in range(4)
            )  # fmt: skip
    assert got.total.item() == pytest.approx(total / 2, rel=1e-5)
    if groups == [0, 1, 2, 3]:
        labels = torch.arange(4)
        expected = F.cross_entropy(got.by_image, labels, reduction="sum", label_smoothing=0.1)
        expected = (expected + F.cross_entropy(got.by_text, labels, reduction="sum", label_smoothing=0.1)) / 2
        torch.testing.assert_close(got.total, expected)


def test_negatives_are_hard_and_never_of_the_own_picture() -> None:
    scores = torch.tensor([[9.0, 2.0, 1.0, 9.0], [3.0, 9.0, 3.0, -9.0]])
    same = torch.tensor([[True, False, False, True], [False, True, False, False]])
    torch.manual_seed(0)
    draws = torch.stack([hard_negatives(scores, same) for _ in range(3000)])
    chances = (scores.softmax(1) + 1e-4).masked_fill(same, 0)
    chances = chances / chances.sum(1, keepdim=True)
    for row in range(2):
        counts = Counter(draws[:, row].tolist())
        assert not any(same[row, column] for column in counts)
        for column in range(4):
            assert counts[column] / 3000 == pytest.approx(float(chances[row, column]), abs=0.04)
    assert 3 in Counter(draws[:, 1].tolist()) or float(chances[1, 3]) < 1e-3


def test_a_batch_without_negatives_is_refused() -> None:
    model = built(BLIP2QFormer, FIRST)
    with pytest.raises(TrainError, match="at least two pairs"):
        model.loss(batch_of(model, 1))
    with pytest.raises(TrainError, match="at least two pairs"):
        model.loss(Batch(batch_of(model) | {"image_id": torch.tensor([7, 7, 7, 7])}))


# ---- the first stage


def test_first_loss_is_that_of_guessing() -> None:
    """3 B pairs of which one in three belongs together; captions over the vocabulary; contrast over the batch."""
    model, seen = built(BLIP2QFormer, FIRST), []
    model.qformer.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    loss = model.loss(batch_of(model))
    assert seen == [4, 4, 12, 4], "queries, text, pairs, captions: the queries run once for two losses"
    assert loss.weight == 4
    assert float(loss.metrics["captions"]) == pytest.approx(math.log(40), abs=0.3)
    assert float(loss.metrics["matching"]) == pytest.approx(math.log(2), abs=0.1)
    assert float(loss.metrics["contrast"]) == pytest.approx(math.log(4), abs=1.5)
    assert loss.mean.item() == pytest.approx(
        sum(float(loss.metrics[name]) for name in ("captions", "matching", "contrast")), rel=1e-5
    )


def test_matching_by_hand() -> None:
    """B pairs that belong together, each text with its hardest picture, each picture with its hardest text."""
    model, batch = built(BLIP2QFormer, FIRST), batch_of(built(BLIP2QFormer, FIRST), 6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.contrast.temperature.fill_(1e-6)  # the draw is then the maximum, if that is not the own pair
        scores, image = model(batch), model.vision(batch["pixels"]).x
        best = (scores == scores.amax(0)) | (scores == scores.amax(1, keepdim=True))
        order = next(p for p in itertools.permutations(range(6)) if not best[:, list(p)].diagonal().any())
        batch["ids"], scores = batch["ids"][list(order)], scores[:, list(order)]
        pictures, texts = scores.argmax(0), scores.argmax(1)
        assert not torch.equal(pictures, texts)
        own = torch.arange(6)
        total = torch.tensor(0.0)
        for first, second, yes in ((own, own, 1), (pictures, own, 0), (own, texts, 0)):
            ids, valid = batch["ids"][second], batch["valid"][second]
            labels = torch.full((6,), yes)
            total = total + F.cross_entropy(model.match(image[first], ids, valid), labels, reduction="sum")
        got = model.loss(batch).metrics["matching"]
    torch.testing.assert_close(torch.as_tensor(got), total / 18)


def test_retrieval_files_do_not_train() -> None:
    model = built(BLIP2QFormer, replace(FIRST, trains=False))
    with pytest.raises(UnsupportedError, match="head of words"):
        model.loss(batch_of(model))


def words() -> LanguageTokenizer:
    """Words between a start and an end token, without a file."""
    vocab = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "red": 4, "circle": 5, "is": 6, "what": 7}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[PAD]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return LanguageTokenizer(
        backend=backend, config={}, prefix=(1,), suffix=(2,), bos_id=1, eos_ids=(2,), pad_id=0
    )  # fmt: skip


def test_pairs() -> None:
    model, picture = built(BLIP2QFormer, FIRST), PILImage.new("RGB", (30, 11))
    pair = Sample.of([picture, "a red circle"])
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json"):
        model.prepare([pair])
    model.tokenizer = words()
    batch = model.prepare([pair, Sample.of([picture, "red"])], length=6)
    assert batch["ids"].tolist() == [[1, 3, 4, 5, 2, 0], [1, 4, 2, 0, 0, 0]]
    assert batch["valid"].sum(1).tolist() == [5, 3]
    assert batch["pixels"].shape == (2, 3, 16, 16)
    assert model.loss(batch).weight == 2
    assert model.count(pair) == 4 + 5
    with pytest.raises(MediaError, match="5 tokens, more than 4"):
        model.prepare([pair], length=4)
    with pytest.raises(MediaError, match="a picture and a text"):
        model.prepare([Sample.of("red")])
    with pytest.raises(MediaError, match="at most 12"):
        model.loss(Batch(batch | {"ids": torch.ones(2, 13, dtype=torch.int64)} | {"valid": torch.ones(2, 13).bool()}))


# ---- the second stage


@pytest.mark.parametrize("kind", SECOND)
def test_first_gradient_of_the_queries_is_of_order_one(kind: str) -> None:
    """Queries that start at zero, as common ports have them, get a gradient that ends a run at its first step."""

    def gradient(zero: bool) -> float:
        model = built(BLIP2, SECOND[kind]).train()
        queries = model.connector.qformer.queries
        assert float(queries.detach().std()) == pytest.approx(0.02, rel=0.3)
        if zero:
            with torch.no_grad():
                queries.zero_()
        model.loss(batch_of(model)).mean.backward()
        return float(queries.grad.norm())

    assert 1e-2 < gradient(zero=False) < 1e2
    assert gradient(zero=True) > 1e3


@pytest.mark.parametrize("kind", [*SECOND, "first"])
def test_what_is_frozen_stays(kind: str) -> None:
    model = built(BLIP2QFormer, FIRST) if kind == "first" else built(BLIP2, SECOND[kind])
    model.train()
    assert not any(m.training for m in model.vision.modules())
    assert kind == "first" or not any(m.training for m in model.backbone.modules())
    assert model.get_submodule("qformer" if kind == "first" else "connector").training
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert all(name.startswith(("vision.", "backbone.")) for name in frozen)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in learns if name.startswith(("vision.", "backbone."))} == {
        "vision.norm.weight", "vision.norm.bias",
    }  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.loss(batch_of(model)).mean.backward()
    optimizer.step()
    assert all(model.get_parameter(name).grad is None for name in frozen)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in frozen.items())
    assert all(bool(model.get_parameter(name).grad.any()) for name in learns)


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (1, 1), (300, 5), (17, 40)])
def test_every_picture_is_as_many_tokens_as_there_are_queries(size: tuple[int, int]) -> None:
    model = built(BLIP2, SECOND["opt"])
    spelled, media = model.see([PILImage.new("RGB", size)])
    assert spelled == [[39] * 4]
    assert model.features(media).shape == (4, 32)
    assert model.count(Sample.of(PILImage.new("RGB", size))) == 4
    assert SHAPE.count(1) == SHAPE.count(1000) == 4


def asked(question: str, *answer: str, pictures: int = 1) -> Chat:
    parts: tuple[Part, ...] = (*[Image(PILImage.new("RGB", (20, 16)))] * pictures, Text(question))
    return Chat((Turn("user", parts), *(Turn("assistant", (Text(a),)) for a in answer)))


def test_lessons() -> None:
    """A decoder's answer follows the prompt; an encoder-decoder's is a text of its own."""
    chats = [asked("what is red", "a circle"), asked("", "red")]
    opt, t5 = (built(BLIP2, SECOND[kind]) for kind in ("opt", "t5"))
    opt.tokenizer, t5.tokenizer = replace(words(), prefix=(2,), suffix=()), replace(words(), prefix=(), suffix=(1,))
    batch = opt.lesson(chats)
    assert batch["ids"].tolist() == [[39] * 4 + [2, 7, 6, 4, 3, 5, 3], [39] * 4 + [2, 4, 3, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100] * 8 + [3, 5, 3], [-100] * 5 + [4, 3] + [-100] * 4]
    assert opt.loss(batch).weight == 5
    batch = t5.lesson(chats)
    assert batch["ids"].tolist() == [[39] * 4 + [7, 6, 4, 1], [39] * 4 + [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[3, 5, 1], [4, 1, -100]]
    assert t5.loss(batch).weight == 5


@pytest.mark.parametrize("kind", SECOND)
def test_prompts_that_it_was_not_trained_on_are_refused(kind: str) -> None:
    model = built(BLIP2, SECOND[kind])
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json"):
        model.prompt([asked("red")])
    model.tokenizer = words()
    for pictures in (0, 2):
        with pytest.raises(MediaError, match="one picture and one text"):
            model.prompt([asked("red", pictures=pictures)])
    with pytest.raises(MediaError, match="one question and its answer" if kind == "t5" else "one picture and one text"):
        model.lesson([asked("red", "a", "circle")])


def test_a_decoder_refuses_what_is_too_long_and_an_encoder_has_no_end() -> None:
    opt, t5 = (built(BLIP2, SECOND[kind]) for kind in ("opt", "t5"))
    opt.tokenizer = t5.tokenizer = words()
    with pytest.raises(MediaError, match="at most 24"):
        opt.prompt([asked("red " * 30)])
    assert t5.prompt([asked("red " * 30)])["ids"].shape == (1, 36)
    with pytest.raises(UnsupportedError, match="at once"):
        t5.resume(torch.zeros(1, 2, dtype=torch.int64), t5.new_memory(1, 4))
    assert t5.plain_from(batch_of(t5, 1)) == 10
    assert opt.plain_from(batch_of(opt, 1)) == 4


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple"):
        QFormerConfig(dim=30, num_heads=4)
    with pytest.raises(ConfigError, match="at least one query"):
        QFormerConfig(num_queries=0)


# ---- two ranks


def _rank(rank: int, port: int, queue: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    model = built(BLIP2QFormer, FIRST)
    queue.put((rank, contrast_and_gradient(model, batch_of(model).rows(2 * rank, 2 * rank + 2), rank)))
    torch.distributed.destroy_process_group()


def contrast_and_gradient(model: BLIP2QFormer, batch: Batch, rank: int) -> tuple[float, list[float]]:
    from polymodal.core.distributed import gather_with_grad

    assert model.contrast is not None
    rows = len(batch["ids"])
    group = torch.arange(rows) + rank * rows
    images = model.image_vectors(model.qformer(model.vision(batch["pixels"]).x))
    texts = model.text_vectors(batch["ids"], batch["valid"])
    same = group[:, None] == gather_with_grad(group)
    total = model.contrast.contrast(images, texts, gather_with_grad(images), gather_with_grad(texts), same).total
    total.backward()
    assert math.isfinite(model.loss(batch).mean.item())
    assert model.qformer.queries.grad is not None
    return total.item(), model.qformer.queries.grad.flatten().tolist()


@pytest.mark.slow
def test_two_ranks_are_one() -> None:
    """The contrast of two halves on two ranks adds up to that of the whole, with its gradient."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, port, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    got = dict(queue.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join()
    model = built(BLIP2QFormer, FIRST)
    total, gradient = contrast_and_gradient(model, batch_of(model), 0)
    assert got[0][0] + got[1][0] == pytest.approx(total, rel=1e-5)
    summed = torch.tensor(got[0][1]) + torch.tensor(got[1][1])
    torch.testing.assert_close(summed, torch.tensor(gradient), atol=1e-5, rtol=1e-4)
