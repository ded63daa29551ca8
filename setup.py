"""Builds lambda_return_ext._C, and _C_cudaN where CUDA N and a torch for it are there, against the installed torch.

USE_CUDA=0 leaves CUDA out, FORCE_CUDA=1 makes its absence an error, TORCH_CUDA_ARCH_LIST names the architectures.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig

from setuptools import setup

# Where no GPU is visible: those of these that nvcc knows.
ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


def import_torch():
    """Import the torch that the package will run with, or exit with the cure."""
    try:
        import torch
    except ImportError:
        # pip's isolated build environment hides the installed torch. Look for it behind the isolated build tools.
        sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        try:
            import torch
        except ImportError:
            sys.exit(
                "lambda_return_ext needs an installed torch >= 2.10 to build against: install torch first, then run "
                "`pip install .`, or `pip install --no-build-isolation .` / `uv pip install --no-build-isolation .` "
                "where the build environment cannot see it."
            )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        sys.exit(f"lambda_return_ext needs torch >= 2.10, found {torch.__version__}: upgrade torch, then build again.")
    return torch


def cuda_architectures(torch):
    """Set CUDA_HOME and return the architectures to build for, or None and why CUDA is left out."""
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin{os.pathsep}{os.environ.get('PATH', '')}")
    if os.environ.get("USE_CUDA") == "0":
        return None, "USE_CUDA=0"
    if torch.version.cuda is None or nvcc is None:
        return None, "torch is built without CUDA" if torch.version.cuda is None else "there is no nvcc on the PATH"
    # nvcc on PATH may be a wrapper: ask it where it really lives.
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    release = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)[
        1
    ]
    if release != torch.version.cuda.split(".")[0]:
        return None, f"nvcc is of CUDA {release}, torch of CUDA {torch.version.cuda}"
    os.environ["CUDA_HOME"] = os.path.dirname(re.search(r"_HERE_=(.*)", dry_run)[1])
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    if not torch.cuda.is_available():
        supported = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(supported) + "+PTX")
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "the visible GPUs"), None


torch = import_torch()
architectures, why_not = cuda_architectures(torch)
if not architectures and os.environ.get("FORCE_CUDA") == "1":
    sys.exit(f"lambda_return_ext cannot build its CUDA kernels as FORCE_CUDA=1 asks: {why_not}.")
print(f"lambda_return_ext: torch {torch.__version__}, CUDA kernels: {architectures or f'none, {why_not}'}")
from torch.utils import cpp_extension  # noqa: E402  (reads CUDA_HOME when it is imported)

# The globs are those of CMakeLists.txt.
flags = {"cxx": ["-O3", "-g0", "-fvisibility=hidden"], "nvcc": ["-O3", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden"]}
options = {"extra_compile_args": flags, "py_limited_api": True}
cpu = sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/cpu/**/*.cpp", recursive=True))
extensions = [cpp_extension.CppExtension("lambda_return_ext._C", cpu, **options)]
if architectures:
    name = f"lambda_return_ext._C_cuda{torch.version.cuda.split('.')[0]}"
    extensions.append(cpp_extension.CUDAExtension(name, sorted(glob.glob("csrc/cuda/*.cu")), **options))
build = {"cmdclass": {"build_ext": cpp_extension.BuildExtension}}
setup(ext_modules=extensions, options={"bdist_wheel": {"py_limited_api": "cp310"}}, **build)
