"""The problems of reasoning-gym's CodeI/O file: found, read, filtered and stripped, without running anything."""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lambda_return_ext.critic.errors import UserError

INSTALL = "pip install --no-deps reasoning-gym==0.1.25"
SAFE_MODULES = {
    "bisect",
    "calendar",
    "cmath",
    "collections",
    "copy",
    "datetime",
    "decimal",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "json",
    "math",
    "numpy",
    "operator",
    "re",
    "statistics",
    "string",
    "textwrap",
    "typing",
}
# Files, other code, other processes, the clock: nothing that a pure function of its inputs needs.
UNSAFE_NAMES = {"__import__", "breakpoint", "compile", "eval", "exec", "exit", "globals", "input", "open", "quit"}
CLOCK_METHODS = {"now", "today", "utcnow"}
PROMPT_END = "Solution in Python:\n```python\n"


@dataclass(frozen=True)
class Problem:
    """One programming problem with its right program."""

    problem_id: str  # from the task text, so that one task has one id
    prompt: str
    generator: str  # source of `generate_inputs(rng)`
    original: str  # the program as published
    reference: str  # the same without comments, docstrings and unused imports


class Unusable(Exception):  # noqa: N818  # a finding, not an error
    """Why a row is left out."""


def find_data() -> Path:
    """Return the path of codeio.jsonl.gz; reasoning_gym itself is not imported (that needs its dependencies)."""
    package = importlib.util.find_spec("reasoning_gym")
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = Path(folder) / "data" / "codeio.jsonl.gz"
        if path.is_file():
            return path
    raise UserError(f"the CodeI/O problems come with the package reasoning-gym, which is not here: {INSTALL}")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the file's rows."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def make_problem(row: dict[str, Any], min_chars: int, max_chars: int, max_prompt_bytes: int) -> Problem:
    """Turn a row into a problem.

    Raises:
        Unusable: the program does not parse, uses what a pure function does not need, or is too short or long.
    """
    task = normalize(row["task_description"])
    reference = strip(row["code_sample"])
    if not min_chars <= len(reference) <= max_chars:
        raise Unusable("program shorter or longer than asked for")
    return Problem(
        problem_id="codeio-" + hashlib.sha256(task.encode()).hexdigest()[:12],
        prompt=make_prompt(task, normalize(row["input_output_spec"]), max_prompt_bytes),
        generator=row["input_generator"],
        original=row["code_sample"],
        reference=reference,
    )


def normalize(text: str) -> str:
    """Strip every line's end, and keep one empty line at most in a row."""
    text = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return re.sub(r"\n{3,}", "\n\n", text)


def make_prompt(task: str, specification: str, max_bytes: int) -> str:
    """Put the task, its input and output, and the beginning of a code block together.

    Where that is too long, the inputs keep their names and types and lose their prose; then the output too. Bytes
    say more about tokens than characters do: an alphabet other than Latin costs more of both.
    """
    inputs, output, rest = specification.partition("Output:")
    for shortened in (specification, _drop_prose(inputs) + output + rest, _drop_prose(specification)):
        prompt = f"{task}\n\n{shortened}\n\n{PROMPT_END}"
        if len(prompt.encode()) <= max_bytes:
            return prompt
    raise Unusable("prompt longer than asked for")


def _drop_prose(specification: str) -> str:
    """Shorten lines such as "- `n` (int): The number of ..." to "- `n` (int)"."""
    return re.sub(r"^(\s*(?:- )?\S+ \([^)]*\)):.*$", r"\1", specification, flags=re.MULTILINE)


def strip(source: str) -> str:
    """Return the program without comments, docstrings and unused imports, in `ast.unparse`'s own style.

    Mutants are written by `ast.unparse` too, so that style does not tell them from the reference.

    Raises:
        Unusable: as for `make_problem`, but for the lengths.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        raise Unusable("program does not parse") from None
    _drop_docstrings(tree)
    _drop_unused_imports(tree)
    if not any(isinstance(node, ast.FunctionDef) and node.name == "main_solution" for node in tree.body):
        raise Unusable("no main_solution")
    for node in ast.walk(tree):
        _check_safe(node)
    return ast.unparse(tree)


def _drop_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]


def _drop_unused_imports(tree: ast.Module) -> None:
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in list(tree.body):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [name for name in node.names if (name.asname or name.name.split(".")[0]) in used]
            if not node.names:
                tree.body.remove(node)


def _check_safe(node: ast.AST) -> None:
    if isinstance(node, ast.Import):
        modules = [name.name for name in node.names]
    elif isinstance(node, ast.ImportFrom):
        modules = [node.module or "."]
    else:
        modules = []
    if any(module.split(".")[0] not in SAFE_MODULES for module in modules):
        raise Unusable("imports more than pure functions need")
    if isinstance(node, ast.Name) and node.id in UNSAFE_NAMES:
        raise Unusable("uses files, other code or the prompt")
    if isinstance(node, ast.Attribute) and node.attr in CLOCK_METHODS:
        raise Unusable("reads the clock")
