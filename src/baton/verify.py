"""Acceptance rules: which path of a draft is kept, and the target's own token after it. Pure functions.

Every rule walks down from the root, node by node. At a node the target's processed distribution p is known (after
temperature, filters and penalties for exactly this path); the rule either moves to a child or ends the walk with one
token that is not a child. All but `typical` are lossless: what is emitted is distributed as p, token by token.

Which rule is exact depends on how children were made:

- `follow`: any children. Greedy, where the target's own token is its most probable one; and sample-and-match, where it
  is drawn from p: what is drawn is emitted, whether a child had guessed it or not. The children must have been made
  without looking at the numbers it is drawn with. As those are keyed by position, the text is that of plain sampling,
  token for token.
- `recursive_rejection`: drawn children only (arXiv 2305.09781, 2402.14160). Keeps a good drafter's first guess more
  often.
- `typical`: lossy (arXiv 2401.10774).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.draft import ROOT, Draft
from baton.errors import DraftError
from baton.sampling import draw


@dataclass(frozen=True)
class Verdict:
    """What is kept of a draft."""

    accepted: tuple[int, ...]  # nodes of one path, the root's child first
    token: int  # the target's own, after the path; the next root


def match(draft: Draft, node: int, token: int) -> int | None:
    """The child of `node` that guessed this token."""
    for child in draft.tree.children(node):
        if draft.tokens[child] == token:
            return child
    return None


def follow(draft: Draft, own: Callable[[int], int | None], ends: Collection[int] = frozenset()) -> Verdict | None:
    """Go down while the target's own token after a node is one of the node's children.

    Args:
        own: the target's token after a node (or `ROOT`), asked once per visited node; None: it has none.
        ends: tokens after which nothing is looked at.
    Returns: None when the target has no token after the root; without one after a later node, what came before.
    """
    at = ROOT
    accepted: list[int] = []
    while True:
        token = own(at)
        if token is None:
            return Verdict(tuple(accepted[:-1]), draft.tokens[accepted[-1]]) if accepted else None
        child = None if token in ends else match(draft, at, token)
        if child is None:
            return Verdict(tuple(accepted), token)
        accepted.append(child)
        at = child


def recursive_rejection(
    draft: Draft, node: int, p: Tensor, uniform: Callable[[str, int], float]
) -> tuple[int | None, int]:
    """Offer the children in the order in which they were drawn; after each refusal both distributions lose its part.

    Child y is kept with probability min(1, p(y) / q(y)). Refused, p becomes the normalised positive part of p - q, and
    q loses y. When all are refused, the token comes from what is left of p.

    Args:
        p: float32 [V]; not changed.
        uniform: (purpose, sibling rank) to a number in [0, 1), another one for each pair.
    Raises: DraftError when the children were not drawn.
    """
    if node not in draft.drawn:
        raise DraftError(
            f"recursive rejection needs to know what the children of node {node} were drawn from, and they were "
            "chosen, not drawn: use sample-and-match, which is exact for any children"
        )
    children = draft.tree.children(node)
    p, q = p.double(), draft.q(node, p)
    for rank, child in enumerate(children):
        token = draft.tokens[child]
        # Multiplied, not divided: filters can make q zero where nothing can have been drawn.
        if uniform("accept", rank) * float(q[token]) < float(p[token]):
            return child, token
        rest = (p - q).clamp(min=0)
        total = rest.sum()
        if total <= 0:  # p equals q up to rounding: a refusal had probability zero
            break
        p = rest / total
        q[token] = 0
        left = q.sum()
        if left <= 0:  # no second token could have been drawn
            break
        q = q / left
    return None, int(draw(p[None], [uniform("residual", 0)])[0])


def typical(draft: Draft, node: int, p: Tensor, epsilon: float, delta: float) -> int | None:
    """The first child that p finds plausible enough: p(y) > min(epsilon, delta exp(-entropy(p))). Lossy.

    Source: arXiv 2401.10774, section 3.3. The target's distribution is not kept: unlikely tokens are accepted less
    often than they should be, likely ones more often.
    """
    children = draft.tree.children(node)
    if not children:
        return None
    entropy = float(-torch.special.xlogy(p, p).sum())
    threshold = min(epsilon, delta * torch.tensor(-entropy).exp().item())
    for child in children:
        if float(p[draft.tokens[child]]) > threshold:
            return child
    return None
