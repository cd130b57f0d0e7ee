"""Imports run one way, and the command line starts without torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

LAYERS = (
    {"hdit_kernels"},
    {"limits"},
    {"bounds", "errors", "names", "signals"},
    {"arrays", "files", "hub", "messages", "plugins", "protocols", "reading", "tensors"},
    {"locks"},
    {"device", "manifest", "processes"},
    {"randomness"},
    {"diffusion", "nn", "spaces", "data"},
    {"models"},
    {"config"},
    {"interop"},
    {"runs"},
    {"report"},
    {"latents", "sampling"},
    {"training"},
    {"evaluation"},
    {"experiments"},
    {"doctor", "planning"},
    {"cli"},
)
"""Packages and modules from the bottom up: each imports those of lower layers, and itself."""

ALONE = {
    "diffusion": {"limits", "bounds", "errors", "protocols"},
    "nn": {"limits", "bounds", "errors", "protocols", "hdit_kernels"},
}
"""Packages that import less than their layer would let them."""


def below(name: str) -> set[str]:
    """What a package may import of the project, besides itself."""
    [height] = [i for i, layer in enumerate(LAYERS) if name in layer]
    return ALONE.get(name, set().union(*LAYERS[:height]))


def package(path: Path) -> str:
    relative = path.relative_to(REPOSITORY)
    return "hdit_kernels" if relative.parts[0] == "kernels" else relative.with_suffix("").parts[1]


def imported(path: Path) -> set[str]:
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
def test_module_imports_only_packages_below_it(path):
    here = package(path)
    if here != "__init__":
        assert imported(path) <= below(here) | {here}


def test_nothing_imports_scripts_or_the_command_line():
    for path in FILES:
        assert not imported(path) & {"cli", "scripts"} or package(path) == "cli", path


def test_kernels_is_a_source_root_and_no_package():
    """The import name "kernels" belongs to another project."""
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


VERBS = (
    "train", "watch", "sample", "evaluate", "compare", "encode", "convert", "ema", "info", "plan",
    "configs", "doctor",
    "data check",
)  # fmt: skip


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_does_not_import_torch(verb):
    arguments = [*verb.split(), "--help"]
    code = (
        "import sys\nfrom hdit import cli\n"
        f"sys.argv = ['hdit', *{arguments}]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'accelerate', 'PIL', 'hdit.bounds'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
