"""Every field of a config is read, required or ignored for a reason; all that are wrong are named at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import polymodal
from polymodal.core.errors import ConfigError, PolymodalError
from polymodal.systems import TABLE
from polymodal.weights.fields import GENERIC, Fields
from polymodal.weights.pipeline import CLASS, INDEX, LIBRARY, read_configs, write_configs
from tests.nano import every_system, nano

# Fields that change no shape and no result of a load by themselves, or are checked elsewhere; any other wrong number
# or name has to show when the weights come.
SHAPELESS = {
    "num_attention_heads",
    "decoder_num_attention_heads",
    "layer_norm_eps",
    "hidden_act",
    "mask_ratio",
    "norm_pix_loss",
    "layerscale_value",
    "drop_path_rate",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "relative_attention_max_distance",
    "max_position_embeddings",  # of rotary positions
    "label2id",
    "vision_feature_layer",
    "num_heads",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "window_size",
    "dilation_growth_rate",
    "dilation_growth",
    "sampling_rate",  # of a codec without bandwidths
    "spec_size",
    "mask_time_length",
    "mask_time_min_masks",
    "mask_feature_length",
    "num_negatives",
    "tokens_per_second",
    "max_window_layers",
    # Of a U-Net and of its steps.
    "attention_head_dim",
    "norm_num_groups",
    "sample_size",
    "steps_offset",
    # Of a flow, and of what it is told and paints.
    "base_image_seq_len",
    "max_image_seq_len",
    "max_sequence_length",
    "default_side",
    "side",
    "frames",
    "num_frames",
    "text_tokens",
    "every",
    "max_distance",
    # Of frames, and of the norms over them.
    "width",
    "height",
    "group",
    "groups",
    # How a policy is wired.
    "action_dim",
    "horizon",
    "n_action_bins",
    "chunk_size",
    "num_inference_steps",
    "tokenizer_max_length",
    "max_state_dim",  # a state that is written as text; pi0 has a layer for it, see its own tests
    "state_width",
    "action_width",
    "characters",
    "prompt",
    # Of our own format.
    "context",
    "resolution",
    "steps",
    "taken",
    "n_heads",
    "n_groups",
    "num_train_timesteps",
    "image_id",
    "layers",
    "start",
    "pad",
}


PARTS = {"text_encoder", "audio_encoder", "decoder"}  # MusicGen calls its configs so
PIPELINE = {LIBRARY, CLASS}  # what the index says of a part; there is more where a config is read
# Of a T5 whose decoder is not there.
UNREAD = {(f"text_encoder{n}", "num_decoder_layers") for n in ("", "_2", "_3")}
UNREAD |= {("text_config", "decoder_config", field) for field in ("num_layers", "num_heads", "head_dim")}
UNREAD |= {("text_config", "decoder_config", "mlp_config", "hidden_dim")}
UNREAD |= {("backbone_config", "head_dim")}  # of attention that is as wide as what it reads
NAMING = {("model_type",), ("type",), (CLASS,)}  # LeRobot's configs have a type


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    return nano(name).save(tmp_path / "model")


def paths(config: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where each field of a config and of its parts is."""
    for field, value in config.items():
        part = isinstance(value, dict) and LIBRARY in value
        if field.endswith("_config") or (value.keys() > PIPELINE if part else field in PARTS):
            yield from paths(value, (*prefix, field))
        else:
            yield (*prefix, field)


def at(config: dict[str, Any], path: tuple[str, ...]) -> Any:
    for field in path:
        config = config[field]
    return config


def written(folder: Path) -> dict[str, Any]:
    """The config, of a pipeline with those of its parts."""
    if (folder / "config.json").is_file():
        return json.loads((folder / "config.json").read_text())
    return read_configs(folder, [path.parent.name for path in folder.glob("*/config.json")])


def rewritten(folder: Path, whole: dict[str, Any]) -> Path:
    if (folder / "config.json").is_file():
        (folder / "config.json").write_text(json.dumps(whole))
        return folder
    entries = {name: value for name, value in whole.items() if not isinstance(value, dict) or LIBRARY in value}
    index = write_configs(folder, entries) | {n: value for n, value in whole.items() if n not in entries}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def changed(folder: Path, changes: dict[tuple[str, ...], Any]) -> Path:
    """The folder with other values in its config."""
    whole = written(folder)
    for path, value in changes.items():
        at(whole, path[:-1])[path[-1]] = value
    return rewritten(folder, whole)


def handled(name: str, folder: Path) -> dict[tuple[str, ...], str]:
    """What the system says that it did with each field."""
    raw, fmt = written(folder), TABLE[name].resolve().formats["hf"]
    _, report = fmt.read(raw)
    where = {f"{INDEX if fmt.parts else 'config.json'}: {': '.join(path)}": path for path in paths(raw)}
    return {where[field]: what for field, what in report.items() if field in where}


def message(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        polymodal.load(folder)
    return str(error.value)


@every_system("config: every field is read, required or ignored for a reason")
def test_every_field_is_accounted_for(name: str, folder: Path) -> None:
    raw = written(folder)
    done = handled(name, folder)
    assert set(done) == set(paths(raw))
    assert all(what in ("read", "required") or what.startswith("ignored: ") for what in done.values())


@every_system("config: all wrong fields are named at once")
def test_every_wrong_type_is_named_at_once(name: str, folder: Path) -> None:
    wrong = {path: {"not": "this"} for path, what in handled(name, folder).items() if not what.startswith("ignored")}
    raw = written(folder)
    wrong = {path: ["nor this"] if isinstance(at(raw, path), dict) else value for path, value in wrong.items()}
    # Without it there is no system to ask, or another one; the index of a pipeline is read before its parts.
    wrong = {path: value for path, value in wrong.items() if path not in NAMING and path[-1] != CLASS}
    wrong.pop(("architectures",), None)
    text = message(changed(folder, wrong))
    missed = [path for path in wrong if not any(f"{': '.join(path)} is" in line for line in text.splitlines())]
    assert missed == []


@every_system("config: an unknown field is named")
def test_an_unknown_field_is_named_wherever_it_is(name: str, folder: Path) -> None:
    raw = written(folder)
    parts = {path[:-1] for path in paths(raw)}
    text = message(changed(folder, {(*part, "unheard_of"): 1e4 for part in parts}))
    assert text.count("the field unheard_of = 10000.0 is not understood") == len(parts)


@every_system("config: a required field has the one value that is supported")
def test_a_required_field_is_required(name: str, folder: Path) -> None:
    original = json.dumps(written(folder))
    for path, what in handled(name, folder).items():
        if what != "required" or path in NAMING:
            continue
        rewritten(folder, json.loads(original))
        value = at(json.loads(original), path)
        other = (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else "other"
        text = message(changed(folder, {path: other}))
        assert any(f"{path[-1]} is {other!r}; only " in line and repr(value) in line for line in text.splitlines())


@every_system("config: a wrong size is refused")
def test_a_wrong_size_is_refused(name: str, folder: Path) -> None:
    original = json.dumps(written(folder))
    for path, what in handled(name, folder).items():
        value = at(json.loads(original), path)
        if what != "read" or path[-1] in SHAPELESS or path in UNREAD or not value or type(value) is not int:
            continue
        rewritten(folder, json.loads(original))
        with pytest.raises(PolymodalError):
            polymodal.load(changed(folder, {path: 2 * value}))


@every_system("config: numbers that cannot be are refused")
@pytest.mark.parametrize("value", [0, -1, 10**30, float("nan"), float("inf"), True, None, "12", 1.5])
def test_a_size_that_cannot_be_is_refused(name: str, folder: Path, value: Any) -> None:
    read = [path for path, what in handled(name, folder).items() if what == "read"]
    sizes = [path for path in read if path[-1].endswith("size")] or [
        p for p in read if p[-1] in ("height", "width", "num_embeddings")
    ]
    assert sizes
    text = message(changed(folder, dict.fromkeys(sizes, value)))
    assert all(f"{': '.join(path)} is" in text for path in sizes), text


@every_system("config: what is ignored changes nothing")
def test_what_is_ignored_changes_nothing(name: str, folder: Path) -> None:
    ignored = {path: "anything" for path, what in handled(name, folder).items() if what.startswith("ignored")}
    fingerprint = polymodal.load(folder).fingerprint
    read = {path[-1] for path, what in handled(name, folder).items() if not what.startswith("ignored")}
    # Some systems support one value of these, or need it, also where a config does not say it.
    read |= {"id2label", "label2id", "tie_word_embeddings", "is_decoder", "add_cross_attention", "forced_bos_token_id"}
    generic = {(field,): "anything" for field in GENERIC if field not in read}
    assert polymodal.load(changed(folder, ignored | generic)).fingerprint == fingerprint


def test_a_name_with_a_slip_is_suggested() -> None:
    fields = Fields({"hiden_size": 7})
    fields.take("hidden_size", int)
    with pytest.raises(ConfigError, match=r"hidden_size is missing\. Did you mean 'hiden_size'"):
        fields.done()


def test_a_message_does_not_repeat_a_huge_value() -> None:
    fields = Fields({"a": "x" * 10**6, "b": list(range(10**5)), "c": {str(i): i for i in range(10**4)}})
    fields.require("a", "y")
    fields.take("b", int)
    with pytest.raises(ConfigError) as error:
        fields.done()
    assert len(str(error.value)) < 1000
