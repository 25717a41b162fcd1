"""The best tokens of rows of logits are those that PyTorch finds."""

import subprocess

import pytest
import torch

from baton.best import best, top
from baton.runtime.native import kernels


@pytest.fixture(autouse=True)
def _loaded() -> None:
    try:
        kernels()
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"the C kernels cannot be compiled here: {error}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 5, 16), (2, 1, 100), (4096,), (2, 33, 1001)], ids=str)
def test_the_best_are_those_of_pytorch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    values, tokens = best(logits)
    assert torch.equal(values, logits.amax(-1)) and torch.equal(tokens, logits.argmax(-1))
    for many in (1, 4, 8, 40, 5000):
        values, tokens = top(logits, many)
        expected = logits.topk(min(many, shape[-1]))
        assert torch.equal(values, expected.values)
        assert torch.equal(logits.gather(-1, tokens), values)  # equal ones in any order
        assert all(len(set(row)) == len(row) for row in tokens.reshape(-1, tokens.shape[-1]).tolist())


def test_of_equal_ones_the_earlier_and_what_is_no_number_is_seen() -> None:
    logits = torch.zeros(2, 40)
    logits[0, [3, 30]], logits[1, 17] = 1.0, torch.nan
    values, tokens = best(logits)
    assert tokens.tolist() == [3, 17] and values[0] == 1 and values[1].isnan()
    values, tokens = top(logits, 3)
    assert tokens.tolist() == [[3, 30, 0], [0, 1, 2]] and not values.isnan().any()
    values, tokens = top(torch.full((1, 50), -torch.inf), 4)
    assert tokens.tolist() == [[0, 1, 2, 3]] and values.isinf().all()


def test_nobody_waits_for_a_compiler_in_the_middle_of_a_text() -> None:
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(2))
    kernels.cache_clear()
    assert torch.equal(top(logits, 4)[0], logits.topk(4).values)
    assert kernels.cache_info().currsize == 0


def test_parts_of_larger_tensors_are_read_where_they_lie() -> None:
    whole = torch.randn(6, 4, 32, generator=torch.Generator().manual_seed(1))
    part = whole[::2, 1:3].transpose(0, 1)
    assert torch.equal(top(part, 5)[0], part.topk(5).values) and torch.equal(best(part)[1], part.argmax(-1))
