"""Every way in which people install the package, and what they read when it cannot work."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from environments import BUILD_TOOLS, REPOSITORY

import lambda_return_ext


def fake_torch(site_packages: Path, version: str) -> None:
    """A torch that has nothing but a version."""
    (site_packages / "torch").mkdir()
    (site_packages / "torch" / "__init__.py").write_text(f"__version__ = '{version}'\n")


def unstable_symbols(library: str | Path) -> list[str]:
    """What a library wants of torch beside its stable interface, which is plain C: others have torch's namespaces."""
    symbols = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True).split()
    assert symbols
    return [name for name in symbols if any(space in name for space in ("2at", "3c10", "5torch", "6caffe2"))]


# ---- what is installed and what is given away ----


def test_sdist_holds_every_source(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True).split()
    missing = [name for name in tracked if name not in held and not name.startswith((".ci", ".git"))]
    assert not missing


def test_the_package_holds_its_data_files_and_no_sources(sources, tmp_path):
    command = [sys.executable, "setup.py", "build_py", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    check_files({str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*") if path.is_file()})


def check_files(names: set[str]) -> None:
    assert {"lambda_return_ext/py.typed", "lambda_return_ext/critic/reports/inspect.html"} <= names
    assert not [name for name in names if name.endswith((".cpp", ".h")) or name.startswith("tests")]


def test_the_library_touches_torch_by_its_stable_interface_alone():
    (library,) = Path(lambda_return_ext.__path__[0]).glob("_C.abi3.*")
    assert not unstable_symbols(library)


def test_setup_py_stays_small():
    assert len((REPOSITORY / "setup.py").read_text().splitlines()) <= 80


# One build serves them all. Every other test of the suite runs on an editable install.


@pytest.mark.exhaustive
def test_sdist_builds_by_itself_in_isolation_with_the_installed_torch(build_output):
    # The isolated build environment was given setuptools, but no torch of its own.
    assert "Collecting setuptools" in build_output
    assert "Collecting torch" not in build_output


@pytest.mark.exhaustive
def test_wheel_is_abi3_and_installs_beside_the_torch_that_is_there(wheel, environment, tmp_path):
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        library = archive.extract("lambda_return_ext/_C.abi3.so", tmp_path)
        check_files(set(archive.namelist()))
    assert not unstable_symbols(library)
    env = environment(hidden=BUILD_TOOLS)
    output = env.pip_install(wheel).stdout
    env.check_operators()
    assert "Collecting torch" not in output
    assert (env.site_packages / "torch").is_symlink()  # the one that was there


# ---- what does not work says so in one sentence ----

NO_TORCH = (
    "lambda_return_ext needs an installed torch >= 2.10 to build against: install torch first",
    "uv pip install --no-build-isolation .",
)
OLD_TORCH = ("lambda_return_ext needs torch >= 2.10, found 2.9.1+cpu: upgrade torch, then build again.",)


@pytest.mark.parametrize(("version", "said"), [(None, NO_TORCH), ("2.9.1+cpu", OLD_TORCH)])
@pytest.mark.parametrize("by", ["setup.py", pytest.param("pip", marks=pytest.mark.exhaustive)])
def test_build_without_a_torch_that_will_do_says_what_to_do(environment, sources, version, said, by):
    env = environment(hidden=("torch", *BUILD_TOOLS))
    if version:
        fake_torch(env.site_packages, version)
    if by == "pip":
        done = env.pip_install(sources, check=False)
    else:
        done = env.run("setup.py", "--version", check=False, cwd=sources)
    assert done.returncode != 0
    output = " ".join((done.stdout + done.stderr).split())
    for sentence in said:
        assert sentence in output
    assert "Traceback" not in output


def import_error(env) -> str:
    done = env.run("-c", "import lambda_return_ext", check=False)
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_import_under_an_old_torch_says_what_to_do(environment):
    env = environment(hidden=("torch",))
    env.copy_package()
    fake_torch(env.site_packages, "2.9.1")
    assert import_error(env) == (
        "ImportError: lambda_return_ext 0.1.0 needs torch >= 2.10, found 2.9.1: upgrade torch, "
        "for example with `pip install --upgrade torch`."
    )


def test_import_without_torch_says_what_to_do(environment):
    env = environment(hidden=("torch",))
    env.copy_package()
    assert import_error(env) == (
        "ImportError: lambda_return_ext 0.1.0 needs torch >= 2.10, found none: install torch, "
        "for example with `pip install torch`."
    )


def test_import_without_the_compiled_library_says_what_to_do(environment):
    env = environment()
    env.copy_package()
    for library in (env.site_packages / "lambda_return_ext").glob("_C*.so"):
        library.unlink()
    message = import_error(env)
    assert message.startswith("ImportError: lambda_return_ext 0.1.0 could not load its compiled operators")
    assert message.endswith("with `pip install --no-build-isolation .` in its source folder.")
