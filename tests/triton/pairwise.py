"""A small set of cases in which every pair of option values occurs at least once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def pairwise(
    options: Mapping[str, Sequence[Any]], allowed: Callable[[dict[str, Any]], bool], seed: int = 0
) -> list[dict[str, Any]]:
    """Greedy cover of all pairs that some allowed choice contains.

    Args:
        options: name -> values.
        allowed: which full choices make sense.
    """
    rng = random.Random(seed)
    names = list(options)

    def pairs(choice: dict[str, Any]) -> set[tuple[Any, ...]]:
        return {(a, choice[a], b, choice[b]) for a, b in itertools.combinations(names, 2)}

    def draw() -> dict[str, Any]:
        while True:
            choice = {name: rng.choice(options[name]) for name in names}
            if allowed(choice):
                return choice

    reachable: set[tuple[Any, ...]] = set()
    for _ in range(4000):
        reachable |= pairs(draw())
    chosen: list[dict[str, Any]] = []
    while reachable:
        best = max((draw() for _ in range(200)), key=lambda choice: len(pairs(choice) & reachable))
        if new := pairs(best) & reachable:
            chosen.append(best)
            reachable -= new
    return chosen
