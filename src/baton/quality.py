"""How good texts are: against references, and under the target."""

import difflib
import re
import statistics
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from baton.models.adapter import target_for
from baton.models.prompts import pad_right, tokenize_prompts
from baton.models.writer import Writer
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
