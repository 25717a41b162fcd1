"""Filters mean what transformers' mean; draws depend on their key and on nothing else."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from baton.errors import BatonError
from baton.sampling import distribution, draw, uniform
from baton.types import Sampling

CONTEXT = torch.tensor([[3, 5, 5, 9], [0, 1, 2, 3]])


def some_logits(rows: int = 2, vocabulary: int = 50) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 3


def seen_in(context: Tensor, vocabulary: int = 50) -> Tensor:
    return torch.zeros(len(context), vocabulary, dtype=torch.bool).scatter_(1, context, True)


def reference(logits: Tensor, s: Sampling) -> Tensor:
    """transformers' own processors, in the order that its `generate` applies them."""
    chain = []
    if s.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    chain.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        chain.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        chain.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        chain.append(MinPLogitsWarper(s.min_p))
    for processor in chain:
        logits = processor(CONTEXT, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p", "penalty"),
    [
        *((t, k, p, m, r) for t, k, p, m, r in product((0.7, 1.0), (0, 7), (0.8, 1.0), (0.0, 0.1), (1.0, 1.3))),
        (2.5, 1, 1.0, 0.0, 1.0),
        (1.0, 1000, 0.01, 0.9, 0.5),
    ],
)
def test_filters_equal_those_of_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    logits = some_logits()
    actual = distribution(logits, sampling, seen_in(CONTEXT))
    expected = reference(logits, sampling)
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual.sum(-1), torch.ones(2))


def test_filters_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for options, expected in (
        ({}, [0.5, 0.25, 0.125, 0.125]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 3}, [0.5, 0.25, 0.125, 0.125]),  # the third and fourth are equal: both stay
        ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.1}, [1, 0, 0, 0]),  # the best stays
        ({"min_p": 0.4}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 0.5}, [8 / 11, 2 / 11, 1 / 22, 1 / 22]),
    ):
        sampling = Sampling(**{"temperature": 1.0, **options})
        torch.testing.assert_close(distribution(logits, sampling), torch.tensor([expected], dtype=torch.float32))


def test_repetition_penalty_lowers_seen_tokens_of_either_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    actual = distribution(logits, Sampling(temperature=1.0, repetition_penalty=2.0), seen)
    torch.testing.assert_close(actual, torch.tensor([[1.0, -4.0, 2.0, -2.0]]).softmax(-1))
    assert distribution(logits, Sampling(repetition_penalty=2.0), seen).argmax(-1).tolist() == [2]


def test_bias_is_added_to_the_logits() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0], [0.0, 0.0, 0.0]])
    actual = distribution(logits, Sampling(temperature=0.5, logit_bias=((1, 3.0), (2, -1.0))))
    expected = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, -1.0]])
    torch.testing.assert_close(actual, (expected / 0.5).softmax(-1))
    assert torch.equal(logits, torch.tensor([[2.0, -2.0, 1.0], [0.0, 0.0, 0.0]]))


def test_greedy_is_the_argmax_and_touches_no_randomness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.sampling.uniform", None)
    logits = some_logits()
    one_hot = distribution(logits, Sampling())
    assert torch.equal(one_hot.argmax(-1), logits.argmax(-1)) and one_hot.sum() == 2


def test_half_precision_is_filtered_in_float32() -> None:
    logits = some_logits().bfloat16()
    sampling = Sampling(temperature=0.7, top_p=0.9)
    assert distribution(logits, sampling).dtype == torch.float32
    assert torch.equal(distribution(logits, sampling), distribution(logits.float(), sampling))


def test_banned_tokens_stay_out() -> None:
    logits = some_logits()
    logits[:, :40] = -torch.inf
    for options in ({}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.01}):
        assert not distribution(logits, Sampling(temperature=1.5, **options))[:, :40].any()


def test_uniform_numbers_are_fixed_for_ever() -> None:
    """A seed written down today gives the same text tomorrow, on any machine."""
    assert uniform(0, 0, "token", 0) == 0.7949641464303792
    assert uniform(1, 0, "token", 0) == 0.5175481970984739
    keys = list(product((0, 1), (0, 1), ("token", "draft"), range(1000)))
    numbers = [uniform(*key) for key in keys]
    assert len(set(numbers)) == len(keys)
    assert min(numbers) >= 0 and max(numbers) < 1
    assert math.isclose(sum(numbers) / len(numbers), 0.5, abs_tol=0.02)


def test_draw_inverts_the_cumulative_distribution() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for number, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2.0**-52, 4)):
        assert draw(probs, [number]).tolist() == [token]
    assert draw(probs.expand(3, -1), [0.1, 0.5, 0.9]).tolist() == [1, 3, 4]


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 keyed draws; 23.2 is the 99 % point at 10 degrees of freedom."""
    probs = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05, 0.04, 0.01])
    count = 20_000
    tokens = draw(probs.expand(count, -1), [uniform(7, 0, "token", position) for position in range(count)])
    observed = torch.bincount(tokens, minlength=len(probs))
    assert float(((observed - count * probs) ** 2 / (count * probs)).sum()) < 23.2


def test_rare_tokens_of_a_large_vocabulary_can_be_drawn() -> None:
    """In a float32 sum, half of this vocabulary would have probability zero."""
    probs = torch.full((1, 2**20), 2.0**-26)
    probs[0, 0] = 1 - 2.0**-6
    assert draw(probs, [1 - 2.0**-52]).tolist() == [2**20 - 1]
    assert draw(probs, [1 - 2.0**-7]).tolist()[0] == 2**19


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 1}, {"repetition_penalty": 0}],
)
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(BatonError, match=f"{next(iter(options))}=.*it must be"):
        Sampling(**options)  # type: ignore[arg-type]
