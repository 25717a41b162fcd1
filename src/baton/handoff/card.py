"""Model cards: what a hand-off was made from, by which command, and what it scores."""

import json
from collections.abc import Mapping
from typing import Any

from baton.handoff.config import HandoffConfig


def handoff_card(
    config: HandoffConfig,
    *,
    title: str,
    data: str,
    command: str,
    validation: Mapping[str, float] | None = None,
    results: str = "",
    licence: str | None = None,
) -> str:
    """README.md of a hand-off: source, data, command, numbers.

    Args:
        data, command: what it was trained on, and how.
        validation: metrics of the last validation; results: Markdown of an evaluation.
    """
    llm, options = config.llm, config.options
    front: dict[str, Any] = {"library_name": "baton", "tags": ["llm-to-slm"]}
    if licence:
        front["license"] = licence
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
        'print(baton.generate(model, ["your prompt"])[0].text)\n```'
    )
    if results:
        parts.append(f"\n## Results\n\n{results}")
    return "\n".join(parts).rstrip() + "\n"
