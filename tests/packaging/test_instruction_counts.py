"""The CPU kernels execute no more instructions a token than is checked in."""

import json
import re
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.packaging


def test_no_kernel_got_slower(sources, tmp_path):
    if shutil.which("valgrind") is None:
        pytest.skip("needs valgrind")
    configure = ["cmake", "-B", tmp_path, f"-DPython_EXECUTABLE={sys.executable}"]
    report = subprocess.run(configure, cwd=sources, capture_output=True, text=True, check=True).stdout
    compiler = re.search(r"CXX compiler identification is (.*)", report)[1]
    figures = json.loads((sources / "csrc/testing/instruction_counts.json").read_text())
    if compiler != figures["compiler"]:
        pytest.skip(f"the figures are those of {figures['compiler']}, this is {compiler}")
    build = ["cmake", "--build", tmp_path, "--target", "instruction_counts", "--parallel", "2"]
    subprocess.run(build, check=True, capture_output=True)
    script = sources / "csrc/testing/instruction_counts.py"
    command = [sys.executable, script, tmp_path / "instruction_counts"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
