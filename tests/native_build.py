"""The build folder of the C++ tests, which all tests share and later runs find again: build/tests/DIGEST."""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock  # which torch needs itself

REPOSITORY = Path(__file__).parents[1]


def find(program: str) -> str | None:
    """A program of this environment, which need not be active, or of the system."""
    return shutil.which(program, path=sysconfig.get_path("scripts")) or shutil.which(program)


def cores() -> str:
    """How many processes may run at a time."""
    return str(len(os.sched_getaffinity(0)))


class NativeBuild:
    """A build of the C++ product and its tests from the sources as they are; CMake compiles only what changed."""

    def __init__(self) -> None:
        tools = [sys.executable, torch.__version__, torch.__path__[0], platform.platform(), os.environ.get("CXX", "")]
        compiler = shutil.which(os.environ.get("CXX") or "c++")
        if compiler:
            tools.append(subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout)
        digest = hashlib.sha256("\n".join(tools).encode()).hexdigest()[:12]
        self.folder = REPOSITORY / "build" / "tests" / digest
        self._lock = FileLock(f"{self.folder}.lock")

    @cache  # noqa: B019  (one instance lives as long as the process)
    def configured(self) -> str:
        """What CMake says."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        command = ["cmake", "-S", REPOSITORY, "-B", self.folder, f"-DPython_EXECUTABLE={sys.executable}"]
        if find("ninja") and not (self.folder / "CMakeCache.txt").exists():
            command += ["-G", "Ninja"]
        with self._lock:
            return self.run(*command)

    def build(self, *targets: str) -> None:
        """Build targets, or everything."""
        self.configured()
        named = [word for target in targets for word in ("--target", target)]
        with self._lock:
            self.run("cmake", "--build", self.folder, "--parallel", cores(), *named)

    def compiler(self) -> str:
        """The C++ compiler that CMake found, such as "GNU 12.2.0"."""
        self.configured()
        (described,) = self.folder.glob("CMakeFiles/*/CMakeCXXCompiler.cmake")
        names = ("CMAKE_CXX_COMPILER_ID", "CMAKE_CXX_COMPILER_VERSION")
        return " ".join(re.search(rf'set\({name} "(.*)"\)', described.read_text())[1] for name in names)

    def test(self, *options: str) -> str:
        """Run ctest with these options; what it reports."""
        return self.run("ctest", "--test-dir", self.folder, "--parallel", cores(), *options)

    @staticmethod
    def run(*command: str | Path, cwd: Path = REPOSITORY) -> str:
        """Run a command, which must succeed."""
        words = [find(str(command[0])) or command[0], *command[1:]]
        done = subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout


native_build: Callable[[], NativeBuild] = cache(NativeBuild)


def why_not() -> str | None:
    """Why the C++ tests cannot be built at all."""
    if not (REPOSITORY / "csrc").is_dir():
        return "the source tree is not here"
    return None if find("cmake") else "there is no cmake"


def why_no_emulated_kernels() -> str | None:
    """Why the CUDA kernels cannot be built for the emulator's Python module."""
    if why_not():
        return why_not()
    if importlib.util.find_spec("pybind11") is None:
        return "there is no pybind11"
    skipped = [line for line in native_build().configured().splitlines() if ": skipped, " in line]
    return "; ".join(line.removeprefix("-- ") for line in skipped) or None
