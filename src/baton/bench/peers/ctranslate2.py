"""CTranslate2: a C++ engine for encoder-decoder models, on the same weights, greedy."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import ctranslate2
import torch
from ctranslate2.converters import TransformersConverter

from baton.bench.peers.table import Absent
from baton.models.loading import LanguageModel
from baton.models.prompts import tokenize_prompts
from baton.models.writer import Writer
from baton.types import FinishReason, Output

FAMILIES = ("t5", "bart", "mbart", "marian", "pegasus")  # of ours, those that it converts
COMPUTE = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


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
        device = writer.lm.device.type
        compute = COMPUTE[writer.lm.dtype]
        if compute not in ctranslate2.get_supported_compute_types(device):
            compute = "float32"  # what it would do silently, and its name says
        self.name = f"ctranslate2 {compute}"
        with tempfile.TemporaryDirectory() as folder:
            source, made = Path(folder) / "model", Path(folder) / "converted"
            writer.model.save_pretrained(source)
            writer.tokenizer.save_pretrained(source)
            TransformersConverter(str(source)).convert(str(made), quantization=compute)
            threads = torch.get_num_threads()
            self.translator = ctranslate2.Translator(
                str(made), device=device, compute_type=compute, intra_threads=threads, inter_threads=1
            )
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
