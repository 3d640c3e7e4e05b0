"""Where the built book lies, and whether it is newer than what it is built from."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"


def newest_source() -> Path:
    "The file, of those that the book is built from, that was changed last."
    files = [*(ROOT / "_ext").glob("*.py"), ROOT / "_config.yml", ROOT / "_toc.yml", ROOT / "references.bib"]
    files += (ROOT / "mha_book" / "bench").glob("*.py")  # no notebook exports these
    files += [p for p in (ROOT / "nbs").rglob("*.*") if ".ipynb_checkpoints" not in p.parts]
    return max(filter(Path.is_file, files), key=lambda path: path.stat().st_mtime)


def no_book() -> str:
    "Why there is no book to test; empty if there is one."
    index, source = HTML / "searchindex.js", newest_source()
    if not index.exists():
        return "the book is not built: make book"
    if index.stat().st_mtime < source.stat().st_mtime:
        return f"the built book is older than {source.relative_to(ROOT).as_posix()}: make book"
    return ""


NO_BOOK = no_book()
needs_book = pytest.mark.skipif(bool(NO_BOOK), reason=NO_BOOK)
