"""`search`: find a way through a directed graph, depth first, writing every step down.

    <search> n40 a n07 ; n40 b n33 ; n40 c none ; n33 a n12 ; ... n07 0 n12 0 n51 2 ... ? n12 to n51 <think>
    f n12 go n12 1 ; n12 a n40 0 ; g n40 go n40 1 ; n40 a n07 0 ; h n07 go n07 1 ; n07 a none ;
    g n40 back n40 1 ; n40 a n07 1 ; n40 b n33 0 ; h n33 go n33 1 ; n33 a n12 1 ; n33 b n51 2 ;
    i n51 end </think> i n51 h n33 g n40 f n12

The edges of a node are lettered in the order they are tried, and `none` closes them. Behind a
node's name stands its state, wherever it is looked up: 0 for never visited, 1 for visited, 2 for
the goal. The letters from f on are the places of a stack, which holds the way from the start to
where the search is: going on writes the next place, going back reads the one before, and tries the
edges of its node from the first again. The answer is the stack, read from the goal to the start.

So the trace is long and says most things several times, while what the search cannot do without
(which nodes were visited, and what lies at the bottom of the stack) is written once or a few times
and read much later: a cache that loses it sends the search round in circles.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from .base import LABELS, LETTERS, Draft, Draw, GeneratedTask, dial

_MOST_EDGES = 4  # of one node; with the one for `none` they take the letters a to e
_PLACES = LETTERS[5:]  # of the stack
_FREE_ATTEMPTS = 200  # graphs drawn as the dials say; then their trees are made shallower
_SHALLOWEST = 5  # three edges a node reach 364 nodes in five steps, so a tree always fits
_UNSEEN, _SEEN, _GOAL = "0", "1", "2"


@dataclass(frozen=True)
class Search(GeneratedTask):
    """The dials of `search`; the default trace is about 580 tokens."""

    name = "search"

    nodes: int = dial(25, 3, 48, "nodes of the graph")
    extra: int = dial(40, 0, 100, "edges beyond a tree's, in percent of the nodes")
    depth: int = dial(30, 0, 100, "percent of nodes that hang on the node before, not on any node")

    def draft(self, draw: Draw) -> Draft:
        """One graph, its search and the way found."""
        names = draw.sample(LABELS, self.nodes)
        for attempt in itertools.count():
            children = self._graph(draw, _tree_depth(attempt))
            order, depth = _visit_order(children)
            if depth < len(_PLACES):
                break
        # A goal among the last nodes visited: most of the graph is searched before it is found.
        goal = order[-1 - draw.below(max(1, len(order) // 4))]
        draft = Draft(prompt=["<search>"])
        for node in draw.sample(range(self.nodes), self.nodes):
            for letter, child in zip(LETTERS, [*children[node], None], strict=False):
                draft.prompt += [names[node], letter, "none" if child is None else names[child], ";"]
        for node in draw.sample(range(self.nodes), self.nodes):
            draft.prompt += [names[node], _GOAL if node == goal else _UNSEEN]
        draft.prompt += ["?", names[0], "to", names[goal], "<think>"]
        self._walk(draft, names, children, goal)
        return draft

    def _graph(self, draw: Draw, deepest: int) -> list[list[int]]:
        """Children of each node, in the order they are tried; every node is reached from node 0 in `deepest` edges."""
        children: list[list[int]] = [[] for _ in range(self.nodes)]
        depths = [0] * self.nodes
        for node in range(1, self.nodes):
            parent = node - 1 if draw.below(100) < self.depth else draw.below(node)
            while len(children[parent]) >= _MOST_EDGES - 1 or depths[parent] >= deepest:
                parent = draw.below(node)
            children[parent].append(node)
            depths[node] = depths[parent] + 1
        for _ in range(self.nodes * self.extra // 100):
            one, other = draw.below(self.nodes), draw.below(self.nodes)
            if one != other and other not in children[one] and len(children[one]) < _MOST_EDGES:
                children[one].append(other)
        return [draw.sample(some, len(some)) for some in children]

    def _walk(self, draft: Draft, names: list[str], children: list[list[int]], goal: int) -> None:
        """Write the search into the trace, then the way back from the goal."""
        stack = [0]
        seen = {0}
        draft.write(f"{_PLACES[0]} {names[0]} go {names[0]} {_SEEN} ;", "cccccc")
        while stack[-1] != goal:
            child = _try_edges(draft, names, children, stack[-1], seen, goal)
            if child is None:
                stack.pop()
            else:
                stack.append(child)
                seen.add(child)
            here, place = names[stack[-1]], _PLACES[len(stack) - 1]
            if child is None:
                draft.write(f"{place} {here} back {here} {_SEEN} ;", "crcccc")
            elif child != goal:
                draft.write(f"{place} {here} go {here} {_SEEN} ;", "cccccc")
        draft.write(f"{_PLACES[len(stack) - 1]} {names[goal]} end </think>", "cccc")
        for place, node in reversed(list(zip(_PLACES, stack, strict=False))):
            draft.write(f"{place} {names[node]}", "AA")


def _try_edges(
    draft: Draft, names: list[str], children: list[list[int]], node: int, seen: set[int], goal: int
) -> int | None:
    """Write a node's edges until one leads somewhere new; that child, or None."""
    for letter, child in zip(LETTERS, children[node], strict=False):
        state = _GOAL if child == goal else _SEEN if child in seen else _UNSEEN
        draft.write(f"{names[node]} {letter} {names[child]} {state} ;", "cccrc")
        if state != _SEEN:
            return child
    draft.write(f"{names[node]} {LETTERS[len(children[node])]} none ;", "cccc")
    return None


def _tree_depth(attempt: int) -> int:
    """How deep the tree under a graph may be: free at first, then ever shallower, until a search fits the stack."""
    if attempt < _FREE_ATTEMPTS:
        return len(LABELS)
    return max(_SHALLOWEST, len(_PLACES) - 1 - (attempt - _FREE_ATTEMPTS) // 4)


def _visit_order(children: list[list[int]]) -> tuple[list[int], int]:
    """Nodes in the order a whole depth-first search first sees them, without the start, and how deep it goes."""
    order: list[int] = []
    deepest = 0
    stack = [(0, 0)]
    while stack:
        node, depth = stack.pop()
        if node in order:
            continue
        order.append(node)
        deepest = max(deepest, depth)
        stack += [(child, depth + 1) for child in reversed(children[node])]
    return order[1:], deepest
