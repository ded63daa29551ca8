"""Builds lambda_return_ext._C against the torch that is already installed."""

import sys
import sysconfig
from pathlib import Path

from setuptools import setup

MINIMUM_TORCH = (2, 10)
ROOT = Path(__file__).parent


def import_torch():
    """Return torch.utils.cpp_extension of the torch that the package will run with, or exit with the cure."""
    try:
        import torch
    except ImportError:
        # pip builds in an isolated environment that hides the installed torch. Look for it in the environment
        # itself, after everything else, so that the isolated build tools keep precedence.
        sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        try:
            import torch
        except ImportError:
            sys.exit(
                "lambda_return_ext needs an installed torch >= 2.10 to build against: install torch first, then run "
                "`pip install .`, or `pip install --no-build-isolation .` / `uv pip install --no-build-isolation .` "
                "where the build environment cannot see it."
            )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        sys.exit(f"lambda_return_ext needs torch >= 2.10, found {torch.__version__}: upgrade torch, then build again.")
    import torch.utils.cpp_extension

    return torch.utils.cpp_extension


cpp_extension = import_torch()

setup(
    ext_modules=[
        cpp_extension.CppExtension(
            "lambda_return_ext._C",
            # The globs are those of CMakeLists.txt; python_module.cpp is what makes the library importable.
            sorted(
                str(path.relative_to(ROOT))
                for pattern in ("*.cpp", "cpu/*.cpp")
                for path in ROOT.glob(f"csrc/{pattern}")
            ),
            extra_compile_args={"cxx": ["-O3", "-g0", "-fvisibility=hidden"]},
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
