"""Targets written by the LLM itself: responses to prompts, in a file that an interrupted run continues.

Training on them is sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947), as LLM-to-SLM does it.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache

from baton.data.formats import text_field
from baton.data.storage import append_jsonl, completed_lines
from baton.engine import generate
from baton.errors import DataError
from baton.models.prompts import pad_right, tokenize_prompts
from baton.models.text import pack
from baton.models.writer import Writer
from baton.types import Timings

CHUNK = 2048  # prompts between two writes to the file


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """What is in the file at the end."""

    prompts: int  # rows, one per prompt
    resumed: int  # rows that earlier runs wrote
    empty: int  # rows whose response is empty; `read_pairs` counts and skips them


def label(
    writer: Writer,
    prompts: Sequence[str],
    out_path: str | Path,
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    batch_size: int = 32,
    truncate: bool = False,
    chunk: int = CHUNK,
    on_progress: Callable[[int, int], None] | None = None,
) -> LabelReport:
    """Write a response to each prompt, as JSONL rows `prompt`, `response` in the order given.

    Rows are added chunk by chunk; run again with the same prompts to continue after an interruption. That the model
    and the options are still the same is the caller's to see to.

    Args:
        max_new_tokens: most tokens of a response.
        num_beams: 1 is greedy, by our engine; more is beam search, by transformers' `generate`.
        batch_size: prompts written to at the same time.
        truncate: cut prompts longer than the model allows, instead of refusing them.
        chunk: prompts between two writes; inside a chunk, prompts of similar length go together.
        on_progress: called with (prompts done, prompts) at the start and after each batch.
    Raises:
        DataError: the file has rows for other prompts.
        PromptError: a prompt is empty or too long; found before anything is written.
        StorageError: the disk is full; finished rows are kept.
    """
    path = Path(out_path)
    done, empty = _finished(path, prompts)
    resumed, total = done, len(prompts)
    lengths = [
        len(ids) for ids in tokenize_prompts(writer.prompt_tokenizer, prompts, writer.prompt_limits, truncate=truncate)
    ]
    with append_jsonl(path) as file:
        if on_progress:
            on_progress(done, total)
        while done < total:
            part = prompts[done : done + chunk]
            length = dict(zip(part, lengths[done:], strict=False))
            repeats = Counter(part)  # equal prompts get one response, written once
            distinct = sorted(repeats, key=length.__getitem__)
            responses: dict[str, str] = {}
            ahead = done  # finished, though not yet in the file
            for start in range(0, len(distinct), batch_size):
                batch = distinct[start : start + batch_size]
                texts = _write(writer, batch, max_new_tokens, num_beams, truncate)
                responses.update(zip(batch, texts, strict=True))
                ahead += sum(repeats[prompt] for prompt in batch)
                if on_progress:
                    on_progress(ahead, total)
            file.write(*({"prompt": prompt, "response": responses[prompt]} for prompt in part))
            empty += sum(not responses[prompt].strip() for prompt in part)
            done += len(part)
    return LabelReport(prompts=total, resumed=resumed, empty=empty)


def _finished(path: Path, prompts: Sequence[str]) -> tuple[int, int]:
    """Rows that earlier runs wrote for these prompts, and how many of them are empty."""
    rows = completed_lines(path)
    if len(rows) > len(prompts):
        raise DataError(f"{path}:{len(prompts) + 1}: more rows than the {len(prompts)} prompts: choose another file")
    empty = 0
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=False), start=1):
        where = f"{path}:{number}"
        if text_field(row, "prompt", where) != prompt:
            raise DataError(f"{where}: holds another prompt than number {number} of the input: choose another file")
        empty += not text_field(row, "response", where).strip()
    return len(rows), empty


def _write(writer: Writer, prompts: list[str], max_new_tokens: int, num_beams: int, truncate: bool) -> list[str]:
    if num_beams > 1:
        return beam_search(writer, prompts, max_new_tokens=max_new_tokens, num_beams=num_beams, truncate=truncate)
    outputs = generate(writer, prompts, max_new_tokens=max_new_tokens, batch_size=len(prompts), truncate=truncate)
    return [output.text for output in outputs]


@torch.inference_mode()
def beam_search(
    writer: Writer, prompts: Sequence[str], *, max_new_tokens: int, num_beams: int, truncate: bool = False
) -> list[str]:
    """The best response of each prompt by beam search, one batch, through transformers' `generate`.

    What the model's generation_config says about beam search (length penalty, repeated n-grams, ...) holds.
    """
    lm: Any = writer.lm
    rows = tokenize_prompts(writer.prompt_tokenizer, prompts, writer.prompt_limits, truncate=truncate)
    ids, mask = pad_right(rows, writer.prompt_tokenizer.pad_token_id or 0, lm.device)
    inputs = writer.encode(ids, mask, Timings())
    name, prompt = ("input_ids", inputs.ids) if inputs.ids is not None else ("inputs_embeds", inputs.embeds)
    assert prompt is not None
    mask = inputs.mask
    # As in our engine, a response ends where the model has no more positions.
    context = getattr(lm.config.get_text_config(decoder=True), "max_position_embeddings", None) or sys.maxsize
    if not lm.config.is_encoder_decoder:
        context -= mask.shape[1] - 1
        prompt, mask = pack(prompt, mask, to_left=False)  # the response goes on where the prompt ends
    extra: dict[str, Any] = {}
    if lm.config.is_encoder_decoder:
        # transformers sizes T5's cache by the layers of its encoder; this one grows with those of the decoder.
        extra["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
    written = lm.generate(
        **{name: prompt},
        **extra,
        attention_mask=mask,
        use_cache=True,
        num_beams=num_beams,
        do_sample=False,
        max_new_tokens=min(max_new_tokens, context),
        pad_token_id=_pad_id(writer),
    )
    if not lm.config.is_encoder_decoder and inputs.ids is not None:
        written = written[:, ids.shape[1] :]  # ids come back with the prompt, embeddings do not
    texts: list[str] = writer.response_tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts


def _pad_id(writer: Writer) -> int | None:
    """What finished responses of a batch are filled up with; decoding leaves it out."""
    known = (writer.lm.generation_config, writer.response_tokenizer)
    found = [getattr(source, name, None) for name in ("pad_token_id", "eos_token_id") for source in known]
    return next((each for each in found if isinstance(each, int)), None)
