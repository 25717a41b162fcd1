"""One view of every language model: teacher-forced logits are those of the model's own forward, row by row."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from baton.models.prompts import pad_right
from baton.models.text import IGNORE, TextToText, embed_tokens, join_rows, pack, response_logits, shift_right

PROMPTS = [[5, 6, 7, 1], [9, 10, 11, 12, 13, 14, 15, 1], [40, 1]]
RESPONSES = [[20, 21, 22, 23, 24, 1], [30, 1], [50, 51, 52, 1]]


def own_logits(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """The model on ids, alone: what its users would compute. [n, V]"""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = torch.tensor([[model.config.decoder_start_token_id, *response[:-1]]])
            return model(input_ids=torch.tensor([prompt]), decoder_input_ids=start).logits[0]
        return model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_align_with_labels(family: str) -> None:
    """Position i predicts label i, for ragged prompts and responses in one batch."""
    model = tiny.FAMILIES[family]()
    ids, mask = pad_right(PROMPTS)
    labels, _ = pad_right(RESPONSES, IGNORE)
    with torch.no_grad():
        logits = TextToText(model)(ids, mask, labels).logits
    assert logits.shape == (*labels.shape, tiny.VOCAB)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        assert torch.allclose(logits[row, : len(response)], own_logits(model, prompt, response), atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_embeddings_are_scaled_as_the_model_scales_them(family: str) -> None:
    """A forward on them equals a forward on the ids: BART scales inside its table, Marian beside it."""
    model = tiny.FAMILIES[family](**({"scale_embedding": True} if family in ("bart", "marian") else {}))
    ids = torch.tensor([[5, 6, 7, 8]])
    extra = {"decoder_input_ids": torch.tensor([[1, 30]])} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        expected = model(input_ids=ids, **extra).logits
        assert torch.equal(model(inputs_embeds=embed_tokens(model, ids), **extra).logits, expected)


def test_shift_right() -> None:
    labels = torch.tensor([[5, 6, 1], [7, 1, IGNORE]])
    assert shift_right(labels, 9, 0).tolist() == [[9, 5, 6], [9, 7, 1]]
    assert shift_right(torch.tensor([[7, IGNORE, IGNORE]]), 9, 3).tolist() == [[9, 7, 3]]


def test_join_rows_leaves_no_gap() -> None:
    first = torch.tensor([[1, 2, 3], [4, 0, 0]])[..., None].float()
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    second = torch.tensor([[7, 8], [9, 10]])[..., None].float()
    joined = join_rows(first, mask, second)[..., 0].tolist()
    assert joined[0] == [1, 2, 3, 7, 8]
    assert joined[1][:3] == [4, 9, 10]


def test_a_batch_is_no_wider_than_its_longest_row() -> None:
    """A long prompt beside a long response needs as many positions as each row has, not the two lengths together."""
    model = tiny.gpt2(n_positions=12)
    prompts, responses = [list(range(5, 15)), [5, 6]], [[20, 1], [*list(range(20, 29)), 1]]
    ids, mask = pad_right(prompts)
    labels, _ = pad_right(responses, IGNORE)
    with torch.no_grad():
        logits = response_logits(model, embed_tokens(model, ids), mask, labels)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        assert torch.allclose(logits[row, : len(response)], own_logits(model, prompt, response), atol=5e-5, rtol=5e-5)


def test_pack_moves_rows_to_one_end_in_order() -> None:
    rows = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [0, 7, 0, 8]])
    mask = (rows > 0).long()
    right, right_mask = pack(rows, mask, to_left=False)
    assert right.tolist() == [[1, 2, 3, 4], [0, 0, 5, 6], [0, 0, 7, 8]]
    assert right_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
    wide = torch.stack([rows, -rows], dim=-1)
    assert pack(wide, mask, to_left=True)[0][..., 1].tolist() == [[-1, -2, -3, -4], [-5, -6, 0, 0], [-7, -8, 0, 0]]


def test_pack_moves_real_entries_to_one_end() -> None:
    """Wherever the padding was, the order stays; vectors move as ids do."""
    rows, mask = torch.tensor([[0, 5, 6, 0], [7, 0, 8, 9]]), torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]])
    left, left_mask = pack(rows, mask, to_left=True)
    assert left.tolist() == [[5, 6, 0, 0], [7, 8, 9, 0]]
    assert left_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    right, right_mask = pack(rows[..., None].expand(-1, -1, 2), mask, to_left=False)
    assert right[..., 1].tolist() == [[0, 0, 5, 6], [0, 7, 8, 9]]
    assert right_mask.tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
