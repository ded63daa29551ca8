"""Fresh environments to build and install the package in, without downloading torch into each of them."""

import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

import lambda_return_ext

REPOSITORY = Path(__file__).parents[2]
# Must come from pip's isolated build environment. (setuptools must too, but torch itself depends on it.)
BUILD_TOOLS = ("ninja",)
_NOT_SOURCES = ("*.so", "__pycache__", ".*_cache")
_NOT_SOURCES_AT_THE_TOP = (".git", ".venv*", "build", "dist", "data", "runs", "*.egg-info")


def _no_sources(folder: str, names: list[str]) -> set[str]:
    """What copy_sources leaves out of a folder."""
    patterns = _NOT_SOURCES + _NOT_SOURCES_AT_THE_TOP if Path(folder) == REPOSITORY else _NOT_SOURCES
    return shutil.ignore_patterns(*patterns)(folder, names)


def copy_sources(target: Path) -> Path:
    """Copy the sources, so that a build leaves nothing in the repository."""
    return Path(shutil.copytree(REPOSITORY, target, ignore=_no_sources))


class Environment:
    """A virtual environment whose site-packages are links to those of the running one."""

    def __init__(self, path: Path, hidden: tuple[str, ...] = ()):
        venv.create(path, symlinks=True, with_pip=False)
        self.path = path
        self.python = path / "bin" / "python"
        self.site_packages = Path(
            subprocess.check_output(
                [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
            ).strip()
        )
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.startswith(("lambda_return_ext", "__editable__", "__pycache__", *hidden)):
                (self.site_packages / entry.name).symlink_to(entry)

    def run(self, *arguments: str | Path, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess:
        """Run python with the arguments in this environment; the output of a failure is part of the test's report."""
        variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        variables["PATH"] = f"{self.path / 'bin'}{os.pathsep}{variables['PATH']}"
        command = [str(self.python), *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd or self.path, env=variables, capture_output=True, text=True)
        if check and done.returncode != 0:
            pytest.fail(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def pip_install(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess:
        """Run pip install in this environment."""
        return self.run("-m", "pip", "install", *arguments, check=check)

    def copy_package(self) -> None:
        """Put the package, as it is installed in the running environment, here: what a wheel has, without a build."""
        package = Path(lambda_return_ext.__path__[0])
        shutil.copytree(package, self.site_packages / package.name, ignore=shutil.ignore_patterns("__pycache__"))

    def check_operators(self) -> None:
        """Import the installed package, away from its sources, and compute one known target."""
        self.run(
            "-c",
            "import torch, lambda_return_ext as lr\n"
            "values = torch.tensor([[0.25, 9.0, 0.5, 0.75]])\n"
            "mask = torch.tensor([[True, False, True, True]])\n"
            "returns = lr.compute_lambda_return(values, torch.ones(1), mask, gamma=1.0, lam=0.5)\n"
            "assert returns.tolist() == [[0.6875, 0.0, 0.875, 1.0]], returns",
        )
