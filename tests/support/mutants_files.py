"""Writers of files with a fault, by name: what the properties of `tests/bench/test_files.py` have to notice.

`apply` gives a writer, which is called with a path and a text, and what it breaks.
"""

import os
from pathlib import Path

from support.mutants import Mutant, named


def _renames(path, text):
    "Write beside, then rename over the path."
    beside = path.with_suffix(".tmp")
    beside.write_text(text, encoding="utf8")
    os.replace(beside, path)


def _renames_at_the_end_of_links(path, text):
    _renames(Path(os.path.realpath(path)), text)


def _opens(path, text):
    path.write_text(text, encoding="utf8")


WRITERS = named(
    Mutant(
        "renames over the path",
        "A link, a pipe or a device becomes a file, and a private file is private no more.",
        lambda: (_renames, {"link", "mode", "second name", "pipe"}),
        "https://github.com/atomantic/PortOS/issues/1893",
    ),
    Mutant(
        "renames at the end of links",
        "The file keeps neither its mode nor its second name.",
        lambda: (_renames_at_the_end_of_links, {"mode", "second name", "pipe"}),
        "https://github.com/experientiallabs/experiential/issues/354",
    ),
    Mutant("opens and cuts", "A disk that is full leaves half a file.", lambda: (_opens, {"full disk", "pipe"})),
)
