"""What a hand-off costs, counted in multiplications and references instead of seconds, so that it is exact."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from handoffs import CASES, PROMPTS, Case, handoff, prompt_batch
from torch.utils.flop_counter import FlopCounterMode

from baton.engine import generate
from baton.handoff.model import HandoffModel
from baton.models.adapter import target_for
from baton.models.loading import LanguageModel
from baton.models.writer import PromptInputs

PROMPT = PROMPTS[:1]


def flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        work()
    return int(counter.get_total_flops())


def writing(model: Any, tokens: int) -> int:
    """Operations of a response of exactly so many tokens."""

    def work() -> None:
        assert [len(o.token_ids) for o in generate(model, PROMPT, max_new_tokens=tokens)] == [tokens]

    return flops(work)


def alone(model: HandoffModel) -> LanguageModel:
    return LanguageModel(model.slm, model.response_tokenizer)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[4], CASES[5]], ids=str)
def test_22_the_total_is_the_sum_of_its_parts(case: Case) -> None:
    """T_ours = t_enc + t_proj + t_pre + n s and T_slm = t_pre + n s, with the very same t_pre and s."""
    model = handoff(case)
    ids, mask = prompt_batch(model, PROMPT)
    states = model.read(ids, mask)
    encode, project = flops(lambda: model.read(ids, mask)), flops(lambda: model.inject(ids, mask, states))
    with torch.inference_mode():
        embeds, _ = model.inject(ids, mask, states)
    target = target_for(model.slm)
    prefill = flops(lambda: target.prefill(PromptInputs(embeds=embeds, mask=mask)))
    assert min(encode, project, prefill) > 0
    assert writing(model, 1) == encode + project + prefill
    assert writing(alone(model), 1) == prefill
    for n in (2, 9):
        steps = writing(alone(model), n) - prefill
        assert writing(model, n) == encode + project + prefill + steps


@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
def test_22_the_overhead_over_the_slm_falls_as_the_response_grows(case: Case) -> None:
    """It is paid once: after the first token each costs what it costs the SLM alone."""
    model = handoff(case)
    ours, slm = ([writing(m, n) for n in (1, 2, 9)] for m in (model, alone(model)))
    assert len({a - b for a, b in zip(ours, slm, strict=True)}) == 1
    overhead = [a / b - 1 for a, b in zip(ours, slm, strict=True)]
    assert overhead == sorted(overhead, reverse=True)
    assert overhead[-1] < overhead[0] / 2


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_23_a_released_llm_is_gone_while_the_slm_writes(case: Case) -> None:
    """Nothing else holds it: after the first token its weights are freed; what is left is the SLM and small maps."""
    model = handoff(case)
    expected = [o.token_ids for o in generate(model, PROMPT, max_new_tokens=5)]
    llm = weakref.ref(model.encoder.model)
    weights = [weakref.ref(weight) for weight in model.encoder.model.parameters()]
    alive: list[bool] = []

    def release(*_: Any) -> None:
        model.release_encoder()
        gc.collect()
        alive.append(llm() is not None or any(weight() is not None for weight in weights))

    assert [o.token_ids for o in generate(model, PROMPT, max_new_tokens=5, on_token=release)] == expected
    assert alive == [False] * 5
    small = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.slm.parameters())
    width, d_llm = 24, 32
    maps = (d_llm + 1) * width + (width + 1) * width + width  # projector; the constant
    assert small == maps + (0 if case == CASES[0] else d_llm * width)
