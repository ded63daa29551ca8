"""Every way in which people install the package, and what they read when it cannot work."""

import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from environments import BUILD_TOOLS, REPOSITORY

pytestmark = pytest.mark.packaging


def fake_torch(site_packages: Path, version: str) -> None:
    """A torch that has nothing but a version."""
    (site_packages / "torch").mkdir()
    (site_packages / "torch" / "__init__.py").write_text(f"__version__ = '{version}'\n")


# ---- builds ----


# One build serves them all. Every other test of the suite runs on an editable install.


def test_sdist_holds_every_source(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True).split()
    missing = [name for name in tracked if name not in held and not name.startswith((".ci", ".git"))]
    assert not missing


def test_sdist_builds_by_itself_in_isolation_with_the_installed_torch(build_output):
    # The isolated build environment was given setuptools, but no torch of its own.
    assert "Collecting setuptools" in build_output
    assert "Collecting torch" not in build_output


def test_wheel_is_abi3_and_touches_torch_by_its_stable_interface_alone(wheel, environment, tmp_path):
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        library = archive.extract("lambda_return_ext/_C.abi3.so", tmp_path)
        names = archive.namelist()
    assert {"lambda_return_ext/py.typed", "lambda_return_ext/critic/inspect.html"} <= set(names)
    assert not [name for name in names if name.endswith((".cpp", ".h")) or name.startswith("tests")]
    symbols = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True).split()
    # C++ symbols of torch are mangled with its namespaces; the stable interface is plain C.
    assert not [name for name in symbols if any(space in name for space in ("2at", "3c10", "5torch", "6caffe2"))]
    env = environment(hidden=BUILD_TOOLS)
    output = env.pip_install(wheel).stdout
    env.check_operators()
    assert "Collecting torch" not in output
    assert (env.site_packages / "torch").is_symlink()  # the one that was there


def test_setup_py_stays_small():
    assert len((REPOSITORY / "setup.py").read_text().splitlines()) <= 80


# ---- what does not work says so in one sentence ----


def test_build_without_torch_says_what_to_do(environment, sources):
    done = environment(hidden=("torch", *BUILD_TOOLS)).pip_install(sources, check=False)
    assert done.returncode != 0
    output = " ".join((done.stdout + done.stderr).split())
    assert "lambda_return_ext needs an installed torch >= 2.10 to build against: install torch first" in output
    assert "uv pip install --no-build-isolation ." in output
    assert "Traceback" not in output


def test_build_with_an_old_torch_says_what_to_do(environment, sources):
    env = environment(hidden=("torch", *BUILD_TOOLS))
    fake_torch(env.site_packages, "2.9.1+cpu")
    done = env.pip_install(sources, check=False)
    assert done.returncode != 0
    output = " ".join((done.stdout + done.stderr).split())
    assert "lambda_return_ext needs torch >= 2.10, found 2.9.1+cpu: upgrade torch, then build again." in output
    assert "Traceback" not in output


def import_error(env) -> str:
    done = env.run("-c", "import lambda_return_ext", check=False)
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_import_under_an_old_torch_says_what_to_do(wheel, environment):
    env = environment(hidden=("torch",))
    env.pip_install("--no-deps", wheel)
    fake_torch(env.site_packages, "2.9.1")
    assert import_error(env) == (
        "ImportError: lambda_return_ext 0.1.0 needs torch >= 2.10, found 2.9.1: upgrade torch, "
        "for example with `pip install --upgrade torch`."
    )


def test_import_without_torch_says_what_to_do(wheel, environment):
    env = environment(hidden=("torch",))
    env.pip_install("--no-deps", wheel)
    assert import_error(env) == (
        "ImportError: lambda_return_ext 0.1.0 needs torch >= 2.10, found none: install torch, "
        "for example with `pip install torch`."
    )


def test_import_without_the_compiled_library_says_what_to_do(wheel, environment):
    env = environment()
    env.pip_install("--no-deps", wheel)
    (env.site_packages / "lambda_return_ext" / "_C.abi3.so").unlink()
    message = import_error(env)
    assert message.startswith("ImportError: lambda_return_ext 0.1.0 could not load its compiled operators")
    assert message.endswith("with `pip install --no-build-isolation .` in its source folder.")
