"""Directed graphs with kinds of edges: strongly connected components and a cycle through an edge."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Edge:
    """From one transaction to the one that has to come later, and why."""

    source: int
    target: int
    kind: str
    key: int


Graph = Mapping[int, list[Edge]]
Allowed = Callable[[Edge], bool]


def components(graph: Graph, allowed: Allowed) -> Iterator[frozenset[int]]:
    """The strongly connected components of more than one node, along the allowed edges: Tarjan, without
    recursion, linear in nodes and edges.
    """
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    for root in sorted(graph):
        if root in index:
            continue
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        path = [(root, iter(graph.get(root, ())))]
        while path:
            node, edges = path[-1]
            for edge in edges:
                if not allowed(edge):
                    continue
                if edge.target not in index:
                    index[edge.target] = low[edge.target] = len(index)
                    stack.append(edge.target)
                    on_stack.add(edge.target)
                    path.append((edge.target, iter(graph.get(edge.target, ()))))
                    break
                if edge.target in on_stack:
                    low[node] = min(low[node], index[edge.target])
            else:
                path.pop()
                if path:
                    above = path[-1][0]
                    low[above] = min(low[above], low[node])
                if low[node] == index[node]:
                    found = {node}
                    while (member := stack.pop()) != node:
                        found.add(member)
                    on_stack -= found
                    if len(found) > 1:
                        yield frozenset(found)


def cycle(graph: Graph, first: Edge, within: frozenset[int], allowed: Allowed) -> list[Edge] | None:
    """The shortest cycle that begins with this edge and goes on along allowed edges; None if none does."""
    came: dict[int, Edge] = {first.target: first}
    queue = deque([first.target])
    while queue:
        node = queue.popleft()
        if node == first.source:
            return _walk_back(came, first)
        for edge in graph.get(node, ()):
            if edge.target in within and edge.target not in came and allowed(edge):
                came[edge.target] = edge
                queue.append(edge.target)
    return None


def _walk_back(came: dict[int, Edge], first: Edge) -> list[Edge]:
    edges: list[Edge] = []
    node = first.source
    while not edges or edges[-1] is not first:
        edges.append(came[node])
        node = edges[-1].source
    return edges[::-1]
