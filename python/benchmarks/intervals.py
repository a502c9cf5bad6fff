# SPDX-License-Identifier: Apache-2.0
"""How sure a difference of paired runs is, by Student's t.

Runs of two methods from one seed have the same new weights and the same texts, so what these do to
the metric cancels in their difference. The differences of n seeds are taken as n independent draws
from a normal distribution.
"""

import math
import statistics
from typing import NamedTuple

_POINTS = 300  # of a numeric integral; even


class Difference(NamedTuple):
    """The mean of paired differences.

    Attributes
    ----------
    mean : float
    half : float
        Half the width of its 95% interval.
    deviation : float
        The standard deviation of the differences.
    count : int
        Of pairs.
    """

    mean: float
    half: float
    deviation: float
    count: int

    @property
    def is_seen(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.mean) > self.half


def _integral_of_power(angle: float, power: int) -> float:
    """Integrate cos(x)**power from 0 to an angle, by Simpson's rule."""
    step = angle / _POINTS
    values = [math.cos(i * step) ** power for i in range(_POINTS + 1)]
    return step / 3 * (values[0] + 4 * sum(values[1::2]) + 2 * sum(values[2:-1:2]) + values[-1])


def student_t(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t.

    With T = sqrt(degrees) tan(X), X has a density that is proportional to cos(x)**(degrees - 1), so
    the integral is over a finite range.

    Parameters
    ----------
    probability : float
        From 0.5 to below 1.
    degrees : int
        Of freedom, 1 or more.
    """
    if not (0.5 <= probability < 1 and degrees >= 1):
        raise ValueError(f"no quantile of {probability} with {degrees} degrees of freedom")
    end = min(math.pi / 2, 12 / math.sqrt(degrees))  # what lies beyond is below exp(-72)
    wanted = (2 * probability - 1) * _integral_of_power(end, degrees - 1)
    low, high = 0.0, end
    for _ in range(50):
        middle = (low + high) / 2
        if _integral_of_power(middle, degrees - 1) < wanted:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def compare_pairs(ours: dict[str, float], theirs: dict[str, float]) -> Difference | None:
    """Compare two methods' metrics by seed, over the seeds that both have.

    Returns
    -------
    Difference or None
        Ours less theirs. None if there are fewer than two seeds, or a run diverged.
    """
    seeds = [seed for seed in ours if seed in theirs]
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    if len(seeds) < 2 or not all(map(math.isfinite, differences)):
        return None
    count, deviation = len(seeds), statistics.stdev(differences)
    half = student_t(0.975, count - 1) * deviation / math.sqrt(count)
    return Difference(statistics.mean(differences), half, deviation, count)


def seeds_to_see(difference: float, deviation: float) -> int:
    """Return how many pairs it takes to see a difference, with 80% power at 5%, two-sided.

    That is the smallest n with sqrt(n) |difference| >= (t(.975) + t(.8)) deviation, where both
    quantiles are of Student's t with n - 1 degrees of freedom.

    Parameters
    ----------
    difference : float
        Not 0.
    deviation : float
        The standard deviation of paired differences.
    """
    if difference == 0:
        raise ValueError("no number of pairs shows a difference of 0")
    ratio = (deviation / difference) ** 2

    def is_enough(count: int) -> bool:
        quantiles = student_t(0.975, count - 1) + student_t(0.8, count - 1)
        return count >= quantiles**2 * ratio

    enough = 2
    while not is_enough(enough):
        enough *= 2
    low = enough // 2  # not enough, or 1
    while enough - low > 1:
        middle = (low + enough) // 2
        if is_enough(middle):
            enough = middle
        else:
            low = middle
    return enough
