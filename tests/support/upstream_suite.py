"""The tests of a package underneath, from its source distribution, stock and guarded.

Nothing of them is kept in the project: they are downloaded, in the version that is installed,
into a cache, and run in a folder of their own.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from tests.support.processes import end_process, start_process
from tests.support.servers import PROJECT_ROOT
from tests.support.suite_plugin import GUARDED_COUNT

if TYPE_CHECKING:
    from collections.abc import Mapping

_DOWNLOAD_TIMEOUT = 90.0
_RUN_TIMEOUT = 90.0
_TEST_FILE = re.compile(r"(test_\w+|conftest)\.py")
# What is meant for the tests that run now is not meant for those that they start.
_FOREIGN_VARIABLES = ("PYTEST_", "COV_", "FLASK_", "SOCKETIO_GUARD_")


class SuiteUnavailable(Exception):
    """The source distribution cannot be had; the message says why."""


@dataclass(frozen=True)
class SuiteRun:
    """What became of each test of one run.

    Args:
        names: Of all tests, as ``module.Class.test``.
        failures: By name: what a test that failed had to say.
        guarded_count: How often a ``SocketIO`` was guarded.
        output: Of pytest.
    """

    names: frozenset[str]
    failures: dict[str, str]
    guarded_count: int
    output: str

    def failures_beyond(self, control: SuiteRun) -> dict[str, str]:
        """Return what failed here and did not in *control*."""
        return {name: text for name, text in self.failures.items() if name not in control.failures}


class UpstreamSuite:
    """The tests at the top of a source distribution.

    Args:
        distribution: Name of an installed distribution.
        cache: LogDeduplicator for the downloads.
        folder: Where the tests are put, empty; they run there.

    Raises:
        SuiteUnavailable: See there.
    """

    def __init__(self, distribution: str, *, cache: Path, folder: Path) -> None:
        self._folder = folder
        self._runs = 0
        version = importlib.metadata.version(distribution)
        archive = _archive(distribution, version, cache)
        self.files = _unpack_tests(archive, folder)
        assert self.files, f"{archive.name} has no tests at its top: look where they are now"

    def run(
        self,
        async_mode: str,
        *,
        guarded: Mapping[str, Any] | None = None,
    ) -> SuiteRun:
        """Run the tests.

        Args:
            async_mode: ``gevent``, with everything patched, or ``threading``.
            guarded: Settings of the guard of each ``SocketIO``; ``None`` guards none.
        """
        self._runs += 1
        report = self._folder / f"report-{self._runs}.xml"
        runner = ["gevent.monkey", "--module"] if async_mode == "gevent" else []
        command = [sys.executable, "-m", *runner, "pytest", "-p", "tests.support.suite_plugin"]
        command += [f"--async-mode={async_mode}"]
        if guarded is not None:
            command.append(f"--guarded={json.dumps(guarded)}")
        command += ["-c", os.devnull, f"--rootdir={self._folder}", "-p", "no:cacheprovider"]
        command += ["--tb=short", f"--junitxml={report}"]
        command += self.files
        output = self._output_of(command)
        assert report.exists(), f"the tests did not run:\n{output}"
        return _read(report, output)

    def _output_of(self, command: list[str]) -> str:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(_FOREIGN_VARIABLES)
        }
        process = start_process(
            command,
            text=True,
            cwd=self._folder,
            env={**kept, "PYTHONPATH": str(PROJECT_ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            output: str = process.communicate(timeout=_RUN_TIMEOUT)[0]
        except subprocess.TimeoutExpired:
            end_process(process)
            output = process.communicate()[0]
            raise AssertionError(f"the tests did not end:\n{output}") from None
        finally:
            end_process(process)
        return output


def _archive(distribution: str, version: str, cache: Path) -> Path:
    name = re.sub(r"[-_.]+", "_", distribution).lower()
    archive = cache / f"{name}-{version}.tar.gz"
    if archive.exists():
        return archive
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        _download(f"{distribution}=={version}", distribution, folder)
        (found,) = Path(folder).glob("*.tar.gz")
        # Several processes may be here at a time.
        found.replace(archive)
    return archive


def _download(requirement: str, distribution: str, folder: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1"]
    command += ["--timeout", "15", "download", "--quiet", "--no-deps", "--dest", folder]
    # Not ":all:": what pip needs to read the package's metadata would be built as well.
    command += ["--no-binary", distribution, requirement]
    try:
        done = subprocess.run(
            command,
            check=False,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_DOWNLOAD_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        reason = f"no answer within {_DOWNLOAD_TIMEOUT:.0f} s"
    else:
        if done.returncode == 0:
            return
        lines = done.stdout.strip().splitlines()
        reason = next((line for line in lines if line.startswith("ERROR:")), "\n".join(lines))
    raise SuiteUnavailable(
        f"the source distribution of {requirement}, which holds its tests, cannot be downloaded "
        f"(is there a network?): {reason}"
    )


def _unpack_tests(archive: Path, folder: Path) -> list[str]:
    files = []
    with tarfile.open(archive) as contents:
        for member in contents.getmembers():
            path = PurePosixPath(member.name)
            if len(path.parts) != 2 or not _TEST_FILE.fullmatch(path.name):
                continue
            source = contents.extractfile(member)
            if source is not None:
                (folder / path.name).write_bytes(source.read())
                files.append(path.name)
    return sorted(name for name in files if name.startswith("test_"))


def _read(report: Path, output: str) -> SuiteRun:
    names, failures, guarded_count = set(), {}, 0
    for element in ElementTree.parse(report).iter():
        if element.tag == "testcase":
            name = f"{element.get('classname')}.{element.get('name')}"
            names.add(name)
            for outcome in element:
                if outcome.tag in ("failure", "error", "skipped"):
                    failures[name] = f"{outcome.get('message')}\n{outcome.text or ''}"
        elif element.tag == "property" and element.get("name") == GUARDED_COUNT:
            guarded_count = int(element.get("value") or 0)
    return SuiteRun(frozenset(names), failures, guarded_count, output)
