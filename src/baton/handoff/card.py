"""Model cards: what a hand-off was made from, by which command, and what it scores."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from baton.handoff.config import HandoffConfig

NAMES = {
    "llm": "LLM",
    "slm": "SLM alone",
    "handoff": "hand-off",
    "zero": "hand-off, Z = 0",
    "constant": "hand-off, constant Z",
    "shuffled": "hand-off, Z of another prompt",
}


def results_table(report: Mapping[str, Any], modes: Collection[str] = tuple(NAMES)) -> str:
    """Markdown table of an evaluation report, a row per mode."""
    lines = [
        "| | BLEU | chrF | ms/token | tokens/s | ms/sentence | faster per token | faster in all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for mode, name in NAMES.items():
        if mode not in report["bleu"] or mode not in modes:
            continue
        decode, total = report["ms_per_token"], report["total_ms"]
        faster = [f"{times['llm'] / times[mode]:.1f}x" if "llm" in times else "" for times in (decode, total)]
        lines.append(
            f"| {name} | {report['bleu'][mode]:.1f} | {report['chrf'][mode]:.1f} | {decode[mode]:.2f} "
            f"| {report['tokens_per_second'][mode]:.0f} | {total[mode]:.1f} | {faster[0]} | {faster[1]} |"
        )
    return "\n".join(lines)


def conditions(report: Mapping[str, Any]) -> str:
    """One sentence: what was measured, on what."""
    s, m, v = report["settings"], report["machine"], report["versions"]
    device = m["gpu"] or f"{m['cpu']}, {m['threads']} threads"
    return (
        f"{s['prompts']} held-out prompts, greedy, {s['dtype']}; quality at batch {s['batch_size_quality']}, speed at "
        f"batch 1 on {s['speed_prompts']} prompts (median of {s['repeats']} interleaved passes), {device}, "
        f"PyTorch {v['torch']}, transformers {v['transformers']}."
    )


def handoff_card(
    config: HandoffConfig,
    *,
    title: str,
    data: str,
    command: str,
    validation: Mapping[str, float] | None = None,
    report: Mapping[str, Any] | None = None,
    licence: str | None = None,
    notes: str = "",
) -> str:
    """README.md of a hand-off: source, data, command, numbers."""
    llm, options = config.llm, config.options
    front = {"library_name": "baton", "tags": ["llm-to-slm"]} | ({"license": licence} if licence else {})
    parts = [
        "---\n" + "\n".join(f"{k}: {json.dumps(v)}" for k, v in front.items()) + "\n---\n",
        f"# {title}\n",
        "A hand-off (LLM-to-SLM, arXiv 2402.16844): the frozen LLM reads the prompt once, the small model, conditioned "
        "on what was read, writes the answer. Lossy: the text is the small model's.\n",
        f"- LLM: `{llm['id']}`{' at ' + llm['revision'] if llm.get('revision') else ''}, {llm['kind']}, layer "
        f"{llm['layer']}, sha256 of the weights used `{llm['sha256'][:16]}`",
        f"- SLM: {config.slm['model_type']}, {'same tokenizer' if config.same_tokenizer else 'its own tokenizer'}",
        "- Options: " + ", ".join(f"{k}={v}" for k, v in options.items()),
        f"- Data: {data}",
        f"- Made by: `{command}`",
    ]
    if validation:
        parts.append("- Validation: " + ", ".join(f"{k} {v:.4g}" for k, v in validation.items()))
    parts.append(
        '\n```python\nimport baton\n\nmodel = baton.HandoffModel.from_pretrained("PATH")\n'
        'print(baton.generate(model, ["Where is the next station?"])[0].text)\n```\n'
        if report is not None
        else ""
    )
    if report is not None:
        parts += ["## Results\n", results_table(report), "\n" + conditions(report)]
    if notes:
        parts.append("\n" + notes)
    return "\n".join(parts).rstrip() + "\n"
