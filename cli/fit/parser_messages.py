"""Makes one line of the parser's many: which key, what was expected, what was found."""

import difflib
import re
from collections.abc import Iterable

import lit_lipschitz


def condense(message: str, known: Iterable[str] = ()) -> str:
    """The cause in an error of jsonargparse, which lists every branch of a union that it tried.

    Errors inside a class's arguments pass through here by themselves first, and come back as one of the branches.

    Args:
        message: The parser's message, of any number of lines.
        known: Keys that the parser knows, for hints.

    Returns:
        One line.
    """
    text = " ".join(message.split())
    path = ".".join(re.findall(r'Parser key "([^"]+)"', text))
    unknown = re.search(r"(?:accept option|unrecognized arguments:) '?-{0,2}([\w.]+)", text)
    if unknown:
        return _no_such_option(unknown[1], known)
    refused = re.search(r"Option '([^']+)' is not accepted", text)
    if refused:
        return _no_such_option(f"{path}.{refused[1]}".lstrip("."), known)
    bad_class = re.search(r"Problem with given class_path '([^']+)': (.+?)(?: - Expected| Given value|$)", text)
    if bad_class:
        return f"{path}: {bad_class[1]} can't be used: {bad_class[2]}"
    not_there = re.search(r"expects a function or a callable class: (.+)\. Got value: (\S+)", text)
    if not_there:
        return f"{path}: expected the import path of a class or a function, found {not_there[2]!r}: {not_there[1]}"
    one = re.search(r"Expected an? ([^-]+?)\. Got value: (.+?)(?: - | Given value|$)", text)
    if one:
        return f"{path}: expected {_readable(one[1])}, found {one[2]!r}"
    given = re.search(r"Given value: (.+)$", text)
    no_subclass = re.search(r"Not a valid subclass of (\w+)", text)
    if no_subclass and given:
        return f"{path}: expected a class_path and init_args of a {no_subclass[1]}, found {given[1]!r}"
    for branch in _branches(message):
        if not branch.startswith(("Expected a", "Does not validate")):
            # The keys of inner errors are in the path already.
            cause = re.sub(r'^(?:Parser key "[^"]+": )+', "", branch)
            return f"{path}.{cause}" if path else cause
    no_class = re.search(r"Expected a dot import path string: (\S+)", text)
    if no_class:
        close = difflib.get_close_matches(no_class[1], lit_lipschitz.__all__, n=2)
        hint = f"; closest: {', '.join(f'lit_lipschitz.{name}' for name in close)}" if close else ""
        return f"{path}: expected the name or the import path of a class, found {no_class[1]!r}{hint}"
    types = [_readable(kind) for kind in re.findall(r"Expected an? (<class '[\w.]+'>)", text)]
    if types and given:
        return f"{path}: expected {' or '.join(dict.fromkeys(types))}, found {given[1]!r}"
    missing = re.search(r"following arguments are required: (.+)$", text)
    if missing:
        keys = [re.sub(r"^(fit|validate|test|predict)\.", "", key.strip()) for key in missing[1].split(",")]
        config = "; pass a config, such as --config digits.yaml" if keys[0] in ("data", "model") else ""
        return f"{' and '.join(keys)} must be given{config}"
    return text


def _branches(message: str) -> list[str]:
    """What the parser tried for one key and why each failed."""
    parts = re.split(r"\n\s*- ", message)[1:]
    return [" ".join(part.partition("Given value")[0].split()) for part in parts]


def _no_such_option(key: str, known: Iterable[str]) -> str:
    # Names that end in + append to a list.
    close = difflib.get_close_matches(key, [name for name in known if not name.endswith("+")], n=2, cutoff=0.6)
    hint = f"closest: {', '.join(close)}" if close else "lit-lipschitz fit --help lists all"
    return f"{key}: no such option; {hint}"


def _readable(kind: str) -> str:
    """A type as people write it in YAML."""
    literal = re.match(r"typing\.Literal\[(.+)\]", kind)
    if literal:
        return "one of " + literal[1]
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind)
    return {"NoneType": "null"}.get(name, name)
