"""`search`: find a way through a directed graph, depth first, writing every step down.

    <search> n40 a n07 ; n40 b n33 ; n40 c none ; n33 a n12 ; ... n07 0 n12 0 n51 2 ... ? n12 to n51 <think>
    n12 from none go n12 1 ; n12 a n40 0 ; n40 from n12 go n40 1 ; n40 a n07 0 ;
    n07 from n40 go n07 1 ; n07 a none ; n07 from n40 back n40 1 ; n40 a n07 1 ; n40 b n33 0 ; ...
    n33 b n51 2 ; n51 from n33 end </think> n51 from n33 from n40 from n12 from none

The edges of a node are lettered in the order they are tried, and `none` closes them. Behind a
node's name stands its state, wherever it is looked up: 0 for never visited, 1 for visited, 2 for
the goal. Whoever goes on to a node writes once where it was reached `from`; whoever comes back
tries its edges from the first again. The answer is the way from the goal back to the start.

So the trace is long and says most things several times, while the two facts the search cannot do
without (which nodes were visited, and from where) are written once and read much later: a cache
that loses them sends the search round in circles.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import LABELS, LETTERS, Draft, Draw, GeneratedTask, dial

_MOST_EDGES = 4  # of one node
_UNSEEN, _SEEN, _GOAL = "0", "1", "2"


@dataclass(frozen=True)
class Search(GeneratedTask):
    """The dials of `search`; the default trace is about 660 tokens."""

    name = "search"

    nodes: int = dial(28, 3, 48, "nodes of the graph")
    extra: int = dial(40, 0, 100, "edges beyond a tree's, in percent of the nodes")
    depth: int = dial(50, 0, 100, "percent of nodes that hang on the node before, not on any node")

    def draft(self, draw: Draw) -> Draft:
        """One graph, its search and the way found."""
        names = draw.sample(LABELS, self.nodes)
        children = self._graph(draw)
        order = _visit_order(children)
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

    def _graph(self, draw: Draw) -> list[list[int]]:
        """Children of each node, in the order they are tried; every node is reached from node 0."""
        children: list[list[int]] = [[] for _ in range(self.nodes)]
        for node in range(1, self.nodes):
            parent = node - 1 if draw.below(100) < self.depth else draw.below(node)
            while len(children[parent]) >= _MOST_EDGES - 1:
                parent = draw.below(node)
            children[parent].append(node)
        for _ in range(self.nodes * self.extra // 100):
            one, other = draw.below(self.nodes), draw.below(self.nodes)
            if one != other and other not in children[one] and len(children[one]) < _MOST_EDGES:
                children[one].append(other)
        return [draw.sample(some, len(some)) for some in children]

    def _walk(self, draft: Draft, names: list[str], children: list[list[int]], goal: int) -> None:
        """Write the search into the trace, then the way back from the goal."""
        parents: dict[int, int | None] = {0: None}
        node = 0
        draft.write(f"{names[0]} from none go {names[0]} {_SEEN} ;", "ccccccc")
        while True:
            child = _try_edges(draft, names, children, node, parents, goal)
            if child is None:
                above = parents[node]
                if above is None:
                    raise AssertionError("the goal is always reached")
                draft.write(f"{names[node]} from {names[above]} back {names[above]} {_SEEN} ;", "ccrcccc")
                node = above
                continue
            parents[child] = node
            if child == goal:
                draft.write(f"{names[child]} from {names[node]} end </think>", "ccccc")
                break
            draft.write(f"{names[child]} from {names[node]} go {names[child]} {_SEEN} ;", "ccccccc")
            node = child
        draft.write(names[goal], "A")
        step: int | None = goal
        while step is not None:
            step = parents[step]
            draft.write(f"from {'none' if step is None else names[step]}", "AA")


def _try_edges(
    draft: Draft, names: list[str], children: list[list[int]], node: int, seen: dict[int, int | None], goal: int
) -> int | None:
    """Write a node's edges until one leads somewhere new; that child, or None."""
    for letter, child in zip(LETTERS, children[node], strict=False):
        state = _GOAL if child == goal else _SEEN if child in seen else _UNSEEN
        draft.write(f"{names[node]} {letter} {names[child]} {state} ;", "cccrc")
        if state != _SEEN:
            return child
    draft.write(f"{names[node]} {LETTERS[len(children[node])]} none ;", "cccc")
    return None


def _visit_order(children: list[list[int]]) -> list[int]:
    """Nodes in the order a whole depth-first search first sees them, without the start."""
    order: list[int] = []
    stack = [0]
    while stack:
        node = stack.pop()
        if node in order:
            continue
        order.append(node)
        stack += reversed(children[node])
    return order[1:]
