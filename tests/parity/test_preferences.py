"""DPO and GRPO give the losses and gradients of TRL, where it is installed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import polymodal
from polymodal.core.batch import IGNORE, Batch
from polymodal.train.dpo import CHOSEN, DPO, REJECTED
from polymodal.train.grpo import advantages_of, answer_means, divergence, surrogate
from tests.nano import NANO
from tests.toy_lm import tokenizer

pytestmark = pytest.mark.filterwarnings("default")  # of its imports
PAIRS = [
    {"prompt": "the quick ", "chosen": "brown fox", "rejected": "lazy dog jumps over"},
    {"prompt": "yes or ", "chosen": "no no no 12", "rejected": "dog"},
]


def test_dpo(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    import transformers

    words, c = tokenizer(), NANO["language"]
    torch.manual_seed(0)
    ours: Any = polymodal.build(replace(c, backbone=replace(c.backbone, vocab_size=words.vocab_size, std=0.3)))
    ours.use_tokenizer(words)
    dpo = DPO(ours, beta=0.3)
    ours.save(tmp_path / "reference")
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours.save(tmp_path / "policy")
    reference, policy = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("reference", "policy")
    )
    trainer = trl.DPOTrainer(
        model=policy, ref_model=reference, train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "policy"),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "out"), beta=0.3, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            bf16=False,
        ),
    )  # fmt: skip
    theirs = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(policy.eval(), dict(theirs))
    valid, answer = theirs["attention_mask"].bool(), theirs["completion_mask"].bool()
    batch = Batch()
    for prefix, rows in ((CHOSEN, slice(0, 2)), (REJECTED, slice(2, 4))):
        batch[f"{prefix}ids"] = theirs["input_ids"][rows].masked_fill(~valid[rows], 0)
        batch[f"{prefix}valid"] = valid[rows]
        batch[f"{prefix}labels"] = theirs["input_ids"][rows].masked_fill(~answer[rows], IGNORE)
    loss = dpo.loss(batch).mean
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss, ours.backbone.embed_tokens.weight)
    (other,) = torch.autograd.grad(expected, policy.model.embed_tokens.weight)
    torch.testing.assert_close(gradient, other, rtol=0, atol=1e-5)


def test_grpo() -> None:
    """Their loss of given log-probabilities: what makes these is the trainer, which wants a GPU and a server."""
    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer

    torch.manual_seed(1)
    now = (-3 * torch.rand(8, 5)).requires_grad_()
    old, reference = (now.detach() + 0.3 * torch.randn(8, 5) for _ in range(2))
    written = torch.arange(5) < torch.tensor([5, 4, 3, 5, 2, 5, 1, 5])[:, None]
    advantages = advantages_of(torch.randn(2, 4)).flatten()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (now, torch.zeros(8, 5), None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None), model=SimpleNamespace(training=False),
        _metrics=defaultdict(lambda: defaultdict(list)), loss_type="grpo", importance_sampling_level="token",
        beta=0.04, epsilon_low=0.2, epsilon_high=0.2, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        aux_loss_enabled=False, use_vllm=False, _entropy_bonus_enabled=False,
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(8, 2).long(), "prompt_mask": torch.ones(8, 2).long(), "advantages": advantages,
        "completion_ids": torch.zeros(8, 5).long(), "completion_mask": written.long(), "old_per_token_logps": old,
        "ref_per_token_logps": reference,
    }  # fmt: skip
    expected = GRPOTrainer._compute_loss(trainer, None, inputs)
    terms = surrogate(now, old, advantages[:, None], 0.2) + 0.04 * divergence(now, reference)
    loss = answer_means(terms, Batch(labels=torch.where(written, 1, IGNORE))).mean()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    ours, theirs = (torch.autograd.grad(total, now, retain_graph=True) for total in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
