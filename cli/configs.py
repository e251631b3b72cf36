"""Lists, shows and copies the bundled configs, and finds a config by its name. Imports nothing heavy."""

import difflib
import json
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from lit_lipschitz.cli.help import OptionParser
from lit_lipschitz.errors import ConfigurationError

SUBCOMMANDS = ("list", "show", "copy")  #: Of ``lit-lipschitz configs``.
_PACKAGE = resources.files("lit_lipschitz.configs")


def is_papers(name: str) -> bool:
    """Whether a bundled config is one of the paper's experiments."""
    return name.startswith("paper_")


def bundled_configs() -> dict[str, str]:
    """File names of the bundled configs, those for everyday use first, with the comment in their first line."""
    names = [entry.name for entry in _PACKAGE.iterdir() if entry.name.endswith(".yaml")]
    return {
        name: (_PACKAGE / name).read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for name in sorted(names, key=lambda name: (is_papers(name), name))
    }


def list_configs(arguments: list[str]) -> int:
    """Runs `lit-lipschitz configs`: lists the bundled configs, one a line or as JSON, shows or copies one; returns 0.

    Raises:
        ConfigurationError: There is no such subcommand or config, or the copy would overwrite a file.
    """
    parser = OptionParser("configs")
    if arguments and not arguments[0].startswith("-") and arguments[0] not in SUBCOMMANDS:
        close = difflib.get_close_matches(arguments[0], SUBCOMMANDS, n=1, cutoff=0.0)
        raise ConfigurationError(
            f"configs {arguments[0]}: no such subcommand; closest: {close[0]}; all of them: {', '.join(SUBCOMMANDS)}"
        )
    if arguments[:1] in (["show"], ["copy"]):
        parser.add_argument("action")
        parser.add_argument("name", metavar="NAME")
        if arguments[0] == "copy":
            parser.add_argument("file", metavar="FILE", nargs="?", type=Path)
        options = parser.parse_args(arguments)
        path = _bundled(options.name)
        if options.action == "show":
            print(path.read_text(encoding="utf-8"), end="")
        else:
            _copy(path, options.file or Path(path.name))
        return 0
    parser.add_argument("--json", action="store_true")
    known = bundled_configs()
    if parser.parse_args(arguments[arguments[:1] == ["list"] :]).json:
        entries = [{"name": name, "description": known[name], "paper": is_papers(name)} for name in known]
        print(json.dumps(entries, indent=1))
        return 0
    for papers in (False, True):
        names = [name for name in known if is_papers(name) == papers]
        if papers:
            print("\nThe paper's experiments:")
        for name in names:
            print(f"{name:{max(map(len, names))}}  {known[name]}")
    return 0


def _copy(path: Path, target: Path) -> None:
    """Copies a config to a file, or into a folder, where there is none of that name."""
    target = target / path.name if target.is_dir() else target
    try:
        with target.open("xb") as file:
            file.write(path.read_bytes())
    except FileExistsError:
        raise ConfigurationError(f"configs copy: {target} exists and is kept; pass another FILE") from None
    print(f"{target}: written; train with lit-lipschitz fit --config {target}")


def is_config(name: str) -> bool:
    """Whether there is a config of that name: a file, or a bundled one."""
    return Path(name).is_file() or {name, f"{name}.yaml"} & set(bundled_configs()) != set()


def find_config(name: str) -> str:
    """The path of a config: the user's file of that name, or else the bundled config.

    Args:
        name: A path, or a bundled config with or without ``.yaml``.

    Raises:
        ConfigurationError: There is neither.
    """
    if Path(name).is_file():
        return name
    if Path(name).is_dir() and not is_config(name):
        raise ConfigurationError(f"--config {name}: expected a file, found a folder")
    try:
        return str(_bundled(name))
    except ConfigurationError as error:
        raise ConfigurationError(f"--config {str(error).replace(': no', ': no such file and no', 1)}") from None


def _bundled(name: str) -> Path:
    """The path of a bundled config, which the package has as a plain file."""
    known = bundled_configs()
    file_name = name if name in known else f"{name}.yaml"
    if file_name in known:
        return Path(str(_PACKAGE / file_name))
    close = difflib.get_close_matches(Path(name).stem, [key.removesuffix(".yaml") for key in known], n=3, cutoff=0.4)
    hint = f"closest: {', '.join(f'{key}.yaml' for key in close)}" if close else f"bundled: {', '.join(known)}"
    raise ConfigurationError(f"{name}: no bundled config of that name; {hint}")


_MAX_CONFIG = 1 << 18  # bytes
_MAX_DEPTH = 50
_MAX_NODES = 50_000


def check_yaml(text: str, where: str) -> Any:
    """The content of a YAML text that is neither too deep nor too large, with all that its anchors repeat.

    Raises:
        ConfigurationError: It is not, or a part of it contains itself.
        yaml.YAMLError: It is no YAML.
    """
    import yaml

    too_deep = ConfigurationError(
        f"{where}: expected at most {_MAX_DEPTH} levels, found more, or a part that contains itself"
    )
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise too_deep
    known: dict[int, tuple[int, int]] = {}  # by the part's id, since a part with an anchor is the same everywhere

    def measure(part: Any, depth: int) -> tuple[int, int]:
        """The number of entries and of levels."""
        if id(part) not in known and depth <= _MAX_DEPTH:
            entries = part.value if isinstance(part, yaml.CollectionNode) else []
            inner = [one for entry in entries for one in (entry if isinstance(entry, tuple) else (entry,))]
            counts, levels = zip((0, 0), *(measure(one, depth + 1) for one in inner), strict=True)
            known[id(part)] = 1 + sum(counts), 1 + max(levels)
        if depth > _MAX_DEPTH or known[id(part)][1] > _MAX_DEPTH:
            raise too_deep
        return known[id(part)]

    loader = yaml.SafeLoader(text)
    root = loader.get_single_node()
    if root is None:
        return None
    if measure(root, 0)[0] > _MAX_NODES:
        raise ConfigurationError(f"{where}: expected at most {_MAX_NODES} entries, found more, as anchors repeat them")
    return loader.construct_document(root)


def _read(path: str, name: str) -> Any:
    """The content of a YAML file; a ConfigurationError, which begins with the name, if it can't be read."""
    import yaml

    if Path(path).stat().st_size > _MAX_CONFIG:
        raise ConfigurationError(f"{name}: expected a config of at most {_MAX_CONFIG >> 10} KiB")
    try:
        return check_yaml(Path(path).read_text(encoding="utf-8"), name)
    except ConfigurationError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigurationError(f"{name}{place}: not YAML: {getattr(error, 'problem', error)}") from None


def _checked(path: str) -> str:
    """The path of a config that is a YAML mapping; raises ConfigurationError for another file."""
    content = _read(path, f"--config {path}")
    if content is None:
        raise ConfigurationError(f"--config {path}: the file is empty")
    if not isinstance(content, dict):
        raise ConfigurationError(f"--config {path}: expected a mapping of keys to values, found {content!r:.40}")
    return path


def check_value(text: str) -> None:
    """Checks a value of an option, or the content of a file that it names, before the parser reads it as YAML.

    Raises:
        ConfigurationError: It is too deep or too large, as :func:`check_yaml` has it.
    """
    import yaml

    if any(char in text for char in "[{&\n"):
        with suppress(yaml.YAMLError, UnicodeError):  # for the parser to say
            check_yaml(text, f"{' '.join(text.split())[:40]}...")


def resolve_configs(arguments: list[str]) -> list[str]:
    """The command line with the name of every config replaced by its path.

    Raises:
        ConfigurationError: A config is not found or is not a YAML mapping, or a name is missing.
    """
    resolved = list(arguments)
    for i, argument in enumerate(arguments):
        if argument in ("--config", "-c"):
            if i + 1 == len(arguments):
                raise ConfigurationError(f"{argument}: expected the name of a config after it")
            resolved[i + 1] = _checked(find_config(arguments[i + 1]))
        elif argument.startswith("--config="):
            resolved[i] = f"--config={_checked(find_config(argument.removeprefix('--config=')))}"
    return resolved
