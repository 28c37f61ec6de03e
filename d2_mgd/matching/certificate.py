"""Proof that an assignment is the cheapest one, without asking the solver that found it.

Shape shorthand: n sources, m sinks, A arcs.

Every source goes to one sink; sink j takes between ``least[j]`` and ``most[j]`` sources. Linear programming duality: an
assignment is cheapest if there are prices of the sinks at which

- every source goes to a sink where its cost minus the price is least, and
- no sink that could take one source more has a lower price than a sink that could take one less.

All costs are integers, so the proof is exact.
"""

from __future__ import annotations

import numpy as np

__all__ = ["sink_prices", "violated_arcs"]


def sink_prices(
    arcs: tuple[np.ndarray, np.ndarray], unit_costs: np.ndarray, chosen: np.ndarray, least: np.ndarray, most: np.ndarray
) -> np.ndarray | None:
    """Prices that prove an assignment to be the cheapest among some arcs, by shortest paths between the sinks.

    Moving a source from its sink a to another sink b changes the total by the difference of its two costs. Prices are
    the lengths of the shortest paths over such moves (Bellman-Ford); they exist unless a cycle of moves saves
    something.

    Args:
        arcs: sources (A,) and sinks (A,), in ascending order of the sinks. Every source's arc to its chosen sink is
            among them, and every sink has one.
        unit_costs: (A,) int64 costs of the arcs.
        chosen: (n,) the sink of each source.
        least, most: (m,) bounds of the number of sources that a sink takes, kept by ``chosen``.

    Returns:
        (m,) int64 prices; None if the assignment is not the cheapest among these arcs.
    """
    source, sink = arcs
    num_sinks = least.size
    taken = np.bincount(chosen, minlength=num_sinks)
    can_give, can_take = taken > least, taken < most
    moves = bool(can_give.any() and can_take.any())
    origin = chosen[source]
    own = np.empty(chosen.size, dtype=np.int64)
    on_chosen = origin == sink
    own[source[on_chosen]] = unit_costs[on_chosen]
    length = unit_costs - own[source]
    first = np.searchsorted(sink, np.arange(num_sinks))

    prices = np.zeros(num_sinks, dtype=np.int64)
    for _ in range(num_sinks + 2):  # nodes of the longest shortest path, with the one that joins can_take and can_give
        shorter = np.minimum(prices, np.minimum.reduceat(length + prices[origin], first))
        if moves:
            shorter[can_give] = np.minimum(shorter[can_give], shorter[can_take].min())
        if np.array_equal(shorter, prices):
            return prices
        prices = shorter
    return None


def violated_arcs(costs: np.ndarray, chosen: np.ndarray, prices: np.ndarray) -> np.ndarray:
    """Arcs that a source would rather take at these prices; none proves that no other assignment is cheaper.

    Args:
        costs: (n, m) int64 costs of all arcs.
        chosen: (n,) the sink of each source.
        prices: (m,) from :func:`sink_prices`.

    Returns:
        (n, m) boolean.
    """
    reduced = costs - prices
    return reduced < np.take_along_axis(reduced, chosen[:, None], axis=1)
