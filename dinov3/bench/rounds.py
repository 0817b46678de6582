"""Several things timed in turns: what else the machine does then slows all of them alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any


def times_in_turns(
    sides: Mapping[str, Callable[[], Any]], num_rounds: int
) -> dict[str, list[float]]:
    """Seconds of each side in every round, after one round to warm up."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(num_rounds + 1):
        for name, work in sides.items():
            began = time.perf_counter()
            work()
            if number > 0:
                found[name].append(time.perf_counter() - began)
    return found
