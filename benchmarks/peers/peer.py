"""What a peer is."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from harness import Batch, Contestant


class UnavailableError(Exception):
    """A peer cannot run here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """Another way to the lambda-returns of a batch."""

    name: str
    prepare: Callable[[Batch], Contestant]  # raises UnavailableError
    gaps: bool  # whether it can leave tokens out in the middle of a row
    most_columns: int = 2**20  # longer rows would take minutes


def version_of(package: str) -> str:
    """Name and version of an installed package; raise UnavailableError where there is none."""
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        raise UnavailableError(f"{package} is not installed") from None
