"""Data sets that are really written to disk, read back as lessons; and what is wrong with the bad ones."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from polymodal.core.chat import Chat
from polymodal.core.errors import DataError, MediaError
from polymodal.core.sample import Image, Text, Video
from polymodal.data.readers import BadRows, Dataset, open_dataset, vqa
from polymodal.data.rows import DESCRIBE, Media, lesson, sample
from polymodal.data.stores import Parquet
from polymodal.modalities.image import decode

COLOURS = {"red.png": (255, 0, 0), "blue.png": (0, 0, 255), "sub/green.png": (0, 255, 0)}


def png(name: str) -> bytes:
    out = io.BytesIO()
    PILImage.new("RGB", (6, 4), COLOURS[name]).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in COLOURS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(name))
    return tmp_path


def plain(chat: Chat) -> list[tuple[str, list[Any]]]:
    """Turns as texts and the colours of pictures: what was written, whatever the format."""
    names = {colour: name for name, colour in COLOURS.items()}

    def said(part: Any) -> str:
        return part.text if isinstance(part, Text) else f"[{names[decode(part).getpixel((0, 0))]}]"

    return [(turn.role, [said(part) for part in turn.parts]) for turn in chat.turns]


ONE = [("user", ["[red.png]", "What colour?"]), ("assistant", ["red"])]
TWO = [
    ("user", ["Compare ", "[red.png]", "with", "[sub/green.png]"]), ("assistant", ["red, green"]),
    ("user", ["Sure?"]), ("assistant", ["Yes"]),
]  # fmt: skip
SYSTEM = [("system", ["Be brief."]), ("user", ["Hi <there>"]), ("assistant", ["Hello"])]


def turns(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]


def url(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode(png(name)).decode()


LLAVA = [
    {"id": 1, "image": "red.png", "conversations": turns("<image>\nWhat colour?", "red")},
    {
        "id": 2,
        "image": ["red.png", "sub/green.png"],
        "conversations": turns("Compare <image>\nwith\n<image>", "red, green", "Sure?", "Yes"),
    },
    {"id": 3, "system": "Be brief.", "conversations": turns("Hi <there>", "Hello")},
]
CHATML = [
    [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url("red.png")}}, {"type": "text", "text": "What colour?"},
            ],
        },
        {"role": "assistant", "content": "red"},
    ],
    {
        "images": [{"path": "red.png", "bytes": None}, {"bytes": png("sub/green.png"), "path": None}],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Compare "}, {"type": "image"}, "with", {"type": "image"}],
            },
            {"role": "assistant", "content": "red, green"},
            {"role": "user", "content": "Sure?", "name": None},
            {"role": "assistant", "content": [{"type": "text", "text": "Yes", "image": None}]},
        ],
    },
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi <there>"},
            {"role": "assistant", "content": "Hello"},
        ]
    },
]  # fmt: skip


def write_json(root: Path, rows: list[Any]) -> Path:
    (root / "data.json").write_text(json.dumps(rows))
    return root / "data.json"


def write_jsonl(root: Path, rows: list[Any]) -> Path:
    (root / "data.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    return root / "data.jsonl"


def members(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_tar(root: Path, rows: list[Any]) -> Path:
    files: dict[str, bytes] = {}
    for number, row in enumerate(rows):
        pictures = row.pop("image", []) if isinstance(row, dict) else []
        pictures = [pictures] if isinstance(pictures, str) else pictures
        files |= {f"a/{number:04}.{n}.PNG": png(name) for n, name in enumerate(pictures)}
        said = row | {"image": ["what it was called before"] * len(pictures)} if pictures else row
        files[f"a/{number:04}.json"] = json.dumps(said).encode()
        files[f"a/{number:04}.npy"] = b"is not read"
    return members(root / "data.tar", files)


def write_parquet(root: Path, rows: list[Any]) -> Path:
    """Pictures as HF data sets have them; structs fill what a row lacks with nulls."""
    table = []
    for row in rows:
        pictures = row.pop("image", None)
        pictures = [pictures] if isinstance(pictures, str) else pictures or []
        table.append({"images": [{"bytes": png(name), "path": name} for name in pictures], "system": None, **row})
    pq.write_table(pa.Table.from_pylist(table), root / "data.parquet", row_group_size=2)
    return root / "data.parquet"


@pytest.mark.parametrize("write", [write_json, write_jsonl, write_tar, write_parquet])
def test_llava_rows_in_every_file(write: Callable[[Path, list[Any]], Path], root: Path) -> None:
    rows = json.loads(json.dumps(LLAVA))
    data = open_dataset(write(root, rows))
    assert [plain(chat) for chat in data] == [ONE, TWO, SYSTEM]
    assert [plain(chat) for chat in data[1:]] == [TWO, SYSTEM]
    assert data.skipped == ()


@pytest.mark.parametrize("write", [write_json, write_jsonl])
def test_messages_and_parts(write: Callable[[Path, list[Any]], Path], root: Path) -> None:
    rows = [json.loads(json.dumps(row, default=lambda b: None)) for row in CHATML]
    rows[1]["images"][1] = {"url": url("sub/green.png")}
    assert [plain(chat) for chat in open_dataset(write(root, rows))] == [ONE, TWO, SYSTEM]


def test_rows_of_a_table_of_messages(root: Path) -> None:
    """Bytes of pictures, a lone struct column, and parts without a source."""
    said: list[Any] = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What colour?"}]}
    ]
    said.append({"role": "assistant", "content": [{"type": "text", "text": "red"}]})
    pq.write_table(pa.Table.from_pylist([{"messages": said, "images": CHATML[1]["images"][:1]}]), root / "m.parquet")
    assert plain(open_dataset(root / "m.parquet")[0]) == ONE
    table = [
        {
            "image": {"bytes": png("red.png"), "path": "x.png"}, "question": "What colour?",
            "answers": ["blue", "red", "red"],
        },
        {"image": None, "question": "2 + 2?", "answers": ["4"]},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(table), root / "q.parquet")
    data = open_dataset(root / "q.parquet")
    assert plain(data[0]) == ONE
    assert plain(data[1]) == [("user", ["2 + 2?"]), ("assistant", ["4"])]
    assert data.raw(0)["answers"] == ["blue", "red", "red"]
    pq.write_table(pa.table({"image": [png("red.png")], "text": ["a red picture"]}), root / "c.parquet")
    assert plain(open_dataset(root / "c.parquet")[0])[0] == ("user", ["[red.png]", DESCRIBE])
    pq.write_table(pa.table({"image": [png("red.png")]}), root / "p.parquet")
    assert len(open_dataset(root / "p.parquet", read=sample)[0].images) == 1


def test_sharegpt_lists_and_words(root: Path) -> None:
    rows = [
        turns("Hi", "Hello"),
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "Hello"}]},
    ]
    data = open_dataset(write_json(root, rows))
    assert plain(data[0]) == plain(data[1]) == [("user", ["Hi"]), ("assistant", ["Hello"])]


def test_a_marker_in_an_answer_is_text(root: Path) -> None:
    row = {"image": "red.png", "conversations": turns("<image>What colour?", "no <image>")}
    assert plain(open_dataset(write_json(root, [row]))[0])[1] == ("assistant", ["no <image>"])


def test_a_marker_in_a_part_is_a_place(root: Path) -> None:
    part = {"type": "text", "text": "<image>\nWhat colour?"}
    for text in (part, part["text"]):
        row = {"image": "red.png", "messages": [{"role": "user", "content": [text]}, CHATML[0][1]]}
        row["messages"][1] = {"role": "assistant", "content": [{"type": "text", "text": "red <image>"}]}
        assert plain(open_dataset(write_json(root, [row]))[0]) == [ONE[0], ("assistant", ["red <image>"])]
    alone = {"messages": [{"role": "user", "content": [part]}, CHATML[0][1]]}
    with pytest.raises(BadRows, match="more places for images"):
        open_dataset(write_json(root, [alone]))


def test_tool_calls_pass(root: Path) -> None:
    call = {"id": "1", "function": {"name": "look", "arguments": "{}"}}
    rows = [
        {
            "tools": [{"name": "look"}],
            "messages": [
                {"role": "user", "content": "Look"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "a cup", "tool_call_id": "1"},
                {"role": "assistant", "content": "A cup"},
            ],
        }
    ]
    (chat,) = open_dataset(write_json(root, rows))
    assert chat.turns[1].calls[0].name == "look"
    assert chat.tools == ({"name": "look"},)


def test_media_without_a_place_come_first(root: Path) -> None:
    row = LLAVA[0] | {"conversations": turns("What colour?", "red")}
    assert plain(open_dataset(write_json(root, [row]))[0]) == ONE


def test_clips(root: Path) -> None:
    (root / "clip.mp4").write_bytes(b"not looked at")
    row = {"video": "clip.mp4", "conversations": turns("<video>\nWhat happens?", "Nothing")}
    first = open_dataset(write_json(root, [row]))[0].turns[0].parts[0]
    assert isinstance(first, Video)
    assert first.source == root / "clip.mp4"


def test_coco_captions(root: Path) -> None:
    content = {
        "images": [{"id": 7, "file_name": "red.png"}, {"id": 8, "file_name": "sub/green.png"}],
        "annotations": [
            {"id": 1, "image_id": 8, "caption": "a green one"}, {"id": 2, "image_id": 7, "caption": "a red one"},
            {"id": 3, "image_id": 8, "caption": "all green"},
        ],
    }  # fmt: skip
    (root / "captions.json").write_text(json.dumps(content))
    data = open_dataset(root / "captions.json", read=partial(lesson, prompt="caption en"))
    assert plain(data[0]) == [("user", ["[sub/green.png]", "caption en"]), ("assistant", ["a green one"])]
    assert [data.raw(i)["image_id"] for i in range(3)] == [8, 7, 8]
    pairs = open_dataset(root / "captions.json", read=sample)
    assert [pair.texts[0].text for pair in pairs] == ["a green one", "a red one", "all green"]
    assert all(len(pair.images) == 1 for pair in pairs)
    (root / "instances.json").write_text(json.dumps(content | {"annotations": [{"image_id": 7, "bbox": []}]}))
    with pytest.raises(BadRows, match=r"take the captions_\*.json"):
        open_dataset(root / "instances.json")


def test_vqa(root: Path) -> None:
    (root / "COCO_t_000000000007.jpg").write_bytes(png("red.png"))
    people = ["red"] * 6 + ["crimson"] * 4
    asked = {
        "data_subtype": "t",
        "questions": [{"question_id": n, "image_id": 7, "question": "What colour?"} for n in (1, 2)],
    }
    truth = {"question_id": 1, "answers": [{"answer": said, "answer_id": n} for n, said in enumerate(people)]}
    (root / "q.json").write_text(json.dumps(asked))
    (root / "a.json").write_text(json.dumps({"annotations": [truth]}))
    data = vqa(root / "q.json", root / "a.json", root, prompt="{question}", skip_bad=True)
    assert [plain(chat) for chat in data] == [ONE]
    assert data.raw(0)["answers"] == people
    assert len(data.skipped) == 1
    assert "annotation is missing" in data.skipped[0]
    with pytest.raises(DataError, match=r"readers\.vqa"):
        open_dataset(root / "q.json")


def test_img2dataset_tars_and_several_files(root: Path) -> None:
    metadata = json.dumps({"url": "http://x", "caption": "of the page"}).encode()
    shards = root / "shards"
    shards.mkdir()
    for number, name in enumerate(("red.png", "blue.png")):
        files = {f"{number}.png": png(name), f"{number}.txt": name.encode(), f"{number}.json": metadata}
        members(shards / f"{number}.tar", files)
    data = open_dataset(shards, read=sample)
    assert [s.texts[0].text for s in data] == ["red.png", "blue.png"]
    assert [decode(s.images[0]).getpixel((0, 0)) for s in data] == [COLOURS["red.png"], COLOURS["blue.png"]]
    assert data[1].images[0].where == "1.tar:'1' png"
    (shards / "more.jsonl").write_text("{}")
    with pytest.raises(DataError, match="several kinds"):
        open_dataset(shards)


# ---- what is wrong


BAD: dict[str, tuple[Any, str]] = {
    "outside": ({"image": "../x.png", "conversations": turns("<image>", "a")}, "leaves the folder"),
    "absolute": ({"image": "/etc/passwd", "conversations": turns("<image>", "a")}, "leaves the folder"),
    "windows": ({"image": "C:\\x.png", "conversations": turns("<image>", "a")}, "leaves the folder"),
    "backslash": ({"image": "..\\x.png", "conversations": turns("<image>", "a")}, "leaves the folder"),
    "nul": ({"image": "a\0.png", "conversations": turns("<image>", "a")}, "leaves the folder"),
    "address": ({"image": "https://x.org/a.png", "conversations": turns("<image>", "a")}, "is not downloaded"),
    "missing": ({"image": "no.png", "conversations": turns("<image>", "a")}, "'no.png' is not in"),
    "long": ({"image": "n" * 5000, "conversations": turns("<image>", "a")}, "is not in"),
    "bytes": ({"image": {"bytes": "/etc/passwd"}, "conversations": turns("<image>", "a")}, "are bytes, not '/etc"),
    "number": ({"image": 7, "conversations": turns("<image>", "a")}, "a path, a data: URL or bytes"),
    "twice": (
        {
            "image": "red.png",
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "blue.png"}]},
                *CHATML[2]["messages"][2:],
            ],
        },
        "1 have no place",
    ),
    "no picture": ({"conversations": turns("<image>\nWhat?", "a")}, "more places for images than"),
    "no place": ({"image": ["red.png"] * 2, "conversations": turns("<image>", "a")}, "1 have no place"),
    "base64": ({"image": "data:image/png;base64,?", "conversations": turns("<image>", "a")}, "not valid base64"),
    "file:": ({"image": "file:///etc/passwd", "conversations": turns("<image>", "a")}, "is not downloaded"),
    "last": ({"conversations": turns("Hi")}, "the assistant last"),
    "first": ({"conversations": turns("Hi", "Hello")[1:]}, "the assistant last"),
    "nobody": ({"conversations": [{"from": "humn", "value": "a"}]}, "Did you mean 'human'"),
    "unhashable": ({"conversations": [{"from": {}, "value": "a"}]}, "nobody is called"),
    "silent": ({"conversations": [{"from": "human", "value": None}]}, "says nothing"),
    "weight": ({"messages": [{"role": "user", "content": "a", "weight": 0}]}, "'weight' is not known"),
    "empty": ({"messages": []}, "not empty"),
    "text": ({"text": "a story without a picture"}, "no medium"),
    "answers": ({"question": "What?", "answers": []}, "a list that is not empty"),
    "else": ({"prompt": "a", "response": "b"}, "it has prompt, response"),
    "kind": ("a", "should be an object"),
}


def test_all_bad_rows_are_reported_together(root: Path) -> None:
    rows = [LLAVA[0], *(row for row, _ in BAD.values()), LLAVA[2]]
    path = write_jsonl(root, rows)
    path.write_text(path.read_text() + '\n{"conversations": [\n')
    with pytest.raises(BadRows, match=f"{len(BAD) + 1} of {len(BAD) + 3} rows") as caught:
        open_dataset(path)
    assert "root" in str(caught.value)
    assert "skip_bad=True" in str(caught.value)
    reported = [*BAD.values(), (None, "not JSON")]
    for number, (problem, (_, expected)) in enumerate(zip(caught.value.problems, reported, strict=True)):
        assert problem.startswith(
            f"data.jsonl:{2 * number + 3 if number < len(BAD) else problem.split(':')[1].strip()}"
        )
        assert expected.lower() in problem.lower()
        assert len(problem) < 600
    data = open_dataset(path, skip_bad=True)
    assert [plain(chat) for chat in data] == [ONE, SYSTEM]
    assert data.skipped == caught.value.problems


def test_a_data_set_without_a_good_row_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match="no good row"):
        open_dataset(write_json(root, [{}]), skip_bad=True)
    with pytest.raises(DataError, match="there is no row"):
        open_dataset(write_json(root, []))


def test_many_bad_rows_make_a_short_message(root: Path) -> None:
    with pytest.raises(BadRows, match="and 450 more") as caught:
        open_dataset(write_json(root, [{}] * 500))
    assert len(caught.value.problems) == 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(
            ["messages", "conversations", "role", "from", "content", "value", "image", "images", "video", "type", "url",
             "path", "bytes", "text", "tools", "tool_calls", "system", "caption", "question", "answer", "answers"]
        ),
        inner | st.sampled_from(["user", "assistant", "human", "gpt", "image", "image_url", "<image>"]),
        max_size=5,
    ),
    max_leaves=12,
)  # fmt: skip


PATHS = st.sampled_from(["/x.png", "../x.png", "a/../../x.png", "C:\\x.png", "x.png", "a/x.png", url("red.png")])
NAMED = st.sampled_from(["bytes", "path", "url", "image", "base64"])
MEDIUM = st.recursive(
    PATHS | JSON | st.binary(max_size=4), lambda inner: st.dictionaries(NAMED, inner, min_size=1, max_size=2)
)


@given(row=JSON, medium=MEDIUM, kind=st.sampled_from(["image", "image_url", "video"]))
def test_any_row_is_a_lesson_or_an_error(row: Any, medium: Any, kind: str) -> None:
    """And its media are bytes or files below the root, whatever a row of strangers says."""
    root = Path("/nowhere")
    parts = [{"type": kind, kind: medium}, {"type": kind, **medium} if isinstance(medium, dict) else medium, "What?"]
    said = [{"role": "user", "content": parts[:1]}, {"role": "user", "content": parts[1:]}, CHATML[0][1]]
    for each in (row, {"image": medium, "caption": "a"}, {"messages": said[0::2]}, {"messages": said[1:]}):
        for read in (lesson, sample):
            with contextlib.suppress(DataError, MediaError):
                read(each, Media(root=root, checking=True))
            with contextlib.suppress(DataError, MediaError):
                found = read(each, Media(root=root))
                turns = found.turns if isinstance(found, Chat) else [found]
                for part in [part for turn in turns for part in turn.parts if not isinstance(part, Text)]:
                    below = isinstance(part.source, Path) and root in part.source.parents
                    assert isinstance(part.source, bytes) or (below and ".." not in part.source.parts)


def test_files_that_are_no_data_sets(root: Path) -> None:
    for name, content, expected in (
        ("a.json", b"{", "not valid JSON"), ("b.json", b'{"a": 1}\n{"a": 2}', 'kind="jsonl"'),
        ("c.json", b"7", "list of rows"),
        ("d.csv", b"a,b", "no kind of data set"), ("e.tar", b"not a tar" * 200, "is no tar"),
        ("f.parquet", b"PAR1" + bytes(99) + b"PAR1", "no parquet file"), ("g.jsonl", b"", "there is no row"),
        ("h.parquet", b"", "no parquet file"), ("i.tar", b"", "is no tar"),
    ):  # fmt: skip
        (root / name).write_bytes(content)
        with pytest.raises(DataError, match=expected):
            open_dataset(root / name)
    for name in ("no.json", "no.jsonl", "no.tar", "no.parquet"):
        with pytest.raises(DataError, match=r"no\."):
            open_dataset(root / name)
    (root / "rows").write_text(json.dumps(LLAVA[2]))
    assert len(open_dataset(root / "rows", kind="jsonl")) == 1
    with pytest.raises(DataError, match="Did you mean 'jsonl'"):
        open_dataset(root / "rows", kind="jsnl")


def test_a_compressed_tar_says_what_to_do(root: Path) -> None:
    with tarfile.open(root / "a.tar", "w:gz") as tar:
        tar.add(root / "red.png", "0.png")
    with pytest.raises(DataError, match="decompressed once"):
        open_dataset(root / "a.tar", read=sample)


@pytest.mark.parametrize("damage", ["header", "zeros", "two", "tail"])
def test_rows_after_what_looks_like_the_end_of_a_tar_are_missed(damage: str, root: Path) -> None:
    path = members(root / "a.tar", {f"{n}.{end}": png("red.png") for n in range(3) for end in ("png", "npy")})
    content = path.read_bytes()
    expected = 1024  # the header of the second member
    if damage == "header":
        content = content[:expected] + b"x" * 512 + content[expected + 512 :]
    elif damage == "zeros":
        content = content[:expected] + bytes(512) + content[expected + 512 :]
        expected += 512
    else:
        expected = len(content)
        content += content if damage == "two" else b"x"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"damaged, or several tars in one, at byte {expected:,}"):
        open_dataset(path, read=sample, skip_bad=True)


def test_a_tar_of_a_whole_folder_names_the_folder_too(root: Path) -> None:
    """As `tar cf a.tar -C folder .` and `shutil.make_archive` write it: "./", "./deep/", "./deep/0.png"."""
    folder = root / "packed"
    (folder / "deep").mkdir(parents=True)
    for place in (folder, folder / "deep"):
        (place / "0.png").write_bytes(png("red.png"))
        (place / "0.txt").write_text("red")
    data = open_dataset(shutil.make_archive(str(root / "a"), "tar", folder))
    assert [plain(chat)[1] for chat in data] == [("assistant", ["red"])] * 2


def test_a_row_of_a_tar_without_its_picture_is_bad(root: Path) -> None:
    """It would be learned blind."""
    row = {"images": ["a.png", "b.heic"], "conversations": turns("What?", "red")}
    lone = {"image": "a.png", "conversations": turns("What?", "red")}
    files = {"0.json": row, "1.json": lone, "2.json": lone | {"image": None}}
    files |= {"3.json": lone, "4.json": {"video": "a.mp4", "caption": "red"}}
    there = {"0.png": png("red.png"), "3.png": png("red.png"), "4.png": png("red.png")}
    members(root / "a.tar", {name: json.dumps(each).encode() for name, each in files.items()} | there)
    data = open_dataset(root / "a.tar", skip_bad=True)
    assert [problem.partition(": ")[0] for problem in data.skipped] == ["a.tar:'0'", "a.tar:'1'", "a.tar:'4'"]
    assert all("media that the archive does not hold: ['a." in problem for problem in data.skipped)
    assert [len(chat.images) for chat in data] == [0, 1]


def test_hostile_members_are_refused(root: Path) -> None:
    path = members(
        root / "a.tar", {"0.png": png("red.png"), "0.txt": b"red", "../1.txt": b"a", "/2.txt": b"a", ".hidden": b""}
    )
    with tarfile.open(path, "a") as tar:
        for name, kind in (("3.png", tarfile.SYMTYPE), ("4.txt", tarfile.CHRTYPE), ("5.txt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("6.txt"))
        tar.addfile(tarfile.TarInfo("\x1b[31m7.txt"))
    with pytest.raises(BadRows) as caught:
        open_dataset(path)
    found = [problem.partition(": ")[2] for problem in caught.value.problems]
    expected = ["leads out"] * 2 + ["is a link"] * 3 + ["two members", "no medium"]
    for want, problem in zip(expected, found, strict=True):
        assert want in problem
    assert "\x1b" not in str(caught.value)
    assert [plain(chat)[1] for chat in open_dataset(path, skip_bad=True)] == [("assistant", ["red"])]


def test_a_member_of_negative_size_does_not_lead_back(root: Path) -> None:
    path = members(root / "a.tar", {"0.txt": b"x" * 600})
    content = bytearray(path.read_bytes())
    content[124:136] = (2**96 - 512).to_bytes(12, "big")  # base 256, negative
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    with pytest.raises(DataError, match="cut off"):
        open_dataset(path, read=sample)


@pytest.mark.parametrize("write", [write_tar, write_parquet])
def test_truncated_files_are_refused(write: Callable[[Path, list[Any]], Path], root: Path) -> None:
    path = write(root, json.loads(json.dumps(LLAVA)))
    content = path.read_bytes()
    end = len(content.rstrip(b"\0")) if path.suffix == ".tar" else len(content) - 1
    for length in [*range(0, end, 97), end]:
        path.write_bytes(content[:length])
        with pytest.raises(DataError):
            open_dataset(path)


@pytest.mark.parametrize("write", [write_tar, write_parquet])
@pytest.mark.parametrize("seed", range(5))
def test_flipped_bytes_are_errors_or_other_data(
    write: Callable[[Path, list[Any]], Path], seed: int, root: Path
) -> None:
    path = write(root, json.loads(json.dumps(LLAVA)))
    content, rng = path.read_bytes(), np.random.default_rng(seed)
    for _ in range(20):
        broken = bytearray(content)
        for place in rng.integers(len(content), size=3):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        with contextlib.suppress(DataError, MediaError):
            for chat in open_dataset(path, skip_bad=True):
                [decode(picture) for picture in chat.images]


def test_a_file_that_changes_later_is_noticed(root: Path) -> None:
    path = write_tar(root, json.loads(json.dumps(LLAVA)))
    data: Dataset[Chat] = open_dataset(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"data.tar:'a/0000'.* shorter"):
        data[0]


def table(root: Path, kind: pa.DataType, values: list[Any]) -> Path:
    said = pa.array(["red"] * len(values))
    pq.write_table(pa.table({"image": pa.array(values, kind), "caption": said}), root / "t.parquet")
    return root / "t.parquet"


STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
WIDER = pa.struct({"bytes": pa.large_binary(), "path": pa.string(), "width": pa.int32()})


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "kind", [pa.binary(), STRUCT, WIDER, pa.list_(STRUCT), pa.large_list(WIDER), pa.list_(pa.binary()),
             pa.struct({"bytes": pa.binary()})]
)  # fmt: skip
def test_missing_pictures_of_a_table_are_bad_rows(kind: pa.DataType, whole: bool, root: Path) -> None:
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    each: list[Any] = [png("red.png")] if whole else [png("red.png"), None]
    if pa.types.is_struct(inner):
        fields = {field.name: None for field in inner}
        each = [fields | {"bytes": content} for content in each]
        if not whole and "path" in fields:
            each += [fields | {"path": "blue.png"}, fields | {"path": "no.png"}]
    path = table(root, kind, [[one] for one in each] if inner is not kind else each)
    data = open_dataset(path, skip_bad=True)
    assert [plain(chat)[0][1][0] for chat in data] == ["[red.png]", "[blue.png]"][: len(data)]
    assert len(data) == (2 if len(each) == 4 else 1)
    assert len(data.skipped) == len(each) - len(data)


def test_checking_leaves_whole_pictures_where_they_are(root: Path) -> None:
    for kind in (STRUCT, WIDER, pa.list_(STRUCT), pa.large_list(WIDER)):
        one = {"bytes": b"a picture " * 40, "path": "a.png"}
        path = table(root, kind, [one if pa.types.is_struct(kind) else [one, one]])
        assert "a picture" not in str(list(Parquet(path).scan()))
        assert "a picture" in str(Parquet(path).row(0))


def test_a_table_that_unpacks_to_far_more_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(root, STRUCT, [{"bytes": png("red.png"), "path": "x" * 10_000}] * 300)  # said once, meant 300 times
    monkeypatch.setattr("polymodal.data.stores._MAX_GROUP", 2**21)
    assert path.stat().st_size < 2**16
    with pytest.raises(DataError, match="smaller row_group_size"):
        open_dataset(path)
    big = [{"bytes": png("red.png") + bytes(10_000), "path": "x.png"}] * 300
    data = open_dataset(table(root, STRUCT, big))
    with pytest.raises(DataError, match="smaller row_group_size"):
        data[0]
    monkeypatch.setattr("polymodal.data.stores._MAX_ROWS", 299)
    with pytest.raises(DataError, match="smaller row_group_size"):
        open_dataset(root / "t.parquet")


def test_pictures_are_read_when_a_row_is(root: Path) -> None:
    """A picture that is broken is no bad row: nobody has looked at it."""
    (root / "red.png").write_bytes(b"broken")
    data = open_dataset(write_json(root, LLAVA[:1]))
    with pytest.raises(MediaError):
        decode(data[0].images[0])
    assert isinstance(data[0].images[0], Image)
    with pytest.raises(IndexError):
        data[1]
