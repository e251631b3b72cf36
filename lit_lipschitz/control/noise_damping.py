"""Damping of the learning rate of a regression that has stopped learning while much variance is unexplained."""

import bisect
import math
from dataclasses import dataclass, field

from lit_lipschitz.measurement.residuals import Residuals

SNR_FULL_RATE = 3.0  #: Ratio of explained to unexplained variance from which on the rate is not damped.
MIN_LEARNED = 0.1  #: Drop of the unexplained fraction below which learning has not begun and the rate is not damped.
POWER = 4  #: Exponent of the damping.
SAMPLES_PER_PARAM = 20  #: Targets per trained parameter in an epoch from which on their noise cannot be fitted.
MIN_DAMPING = 0.1  #: Smallest damping factor.


@dataclass
class NoiseDamping:
    r"""Damping factor from the fraction of variance unexplained in each epoch.

    Once learning has slowed down and much variance is still unexplained, most of the rest is noise or beyond the
    network, and large steps only fit it. With u the unexplained fraction of the last epoch (1 - R^2), v the speed of
    learning (the drop of u since half as many steps had been made), :math:`v_{max}` its maximum so far and l the drop
    of u since the run began, the learning rate is multiplied by

    .. math:: \min\left(1, \max\left(\frac{v}{v_{max}}, \frac{1}{3} \frac{1 - u}{u}, 1 - 10 l\right)\right)^4

    So the rate is not damped while the network learns at its own pace, once three quarters of the variance are
    explained, or before learning has begun. The factor is at least 0.1 and at least n/(20 p), with n targets in an
    epoch and p trained parameters: the fraction of the noise that can be fitted is about p/n.

    The first batch gives the unexplained fraction before the first step, reduced by twice its relative error,
    sqrt(2/n).

    References:
        Not in the papers; found by validation. For why noisier targets leave less to learn: A. Ali, J. Z. Kolter, R. J.
        Tibshirani: A Continuous-Time View of Early Stopping for Least Squares, arXiv 1810.10082, 2019.
    """

    steps: list[float] = field(default_factory=list)  # at the first batch, then in the middle of each epoch
    fractions: list[float] = field(default_factory=list)  # unexplained fractions at these optimizer steps
    last_step: int = 0  # of the last epoch
    samples_per_param: float = 0.0  # n / (20 p)
    speed: float = 0.0  # v
    max_speed: float = 0.0  # the largest v

    @property
    def fraction_unexplained(self) -> float | None:
        """Unexplained fraction of the last epoch, at most 1; None before the first one."""
        return self.fractions[-1] if len(self.fractions) > 1 else None

    @property
    def factor(self) -> float:
        """Damping factor, from 0.1 to 1; 1 before there are two epochs to compare."""
        unexplained = self.fraction_unexplained
        if unexplained is None or not self.max_speed > 0:
            return 1.0
        signal = (1 - unexplained) / unexplained / SNR_FULL_RATE if unexplained > 0 else math.inf
        learned = max(self.fractions[:2]) - min(self.fractions[1:])
        damped = max(self.speed / self.max_speed, signal, 1 - learned / MIN_LEARNED) ** POWER
        return min(1.0, max(damped, MIN_DAMPING, self.samples_per_param))

    def add_first_batches(self, residuals: Residuals, steps: int) -> None:
        """Adds the first batches, of all ranks, made before optimizer step ``steps``; later calls have no effect."""
        fraction = residuals.fraction_unexplained
        if not self.fractions and fraction is not None:
            self._begin(steps, min(fraction, 1.0) / (1 + 2 * math.sqrt(2 / residuals.count)))

    def _begin(self, steps: int, fraction: float) -> None:
        self.steps, self.fractions, self.last_step = [steps], [fraction], steps

    def add_epoch(self, residuals: Residuals, steps: int, num_parameters: int, num_epochs: int = 1) -> None:
        """Adds an epoch, or several of them together.

        Args:
            residuals: Residuals of its batches, over all ranks.
            steps: Optimizer steps made so far.
            num_parameters: Trained parameters, p.
            num_epochs: Epochs that the residuals are from.
        """
        fraction = residuals.fraction_unexplained
        middle, self.last_step = (self.last_step + steps) / 2, steps
        if fraction is None:
            return
        if not self.fractions:  # the first batch was not measured
            self._begin(steps, min(fraction, 1.0))
            return
        self.steps.append(middle)
        self.fractions.append(min(fraction, 1.0))
        self.samples_per_param = residuals.count / num_epochs / (SAMPLES_PER_PARAM * max(num_parameters, 1))
        self.speed = self._fraction_at((self.steps[0] + middle) / 2) - self.fractions[-1]
        self.max_speed = max(self.max_speed, self.speed)

    def _fraction_at(self, step: float) -> float:
        """The unexplained fraction at a step, interpolated linearly."""
        after = bisect.bisect_left(self.steps, step)
        if not after:
            return self.fractions[0]
        (before, middle), (fraction, later) = self.steps[after - 1 : after + 1], self.fractions[after - 1 : after + 1]
        return fraction + (later - fraction) * (step - before) / (middle - before)
