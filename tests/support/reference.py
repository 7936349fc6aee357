"""Slow float64 twins of the formulas: loops over Python numbers, written from the text and not from the fast code."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def qparams(low: float, high: float, quant_min: int, quant_max: int, eps: float) -> tuple[float, int]:
    """Step and zero point of a range."""
    alpha, beta = min(low, 0.0), max(high, 0.0)
    scale = max((beta - alpha) / (quant_max - quant_min), eps)
    return scale, max(quant_min, min(quant_max, round(quant_min - alpha / scale)))  # round() is half to even


def code(x: float, scale: float, zero_point: int, quant_min: int, quant_max: int) -> int:
    """Integer code of one value."""
    return max(quant_min, min(quant_max, round(x / scale) + zero_point))


def value(q: int, scale: float, zero_point: int) -> float:
    """Value of one code."""
    return scale * (q - zero_point)


def quant_error(
    values: Sequence[float],
    counts: Sequence[float],
    low: float,
    high: float,
    quant_min: int,
    quant_max: int,
    norm: float,
) -> float:
    """Weighted error sum counts |x - q(x)|^norm of one range."""
    scale, zero_point = qparams(low, high, quant_min, quant_max, 1e-8)
    return sum(
        n * abs(x - value(code(x, scale, zero_point, quant_min, quant_max), scale, zero_point)) ** norm
        for x, n in zip(values, counts, strict=True)
    )


def best_range_error(
    values: Sequence[float], counts: Sequence[float], quant_min: int, quant_max: int, norm: float, steps: int
) -> float:
    """Least error over every zero point and a fine grid of step sizes: all quantizers there are, not a grid of ends."""
    low, high = min(*values, 0.0), max(*values, 0.0)
    levels = quant_max - quant_min
    # The full range on the smallest number of codes of one side bounds the useful step from above.
    largest = max(-low, high) * 2 / levels
    best = math.inf
    for zero_point in range(quant_min, quant_max + 1):
        for i in range(1, steps + 1):
            scale = largest * i / steps
            error = sum(
                n * abs(x - value(code(x, scale, zero_point, quant_min, quant_max), scale, zero_point)) ** norm
                for x, n in zip(values, counts, strict=True)
            )
            best = min(best, error)
    return best


def best_weight_ratio(weights: Sequence[float], quant_min: int, quant_max: int, norm: float) -> tuple[float, float]:
    """(ratio, error) of the best shrink factor 1.00, 0.98, ..., 0.20 of one channel's min-max range."""
    low, high = min(weights), max(weights)
    ones = [1.0] * len(weights)
    found = [
        (quant_error(weights, ones, low * r / 100, high * r / 100, quant_min, quant_max, norm), -r)
        for r in range(100, 18, -2)
    ]
    error, negative = min(found)
    return -negative / 100, error


def ema_corrected_twice(values: Sequence[float], decay: float) -> float:
    """Trap 1: a moving average that stores its bias-corrected value and corrects it again."""
    stored = 0.0
    for step, x in enumerate(values, start=1):
        stored = (decay * stored + (1 - decay) * x) / (1 - decay**step)
    return stored


def gain(u: int, v: int, height: int, width: int, cutoff: float) -> float:
    """Gaussian gain at index (u, v) of a full (not halved) DFT."""
    du = u if u <= height / 2 else u - height
    dv = v if v <= width / 2 else v - width
    return math.exp(-(du * du + dv * dv) / (2 * cutoff * cutoff))


def lowpass(image: Matrix, cutoff: float) -> list[list[float]]:
    """Filtered image by the two DFT sums, written out."""
    height, width = len(image), len(image[0])

    def turn(k: int, n: int, size: int) -> complex:
        return cmath.exp(-2j * math.pi * k * n / size)

    spectrum = [
        [
            gain(u, v, height, width, cutoff)
            * sum(image[y][x] * turn(u, y, height) * turn(v, x, width) for y in range(height) for x in range(width))
            for v in range(width)
        ]
        for u in range(height)
    ]
    return [
        [
            sum(
                spectrum[u][v] * turn(u, -y, height) * turn(v, -x, width) for u in range(height) for v in range(width)
            ).real
            / (height * width)
            for x in range(width)
        ]
        for y in range(height)
    ]


def cam(features: Sequence[Matrix], alpha: Sequence[float]) -> list[list[float]]:
    """Class activation map of one image, features (C, H, W)."""
    height, width = len(features[0]), len(features[0][0])
    return [
        [max(0.0, sum(a * f[y][x] for a, f in zip(alpha, features, strict=True))) for x in range(width)]
        for y in range(height)
    ]


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Probabilities."""
    top = max(logits)
    terms = [math.exp((x - top) / temperature) for x in logits]
    return [t / sum(terms) for t in terms]


def one_minus_p(logits: Sequence[float], label: int) -> float:
    """Difficulty of one image, without cancellation."""
    return math.fsum(p for k, p in enumerate(softmax(logits)) if k != label)


def kd_kl(student: Sequence[float], teacher: Sequence[float], temperature: float) -> float:
    """T^2 KL(teacher || student) of one image."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return temperature**2 * math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def cross_entropy(logits: Sequence[float], label: int) -> float:
    """-log p_label of one image."""
    return -math.log(softmax(logits)[label])


def synq_loss(
    student: Matrix,
    student_maps: Sequence[Matrix],
    teacher: Matrix,
    teacher_maps: Sequence[Matrix],
    labels: Sequence[int],
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    cam_weight: float,
    threshold: float,
) -> float:
    """Fine-tuning loss of a batch, divided by the number of all its images."""
    total = 0.0
    for s, s_map, t, t_map, y in zip(student, student_maps, teacher, teacher_maps, labels, strict=True):
        total += kd_weight * kd_kl(s, t, temperature)
        if one_minus_p(t, y) <= threshold:
            total += ce_weight * cross_entropy(s, y)
        total += cam_weight * math.fsum(
            (a - b) ** 2 for t_row, s_row in zip(t_map, s_map, strict=True) for a, b in zip(t_row, s_row, strict=True)
        )
    return total / len(labels)


def inception_loss(logits: Sequence[float], label: int, gamma: float) -> float:
    """Hard-sample weighted cross-entropy of one image."""
    return one_minus_p(logits, label) ** gamma * cross_entropy(logits, label)


def fidelity_measures(teacher: Sequence[float], student: Sequence[float]) -> dict[str, float]:
    """Every measure of one image, from the logits of both networks."""
    p, q = softmax(teacher), softmax(student)
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    classes = range(len(p))
    best = max(classes, key=lambda k: teacher[k])
    a = [x - math.fsum(teacher) / len(p) for x in teacher]
    b = [x - math.fsum(student) / len(p) for x in student]

    def divergence(one: Sequence[float], other: Sequence[float]) -> float:
        return math.fsum(x * math.log(x / y) for x, y in zip(one, other, strict=True))

    def margin(z: Sequence[float]) -> float:
        return z[best] - max(z[k] for k in classes if k != best)

    return {
        "kl": divergence(p, q),
        "kl_t4": kd_kl(student, teacher, 4.0),
        "reverse_kl": divergence(q, p),
        "jensen_shannon": (divergence(p, middle) + divergence(q, middle)) / 2,
        "total_variation": math.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
        "disagreement": 0.0 if max(classes, key=lambda k: student[k]) == best else 100.0,
        "logit_mse": math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(p),
        "logit_angle": 1 - math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b)),
        "margin_mse": (margin(teacher) - margin(student)) ** 2,
        "hard_cross_entropy": cross_entropy(student, best),
        "doubtful_kl": -math.fsum(x * math.log(x) for x in p) * divergence(p, q),
    }


def spearman(scores: Sequence[float], values: Sequence[float]) -> float:
    """Rank correlation; a tie shares the mean of its places."""

    def ranks(x: Sequence[float]) -> list[float]:
        return [sum(other < own for other in x) + (sum(other == own for other in x) + 1) / 2 for own in x]

    a, b = ranks(scores), ranks(values)
    middle = (len(a) + 1) / 2
    top = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    return top / math.sqrt(sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b))
