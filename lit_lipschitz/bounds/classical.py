r"""Lipschitz constants of linear, logistic and softmax regression, whose only layer is the output layer.

The inputs of the layer are the features themselves, all m rows in every step, so the constant is known before training
and its inverse is a learning rate for plain gradient descent. With the features X, shape (m, d), ``norm`` the Euclidean
(Frobenius) and ``norm2`` the spectral norm, and ``size`` = min(mean_i norm(x_i), norm2(X) / sqrt(m)):

=================== ============================= =============================== ====================
model               paper                         strict                          smooth
=================== ============================= =============================== ====================
linear regression   (K norm(X'X) + norm(X'y)) / m (K norm2(X)^2 + norm(X'y)) / m  norm2(X)^2 / m
logistic regression norm(X) / (2m)                size                            norm2(X)^2 / (4m)
softmax regression  (k-1) norm(X) / (k m)         sqrt(2) size                    norm2(X)^2 / (2m)
=================== ============================= =============================== ====================

The strict constants bound the norm of the gradient in the weights: it is X'R / m with R the gradients of the losses in
the outputs, whose rows are no longer than 1 for the logistic and sqrt(2) for the softmax loss, and norm(X'R) is at most
the sum of norm(x_i) norm(r_i) as well as norm2(X) norm(R). The paper's estimate it, and that of linear regression is a
bound too, since no Frobenius norm is below the spectral one. The smooth ones bound the largest eigenvalue of the
Hessian, by 1, 1/4 and 1/2 for the curvature of one example's loss in its outputs. All are in double precision.

References:
    R. Yedida, S. Saha: A novel adaptive learning rate scheduler for deep neural networks, arXiv 1902.07399, 2019, for
    the paper family. The strict and smooth constants follow from the inequalities above.
"""

import math

import torch
from torch import Tensor

from lit_lipschitz.bounds.classification import binary_cross_entropy, cross_entropy
from lit_lipschitz.bounds.families import Bound, Norm, check_not_negative, resolve_norm
from lit_lipschitz.bounds.regression import mean_squared_error


def linear_regression(
    features: Tensor, targets: Tensor, weight_norm: float, *, bound: Bound = "strict", intercept: bool = False
) -> float:
    r"""Constant of least squares, :math:`\frac{1}{2m} \|Xw - y\|^2`; torch's ``mse_loss`` has twice this.

    The gradient :math:`X'(Xw - y) / m` is not bounded over all weights, so the paper and the strict family hold for
    weights w no longer than K. The strict constant is attained where X'y points against weights along the first right
    singular vector of X, and the smooth one is the Hessian's largest eigenvalue itself.

    Args:
        features: X, shape (m, d), any real type; m and d at least 1.
        targets: y, shape (m,), in the units of an output.
        weight_norm: K, a bound of the weights' Euclidean norm, the intercept included; not negative. Not used by the
            smooth family.
        bound: Family of the constant.
        intercept: Append a column of ones to X.

    Returns:
        The constant, in units of loss per unit of weight (per squared unit for ``smooth``).

    Raises:
        ValueError: An argument has another shape, is not finite or is out of its range.

    Example:
        >>> linear_regression(torch.tensor([[3.0], [4.0]]), torch.tensor([1.0, 1.0]), 2.0)  # (2 * 25 + 7) / 2
        28.5
    """
    resolve_norm(bound)
    check_not_negative("weight_norm", weight_norm)
    matrix = _design_matrix(features, intercept)
    rows = matrix.shape[0]
    if targets.shape != (rows,):
        raise ValueError(f"targets: expected shape ({rows},), one for each row, found {tuple(targets.shape)}")
    _check_finite("targets", targets)
    if bound == "smooth":
        return mean_squared_error(_spectral(matrix), batch_size=rows, half=True, bound="smooth")
    correlation = torch.linalg.vector_norm(matrix.T @ targets.detach().to(matrix)).item()
    curvature = torch.linalg.matrix_norm(matrix.T @ matrix).item() if bound == "paper" else _spectral(matrix) ** 2
    return (weight_norm * curvature + correlation) / rows


def logistic_regression(features: Tensor, *, bound: Bound = "strict", intercept: bool = False) -> float:
    """Constant of the mean binary cross-entropy with one logit, for any targets in [0, 1].

    The smooth constant is the Hessian's largest eigenvalue at weights of 0, where it is largest. Arguments, result and
    errors are those of :func:`linear_regression`.

    Example:
        >>> logistic_regression(torch.tensor([[3.0, 4.0]]), bound="paper")
        2.5
    """
    matrix = _design_matrix(features, intercept)
    size, norm = _size(matrix, bound)
    return binary_cross_entropy(size, batch_size=matrix.shape[0], bound=bound, norm=norm)


def softmax_regression(
    features: Tensor, num_classes: int, *, bound: Bound = "strict", intercept: bool = False
) -> float:
    """Constant of the mean softmax cross-entropy, for any targets: classes, or probabilities of the classes.

    The model has k = ``num_classes`` outputs, at least 2. The smooth constant is the Hessian's largest eigenvalue for
    two classes at weights of 0. Other arguments, result and errors are those of :func:`linear_regression`.

    Example:
        >>> softmax_regression(torch.tensor([[3.0, 4.0]]), 5, bound="paper")
        4.0
    """
    matrix = _design_matrix(features, intercept)
    size, norm = _size(matrix, bound)
    return cross_entropy(size, num_classes=num_classes, batch_size=matrix.shape[0], bound=bound, norm=norm)


def _size(matrix: Tensor, bound: Bound) -> tuple[float, Norm]:
    """The size of the features that a family uses, and the name of that norm."""
    resolve_norm(bound)
    if bound == "paper":
        return torch.linalg.matrix_norm(matrix).item(), "frobenius"
    spectral = _spectral(matrix)
    if bound == "smooth":
        return spectral, "spectral"
    mean_row = torch.linalg.vector_norm(matrix, dim=1).mean().item()
    # Both are of one example, like the largest row of "sample", and neither is above that.
    return min(mean_row, spectral / math.sqrt(matrix.shape[0])), "sample"


def _spectral(matrix: Tensor) -> float:
    return torch.linalg.matrix_norm(matrix, ord=2).item()


def _design_matrix(features: Tensor, intercept: bool) -> Tensor:
    """The checked features in double precision, with a column of ones if there is an intercept."""
    if features.ndim != 2:
        raise ValueError(f"features: expected 2 dimensions, (rows, columns), found shape {tuple(features.shape)}")
    if features.shape[0] < 1 or features.shape[1] < 1:
        raise ValueError(f"features: expected at least 1 row and 1 column, found shape {tuple(features.shape)}")
    _check_finite("features", features)
    matrix = features.detach().double()
    return torch.cat([matrix, torch.ones_like(matrix[:, :1])], dim=1) if intercept else matrix


def _check_finite(name: str, values: Tensor) -> None:
    bad = (~torch.isfinite(values.detach())).nonzero()
    if len(bad):
        first = bad[0].tolist()
        raise ValueError(
            f"{name}: expected finite numbers, found {len(bad)} that are not, the first at {first}: "
            f"{values[tuple(first)].item()}"
        )
