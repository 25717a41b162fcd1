"""Tiny hand-offs for tests: every kind of LLM with every kind of SLM, saved where `from_pretrained` finds them."""

import atexit
import copy
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, T5ForConditionalGeneration

from baton.handoff.config import HandoffOptions
from baton.handoff.model import HandoffModel
from baton.models.prompts import pad_right
from baton.train.options import TrainOptions
from baton.train.tokenizers import train_bpe
from baton.types import Pair

PROMPTS = [*tiny.PROMPTS[:4], "the large model has read"]  # 3 to 38 tokens; twice the longest still fits
RESPONSES = ["Die Katze saß.", "Ein Hund und eine Katze lasen.", "the cat", "Text: ÄÖ", "das große Modell schreibt"]
PAIRS = [Pair(prompt=p, response=r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
MANY = [Pair(prompt=f"{p} {i}", response=f"{r} {i}") for i in range(4) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
OPTIONS = TrainOptions(
    max_steps=8,
    batch_size=4,
    eval_every=2,
    save_every=2,
    patience=0,
    precision="fp32",
    max_quality_examples=0,
    learning_rate=3e-3,
)
OTHER_VOCAB = 290
SMALL = 24  # width of the SLMs: not the LLMs', so that a mix-up of the two shows


@cache
def other_tokenizer(*, append_eos: bool = False) -> PreTrainedTokenizerFast:
    """Shares no segmentation with `tiny.tokenizer`: other merges, another size."""
    made = train_bpe(
        ["Abracadabra! Wer liest, der schreibt; wer schreibt, der liest."], OTHER_VOCAB, append_eos=append_eos
    )
    assert len(made) == OTHER_VOCAB
    return made


def bert(seed: int = 0, **changes: Any) -> BertForMaskedLM:
    config = BertConfig(
        **{
            "vocab_size": tiny.VOCAB,
            "hidden_size": tiny.WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": tiny.HEADS,
            "intermediate_size": 48,
            "max_position_embeddings": 128,
            "pad_token_id": tiny.PAD,
        }
        | changes
    )
    return tiny.randomized(BertForMaskedLM(config), seed)


def calm_t5(seed: int = 0, **changes: Any) -> T5ForConditionalGeneration:
    """As its family is initialised to train well, and no dropout: rounding stays rounding over a few steps."""
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(tiny.t5(0, dropout_rate=0.0, **changes).config).eval()


# name -> (maker, seed, changes, tokenizer). Prompts of an SLM that shares its LLM's tokenizer end as the LLM's do.
MODELS: dict[str, Any] = {
    "t5": (tiny.t5, 1, {}, tiny.tokenizer()),
    "bart": (tiny.bart, 2, {}, tiny.tokenizer()),
    "bert": (bert, 3, {}, tiny.tokenizer()),
    "llama": (tiny.llama, 4, {"num_hidden_layers": 4}, tiny.tokenizer(append_eos=False)),
    "gpt2": (tiny.gpt2, 5, {"n_layer": 4}, tiny.tokenizer(append_eos=False)),
    "t5-slm": (tiny.t5, 6, {"d_model": SMALL, "num_layers": 2}, tiny.tokenizer()),
    "bart-slm": (tiny.bart, 7, {"d_model": SMALL}, tiny.tokenizer()),
    "gpt2-slm": (tiny.gpt2, 8, {"n_embd": SMALL}, tiny.tokenizer()),
    "llama-slm": (tiny.llama, 9, {"hidden_size": SMALL, "head_dim": 8}, tiny.tokenizer(append_eos=False)),
    "t5-calm": (calm_t5, 13, {"d_model": SMALL, "num_layers": 2}, tiny.tokenizer()),
    "t5-other": (tiny.t5, 10, {"d_model": SMALL, "vocab_size": OTHER_VOCAB}, other_tokenizer(append_eos=True)),
    "gpt2-other": (tiny.gpt2, 11, {"n_embd": SMALL, "vocab_size": OTHER_VOCAB}, other_tokenizer()),
    "llama-other": (
        tiny.llama,
        12,
        {"hidden_size": SMALL, "head_dim": 8, "vocab_size": OTHER_VOCAB},
        other_tokenizer(),
    ),
}


@dataclass(frozen=True)
class Case:
    """One pair of models, read at a layer."""

    llm: str
    slm: str
    layer: str = "last"

    def __str__(self) -> str:
        return f"{self.llm}@{self.layer}>{self.slm}"


# LLM: encoder-decoder, decoder-only (index, fraction, mix), encoder-only. SLM: both kinds. Tokenizers: same and other.
CASES = [
    Case("t5", "t5-slm"),
    Case("t5", "gpt2-slm"),
    Case("t5", "gpt2-other"),
    Case("bart", "t5-other"),
    Case("bart", "bart-slm"),
    Case("llama", "llama-slm", "2"),
    Case("gpt2", "t5-slm", "0.5"),
    Case("gpt2", "llama-slm", "mix"),
    Case("bert", "bart-slm"),
    Case("bert", "llama-other"),
]
SAME = [case for case in CASES if MODELS[case.llm][3] is MODELS[case.slm][3]]
OTHER = [case for case in CASES if MODELS[case.llm][3] is not MODELS[case.slm][3]]
FUSIONS = ["add", "replace", "concatenate"]


@cache
def folder(name: str) -> Path:
    """A folder holding one of `MODELS` with its tokenizer, kept for the session. Do not write into it."""
    make, seed, changes, tokenizer = MODELS[name]
    path = _root() / name
    make(seed, **changes).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@cache
def _root() -> Path:
    path = Path(tempfile.mkdtemp(prefix="baton-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def untrained(case: Case = CASES[0], **options: Any) -> HandoffModel:
    """A hand-off as `build` makes it: the projector's last map at zero."""
    torch.manual_seed(0)
    chosen = HandoffOptions(layer=case.layer, **options)
    return HandoffModel.build(llm=folder(case.llm), slm=folder(case.slm), options=chosen, dtype="float32").eval()


def handoff(case: Case = CASES[0], **options: Any) -> HandoffModel:
    """One whose every new weight counts. Yours to change: each call gives a copy."""
    return copy.deepcopy(_handoff(case, tuple(sorted(options.items()))))


@cache
def _handoff(case: Case, options: tuple[tuple[str, Any], ...]) -> HandoffModel:
    model = untrained(case, **dict(options))
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.startswith("slm.") or "lora_" in name:
                # Loud enough beside embeddings of size 0.1 to change every token.
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5 * weight.shape[-1] ** -0.5)
    return model


def prompt_rows(model: HandoffModel, prompts: list[str] = PROMPTS) -> list[list[int]]:
    rows: list[list[int]] = model.prompt_tokenizer(prompts)["input_ids"]
    return rows


def prompt_batch(model: HandoffModel, prompts: list[str] = PROMPTS) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask of ragged prompts."""
    return pad_right(prompt_rows(model, prompts))


def label_batch(model: HandoffModel, responses: list[str] = RESPONSES) -> Tensor:
    """Right-padded response ids, end token included, -100 on padding."""
    end = model.response_tokenizer.eos_token_id
    rows = model.response_tokenizer(responses)["input_ids"]
    return pad_right([[*row, end] if row[-1] != end else row for row in rows], -100)[0]


@contextmanager
def calls(module: nn.Module) -> Iterator[list[Any]]:
    """Every call of a module inside the block: its first tensor argument."""
    seen: list[Any] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)]
        seen.append(tensors[0].detach().clone())

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
