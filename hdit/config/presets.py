"""The configs that come with the package, by name: "digits-hdit", "ablation/e"."""

from __future__ import annotations

import difflib
from pathlib import Path

import tomli_w

from hdit.config.schema import ConfigError, read_toml
from hdit.names import escape, expanded

MATRICES = "matrices"  # folder of those that are no configs of a run


def folder() -> Path:
    """The folder of the presets: `hdit/presets` of an installed wheel, `configs` of a clone."""
    package = Path(__file__).parents[1]
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "configs"


def presets() -> dict[str, str]:
    """The presets that a run can take, each with the first line of its file; sorted by name.

    Files that others extend, with neither a model nor training of their own, are left out.
    """
    found = {}
    for name in _names():
        path = _path(name)
        if {"data", "model", "training"} <= read_toml(path).keys():
            found[name] = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    return found


def find_config(config: Path) -> Path:
    """The file of a CONFIG argument: a path, or the name of a preset. A file goes before a preset.

    Raises ConfigError if it is neither, with the nearest preset.
    """
    if config.is_file():
        return config
    names = _names()
    if config.as_posix() in names:
        return _path(config.as_posix())
    if config.suffix == ".toml" or config.exists():
        if config.stem in names:
            raise ConfigError(f"{config}: no such config file; the preset is named {config.stem}")
        return config  # whose reading fails, and says why
    close = difflib.get_close_matches(config.as_posix(), names, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; `hdit configs` lists the presets"
    raise ConfigError(f"{config}: neither a config file nor a preset{hint}")


def or_preset(place: str) -> str:
    """`place` if such a path exists, else the file of the preset of that name, else `place`."""
    if not expanded(place).exists() and place in _names():
        return str(_path(place))
    return place


def standalone(name: str) -> str:
    """The text of a preset that needs no other file: with what it extends merged into it.

    One that extends nothing keeps its comments, another those at its head. Raises ConfigError for
    a name that is no preset.
    """
    names = _names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else "`hdit configs` lists them"
        raise ConfigError(f"NAME: there is no preset {escape(name)!r}; {hint}")
    text = _path(name).read_text(encoding="utf-8")
    lines = text.splitlines()
    if not any(line.startswith("extends") for line in lines):
        return text
    head = [line for line in lines[: _head(lines)] if line.strip()]
    return "\n".join([*head, "", tomli_w.dumps(read_toml(_path(name)))])


def _head(lines: list[str]) -> int:
    """How many lines the comment at the head has."""
    return next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))


def _path(name: str) -> Path:
    return folder() / f"{name}.toml"


def _names() -> list[str]:
    """Those at the top first, then those in folders."""
    root = folder()
    paths = [path.relative_to(root).with_suffix("") for path in root.rglob("*.toml")]
    names = [path.as_posix() for path in paths if path.parts[0] != MATRICES]
    return sorted(names, key=lambda name: ("/" in name, name))
