"""Fixtures of the packaging tests."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from environments import BUILD_TOOLS, REPOSITORY, Environment, copy_sources


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
    sources = copy_sources(folder / "sources")
    done = subprocess.run([sys.executable, "-c", build], cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


@pytest.fixture(scope="session")
def wheel_folder(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the wheel of the source distribution, built once as ``pip install`` builds it: isolated; and the output.

    It is left in the build folder, for tests under other versions of torch.
    """
    folder = REPOSITORY / "build" / "tests" / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = Environment(tmp_path_factory.mktemp("wheel") / "env", hidden=BUILD_TOOLS)
    built = environment.run("-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", folder, sdist)
    (folder / "output.txt").write_text(built.stdout + built.stderr)
    return folder


@pytest.fixture
def build_output(wheel_folder: Path) -> str:
    """What pip said, with -v, while it built the wheel."""
    return (wheel_folder / "output.txt").read_text()


@pytest.fixture
def wheel(wheel_folder: Path) -> Path:
    """The wheel of the package."""
    (wheel,) = wheel_folder.glob("*.whl")
    return wheel
