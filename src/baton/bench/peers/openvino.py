"""OpenVINO GenAI on the same weights, in float16, from GGUF: greedy and its prompt lookup, one prompt at a time."""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
import torch

from baton.bench.peers.llama_cpp import FAMILIES, NUM_DRAFT_TOKENS, write_gguf
from baton.bench.peers.table import Absent
from baton.models.loading import LanguageModel
from baton.models.prompts import tokenize_prompts
from baton.models.writer import Writer
from baton.types import FinishReason, Output


def contenders(writer: Writer, max_new_tokens: int, assistant: str | None) -> list["OpenVinoPeer"]:
    family = writer.lm.config.model_type
    if not isinstance(writer, LanguageModel) or family not in FAMILIES:
        raise Absent(f"openvino is left out: here it runs {', '.join(FAMILIES)}, and this is {family}")
    backend: Any = getattr(writer.tokenizer, "backend_tokenizer", None)
    if backend is None or '"merges"' not in backend.to_str():
        raise Absent("openvino is left out: it reads vocabularies of byte pairs only")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(copy.deepcopy(writer.lm).half(), path, writer.tokenizer)  # it knows no bfloat16 there
        return [OpenVinoPeer(writer, path, lookup, max_new_tokens) for lookup in (False, True)]


class OpenVinoPeer:
    """`LLMPipeline.generate`, on as many threads as PyTorch has."""

    family, batches = "peer", False

    def __init__(self, writer: LanguageModel, path: Path, lookup: bool, max_new_tokens: int) -> None:
        self.writer, self.name = writer, f"openvino {'prompt lookup' if lookup else 'greedy'}"
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        if writer.lm.dtype == torch.float32:
            options["INFERENCE_PRECISION_HINT"] = "f32"  # or it computes in bfloat16 where the processor can
        if lookup:
            options["prompt_lookup"] = True
        self.pipeline = openvino_genai.LLMPipeline(str(path), "CPU", **options)
        self.config = openvino_genai.GenerationConfig()
        self.config.max_new_tokens, self.config.do_sample = max_new_tokens, False
        self.config.eos_token_id = writer.tokenizer.eos_token_id
        if lookup:
            self.config.num_assistant_tokens, self.config.max_ngram_size = NUM_DRAFT_TOKENS, 2

    def write(self, prompts: Sequence[str], first_index: int) -> list[Output]:
        tokenizer = self.writer.tokenizer
        outputs = []
        rows = tokenize_prompts(tokenizer, prompts, self.writer.prompt_limits, truncate=True)
        for prompt, row in zip(prompts, rows, strict=True):
            made = self.pipeline.generate(openvino.Tensor(np.array([row], dtype=np.int64)), self.config)
            ids = list(made.tokens[0])
            reason: FinishReason = "eos" if ids[-1:] == [tokenizer.eos_token_id] else "length"
            if reason == "length" and len(ids) < self.config.max_new_tokens:  # it leaves the end token out
                ids, reason = [*ids, tokenizer.eos_token_id], "eos"
            text = tokenizer.decode(ids, skip_special_tokens=True)
            outputs.append(Output(prompt=prompt, text=text, token_ids=ids, finish_reason=reason))
        return outputs
