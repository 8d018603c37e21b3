"""The commands that ask a model about pictures, clips and sounds: ask, listen, caption, chat, evaluate."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli.common import WRITER, Commands, command, count, load_model, model_name, with_json, with_model
from polymodal.cli.show import bar, console, plain, print_json
from polymodal.core.errors import ConfigError, PolymodalError

if TYPE_CHECKING:
    from polymodal.core.chat import Chat
    from polymodal.samplers.autoregressive import Step
    from polymodal.serve.engine import Engine

HEARER = "Qwen/Qwen2-Audio-7B-Instruct"


def _ask(arguments: argparse.Namespace) -> int:
    if arguments.answer is not None and arguments.when is None:
        raise ConfigError("--answer says what --when looks for: polymodal ask film.mp4 QUESTION --when --answer TEXT")
    if arguments.when is not None:
        for name in ("show", "draw", "schema", "sampling"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name} is not for --when, which tells times and writes no answer")
    if not arguments.question.strip():
        raise ConfigError("the question is empty; it comes last, in one pair of quotes")
    if os.path.isfile(os.path.expanduser(arguments.question)):  # it would be asked, about one file less
        raise ConfigError(f"there is no question, the last argument is a file: {arguments.question}")
    model, settings = _writer(arguments)
    if arguments.when is not None:
        return _when(arguments, model)
    row = _answer(arguments, model, settings, arguments.files, arguments.question)
    if arguments.json:
        print_json(row)
    return 0


def _listen(arguments: argparse.Namespace) -> int:
    return _ask(arguments)


def _when(arguments: argparse.Namespace, model: Any) -> int:
    """Tells the times of one clip at which the answer is yes, or the one that is looked for."""
    from dataclasses import asdict

    from polymodal.core.sample import Sample, Video
    from polymodal.modalities.video import clock
    from polymodal.moments import moments, spans

    clips = [part for file in arguments.files for part in Sample.of(Path(file).expanduser()).parts]
    if len(clips) != 1 or not isinstance(clips[0], Video):
        raise ConfigError("--when looks through one clip: polymodal ask film.mp4 'Is there a red cup?' --when")
    with bar("looking", "frames") as show:
        every = list(
            moments(model, clips[0], arguments.question, answer=arguments.answer, fps=arguments.when, progress=show)
        )
    found = spans(every, gap=1.5 / arguments.when)
    if arguments.json:
        row = {"files": arguments.files, "question": arguments.question, "model": arguments.model}
        print_json(row | {"spans": [asdict(span) for span in found], "frames": [asdict(one) for one in every]})
        return 0
    for span in found:
        print(f"{clock(span.start)} to {clock(span.end)}   surest at {clock(span.best.time)} ({span.best.score:+.1f})")
    if not found:
        best = max(every, key=lambda one: one.score)
        print(f"never; the nearest to it was at {clock(best.time)} ({best.score:+.1f})")
    return 0


def _caption(arguments: argparse.Namespace) -> int:
    from polymodal.asking import CAPTION

    model, settings = _writer(arguments)
    rows: list[dict[str, Any]] = []
    failed = 0
    for file in arguments.files:
        if len(arguments.files) > 1 and not arguments.json:
            print(f"{plain(file)}: ", end="", flush=True)
        try:
            rows.append(_answer(arguments, model, settings, [file], arguments.prompt or CAPTION, first=len(rows)))
        except PolymodalError as error:  # the others are still described
            failed += 1
            if len(arguments.files) > 1 and not arguments.json:
                print(flush=True)  # the next one's name stands on a line of its own
            print("polymodal: " + plain(str(error), keep="\n"), file=sys.stderr)
    if arguments.json:
        print_json(rows)
    return 1 if failed else 0


def _answer(
    arguments: argparse.Namespace, model: Any, settings: Any, files: Sequence[str], question: str, first: int = 0
) -> dict[str, Any]:
    """Streams one answer, unless it is wanted as JSON; ``first`` numbers the pictures of ``--show`` and ``--draw``."""
    from polymodal.asking import marked, notation_of, seen, stream
    from polymodal.core.chat import Chat
    from polymodal.core.sample import Image

    parts = _parts(arguments, model, files)
    pictured = [part for part in parts if isinstance(part, Image)]
    if arguments.draw:
        notation_of(model)  # told before anything is computed
    if arguments.draw and (len(pictured) != 1 or len(files) != 1):
        raise ConfigError(f"--draw needs one picture, not {len(pictured)}: an answer does not say which one it marks")
    shown: list[dict[str, Any]] = []
    for number, part in enumerate(pictured if arguments.show else []):
        pictures, tokens = seen(model, part)
        names = [str(Path(arguments.show) / f"{first + number}-{tile}.png") for tile in range(len(pictures))]
        for picture, file in zip(pictures, names, strict=True):
            _save_png(picture, file)
        shown.append({"file": part.where, "tokens": tokens, "seen": names})
    steps = []
    for step in stream(model, Chat.of([*parts, question]), settings):
        steps.append(step)
        if not arguments.json:
            print(plain(step.text, keep="\n\t"), end="", flush=True)
    if not arguments.json:
        print()
        for each in shown:
            print(plain(f"{each['file']}: {each['tokens']} tokens from {', '.join(each['seen'])}"))
    text = "".join(step.text for step in steps)
    row: dict[str, Any] = {"files": list(files), "question": question, "answer": text, "finished": steps[-1].finished}
    row |= {"tokens": len(steps), "model": arguments.model} | ({"seen": shown} if shown else {})
    if arguments.draw:
        ids = [step.token for step in steps if step.token is not None]
        drawn, marks = marked(model, pictured[0], model.tokenizer.decode(ids, skip_special=False))
        place = str(Path(arguments.draw) / f"{first}-marked.png") if marks else None
        if place is not None:
            _save_png(drawn, place)
        row["marks"], row["drawn"] = [mark.to_json() for mark in marks], place
        if not arguments.json:
            told = f"{len(marks)} boxes and points, drawn in {place}" if marks else "no boxes or points in the answer"
            print("polymodal: " + plain(told), file=sys.stderr)
    return row


def _save_png(picture: Any, file: str) -> None:
    from polymodal.core.files import atomic_path

    with atomic_path(file) as temporary:
        picture.save(temporary, format="PNG")


def _parts(arguments: argparse.Namespace, model: Any, files: Sequence[str]) -> list[Any]:
    """Pictures and clips by their names; a clip is frames with their times for a model that reads no clips."""
    from polymodal.asking import watched
    from polymodal.core.chat import Chat
    from polymodal.core.sample import Sample

    parts = [Sample.of(Path(file).expanduser()).parts[0] for file in files]
    return list(watched(model, Chat.of(parts), arguments.sampling).turns[0].parts) if parts else []


def _chat(arguments: argparse.Namespace) -> int:
    from polymodal.asking import engine_of
    from polymodal.serve.engine import EngineConfig

    model, settings = _writer(arguments)
    with engine_of(model, EngineConfig(tokens=sys.maxsize)) as engine:  # one answer at a time: the context is the limit
        return _talk(arguments, model, settings, engine)


def _talk(arguments: argparse.Namespace, model: Any, settings: Any, engine: Engine) -> int:
    from polymodal.core.chat import Chat

    waiting = _parts(arguments, model, arguments.files)
    chat: Chat | None = None
    print("Type a message. /add FILE shows a picture with the next, /new starts over, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        command, _, rest = line.partition(" ")
        text = ""
        try:
            if command == "/new":
                chat, waiting = None, []
            elif command == "/add":
                waiting += _parts(arguments, model, [rest.strip()])
            elif line:
                turn: list[Any] = [*waiting, line]
                waiting = []  # a picture that cannot be read must not spoil the next message, too
                asked = Chat.of(turn) if chat is None else chat.ask(turn)
                try:
                    for step in _steps(model, asked, settings, engine):
                        text += step.text
                        print(plain(step.text, keep="\n\t"), end="", flush=True)
                except KeyboardInterrupt:  # enough of this answer; the conversation goes on
                    pass
                print()
                chat = asked.reply(text)
        except PolymodalError as error:  # the conversation goes on without this turn
            print(("\n" if text else "") + "polymodal: " + plain(str(error), keep="\n"), file=sys.stderr)


def _steps(model: Any, chat: Chat, settings: Any, engine: Engine) -> Iterator[Step]:
    """As `asking.stream`; the engine stops where the caller does."""
    from polymodal.asking import submit

    handle = submit(engine, model, chat, settings)
    try:
        yield from handle
    finally:
        handle.cancel()


def _writer(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model that a command asks, and how it is to answer."""
    from dataclasses import replace

    from polymodal.modalities.smart_resize import SmartResize

    model = _load_writer(arguments.model)
    if arguments.sampling is not None and isinstance(model.images, SmartResize):
        # It reads clips itself, times among them.
        model.images = replace(model.images, clips=replace(model.images.clips, sampling=arguments.sampling))
        arguments.sampling = None
    return model, _settings(arguments, model)


def _load_writer(name: str) -> Any:
    from polymodal.core.verbs import Generates
    from polymodal.tokenizers.language import LanguageTokenizer

    model = load_model(name)
    if not isinstance(model, Generates):
        raise ConfigError(
            f"{name} answers no questions: a {type(model).__name__} is no language model that sees or hears"
        )
    if not isinstance(model.tokenizer, LanguageTokenizer):
        raise ConfigError(f"{name} has no tokenizer.json, so it can neither read nor write text")
    return model


def _settings(arguments: argparse.Namespace, model: Any) -> Any:
    from polymodal.core.files import read_json
    from polymodal.samplers.autoregressive import Settings

    constraint = None
    if arguments.schema is not None:
        from polymodal.samplers.constraints import Constraint, Vocabulary

        words = Vocabulary(model.tokenizer.backend.to_str(), model.vocab_size, model.stop_ids)
        constraint = Constraint.json(read_json(arguments.schema), words)
    return Settings(
        max_new_tokens=arguments.max_tokens, temperature=arguments.temperature, top_p=arguments.top_p,
        seed=arguments.seed, constraint=constraint,
    )  # fmt: skip


def _evaluate(arguments: argparse.Namespace) -> int:
    from functools import partial

    from polymodal.evaluation import TASKS, World, run, side_of, task_of

    if arguments.list:
        rows = {name: {"asks": task.asks, "metric": task.measure, "wants": task.wants} for name, task in TASKS.items()}
        if arguments.json:
            print_json(rows)
        else:
            _print_tasks(rows)
        return 0
    if arguments.task is None:
        raise ConfigError("say which model and which task: polymodal evaluate MODEL TASK; --list shows the tasks")
    make = partial(
        task_of, arguments.task, data=[Path(p).expanduser() for p in arguments.data], limit=arguments.limit,
        images=Path(arguments.images).expanduser() if arguments.images else None, seed=arguments.seed,
    )  # fmt: skip
    # What is wrong with files is told before a model is loaded; what is drawn depends on what it sees.
    task = None if isinstance(TASKS.get(arguments.task), World) else make()
    name = model_name(arguments.model)
    model = _load_writer(name)
    out = Path(arguments.out or Path("evaluations", Path(name).name if Path(name).is_dir() else name)).expanduser()
    with bar("asking", "questions") as show:
        card, page = run(
            model, arguments.task, task or make(side=side_of(model)), out=out, seed=arguments.seed, progress=show
        )
    if arguments.json:
        print_json(json.loads(card.to_json()))
    else:
        _print_card(card, page)
    return 0


def _print_tasks(rows: dict[str, dict[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in ("task", "asks", "metric", "wants"):
        table.add_column(column, overflow="fold", style="bold" if column == "task" else "")
    for name, row in rows.items():
        table.add_row(name, *map(Text, row.values()))
    console().print(table)


def _print_card(card: Any, page: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    title = Text(plain(f"{card.task}, {card.metric}: {card.model}"), style="bold")
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("run", "score, 95 % interval", "gain of the pictures", "questions", "unparsed"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, run, gain in card.runs:
        gained = card.shown(gain) if gain else ""
        table.add_row(name, Text(card.shown(run.score)), Text(gained), f"{run.score.n:,}", f"{run.unparsed:,}")
    console().print(table)
    print(f"read by: {card.parser}")
    for note in card.notes:
        print(f"note: {plain(note)}")
    print(f"card: {plain(str(page))}, .json beside it")


def _with_settings(sub: argparse.ArgumentParser, writer: str = WRITER) -> None:
    with_model(sub, writer)
    sub.set_defaults(model=writer)
    sub.add_argument("--max-tokens", type=count, default=256, metavar="N", help="tokens at most (default: 256)")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the best (default: 0)")
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from this share (default: 1)")
    sub.add_argument("--seed", type=int, metavar="N", help="of the samples, to get the same answer again")
    sub.add_argument("--schema", metavar="FILE", help="a JSON schema that the answer must follow")
    sub.add_argument(
        "--sampling", type=_sampling, metavar="KIND:N",
        help="frames of a clip: uniform:8, fps:2, scene:8 (changes), motion:8 (dense where it moves)",
    )  # fmt: skip


def _with_pictures_out(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--show", metavar="DIR", help="write exactly the pixels and tiles that the model saw")
    sub.add_argument("--draw", metavar="DIR", help="write the picture with the boxes and points of the answer")


def _sampling(text: str) -> Any:
    from polymodal.modalities.video import Adaptive, Fps, SceneChange, Uniform

    kind, _, number = text.partition(":")
    kinds: dict[str, Callable[[float], Any]] = {
        "uniform": lambda n: Uniform(count=_whole(n)),
        "fps": lambda n: Fps(fps=n, least=1, multiple=1, spacing="open"),
        "scene": lambda n: SceneChange(most=_whole(n)),
        "motion": lambda n: Adaptive(count=_whole(n)),
    }
    try:
        return kinds[kind](float(number or 8))
    except (KeyError, ValueError, OverflowError, ConfigError):
        raise argparse.ArgumentTypeError(f"{text} is none of uniform:8, fps:2, scene:8, motion:8") from None


def _whole(number: float) -> int:
    if number != int(number):
        raise ValueError(number)
    return int(number)


def add(commands: Commands) -> None:
    """Declares the commands that ask a model."""
    sub = command(
        commands,
        "ask",
        _ask,
        "ask a vision-language model about pictures and clips",
        """\
The answer streams as it is written. Nothing of a prompt is ever cut: what does not fit is an error. A
model that reads no clips gets frames of them as pictures, each after its time. Boxes and points that
--draw writes, and that --json lists, are in pixels of the original picture, whatever the model saw.

examples:
  polymodal ask chart.png "Which bar is highest?" --model llava-hf/llava-1.5-7b-hf
  polymodal ask a.png b.png "What differs?" --model ~/models/qwen2-vl --json
  polymodal ask receipt.jpg "Read it" --schema receipt.schema.json --model ~/models/qwen2-vl
  polymodal ask photo.jpg "What is this?" --show seen/ --model ~/models/llava-next    what the model saw
  polymodal ask photo.jpg "Find the dog" --draw found/ --model ~/models/qwen2.5-vl
  polymodal ask clip.mp4 "When does it fall?" --sampling motion:12 --model ~/models/llava-next
  polymodal ask film.mp4 "Is there a dog?" --when --model ~/models/llava-next    the times of a yes
  polymodal ask film.mp4 "what shape is the red thing?" --when --answer heart    or of another answer""",
    )
    sub.add_argument(
        "files", nargs="*", metavar="FILE", help="pictures and clips, in the order in which the model reads them"
    )
    sub.add_argument("question", metavar="QUESTION")
    sub.add_argument(
        "--when", nargs="?", type=count, const=1, metavar="FPS",
        help="ask it of a clip frame by frame, 1 a second or FPS, and tell the times at which the answer is yes",
    )  # fmt: skip
    sub.add_argument("--answer", metavar="TEXT", help="with --when: tell the times of this answer in place of yes")
    _with_pictures_out(sub)
    _with_settings(sub)
    with_json(sub)

    sub = command(
        commands,
        "listen",
        _listen,
        "ask a model about sound",
        """\
examples:
  polymodal listen street.wav "What do you hear?"
  polymodal listen a.mp3 b.mp3 "Which one is louder?" --model ~/models/qwen2-audio --json
A model hears so many seconds at a time (Qwen2-Audio: 30); for what is said in a long recording there is
polymodal transcribe.""",
    )
    sub.add_argument("files", nargs="+", metavar="FILE", help="sounds, in the order in which the model hears them")
    sub.add_argument("question", metavar="QUESTION", help="what to ask about them, in one pair of quotes")
    sub.set_defaults(when=None, answer=None, show=None, draw=None)
    _with_settings(sub, HEARER)
    with_json(sub)

    sub = command(
        commands,
        "caption",
        _caption,
        "describe pictures, one by one",
        """\
examples:
  polymodal caption *.jpg --model llava-hf/llava-1.5-7b-hf
  polymodal caption a.png --prompt "caption en" --model google/paligemma-3b-mix-224""",
    )
    sub.add_argument("files", nargs="+", metavar="FILE")
    sub.add_argument("--prompt", metavar="TEXT", help="what to ask for (default: one sentence)")
    _with_pictures_out(sub)
    _with_settings(sub)
    with_json(sub)

    sub = command(
        commands,
        "chat",
        _chat,
        "talk with a model about pictures, in the terminal",
        """\
/add FILE shows a picture with the next message, /new starts over, Ctrl-D ends. Messages are also read
from a pipe, one a line.

examples:
  polymodal chat photo.jpg --model llava-hf/llava-1.5-7b-hf
  polymodal chat a.png b.png --model ~/models/qwen2-vl --temperature 0.7""",
    )
    sub.add_argument("files", nargs="*", metavar="FILE", help="pictures that go with the first message")
    _with_settings(sub)

    sub = command(
        commands,
        "evaluate",
        _evaluate,
        "ask a model the questions of a task and write a card that can be believed",
        """\
Each question is asked three times: with its picture, blind, and with the picture of another question.
A model that scores alike without looking has learned the questions. The card (Markdown and JSON) holds
the score with its interval, how answers were read, and how many could not be: those count as wrong.
Answers are kept as they come; an interrupted run goes on with the same command.

The worlds (questions, charts, documents) are drawn here, of words, fonts, styles and pairs of colour
and shape that training never sees, as large as the model sees pictures.

examples:
  polymodal evaluate --list
  polymodal evaluate ~/models/qwen2-vl questions --limit 200
  polymodal evaluate llava-hf/llava-1.5-7b-hf pope --data coco_pope_popular.json --images val2014/
  polymodal evaluate ~/models/qwen2-vl vqa --data questions.json annotations.json --images val2014/""",
    )
    sub.add_argument("model", nargs="?", metavar="MODEL", help="a folder or a Hub name")
    sub.add_argument("task", nargs="?", metavar="TASK", help="see --list")
    sub.add_argument("--list", action="store_true", help="list the tasks, and the data that each wants")
    sub.add_argument("--data", nargs="+", default=[], metavar="FILE", help="the task's own files, as --list says")
    sub.add_argument("--images", metavar="DIR", help="the folder of the pictures that they name")
    sub.add_argument("--limit", type=count, metavar="N", help="at most N questions, drawn with the seed")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: 0)")
    sub.add_argument("--out", metavar="DIR", help="cards and answers (default: evaluations/ and the model's name)")
    with_json(sub)
