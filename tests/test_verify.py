"""Acceptance rules against the law they must keep: what is emitted is distributed as the target alone would write."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from baton.draft import ROOT, Draft, PathTemplate, Tree
from baton.errors import DraftError
from baton.sampling import draw
from baton.verify import follow, recursive_rejection, typical

VOCAB = 5
generator = torch.Generator().manual_seed(0)
P = torch.rand(VOCAB + 1, VOCAB, generator=generator).pow(2)  # row: the token before; the last row is the prompt's
Q = (P + 0.4 * torch.rand(VOCAB + 1, VOCAB, generator=generator)).pow(2)
P, Q = P / P.sum(1, keepdim=True), Q / Q.sum(1, keepdim=True)
RUNS = 4000


def without_replacement(q: Tensor, count: int) -> list[int]:
    return torch.multinomial(q, count, generator=generator).tolist()


def most_probable(q: Tensor, count: int) -> list[int]:
    return q.topk(count).indices.tolist()


def tree_of(branches: int, choose: Callable[[Tensor, int], list[int]]) -> Draft:
    """Two levels, `branches` children of every node, claimed to be drawn from Q."""
    tokens = choose(Q[VOCAB], branches)
    parents, drawn = [ROOT] * branches, {ROOT: Q[VOCAB]}
    for node in range(branches):
        drawn[node] = Q[tokens[node]]
        tokens += choose(Q[tokens[node]], branches)
        parents += [node] * branches
    return Draft(tokens=tokens, tree=Tree(parents), drawn=drawn)


def two_tokens(draft: Draft) -> tuple[int, int]:
    """The first two tokens that recursive rejection and, after a refusal, plain drawing give."""

    def number(*_: object) -> float:
        return float(torch.rand((), generator=generator))

    at, written = ROOT, []
    while len(written) < 2:
        before = written[-1] if written else VOCAB
        if at is None or not draft.tree.children(at):
            written.append(int(draw(P[before][None], [number()])[0]))
            at = None  # type: ignore[assignment]
        else:
            at, token = recursive_rejection(draft, at, P[before], number)  # type: ignore[assignment]
            written.append(token)
    return written[0], written[1]


def chi_square(made: list[tuple[int, int]]) -> float:
    """Of the joint law of two tokens, 24 degrees of freedom: mean 24, standard deviation 7."""
    counts = Counter(made)
    total = 0.0
    for first in range(VOCAB):
        for second in range(VOCAB):
            expected = len(made) * float(P[VOCAB, first] * P[first, second])
            total += (counts[first, second] - expected) ** 2 / expected
    return total


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_recursive_rejection_keeps_the_joint_law(branches: int) -> None:
    made = [two_tokens(tree_of(branches, without_replacement)) for _ in range(RUNS)]
    assert chi_square(made) < 60  # probability 0.00006


def test_chosen_children_would_break_it() -> None:
    """The same rule on the most probable tokens is biased, and the statistic sees it: kinds must not be mixed up."""
    made = [two_tokens(tree_of(2, most_probable)) for _ in range(RUNS)]
    assert chi_square(made) > 200


def test_chosen_children_are_refused() -> None:
    draft = Draft(tokens=[1, 2], tree=Tree([-1, -1]))
    with pytest.raises(DraftError, match="chosen, not drawn: use sample-and-match"):
        recursive_rejection(draft, ROOT, P[0], lambda *_: 0.5)


def test_equal_distributions_accept_the_first_child() -> None:
    for _ in range(50):
        draft = Draft.chain(without_replacement(P[0], 1), drawn=[P[0]])
        child, token = recursive_rejection(draft, ROOT, P[0], lambda *_: float(torch.rand((), generator=generator)))
        assert child == 0 and token == draft.tokens[0]


def test_follow_goes_where_the_target_goes() -> None:
    draft = Draft(tokens=[3, 4, 4, 9], tree=Tree([-1, -1, 1, 1]))
    own = {ROOT: 4, 1: 9, 3: 7, 0: 1, 2: 1}
    visited: list[int] = []

    def after(node: int) -> int:
        visited.append(node)
        return own[node]

    verdict = follow(draft, after)
    assert verdict.accepted == (1, 3) and verdict.token == 7
    assert visited == [ROOT, 1, 3]  # no node that was not reached is looked at
    assert follow(Draft(), lambda node: 5).token == 5


def test_typical_accepts_what_is_plausible() -> None:
    """Threshold min(epsilon, delta exp(-entropy)): low where the target is unsure."""
    p = torch.tensor([0.5, 0.3, 0.1, 0.1])
    draft = Draft(tokens=[2, 1], tree=Tree([-1, -1]))
    entropy = float(-(p * p.log()).sum())
    border = 0.1 / torch.tensor(-entropy).exp().item()
    assert typical(draft, ROOT, p, 0.3, 0.9 * border) == 0
    assert typical(draft, ROOT, p, 0.3, 1.1 * border) == 1
    assert typical(draft, ROOT, p, 0.05, 9.0) == 0
    assert typical(draft, ROOT, p, 0.4, 9.0) is None
    assert typical(draft, 0, p, 0.0, 0.0) is None


def test_templates_are_filled_level_by_level() -> None:
    template = PathTemplate([(0, 1), (1,), (0, 0, 0)])  # beginnings are added
    assert len(template) == 5 and template.tree.depths == (1, 1, 2, 2, 3)
    ranked = {7: [10, 11], 10: [20, 21], 20: [30], 11: []}
    draft = template.fill(7, lambda token: ranked.get(token, []), "table")
    words = {tuple(draft.tokens[n] for n in draft.tree.path(node)) for node in range(len(draft))}
    assert words == {(10,), (11,), (10, 20), (10, 21), (10, 20, 30)}
    cold = template.fill(11, lambda token: ranked.get(token, []))
    assert len(cold) == 0
    assert template.within(2).tree.depths == (1, 1, 2, 2)
    partly = template.fill(7, lambda token: {7: [10], 10: [20, 21]}.get(token, []))
    assert list(partly.tokens) == [10, 20, 21] and partly.tree.parents == (-1, 0, 0)


def test_grown_templates_hold_the_most_promising_paths() -> None:
    template = PathTemplate.grown((0.5, 0.2, 0.1), 5, 3)
    paths = {tuple(template.ranks[n] for n in template.tree.path(node)) for node in range(len(template))}
    assert paths == {(0,), (1,), (0, 0), (0, 0, 0), (2,)} or paths == {(0,), (1,), (0, 0), (0, 0, 0), (0, 1)}
    official = PathTemplate.grown((0.52, 0.16, 0.09, 0.06, 0.04, 0.03, 0.025, 0.02), 80, 6)
    assert len(official) == 80 and official.tree.depth == 6


@pytest.mark.parametrize("paths", [[(0,), (0,)], [()]])
def test_impossible_templates_are_refused(paths: list[tuple[int, ...]]) -> None:
    with pytest.raises(DraftError, match="different and not empty"):
        PathTemplate(paths)
