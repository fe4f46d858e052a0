"""The house rules as checks on source text. Each returns `path:line: what is wrong` for everything it finds."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import PurePosixPath
from typing import NamedTuple

FILE_LINES, KERNEL_FILE_LINES, FUNCTION_LINES, ARGUMENTS, NESTING = 400, 450, 80, 8, 4
PAGE_LINES = 60
"""Every `*_iteration` is a table of contents: it fits on a screen."""

THE_MESH = "megarlhf/parallel/mesh.py"
THE_PATCHES = "megarlhf/parallel/cpu.py"
THE_UNPICKLER = "megarlhf/checkpoint/plain_metadata.py"
THE_RUN_FILES = "megarlhf/observe/run_files.py"
_RUN_FILES = re.compile(
    r"(config\.yaml|command\.txt|trainer\.txt|versions\.json|(metrics|samples)\.jsonl|report\.(html|json)|about\.json|checkpoints|capsules)|08d"
)
_OURS = {"megarlhf", "megarlhf_kernels", "tests", "__future__"}
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
_BLOCK = ast.If | ast.For | ast.AsyncFor | ast.While | ast.With | ast.AsyncWith | ast.Try | ast.TryStar | ast.Match
_GLOBAL = {"trainers", "runs", "eval", "judges", "gates", "runtime", "commands", "scaling"}
_OF_DATA_RANKS = {"data_rank", "own_part", "check_divides", "gather_rows"}
_OVER_AN_AXIS = (["size"], ["group"], ["all_reduce"], ["gather"], ["broadcast"], ["broadcast_object"])
_UNSAFE_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
_UNSAFE_CALLS = {"torch.load", "FileSystemReader", "os.system", "os.popen", "eval", "exec"}


class Source(NamedTuple):
    """One Python file: its path inside the repository, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return _parsed(self.text, self.path)

    @property
    def is_test(self) -> bool:
        return PurePosixPath(self.path).parts[0] == "tests"


Found = Iterator[str]


@cache
def _parsed(text: str, path: str) -> ast.Module:
    return ast.parse(text, path)


def file_length(source: Source) -> Found:
    """Files stay short enough to be read in one go."""
    limit = KERNEL_FILE_LINES if source.path.startswith("kernels/") else FILE_LINES
    lines = len(source.text.splitlines())
    if lines > limit:
        yield f"{source.path}:{lines}: {lines} lines, at most {limit}"


def function_size(source: Source) -> Found:
    """Functions are short, take few arguments and do not nest deeply."""
    for function in _functions(source.tree):
        where = f"{source.path}:{function.lineno}: {function.name}"
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        limit = PAGE_LINES if function.name.endswith("_iteration") else FUNCTION_LINES
        if lines > limit:
            yield f"{where} has {lines} lines, at most {limit}"
        arguments = _argument_count(function)
        if arguments > ARGUMENTS and not _is_kernel(function):
            yield f"{where} takes {arguments} arguments, at most {ARGUMENTS}"
        depth = max((_depth(statement) for statement in function.body), default=0)
        if depth > NESTING:
            yield f"{where} nests {depth} deep, at most {NESTING}"


def _is_kernel(function: _FUNCTION) -> bool:
    """A Triton kernel takes every pointer and size by itself: there is nothing to bundle them in."""
    return any(isinstance(decorator, ast.Name) and decorator.id == "jit" for decorator in function.decorator_list)


def one_mesh(source: Source) -> Found:
    """Only mesh.py touches Megatron's global process groups."""
    if source.path == THE_MESH or source.is_test:
        return
    for node in ast.walk(source.tree):
        names = {
            ast.Import: lambda n: [alias.name for alias in n.names],
            ast.ImportFrom: lambda n: [n.module or "", *(alias.name for alias in n.names)],
            ast.Attribute: lambda n: [n.attr],
        }.get(type(node), lambda _: [])(node)
        if any("parallel_state" in name.split(".") for name in names):
            yield f"{source.path}:{_line(node)}: parallel_state belongs to {THE_MESH} alone"


def one_patcher(source: Source) -> Found:
    """Only cpu.py changes what other packages define."""
    if source.path == THE_PATCHES or source.is_test:
        return
    foreign = _foreign_names(source.tree)
    for node in ast.walk(source.tree):
        for target in _changed(node):
            chain = _chain(target)
            # torch.backends holds torch's public switches; setting one is use, not a patch.
            if chain and chain[0] in foreign and chain[:2] != ["torch", "backends"]:
                yield f"{source.path}:{_line(node)}: patches {'.'.join(chain)}; that belongs to {THE_PATCHES}"


def no_probing(source: Source) -> Found:
    """A type says what an object has; asking at run time hides a missing type."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            yield f"{source.path}:{node.lineno}: {node.func.id} in place of a type"


def run_files_spelt_once(source: Source) -> Found:
    """What a run leaves has its names in one file; texts may mention them."""
    if source.path == THE_RUN_FILES or source.is_test:
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _RUN_FILES.fullmatch(node.value):
            yield f"{source.path}:{node.lineno}: spells {node.value!r}; {THE_RUN_FILES} does"


def global_batches(source: Source) -> Found:
    """Which rank holds which rows is known below: everybody else holds what every rank holds."""
    above = PurePosixPath(source.path).parts[:1] == ("megarlhf",) and source.path.split("/")[1] in _GLOBAL
    for node in ast.walk(source.tree) if above else ():
        name = _chain(node)[-1:] if isinstance(node, ast.Name | ast.Attribute) else []
        said = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else name
        if isinstance(node, ast.Call):
            over = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            said = ["data_rank"] if _chain(node.func)[-1:] in _OVER_AN_AXIS and "data" in over else []
        if _OF_DATA_RANKS.intersection(said):
            yield f"{source.path}:{_line(node)}: of data ranks"


def no_star_imports(source: Source) -> Found:
    """Every name says where it comes from."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield f"{source.path}:{node.lineno}: import * from {node.module}"


def nothing_unsafe(source: Source) -> Found:
    """No input, model directory or checkpoint may run code; tests make the pickles that would."""
    may_unpickle = source.path == THE_UNPICKLER or source.is_test
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for module in modules:
                if module.split(".")[0] in _UNSAFE_IMPORTS and not may_unpickle:
                    yield f"{source.path}:{node.lineno}: import of {module}"
        elif isinstance(node, ast.Call):
            called = ".".join(_chain(node.func))
            # Megatron's own way to load is torch's, which unpickles.
            plain = called != "dist_checkpointing.load" or any("PlainLoad(" in ast.unparse(a) for a in node.args)
            if called in _UNSAFE_CALLS or not plain:
                yield f"{source.path}:{node.lineno}: {called}()"
            for keyword in node.keywords:
                true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if keyword.arg in ("trust_remote_code", "shell") and true:
                    yield f"{source.path}:{node.lineno}: {keyword.arg}=True"


FILE_RULES: tuple[Callable[[Source], Found], ...] = (
    file_length,
    function_size,
    one_mesh,
    one_patcher,
    no_probing,
    no_star_imports,
    run_files_spelt_once,
    global_batches,
    nothing_unsafe,
)


def documented_settings(sources: Iterable[Source]) -> Found:
    """Every field of every settings class has its docstring, because that is its --help text."""
    classes = [(s.path, node) for s in sources for node in ast.walk(s.tree) if isinstance(node, ast.ClassDef)]
    settings = {"Config"}
    # Classes may derive from settings classes in other files, in any order: repeat until nothing new is found.
    while True:
        derived = {node.name for _, node in classes if settings & {_chain(base)[-1] for base in _bases(node)}}
        if derived <= settings:
            break
        settings |= derived
    for path, node in classes:
        if node.name not in settings:
            continue
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if _is_field(statement) and not _is_docstring(following):
                field = ast.unparse(statement).partition(":")[0]
                yield f"{path}:{_line(statement)}: setting {node.name}.{field} is undocumented"


def metric_names(source: Source, families: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (where, name) for every string in the file that looks like a metric's whole name."""
    pattern = re.compile(rf"(?:{'|'.join(sorted(families))})/[a-z0-9_]*[a-z0-9]")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and pattern.fullmatch(node.value):
            yield f"{source.path}:{node.lineno}", node.value


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, _FUNCTION))


def _argument_count(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"])) + (given.vararg is not None) + (given.kwarg is not None)


def _depth(statement: ast.AST) -> int:
    """Count the deepest chain of blocks; an elif is as deep as its if, an inner function is counted by itself."""
    if isinstance(statement, _FUNCTION | ast.ClassDef):
        return 0
    inner = max((_depth(child) for child in ast.iter_child_nodes(statement)), default=0)
    if isinstance(statement, ast.If) and len(statement.orelse) == 1 and isinstance(statement.orelse[0], ast.If):
        chained = _depth(statement.orelse[0])
        return max(1 + max(map(_depth, statement.body)), chained)
    return inner + isinstance(statement, _BLOCK)


def _foreign_names(tree: ast.Module) -> set[str]:
    """Names bound to modules and objects of other packages, the standard library aside."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or a.name.split(".")[0] for a in node.names if _is_foreign(a.name)}
        elif isinstance(node, ast.ImportFrom) and not node.level and _is_foreign(node.module or ""):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign) and _is_module_lookup(node.value):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def _is_foreign(module: str) -> bool:
    top = module.partition(".")[0]
    return top not in _OURS and top not in sys.stdlib_module_names


def _is_module_lookup(value: ast.AST) -> bool:
    if isinstance(value, ast.Call):
        return _chain(value.func)[-1:] == ["import_module"]
    return isinstance(value, ast.Subscript) and _chain(value.value) == ["sys", "modules"]


def _changed(node: ast.AST) -> list[ast.expr]:
    """Return the attributes a statement or call sets or deletes."""
    if isinstance(node, ast.Assign | ast.Delete):
        targets: list[ast.expr] = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    elif isinstance(node, ast.Call) and _chain(node.func)[-1:] in (["setattr"], ["delattr"]) and node.args:
        return [node.args[0]]
    else:
        return []
    flat = [inner for target in targets for inner in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [target for target in map(_without_namespace, flat) if isinstance(target, ast.Attribute)]


def _without_namespace(target: ast.expr) -> ast.expr:
    """See through `vars(module)["name"] = ...` and `module.__dict__["name"] = ...`."""
    if isinstance(target, ast.Subscript):
        holder = target.value
        if isinstance(holder, ast.Call) and _chain(holder.func) == ["vars"] and holder.args:
            return ast.Attribute(value=holder.args[0], attr="*")
        if isinstance(holder, ast.Attribute) and holder.attr == "__dict__":
            return holder
    return target


def _chain(node: ast.AST) -> list[str]:
    """Split `a.b.c` into its names; empty when the root is not a plain name."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        root = _chain(node.value)
        return [*root, node.attr] if root else []
    return []


def _bases(node: ast.ClassDef) -> list[ast.expr]:
    return [base for base in node.bases if _chain(base)]


def _is_field(statement: ast.AST) -> bool:
    return (
        isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and not statement.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(statement.annotation)
    )


def _is_docstring(statement: ast.AST | None) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str) and bool(value.value.strip())


def _line(node: ast.AST) -> int:
    return node.lineno if isinstance(node, ast.expr | ast.stmt) else 0
