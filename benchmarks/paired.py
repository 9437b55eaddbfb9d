"""Right and wrong answers of several models to the same questions: how far apart they are."""

import statistics
from collections.abc import Sequence


def shares(runs: Sequence[Sequence[bool]]) -> list[float]:
    """For each question, the share of the runs (such as several seeds of one setting) that have answered it right."""
    return [statistics.fmean(found) for found in zip(*runs, strict=True)]


def compared(base: Sequence[Sequence[bool]], runs: Sequence[Sequence[bool]]) -> dict[str, float]:
    """The mean accuracy of runs, and by how many points of a hundred it lies below that of other runs.

    All answer the same questions, so the standard error is that of the mean of the questions' own differences. It says
    how much of a difference the choice of the questions makes, and not the choice of the seeds.
    """
    points = [100 * (other - own) for other, own in zip(shares(base), shares(runs), strict=True)]
    return {
        "mean_accuracy": round(statistics.fmean(shares(runs)), 4),
        "points_below": round(statistics.fmean(points), 2),
        "standard_error_in_points": round(statistics.stdev(points) / len(points) ** 0.5, 2),
    }
