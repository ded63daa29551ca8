"""Other ways to the same targets. One module a family; each says what it needs and what it can do."""

from . import compiled, discounted_cumsum, loops, numba_loop, rlax_process, torchrl_estimate
from .peer import Peer, UnavailableError

PEERS: tuple[Peer, ...] = (
    *loops.PEERS,
    *torchrl_estimate.PEERS,
    *compiled.PEERS,
    *numba_loop.PEERS,
    *rlax_process.PEERS,
    *discounted_cumsum.PEERS,
)
__all__ = ["PEERS", "Peer", "UnavailableError"]
