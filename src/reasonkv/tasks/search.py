from __future__ import annotations

import itertools
from dataclasses import dataclass

from .base import LABELS, LETTERS, Draft, Draw, GeneratedTask, Kind, dial

_MOST_EDGES = 4  # of one node; with the one for `none` they take the letters a to e
_PLACES = LETTERS[5:]  # of the stack
_FREE_ATTEMPTS = 200  # graphs drawn as the dials say; later trees are made shallower until the search fits the stack
_SHALLOWEST = 5  # three edges a node reach 364 nodes in five steps, so a tree always fits
_UNSEEN, _SEEN, _GOAL = "0", "1", "2"
_Graph = list[list[int]]  # children of each node, in the order they are tried


@dataclass(frozen=True)
class Search(GeneratedTask):
    """`search`: find a way through a directed graph, depth first, and write every step down.

        <search> n40 a n07 ; n40 b n33 ; n40 c none ; n33 a n12 ; ... n07 0 n12 0 n51 2 ... ? n12 to n51 <think>
        f n12 go n12 1 ; n12 a n40 0 ; g n40 go n40 1 ; n40 a n07 0 ; h n07 go n07 1 ; n07 a none ;
        g n40 back n40 1 ; n40 a n07 1 ; n40 b n33 0 ; h n33 go n33 1 ; n33 a n12 1 ; n33 b n51 2 ;
        i n51 end </think> i n51 h n33 g n40 f n12

    Letters number the edges of a node in the order they are tried, and `none` ends them. A digit after a node's
    name is its state: 0 never visited, 1 visited, 2 the goal. The letters from f on are the places of a stack,
    which holds the way from the start to the current node. `go` writes the next place. `back` reads the place
    before and tries the edges of its node again from the first. The answer is the stack, read from the goal to the
    start.

    The trace is long and repeats most things. What the search needs (which nodes were visited, the bottom of the
    stack) is written once or a few times and read much later. A cache that loses it sends the search round in
    circles. The default trace is about 580 tokens.
    """

    name = "search"

    nodes: int = dial(25, "nodes of the graph", range=(3, 48))
    extra: int = dial(40, "edges beyond a tree's, in percent of the nodes", range=(0, 100))
    depth: int = dial(30, "percent of nodes that hang on the node before, not on any node", range=(0, 100))

    def draft(self, draw: Draw) -> Draft:
        """Draw one graph and search it."""
        names = draw.sample(LABELS, self.nodes)
        for attempt in itertools.count():
            free = attempt < _FREE_ATTEMPTS
            deepest = max(_SHALLOWEST, len(_PLACES) - 1 - (attempt - _FREE_ATTEMPTS) // 4)
            children = self._graph(draw, len(LABELS) if free else deepest)
            order, depth = _visit_order(children)
            if depth < len(_PLACES):
                break
        # The goal is among the last nodes visited, so most of the graph is searched before it is found.
        goal = order[-1 - draw.below(max(1, len(order) // 4))]
        draft = Draft(prompt=["<search>"])
        for node in draw.sample(range(self.nodes), self.nodes):
            for letter, child in zip(LETTERS, [*(names[child] for child in children[node]), "none"], strict=False):
                draft.prompt += [names[node], letter, child, ";"]
        for node in draw.sample(range(self.nodes), self.nodes):
            draft.prompt += [names[node], _GOAL if node == goal else _UNSEEN]
        draft.prompt += ["?", names[0], "to", names[goal], "<think>"]
        _walk(draft, names, children, goal)
        return draft

    def _graph(self, draw: Draw, deepest: int) -> _Graph:
        """Draw a graph in which node 0 reaches every node over at most `deepest` edges."""
        children: _Graph = [[] for _ in range(self.nodes)]
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


def _walk(draft: Draft, names: list[str], children: _Graph, goal: int) -> None:
    """Write the search into the trace, then the way back from the goal."""
    stack, seen = [0], {0}
    draft.write(f"{_PLACES[0]} {names[0]} go {names[0]} {_SEEN} ;")
    while stack[-1] != goal:
        child = _try_edges(draft, names, children, stack[-1], seen, goal)
        if child is None:
            stack.pop()
            place, here = _PLACES[len(stack) - 1], names[stack[-1]]
            draft.write(f"{place} r:{here} back {here} {_SEEN} ;")
            continue
        stack.append(child)
        seen.add(child)
        if child != goal:
            draft.write(f"{_PLACES[len(stack) - 1]} {names[child]} go {names[child]} {_SEEN} ;")
    draft.write(f"{_PLACES[len(stack) - 1]} {names[goal]} end </think>")
    for place, node in reversed(list(zip(_PLACES, stack, strict=False))):
        draft.write(f"{place} {names[node]}", Kind.ANSWER)


def _try_edges(draft: Draft, names: list[str], children: _Graph, node: int, seen: set[int], goal: int) -> int | None:
    """Write the edges of a node until one leads to a new node; return that node, or None."""
    for letter, child in zip(LETTERS, children[node], strict=False):
        state = _GOAL if child == goal else _SEEN if child in seen else _UNSEEN
        draft.write(f"{names[node]} {letter} {names[child]} r:{state} ;")
        if state != _SEEN:
            return child
    draft.write(f"{names[node]} {LETTERS[len(children[node])]} none ;")
    return None


def _visit_order(children: _Graph) -> tuple[list[int], int]:
    """Return the nodes in the order a whole depth-first search visits them, without the start, and its depth."""
    order: list[int] = []
    deepest = 0
    stack = [(0, 0)]
    while stack:
        node, depth = stack.pop()
        if node not in order:
            order.append(node)
            deepest = max(deepest, depth)
            stack += [(child, depth + 1) for child in reversed(children[node])]
    return order[1:], deepest
