"""Every system that answers can learn from preferences and rewards, and what it sees is part of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import polymodal
from polymodal.core.batch import IGNORE, Batch
from polymodal.core.errors import TrainError
from polymodal.systems.generator import Generator
from polymodal.train.dpo import CHOSEN, DPO, REJECTED
from polymodal.train.grpo import GRPO
from tests.nano import NANO, every_system, nano, nano_batch


class Spelled:
    """Spells ids as numbers: a tokenizer for systems that have none."""

    def stream(self) -> Spelled:
        return self

    def push(self, token: int) -> str:
        return f"{token} "

    def finish(self) -> str:
        return ""


def loud(name: str) -> Generator:
    """A system whose weights say something else of everything: open gates, no symmetries."""
    model = nano(name)
    assert isinstance(model, Generator)
    with torch.no_grad():
        for name_of, weight in model.named_parameters():
            weight.normal_(
                std=0.2 if "embed_tokens" in name_of else weight[0].numel() ** -0.5 if weight.ndim > 1 else 1
            )
    return model


def prompts(model: Generator, rows: int = 3) -> Batch:
    """Prompts of different lengths with their media."""
    batch = nano_batch(model, rows)
    batch = Batch({key: tensor for key, tensor in batch.items() if key not in ("labels", "kinds")})
    batch["valid"] = torch.ones_like(batch["ids"], dtype=torch.bool)
    batch["valid"][0, -1] = batch["valid"][1, -2:] = False
    return batch


def lessons(model: Generator, seed: int) -> Batch:
    batch = nano_batch(model, 3)
    batch.pop("kinds", None)
    batch["labels"] = torch.full_like(batch["ids"], IGNORE)
    generator = torch.Generator().manual_seed(seed)
    batch["ids"][:, -3:] = batch["labels"][:, -3:] = torch.randint(3, 30, (3, 3), generator=generator)
    return batch


def blurred(batch: Batch, part: str = "") -> Batch:
    """The same with other pictures, in the part of the batch whose names begin so."""
    return Batch(
        {k: -v if k.startswith(part) and f"{k}_row" in batch and v.is_floating_point() else v for k, v in batch.items()}
    )


def branches(chosen: Batch, rejected: Batch) -> Batch:
    return Batch(
        {CHOSEN + name: tensor for name, tensor in chosen.items()}
        | {REJECTED + name: tensor for name, tensor in rejected.items()}
    )


def sights(model: Generator) -> Iterator[tuple[str, Tensor]]:
    """What learns before the language model: tower, connector, resampler, gates."""
    own = ("backbone.", "new_tokens.", "new_logits.")
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad and not n.startswith(own))


@every_system("DPO: the media reach all four log-probabilities, and both branches teach what sees them", Generator)
def test_media_reach_both_branches(name: str) -> None:
    model = loud(name)
    dpo = DPO(model)
    with torch.no_grad():
        for parameter in dpo.reference.parameters():
            parameter.mul_(1.1)  # somebody else
    batch = branches(lessons(model, 1), lessons(model, 2))
    whole = dpo.log_probs(batch)
    assert len(whole.unique()) == whole.numel()
    if model.media_id is None:
        return
    for number, part in enumerate((CHOSEN, REJECTED)):
        moved = (whole - dpo.log_probs(blurred(batch, part))).abs()
        assert (moved[:, number] > 1e-4).all()
        assert moved[:, 1 - number].max() < 2e-5
        model.zero_grad()
        dpo.log_probs(batch)[0, number].sum().backward()
        assert not [n for n, p in sights(model) if p.grad is None or not p.grad.abs().max() > 0]
    assert all(p.grad is None for p in dpo.reference.parameters())


@every_system("GRPO: answers are written with the media of their prompts, and scored as they were written", Generator)
def test_answers_are_scored_as_they_were_written(name: str) -> None:
    model = loud(name)
    grpo = GRPO(model, tokenizer=Spelled(), rewards={"none": lambda item, text: 0.0}, group=3, max_new_tokens=6)
    batch = prompts(model)
    batch["item"] = torch.arange(batch.size)
    torch.manual_seed(1)
    answers = grpo.write(batch)
    assert len({tuple(answer.ids) for answer in answers}) > 3
    rows = grpo.answered(batch, answers)
    scored, learned = model.log_probs(rows), rows["labels"] != IGNORE
    for answer, found, mine in zip(answers, scored, learned, strict=True):
        written = torch.tensor([step.logprob for step in answer.steps])[: int(mine.sum())]
        torch.testing.assert_close(found[mine], written, rtol=0, atol=1e-5)
    if model.media_id is not None:
        unlike = (scored - model.log_probs(blurred(rows))).abs() * learned
        assert (unlike.amax(1) > 1e-4).all()
        torch.manual_seed(1)
        assert [answer.ids for answer in grpo.write(blurred(batch))] != [answer.ids for answer in answers]


def test_an_encoder_decoder_is_not_taught_by_rewards() -> None:
    torch.manual_seed(0)
    model = polymodal.build(replace(NANO["blip2"], family="t5", backbone=NANO["t5"].backbone))
    assert isinstance(model, Generator)
    grpo = GRPO(model, tokenizer=Spelled(), rewards={"none": lambda item, text: 0.0}, group=2, max_new_tokens=2)
    batch = prompts(model)
    with pytest.raises(TrainError, match="BLIP2 here reads prompts with an encoder: GRPO is for decoders"):
        grpo.loss(Batch(batch | {"item": torch.arange(batch.size)}))
