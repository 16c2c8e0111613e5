"""The house's limits as functions over source text: each takes `Sources` and returns what breaks it.

A source that breaks nothing gives an empty list. Nothing is imported, so torch stays out of it.
"""

from __future__ import annotations

import ast
import graphlib
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef

# Lowest first. A module's floor is that of the longest name here that it is or lies below;
# modules of one floor may import each other as long as no circle comes of it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("latlib.*",),  # the core: every module at the top level that is not named below
    ("latlib.fused", "latlib.io", "latlib.text"),
    ("latlib.proof",),
    ("latlib.models",),  # opens a model, so it knows the hub and the fast path
    ("latlib.config",),
    ("latlib.world", "latlib.data"),
    ("latlib.distributed",),
    ("latlib.evaluation",),
    ("latlib.refusal", "latlib.redteam"),
    ("latlib.planning",),
    ("latlib.experiment",),
    ("latlib.report",),
    ("latlib.runner", "latlib.verify"),
)
# The public names stand here and are loaded when asked for, by their modules' names.
LAZY = "latlib"

# The core imports where nothing but these is installed.
CORE_NEEDS = {"torch", "transformers", "peft", "numpy", "safetensors"}
ONLY_REPORT = "matplotlib"
FORKED_WITH = "set_forkserver_preload"  # of multiprocessing: takes names of modules

CORE_LINES = 2500
FILE_LINES = 700
FUNCTION_LINES = 60
NODES = 100_000
NODES_A_LINE = 11.0
NODES_A_LINE_OF_A_FUNCTION = 16.0
SMALL_FUNCTION = 8  # code lines; below, a ratio means little

EMPTY_NAMES = {"util", "utils", "helper", "helpers", "common", "misc"}
# What the field calls otherwise: CONTRIBUTING.md has the words that we use.
HOUSE_WORDS = {
    "begun",
    "calm",
    "grown",
    "likelier",
    "mend",
    "settle",
    "taught",
    "watch",
}


@dataclass(frozen=True)
class Module:
    """One module: its dotted name and its text."""

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def code_lines(self) -> set[int]:
        """Numbers of the lines that are neither blank, comment nor docstring."""
        no_code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT)
        no_code += (tokenize.DEDENT, tokenize.ENDMARKER)
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in no_code:
                lines |= set(range(token.start[0], token.end[0] + 1))
        for docstring in docstrings(self.tree):
            lines -= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
        return lines

    @property
    def is_core(self) -> bool:
        return self.name.count(".") <= 1


Sources = dict[str, Module]  # dotted name -> module


def sources_of(texts: dict[str, str]) -> Sources:
    """Modules from their texts, by dotted name."""
    return {name: Module(name, text) for name, text in texts.items()}


def read_sources(package: Path) -> Sources:
    """Every module of a package's folder; a folder's `__init__` goes by the folder's name."""
    texts = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        texts[".".join(part for part in parts if part != "__init__")] = path.read_text("utf-8")
    return sources_of(texts)


# ---- arrows ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrow:
    """`importer` imports `imported` on a line, wherever that line stands."""

    importer: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def arrows(sources: Sources) -> list[Arrow]:
    """Imports between the modules: at the top, in functions and under TYPE_CHECKING alike."""
    found = []
    for module in sources.values():
        if module.name == LAZY:
            continue
        for node in ast.walk(module.tree):
            for name in sorted(_imported(node, sources)):
                if name not in (module.name, LAZY):
                    found.append(Arrow(module.name, name, node.lineno))
    return found


def _imported(node: ast.AST, sources: Sources) -> set[str]:
    """Modules of `sources` that one statement names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names if alias.name in sources}
    if not isinstance(node, ast.ImportFrom) or node.module is None:
        return set()
    inner = {f"{node.module}.{alias.name}" for alias in node.names}
    modules = inner & set(sources)
    if len(modules) < len(inner) and node.module in sources:
        modules.add(node.module)  # at least one name is the module's own
    return modules


def relative_imports(sources: Sources) -> list[str]:
    """`from .x import y`, which the arrows would not see."""
    return [
        f"{module.name}:{node.lineno}"
        for module in sources.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]


def circles(sources: Sources) -> list[str]:
    """One circle of modules, and one of packages, where there are any."""
    between_modules = {(a.importer, a.imported) for a in arrows(sources)}
    between_packages = {(_package(a), _package(b)) for a, b in between_modules}
    between_packages = {(a, b) for a, b in between_packages if a != b}
    found = []
    for pairs in (between_modules, between_packages):
        graph = defaultdict(set)
        for importer, imported in sorted(pairs):
            graph[importer].add(imported)
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            found.append(" <- ".join(error.args[1]))
    return found


def floor_entry(name: str) -> str:
    """The entry of FLOORS that a module belongs to."""
    entries = [entry for floor in FLOORS for entry in floor]
    inside = [e for e in entries if name == e or name.startswith(f"{e}.")]
    if inside:
        return max(inside, key=len)
    if name.count(".") == 1:
        return "latlib.*"
    raise LookupError(f"{name} has no floor: give its package one in FLOORS")


def _package(name: str) -> str:
    """What circles between packages are counted over; the core's modules are one package each."""
    entry = floor_entry(name)
    return name if entry == "latlib.*" else entry


def upward_arrows(sources: Sources) -> list[str]:
    """Imports of something on a higher floor."""
    height = {entry: number for number, floor in enumerate(FLOORS) for entry in floor}
    found = []
    for arrow in arrows(sources):
        if height[floor_entry(arrow.importer)] < height[floor_entry(arrow.imported)]:
            found.append(str(arrow))
    return found


def string_imports(sources: Sources) -> list[str]:
    """Modules of ours that are imported, or named to be imported, in a string.

    The lazy `latlib/__init__.py` may; so may names that another process imports: the one after
    `-m`, and those that a server forks workers with.
    """
    found = []
    for module in sources.values():
        if module.name == LAZY:
            continue
        elsewhere = {id(node) for node in _names_of_processes(module.tree)}
        skipped = elsewhere | {id(docstring.value) for docstring in docstrings(module.tree)}
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Constant) or id(node) in skipped:
                continue
            if isinstance(node.value, str) and _names_a_module(node.value, sources):
                found.append(f"{module.name}:{node.lineno} {node.value!r}")
    return found


def _names_a_module(text: str, sources: Sources) -> bool:
    whole, _, _ = text.partition(":")  # "module:function" too
    inside = re.findall(r"(?:\bimport\s+|\bfrom\s+|__import__\(\W|import_module\(\W)([\w.]+)", text)
    return any(name in sources and name != LAZY for name in (whole, *inside))


def _names_of_processes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == FORKED_WITH:
            yield from ast.walk(node)
        if isinstance(node, ast.List | ast.Tuple):
            for before, after in zip(node.elts, node.elts[1:]):
                if isinstance(before, ast.Constant) and before.value == "-m":
                    yield after


def third_parties(sources: Sources, known: Iterable[str]) -> list[str]:
    """What the core (without `models`, which opens other people's) imports beyond CORE_NEEDS, and
    matplotlib outside report/. `known`: names of the standard library."""
    fine = CORE_NEEDS | set(known) | {"latlib", "__future__"}
    found = []
    for module in sources.values():
        for node in ast.walk(module.tree):
            for package in sorted(_packages(node)):
                in_report = module.name.startswith("latlib.report")
                if module.is_core and package not in fine:
                    found.append(f"{module.name}:{node.lineno} imports {package}")
                elif package == ONLY_REPORT and not in_report:
                    found.append(f"{module.name}:{node.lineno} imports {package}")
    return found


def _packages(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return {node.module.partition(".")[0]}
    return set()


# ---- size and density ------------------------------------------------------------------------


def docstrings(tree: ast.AST) -> list[ast.Expr]:
    """The statements that are docstrings."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                if isinstance(first.value.value, str):
                    found.append(first)
    return found


def nodes(tree: ast.AST) -> int:
    """Syntax nodes of a tree, itself included."""
    return sum(1 for _ in ast.walk(tree))


def functions(module: Module) -> Iterator[Function]:
    """Every function and method, nested ones too."""
    return (node for node in ast.walk(module.tree) if isinstance(node, Function))


def total_nodes(sources: Sources) -> int:
    """Syntax nodes over all modules."""
    return sum(nodes(module.tree) for module in sources.values())


def nodes_a_line(sources: Sources) -> float:
    """Syntax nodes a line of code, over all modules."""
    return total_nodes(sources) / sum(len(module.code_lines) for module in sources.values())


def core_lines(sources: Sources) -> int:
    """Lines of the modules at the top level, all of them counted."""
    packages = {name.rpartition(".")[0] for name in sources}
    core = [m for m in sources.values() if m.is_core and m.name not in packages - {"latlib"}]
    return sum(len(module.text.splitlines()) for module in core)


def long_files(sources: Sources) -> list[str]:
    """Modules over FILE_LINES lines."""
    sizes = {name: len(module.text.splitlines()) for name, module in sources.items()}
    return [f"{name}: {size} lines" for name, size in sizes.items() if size > FILE_LINES]


def long_functions(sources: Sources) -> list[str]:
    """Functions of FUNCTION_LINES lines or more, docstring included."""
    found = []
    for module in sources.values():
        for function in functions(module):
            size = (function.end_lineno or 0) - function.lineno + 1
            if size >= FUNCTION_LINES:
                found.append(f"{module.name}.{function.name}: {size} lines")
    return found


def dense_functions(sources: Sources) -> list[str]:
    """Functions of SMALL_FUNCTION code lines or more that pack too much into a line."""
    found = []
    for module in sources.values():
        for function in functions(module):
            span = range(function.lineno, (function.end_lineno or 0) + 1)
            lines = len(module.code_lines & set(span))
            if lines < SMALL_FUNCTION:
                continue
            ratio = nodes(function) / lines
            if ratio > NODES_A_LINE_OF_A_FUNCTION:
                found.append(f"{module.name}.{function.name}: {ratio:.1f} nodes a line")
    return found


# ---- names -----------------------------------------------------------------------------------


def public(module: Module) -> list[Function | ast.ClassDef]:
    """Functions and classes that a module defines at its top and does not hide."""
    return [
        node
        for node in module.tree.body
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
    ]


def without_docstring(sources: Sources) -> list[str]:
    """Modules, public functions, public classes and their public methods of five lines or more; a
    method that a protocol or an abstract class explains is explained there."""
    found = []
    explained = {name for module in sources.values() for name in _explained(module)}
    for module in sources.values():
        documented = [module.tree, *public(module)]
        for owner in public(module):
            if isinstance(owner, ast.ClassDef):
                methods = [method for method in owner.body if _needs_words(method)]
                documented += [m for m in methods if m.name not in explained or _is_base(owner)]
        for node in documented:
            if not ast.get_docstring(node):
                found.append(f"{module.name}.{getattr(node, 'name', '')}".rstrip("."))
    return found


def _is_base(owner: ast.stmt) -> bool:
    bases = {ast.unparse(base) for base in getattr(owner, "bases", ())}
    return bool(bases & {"ABC", "Protocol"})


def _explained(module: Module) -> set[str]:
    """Names of the documented methods of protocols and abstract classes."""
    bases = [owner for owner in public(module) if _is_base(owner)]
    methods = [m for owner in bases for m in owner.body if isinstance(m, Function)]
    return {method.name for method in methods if ast.get_docstring(method)}


def _needs_words(method: ast.stmt) -> bool:
    if not isinstance(method, Function) or method.name.startswith("_"):
        return False
    return (method.end_lineno or 0) - method.lineno + 1 >= 5


def double_names(sources: Sources) -> list[str]:
    """Public names that two modules define; every module may have a `main`."""
    where = defaultdict(list)
    for module in sources.values():
        for node in public(module):
            where[node.name].append(module.name)
    where.pop("main", None)
    return [f"{name}: {', '.join(places)}" for name, places in where.items() if len(places) > 1]


def empty_names(sources: Sources) -> list[str]:
    """Modules and definitions called after nothing that they do."""
    found = [name for name in sources if EMPTY_NAMES & set(name.split("."))]
    for module in sources.values():
        for node in ast.walk(module.tree):
            if isinstance(node, Function | ast.ClassDef):
                if node.name.lower().strip("_") in EMPTY_NAMES:
                    found.append(f"{module.name}.{node.name}")
    return found


def house_words(sources: Sources) -> list[str]:
    """Definitions, parameters and fields whose names hold a word of HOUSE_WORDS."""
    found = []
    for module in sources.values():
        for node in ast.walk(module.tree):
            name = _defined_name(node)
            words = re.findall(r"[a-z]+", re.sub(r"([A-Z])", r"_\1", name).lower())
            if HOUSE_WORDS & set(words):
                found.append(f"{module.name}:{node.lineno} {name}")
    return found


def _defined_name(node: ast.AST) -> str:
    if isinstance(node, Function | ast.ClassDef):
        return node.name
    if isinstance(node, ast.arg):
        return node.arg
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.attr
    return ""


def unused_names(sources: Sources, users: Iterable[str]) -> list[str]:
    """Public functions, classes and methods that neither latlib nor `users` use.

    users: texts that count as use: notebooks, benchmarks, pages, scripts; not the tests. A method
    of a class with bases may be there for its base to call, and a claim is there for the
    ledger that `@claim(...)`, or a decorator that returns one, enters it in: these are left out.
    """
    used: set[str] = set()
    for module in sources.values():
        used |= {name for node in ast.walk(module.tree) for name in _used(node)}
    for text in users:
        used.update(re.findall(r"\w+", text))
    found = []
    for module in sources.values():
        entering = {"claim", *_returning("claim", module)}
        for node in public(module):
            if isinstance(node, Function) and _decorators(node) & entering:
                continue
            names = [node.name]
            if isinstance(node, ast.ClassDef) and not node.bases:
                methods = [m for m in node.body if isinstance(m, Function)]
                names += [f"{node.name}.{m.name}" for m in methods if not m.name.startswith("_")]
            for name in names:
                if name.rpartition(".")[2] not in used:
                    found.append(f"{module.name}.{name}")
    return found


def _returning(name: str, module: Module) -> set[str]:
    """The functions of a module that return a call of `name`."""
    found = set()
    for function in module.tree.body:
        if not isinstance(function, Function):
            continue
        returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
        if name in {_called(value) for value in returned}:
            found.add(function.name)
    return found


def _decorators(node: Function) -> set[str]:
    return {_called(decorator) for decorator in node.decorator_list}


def _called(node: ast.expr | None) -> str:
    """The name that a call calls, '' of anything else."""
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return node.func.id if called else ""


def _used(node: ast.AST) -> tuple[str, ...]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return (node.id,)
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        return (node.attr,)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return tuple(re.findall(r"\w+", node.value)) if len(node.value) < 40 else ()
    return ()


def names_imported(source: str) -> set[str]:
    """Dotted names that a source takes from latlib."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("latlib"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def exists(sources: Sources, name: str) -> bool:
    """Whether a dotted name is a module, or a thing that one has."""
    if name in sources:
        return True
    module, _, thing = name.rpartition(".")
    while module and module not in sources:
        module, _, thing = module.rpartition(".")
    return bool(module) and thing in _names_of(sources[module])


def _names_of(module: Module) -> set[str]:
    """What a module defines at its top, or hands on by `__all__`; what the package itself loads
    lazily stands in strings, too."""
    found = set()
    for node in module.tree.body:
        if isinstance(node, Function | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            if module.name == LAZY or "__all__" in names:
                names |= {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
            found |= names
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


# ---- words that lead out of the repository ---------------------------------------------------

# Documents that a reader of the repository does not have.
OUTSIDE = re.compile(
    r"\bFACTS\b|\[[FT]\d+\]|\[recall\]|the project's notes|seeds/\d{3}|DESIGN\.md|ORGANISM\.md|"
    r"TRAPS\.md"
)
# A folder of one machine; /home/me stands for anybody's.
MACHINE = re.compile(r"(?<![\w.])/(?:home/(?!me/)|Users/|work/|root/)\w|[A-Z]:\\Users\\")


def marks(pattern: re.Pattern[str], texts: dict[str, str]) -> list[str]:
    """file:line of every match; texts: file -> text."""
    found = []
    for file, text in texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            if match := pattern.search(line):
                found.append(f"{file}:{number} {match[0]}")
    return found


def main() -> None:
    """Print what breaks a limit, and the sizes: `python tests/repository/house.py [WORD]` shows the
    lines that hold a word, such as a package's name."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    sources = read_sources(Path(__file__).resolve().parents[2] / "latlib")
    limits = (relative_imports, circles, upward_arrows, string_imports, long_files, long_functions)
    limits += (dense_functions, without_docstring, double_names, empty_names, house_words)
    for limit in limits:
        for line in limit(sources):
            if word in line:
                print(f"{limit.__name__}: {line}")
    mine = {name: module for name, module in sources.items() if word in name}
    print(f"core: {core_lines(sources)} lines of at most {CORE_LINES}")
    print(f"{word or 'latlib'}: {total_nodes(mine)} nodes, {nodes_a_line(mine):.2f} a line of code")


if __name__ == "__main__":
    main()
