"""Teach Jupyter Book nbdev's `#|` cell directives, and keep its cache honest.

`read_nb` replaces the book's reader of .ipynb files. Execution, cache and page all see the notebook that it returns:
directives turned into what the book understands, and the page's stamp added. The file on disk stays as it is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "_build" / ".jupyter_cache"
TIMEOUT = 300  # seconds after which a notebook is stopped

DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(?P<key>[^\s:]+)\s*:?\s*(?P<value>.*?)\s*$")
CONTINUATION = re.compile(r"^\s*#\s*\|\s{2,}(?P<text>\S.*?)\s*$")
PROVED = '\n__import__("page_stamp").proved()'  # stands behind a proof, for its run only
EXPORT_CALL = re.compile(r"\bnbdev_export\s*\(")  # the customary last cell, which only writes the package


def split_directives(source: str) -> tuple[dict[str, str], str]:
    "The directives that open a cell, and the cell without them. A line indented by two spaces continues a value."
    found, key, lines = {}, None, source.splitlines()
    for number, line in enumerate(lines):
        more, directive = CONTINUATION.match(line), DIRECTIVE.match(line)
        if more and found.get(key):
            found[key] += " " + more["text"]
        elif directive:
            key = directive["key"]
            found[key] = directive["value"]
        elif line.strip():
            return unquoted(found), "\n".join(lines[number:]) if found else source
    return unquoted(found), "" if found else source


def unquoted(found: dict[str, str]) -> dict[str, str]:
    "Values without the quotes around them."
    return {key: re.sub(r"""^(["'])(.*)\1$""", r"\2", value) for key, value in found.items()}


def skip_flags() -> set[str]:
    "Flags that skip a cell: those in settings.ini's `tst_flags`, less those that MHA_BOOK_FLAGS asks to run."
    parser = ConfigParser(interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf8")
    wanted = os.environ.get("MHA_BOOK_FLAGS", "").split()
    return set(parser["DEFAULT"]["tst_flags"].split()) - set(wanted)


def cell_tags(found: dict[str, str], body: str, flags: set[str]) -> list[str]:
    "The book's tags for a cell with these directives."

    def says(key, *values):
        return key in found and found[key].lower() in values

    writes_package = bool(EXPORT_CALL.search(body))
    folded = says("code-fold", "true", "show", "") or bool({"proof", "setup"} & found.keys())
    solution = found.get("code-summary", "").startswith("Solution")
    rules = {
        "remove-cell": "hide" in found or says("include", "false") or not body.strip() or writes_package,
        "remove-input": "hide_input" in found or says("echo", "false"),
        "remove-output": "hide_output" in found or says("output", "false"),
        "hide-input": folded and not solution,
        "hide-cell": folded and solution,  # its output would give the answer away
        "proof": "proof" in found,
        "remove-stderr": says("warning", "false"),
        "skip-execution": says("eval", "false") or bool(flags & found.keys()) or writes_package,
    }
    return [tag for tag, holds in rules.items() if holds]


def render_options(found: dict[str, str]) -> dict:
    "What the book's renderer is told about a cell's figure and its folded code."
    options = {}
    figure = {ours: found[theirs] for ours, theirs in (("name", "label"), ("caption", "fig-cap")) if theirs in found}
    if figure:
        options["figure"] = figure
    if "fig-alt" in found:
        options["image"] = {"alt": found["fig-alt"]}
    title = fold_title(found)
    if title:
        options["code_prompt_show"] = options["code_prompt_hide"] = title
    return options


def fold_title(found: dict[str, str]) -> str:
    "What stands over folded code. That a proof ran is known when it has: `book_pages` puts it there."
    if "setup" in found:
        return "Setup"
    return found.get("proof", "") or found.get("code-summary", "")


def merge_setup(cells: list) -> list:
    "The cells in which cells of setup that follow each other are one."
    merged: list = []
    for cell in cells:
        before = merged[-1] if merged else None
        if before is not None and is_setup(before) and is_setup(cell):
            before.source += "\n\n" + split_directives(cell.source)[1]
        else:
            merged.append(cell)
    return merged


def is_setup(cell) -> bool:
    "Whether a cell imports or chooses what the page works with."
    return cell.cell_type == "code" and "setup" in split_directives(cell.source)[0]


def translate(cell, flags: set[str]) -> None:
    "Replace a code cell's directives by tags and options."
    found, body = split_directives(cell.source)
    if "proof" in found:
        body += PROVED
    tags = [*cell.metadata.get("tags", []), *cell_tags(found, body, flags)]
    options = {**cell.metadata.get("mystnb", {}), **render_options(found)}
    cell.source = body
    if "skip-execution" in tags:
        cell.outputs, cell.execution_count = [], None
    if tags:
        cell.metadata["tags"] = tags
    if options:
        cell.metadata["mystnb"] = options


def add_stamp(nb) -> None:
    "A first cell that starts the page's clock, and a last one that says where, when and how long the page ran."
    new = nbformat.v4.new_code_cell
    start = new('__import__("page_stamp").start()', id="stamp-start", metadata={"tags": ["remove-cell"]})
    show = new('__import__("page_stamp").show()', id="stamp-show", metadata={"tags": ["remove-input"]})
    nb.cells = [start, *nb.cells, show]


def surroundings() -> str:
    "A hash of what decides a notebook's outputs besides its own cells: package, measured data, stamp and versions."
    digest = hashlib.sha256(platform.python_version().encode())
    for name in ("torch", "numpy", "matplotlib"):
        digest.update(f"{name}=={importlib.metadata.version(name)}".encode())
    files = [*(ROOT / "mha_book").rglob("*.py"), *(ROOT / "nbs" / "measured").rglob("*.*"), ROOT / "_ext/page_stamp.py"]
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def read_nb(text: str):
    "The notebook as the book is to see it."
    nb = nbformat.reads(text, as_version=4)
    flags = skip_flags()
    nb.cells = merge_setup(nb.cells)
    for cell in nb.cells:
        if cell.cell_type == "code":
            translate(cell, flags)
    add_stamp(nb)
    # The cache compares cells and kernelspec only, so what else decides the outputs goes into the kernelspec.
    spec = nb.metadata.setdefault("kernelspec", {"name": "python3", "display_name": "Python 3", "language": "python"})
    spec["mha_book"] = surroundings()
    return nb


def prepare_kernels() -> None:
    "Environment of the kernels: they find the package and the stamp, export nothing, and use one thread."
    os.environ["IN_TEST"] = "1"  # makes nbdev_export() do nothing
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "_ext")])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # small tensors are slower by far when busy threads share the cores


def copy_mathjax(app) -> None:
    "Put MathJax beside the pages: one file, no fonts, nothing from the network."
    package = importlib.metadata.distribution("sphinx-mathjax-offline")
    target = Path(app.outdir) / "_static" / "mathjax"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(package.locate_file("sphinx-mathjax-offline/static/mathjax/tex-svg.js"), target)


def configure(app, config) -> None:
    "Set what the book's configuration file cannot say."
    prepare_kernels()
    sys.path.insert(0, str(ROOT))  # for autodoc
    config.nb_execution_cache_path = str(CACHE)
    config.mathjax_path = "mathjax/tex-svg.js"
    config.nb_custom_formats = {**config.nb_custom_formats, ".ipynb": ["nbdev_bridge.read_nb", {}]}
    config.mha_book_surroundings = surroundings()


def setup(app):
    "Register with Sphinx."
    app.add_config_value("mha_book_surroundings", "", "env")  # "env": when it changes, every page is read again
    app.connect("config-inited", configure, priority=100)  # before myst-nb looks
    app.connect("builder-inited", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
