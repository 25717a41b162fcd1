"""A model at the cost of a larger one writes what it wrote before."""

import importlib.util
from pathlib import Path

import pytest
import tiny
import torch

import baton
from baton.models.loading import LanguageModel
from baton.runtime import prepare
from baton.types import RuntimeName

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "enlarge.py"


@pytest.mark.parametrize("runtime", ["native", "eager"])
def test_a_widened_model_writes_the_same(runtime: RuntimeName) -> None:
    spec = importlib.util.spec_from_file_location("enlarge", SCRIPT)
    assert spec is not None and spec.loader is not None
    enlarge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(enlarge)
    model = tiny.llama(head_dim=16, hidden_size=64, intermediate_size=96)
    prepare(model, runtime)
    tokenizer, prompts = tiny.tokenizer(append_eos=False), ["The cat.", "A house and a dog"]
    before = baton.generate(LanguageModel(model, tokenizer), prompts, max_new_tokens=20)
    wide = tiny.llama(head_dim=16, hidden_size=64, intermediate_size=96)
    small = sum(weight.numel() for weight in wide.parameters())
    with torch.no_grad():
        width = enlarge.widen(wide, 10 * small)
    assert width % 32 == 0 and sum(weight.numel() for weight in wide.parameters()) == pytest.approx(
        10 * small, rel=0.05
    )
    prepare(wide, runtime)
    after = baton.generate(LanguageModel(wide, tokenizer), prompts, max_new_tokens=20)
    assert [o.token_ids for o in after] == [o.token_ids for o in before]
