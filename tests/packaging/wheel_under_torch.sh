#!/usr/bin/env bash
# Builds one wheel with the torch of .venv and runs the operator tests with it under other versions of torch. Where such
# a torch is of the CUDA release of the nvcc at hand, the CUDA kernels are built, linked and loaded with it too.
#
#   tests/packaging/wheel_under_torch.sh 2.10.0 2.14.1
#
# WHEEL may name one that is there already; `make test-all` leaves one in build/tests/wheel.
set -euo pipefail
cd "$(dirname "$0")/../.."
repository=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Built from a copy and tested from a folder without the sources: only the wheel can be imported.
if [[ -n ${WHEEL:-} ]]; then
  mkdir "$scratch/wheel" && cp "$WHEEL" "$scratch/wheel"
else
  git ls-files -z | xargs -0 cp --parents --target-directory="$scratch"
  .venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$scratch/wheel" "$scratch"
fi
mkdir --parents "$scratch/suite/tests"
cp -r tests/ops "$repository/pyproject.toml" "$scratch/suite"
cp tests/native_build.py "$scratch/suite/tests"

for version in "$@"; do
  python3 -m venv "$scratch/env"
  "$scratch/env/bin/pip" install --quiet "torch==$version" numpy pytest pytest-xdist hypothesis 'setuptools>=77' ninja \
    "$scratch"/wheel/*.whl
  (cd "$scratch/suite" && "$scratch/env/bin/python" -c \
    "import torch, lambda_return_ext as lr; print('torch', torch.__version__, 'with', lr.__file__)")
  # All but what torch has no part in: the numbers at every length and with every instruction set.
  (cd "$scratch/suite" && "$scratch/env/bin/python" -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile \
    -m "not exhaustive" -k "not every_dtype_and_length and not agrees_with_the_reference" ops)
  # Not `python -m pytest`, which would import the package from the sources.
  "$scratch/env/bin/pytest" -q tests/packaging/test_cuda_build.py -k build_and_load
  rm -rf "$scratch/env"
done
