"""The audit finds what is wrong, and finds nothing where nothing is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

import baton.engine.choose as choose
from baton.audit import audit
from baton.audit.exact import logits_at
from baton.cli import app
from baton.draft import Draft
from baton.drafters.draft_model import DraftModel
from baton.engine import generate
from baton.models.adapter import target_for
from baton.verify import Verdict

METHODS = ["prompt-lookup", "token-recycling:num_draft_tokens=10"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny `target` and `small`, the same with noise: what they expect overlaps."""
    folder = tmp_path_factory.mktemp("pair")
    for name, noise in (("target", 0.0), ("small", 0.1)):
        model = tiny.llama(0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(noise * weight.std() * torch.randn(weight.shape, generator=generator))
        model.save_pretrained(folder / name)
        tiny.tokenizer(append_eos=False).save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("\n".join(tiny.PROMPTS) + "\n", encoding="utf-8")
    return folder


def test_nothing_is_found_where_nothing_is_wrong(pair: Path) -> None:
    writer = tiny.language_model("llama")
    drawn = f"draft-model:model={pair / 'small'},sample=true,num_draft_tokens=2"
    report = audit(writer, [*METHODS, drawn], tiny.PROMPTS, max_new_tokens=12, batch_sizes=(1, 3), law_runs=1500)
    assert report.exact and not any(method.differences for method in report.methods)
    assert [method.compared for method in report.methods] == [20, 20, 10]
    law = report.methods[-1]
    assert law.chi_square is not None and law.chi_square_p is not None and law.chi_square_p > 1e-4


def test_a_verifier_that_lets_a_wrong_token_through_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    right = choose.verify.follow

    def wrong(draft: Draft, own: Any, ends: Any) -> Verdict | None:
        return Verdict((0,), own(0)) if len(draft) else right(draft, own, ends)

    monkeypatch.setattr(choose.verify, "follow", wrong)
    report = audit(tiny.language_model("llama"), METHODS[1:], tiny.PROMPTS, max_new_tokens=12, batch_sizes=(1,))
    assert not report.exact
    bug = report.methods[0].bugs[0]
    assert bug.plain != bug.found and bug.gap > 1e-5


def test_a_biased_law_is_refuted(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter that chooses its tokens and calls them drawn."""
    right = DraftModel._draw

    def chosen(self: Any, requests: Any, tokens: Any, drawn: Any, logits: Any) -> Sequence[int]:
        right(self, requests, tokens, drawn, logits)
        return [int(kept[-1].argmax()) for kept in drawn]

    monkeypatch.setattr(DraftModel, "_draw", chosen)
    spec = f"draft-model:model={pair / 'small'},sample=true,num_draft_tokens=2"
    report = audit(tiny.language_model("llama"), [spec], tiny.PROMPTS[:1], max_new_tokens=4, batch_sizes=(1,))
    assert not report.exact and not report.methods[0].differences
    assert report.methods[0].chi_square_p < 1e-6  # type: ignore[operator]


def test_the_logits_of_a_position_are_those_of_plain_decoding() -> None:
    for family in ("llama", "t5"):
        writer = tiny.language_model(family)
        (output,) = generate(writer, tiny.PROMPTS[1], max_new_tokens=9)
        target = target_for(writer.lm)
        for position, token in enumerate(output.token_ids):
            assert int(logits_at(writer, target, output.prompt, output.token_ids[:position]).argmax()) == token


def test_the_command(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 0 with a table and JSON; bad input is named."""
    monkeypatch.setenv("COLUMNS", "200")
    run = CliRunner()
    arguments = ["audit", str(pair / "target"), "--data", str(pair / "prompts.txt"), "--max-new-tokens", "6"]
    done = run.invoke(app, [*arguments, "--batch-size", "3", "--json", str(tmp_path / "a.json")])
    assert done.exit_code == 0 and "exact" in done.stdout and "NOT" not in done.stdout
    assert '"exact": true' in (tmp_path / "a.json").read_text()
    refused = run.invoke(app, [*arguments, "--method", "prompt-lookop"])
    assert refused.exit_code == 2 and "prompt-lookup" in refused.stderr
