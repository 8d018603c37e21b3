"""Prompts of chats against transformers: the same template and tokenizer files give the same ids."""
# ruff: noqa: E501  # templates, as they are written

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from polymodal.core.chat import Chat
from polymodal.tokenizers.chat import ChatTemplate, Placeholder
from polymodal.tokenizers.language import LanguageTokenizer
from tests.unit.test_language_tokenizer import CORPUS, IM, byte_level, sentencepiece, unigram

# ---- templates in the style of each family ----

QWEN = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}
{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate') }}{% endif %}
{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
GEMMA = """{{ bos_token }}{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}{%- set role = 'model' -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\\n'}}{%- endif -%}
"""
QWEN_VL = """{% set count = namespace(value=0) %}{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}{% set count.value = count.value + 1 %}{% if add_vision_id %}Picture {{ count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAVA = """{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}
{%- for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}
{%- if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}
{%- else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TURNS = ["<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"]
CALLS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

# name: tokenizer, template, named tokens, the placeholder of an image, whether the template goes through parts
FAMILIES: dict[str, tuple[Any, str, dict[str, str], str | None, bool]] = {
    "qwen2": (lambda: byte_level(IM, CALLS), QWEN, {"eos_token": "<|im_end|>"}, None, False),
    "llama3": (
        lambda: byte_level(HEADERS), LLAMA3, {"bos_token": HEADERS[0], "eos_token": "<|eot_id|>"}, None, False,
    ),
    "llama2": (
        lambda: sentencepiece(["<unk>", "<s>", "</s>"], ["<image>"], prefix=True),
        LLAMA2, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "<image>", False,
    ),
    "gemma": (
        lambda: sentencepiece(TURNS, ["\n\n", "\n\n\n", "▁▁"], prefix=False),
        GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}, "<start_of_image>", True,
    ),
    "phi3": (  # tokens that take the blanks behind them
        lambda: sentencepiece(["<unk>", "<s>", "</s>", *IM], [], prefix=True, rstrip=True),
        QWEN, {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}, None, False,
    ),
    "t5": (
        lambda: unigram(["<image>", *IM]), QWEN, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        "<image>", False,
    ),
    "qwen2-vl": (
        lambda: byte_level([*IM, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]),
        QWEN_VL, {"eos_token": "<|im_end|>"}, "<|image_pad|>", True,
    ),
    "llava": (
        lambda: sentencepiece(["<unk>", "<s>", "</s>"], ["<image>"], prefix=True),
        LLAVA, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "<image>", True,
    ),
}  # fmt: skip

TEXTS = [
    "hello",
    "",
    "  two  blanks\n\nand lines \n",
    "\n\n\n",
    "naïve e\u0301 \uff21\uff22\uff23 猫が好き 😀👩\u200d👧 \u200b",
    "{{ messages }} {% raise %} \\n \"quotes\" 'single'",
    "x < y > z | a <b> [c] <| >",
    "don't stop 1234567890 " * 20,
]


def awkward() -> list[list[dict[str, Any]]]:
    """Messages with texts only."""
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    chats.append([{"role": "system", "content": ""}, {"role": "user", "content": "hello"}])
    chats.append([{"role": "system", "content": " Be short. "}, {"role": "user", "content": "\thello"}])
    roles = itertools.cycle(["user", "assistant"])
    chats.append([{"role": next(roles), "content": text} for text in [*TEXTS, *reversed(TEXTS), "end"]])
    return chats


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any, Any]:
    """(name, their tokenizer, our tokenizer, our template), ours read from the files that theirs wrote."""
    make, template, names, image, _ = FAMILIES[request.param]
    theirs = PreTrainedTokenizerFast(tokenizer_object=make(), chat_template=template, **names)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    media = {"image": Placeholder(image, after="\n")} if image else {}
    return request.param, theirs, LanguageTokenizer.from_folder(folder), ChatTemplate.from_folder(folder, media=media)


def listed(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


@pytest.mark.parametrize("start", [True, False])
def test_ids_of_chats(family: tuple[str, Any, Any, Any], start: bool) -> None:
    name, theirs, tokenizer, template = family
    for messages in awkward():
        given = listed(messages) if FAMILIES[name][4] else messages
        text = theirs.apply_chat_template(given, tokenize=False, add_generation_prompt=start)
        ids = theirs.apply_chat_template(given, add_generation_prompt=start, return_dict=False)
        chat = Chat.of(messages)
        assert template.render(chat, add_generation_prompt=start) == text
        assert template.tokenize(chat, tokenizer, add_generation_prompt=start) == ids
        # The careful way, for chats with control tokens in them, gives the same where there are none.
        guard = tokenizer.guard([p.token for p in template.media.values()])
        assert guard.encode_prompt(text, plain=False) == ids


@pytest.mark.parametrize("family", ["gemma", "qwen2-vl", "llava"], indirect=True)
def test_ids_of_chats_with_many_images(family: tuple[str, Any, Any, Any]) -> None:
    name, theirs, tokenizer, template = family
    image, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    turns = [[image, text("one")], [text("a cup")], [text("two "), image, image, text("\nmore")], [text("ok")], [image]]
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": next(roles), "content": content} for content in turns]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ours = [
        {**m, "content": [{**p, "image": "cup.png"} if p["type"] == "image" else p for p in m["content"]]}
        for m in messages
    ]
    chat = Chat.of(ours)
    assert template.tokenize(chat, tokenizer) == ids
    assert ids.count(tokenizer.backend.token_to_id(FAMILIES[name][3])) == len(chat.images) == 4


@pytest.mark.parametrize("family", ["llama2", "t5"], indirect=True)
def test_an_image_in_a_template_of_strings(family: tuple[str, Any, Any, Any]) -> None:
    name, theirs, tokenizer, template = family
    content = [{"type": "image", "image": "cup.png"}, {"type": "text", "text": "What is it?"}]
    token = FAMILIES[name][3]
    given = [{"role": "user", "content": f"{token}\nWhat is it?"}]
    ids = theirs.apply_chat_template(given, add_generation_prompt=True, return_dict=False)
    assert template.tokenize(Chat.of([{"role": "user", "content": content}]), tokenizer) == ids


def test_ids_of_plain_text(family: tuple[str, Any, Any, Any]) -> None:
    _, theirs, tokenizer, _ = family
    for text in TEXTS:
        assert tokenizer.encode(text, special=True) == theirs.encode(text)
        ids = theirs.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, special=False) == ids
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for name in ("bos", "pad"):
        assert getattr(tokenizer, f"{name}_id") == getattr(theirs, f"{name}_token_id")
    assert tokenizer.eos_ids == (theirs.eos_token_id,)
    assert tokenizer.vocab_size == len(theirs)


def test_tool_calls_and_results(tmp_path: Path) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(IM, CALLS), chat_template=QWEN, eos_token="<|im_end|>")
    theirs.save_pretrained(tmp_path)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <é>", "days": [1, 2]}}}
    messages = [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": '{"rain": true}'},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "<think>hm</think> it rains <tool_call>"},  # the assistant's own marks
        {"role": "user", "content": "thanks"},
    ]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    tokenizer, template = LanguageTokenizer.from_folder(tmp_path), ChatTemplate.from_folder(tmp_path)
    assert template.tokenize(Chat.of(messages), tokenizer) == ids


def test_the_default_template_and_tools(tmp_path: Path) -> None:
    ours = LanguageTokenizer.train_bpe(CORPUS, 400)
    ours.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    template = ChatTemplate.of(ours, media={"image": Placeholder("<|image|>")})
    tools = [{"type": "function", "function": {"name": "f", "description": "naïve < & '", "parameters": {}}}]
    for messages in awkward():
        for given in ((), tools):
            ids = theirs.apply_chat_template(messages, tools=list(given) or None, return_dict=False)
            chat = Chat.of({"messages": messages, "tools": given})
            assert template.tokenize(chat, ours, add_generation_prompt=False) == ids
