"""Import the package where only what it requires is installed: `python import_alone.py FOLDER REQUIREMENT ...`.

Everything else in site-packages is refused. Prints the file that was imported.
"""

import importlib.metadata
import re
import sys


def normal(name: str) -> str:
    "A distribution's name as the packaging standards compare it."
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(names: list[str]) -> set[str]:
    "These distributions and all that they require, extras apart."
    seen, todo = set(), [normal(name) for name in names]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # wanted on another system only
            continue
        todo += [normal(re.match(r"[\w.-]+", line)[0]) for line in lines if "extra ==" not in line]
    return seen


class Refuse:
    "An importer that refuses every installed package outside `allowed`."

    def __init__(self, allowed: set[str]):
        owners = importlib.metadata.packages_distributions()
        self.names = {name for name, dists in owners.items() if not allowed & {normal(dist) for dist in dists}}
        self.names.discard("mha_book")

    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            raise ModuleNotFoundError(f"{name} is not required by the package", name=name)


if __name__ == "__main__":
    folder, *required = sys.argv[1:]
    sys.meta_path.insert(0, Refuse(closure(required)))
    sys.path.insert(0, folder)
    import mha_book

    print(mha_book.__file__)
