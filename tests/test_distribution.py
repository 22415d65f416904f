"""The distributions: what is in them, and that they work where there is no checkout."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zipfile import ZipFile

import pytest

from tests.example.deployed import INSTALLED_CONFIG, DeployedServer
from tests.support.servers import PROJECT_ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.long, pytest.mark.timeout(120)]

LEFT_OUT = {".gitignore"}
"""Files of the repository that only the repository needs."""

BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])("dist"))
"""
QUICK_TESTS = (
    "tests/test_architecture.py",
    "tests/test_backoff.py",
    "tests/test_fault_page.py",
    "tests/example/test_app.py",
    "tests/example/test_gunicorn_conf.py::test_server_without_clients_stops_soon",
)
LINK = re.compile(r"\]\(([^)]+)\)")
APP = """
import flask_socketio_guard
from flask import Flask
from flask_socketio import SocketIO

def create_app():
    app = Flask(__name__)
    flask_socketio_guard.SocketIOGuard(app, SocketIO(app))
    app.add_url_rule("/where", view_func=lambda: flask_socketio_guard.__file__)
    return app
"""


class Built(NamedTuple):
    """The source distribution, unpacked, and the wheel that was built from it.

    Attributes:
        tracked: The files that are under version control.
        source: The folder of the unpacked source distribution.
        wheel: The file.
    """

    tracked: set[str]
    source: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built as ``python -m build`` does it: from nothing but what is under version control."""
    if not (PROJECT_ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("what belongs into a distribution is known in a checkout only")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    tracked = set(listed.stdout.strip("\0").split("\0"))
    checkout, unpacked = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("unpacked")
    for name in tracked:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT_ROOT / name, checkout / name)
    with tarfile.open(_build(checkout, "build_sdist")) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return Built(tracked, source, _build(source, "build_wheel"))


@pytest.fixture
def installed(built: Built, tmp_path: Path) -> Iterator[DeployedServer]:
    """A server where there is nothing but the wheel and an application."""
    with ZipFile(built.wheel) as archive:
        archive.extractall(tmp_path)
    (tmp_path / "application.py").write_text(APP)
    server = DeployedServer(
        "application:create_app()", env={"PYTHONPATH": str(tmp_path)}, config=INSTALLED_CONFIG
    )
    yield server
    server.close()


def _build(folder: Path, hook: str) -> Path:
    """Call a hook of the build backend in *folder*; return the distribution."""
    built = subprocess.run(
        [sys.executable, "-c", BUILD, hook], cwd=folder, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return folder / "dist" / built.stdout.splitlines()[-1]


def test_source_distribution_has_every_file_of_the_repository(built: Built) -> None:
    missing = {name for name in built.tracked if not (built.source / name).is_file()}
    assert missing == LEFT_OUT


def test_tests_run_in_the_source_distribution(built: Built) -> None:
    """Those that need the most of its files: its pages, its example, its configuration."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *QUICK_TESTS], cwd=built.source, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout


def test_wheel_has_the_package_and_the_configuration_and_nothing_else(built: Built) -> None:
    with ZipFile(built.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {name for name in built.tracked if name.startswith("flask_socketio_guard/")}
    assert names == package | {"flask_socketio_guard_gunicorn.py"}
    assert "flask_socketio_guard/static/deliveries.js" in names
    assert "flask_socketio_guard/py.typed" in names


def test_page_of_the_index_has_no_link_to_a_file(built: Built) -> None:
    with ZipFile(built.wheel) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
        page = archive.read(name).decode()
    links = LINK.findall(page)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    assert "`docs/settings.md`" in page


def test_installed_configuration_serves_an_application(installed: DeployedServer) -> None:
    """As the README says it, in a folder that holds no other configuration."""
    installed.start(path="/readyz")
    assert installed.get("/readyz").json()["status"] == "pass"
    where = installed.get("/where").text
    assert Path(where).is_relative_to(str(installed._env["PYTHONPATH"]))
    assert "GeventWebSocketWorker" in installed.log()
