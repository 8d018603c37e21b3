"""When something is to be seen in a clip: real films, a real model at nano size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from polymodal.cli import main
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.sample import Image, Video
from polymodal.moments import BATCH, Moment, moments, spans
from tests.nano import nano
from tests.talking import talking
from tests.unit.test_video import encoded


def film(frames: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, 24, 32, 3), dtype=np.uint8)


def test_each_frame_is_asked_as_it_would_be_alone() -> None:
    model, frames, seen = talking("llava"), film(BATCH + 3), []
    found = list(moments(model, Video(frames, fps=2), "is it red?", fps=2, progress=lambda *at: seen.append(at)))
    assert [one.time for one in found] == [i / 2 for i in range(len(frames))]
    assert seen == [(BATCH, len(frames)), (len(frames), len(frames))]
    for i in (0, BATCH, len(frames) - 1):
        batch = model.prompt([Chat.of([Image(frames[i]), "is it red?"])])
        scores = model.prefill(batch, model.new_memory(1, 200))[0].double()
        yes, no = (
            {model.tokenizer.encode(form, special=False)[0] for form in forms}
            for forms in (("yes", "Yes", " yes", " Yes"), ("no", "No", " no", " No"))
        )
        yes, no = yes - no, no - yes
        odds = scores[list(yes)].exp().sum().log() - scores[list(no)].exp().sum().log()
        assert found[i].score == pytest.approx(odds.item(), abs=1e-5)
    assert len({round(one.score, 6) for one in found}) > 1
    assert len(list(moments(model, Video(frames, fps=2), "is it red?"))) == len(frames) // 2


def test_an_answer_of_several_tokens_is_looked_for() -> None:
    model, frames = talking("llava"), film(3)
    tokens = model.tokenizer.encode("dark blue", special=False)
    assert len(tokens) > 1
    found = list(moments(model, Video(frames, fps=1), "which colour?", answer="dark blue"))
    for frame, one in zip(frames, found, strict=True):
        batch = model.prompt([Chat.of([Image(frame), "which colour?"])])
        batch["ids"] = torch.cat([batch["ids"], torch.tensor([tokens])], 1)
        batch["valid"] = torch.ones_like(batch["ids"], dtype=torch.bool)
        with torch.no_grad():
            scores = model.backbone.logits(model.backbone(model.read(batch)).x)[0, -len(tokens) - 1 : -1].double()
        said = scores.log_softmax(1)[range(len(tokens)), tokens].sum()
        assert one.score == pytest.approx((said - (1 - said.exp()).log()).item(), abs=1e-4)
    with pytest.raises(ConfigError, match="at least one word"):
        next(moments(model, Video(frames, fps=1), "which colour?", answer=""))


def test_stretches_of_yes() -> None:
    scores = [-1.0, 2.0, 1.0, -3.0, -0.1, 0.5, 4.0, -1.0]
    found = spans((Moment(time=float(t), score=s) for t, s in enumerate(scores)), gap=1.5)
    assert [(span.start, span.end, span.best.time) for span in found] == [(5.0, 6.0, 6.0), (1.0, 2.0, 1.0)]
    assert spans([Moment(time=0.0, score=-1.0)], gap=1.5) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = talking("llava").save(tmp_path / "llava")
    (tmp_path / "clip.mp4").write_bytes(encoded(list(film(10)), fps=2))
    asked = ["ask", str(tmp_path / "clip.mp4"), "is it red?", "--model", str(folder), "--when"]
    assert main([*asked, "2", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert [one["time"] for one in row["frames"]] == pytest.approx([i / 2 for i in range(10)])
    assert main(asked) == 0
    assert " to " in (said := capsys.readouterr().out) or said.startswith("never")
    assert main([*asked, "--answer", "red", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"][0]["score"] != row["frames"][0]["score"]
    assert main([*asked[:-1], "--answer", "red"]) == 1
    assert "--when" in capsys.readouterr().err
    assert main([*asked, "--draw", str(tmp_path)]) == 1
    assert "--draw is not for --when" in capsys.readouterr().err
    assert main(["ask", str(tmp_path / "clip.mp4"), str(tmp_path / "clip.mp4"), *asked[2:]]) == 1
    assert "one clip" in capsys.readouterr().err


def test_what_gives_vectors_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="writes no text"), torch.no_grad():
        next(moments(nano("clip"), Video(film(2), fps=2), "is it red?"))
