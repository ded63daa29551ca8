"""The C++ product: configure, build, ctest, instructions of its kernels, install, and a project that finds it."""

import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native_build import REPOSITORY, NativeBuild, find, native_build

CONSUMER_CMAKE = """
cmake_minimum_required(VERSION 3.20)
project(consumer LANGUAGES CXX)
find_package(lambda_return 0.1 REQUIRED)
add_executable(consumer main.cpp)
target_compile_features(consumer PRIVATE cxx_std_17)
target_link_libraries(consumer PRIVATE lambda_return::kernels)
file(GENERATE OUTPUT library.txt CONTENT $<TARGET_FILE:lambda_return::ops>)
"""

CONSUMER_MAIN = """
#include <dlfcn.h>
#include <cstdio>
#include "kernels/lambda_return.h"
int main(int, char** argv) {
  const float values[] = {0.25f, 9.0f, 0.5f, 0.75f};
  const uint8_t mask[] = {1, 0, 1, 1};
  float returns[4];
  const auto discount = lambda_return::Discount<float>::from(1.0, 0.5);
  lambda_return::lambda_return_row(values, mask, 4, 1.0f, discount, returns);
  std::printf("%g %g %g %g, operators %s", returns[0], returns[1], returns[2], returns[3],
              dlopen(argv[1], RTLD_NOW) ? "loaded" : dlerror());
}
"""


run = NativeBuild.run


@pytest.fixture(scope="module")
def build() -> NativeBuild:
    """The shared build of what every change may break."""
    build = native_build()
    build.build("quick_tests")
    return build


@pytest.fixture(scope="module")
def whole_build(build) -> NativeBuild:
    """The same folder with everything built."""
    build.build()
    return build


def nvcc_finds_its_headers(folder: Path) -> bool:
    """Whether the emulator's tests can be built here; CMake looks for the headers in a way of its own."""
    source = folder / "headers.cu"
    source.write_text("#include <cuda_fp16.h>\n")
    if shutil.which("nvcc") is None or (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return False
    return subprocess.run(["nvcc", "-E", source], capture_output=True).returncode == 0


def check_passed(report: str, build: NativeBuild, always: list[str], where_cuda_headers_are: list[str], folder: Path):
    expected = set(always)
    if build.compiler().startswith("GNU ") and nvcc_finds_its_headers(folder):
        expected |= set(where_cuda_headers_are)
    assert "100% tests passed" in report
    passed = re.findall(r"Test +#\d+: (\S+) \.+ +Passed", report)
    assert expected <= set(passed), report


def test_ctest(build, tmp_path):
    # The kernels, the operators from C++ and, where the CUDA headers are found, the CUDA kernels under the emulator.
    report = build.test("--label-exclude", "exhaustive")
    emulated = [f"cuda_{name}_plain" for name in ("emulator", "emulator_faults", "kernels", "td_lambda", "categorical")]
    check_passed(report, build, ["kernels", "simd", "ops", "aoti_package", "aoti"], emulated, tmp_path)


@pytest.mark.exhaustive
def test_ctest_with_sanitizers_sweeps_and_planted_bugs(whole_build, tmp_path):
    report = whole_build.test("--label-regex", "exhaustive")
    emulated = [f"cuda_kernels_{build}" for build in ("thread", "address", "sweep")] + ["planted_bugs"]
    check_passed(report, whole_build, [], emulated, tmp_path)


def test_no_kernel_got_slower(build):
    if shutil.which("valgrind") is None:
        pytest.skip("needs valgrind")
    figures = json.loads((REPOSITORY / "csrc/testing/instruction_counts.json").read_text())
    if build.compiler() != figures["compiler"]:
        pytest.skip(f"the figures are those of {figures['compiler']}, this is {build.compiler()}")
    run(sys.executable, "csrc/testing/instruction_counts.py", build.folder / "instruction_counts")


def test_install_and_use(build, tmp_path):
    prefix = tmp_path / "prefix"
    run("cmake", "--install", build.folder, "--prefix", prefix)
    consumer = tmp_path / "consumer"
    consumer.mkdir()
    (consumer / "CMakeLists.txt").write_text(CONSUMER_CMAKE)
    (consumer / "main.cpp").write_text(CONSUMER_MAIN)
    run("cmake", "-B", "build", f"-DCMAKE_PREFIX_PATH={prefix}", cwd=consumer)
    run("cmake", "--build", "build", cwd=consumer)
    library = (consumer / "build" / "library.txt").read_text()
    assert run(consumer / "build/consumer", library, cwd=consumer) == "0.6875 0 0.875 1, operators loaded"


def test_configure_without_torch_says_what_to_do(sources, environment, tmp_path):
    env = environment(hidden=("torch",))
    done = subprocess.run(
        [find("cmake"), "-B", str(tmp_path / "build"), f"-DPython_EXECUTABLE={env.python}"],
        cwd=sources,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "lambda_return needs torch >= 2.10" in message
    assert "-DPython_EXECUTABLE=" in message
