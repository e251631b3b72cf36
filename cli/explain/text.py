"""The text of `lit-lipschitz explain`: from its numbers to lines for people."""

import math
from typing import Any

_MEANINGS = {
    "estimate": "the papers' estimate of the steepness of an example's loss in the head's outputs",
    "slope": "the steepest that an example's loss can be in the head's outputs",
    "curvature": "the most that an example's loss can be curved in the head's outputs",
}
_LENGTHENING = {
    "grafted": "what momentum does to the length of SGD's steps",
    "observed": "what momentum, the noise of n examples and their share of m do to the length of SGD's steps",
    "schedule_free": "what n examples and beta allow",
}
"""What the c of a rule is."""
_MEANS = {"grafted": "scale", "observed": "c scale / O", "schedule_free": "c / O"}
"""What the mean of a rule's readings is of."""


def text(account: dict[str, Any]) -> str:
    """The explanation for people to read."""
    several = len(account["optimizers"]) > 1
    lines = [f"optimizer step {account['step']}, in epoch {account['epoch']}"]
    for one in account["optimizers"]:
        title = [("optimizer", f"{one['optimizer']}, number {one['position']}")] if several else []
        rows = [*title, *_found(one), *_measured(one), ("", ""), *_formula(one), ("", ""), *_rate(one)]
        lines += ["", *(f"{name:9} {line}".rstrip() for name, line in rows)]
    return "\n".join(lines)


def _found(one: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if head := one["head"]:
        bias = "a bias" if head["bias"] else "no bias"
        rows.append(("head", f"{head['name']}, a {head['class']} of {head['inputs']} inputs, {head['outputs']} outputs "
                             f"and {bias}, {head['how']}"))  # fmt: skip
    if loss := one["loss"]:
        arguments = {key: value for key, value in loss.items() if key not in ("name", "reduction", "how")}
        details = [f"{key} {value:g}" for key, value in arguments.items() if isinstance(value, float)]
        details += ["with class weights"] if "class_weights" in arguments else []
        rows.append(("loss", ", ".join([f"{loss['name']}, a {loss['reduction']}", *details, loss["how"]])))
    return rows


def _measured(one: dict[str, Any]) -> list[tuple[str, str]]:
    if not one["formula"]:
        return []
    ones = " and ones for the bias" if one["bound"] != "paper" and one["head"]["bias"] else ""
    of = {"frobenius": "Frobenius norm of a batch of", "spectral": "spectral norm of a batch of",
          "sample": "largest norm of an example of"}[one["norm"]]  # fmt: skip
    how = ", in a pass over the training set" if one["measure"] == "pass" else ""
    rows = [
        ("k", f"{one['k']}, the head's outputs"),
        ("m", f"{one['m']} = {one['batch']:g} x {one['accumulation']} x {one['ranks']}: examples in a batch x "
              "accumulated batches x ranks"),
        ("K_z", f"{one['K_z']:.6g}, {of} the head's inputs{ones}{how}"),
        ("W", f"{one['W']:.6g}, largest norm of a weight ({one['weights']})"),
        ("lambda", f"{one['weight_decay']:.6g}, the weight decay that is an L2 term of the loss"),
    ]  # fmt: skip
    if one["output_norm"] is not None:
        rows.append(("outputs", f"{one['output_norm']:.6g}, norm of outputs and targets, which is in the slope"))
    return rows


def _formula(one: dict[str, Any]) -> list[tuple[str, str]]:
    if not one["formula"]:
        unknown = f"{one['L'] or 0:.6g}, from a checkpoint that does not tell what it was made of"
        return [("L", unknown if one["L"] else "not behind this rate")]
    kind = one["coefficient"]
    values = {kind: f"{one[kind]:.6g}", "K_z": f"{one['K_z']:.6g}", "lambda": f"{one['weight_decay']:.6g}",
              "W": f"{one['W']:.6g}"}  # fmt: skip
    filled = one["formula"]
    for name, value in values.items():
        filled = filled.replace(name, value)
    filled = filled.replace("/ m", f"/ {one['m']}").replace("(m)", f"({one['m']})")
    total = one["data_term"] + one["l2_term"]
    more = "" if math.isclose(total, one["L"], rel_tol=1e-9) else f", where the formula gives {total:.6g}"
    return [
        ("L", f"{one['formula']}, the {one['bound']} family"),
        ("", f"= {filled}"),
        ("", f"= {one['data_term']:.6g} + {one['l2_term']:.6g}"),
        ("", f"= {one['L']:.6g}{more}"),
        ("", f"{kind}: {_MEANINGS[kind]}"),
    ]


def _rate(one: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if one["by_hand"] is not None:
        rows.append(
            ("rule", "none yet: initial_lr is a rate set by hand; --lipschitz.initial_lr null has one measured")
        )
    elif one["L"]:
        rows.append(("rule", f"{one['rule']}, for {one['optimizer']}: {one['rule_says']}"))
        if one["momentum"] is not None:
            rows.append(("b", f"{one['momentum']:g}, the optimizer's momentum"))
        if one["scale"] is not None:
            of = "" if one["rule"] == "grafted" else ", the mean over the weights"
            rows.append(
                ("scale", f"{one['scale']:.6g}, length of the gradient over that of the step at a rate of 1{of}")
            )
        if one["direction_only"]:
            many = f"{one['direction_only']} parameters of which only the direction matters"
            rows.append(("free", f"{many}, as in front of a normalisation: scale does not ask how long they are"))
        if one["smooth_constant"] is not None:
            instead = "three times the root mean square of the residuals in place of outputs and targets"
            rows += [("O", f"{one['observed']:.6g}, L with {instead}")] if one["observed"] is not None else []
            rows.append(("limit", f"{1 / one['smooth_constant']:.6g}, the inverse of the smooth constant"))
        elif one["observed"] is not None:
            rows.append(("O", f"{one['observed']:.6g}, L with the slope that the loss was seen to have"))
            rows.append(("n", f"{one['effective']:.6g}, examples of a step that count, by how alike their slopes are"))
        elif one["lengthening"] is not None and one["rule"] != "grafted":
            rows.append(("O, n", "L and m: no slope of the loss was seen"))
        if one["lengthening"] is not None:
            rows += [
                ("c", f"{one['lengthening']:.6g}, {_LENGTHENING[one['rule']]}"),
                ("mean", f"{one['mean']:.6g}, of {_MEANS[one['rule']]} over the readings so far"),
            ]
        if one["beta"] is not None:
            rows.append(("beta", f"{one['beta']:g}, the optimizer's first; a gradient moves the weights by 1 - beta"))
    if one["unexplained"] is not None:
        rows.append(("u", f"{one['unexplained']:.6g}, of the targets' variance the last epoch left unexplained: "
                          f"{one['restraint']:.6g} is in the factor"))  # fmt: skip
    limit = f", by the limit {one['limit']}" if one["limit"] else ""
    by = f", from {' and '.join(one['schedulers'])}" if one["schedulers"] else ", without a scheduler"
    rows += [
        ("rate", f"{one['rate']:.6g}{limit}"),
        ("factor", f"{one['factor']:.6g}{by}"),
        ("lr", f"{one['lr']:.6g} = {one['rate']:.6g} * {one['factor']:.6g}"),
    ]
    if len(one["lr_of_groups"]) > 1:
        rows.append(("groups", ", ".join(f"{lr:.6g}" for lr in one["lr_of_groups"]) + ": lr of each parameter group"))
    if one["dry_run"]:
        rows.append(("dry_run", "nothing of this is written into the optimizer"))
    return rows
