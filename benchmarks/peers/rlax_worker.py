"""Runs in the environment that has jax and rlax; takes JSON lines and answers with JSON lines. See rlax_process.py."""

import json
import os
import sys
import time
from importlib import metadata

# One core before jax counts them: the other process is pinned to the same one, and they take turns.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

import jax
import numpy as np
import rlax


def main() -> None:
    """Load batches, compute returns, time calls."""
    folder = sys.argv[1]
    versions = [f"{package} {metadata.version(package)}" for package in ("rlax", "jax", "jaxlib")]
    print(json.dumps({"version": ", ".join(versions)}), flush=True)
    arguments, returns_of = (), None
    for line in sys.stdin:
        request, reply = json.loads(line), {}
        if "load" in request:
            lam = request["load"]
            names = ("rewards", "discounts", "next_values")
            arguments = [jax.device_put(np.load(f"{folder}/{name}.npy")) for name in names]
            returns_of = jax.jit(jax.vmap(lambda r, d, v, lam=lam: rlax.lambda_returns(r, d, v, lam)))
            returns_of(*arguments).block_until_ready()
        elif "answer" in request:
            np.save(f"{folder}/returns.npy", np.asarray(returns_of(*arguments)))
        else:
            start = time.perf_counter()
            for _ in range(request["calls"]):
                returns_of(*arguments).block_until_ready()
            reply = {"seconds": time.perf_counter() - start}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
