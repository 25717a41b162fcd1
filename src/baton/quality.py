"""How good texts are: against references, and under the target."""

import difflib
import re
import statistics
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from baton.errors import BatonError
from baton.models.adapter import runtime_of, target_for
from baton.models.prompts import pad_right, tokenize_prompts
from baton.models.writer import Writer
from baton.runtime import prepare
from baton.types import Pair, Timings

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def text_quality(texts: Sequence[str], pairs: Sequence[Pair], *, rouge: bool = False) -> dict[str, float]:
    """Corpus BLEU and chrF against every accepted answer (sacreBLEU), and mean ROUGE-L in percent."""
    import sacrebleu

    most = max(len(p.accepted) for p in pairs)
    references: list[list[str | None]] = [
        [p.accepted[i] if i < len(p.accepted) else None for p in pairs] for i in range(most)
    ]
    scores = {
        "bleu": sacrebleu.corpus_bleu(list(texts), references).score,
        "chrf": sacrebleu.corpus_chrf(list(texts), references).score,
    }
    if rouge:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"])
        found = [scorer.score_multi(p.accepted, t)["rougeL"].fmeasure for p, t in zip(pairs, texts, strict=True)]
        scores["rouge_l"] = 100 * statistics.fmean(found)
    return scores


def exact_match(text: str, references: Sequence[str]) -> bool:
    """Whether a text is an accepted answer. Where an answer ends in `#### number` (GSM8K), the last number counts."""
    for reference in references:
        _, mark, wanted = reference.rpartition("####")
        if mark:
            found = NUMBER.findall(text)
            if found and _number(found[-1]) == _number(wanted.strip()):
                return True
        elif text.split() == reference.split():
            return True
    return False


def edit_similarity(text: str, references: Sequence[str]) -> float:
    """1 for an accepted answer, 0 for nothing in common: matching characters over all, of the nearest (difflib)."""
    return max(difflib.SequenceMatcher(None, text, reference, autojunk=False).ratio() for reference in references)


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return float("nan")


@torch.inference_mode()
def perplexity(
    writer: Writer, prompts: Sequence[str], responses: Sequence[Sequence[int]], batch_size: int = 16
) -> float:
    """exp of the mean negative log-likelihood of response tokens under a model, each after its prompt.

    Args:
        responses: token ids of the model's own vocabulary; empty ones are left out.
    """
    target = target_for(writer.lm)
    pairs = [(prompt, list(ids)) for prompt, ids in zip(prompts, responses, strict=True) if ids]
    total, count = 0.0, 0
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        rows = tokenize_prompts(writer.prompt_tokenizer, [p for p, _ in batch], writer.prompt_limits, truncate=True)
        first, memory = target.prefill(writer.encode(*pad_right(rows, device=target.device), Timings()))
        ids, mask = pad_right([ids for _, ids in batch], device=target.device)
        logits = first[:, None]
        if ids.shape[1] > 1:
            logits = torch.cat([logits, target.forward(ids[:, :-1], memory)], 1)
        nll = F.cross_entropy(logits.float().mT, ids, reduction="none")
        total += float((nll * mask).sum())
        count += int(mask.sum())
    return float(torch.tensor(total / max(count, 1)).exp())


def cost_of_bits(writer: Writer, texts: Sequence[tuple[str, str]], most: int = 256) -> dict[str, float]:
    """Perplexity of texts under a model that runs on copies of its weights in fewer bits, and on its own.

    Args:
        texts: prompts, and what follows them; an empty one stands for the second half of its prompt.
        most: tokens of what follows that are looked at.
    Returns: by runtime. The model is left native.
    Raises: BatonError for a runtime without copies, and for an encoder-decoder without texts that follow.
    """
    name = runtime_of(writer.lm).name
    if name not in ("int8", "int4"):
        raise BatonError(f"runtime {name} runs the model's own weights: compare with --runtime int8 or int4")
    target, tokenizer = target_for(writer.lm), writer.response_tokenizer
    if not (target.reads_prompt or all(response for _, response in texts)):
        raise BatonError("an encoder-decoder is judged by what answers a prompt: give rows of prompt and response")
    pairs = [
        (text[: len(text) // 2], text[len(text) // 2 :]) if not response else (text, response)
        for text, response in texts
    ]
    prompts = [prompt for prompt, _ in pairs]
    responses = [tokenizer(text_target=r, add_special_tokens=not target.reads_prompt)["input_ids"] for _, r in pairs]
    if target.reads_prompt and target.context is not None:
        read = tokenize_prompts(writer.prompt_tokenizer, prompts, writer.prompt_limits, truncate=True)
        responses = [ids[: max(0, target.context - len(row))] for ids, row in zip(responses, read, strict=True)]
    responses = [ids[:most] for ids in responses]
    found = {name: perplexity(writer, prompts, responses)}
    prepare(writer.lm, "native")
    return found | {"native": perplexity(writer, prompts, responses)}
