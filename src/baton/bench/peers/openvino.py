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
from transformers import PreTrainedModel

from baton.bench.peers.llama_cpp import FAMILIES, NUM_DRAFT_TOKENS, write_gguf
from baton.bench.peers.table import Absent
from baton.bench.peers.vocabulary import made_up
from baton.machine import seconds_of
from baton.models.loading import LanguageModel
from baton.models.prompts import tokenize_prompts
from baton.models.writer import Writer
from baton.types import FinishReason, Output

AT_ONCE = 256  # tokens of a context, read for passes: logits of all of them take memory


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
        options = _options(writer.lm)
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


def _options(model: PreTrainedModel) -> dict[str, Any]:
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if model.dtype == torch.float32:
        options["INFERENCE_PRECISION_HINT"] = "f32"  # or it computes in bfloat16 where the processor can
    return options


class Passes:
    """Single passes, for `baton bench forward`: the model that GenAI makes of the weights, called without GenAI.

    Keys and values are its own state, in the number type that it chooses (float16, by default).
    """

    name = "openvino"
    lacks = "openvino is not timed at reading the context: the model it makes gives logits for all of it, not one token"

    def __init__(self, model: PreTrainedModel, context: int, *, bits: int = 0) -> None:
        if model.config.model_type not in FAMILIES:
            raise Absent(f"openvino is left out: here it runs {', '.join(FAMILIES)}")
        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": False})  # the file is gone when the passes begin
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(copy.deepcopy(model).half(), path, made_up(model.config.vocab_size))
            openvino_genai.LLMPipeline(str(path), "CPU", enable_save_ov_model=True)
            made = core.read_model(Path(folder) / "openvino_model.xml")
        hints = {"PERFORMANCE_HINT": "LATENCY", **_options(model)}
        self.request = core.compile_model(made, "CPU", hints).create_infer_request()

    def begin(self, ids: list[int]) -> None:
        self.request.reset_state()
        for start in range(0, len(ids), AT_ONCE):
            self._pass(ids[start : start + AT_ONCE], start)
        self.length = len(ids)
        self.before = [openvino.Tensor(np.array(state.state.data)) for state in self.request.query_state()]

    def look(self, ids: list[int]) -> float:
        taken = seconds_of(lambda: self._pass(ids, self.length))
        for state, before in zip(self.request.query_state(), self.before, strict=True):
            state.state = before
        return taken

    def _pass(self, ids: list[int], start: int) -> Any:
        """Logits, float32 [1, n, V]."""
        end = start + len(ids)
        given = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, end), dtype=np.int64),
            "position_ids": np.arange(start, end)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        return self.request.infer(given, share_inputs=True, share_outputs=True)[0]
