"""The judge: runs a problem's programs and says which of them answer as the reference does.

`execute.py` starts this file as a script, so that third-party code never shares a process with torch. It reads
requests from stdin, a line of JSON each, and answers each with a judgement, a line of JSON on stdout. It needs the
standard library alone, and numpy for the programs that use it.

Each problem is judged in a fork, and each of its programs runs in a fork of that: nothing a program does to its
modules or inputs reaches the next one, and the kernel ends it when its time is up, even inside C code or under a
bare `except:`.

The limits stop accidents (endless loops, memory, files, network). They are no security sandbox.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import resource
import signal
import string
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MAX_DEPTH = 12
NO_ANSWER = "no answer"
SLOWER = 4
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What no program may do, as prefixes of Python's audit events. Listing folders is what an import does.
DENIED_EVENTS = ("os.", "shutil.", "socket.", "subprocess.", "ctypes.", "fcntl.", "pty.", "signal.", "syslog.")
ALLOWED_EVENTS = {"os.listdir", "os.scandir", "os.fork"}


def deny_side_effects(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: no network, no new process, no change to any file."""
    if event == "open":
        denied = bool(args[2] & WRITE_FLAGS)
    else:
        denied = event.startswith(DENIED_EVENTS) and event not in ALLOWED_EVENTS
    if denied:
        raise PermissionError(f"a judged program may not do this: {event}")


def limit_resources(memory_bytes: int) -> None:
    """Limit memory, open files and file size of this process and its forks, and deny side effects."""
    for what, limit in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    sys.addaudithook(deny_side_effects)


def in_fork(work: Callable[[], Iterable[str]], cpu_seconds: float, wall_seconds: float) -> list[str]:
    """Return the lines that `work` yields in a fork of this process, or those it got to before its time was up."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # The default action of these two timers' signals ends the process.
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
            signal.setitimer(signal.ITIMER_REAL, wall_seconds)
            for line in work():
                os.write(writer, f"{line}\n".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        lines = pipe.read().splitlines()
    os.waitpid(child, 0)
    return lines


def canonical(value: Any, depth: int = 0) -> Any:
    """Return `value` as JSON data, equal for answers that a reader would call equal.

    Floats keep 9 significant digits (the order of a sum does not matter), 2.0 equals 2, tuples and arrays equal
    lists, and sets have no order.
    """
    if depth > MAX_DEPTH:
        return "..."
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        rounded = float(f"{value:.9g}")
        return int(rounded) if rounded.is_integer() else rounded
    if isinstance(value, complex):
        return {"complex": [canonical(value.real), canonical(value.imag)]}
    if isinstance(value, dict):
        return {str(key): canonical(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return {"set": sorted(fingerprint(item, depth + 1) for item in value)}
    if isinstance(value, (list, tuple)):
        return [canonical(item, depth + 1) for item in value]
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return canonical(value.tolist(), depth + 1)
    return str(value)


def fingerprint(value: Any, depth: int = 0) -> str:
    """Return a short digest of the canonical form of `value`."""
    text = json.dumps(canonical(value, depth), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def generate_inputs(generator: str, seed: int, count: int) -> list[dict[str, Any]]:
    """Return up to `count` distinct inputs from the problem's `generate_inputs(rng)`."""
    namespace: dict[str, Any] = {"Random": random.Random, "random": random, "math": math, "string": string}
    if "np." in generator:
        import numpy

        namespace["np"] = numpy
        numpy.random.seed(seed % 2**32)
    random.seed(seed)
    rng = random.Random(seed)
    exec(compile(generator, "<generator>", "exec"), namespace)
    inputs: dict[str, dict[str, Any]] = {}
    for _ in range(4 * count):
        arguments = namespace["generate_inputs"](rng)
        inputs.setdefault(fingerprint(arguments), arguments)
        if len(inputs) == count:
            break
    return list(inputs.values())


def answers(source: str, inputs: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the program's answer to each input: "= digest" of a value or "! name" of an exception."""
    ALLOWED_EVENTS.discard("os.fork")
    namespace: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(source, "<program>", "exec"), namespace)
        solve = namespace["main_solution"]
    except Exception as error:
        yield from [f"! {type(error).__name__}"] * len(inputs)
        return
    for arguments in inputs:
        try:
            yield f"= {fingerprint(solve(**arguments))}"
        except MemoryError:
            raise  # ends the program, as its clock does: which of the two comes first is chance
        except BaseException as error:  # SystemExit too
            yield f"! {type(error).__name__}"


def run_program(source: str, inputs: list[dict[str, Any]], cpu_seconds: float, wall_seconds: float) -> list[str]:
    """Return a program's answer to every input; `NO_ANSWER` from where it was ended."""
    given = in_fork(lambda: answers(source, inputs), cpu_seconds, wall_seconds)
    return given + [NO_ANSWER] * (len(inputs) - len(given))


def compare(given: list[str], expected: list[str]) -> dict[str, Any]:
    """Compare a program's answers with the reference's."""
    failed = sum(answer != right for answer, right in zip(given, expected, strict=True))
    return {"failed": failed / len(expected), "crash": not any(answer.startswith("=") for answer in given)}


def judge(request: dict[str, Any]) -> dict[str, Any]:
    """Judge the request's programs; `dropped` says why its reference is of no use."""
    limits = request["limits"]
    limit_resources(limits["memory_bytes"])
    try:
        inputs = generate_inputs(request["generator"], request["seed"], request["inputs"] + request["confirming"])
    except Exception:
        return {"dropped": "input generator raises"}
    first, confirming = inputs[: request["inputs"]], inputs[request["inputs"] :]
    if len(first) < request["min_inputs"]:
        return {"dropped": "too few distinct inputs"}

    # A mutant may take some times as long as the reference, so that its clock decides little. Most references are
    # fast, and then so is the end of an endless loop.
    wall = limits["wall_seconds"]
    for cpu in limits["reference_cpu_seconds"]:
        expected = run_program(request["reference"], inputs, cpu, wall)
        if NO_ANSWER not in expected:
            break
    else:
        return {"dropped": "reference too slow or too large"}
    expected, expected_later = expected[: len(first)], expected[len(first) :]
    if any(answer.startswith("!") for answer in expected):
        return {"dropped": "reference raises"}
    if len(set(expected)) < 2:
        return {"dropped": "one output for every input"}

    verdicts = []
    for source in request["programs"]:
        given = compare(run_program(source, first, SLOWER * cpu, wall), expected)
        if given["failed"] == 0 and confirming:
            # Twenty inputs miss some rare cases; a program is called right only after more of them.
            later = compare(run_program(source, confirming, SLOWER * cpu, wall), expected_later)
            given["failed"] = later["failed"] * len(confirming) / len(inputs)
        verdicts.append(given)
    return {"answers": fingerprint([expected, expected_later]), "inputs": len(inputs), "verdicts": verdicts}


def report(request: dict[str, Any]) -> str:
    """Return the judgement as a line of JSON, whatever happens to the judge."""
    limits = request["limits"]
    lines = in_fork(lambda: [json.dumps(judge(request))], limits["judge_cpu_seconds"], limits["judge_wall_seconds"])
    return lines[0] if lines else json.dumps({"dropped": "judge out of time or memory"})


def main() -> None:
    """Judge the requests on stdin until it closes; what the programs print is swallowed."""
    del sys.path[0]  # this file's folder: its neighbours must not shadow a program's imports
    with contextlib.suppress(ImportError):
        import numpy  # noqa: F401  # once here rather than in every fork
    requests, reports = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    for line in requests:
        print(report(json.loads(line)), file=reports, flush=True)


if __name__ == "__main__":
    main()
