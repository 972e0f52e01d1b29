r"""Pairs that are not edges, drawn for training on link prediction."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pantarhei.errors import RequestError
from pantarhei.systems.evolving_graphs.graphs import rows_of

Sampling = Literal["smart", "uniform", "all", "historical"]


def negatives(
    kind: Sampling,
    edges: Tensor,
    count: int,
    nodes: int,
    *,
    active: Tensor | None = None,
    past: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return at most ``count`` distinct ordered pairs (2, n) that are not among ``edges`` (2, P).

    - ``"smart"`` (EvolveGCN's released code): sources drawn from the sources of the edges, so in
      proportion to their degree; targets from ``active``, the nodes of the snapshots seen, with
      repeats
    - ``"uniform"``: both ends from all nodes
    - ``"historical"``: from ``past`` (2, m), edges of earlier snapshots that are gone
    - ``"all"``: every pair of different nodes; ``count`` is not looked at

    The first two draw four times as many as wanted in one pass and drop self-loops, repeats and
    true edges, so that a dense graph may give fewer. Raises :class:`RequestError` for an unknown
    kind or without what a kind needs.

    >>> edges = torch.tensor([[0, 1], [1, 2]])
    >>> negatives("all", edges, 0, 3).T.tolist()
    [[0, 2], [1, 0], [2, 0], [2, 1]]
    """
    device, drawn = edges.device, 4 * count
    if kind == "all":
        key = torch.arange(nodes * nodes, device=device)
    elif kind == "historical":
        if past is None:
            raise RequestError("Historical negatives are drawn from past=: give earlier edges.")
        key = torch.unique(past[0] * nodes + past[1])
        key = key[torch.randperm(len(key), generator=generator, device=device)]
    elif kind == "uniform":
        key = torch.randint(nodes * nodes, (drawn,), generator=generator, device=device)
    elif kind == "smart":
        if active is None or not len(active):
            raise RequestError("Smart negatives are drawn from active=: give the window's nodes.")
        own = torch.randint(edges.shape[1], (drawn,), generator=generator, device=device)
        other = torch.randint(len(active), (drawn,), generator=generator, device=device)
        key = edges[0][own] * nodes + active[other]
    else:
        raise RequestError(f"'{kind}' negatives are unknown: smart, uniform, historical or all.")
    true = torch.sort(edges[0] * nodes + edges[1]).values
    fresh = (rows_of(true, key) == len(true)) & (key // nodes != key % nodes)
    key = _first_of_each(key[fresh])
    key = key if kind == "all" else key[:count]
    return torch.stack([key // nodes, key % nodes])


def _first_of_each(key: Tensor) -> Tensor:
    """Drop repeats, and keep the order in which they were drawn."""
    order = torch.argsort(key, stable=True)
    ordered = key[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return key[torch.sort(order[first]).values]
