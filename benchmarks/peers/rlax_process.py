"""rlax.lambda_returns under jax.jit and jax.vmap, in a process and an environment of its own. It knows no masks.

The worker holds one batch at a time and times its own calls, so that the two processes take turns and no call pays for
talking. Its interpreter is that of .venv-rlax, or the one that the environment variable RLAX_PYTHON names.
"""

import atexit
import json
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from harness import GAMMA, LAM, Batch, Contestant

from .loops import terminal
from .peer import Peer, UnavailableError

NAME = "rlax lambda_returns, jit + vmap"
_DEFAULT = Path(__file__).parents[2] / ".venv-rlax" / "bin" / "python"


class _Worker:
    """The other process and the folder through which arrays go."""

    def __init__(self, python: Path):
        self.folder = tempfile.TemporaryDirectory()
        self.errors = Path(self.folder.name) / "errors"
        command = [python, Path(__file__).with_name("rlax_worker.py"), self.folder.name]
        variables = {**os.environ, "JAX_PLATFORMS": "cpu"}
        pipe = subprocess.PIPE
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=variables)
        self.version = self.receive()["version"]
        atexit.register(self.close)

    def close(self) -> None:
        self.process.communicate()  # closes its input, which ends it
        self.folder.cleanup()

    def receive(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            last = (self.errors.read_text().strip().splitlines() or ["it ended without a word"])[-1]
            self.close()
            raise UnavailableError(f"the rlax process failed: {last[:120]}")
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.receive()

    def save(self, name: str, x: torch.Tensor) -> None:
        import numpy as np

        np.save(f"{self.folder.name}/{name}.npy", x.numpy())


@cache
def _worker() -> _Worker:
    python = Path(os.environ.get("RLAX_PYTHON", _DEFAULT))
    if not python.exists():
        raise UnavailableError("rlax is not installed")
    return _Worker(python)


def _prepare(batch: Batch) -> Contestant:
    worker = _worker()
    next_values = torch.nn.functional.pad(batch.values[:, 1:], (0, 1))
    discounts = torch.full_like(next_values, GAMMA)
    discounts[:, -1] = 0.0
    for name, x in (("rewards", terminal(batch)), ("discounts", discounts), ("next_values", next_values)):
        worker.save(name, x)
    worker.ask(load=LAM)

    def answer(_result: Any) -> torch.Tensor:
        import numpy as np

        worker.ask(answer=True)
        return torch.from_numpy(np.load(f"{worker.folder.name}/returns.npy"))

    def clock(calls: int) -> float:
        return worker.ask(calls=calls)["seconds"]

    return Contestant(NAME, worker.version, lambda: clock(1), answer, clock=clock)


PEERS = (Peer(NAME, _prepare, gaps=False),)
