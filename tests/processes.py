"""`pytest --processes 2`: each takes the next file that no other has; the first one reports all."""

import itertools
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


class Files:
    """Runs the tests of files that this process is the first to come to."""

    def __init__(self, folder, config):
        self.folder, self.config = Path(folder), config

    def taken(self, items):
        for file, tests in itertools.groupby(items, lambda item: item.location[0]):
            try:
                (self.folder / file.replace(os.sep, ":")).mkdir()
            except FileExistsError:
                continue
            yield from tests

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        if session.testsfailed:  # in collection: pytest's own loop says so
            return None
        items = self.taken(session.items)
        item = next(items, None)
        while item:
            following = next(items, None)  # what it needs stays
            self.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
            item = following
        return True


class Other(Files):
    """Writes down its reports."""

    def __init__(self, folder, config):
        super().__init__(folder, config)
        self.parent = os.getppid()
        self.reports = open(self.folder / f"{os.getpid()}", "wb")  # noqa: SIM115

    def pytest_runtest_logreport(self, report):
        if os.getppid() != self.parent:
            pytest.exit("the first process has ended")
        serializable = self.config.hook.pytest_report_to_serializable
        pickle.dump(serializable(config=self.config, report=report), self.reports)
        self.reports.flush()


class First(Files):
    """Starts the others, and reports what they have to say."""

    def __init__(self, folder, config, count):
        super().__init__(folder, config)
        self.reported, arguments = set(), config.invocation_params.args
        self.command = [sys.executable, sys.argv[0], *arguments, f"--beside={folder}"]
        self.others = [self.start(i) for i in range(1, count)]

    def start(self, i):
        with open(self.folder / f"output{i}", "w") as output:
            process = subprocess.Popen(self.command, stdout=output, stderr=subprocess.STDOUT)
        self.config.add_cleanup(process.kill)
        return process, output.name

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":  # a test's last
            self.reported.add(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        if not super().pytest_runtestloop(session):
            return None
        for process, output in self.others:
            code = process.wait()
            self.replay(self.folder / f"{process.pid}")
            if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
                self.fail(f"it ended with {code}:\n{Path(output).read_text()[-3000:]}")
        if left := [i.nodeid for i in session.items if i.nodeid not in self.reported]:
            self.fail(f"{len(left)} tests were not run, the first of them {left[0]}")
        return True

    def fail(self, why):
        place = "another process", 0, "tests"
        report = pytest.TestReport("::".join(place[::2]), place, {}, "failed", why, "call")
        self.config.hook.pytest_runtest_logreport(report=report)

    def replay(self, reports):
        if not reports.exists():
            return
        hook, seen = self.config.hook, None
        with open(reports, "rb") as file:
            while file.peek(1):
                data = pickle.load(file)
                report = hook.pytest_report_from_serializable(config=self.config, data=data)
                if report.nodeid != seen:
                    seen = report.nodeid
                    hook.pytest_runtest_logstart(nodeid=seen, location=report.location)
                hook.pytest_runtest_logreport(report=report)


def join(config):
    """Registers what --processes asks for."""
    beside, count = config.getoption("--beside"), config.getoption("--processes")
    if beside:
        config.pluginmanager.register(Other(beside, config))
    elif count > 1 and not config.option.collectonly:
        folder = tempfile.TemporaryDirectory(prefix="bertfast-tests-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        config.pluginmanager.register(First(folder.name, config, count))
