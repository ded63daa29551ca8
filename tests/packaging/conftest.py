"""Fixtures of the packaging tests."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from environments import Environment, copy_sources


@pytest.fixture
def environment(tmp_path: Path) -> Callable[..., Environment]:
    """Make environments: ``environment()``, or ``environment(hidden=("torch",))`` without some packages."""
    return lambda **options: Environment(tmp_path / f"env{len(list(tmp_path.iterdir()))}", **options)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A clean copy of the sources, so that a build leaves nothing in the repository."""
    return copy_sources(tmp_path / "sources")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the package, built once with --no-build-isolation."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = copy_sources(folder / "sources")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel
