"""A pytest plugin: ``--proofs PATH`` writes what each test marked ``proves(system, claim)`` has shown.

The file is one JSON object, ``{test id: {"proves": [[system, claim], ...], "outcome": OUTCOME}}``; the outcome is
``passed``, ``failed``, ``skipped`` or ``not run`` (collected but deselected). A run replaces the entries of the tests
that it collected and leaves the others, so that several runs may add up in one file. With ``-n`` each worker
writes a file of its own, which the run takes together at its end.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--proofs", type=Path, metavar="PATH", help="write what each test marked `proves` has shown")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--proofs")
    if path:
        worker = getattr(config, "workerinput", {}).get("workerid")  # pytest-xdist's way to say so
        config.pluginmanager.register(Recorder(path if worker is None else path.with_name(f"{path.name}.{worker}")))


class Recorder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: dict[str, dict] = {}

    @pytest.hookimpl(tryfirst=True)  # before -m and -k take tests away: what was left out is to be known too
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            claims = [list(mark.args) for mark in item.iter_markers("proves")]
            if any(len(claim) != 2 or not all(isinstance(word, str) for word in claim) for claim in claims):
                raise pytest.UsageError(f"{item.nodeid}: proves takes a system and a claim, not {claims}")
            if claims:
                self.tests[item.nodeid] = {"proves": claims, "outcome": "not run"}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests.get(report.nodeid)
        if test is None:
            return
        if report.failed:
            test["outcome"] = "failed"  # in set-up, in the call or in tear-down
        elif report.skipped:
            test["outcome"] = "skipped"
        elif report.when == "call" and test["outcome"] != "failed":
            test["outcome"] = "passed"

    @pytest.hookimpl(trylast=True)  # when all workers have ended
    def pytest_sessionfinish(self) -> None:
        for part in sorted(self.path.parent.glob(f"{self.path.name}.gw*")):
            for test, found in json.loads(part.read_text()).items():
                if found["outcome"] != "not run" or test not in self.tests:
                    self.tests[test] = found
            part.unlink()
        earlier = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(dict(sorted({**earlier, **self.tests}.items())), indent=1) + "\n")
