"""Small changes of a Python source, one at a time: what a slip of its author would look like.

A comparison that includes its bound, a sum that is a difference, a condition that is turned around, an argument or a
statement left out, a constant that is off by one. Messages, annotations, decorators, assertions and documentation stay
as they are: a test of their text would hold words, not behavior.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
NAMES = {
    pair[i]: pair[1 - i]
    for pair in (
        ("min", "max"), ("amin", "amax"), ("any", "all"), ("sum", "mean"), ("floor", "ceil"), ("argmin", "argmax"),
        ("minimum", "maximum"), ("zeros", "ones"), ("zeros_like", "ones_like"), ("log", "exp"),
    )
    for i in (0, 1)
}  # fmt: skip
SKIPPED = (ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Global, ast.Nonlocal)
SPANNING = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Pass)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change of a source.

    Attributes:
        line: Line of the change, from 1.
        function: Qualified name of the function or class around it; "" at the top of the module.
        before, after: The code that is replaced and its replacement.
        start, end: Place of the code in the source's bytes.
    """

    line: int
    function: str
    before: str
    after: str
    start: int
    end: int

    def apply(self, source: str) -> str:
        """Return the source with the change."""
        content = source.encode()
        return (content[: self.start] + self.after.encode() + content[self.end :]).decode()

    def describe(self) -> str:
        """Return the change in one line."""
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"line {self.line} {self.function}: {before} -> {after}"


def mutants_of(source: str) -> list[Mutant]:
    """Return every change of a source that compiles, in the order of the lines."""
    lines = source.encode().splitlines(keepends=True)
    starts = [sum(map(len, lines[:number])) for number in range(len(lines))]
    found: dict[tuple[int, int, str], Mutant] = {}
    for function, node, after in _changes(ast.parse(source), ""):
        assert isinstance(node, ast.expr | ast.stmt | ast.keyword)
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        if isinstance(node, ast.keyword):  # with the comma before it, which stands between the arguments
            comma = source.encode().rfind(b",", 0, start)
            between = source.encode()[comma + 1 : start]
            if comma < 0 or between.strip():
                continue
            start = comma
        before = source.encode()[start:end].decode()
        one = Mutant(line=node.lineno, function=function, before=before, after=after, start=start, end=end)
        try:
            compile(one.apply(source), "mutant", "exec")
        except SyntaxError:
            continue
        found.setdefault((start, end, after), one)
    return sorted(found.values(), key=lambda one: (one.start, one.end, one.after))


def _changes(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST, str]]:
    """Yield the function, the node that is replaced, and its replacement as text."""
    if isinstance(node, SKIPPED) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip: an assertion
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        function = f"{function}.{node.name}".lstrip(".")
    for after in _of_node(node):
        yield function, node, after
    if isinstance(node, ast.Raise):  # its message stays
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            documentation = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and not documentation:
                yield from _changes(child, function)


def _of_node(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for operator in COMPARISONS[type(node.ops[0])]:
            yield f"({ast.unparse(ast.Compare(node.left, [operator()], node.comparators))})"
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not _is_text(node):
        yield f"({ast.unparse(ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right))})"
    elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC and not _is_text(node):
        yield ast.unparse(ast.AugAssign(node.target, ARITHMETIC[type(node.op)](), node.value))
    elif isinstance(node, ast.BoolOp):
        other = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        yield f"({ast.unparse(ast.BoolOp(other, node.values))})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant):
        yield from _of_constant(node.value)
    elif isinstance(node, ast.IfExp):
        yield f"({ast.unparse(node.orelse)})"
        yield f"({ast.unparse(node.body)})"
    elif isinstance(node, ast.Attribute) and node.attr in NAMES and isinstance(node.ctx, ast.Load):
        yield ast.unparse(ast.Attribute(node.value, NAMES[node.attr], node.ctx))
    elif isinstance(node, ast.Name) and node.id in NAMES and isinstance(node.ctx, ast.Load):
        yield NAMES[node.id]
    elif isinstance(node, ast.keyword) and node.arg is not None:
        yield ""
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield "return None"
    elif isinstance(node, ast.Continue | ast.Break | ast.Raise) or _is_call(node):
        yield "pass"


def _is_call(node: ast.AST) -> bool:
    """Return whether a statement only calls something."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def _is_text(node: ast.BinOp | ast.AugAssign) -> bool:
    """Return whether a sum joins texts, of which a difference is only an error."""
    parts = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)
    return any(
        isinstance(p, ast.JoinedStr) or (isinstance(p, ast.Constant) and isinstance(p.value, str)) for p in parts
    )


def _of_constant(value: object) -> Iterator[str]:
    if isinstance(value, bool):
        yield str(not value)
    elif isinstance(value, int):
        yield str(value + 1)
    elif isinstance(value, float):
        yield repr(2 * value if value else 1.0)
