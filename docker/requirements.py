"""Print what a pyproject.toml requires, one requirement a line: ``python requirements.py pyproject.toml [EXTRA,...]``.

The images install these in a layer of their own, which a change of the sources leaves as it is.
"""

import sys
import tomllib
from pathlib import Path


def requirements(project: dict, extras: list[str]) -> list[str]:
    """Of a table ``[project]``; an extra that names other extras of the project brings theirs."""
    lines = list(project["dependencies"])
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            nested = line.removeprefix(f"{project['name']}[").rstrip("]")
            lines += requirements({**project, "dependencies": []}, nested.split(",")) if nested != line else [line]
    return lines


if __name__ == "__main__":
    table = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
    print("\n".join(requirements(table, [extra for extra in sys.argv[2].split(",") if extra])))
