"""What the command line turns into a message and exit code 2."""

from __future__ import annotations

import importlib
from typing import Any


class UserError(Exception):
    """Something the user can put right; the message says what and how."""


class OtherRankError(Exception):
    """Another rank failed and says why; this one has nothing to add."""


def require(module: str, what: str, install: str) -> Any:
    """Import a package that only `what` needs.

    Raises:
        UserError: it is not installed; the message gives `pip install` and the name to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise UserError(f"{what} needs the Python package {package!r}: pip install {install}") from error
