"""Prompts become ids in one place, and bad ones are refused before any work; models load from folders."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModel, BertConfig

from baton.errors import BatonError, ModelMismatch, PromptError, UnsupportedModel
from baton.models.loading import LanguageModel, load, read_config, resolve_dtype
from baton.models.prompts import pad_right, prompt_limit, tokenize_prompts
from baton.models.writer import PromptInputs, Writer
from baton.types import Timings

LONG = "the cat and the dog " * 20


def test_prompts_are_what_the_tokenizer_says() -> None:
    for append_eos in (True, False):
        tokenizer = tiny.tokenizer(append_eos=append_eos)
        ids = tokenize_prompts(tokenizer, tiny.PROMPTS, {"model": 100})
        assert ids == tokenizer(tiny.PROMPTS)["input_ids"]
        assert all((row[-1] == tiny.EOS) == append_eos for row in ids)
    assert tokenize_prompts(tokenizer, [], {}) == []


@pytest.mark.parametrize("empty", ["", "   ", "\n"])
def test_an_empty_prompt_is_refused(empty: str) -> None:
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        tokenize_prompts(tiny.tokenizer(), ["The cat.", empty], {})


def test_a_long_prompt_is_refused_with_all_limits_named() -> None:
    with pytest.raises(PromptError) as caught:
        tokenize_prompts(tiny.tokenizer(), ["The cat.", LONG], {"LLM big": 60, "SLM small": 50})
    length = len(tiny.tokenizer()(LONG)["input_ids"])
    for part in (
        f"prompt 1 has {length} tokens",
        "LLM big reads at most 60",
        "SLM small reads at most 50",
        "--truncate",
    ):
        assert part in str(caught.value)


def test_truncation_cuts_to_the_smallest_limit_and_keeps_the_end_token() -> None:
    tokenizer = tiny.tokenizer()
    whole = tokenizer(LONG)["input_ids"]
    (cut,) = tokenize_prompts(tokenizer, [LONG], {"a": 60, "b": 50}, truncate=True)
    assert cut == [*whole[:49], tiny.EOS]
    short = tokenize_prompts(tokenizer, ["The cat."], {"a": 60, "b": 50}, truncate=True)
    assert short == tokenizer(["The cat."])["input_ids"]
    plain = tiny.tokenizer(append_eos=False)
    assert tokenize_prompts(plain, [LONG], {"a": 50}, truncate=True) == [plain(LONG)["input_ids"][:50]]


def test_the_exact_limit_fits() -> None:
    tokenizer = tiny.tokenizer()
    length = len(tokenizer("The cat.")["input_ids"])
    assert len(tokenize_prompts(tokenizer, ["The cat."], {"a": length})[0]) == length
    with pytest.raises(PromptError):
        tokenize_prompts(tokenizer, ["The cat."], {"a": length - 1})


def test_limits_come_from_positions_and_tokenizer() -> None:
    assert prompt_limit(tiny.llama().config, None) == 128
    assert prompt_limit(tiny.gpt2().config, tiny.tokenizer()) == 128
    assert prompt_limit(tiny.t5().config, tiny.tokenizer()) == 512  # relative positions: the tokenizer decides
    assert prompt_limit(tiny.t5().config, None) is None


def test_padding() -> None:
    ids, mask = pad_right([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


def test_prompt_inputs_are_ids_or_embeddings() -> None:
    mask = torch.ones(1, 1, dtype=torch.long)
    for arguments in ({}, {"ids": mask, "embeds": torch.ones(1, 1, 2)}):
        with pytest.raises(ValueError, match="one of ids, embeds and states"):
            PromptInputs(mask=mask, **arguments)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_load_gives_back_what_was_saved(family: str, tmp_path: Path) -> None:
    model: Any = tiny.FAMILIES[family]()
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    writer = load(tmp_path)
    assert isinstance(writer, LanguageModel) and isinstance(writer, Writer)
    assert type(writer.lm) is type(model) and not writer.lm.training and writer.lm.dtype == torch.float32
    for name, weight in model.state_dict().items():
        assert torch.equal(writer.lm.state_dict()[name], weight), name
    assert writer.prompt_tokenizer("The cat.") == tiny.tokenizer()("The cat.")
    assert writer.prompt_limits == {str(tmp_path): 512 if family == "t5" else 128}
    assert load(tmp_path, dtype="bfloat16", device="cpu").lm.dtype == torch.bfloat16
    ids, mask = pad_right([[5, 6]])
    inputs = writer.encode(ids, mask, Timings())
    assert inputs.ids is ids and inputs.mask is mask and inputs.embeds is None


def test_a_hub_id_may_name_a_revision(tmp_path: Path) -> None:
    """Two revisions in a cache of the Hub, read without a network by a process of its own."""
    repo = tmp_path / "hub" / "models--owner--tiny"
    (repo / "refs").mkdir(parents=True)
    for revision, seed in (("main", 1), ("v2", 2)):
        commit = hashlib.sha1(revision.encode()).hexdigest()
        (repo / "refs" / revision).write_text(commit)
        model, tokenizer = tiny.FAMILIES["llama"](seed), tiny.tokenizer()
        for part in (model, tokenizer):
            part.save_pretrained(repo / "snapshots" / commit)
    code = (
        "import baton; from baton.models.loading import read_config\n"
        "for name in ('owner/tiny', 'owner/tiny@v2'):\n"
        "    lm = baton.load(name, runtime='eager').lm\n"
        "    print(float(lm.lm_head.weight.detach().sum()), read_config(name)['model_type'])\n"
        "baton.load('owner/tiny@v3')"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    expected = [f"{float(tiny.FAMILIES['llama'](seed).lm_head.weight.detach().sum())} llama" for seed in (1, 2)]
    assert done.stdout.splitlines() == expected, done.stderr
    assert "no model at 'owner/tiny'" in done.stderr and done.returncode


def test_missing_and_unsuitable_models_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelMismatch, match=r"no model at 'nowhere/at-all', as a folder or on the Hub"):
        load("nowhere/at-all")
    for path in (tmp_path / "nowhere", f"{tmp_path}/nowhere", "./nowhere", "models/no/where"):
        with pytest.raises(ModelMismatch, match="there is no such folder"):
            load(path)
    with pytest.raises(ModelMismatch, match=r"has no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(BatonError, match=r"cannot load .*no-such-type"):
        load(tmp_path)
    assert read_config(tmp_path) == {"model_type": "no-such-type"}
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ModelMismatch, match="no model at"):
        read_config(tmp_path)


def test_a_model_that_does_not_write_is_refused(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="type 'bert', which does not write text"):
        load(tmp_path)


def test_dtypes() -> None:
    assert resolve_dtype("auto") == "auto"
    assert (
        resolve_dtype("bfloat16") == resolve_dtype("torch.bfloat16") == resolve_dtype(torch.bfloat16) == torch.bfloat16
    )
    for wrong in ("bf17", "int8", "Tensor"):
        with pytest.raises(BatonError, match=f"dtype='{wrong}' is not known"):
            resolve_dtype(wrong)
