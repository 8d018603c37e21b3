"""The certificate of a checkpoint: what was checked, and to how many digits it agrees with the public implementation.

>>> from polymodal.verify import verify
>>> print(verify("polymodal/nano-clip").text())
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import math
import platform
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from polymodal import __version__
from polymodal.api import identify
from polymodal.core.batch import Batch
from polymodal.core.errors import PolymodalError, WeightsError
from polymodal.core.files import file_hash
from polymodal.core.verbs import Generates, Trains
from polymodal.nn.skeleton import skeleton
from polymodal.systems.base import System
from polymodal.weights.fields import FieldsError
from polymodal.weights.files import Checkpoint
from polymodal.weights.format import Format
from polymodal.weights.hub import resolve
from polymodal.weights.rules import Plan, unplan

ROWS = 2  # of the random inputs: enough for a contrast, and the reference holds every attention matrix
# The largest difference from the reference that counts as agreement, relative to the largest value; two correct
# implementations in fp32 are apart by 1e-7 to 1e-5, more with depth, a wrong one by 1e-2 and more.
TOLERANCES = {"output": 3e-5, "loss": 3e-5, "gradients": 2e-4}
# A gradient that is zero in exact arithmetic (that of a key's bias) is nothing but rounding: below this share of the
# largest gradient, differences are measured against that share.
NOISE = 1e-2
DATA = (".safetensors", ".json", ".txt", ".model")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at; ``error`` is a largest difference, relative to the largest value."""

    name: str
    outcome: Literal["passed", "failed", "not run"]
    detail: str = ""
    problems: tuple[str, ...] = ()
    error: float | None = None

    @property
    def digits(self) -> float | None:
        """Decimal digits that agree, at most the 7.2 that fp32 has."""
        if self.error is None or math.isnan(self.error):
            return None
        return round(-math.log10(max(self.error, 2.0**-24)), 1)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What `verify` found."""

    name: str
    system: str | None  # the class that reads it, if any does
    format: str | None
    parameters: int
    dtypes: Mapping[str, int]  # of the tensors in the files: how many of each
    dropped: Mapping[str, str]  # tensors that are not used, and why
    config: Mapping[str, str]  # each field of the config: read, required, or ignored for a reason
    files: Mapping[str, str]  # SHA-256
    checks: tuple[Check, ...]
    versions: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether nothing that was run has failed."""
        return not any(check.outcome == "failed" for check in self.checks)

    @property
    def problems(self) -> list[str]:
        return [problem for check in self.checks for problem in check.problems]

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for `json.dumps`."""
        checks = [asdict(check) | {"digits": check.digits} for check in self.checks]
        for check in checks:
            if check["error"] is not None and not math.isfinite(check["error"]):
                check["error"] = None  # JSON has no word for it; the check has failed and says so
        return {"ok": self.ok} | asdict(self) | {"checks": checks}

    def text(self) -> str:
        """A report to read."""
        what = f"{self.system}, format {self.format}, {self.parameters:,} parameters" if self.system else "unreadable"
        lines = [f"{self.name}: {what}", ""]
        width = max(len(check.name) for check in self.checks)
        lines += [f"  {check.outcome:<8} {check.name:<{width}}  {check.detail}".rstrip() for check in self.checks]
        if self.problems:
            lines += ["", f"Problems ({len(self.problems)}):", *(f"  - {problem}" for problem in self.problems)]
        if self.dropped:
            lines += ["", "Tensors that are not used:", *(f"  {n}: {reason}" for n, reason in self.dropped.items())]
        if self.config:
            lines += ["", "Fields of the config:", *(f"  {field}: {done}" for field, done in self.config.items())]
        lines += ["", "Files (SHA-256):", *(f"  {digest}  {file}" for file, digest in self.files.items())]
        lines += ["", "With " + ", ".join(f"{package} {v}" for package, v in self.versions.items())]
        return "\n".join([*lines, f"Result: {'ok' if self.ok else 'NOT ok'}"])


def verify(name: str | Path, revision: str | None = None) -> Certificate:
    """Checks a checkpoint from its files to its gradients. A bad one gives a certificate that is not ok.

    The reference implementation is loaded by its own ``from_pretrained`` and given the same random inputs; where it is
    not installed, the certificate says so.

    Raises:
        ConfigError: nothing has this name, or the Hub cannot be reached.
    """
    folder = resolve(name, revision)
    facts = _Facts()
    checks = tuple(_checks(folder, facts))
    files = {p.relative_to(folder).as_posix(): file_hash(p) for p in _data(folder, facts.parts)}
    versions = {"polymodal": __version__, **{package: version(package) for package in ("torch", "safetensors")}}
    versions |= {p: version(p) for p in facts.packages} | {"Python": platform.python_version()}
    return Certificate(
        name=str(name),
        system=facts.system,
        format=facts.format,
        parameters=facts.parameters,
        dtypes=facts.dtypes,
        dropped=facts.dropped,
        config=facts.config,
        files=files,
        checks=checks,
        versions=versions | {"on": platform.platform()},
    )


class _Facts:
    """What the checks learn on their way."""

    def __init__(self) -> None:
        self.system: str | None = None
        self.format: str | None = None
        self.parameters = 0
        self.dtypes: dict[str, int] = {}
        self.dropped: dict[str, str] = {}
        self.config: dict[str, str] = {}
        self.packages: list[str] = []
        self.parts: Set[str] = frozenset()  # folders of a pipeline


def _data(folder: Path, parts: Set[str]) -> list[Path]:
    """What a checkpoint is made of: its own files, and those of its parts; a name that leads elsewhere is no part."""
    folders = [folder, *(p for p in folder.iterdir() if p.name in parts and p.is_dir())]
    return sorted(p for each in folders for p in each.iterdir() if p.suffix in DATA and p.is_file())


def _passed(name: str, detail: str) -> Check:
    return Check(name=name, outcome="passed", detail=detail)


def _failed(name: str, problems: PolymodalError | Sequence[str]) -> Check:
    if isinstance(problems, WeightsError | FieldsError):
        problems = problems.problems
    elif isinstance(problems, PolymodalError):
        problems = [str(problems)]
    count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
    return Check(name=name, outcome="failed", detail=count, problems=tuple(problems))


def _judged(name: str, problems: Sequence[str], detail: str) -> Check:
    return _failed(name, problems) if problems else _passed(name, detail)


def _checks(folder: Path, facts: _Facts) -> Iterator[Check]:
    """One check after the other, as far as each has what it needs."""
    try:
        cls, format_name = identify(folder)
        facts.system, facts.format = cls.__name__, format_name
        fmt = cls.formats[format_name]
        raw = fmt.config(folder)
        facts.parts = raw.keys() if fmt.parts else frozenset()
        config, facts.config = fmt.read(raw)
        with skeleton():
            model = cls(config)
    except PolymodalError as error:
        yield _failed("config", error)
        return
    facts.parameters = sum(p.numel() for p in model.parameters())
    done = Counter(what.split(":")[0] for what in facts.config.values())
    yield _passed("config", f"{len(facts.config)} fields: " + ", ".join(f"{n} {what}" for what, n in done.items()))
    try:
        checkpoint = fmt.open(folder, raw)
    except PolymodalError as error:
        yield _failed("files", error)
        return
    with checkpoint:
        theirs = checkpoint.meta()
        todo = model.plan(fmt, theirs)
        facts.dtypes = dict(Counter(str(t.dtype).removeprefix("torch.") for t in theirs.values()))
        facts.dropped = todo.dropped
        kinds = ", ".join(f"{count} {dtype}" for dtype, count in facts.dtypes.items())
        detail = f"{len(theirs)} tensors ({kinds}) fill {len(model.state_dict())} of ours; {len(todo.dropped)} not used"
        yield _judged("names, shapes, dtypes", todo.problems, detail)
        yield _judged("finite", _infinite(checkpoint, theirs), "every value of every tensor")
        if todo.problems:
            return
        try:
            system = cls.from_folder(folder, format_name)
        except PolymodalError as error:
            yield _failed("loading", error)
            return
        yield _passed("loading", "in fp32")
        yield _processors(system)
        yield _round_trip(system, fmt, todo, checkpoint)
    yield from _against_reference(system, folder, format_name, facts)


def _infinite(checkpoint: Checkpoint, names: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for name, tensor in names.items():
        if tensor.is_floating_point():
            bad = int((~checkpoint.read(name).float().isfinite()).sum())
            if bad:
                problems.append(f"{name} has {bad:,} values that are NaN or infinite")
    return problems


def _processors(system: System) -> Check:
    """A tokenizer that gives ids beyond the embeddings would fail on some texts only."""
    ids = system.inputs_spec().get("ids")
    has = [what for what, part in (("images", system.images), ("texts", system.tokenizer)) if part is not None]
    # Ids that may be drawn at random end before a placeholder; those that a language model embeds do not.
    embedded = system.vocab_size if isinstance(system, Generates) else 0 if ids is None else ids.high
    if system.tokenizer is not None and ids is not None and system.tokenizer.vocab_size > embedded:
        problem = f"the tokenizer has ids up to {system.tokenizer.vocab_size - 1:,}, the model embeds {embedded:,}"
        return _failed("processors", [problem])
    return _passed("processors", f"for {' and '.join(has)}" if has else "none")


def _round_trip(system: System, fmt: Format, todo: Plan, checkpoint: Checkpoint) -> Check:
    """Every tensor of the file comes back from ours, bit for bit (in fp32)."""
    state, problems = system.state_dict(), []
    for step in todo.steps:
        for name, tensor in zip(step.theirs, step.op.to_theirs([state[n] for n in step.ours]), strict=True):
            original = checkpoint.read(name).to(tensor.dtype)
            if not bool(((tensor == original) | (tensor.isnan() & original.isnan())).all()):
                problems.append(f"{name} comes back with other values")
    written = {name for step in unplan(fmt.rules(system.config), state) for name in step.theirs}
    read = {name for step in todo.steps for name in step.theirs}
    renamed = f"; {len(read - written)} would be written under the names of published files" if read - written else ""
    if len(written) != len(read):
        problems.append(f"{len(read)} tensors are read, {len(written)} would be written")
    return _judged("round trip", problems, f"{len(read)} tensors, equal{renamed}")


# ---- the reference implementation ----


def _against_reference(system: System, folder: Path, format_name: str, facts: _Facts) -> Iterator[Check]:
    reference = system.reference
    why = None
    if reference is None:
        why = "no public implementation is declared for this system"
    elif format_name != "hf":
        why = f"{reference.package} does not read the format {format_name}"
    elif importlib.util.find_spec(reference.package) is None:
        why = f"{reference.package} is not installed: pip install {reference.package}"
    if reference is None or why is not None:
        yield Check(name="reference", outcome="not run", detail=why or "")
        return
    title = f"{reference.package}.{reference.cls}"
    facts.packages.append(reference.package)
    try:
        cls = getattr(importlib.import_module(reference.package), reference.cls)
    except (ImportError, AttributeError) as error:
        yield Check(name="reference", outcome="not run", detail=f"{title} cannot be imported: {error}")
        return
    try:
        # Its own loader, told to open no pickle and to run no code of the checkpoint.
        with _no_bars():
            theirs, info = cls.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # whatever it raises on a file that it cannot read is a finding
        yield _failed("reference", [f"{title} does not load it: {type(error).__name__}: {error}"])
        return
    # What our rules drop for a written reason, files of ours do not have: buffers that a class makes anew.
    missing = {name: torch.empty(0) for name in info["missing_keys"]}
    info["missing_keys"] = missing.keys() - system.plan(system.formats[format_name], missing).dropped.keys()
    odd = [f"{title}: {what}: {', '.join(map(str, keys))}" for what, keys in info.items() if keys]
    yield _judged("reference", odd, f"{title} loads it whole")
    if odd:
        return
    yield from _agreement(system, theirs, format_name)


def _no_bars() -> contextlib.AbstractContextManager[Any]:
    """Progress bars of another library are not ours to show; what goes wrong in it is raised."""
    return contextlib.redirect_stderr(io.StringIO())


def _agreement(system: System, theirs: Any, format_name: str) -> Iterator[Check]:
    """Both on the same random inputs: outputs, loss and the gradients of the loss (or of a random mean of outputs)."""
    reference = system.reference
    assert reference is not None
    assert isinstance(system, Trains)
    generator = torch.Generator().manual_seed(0)
    batch = Batch({name: spec.random(ROWS, generator) for name, spec in system.inputs_spec().items()})
    inputs = {keyword: batch[name] for name, keyword in reference.inputs.items() if name in batch}
    result = theirs.eval()(**inputs, **(reference.extra or {}))
    system.eval()
    ours, expected = system(batch), getattr(result, reference.output)
    yield _agrees("output", _relative(ours, expected))
    if reference.loss:
        ours, expected = system.loss(batch).mean, result.loss
        yield _agrees("loss", _relative(ours, expected))
    else:
        yield Check(name="loss", outcome="not run", detail="the public implementation has none")
        direction = torch.randn(expected.shape, generator=generator)
        ours, expected = (ours * direction).mean(), (expected * direction).mean()
    ours.backward()
    expected.backward()
    yield _agrees("gradients", _gradient_error(system, theirs, format_name))


def _agrees(name: str, error: float) -> Check:
    agreed = error <= TOLERANCES[name]  # False for NaN
    detail = f"largest difference {error:.1e} of the largest value" if error else "equal"
    problem = () if agreed else (f"{name} differs from the reference: {detail}",)
    check = Check(name=name, outcome="passed" if agreed else "failed", problems=problem, error=error)
    return Check(**asdict(check) | {"detail": f"{check.digits} digits agree: {detail}" if agreed else detail})


def _relative(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape, f"{tuple(ours.shape)} against {tuple(expected.shape)}"
    return float((ours - expected).detach().abs().max()) / max(float(expected.detach().abs().max()), 1e-30)


@torch.no_grad()
def _gradient_error(system: System, theirs: Any, format_name: str) -> float:
    """The reference's gradients are saved as its weights, since the names in a file may differ from those in memory."""
    for parameter in theirs.parameters():
        parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        parameter.grad = None
    fmt, state = system.formats[format_name], dict(system.named_parameters())
    differences: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        with _no_bars():
            theirs.save_pretrained(folder)
        with fmt.open(Path(folder), fmt.config(Path(folder))) as checkpoint:
            todo = system.plan(fmt, checkpoint.meta())
            assert not todo.problems, todo.problems
            for step in todo.steps:
                expected = step.op.to_ours([checkpoint.read(n) for n in step.theirs])
                for name, gradient in zip(step.ours, expected, strict=True):
                    if name in state and state[name].requires_grad:  # the reference may not freeze what we freeze
                        ours = state[name].grad
                        difference = gradient if ours is None else ours - gradient
                        differences.append((float(difference.abs().max()), float(gradient.abs().max())))
    floor = NOISE * max(size for _, size in differences)
    errors = [difference / max(size, floor, 1e-30) for difference, size in differences]
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)
