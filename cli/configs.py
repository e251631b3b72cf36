"""Finds configs by name: a file of the user's, or else one of the bundled ones. Imports nothing heavy."""

import difflib
from importlib import resources
from pathlib import Path

from lit_lipschitz.errors import ConfigurationError

_PACKAGE = "lit_lipschitz.configs"


def bundled_configs() -> dict[str, str]:
    """The bundled configs: file name to what its first line says."""
    files = (entry for entry in resources.files(_PACKAGE).iterdir() if entry.name.endswith(".yaml"))
    return {entry.name: _first_comment(entry.read_text(encoding="utf-8")) for entry in sorted(files, key=str)}


def _first_comment(text: str) -> str:
    line = text.partition("\n")[0]
    return line[1:].strip() if line.startswith("#") else ""


def find_config(name: str) -> str:
    """The path of a config.

    Args:
        name: A path, or a bundled config with or without its ending.

    Returns:
        The path of the file of that name, or else of the bundled one.

    Raises:
        ConfigurationError: There is neither.
    """
    if Path(name).is_file():
        return name
    known = bundled_configs()
    file_name = name if name in known else f"{name}.yaml"
    if file_name in known:
        # Packages are installed as plain files, so the resource has a path of its own.
        return str(resources.files(_PACKAGE) / file_name)
    if Path(name).is_dir():
        raise ConfigurationError(f"--config {name}: expected a file, found a folder")
    close = difflib.get_close_matches(Path(name).stem, [key.removesuffix(".yaml") for key in known], n=3, cutoff=0.4)
    hint = f"closest: {', '.join(f'{key}.yaml' for key in close)}" if close else f"bundled: {', '.join(known)}"
    raise ConfigurationError(f"--config {name}: no such file and no bundled config of that name; {hint}")


def check_config(path: str) -> str:
    """The path of a config, once it has been found to be a YAML mapping.

    Raises:
        ConfigurationError: It is something else.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigurationError(f"--config {path}{place}: not YAML: {getattr(error, 'problem', error)}") from None
    if content is None:
        raise ConfigurationError(f"--config {path}: the file is empty")
    if not isinstance(content, dict):
        raise ConfigurationError(f"--config {path}: expected a mapping of keys to values, found {content!r:.40}")
    return path


def resolve_configs(arguments: list[str]) -> list[str]:
    """The command's arguments with every config's name replaced by its path.

    Args:
        arguments: As in ``sys.argv[1:]``.

    Returns:
        As many arguments.

    Raises:
        ConfigurationError: A config is not found, or a name is missing.
    """
    resolved = list(arguments)
    for i, argument in enumerate(arguments):
        if argument in ("--config", "-c"):
            if i + 1 == len(arguments):
                raise ConfigurationError(f"{argument}: expected the name of a config after it")
            resolved[i + 1] = check_config(find_config(arguments[i + 1]))
        elif argument.startswith("--config="):
            resolved[i] = f"--config={check_config(find_config(argument.removeprefix('--config=')))}"
    return resolved
