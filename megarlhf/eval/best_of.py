"""The best of n responses, without bias, from N responses to one prompt, for any n; and what it costs in KL."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.float64]


def best_of(proxy: ArrayLike, gold: ArrayLike, sizes: Sequence[int]) -> Numbers:
    """What the response of the highest proxy is worth, on average over all choices of n of the N responses.

        sum over i = n..N of  C(i - 1, n - 1) / C(N, n) * gold_(i),        gold_(i) that of the i-th lowest proxy

    Equal proxies share their places: each is as likely to be taken as another, whatever the order of the responses.

    Shapes:   proxy, gold [N]; the first may have -inf. Returns one number for each n of `sizes`, 1 <= n <= N.
    Source:   Nakano et al. 2021 (WebGPT), appendix I.
    """
    ranked, places = np.unique(np.asarray(proxy, dtype=np.float64), return_inverse=True)
    worth = np.asarray(gold, dtype=np.float64)
    held = np.bincount(places, minlength=len(ranked))
    mean = np.bincount(places, weights=worth, minlength=len(ranked)) / held
    shared = np.repeat(mean, held)
    return np.array([chances(len(worth), size) @ shared for size in sizes])


def chances(count: int, size: int) -> Numbers:
    """How likely the i-th lowest of `count` is the highest of `size` of them: [count], which add up to 1.

    From the highest down, each times (i - n) / (i - 1) of the one above it: no factorial, so that nothing overflows or
    cancels.
    """
    if not 1 <= size <= count:
        raise ValueError(f"size={size}: there are {count} responses; choose 1 to {count}.")
    above = np.arange(count, 1, -1, dtype=np.float64)
    falling = np.concatenate([[size / count], np.maximum(above - size, 0.0) / (above - 1)])
    return np.cumprod(falling)[::-1].astype(np.float64)


def pass_at(count: int, right: int, sizes: Sequence[int]) -> Numbers:
    """How likely one of k of `count` responses is right, of which `right` are: 1 - C(N - c, k) / C(N, k) for each k.

    Source:   Chen et al. 2021 (HumanEval), whose product it is.
    """
    wrong = count - right
    place = np.arange(wrong + 1, count + 1, dtype=np.float64)
    return np.array([1.0 if size > wrong else float(1.0 - np.prod(1.0 - size / place)) for size in sizes])


def kl_of_best(size: int) -> float:
    """KL of the best of n from the policy, ln n - (n - 1) / n: what it is at most, and is where no two scores tie.

    Units:    nats. Source: Stiennon et al. 2020, appendix G.3; Beirami et al. 2024 for the bound.
    """
    return math.log(size) - (size - 1) / size
