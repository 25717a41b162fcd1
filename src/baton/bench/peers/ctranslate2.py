"""CTranslate2: a C++ engine for encoder-decoder models, on the same weights, greedy."""

import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import ctranslate2
import torch
from ctranslate2.converters import TransformersConverter
from transformers import PreTrainedModel

from baton.bench.peers.table import Absent
from baton.bench.peers.vocabulary import made_up
from baton.models.loading import LanguageModel
from baton.models.prompts import tokenize_prompts
from baton.models.writer import Writer
from baton.types import FinishReason, Output

FAMILIES = ("t5", "bart", "mbart", "marian", "pegasus")  # of ours, those that it converts
COMPUTE = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
STEPS = 16  # timed after a context


def contenders(writer: Writer, max_new_tokens: int, assistant: str | None) -> list["CTranslate2Peer"]:
    family = writer.lm.config.model_type
    if not isinstance(writer, LanguageModel) or family not in FAMILIES:
        raise Absent(f"ctranslate2 is left out: here it runs {', '.join(FAMILIES)}, and this is {family}")
    return [CTranslate2Peer(writer, max_new_tokens)]


class CTranslate2Peer:
    """`Translator.translate_batch`, on as many threads as PyTorch has."""

    family, batches = "peer", True

    def __init__(self, writer: LanguageModel, max_new_tokens: int) -> None:
        self.writer, self.max_new_tokens = writer, max_new_tokens
        self.name, self.translator = open_translator(writer.lm, writer.tokenizer)
        self.end = writer.tokenizer.eos_token

    def write(self, prompts: Sequence[str], first_index: int) -> list[Output]:
        tokenizer = self.writer.tokenizer
        rows = tokenize_prompts(tokenizer, prompts, self.writer.prompt_limits, truncate=True)
        results = self.translator.translate_batch(
            [tokenizer.convert_ids_to_tokens(row) for row in rows],
            beam_size=1,
            max_decoding_length=self.max_new_tokens,
            max_input_length=0,
            return_end_token=True,
        )
        outputs = []
        for prompt, result in zip(prompts, results, strict=True):
            pieces = result.hypotheses[0]
            reason: FinishReason = "eos" if pieces[-1:] == [self.end] else "length"
            ids = tokenizer.convert_tokens_to_ids(pieces)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            outputs.append(Output(prompt=prompt, text=text, token_ids=ids, finish_reason=reason))
        return outputs


def open_translator(model: PreTrainedModel, tokenizer: Any) -> tuple[str, Any]:
    """CTranslate2 with a copy of these weights, and its name, which says in which number type it computes."""
    device, compute = model.device.type, COMPUTE[model.dtype]
    if compute not in ctranslate2.get_supported_compute_types(device):
        compute = "float32"  # what it would do silently
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "model", Path(folder) / "converted"
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        TransformersConverter(str(source)).convert(str(made), quantization=compute)
        threads = torch.get_num_threads()
        translator = ctranslate2.Translator(
            str(made), device=device, compute_type=compute, intra_threads=threads, inter_threads=1
        )
    return f"ctranslate2 {compute}", translator


class Passes:
    """Single decode steps, for `baton bench forward`.

    It has no call for one pass: it writes on after a forced context, and tells when each token is there. So the steps
    are timed when the context is read, and `look` gives them one by one.
    """

    lacks = (
        "ctranslate2 is timed at one row only: it has no pass over several tokens of a response, and reads a forced "
        "context token by token"
    )

    def __init__(self, model: PreTrainedModel, context: int, *, bits: int = 0) -> None:
        if model.config.model_type not in FAMILIES:
            raise Absent(f"ctranslate2 is left out: here it runs {', '.join(FAMILIES)}")
        self.tokenizer = made_up(model.config.vocab_size)
        self.name, self.translator = open_translator(model, self.tokenizer)

    def begin(self, ids: list[int]) -> None:
        at: list[float] = []

        def written(result: Any) -> bool:
            at.append(time.perf_counter())
            return False  # go on

        pieces, length = self.tokenizer.convert_ids_to_tokens(ids), len(ids) + STEPS
        self.translator.translate_batch(
            [pieces],
            target_prefix=[pieces],
            beam_size=1,
            min_decoding_length=length,
            max_decoding_length=length,
            max_input_length=0,
            callback=written,
        )
        self.steps = cycle([after - before for before, after in pairwise(at[-STEPS - 1 :])])

    def look(self, ids: list[int]) -> float | None:
        return next(self.steps) if len(ids) == 1 else None
