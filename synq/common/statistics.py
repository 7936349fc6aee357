"""Statistics of one run's accuracy, and the texts of its numbers. Standard library only."""

import math


def drop_of(lost: int | None, gained: int | None, num_images: int | None) -> float | None:
    """Return the drop in top-1, 100 (lost - gained) / n, in percentage points; None if a count is unknown.

    From counts and not as a difference of two accuracies, which leaves 1e-14 where nothing was lost.
    """
    if lost is None or gained is None or not num_images:
        return None
    return 100 * (lost - gained) / num_images


def drop_stderr(lost: int, gained: int, num_images: int) -> float:
    """Return the standard error of a drop in top-1, paired by image, in percentage points.

    The drop is the mean over n images of teacher_correct - student_correct, which is 1 on the b lost ones, -1 on the c
    gained ones and 0 elsewhere: 100 sqrt((b + c) - (b - c)^2 / n) / n. For example b = 60, c = 20, n = 1,000: a drop of
    4.00 +- 0.885, where two unpaired accuracies near 90 % would give 1.3.

    Args:
        lost: Images that only the teacher has right.
        gained: Images that only the student has right.
        num_images: All images, >= 1.
    """
    return 100 * math.sqrt(lost + gained - (lost - gained) ** 2 / num_images) / num_images


def drop_text(drop: float, stderr: float | None = None, *, nouns: tuple[str, str] = ("drop", "gain")) -> str:
    """Return a drop in top-1 as text, a negative one as a gain: "drop 1.08 ± 0.35", "gain 0.50"; 0 is a drop.

    Args:
        drop: Teacher minus student, in percentage points.
        stderr: Its standard error in the same unit; None leaves it out.
        nouns: The nouns for a drop and for a gain.
    """
    rounded = round(drop, 2)
    spread = "" if stderr is None else f" ± {stderr:.2f}"
    return f"{nouns[rounded < 0]} {abs(rounded):.2f}{spread}"
