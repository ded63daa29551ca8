"""Mutation operators on Python's syntax tree: small mistakes, of the kinds that people and models make.

An operator looks at one node and yields what could stand there instead: another node, or `DELETE`. It leaves the
tree alone; `mutants` puts each replacement in, writes the program out, and takes it back. What an edit does to the
program's behaviour is not decided here: only execution tells a killed mutant from a survivor.
"""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

DELETE = ast.Pass()  # stands for: no statement at all


@dataclass(frozen=True)
class Mutant:
    """An edited program and the operator that edited it."""

    operator: str
    source: str


@dataclass(frozen=True)
class Scope:
    """What an operator may want to know of the code around its node."""

    variables: list[str]  # those of the same function that have a value before the node's line
    strings: list[str]  # the program's string constants


Operator = Callable[[Any, Scope], Iterator[ast.AST]]
OPERATORS: dict[str, tuple[tuple[type[ast.AST], ...], Operator]] = {}  # by name, with the nodes each looks at


def mutants(source: str, rng: random.Random, limit: int) -> list[Mutant]:
    """Return up to `limit` distinct mutants of a program, one edit away from it, the operators taking turns.

    The order within the turns is random; it depends on `source` and the state of `rng` alone.
    """
    by_operator: dict[str, list[Mutant]] = {}
    seen = {source}
    for mutant in _all_mutants(ast.parse(source)):
        if mutant.source not in seen:
            seen.add(mutant.source)
            by_operator.setdefault(mutant.operator, []).append(mutant)
    for group in by_operator.values():
        rng.shuffle(group)
    chosen: list[Mutant] = []
    while by_operator and len(chosen) < limit:
        for name in rng.sample(sorted(by_operator), len(by_operator)):
            chosen.append(by_operator[name].pop())
            if not by_operator[name]:
                del by_operator[name]
    return chosen[:limit]


# ---- Operators ----


def operator(name: str, *types: type[ast.AST]) -> Callable[[Operator], Operator]:
    """Register an operator for these types of node."""

    def register(function: Operator) -> Operator:
        OPERATORS[name] = (types, function)
        return function

    return register


def edited(node: ast.AST, **fields: Any) -> ast.AST:
    """Return a shallow copy of `node` with other `fields`."""
    result = copy.copy(node)
    for name, value in fields.items():
        setattr(result, name, value)
    return result


COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq, ast.LtE, ast.GtE),
    ast.NotEq: (ast.Eq, ast.Lt, ast.Gt),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}


@operator("comparison", ast.Compare)
def change_comparison(node: ast.Compare, scope: Scope) -> Iterator[ast.AST]:
    """`a < b` -> `a <= b`, `a > b`; also inside chains."""
    for index, old in enumerate(node.ops):
        for new in COMPARISONS[type(old)]:
            yield edited(node, ops=[*node.ops[:index], new(), *node.ops[index + 1 :]])


ARITHMETIC: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub, ast.Mult),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add, ast.Div),
    ast.Div: (ast.Mult, ast.FloorDiv),
    ast.FloorDiv: (ast.Div, ast.Mod),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitXor: (ast.BitOr,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
}


@operator("arithmetic", ast.BinOp, ast.AugAssign)
def change_arithmetic(node: ast.BinOp | ast.AugAssign, scope: Scope) -> Iterator[ast.AST]:
    """`a + b` -> `a - b`; `a += b` -> `a -= b`."""
    for new in ARITHMETIC.get(type(node.op), ()):
        yield edited(node, op=new())


@operator("constant", ast.Constant)
def change_constant(node: ast.Constant, scope: Scope) -> Iterator[ast.AST]:
    """A whole number one more or less; another one more, twice or a tenth."""
    values: list[float] = []
    if type(node.value) is int:
        values = [node.value + 1, abs(node.value - 1)]
    elif type(node.value) is float:
        values = [float(f"{value:.12g}") for value in (node.value + 1, node.value * 2, node.value / 10)]
    for value in values:
        yield edited(node, value=value)


@operator("boolean", ast.Constant)
def flip_boolean(node: ast.Constant, scope: Scope) -> Iterator[ast.AST]:
    """`True` -> `False`."""
    if isinstance(node.value, bool):
        yield edited(node, value=not node.value)


@operator("string", ast.Constant)
def misuse_string(node: ast.Constant, scope: Scope) -> Iterator[ast.AST]:
    """Another of the program's strings."""
    if isinstance(node.value, str):
        for value in scope.strings:
            yield edited(node, value=value)


@operator("bool operator", ast.BoolOp)
def change_bool_operator(node: ast.BoolOp, scope: Scope) -> Iterator[ast.AST]:
    """`a and b` -> `a or b`."""
    yield edited(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())


@operator("dropped condition", ast.BoolOp)
def drop_condition(node: ast.BoolOp, scope: Scope) -> Iterator[ast.AST]:
    """`a and b` -> `a`, `b`."""
    yield from node.values


NEGATIONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}


@operator("negated condition", ast.If, ast.While, ast.IfExp)
def negate_condition(node: ast.If | ast.While | ast.IfExp, scope: Scope) -> Iterator[ast.AST]:
    """`if a < b:` -> `if a >= b:`, written as a person would, not as `not a < b`."""
    test = node.test
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        negated = edited(test, ops=[NEGATIONS[type(test.ops[0])]()])
    elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        negated = test.operand
    else:
        negated = ast.UnaryOp(ast.Not(), test)
    yield edited(node, test=negated)


@operator("variable misuse", ast.Name)
def misuse_variable(node: ast.Name, scope: Scope) -> Iterator[ast.AST]:
    """Another variable that has a value there."""
    if isinstance(node.ctx, ast.Load) and node.id in scope.variables:
        for name in scope.variables:
            yield edited(node, id=name)


@operator("deleted statement", ast.Assign, ast.AugAssign, ast.Expr, ast.If)
def delete_statement(node: ast.stmt, scope: Scope) -> Iterator[ast.AST]:
    """No statement; an assignment only where its variable keeps an earlier value, or it would merely crash."""
    if isinstance(node, ast.Assign):
        targets = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        if not set(targets) <= set(scope.variables):
            return
    yield DELETE


@operator("swapped operands", ast.BinOp)
def swap_operands(node: ast.BinOp, scope: Scope) -> Iterator[ast.AST]:
    """`a - b` -> `b - a`, for what does not commute."""
    if isinstance(node.op, (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)):
        yield edited(node, left=node.right, right=node.left)


@operator("dropped operand", ast.BinOp, ast.UnaryOp)
def drop_operand(node: ast.BinOp | ast.UnaryOp, scope: Scope) -> Iterator[ast.AST]:
    """`a * b` -> `a`, `b`; `-a`, `not a` -> `a`."""
    if isinstance(node, ast.BinOp):
        yield node.left
        yield node.right
    else:
        yield node.operand


@operator("swapped arguments", ast.Call)
def swap_arguments(node: ast.Call, scope: Scope) -> Iterator[ast.AST]:
    """`f(a, b)` -> `f(b, a)`."""
    for index in range(len(node.args) - 1):
        first, second = node.args[index : index + 2]
        yield edited(node, args=[*node.args[:index], second, first, *node.args[index + 2 :]])


# Functions and methods that are taken for one another, in groups.
CALLS = [
    group.split()
    for group in (
        "min max sum",
        "any all",
        "int round",
        "floor ceil",
        "sorted list",
        "sin cos tan",
        "asin acos atan",
        "arcsin arccos arctan",
        "sinh cosh tanh",
        "log log10 log2",
        "degrees radians",
        "mean median",
        "zeros ones",
        "lower upper",
        "strip lstrip rstrip",
        "find rfind",
        "startswith endswith",
        "isalpha isdigit isalnum",
        "keys values",
        "append extend",
        "union intersection difference",
    )
]


@operator("changed call", ast.Call)
def change_call(node: ast.Call, scope: Scope) -> Iterator[ast.AST]:
    """`min(a)` -> `max(a)`; `s.lower()` -> `s.upper()`; `math.sin(a)` -> `math.cos(a)`."""
    name = called(node)
    for group in CALLS:
        for other in group if name in group else ():
            field = "id" if isinstance(node.func, ast.Name) else "attr"
            yield edited(node, func=edited(node.func, **{field: other}))


FUNCTIONS = {"abs", "ceil", "float", "floor", "int", "list", "reversed", "round", "set", "sorted", "sqrt"}
METHODS = {"copy", "lower", "lstrip", "rstrip", "strip", "upper"}


@operator("dropped call", ast.Call)
def drop_call(node: ast.Call, scope: Scope) -> Iterator[ast.AST]:
    """`abs(a)` -> `a`; `s.lower()` -> `s`."""
    if node.args and called(node) in FUNCTIONS:
        yield node.args[0]
    elif isinstance(node.func, ast.Attribute) and not node.args and called(node) in METHODS:
        yield node.func.value


def called(node: ast.Call) -> str:
    """Return the last name of what is called."""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


@operator("range bound", ast.Call)
def shift_range(node: ast.Call, scope: Scope) -> Iterator[ast.AST]:
    """`range(n)` -> `range(1, n)`, `range(n + 1)`, `range(n - 1)`; a constant bound has its own operator."""
    if called(node) != "range" or not node.args:
        return
    if len(node.args) == 1:
        yield edited(node, args=[ast.Constant(1), node.args[0]])
    for index, bound in enumerate(node.args[:2]):
        for shift in () if isinstance(bound, ast.Constant) else (ast.Add(), ast.Sub()):
            shifted = ast.BinOp(bound, shift, ast.Constant(1))
            yield edited(node, args=[*node.args[:index], shifted, *node.args[index + 1 :]])


@operator("slice bound", ast.Slice)
def drop_slice_bound(node: ast.Slice, scope: Scope) -> Iterator[ast.AST]:
    """`a[i:j:k]` -> `a[:j:k]`, `a[i::k]`, `a[i:j]`."""
    for bound in ("lower", "upper", "step"):
        if getattr(node, bound) is not None:
            yield edited(node, **{bound: None})


@operator("lost accumulation", ast.AugAssign)
def lose_accumulation(node: ast.AugAssign, scope: Scope) -> Iterator[ast.AST]:
    """`a += b` -> `a = b`."""
    yield ast.Assign([node.target], node.value, lineno=node.lineno)


@operator("break or continue", ast.Break, ast.Continue)
def exchange_break(node: ast.Break | ast.Continue, scope: Scope) -> Iterator[ast.AST]:
    """`break` -> `continue`, and back."""
    yield ast.Continue() if isinstance(node, ast.Break) else ast.Break()


# ---- Putting an operator's replacement in its place ----


@dataclass(frozen=True)
class Place:
    """Where a node hangs in the tree, and the variables around it with the line from which each has a value."""

    parent: ast.AST
    field: str
    index: int | None  # in the parent's list; None where the field is the node itself
    node: ast.AST
    variables: dict[str, int]

    def source_with(self, tree: ast.Module, replacement: ast.AST) -> str | None:
        """Write the program with another node here; None where an empty block would be left."""
        siblings = getattr(self.parent, self.field)
        if self.index is None:
            changed: Any = replacement
        elif replacement is not DELETE:
            changed = [*siblings[: self.index], replacement, *siblings[self.index + 1 :]]
        elif len(siblings) > 1:
            changed = [*siblings[: self.index], *siblings[self.index + 1 :]]
        else:
            return None
        setattr(self.parent, self.field, changed)
        source = ast.unparse(tree)
        setattr(self.parent, self.field, siblings)
        return source


def _all_mutants(tree: ast.Module) -> Iterator[Mutant]:
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str}
    for place in _places(tree, {}):
        line = getattr(place.node, "lineno", 0)
        scope = Scope(sorted(name for name, since in place.variables.items() if since < line), sorted(strings))
        for name, (types, function) in OPERATORS.items():
            for replacement in function(place.node, scope) if isinstance(place.node, types) else ():
                source = place.source_with(tree, replacement)
                if source is not None:
                    yield Mutant(name, source)


def _places(parent: ast.AST, variables: dict[str, int]) -> Iterator[Place]:
    variables = variables | _variables_of(parent)
    for field, value in ast.iter_fields(parent):
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            # An f-string stays whole: what may stand in one differs between versions of Python.
            if isinstance(node, ast.AST) and not isinstance(node, ast.JoinedStr):
                yield Place(parent, field, index, node, variables)
                yield from _places(node, variables)


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _variables_of(node: ast.AST) -> dict[str, int]:
    """Return the variables that `node` opens a scope for, with the line from which each has a value."""
    variables: dict[str, int] = {}
    if isinstance(node, COMPREHENSIONS):
        stores = [name for loop in node.generators for name in ast.walk(loop.target)]
        variables = {name.id: 0 for name in stores if isinstance(name, ast.Name)}
    elif isinstance(node, (ast.FunctionDef, ast.Lambda)):
        variables = {argument.arg: 0 for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        body: list[ast.AST] = [*node.body] if isinstance(node, ast.FunctionDef) else []
        while body:
            inner = body.pop()
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                since = min(inner.lineno, variables.get(inner.id, inner.lineno))
                variables[inner.id] = since
            if not isinstance(inner, (*COMPREHENSIONS, ast.FunctionDef, ast.Lambda)):
                body.extend(ast.iter_child_nodes(inner))
    return variables
