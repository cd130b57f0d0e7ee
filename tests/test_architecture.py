"""Imports run one way, and the command line starts without torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

BELOW = {
    "hdit_kernels": set(),
    "protocols": set(),
    "device": {"protocols"},
    "randomness": {"device", "hdit_kernels"},
    "nn": {"hdit_kernels", "protocols"},
    "models": {"hdit_kernels", "nn", "protocols"},
    "diffusion": {"protocols"},
    "spaces": {"protocols"},
    "data": {"device", "protocols", "randomness"},
    "report": {"protocols"},
    "explain": {"protocols"},
    "learning_rate": {"protocols"},
    "config": {
        "protocols",
        "explain",
        "learning_rate",
        "diffusion",
        "models",
        "spaces",
        "data",
    },
    "sampling": {"config", "device", "nn", "protocols", "randomness", "diffusion"},
    "encode": {"config", "protocols", "data", "spaces"},
    "training": {
        "hdit_kernels",
        "config",
        "device",
        "protocols",
        "randomness",
        "data",
        "diffusion",
        "encode",
        "models",
        "nn",
        "report",
        "sampling",
    },
    "evaluation": {
        "hdit_kernels",
        "config",
        "protocols",
        "data",
        "models",
        "sampling",
        "training",
    },
    "interop": {
        "config",
        "protocols",
        "learning_rate",
        "diffusion",
        "models",
        "nn",
        "spaces",
        "training",
    },
}
"""What each room may import of the house, besides itself; rooms that are not listed, anything."""


def room(path: Path) -> str:
    relative = path.relative_to(REPOSITORY)
    return "hdit_kernels" if relative.parts[0] == "kernels" else relative.with_suffix("").parts[1]


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "hdit" and rest:
                found.add(rest.split(".")[0])
            elif top == "hdit_kernels":
                found.add(top)
    return found


FILES = sorted([*REPOSITORY.glob("hdit/**/*.py"), *REPOSITORY.glob("kernels/**/*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_module_imports_only_rooms_below_it(path):
    here = room(path)
    if here in BELOW:
        assert imported_rooms(path) <= BELOW[here] | {here}


def test_nothing_imports_scripts_or_the_command_line():
    for path in FILES:
        assert not imported_rooms(path) & {"cli", "scripts"} or path.name == "cli.py", path


def test_kernels_is_a_source_root_and_no_package():
    """The import name "kernels" belongs to another project."""
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["sample", "--help"]])
def test_help_does_not_import_torch(arguments):
    code = (
        "import sys\nfrom hdit import cli\n"
        f"sys.argv = ['hdit', *{arguments}]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
