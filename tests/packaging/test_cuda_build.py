"""The CUDA half of the build: when it is built, for what, what its gate sees, and what a user without it reads."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from environments import REPOSITORY

import lambda_return_ext  # noqa: F401  (registers the operators)

# A torch with CUDA 13 for a GPU that cannot be seen: what setup.py asks of it, and nothing that builds.
FAKE_TORCH = """
__version__ = "2.13.0+cu130"
class version:
    cuda = "13.0"
class cuda:
    is_available = staticmethod(lambda: False)
"""
# Says at the end what setup.py has decided.
FAKE_CPP_EXTENSION = """
import atexit, os
atexit.register(lambda: print("ARCHITECTURES", os.environ.get("TORCH_CUDA_ARCH_LIST")))
atexit.register(lambda: print("CUDA_HOME", os.environ.get("CUDA_HOME")))
from setuptools import Extension
from setuptools.command.build_ext import build_ext as BuildExtension
def CppExtension(name, sources, **options):
    return Extension(name, sources)
def CUDAExtension(name, sources, **options):
    print("CUDA EXTENSION", name, *sources)
    return Extension(name, sources)
"""
# Answers what setup.py asks of nvcc {release}, whose home is {home}.
FAKE_NVCC = """#!/bin/sh
case "$1" in
  --version) echo 'Cuda compilation tools, release {release}, V{release}.88' ;;
  --list-gpu-arch) echo compute_80; echo compute_90; echo compute_90a ;;
  --dryrun) echo '#$ _SPACE_= ' >&2; echo '#$ _HERE_={home}/bin' >&2 ;;
esac
"""


@pytest.fixture
def fake_torch(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with a torch for CUDA 13."""
    package = tmp_path / "fake_torch" / "torch"
    (package / "utils").mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_TORCH)
    (package / "utils" / "__init__.py").touch()
    (package / "utils" / "cpp_extension.py").write_text(FAKE_CPP_EXTENSION)
    return package.parent


@pytest.fixture
def cpu_torch(fake_torch: Path) -> Path:
    """The same, built without CUDA."""
    init = fake_torch / "torch" / "__init__.py"
    init.write_text(init.read_text().replace('cuda = "13.0"', "cuda = None"))
    return fake_torch


def fake_nvcc(tmp_path: Path, release: str = "13.0") -> Path:
    """The home of an nvcc of this release."""
    home = tmp_path / f"cuda-{release}"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(FAKE_NVCC.format(release=release, home=home))
    nvcc.chmod(0o755)
    return home


def path_without_nvcc(*first: Path) -> str:
    """The PATH, without folders that hold an nvcc and with some others in front."""
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if not Path(folder, "nvcc").exists()]
    return os.pathsep.join([*map(str, first), *folders])


def run_setup(torch_folder: Path, path: str, **variables: str) -> subprocess.CompletedProcess:
    """Run `setup.py --version`, which decides about CUDA and builds nothing."""
    inherited = {name: value for name, value in os.environ.items() if "CUDA" not in name}
    environment = {**inherited, "PATH": path, "PYTHONPATH": str(torch_folder), **variables}
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def decision(done: subprocess.CompletedProcess) -> str:
    """The one line in which setup.py says what it builds."""
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("lambda_return_ext: ")]
    return line


# ---- what setup.py decides ----


def test_cuda_is_built_by_the_real_nvcc_behind_a_wrapper(fake_torch, tmp_path):
    home, wrappers = fake_nvcc(tmp_path), tmp_path / "wrappers"
    wrappers.mkdir()
    (wrappers / "nvcc").write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    (wrappers / "nvcc").chmod(0o755)
    done = run_setup(fake_torch, path_without_nvcc(wrappers), FORCE_CUDA="1")
    assert decision(done) == "lambda_return_ext: torch 2.13.0+cu130, CUDA kernels: 8.0;9.0+PTX"
    assert f"CUDA_HOME {home}\n" in done.stdout
    (extension,) = re.findall(r"^CUDA EXTENSION (\S+) (.*)$", done.stdout, re.MULTILINE)
    assert extension[0] == "lambda_return_ext._C_cuda13"
    assert extension[1].split() == sorted(f"csrc/cuda/{path.name}" for path in REPOSITORY.glob("csrc/cuda/*.cu"))


def test_nvcc_of_cuda_home_goes_before_that_of_the_path(fake_torch, tmp_path):
    home, other = fake_nvcc(tmp_path), fake_nvcc(tmp_path, "12.8")
    done = run_setup(fake_torch, path_without_nvcc(other / "bin"), CUDA_HOME=str(home))
    assert decision(done).endswith("CUDA kernels: 8.0;9.0+PTX")


def test_the_architectures_that_the_user_names_are_built(fake_torch, tmp_path):
    home = fake_nvcc(tmp_path)
    done = run_setup(fake_torch, path_without_nvcc(home / "bin"), TORCH_CUDA_ARCH_LIST="9.0a")
    assert decision(done).endswith("CUDA kernels: 9.0a")
    assert "ARCHITECTURES 9.0a\n" in done.stdout


def test_use_cuda_0_leaves_cuda_out(fake_torch, tmp_path):
    done = run_setup(fake_torch, path_without_nvcc(fake_nvcc(tmp_path) / "bin"), USE_CUDA="0")
    assert decision(done).endswith("CUDA kernels: none, USE_CUDA=0")
    assert "CUDA EXTENSION" not in done.stdout


@pytest.mark.parametrize(
    ("torch_fixture", "release", "variables", "reason"),
    [
        ("cpu_torch", "13.0", {}, "torch is built without CUDA"),
        ("fake_torch", None, {}, "there is no nvcc on the PATH"),
        ("fake_torch", "12.8", {}, "nvcc is of CUDA 12, torch of CUDA 13.0"),
        ("fake_torch", "13.0", {"USE_CUDA": "0"}, "USE_CUDA=0"),
    ],
)
def test_without_cuda_the_reason_is_said_and_force_cuda_is_an_error(
    torch_fixture, release, variables, reason, tmp_path, request
):
    torch_folder = request.getfixturevalue(torch_fixture)
    path = path_without_nvcc(*([fake_nvcc(tmp_path, release) / "bin"] if release else []))
    assert decision(run_setup(torch_folder, path, **variables)).endswith(f"CUDA kernels: none, {reason}")
    forced = run_setup(torch_folder, path, FORCE_CUDA="1", **variables)
    assert forced.returncode != 0
    assert forced.stderr.strip() == (f"lambda_return_ext cannot build its CUDA kernels as FORCE_CUDA=1 asks: {reason}.")


# ---- what a user without the kernels reads ----


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch may have the CUDA kernels")
@pytest.mark.parametrize(
    "name", ["lambda_return", "lambda_value_loss_backward", "masked_mse", "eos_mask", "categorical_value_loss"]
)
def test_an_operator_without_cuda_kernels_says_how_to_get_them(name):
    operator = getattr(torch.ops.lambda_return, name).default
    tensors = [torch.zeros(1, 1) for argument in operator._schema.arguments if not argument.has_default_value()]
    # What the dispatcher calls for a CUDA tensor, which this torch cannot make.
    with pytest.raises(RuntimeError) as raised:
        operator._op_dk(torch._C.DispatchKey.CUDA, *tensors)
    assert str(raised.value) == (
        f"lambda_return_ext has no CUDA kernels for this torch (CUDA {torch.version.cuda}): install it again with nvcc "
        "of that version on the PATH, by `FORCE_CUDA=1 pip install --no-build-isolation .` in its source folder, or "
        "move the tensors to the CPU."
    )


# ---- the gate, csrc/testing/cuda_check.py ----

CUDA_CHECK = REPOSITORY / "csrc" / "testing" / "cuda_check.py"

# A tile loop with an edge that reads one by one, an aligned path of two wide accesses, and a loop around both.
SASS = """
//--------------------- .text.kernel --------------------------
kernel:
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E R1, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/               @P0 BRA P1, `(.L_x_2) ;
        /*0030*/              @!P2 LDG.E.U8 R4, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.U16 R5, desc[UR4][R2.64+0x2] ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0070*/                   BRA.DIV UR6, `(.L_x_4) ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
.L_x_3:
        /*0090*/                   ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR10][R2.64], R5 ;
        /*00a0*/              @!P3 BRA `(.L_x_1) ;
        /*00b0*/               @P4 BRA `(.L_x_0) ;
        /*00b8*/                   REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
"""


@pytest.fixture(scope="module")
def cuda_check():
    spec = importlib.util.spec_from_file_location("cuda_check", CUDA_CHECK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_gate_reads_ptxas_and_machine_code(cuda_check):
    log = (
        "ptxas info    : Compiling entry function 'kernel' for 'sm_90'\n"
        "ptxas info    : Function properties for kernel\n"
        "    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 64 registers, used 1 barriers, 257 bytes smem, 464 bytes cmem[0]\n"
    )
    facts = cuda_check.read_ptxas(log)["kernel"]
    assert (facts.registers, facts.shared, facts.stack, facts.spills) == (64, 257, 16, 12)
    cuda_check.add_code(facts, cuda_check.read_sass(SASS)["kernel"])
    assert (facts.loads, facts.stores) == ({8, 16, 32, 128}, {128})
    assert facts.float_atomics == {"REDG.E.ADD.F32.FTZ.RN.STRONG.GPU"}  # not the one on integers
    # Branch, load, BRA.DIV, store, atomic, branch back: the aligned path of the inner loop.
    assert (facts.wide_accesses, facts.loop_instructions) == (2, 6)


# By NVIDIA's occupancy calculator, blocks of 256 threads.
@pytest.mark.parametrize(
    ("registers", "shared", "by_architecture"),
    [
        (32, 0, {"sm_80": 1.0, "sm_86": 1.0, "sm_90": 1.0, "sm_120": 1.0}),
        (40, 0, {"sm_80": 0.75, "sm_86": 1.0, "sm_90": 0.75, "sm_120": 1.0}),
        (64, 128, {"sm_80": 0.5, "sm_86": 4 / 6, "sm_90": 0.5, "sm_120": 4 / 6}),
        (65, 0, {"sm_80": 0.375, "sm_86": 0.5, "sm_90": 0.375, "sm_120": 0.5}),
        (32, 48 * 1024, {"sm_80": 0.375, "sm_86": 2 / 6, "sm_90": 0.5, "sm_120": 2 / 6}),
    ],
)
def test_the_gate_computes_occupancy(cuda_check, registers, shared, by_architecture):
    facts = cuda_check.Facts(registers=registers, shared=shared)
    found = {arch.name: cuda_check.occupancy(facts, arch) for arch in cuda_check.ARCHITECTURES}
    assert {name: found[name] for name in by_architecture} == by_architecture


@pytest.mark.parametrize(
    ("kernel", "worse", "violation"),
    [
        ("scan_rows<LambdaReturnOp<float>, 1>", {}, None),
        ("scan_rows<LambdaReturnOp<float>, 1>", {"spills": 8}, "spills 8 bytes"),
        ("scan_long_rows<LambdaReturnOp<float>>", {"stack": 16}, "stack frame of 16 bytes"),
        ("masked_mse_kernel<float, float>", {"float_atomics": {"RED.E.ADD.F32.FTZ.RN"}}, "adds floats in an order"),
        ("scan_rows<LambdaReturnOp<float>, 1>", {"registers": 65}, "occupancy of 38%, less than 50%"),
        ("scan_long_rows<LambdaReturnOp<float>>", {"registers": 65}, None),
        ("scan_long_rows<LambdaReturnOp<float>>", {"registers": 129}, "occupancy of 12%, less than 25%"),
        ("scan_long_rows<LambdaReturnOp<float>>", {"loads": {64}}, "no 128-bit global loads"),
        ("scan_rows<LambdaReturnOp<float>, 8>", {"loads": {64}}, "no 128-bit global loads"),
        ("scan_rows<LambdaReturnOp<float>, 8>", {"wide_accesses": 2}, "makes 2 128-bit accesses"),
        ("masked_mse_kernel<bfloat16, float>", {"wide_accesses": 3}, None),
        ("masked_mse_backward_kernel<bfloat16, float>", {"wide_accesses": 3}, "where its values need 4"),
        ("scan_rows<CategoricalLossOp<bfloat16>, 1>", {"wide_accesses": 6}, None),
        ("categorical_values_kernel<float>", {"wide_accesses": 0}, None),
        ("categorical_values_kernel<float>", {"loads": {32}}, "no 128-bit global loads"),
    ],
)
def test_the_gate_names_violations(cuda_check, kernel, worse, violation):
    good = {"registers": 64, "loads": {128}, "stores": {128}, "wide_accesses": 4, "loop_instructions": 80}
    (arch,) = [arch for arch in cuda_check.ARCHITECTURES if arch.name == "sm_90"]
    found = list(cuda_check.violations(kernel, cuda_check.Facts(**{**good, **worse}), arch))
    assert len(found) == (violation is not None)
    assert violation is None or violation in found[0]


def test_the_gate_compares_the_document_under_the_same_nvcc_only(cuda_check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cuda_check, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_check, "DOCUMENT", tmp_path / "cuda_resources.md")
    assert cuda_check.is_stale("text", "13.0, V13.0.88")  # there is none yet
    text = cuda_check.document({}, cuda_check.ARCHITECTURES, "13.0, V13.0.88")
    cuda_check.DOCUMENT.write_text(text)
    assert not cuda_check.is_stale(text, "13.0, V13.0.88")
    assert cuda_check.is_stale(text + "more", "13.0, V13.0.88")
    assert capsys.readouterr().out == ""
    assert not cuda_check.is_stale(text + "more", "13.1, V13.1.80")
    assert "is of nvcc 13.0, V13.0.88, this is 13.1, V13.1.80: not compared" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "status"), [([], 1), (["--allow-missing"], 0)])
def test_the_gate_without_nvcc_says_so_in_one_line(flags, status, tmp_path):
    # -S: no site-packages, so that no Python package with nvcc is seen.
    environment = {name: value for name, value in os.environ.items() if "CUDA" not in name}
    environment["PATH"] = str(tmp_path)
    command = [sys.executable, "-S", str(CUDA_CHECK), "--check", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == status
    (line,) = done.stdout.splitlines()
    assert line.startswith("cuda-check: there is no nvcc in CUDA_HOME, on the PATH or among the Python packages of ")
    assert "install it: pip install 'nvidia-cuda-nvcc==13.0.*' " in line


# ---- the real build, where it can be ----


def why_no_cuda_build() -> str | None:
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if shutil.which("nvcc") is None:
        return "there is no nvcc on the PATH"
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    if f"release {torch.version.cuda.split('.')[0]}." not in said:
        return f"nvcc is not of CUDA {torch.version.cuda}"
    return None


@pytest.mark.exhaustive
@pytest.mark.skipif(why_no_cuda_build() is not None, reason=str(why_no_cuda_build()))
def test_cuda_kernels_build_and_load(environment, sources, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")  # one is enough to link and load, and takes least time
    env = environment()
    env.pip_install("--no-build-isolation", sources)
    env.check_operators()
    env.run(
        "-c",
        "import torch\n"
        "from lambda_return_ext import _cuda\n"
        "assert _cuda.available\n"
        "for name in _cuda._OPERATORS:\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'lambda_return::{name}', 'CUDA'), name\n"
        "assert not torch.cuda.is_initialized()\n",
    )
