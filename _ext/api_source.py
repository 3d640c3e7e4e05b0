"""What the package's source says of itself: every name with its parameters, their comments, and where it comes from.

Read from the files with `ast` and `tokenize`; nothing is imported. nbdev leaves a line before each exported cell that
names the notebook and the cell; a plain module has no such lines, and no chapter.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CELL = re.compile(r"^# %% (?:\.\./)*nbs/(?P<page>[\w.-]+)\.ipynb(?: #(?P<cell>[\w-]+))?\s*$")
FOLDERS = "heads", "kernels", "plugs", "variants", "instruments", "models", "lab", "bench"
# torch's two words, which mean the same wherever they stand without a comment
COMMON = {"device": "where its tensors live; torch's default unless told", "dtype": "dtype of its weights"}
ARRAYS = "Float", "Int", "Bool", "Integer", "Num", "Complex", "Inexact", "Real", "Shaped", "UInt8"


@dataclass
class Param:
    "A parameter, or a field of a dataclass."

    name: str
    annotation: ast.expr | None = None
    default: str | None = None  # as it is written
    meaning: str = ""  # its comment
    lines: tuple[int, int] = (0, 0)  # first and last
    prefix: str = ""  # "*" or "**"
    mark: str = ""  # "*" or "/" where only that stands before the next parameter


@dataclass
class Entry:
    "A function, a class, a method, a property or a value, and what stands beside it."

    kind: str
    name: str  # in its module: Class.method
    module: str  # without the package: heads.layer
    doc: str = ""
    params: list[Param] = field(default_factory=list)
    returns: Param | None = None
    page: str | None = None  # the notebook, without .ipynb
    cell: str | None = None
    line: int = 0
    bases: list[str] = field(default_factory=list)
    members: list[Entry] = field(default_factory=list)
    decorators: list[str] = field(default_factory=list)

    @property
    def path(self) -> str:
        "Where it is imported from, when it is no public name."
        return f"{self.module}.{self.name}"


# Comments


def comments(source: str) -> dict[int, tuple[int, str, bool]]:
    "Line -> (column, text, whether it stands alone) of each comment."
    lines, found = source.splitlines(), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            found[row] = column, token.string.lstrip("#").strip(), not lines[row - 1][:column].strip()
    return found


def above(notes: dict, line: int, column: int) -> str:
    "The comment lines that stand directly above a line, and no further to the right than what stands there."
    texts = []
    while (line := line - 1) in notes and notes[line][2] and notes[line][0] <= column:
        texts.insert(0, notes[line][1])
    return " ".join(texts)


def behind(notes: dict, line: int, column: int) -> str:
    "The comment behind a line, and its continuations: comment lines below it, further to the right than `column`."
    if line not in notes or notes[line][2]:
        return ""
    texts = [notes[line][1]]
    while (line := line + 1) in notes and notes[line][2] and notes[line][0] > column:
        texts.append(notes[line][1])
    return " ".join(texts)


def add_meanings(params: list[Param], notes: dict, column: int) -> None:
    "Give each parameter the comment behind it or above it; one that begins with `all` holds for lines below too."
    shared, shared_line = "", 0
    for param in params:
        first, last = param.lines
        before = above(notes, first, column)
        if before.startswith("all "):
            shared, shared_line = before, last
        near = shared if shared and last - shared_line <= 1 else ""
        own = behind(notes, last, column) or behind(notes, first, column)
        shared_line = last if near and not own else shared_line
        param.meaning = own or before or near or COMMON.get(param.name, "")


# Signatures


def text(node: ast.expr | None) -> str | None:
    "An expression as it is written."
    return None if node is None else ast.unparse(node)


def arguments(node: ast.FunctionDef) -> list[Param]:
    "The parameters of a function in their order, marks included."
    spec, params = node.args, []
    plain = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(plain) - len(spec.defaults)) + list(spec.defaults)
    for position, (arg, default) in enumerate(zip(plain, defaults), 1):
        params.append(argument(arg, default))
        if position == len(spec.posonlyargs):
            params.append(Param("", mark="/"))
    if spec.vararg:
        params.append(argument(spec.vararg, None, "*"))
    elif spec.kwonlyargs:
        params.append(Param("", mark="*"))
    params += [argument(arg, default) for arg, default in zip(spec.kwonlyargs, spec.kw_defaults)]
    return params + ([argument(spec.kwarg, None, "**")] if spec.kwarg else [])


def argument(arg: ast.arg, default: ast.expr | None, prefix: str = "") -> Param:
    "One parameter of a function, without its comment."
    last = max(arg.end_lineno, default.end_lineno if default else 0)
    return Param(arg.arg, arg.annotation, text(default), lines=(arg.lineno, last), prefix=prefix)


def signature(node: ast.FunctionDef, notes: dict, method: bool) -> tuple[list[Param], Param]:
    "The parameters of a function, `self` apart, and what it returns, with their comments."
    params = arguments(node)
    if method and params and params[0].name in ("self", "cls"):
        del params[0]
    column = min((arg.col_offset for arg in all_args(node)), default=0)
    end = node.returns.end_lineno if node.returns else node.lineno
    inner = {line: note for line, note in notes.items() if line >= node.lineno}  # what is above says other things
    if node.returns:
        inner.pop(end, None)
    add_meanings([param for param in params if param.name], inner, column)
    return params, Param("return", node.returns, meaning=behind(notes, end, 10_000) if node.returns else "")


def all_args(node: ast.FunctionDef) -> list[ast.arg]:
    "Every parameter of a function."
    spec = node.args
    extra = [arg for arg in (spec.vararg, spec.kwarg) if arg]
    return [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *extra]


def fields(node: ast.ClassDef, notes: dict) -> list[Param]:
    "The fields of a dataclass, a NamedTuple, a TypedDict or a Protocol; those that begin with `_` are left out."
    params = []
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        if text(item.annotation) == "KW_ONLY":
            params.append(Param("", mark="*"))
        elif not item.target.id.startswith("_"):
            lines = item.lineno, item.end_lineno
            params.append(Param(item.target.id, item.annotation, text(item.value), lines=lines))
    add_meanings([param for param in params if param.name], notes, node.col_offset + 4)
    return params


# Entries


def entry_of(node: ast.stmt, module: str, notes: dict, within: str = "") -> Entry | None:
    "The entry of a definition; None for a statement that defines no name."
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return function_entry(node, module, notes, within)
    if isinstance(node, ast.ClassDef):
        return class_entry(node, module, notes)
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    if not isinstance(target, ast.Name) or not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return None
    said = above(notes, node.lineno, node.col_offset) or behind(notes, node.end_lineno, 10_000)
    annotation = Param("", getattr(node, "annotation", None))
    return Entry("data", target.id, module, said, returns=annotation, line=node.lineno)


def function_entry(node: ast.FunctionDef, module: str, notes: dict, within: str = "") -> Entry:
    "The entry of a function, or of a method of class `within`."
    decorators = [text(decorator) for decorator in node.decorator_list]
    params, returns = signature(node, notes, bool(within) and "staticmethod" not in decorators)
    kind = "property" if "property" in decorators else "method" if within else "function"
    name = f"{within}.{node.name}" if within else node.name
    doc = ast.get_docstring(node) or ""
    return Entry(kind, name, module, doc, params, returns, line=node.lineno, decorators=decorators)


def class_entry(node: ast.ClassDef, module: str, notes: dict) -> Entry:
    "The entry of a class: its parameters are those of `__init__`, or its fields."
    entry = Entry("class", node.name, module, ast.get_docstring(node) or "", line=node.lineno)
    entry.bases = [text(base) for base in node.bases]
    entry.decorators = [text(decorator) for decorator in node.decorator_list]
    entry.params = fields(node, notes)
    for item in node.body:
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if item.name == "__init__":
                entry.params = signature(item, notes, True)[0]
            elif item.name in ("__call__",) or not item.name.startswith("_"):
                entry.members.append(function_entry(item, module, notes, node.name))
    entry.members = [member for member in entry.members if member.doc or "Protocol" in entry.bases]
    return entry


def exported(tree: ast.Module) -> list[str] | None:
    "The names that a module's last `__all__` lists; None where it has none."
    lists = [node.value for node in tree.body if isinstance(node, ast.Assign) and text(node.targets[0]) == "__all__"]
    return ast.literal_eval(lists[-1]) if lists else None


def read_module(source: str, module: str) -> list[Entry]:
    "The entries of a module in their order: what `__all__` lists, or whatever is not private."
    tree, notes = ast.parse(source), comments(source)
    listed, entries = exported(tree), {}
    homes = [(line, match) for line, match in enumerate(map(CELL.match, source.splitlines()), 1) if match]
    for node in tree.body:
        entry = entry_of(node, module, notes)
        wanted = entry and not entry.name.startswith("_") and (listed is None or entry.name in listed)
        if wanted and (entry.doc or entry.kind != "data"):
            home = next((match for line, match in reversed(homes) if line < node.lineno), None)
            settle(entry, home)
            entries[entry.name] = entry
    return list(entries.values())


def settle(entry: Entry, home: re.Match | None) -> None:
    "Note which cell of which notebook an entry, and all that belongs to it, comes from."
    entry.page, entry.cell = home.group("page", "cell") if home else (None, None)
    for member in entry.members:
        settle(member, home)


def module_doc(source: str) -> str:
    "A module's docstring."
    return ast.get_docstring(ast.parse(source)) or ""


# The package


@dataclass
class Group:
    "Public names that a reader wants together."

    title: str
    names: list[str]


def read_groups(source: str) -> list[Group]:
    "The names of the last `__all__` in groups, each under the comment that stands alone above it."
    names = exported(ast.parse(source)) or []
    begin = max(match.start() for match in re.finditer(r"^__all__ = \[", source, re.M))
    groups = [Group("", [])]
    for token in tokenize.generate_tokens(io.StringIO(source[begin:]).readline):
        if token.type == tokenize.COMMENT:
            groups.append(Group(token.string.lstrip("# ").strip(), []))
        elif token.type == tokenize.STRING and ast.literal_eval(token.string) in names:
            groups[-1].names.append(ast.literal_eval(token.string))
    return [group for group in groups if group.names]


def modules(package: Path, folder: str) -> Iterator[Path]:
    "The modules of a folder of the package; `figures` is a module beside them."
    single = package / f"{folder}.py"
    found = [single] if single.exists() else sorted((package / folder).glob("*.py"))
    return (path for path in found if not path.stem.startswith("_"))


class Package:
    "All entries of a package, read once."

    def __init__(self, package: Path):
        self.package = package
        self.groups = read_groups((package / "__init__.py").read_text(encoding="utf8"))
        self.public = {name for group in self.groups for name in group.names}
        self.folders, self.docs, self.entries = {}, {}, {}
        for folder in (*FOLDERS, "figures"):
            self.folders[folder] = [self.read(path) for path in modules(package, folder)]
        self.folders = {name: sorted(found, key=self.place) for name, found in self.folders.items()}
        self.homes = {entry.name: entry for entry in self.all() if self.is_public(entry)}

    def read(self, path: Path) -> str:
        "Read one module, and return its name."
        name = ".".join(path.relative_to(self.package).with_suffix("").parts)
        source = path.read_text(encoding="utf8")
        self.docs[name], self.entries[name] = module_doc(source), read_module(source, name)
        return name

    def place(self, module: str) -> tuple[str, str]:
        "For sorting: modules stand as their pages do, plain ones last."
        pages = [entry.page for entry in self.entries[module] if entry.page]
        return (pages[0] if pages else "~", module)

    def all(self) -> Iterator[Entry]:
        "Every function, class and value, members apart."
        for found in self.entries.values():
            yield from found

    def is_public(self, entry: Entry) -> bool:
        "Whether `from mha_book import …` gives it, or the class that it belongs to."
        name = entry.name.split(".")[0]
        return name in self.public and self.sources.get(name) == entry.module

    @functools.cached_property
    def sources(self) -> dict[str, str]:
        "The module that each name of `__init__.py` is imported from."
        tree = ast.parse((self.package / "__init__.py").read_text(encoding="utf8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        return {alias.name: node.module.removeprefix("mha_book.") for node in imports for alias in node.names}

    def title(self, entry: Entry) -> str:
        "Its shortest import path."
        return f"mha_book.{entry.name}" if self.is_public(entry) else f"mha_book.{entry.path}"

    def folder(self, module: str) -> str:
        "The folder that a module stands in."
        return module.split(".")[0]

    def find(self, name: str) -> Entry | None:
        "A function, class or method by its name, the public one first."
        matches = [entry for entry in self.all() if entry.name == name]
        return self.homes.get(name) or (matches[0] if matches else None)

    def meaning(self, param: Param, entry: Entry) -> str:
        "A parameter's comment; where that only points (`all options as in X`), the comment that stands there."
        match = re.match(r"all \w+ as (?:in|for) `([\w.]+)`", param.meaning)
        if not match:
            return param.meaning
        owner = entry.name.rpartition(".")[0]
        siblings = [m for e in self.entries[entry.module] if e.name == owner for m in e.members]
        target = next((m for m in siblings if m.name == f"{owner}.{match[1]}"), None) or self.find(match[1])
        there = [other.meaning for other in target.params if other.name == param.name] if target else []
        return there[0] if there and there[0] else param.meaning


# In words


def shape_text(annotation: ast.expr | None) -> str:
    "An annotation for reading: an array as its shape, `Float b h n d`; all else as it is written."
    if annotation is None:
        return ""
    found = []

    class Shorten(ast.NodeTransformer):
        def visit_Subscript(self, node):
            kind = text(node.value)
            if kind in ARRAYS and isinstance(node.slice, ast.Tuple) and isinstance(node.slice.elts[1], ast.Constant):
                found.append(f"{kind} {node.slice.elts[1].value}".replace(" ...", " tensor"))
                return ast.Name(f"ARRAY{len(found) - 1}_")
            return self.generic_visit(node)

    tree = Shorten().visit(ast.parse(text(annotation), mode="eval").body)
    return re.sub(r"ARRAY(\d+)_", lambda match: found[int(match[1])], ast.unparse(tree))


def first_sentence(doc: str) -> str:
    "The first sentence of a docstring, on one line."
    paragraph = " ".join(doc.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`\"])", paragraph)[0]


def split_doc(doc: str) -> dict[str, list[str]]:
    "A docstring's paragraphs under `prose`, what it says it raises under `Raises`, and papers under `Source`."
    parts = {"prose": [], "Raises": [], "Source": []}
    for paragraph in filter(str.strip, doc.split("\n\n")):
        if paragraph.startswith(("    ", "- ")):
            parts["prose"].append(paragraph)
            continue
        line = " ".join(paragraph.split())
        for piece in re.split(r"(?:^|(?<=[.:)] ))(?=Raises\b|Sources?:)", line):
            key = "Raises" if piece.startswith("Raises") else "Source" if piece.startswith("Source") else "prose"
            piece = re.sub(r"^(Raises|Sources?:)\s*", "", piece) if key != "prose" else piece
            if piece.strip():
                parts[key].append(piece.strip())
    return parts
