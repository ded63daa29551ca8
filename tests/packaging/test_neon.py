"""The CPU kernels compile for AArch64, whose vectors are NEON's: the machine that tests them is usually no such one."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CPU_KERNELS = Path(__file__).parents[2] / "csrc" / "cpu" / "simd"


def compiler() -> list[str]:
    """A C++ compiler for AArch64 Linux: clang with its headers from the package ziglang, or GCC from the system."""
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu", "-Wall", "-Wextra", "-Werror"]
    if platform.machine() == "aarch64" and shutil.which("g++"):
        return ["g++"]
    if shutil.which("aarch64-linux-gnu-g++"):
        return ["aarch64-linux-gnu-g++"]
    pytest.skip("needs a C++ compiler for AArch64: pip install ziglang, or g++-aarch64-linux-gnu from the system")


@pytest.mark.exhaustive
def test_the_cpu_kernels_compile_for_neon(tmp_path):
    command = [*compiler(), "-std=c++20", "-O2", f"-I{CPU_KERNELS.parents[1]}", "-c"]
    env = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(tmp_path), "ZIG_LOCAL_CACHE_DIR": str(tmp_path)}

    def compiled(source: Path) -> bytes:
        binary = tmp_path / f"{source.stem}.o"
        done = subprocess.run([*command, source, "-o", binary], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name}\n{done.stderr}"
        return binary.read_bytes()

    sources = sorted(CPU_KERNELS.glob("*.cpp"))
    assert sources
    with ThreadPoolExecutor(2) as pool:
        binaries = list(pool.map(compiled, sources))
    # ELF names the machine at byte 18: 183 is AArch64.
    assert {int.from_bytes(binary[18:20], "little") for binary in binaries} == {183}
