"""Fixtures of the packaging tests."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from environments import BUILD_TOOLS, Environment, copy_sources


@pytest.fixture
def environment(tmp_path: Path) -> Callable[..., Environment]:
    """Make environments: ``environment()``, or ``environment(hidden=("torch",))`` without some packages."""
    return lambda **options: Environment(tmp_path / f"env{len(list(tmp_path.iterdir()))}", **options)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A clean copy of the sources, so that a build leaves nothing in the repository."""
    return copy_sources(tmp_path / "sources")


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of the package, built once."""
    folder = tmp_path_factory.mktemp("sdist")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copy_sources(folder / "sources"), check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


@dataclass
class WheelBuild:
    """A wheel, the environment that built it, and what pip said."""

    wheel: Path
    environment: Environment
    output: str


@pytest.fixture(scope="session")
def wheel_build(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> WheelBuild:
    """The wheel of the source distribution, built once as ``pip install`` does: with build isolation."""
    folder = tmp_path_factory.mktemp("wheel")
    environment = Environment(folder / "env", hidden=BUILD_TOOLS)
    output = environment.run("-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, sdist).stdout
    (wheel,) = folder.glob("*.whl")
    return WheelBuild(wheel, environment, output)


@pytest.fixture
def wheel(wheel_build: WheelBuild) -> Path:
    """The wheel of the package."""
    return wheel_build.wheel
