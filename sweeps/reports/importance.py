"""Importance of settings by fANOVA: the share of the objective's variance that each setting explains by itself.

A random forest is fitted to the trials; the variance of its prediction over the whole search space is split exactly,
tree by tree, into what each setting explains if all others are averaged out. Source: Hutter, Hoos, Leyton-Brown, "An
Efficient Approach for Assessing Hyperparameter Importance", ICML 2014. The numbers are those of Optuna's
``FanovaImportanceEvaluator`` (same forest, same measure of a choice: one column for each of its values); all intervals
of a setting are summed at once instead of one walk through the tree for each, which takes minutes for thousands of
trials.

`sampled_effects` does the same for spaces in which settings exist only sometimes, whose points fill no box.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

NUM_TREES = 64
MAX_DEPTH = 64
NUM_BINS = 20
"""Intervals of a setting's range over which a main effect is averaged."""


def main_effects(
    columns: Sequence[np.ndarray], bounds: Sequence[np.ndarray], values: np.ndarray, *, seed: int = 0
) -> np.ndarray:
    """Return the importance of each setting, normalized to sum 1.

    Args:
        columns: For each setting its values in the n trials: (n, 1), or (n, k) for a choice of k values, one of which
            is 1 and the others 0.
        bounds: For each setting the lowest and the highest value of its columns: (1, 2) or (k, 2).
        values: (n,) objective.
        seed: Seed of the forest.

    Returns:
        (number of settings,) shares in [0, 1].

    Raises:
        ValueError: No tree of the forest has any variance.
    """
    forest = _fitted(np.concatenate(columns, axis=1), values, seed)
    space = np.concatenate(bounds).astype(float)
    ends = np.cumsum([part.shape[1] for part in columns])
    groups = [list(range(end - part.shape[1], end)) for end, part in zip(ends, columns, strict=True)]
    shares = []
    for one in forest.estimators_:
        lows, highs, leaves = _boxes(one.tree_, space)
        sizes = (highs - lows) / (space[:, 1] - space[:, 0])
        whole = np.prod(sizes, axis=1)
        variance = _variance(leaves, whole)
        if variance > 0:
            effects = [_effect(group, lows, highs, sizes, leaves, space) for group in groups]
            shares.append([effect / variance for effect in effects])
    if not shares:
        raise ValueError("no tree of the forest has any variance")
    mean = np.mean(shares, axis=0)
    return np.asarray(mean / mean.sum()) if mean.sum() > 0 else mean


def sampled_effects(
    inputs: np.ndarray, values: np.ndarray, points: np.ndarray, settings: Sequence[np.ndarray], *, seed: int = 0
) -> np.ndarray:
    """Return the variance that each setting explains individually over given random points of a search space.

    By the law of total variance, a setting that exists in a part of the space explains the variance of its main effect
    there, times the probability of that part. A main effect is the mean prediction of a random forest in each of
    `NUM_BINS` intervals of equal probability; the variance that the means have by chance is subtracted.

    Args:
        inputs: (n, columns) settings of the trials as numbers.
        values: (n,) objective.
        points: (m, columns) random points of the space.
        settings: For each setting its value at each point, as a number: (m,); NaN where it does not exist.
        seed: Seed of the forest.

    Returns:
        (number of settings,) variances, in units of `values` squared.
    """
    predicted = _fitted(inputs, values, seed).predict(points)
    return np.array([_between(one, predicted) for one in settings])


def _between(setting: np.ndarray, predicted: np.ndarray) -> float:
    present = ~np.isnan(setting)
    found, outputs = setting[present], predicted[present]
    levels, bins = np.unique(found, return_inverse=True)
    if len(levels) > NUM_BINS:
        bins = np.searchsorted(np.quantile(found, np.linspace(0, 1, NUM_BINS + 1)[1:-1]), found)
    sizes = np.bincount(bins)
    if len(sizes) < 2 or sizes.min() < 2:
        return 0.0
    means = np.bincount(bins, weights=outputs) / sizes
    within = np.bincount(bins, weights=(outputs - means[bins]) ** 2) / (sizes - 1)
    chance = float(np.average(within / sizes, weights=sizes))
    return max(0.0, _variance(means, sizes) - chance) * float(present.mean())


def _fitted(inputs: np.ndarray, values: np.ndarray, seed: int) -> Any:
    from sklearn.ensemble import RandomForestRegressor  # takes a second to import

    return RandomForestRegressor(n_estimators=NUM_TREES, max_depth=MAX_DEPTH, random_state=seed).fit(inputs, values)


def _boxes(tree: Any, space: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the lower and upper corners (L, columns) of the boxes of a tree's leaves, and their predictions (L,)."""
    lows, highs = (np.repeat(space[None, :, side], tree.node_count, axis=0) for side in (0, 1))
    nodes = np.array([0])
    while nodes.size:  # one level of the tree after another
        inner = nodes[tree.feature[nodes] >= 0]
        left, right = tree.children_left[inner], tree.children_right[inner]
        for child in (left, right):
            lows[child], highs[child] = lows[inner], highs[inner]
        highs[left, tree.feature[inner]] = lows[right, tree.feature[inner]] = tree.threshold[inner]
        nodes = np.concatenate([left, right])
    leaf = tree.feature < 0
    return lows[leaf], highs[leaf], tree.value[leaf].reshape(-1)


def _effect(
    group: list[int], lows: np.ndarray, highs: np.ndarray, sizes: np.ndarray, leaves: np.ndarray, space: np.ndarray
) -> float:
    """Return the variance of the prediction over the columns of one setting, with all other columns averaged out."""
    others = np.prod(np.delete(sizes, group, axis=1), axis=1) * leaves
    edges = [np.unique(np.concatenate([lows[:, column], highs[:, column]])) for column in group]
    if len(group) == 1:
        (column,), (edge,) = group, edges
        steps = np.bincount(np.searchsorted(edge, lows[:, column]), weights=others, minlength=len(edge))
        steps -= np.bincount(np.searchsorted(edge, highs[:, column]), weights=others, minlength=len(edge))
        return _variance(np.cumsum(steps)[:-1], np.diff(edge) / np.ptp(space[column]))
    cells = np.stack(np.meshgrid(*(np.arange(len(edge) - 1) for edge in edges), indexing="ij"), -1)
    cells = cells.reshape(-1, len(group))
    inside = np.ones((len(cells), len(leaves)), dtype=bool)
    weights = np.ones(len(cells))
    for place, (column, edge) in enumerate(zip(group, edges, strict=True)):
        middle = ((edge[1:] + edge[:-1]) / 2)[cells[:, place]]
        inside &= (lows[:, column] < middle[:, None]) & (middle[:, None] < highs[:, column])
        weights *= np.diff(edge)[cells[:, place]]
    return _variance(inside @ others, weights)


def _variance(values: np.ndarray, weights: np.ndarray) -> float:
    mean = np.average(values, weights=weights)
    return float(np.average((values - mean) ** 2, weights=weights))
