"""Random edits of a Python program that leave its behaviour alone, or are meant to: whoever uses them runs both.

An edit takes a syntax tree, changes it in place, and says whether it found something to change.
"""

from __future__ import annotations

import ast
import itertools
import random
from collections.abc import Callable, Iterator

Edit = Callable[[ast.Module, random.Random], bool]
NAMES = (
    "acc",
    "cur",
    "item",
    "val",
    "tmp",
    "res",
    "idx",
    "data",
    "total",
    "out",
    "left",
    "right",
    "num",
    "pos",
    "best",
)
FLIPPED = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE, ast.Eq: ast.Eq, ast.NotEq: ast.NotEq}


def edit_program(source: str, rng: random.Random, count: int) -> str | None:
    """The program after `count` edits, each found by trying the kinds in random order; None where there are too few."""
    tree = ast.parse(source)
    for _ in range(count):
        if not any(edit(tree, rng) for edit in rng.sample(EDITS, len(EDITS))):
            return None
        ast.fix_missing_locations(tree)
        tree = ast.parse(ast.unparse(tree))
    return ast.unparse(tree)


def names_in(node: ast.AST) -> set[str]:
    """All names that stand in the code."""
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def blocks(tree: ast.Module) -> Iterator[list[ast.stmt]]:
    """Every list of statements inside a function."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                for field in ("body", "orelse"):
                    block = getattr(node, field, None)
                    if isinstance(block, list):
                        yield block


def rename_local(tree: ast.Module, rng: random.Random) -> bool:
    """Give a variable that some function assigns another name, everywhere."""
    nodes = list(ast.walk(tree))
    assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    fixed = {node.arg for node in nodes if isinstance(node, (ast.arg, ast.keyword))}
    fixed |= {name for node in nodes if isinstance(node, (ast.Global, ast.Nonlocal)) for name in node.names}
    new = [name for name in NAMES if name not in names_in(tree) | fixed]
    old = sorted(assigned - fixed)
    if not old or not new:
        return False
    before, after = rng.choice(old), rng.choice(new)
    for node in nodes:
        if isinstance(node, ast.Name) and node.id == before:
            node.id = after
    return True


def _swaps(node: ast.BinOp | ast.Compare) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, (ast.Add, ast.Mult))
    return len(node.ops) == 1 and type(node.ops[0]) in FLIPPED


def swap_operands(tree: ast.Module, rng: random.Random) -> bool:
    """`a + b` as `b + a`, `a < b` as `b > a`."""
    sites = [node for node in ast.walk(tree) if isinstance(node, (ast.BinOp, ast.Compare)) and _swaps(node)]
    if not sites:
        return False
    node = rng.choice(sites)
    if isinstance(node, ast.BinOp):
        node.left, node.right = node.right, node.left
    else:
        node.left, node.comparators, node.ops = node.comparators[0], [node.left], [FLIPPED[type(node.ops[0])]()]
    return True


def swap_statements(tree: ast.Module, rng: random.Random) -> bool:
    """Two neighbouring assignments to names, neither of which reads what the other writes."""
    sites = []
    for block in blocks(tree):
        for i, (one, two) in enumerate(itertools.pairwise(block)):
            plain = all(
                isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets)
                for node in (one, two)
            )
            if plain:
                writes = [{target.id for target in node.targets} for node in (one, two)]  # type: ignore[attr-defined]
                if not (writes[0] & names_in(two) or writes[1] & names_in(one)):
                    sites.append((block, i))
    if not sites:
        return False
    block, i = rng.choice(sites)
    block[i], block[i + 1] = block[i + 1], block[i]
    return True


def add_idle_statement(tree: ast.Module, rng: random.Random) -> bool:
    """An assignment that nothing reads."""
    unused = [name for name in NAMES if name not in names_in(tree)]
    places = [(block, i) for block in blocks(tree) for i in range(len(block))]
    if not places or not unused:
        return False
    block, i = rng.choice(places)
    block.insert(i, ast.parse(f"{rng.choice(unused)} = {rng.choice(('0', '1', 'None', '[]', 'True'))}").body[0])
    return True


def for_as_while(tree: ast.Module, rng: random.Random) -> bool:
    """`for i in range(n)` as a counting `while`."""
    sites = []
    for block in blocks(tree):
        for i, node in enumerate(block):
            if (
                isinstance(node, ast.For)
                and isinstance(node.target, ast.Name)
                and isinstance(node.iter, ast.Call)
                and isinstance(node.iter.func, ast.Name)
                and node.iter.func.id == "range"
                and len(node.iter.args) in (1, 2)
                and not node.orelse
                and not any(isinstance(child, ast.Continue) for child in ast.walk(node))
            ):
                sites.append((block, i))
    if not sites:
        return False
    block, i = rng.choice(sites)
    loop = block[i]
    assert isinstance(loop, ast.For)
    assert isinstance(loop.iter, ast.Call)
    assert isinstance(loop.target, ast.Name)
    *start, stop = loop.iter.args
    name = loop.target.id
    first = f"{name} = {ast.unparse(start[0]) if start else 0}"
    counted, idle = ast.parse(f"{first}\nwhile {name} < {ast.unparse(stop)}:\n    {name} += 1").body
    assert isinstance(idle, ast.While)
    idle.body = [*loop.body, *idle.body]
    block[i : i + 1] = [counted, idle]
    return True


def turn_condition(tree: ast.Module, rng: random.Random) -> bool:
    """`if c: A else: B` as `if not c: B else: A`."""
    sites = [node for node in ast.walk(tree) if isinstance(node, (ast.If, ast.IfExp)) and node.orelse]
    if not sites:
        return False
    node = rng.choice(sites)
    node.test = ast.UnaryOp(ast.Not(), node.test)
    node.body, node.orelse = node.orelse, node.body
    return True


def write_out_assignment(tree: ast.Module, rng: random.Random) -> bool:
    """`x += y` as `x = x + y`."""
    sites = [
        (block, i)
        for block in blocks(tree)
        for i, node in enumerate(block)
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)
    ]
    if not sites:
        return False
    block, i = rng.choice(sites)
    node = block[i]
    assert isinstance(node, ast.AugAssign)
    assert isinstance(node.target, ast.Name)
    value = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
    block[i] = ast.Assign([ast.Name(node.target.id, ast.Store())], value)
    return True


EDITS: list[Edit] = [
    rename_local,
    swap_operands,
    swap_statements,
    add_idle_statement,
    for_as_while,
    turn_condition,
    write_out_assignment,
]
