"""The text of `lit-lipschitz explain`: from its numbers to readable lines."""

import re
import textwrap
from typing import Any

Row = tuple[str, str]


def text(account: dict[str, Any]) -> str:
    """The explanation as text."""
    several = len(account["optimizers"]) > 1
    lines = [f"optimizer step {account['step']}, in epoch {account['epoch']}"]
    for one in account["optimizers"]:
        title = [("optimizer", f"{one['optimizer']}, number {one['position']}")] if several else []
        rows = [*title, *_found(one), *_constant(one), ("", ""), *_rate(one)]
        lines += ["", *(_line(*row) for row in rows)]
    return "\n".join(lines)


def _line(symbol: str, words: str) -> str:
    """A row, in several lines where it is long."""
    return textwrap.fill(
        f"{symbol:9} {words}", 120, subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False
    )


def _is_measured(one: dict[str, Any]) -> bool:
    """Whether the loss was not recognised, and its constant is measured."""
    return bool(one["loss"]) and one["loss"]["name"] == "measured"


def _found(one: dict[str, Any]) -> list[Row]:
    rows = []
    if _is_measured(one):
        return [("layers", f"{one['head']['name']}, {one['head']['how']}"), ("loss", one["loss"]["how"])]
    if head := one["head"]:
        bias = "with bias" if head["bias"] else "no bias"
        rows.append(("head", f"{head['name']}: {head['class']}, {head['inputs']} inputs, {head['outputs']} outputs, "
                             f"{bias}; {head['how']}"))  # fmt: skip
    if loss := one["loss"]:
        details = [f"{name} {value:g}" for name, value in loss["arguments"].items() if isinstance(value, float)]
        details += ["with class weights"] if "class_weights" in loss["arguments"] else []
        rows.append(("loss", ", ".join([f"{loss['name']}: {loss['reduction']}", *details]) + f"; {loss['how']}"))
    return rows


def _constant(one: dict[str, Any]) -> list[Row]:
    """The terms of the constant, which are those up to L, and its formula with their values."""
    if not one["formula"]:
        return [("", ""), ("L", "not used for this rate")]
    before, constant, _ = _split_at_constant(one["terms"])
    values = {term["symbol"]: f"{term['value']:.6g}" for term in (*before, constant)}
    notes = _notes(one)
    filled = re.sub(r"[A-Za-z_]+", lambda match: values.get(match[0], match[0]), one["formula"])
    return [
        *(_row(term, notes.get(term["symbol"], "")) for term in before if term["symbol"] not in ("data", "l2")),
        ("", ""),
        ("L", constant["meaning"] if _is_measured(one) else f"{constant['meaning']}, bound={one['bound']}"),
        ("", f"= {one['formula']}"),
        ("", f"= {filled}"),
        ("", f"= {values['data']} + {values['l2']}"),
        ("", f"= {values['L']}"),
    ]


def _notes(one: dict[str, Any]) -> dict[str, str]:
    """What the run adds to the meanings of the terms."""
    notes = {"W": " that weight decay applies to" if one["weights"] == "decayed" else f" (weights={one['weights']})"}
    if not _is_measured(one):
        ones = " with a column of ones for the bias" if one["bound"] != "paper" and one["head"]["bias"] else ""
        notes["K_z"] = ones + (", in a pass over the training set" if one["measure"] == "pass" else "")
    return notes


def _split_at_constant(terms: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Any, list[dict[str, Any]]]:
    """The terms before L, L, and those after it."""
    place = [term["symbol"] for term in terms].index("L")
    return terms[:place], terms[place], terms[place + 1 :]


def _row(term: dict[str, Any], note: str = "") -> Row:
    return term["symbol"], f"{term['value']:.6g}, {term['meaning']}{note}"


def _rate(one: dict[str, Any]) -> list[Row]:
    rows = []
    if one["initial_lr"] is not None:
        rows.append(("rule", "none yet: the first rate is initial_lr; with --lipschitz.initial_lr null it is computed"))
    elif one["rule"]:
        rows.append(("rule", f"{one['rule']}, for {one['optimizer']}: {one['rule_description']}"))
        rows += [_row(term) for term in _split_at_constant(one["terms"])[2]]
        if one["num_scale_invariant"]:
            many = f"{one['num_scale_invariant']} scale-invariant weights (followed by a normalisation)"
            rows.append(("invariant", f"{many}: their norms do not enter s"))
    if one["fraction_unexplained"] is not None:
        rows.append(("u", f"{one['fraction_unexplained']:.6g}, fraction of the targets' variance unexplained in "
                          f"the last epoch; it damps the factor by {one['damping']:.6g}"))  # fmt: skip
    limit = f", limited by {one['limit']}" if one["limit"] else ""
    by = f", from {' and '.join(one['schedulers'])}" if one["schedulers"] else ", without a scheduler"
    rows += [
        ("rate", f"{one['rate']:.6g}{limit}"),
        ("factor", f"{one['factor']:.6g}{by}"),
        ("lr", f"{one['lr']:.6g} = {one['rate']:.6g} * {one['factor']:.6g}"),
    ]
    if len(one["lr_of_groups"]) > 1:
        rows.append(
            ("groups", ", ".join(f"{lr:.6g}" for lr in one["lr_of_groups"]) + ", the lr of each parameter group")
        )
    if one["dry_run"]:
        rows.append(("dry_run", "the optimizer keeps its own learning rate"))
    return rows
