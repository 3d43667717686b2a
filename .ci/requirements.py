"""Prints the requirements of pyproject.toml that an environment needs: one place for them, and builds stay unisolated.

The kernels must be compiled against the headers of the very jaxlib that will run them, so the build runs without
isolation and its requirements are installed like any other.
"""

import pathlib
import sys
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())
groups = {
    "build": [*project["build-system"]["requires"], "cmake>=3.25", "ninja"],
    "run": project["project"]["dependencies"],
    **project["project"]["optional-dependencies"],
}
for name in sys.argv[1:]:
    print(*groups[name], sep="\n")
