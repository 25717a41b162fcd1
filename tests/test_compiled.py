"""Compiled passes give what stock layers give, wait for nothing, and stand aside where they do not fit.

Most of these tests leave out the compiler itself, which is slow, and run what it would be given.
"""

import copy
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM
from typer.testing import CliRunner

import baton
import baton.runtime
from baton.cache import RowCache
from baton.cli.app import app
from baton.models.adapter import Target, runtime_of, target_for
from baton.models.loading import LanguageModel, beside
from baton.models.writer import PromptInputs
from baton.runtime import compiled, prepare
from baton.runtime.compiled import Bucket, Compiled
from baton.runtime.warm import warm_up

SMALL = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": tiny.EOS,
    "eos_token_id": tiny.EOS,
    "pad_token_id": tiny.PAD,
}
GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
MODELS: dict[str, Callable[[], Any]] = {
    **tiny.FAMILIES,
    "opt": lambda: tiny.randomized(OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)), 0),
    "mistral, window": lambda: tiny.randomized(
        MistralForCausalLM(MistralConfig(**SMALL, **GROUPED, sliding_window=6)), 0
    ),
    "gemma2": lambda: tiny.randomized(Gemma2ForCausalLM(Gemma2Config(**SMALL, **GROUPED, sliding_window=6)), 0),
}
TREE = torch.tensor(
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]], dtype=torch.bool
)
DEPTHS = torch.tensor([0, 1, 1, 2, 2])
real_compiler = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own, about its own parts


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled, "_said", set())
    monkeypatch.setattr(baton.runtime, "_said", set())
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The compiler hands back what it is given; what it was asked for is noted."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    yield asked


def prompts(*lengths: int) -> PromptInputs:
    ids = torch.randint(3, tiny.VOCAB, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    return PromptInputs(ids=ids * mask, mask=mask)


def ready(target: Target, *buckets: tuple[int, int]) -> None:
    """Compile, and wait for it."""
    assert isinstance(target, Compiled)
    _, memory = target.prefill(prompts(3))
    for bucket in buckets:
        assert target.steps.compile(Bucket(*bucket), memory) == ""


def walk(target: Target, seen: list[bool]) -> torch.Tensor:
    """Logits after ragged prompts: a chain, a tree, single tokens over a growing cache, rows that leave and join."""
    real = target.steps.run if isinstance(target, Compiled) else None

    def watched(*args: Any) -> Any:
        logits = real(*args)  # type: ignore[misc]
        seen.append(logits is not None)
        return logits

    logits, memory = target.prefill(prompts(9, 4, 1))
    if isinstance(target, Compiled):
        target.steps.run = watched  # type: ignore[method-assign]
    found = [*logits, *target.forward(torch.tensor([[5, 6, 7]] * 3), memory).flatten(0, 1)]
    memory.keep([[0, 1, 2], [0], [0, 1]])
    positions = torch.tensor(memory.lengths)[:, None] + DEPTHS
    ids = torch.tensor([[8, 9, 10, 11, 12]] * 3)
    found += target.forward(ids, memory, positions=positions, tree=TREE.expand(3, -1, -1)).flatten(0, 1)
    memory.keep([[0, 2, 4], [0], [0, 1, 3]])
    memory.select([0, 2])
    _, other = target.prefill(prompts(6))
    memory.join(other)
    assert memory.own.rows == 3
    for token in range(60):
        found += target.forward(torch.tensor([[13 + token]] * 3), memory).flatten(0, 1)
    if isinstance(target, Compiled):
        target.steps.run = real  # type: ignore[method-assign,assignment]
    return torch.stack(found)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_traced_gives_the_logits_of_stock_layers(name: str, uncompiled: list[Any]) -> None:
    """Padded rows and tokens, ragged prompts, trees, slots that are added, rows that leave and join."""
    model = MODELS[name]()
    expected = walk(target_for(model), [])
    assert prepare(model, "compiled") == "compiled"
    fast = target_for(model)
    ready(fast, (4, 1), (4, 4), (4, 8))
    seen: list[bool] = []
    torch.testing.assert_close(walk(fast, seen), expected, atol=2e-4, rtol=2e-4)
    assert sum(seen) == 62  # all but the first pass of the prompt that joined, or all of them
    assert all(seen) == fast.reads_prompt
    assert uncompiled == [{"fullgraph": True, "dynamic": False, "options": {"freezing": False}}] * 3


@pytest.mark.parametrize("name", ["gpt2", pytest.param("bart", marks=pytest.mark.slow)])
def test_a_graph_serves_every_pass_of_its_bucket(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced once, by the compiler's front, which refuses to trace again: other lengths, slots, prompts, threads."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, *, options, **rest: real(f, backend="eager", **rest))
    model = MODELS[name]()
    prepare(model, "compiled")
    target: Any = target_for(model)
    _, memory = target.prefill(prompts(3))
    thread = threading.Thread(target=target.steps.compile, args=(Bucket(1, 1), memory))
    thread.start()
    thread.join()
    assert list(target.steps.ready) == [(1, 1)], target.steps.broken
    for prompt in (1, 5, 70):
        _, memory = target.prefill(prompts(prompt))
        for token in range(50):
            target.forward(torch.tensor([[7 + token]]), memory)
            assert target.steps.ready  # it was not taken out for failing


@pytest.mark.slow
@real_compiler
@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
def test_compiled_passes_give_the_logits_of_stock_layers(name: str) -> None:
    model = MODELS[name]()
    expected = walk(target_for(model), [])
    prepare(model, "compiled")
    fast = target_for(model)
    ready(fast, (4, 1), (4, 8))
    seen: list[bool] = []
    torch.testing.assert_close(walk(fast, seen), expected, atol=2e-4, rtol=2e-4)
    assert sum(seen) == 61  # a chain of three has no graph: nothing waits for one
    assert not fast.steps.broken  # type: ignore[attr-defined]


@pytest.mark.slow
@real_compiler
def test_bfloat16_weights_are_laid_out_once_and_stay_the_models_own(tmp_path: Path) -> None:
    model = tiny.gpt2().to(torch.bfloat16)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    prepare(model, "compiled")
    fast = target_for(model)
    ready(fast, (1, 1))
    _, memory = fast.prefill(prompts(5))
    found = fast.forward(torch.tensor([[7]]), memory).float()
    exact = target_for(copy.deepcopy(model).float())
    _, memory = exact.prefill(prompts(5))
    right = exact.forward(torch.tensor([[7]]), memory)
    assert (found - right).norm() < 0.02 * right.norm()
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_texts_are_those_of_eager_with_drafts_and_neighbours(family: str, uncompiled: list[Any]) -> None:
    writer = tiny.language_model(family)
    expected = [o.token_ids for o in baton.generate(writer, tiny.PROMPTS, max_new_tokens=24)]
    prepare(writer.lm, "compiled")
    ready(target_for(writer.lm), *((rows, count) for rows in (1, 2, 4, 8) for count in (1, 2, 4, 8, 16)))
    for method, size in ((None, 1), ("prompt-lookup", 5), ("token-recycling", 5)):
        found = baton.generate(writer, tiny.PROMPTS, drafter=method, max_new_tokens=24, batch_size=size)
        assert [o.token_ids for o in found] == expected


def test_a_pass_never_waits_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs eagerly and asks; once another thread has compiled its bucket, it is compiled."""
    go, threads = threading.Event(), []

    def slow(function: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        assert go.wait(20)
        return function

    monkeypatch.setattr(torch, "compile", slow)
    model = tiny.gpt2()
    prepare(model, "compiled")
    target: Any = target_for(model)
    _, memory = target.prefill(prompts(5))
    first = target.forward(torch.tensor([[7]]), memory)
    assert target.steps.ready == {} and target.steps.asked == {(1, 1)}
    memory.truncate([5])
    go.set()
    target.steps.thread.join(20)
    assert list(target.steps.ready) == [(1, 1)] and threads != [threading.main_thread()]
    torch.testing.assert_close(target.forward(torch.tensor([[7]]), memory), first, atol=1e-5, rtol=1e-5)
    assert target_for(model).steps is target.steps  # type: ignore[attr-defined]  # engines share what is compiled


def test_measurements_may_wait_for_the_compiler(uncompiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_COMPILE", "wait")
    model = tiny.gpt2()
    prepare(model, "compiled")
    target: Any = target_for(model)
    _, memory = target.prefill(prompts(5))
    target.forward(torch.tensor([[7, 8]]), memory)
    assert list(target.steps.ready) == [(1, 2)] and target.steps.thread is None


def test_a_failing_compiler_is_reported_once_and_models_run_eager(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(function: Any, **options: Any) -> Any:
        def raising(*args: Any) -> Any:
            raise RuntimeError("no such instruction")

        return raising

    monkeypatch.setattr(torch, "compile", broken)
    writer = tiny.language_model("gpt2")
    expected = baton.generate(writer, ["The cat."], max_new_tokens=8)[0].token_ids
    prepare(writer.lm, "compiled")
    target: Any = target_for(writer.lm)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert baton.generate(writer, ["The cat."], max_new_tokens=8)[0].token_ids == expected
            target.steps.thread.join(20)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "no such instruction" in said[0]


def test_a_graph_that_fails_later_leaves_the_pass_to_stock_layers(
    uncompiled: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.gpt2()
    stock = target_for(model)
    prepare(model, "compiled")
    target: Any = target_for(model)
    ready(target, (1, 1))

    def recompiles(*args: Any) -> Any:
        raise RuntimeError("Detected recompile")

    target.steps.ready[Bucket(1, 1)] = recompiles
    found = []
    for each in (stock, target):
        _, memory = each.prefill(prompts(5))
        found.append(each.forward(torch.tensor([[7]]), memory))
        assert memory.lengths == [6]
    assert torch.equal(*found)
    assert "Detected recompile" in caplog.text and Bucket(1, 1) not in target.steps.ready


def test_weights_that_changed_are_not_read_from_old_code(uncompiled: list[Any]) -> None:
    model = tiny.gpt2()
    prepare(model, "compiled")
    target: Any = target_for(model)
    ready(target, (1, 1))
    moved = copy.deepcopy(model)
    prepare(moved, "compiled")
    old: Any = target_for(moved)
    assert old.steps.valid
    moved.to(torch.bfloat16)
    assert not old.steps.valid and runtime_of(moved).name == "eager"
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(2.0)
    assert not target.steps.valid
    fresh: Any = target_for(model)
    assert fresh.steps is not target.steps and fresh.steps.valid
    changed = copy.deepcopy(model)
    del changed.baton_runtime
    expected = target_for(changed)
    _, memory = target.prefill(prompts(5))
    _, other = expected.prefill(prompts(5))
    found = target.forward(torch.tensor([[7]]), memory)
    assert torch.equal(found, expected.forward(torch.tensor([[7]]), other))


def test_layers_are_captured_and_run_apart_by_stock_layers(uncompiled: list[Any]) -> None:
    model = tiny.bart()
    prepare(model, "compiled")
    target = target_for(model)
    ready(target, (1, 2))
    _, memory = target.prefill(prompts(5))
    ids = torch.tensor([[5, 6]])
    plain = target.forward(ids, memory)
    memory.truncate([1])
    with target.capture([1, 2]) as found:
        target.forward(ids, memory)
    memory.truncate([1])
    low = target.forward_layers(0, 1, ids, memory)
    torch.testing.assert_close(low, found[1])
    memory.truncate([1])
    logits = target.forward(ids, memory, begun=(1, low))
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-5)
    model.train()  # nor is the model itself touched
    assert model.model.decoder.embed_positions.weight.requires_grad and "forward" not in vars(
        model.model.decoder.embed_positions
    )


def test_on_a_gpu_graphs_are_captured_and_what_they_give_is_copied(
    uncompiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paths of CUDA, as far as a CPU can walk them."""
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: False)
    assert "Triton" in compiled._why_not(torch.device("cuda"))
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    assert compiled._why_not(torch.device("cuda")) == ""
    assert compiled._options(torch.device("cuda"), torch.bfloat16) == {"mode": "reduce-overhead"}
    assert compiled._options(torch.device("cpu"), torch.bfloat16) == {"options": {"freezing": True}}
    assert "mps" in compiled._why_not(torch.device("mps"))


def test_without_a_compiler_models_run_eager(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert prepare(tiny.gpt2(), "compiled") == "eager"
    assert "no C++ compiler" in caplog.text


def test_reserving_keeps_what_is_there() -> None:
    cache = RowCache(1, 3)
    cache.append(2)
    given = torch.randn(3, 2, 2, 4)
    cache.update(given, -given, 0)
    cache.reserve(4, 70)
    assert cache.keys[0] is not None and cache.keys[0].shape == (4, 2, 128, 4) and cache.capacity == 128
    assert torch.equal(cache.keys[0][:3, :, :2], given) and cache.lengths == [2, 2, 2]
    before = cache.keys[0]
    cache.reserve(2, 10)
    assert cache.keys[0] is before


def test_buckets_are_powers_of_two() -> None:
    assert [Bucket.of(b, q) for b, q in ((1, 1), (3, 5), (8, 9))] == [(1, 1), (4, 8), (8, 16)]


def test_warm_up_compiles_what_passes_will_ask_for(uncompiled: list[Any]) -> None:
    model = tiny.bart()
    prepare(model, "compiled")
    seen: list[tuple[str, int, int]] = []
    found = warm_up(model, rows=[1, 5], batches=[1, 3], progress=lambda *args: seen.append(args))
    assert list(found.seconds) == ["1 x 1 tokens", "1 x 8 tokens", "4 x 1 tokens", "4 x 8 tokens"]
    assert found.runtime == "compiled" and not found.failed and found.folder == os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert seen[-1] == ("compiling", 4, 4)
    target: Any = target_for(model)
    assert set(target.steps.ready) == {(1, 1), (1, 8), (4, 1), (4, 8)}
    assert beside(model)["runtime"] == "compiled"
    assert warm_up(tiny.gpt2()).folder == ""


def test_code_is_kept_in_our_cache_where_nobody_chose_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    mine = str(Path(os.environ["BATON_CACHE"]) / "inductor")
    for before in ("", default_cache_dir()):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        assert prepare(tiny.gpt2(), "compiled") == "compiled"
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == mine
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert prepare(tiny.gpt2(), "compiled") == "compiled"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


def test_the_command_warms_up_a_folder(uncompiled: list[Any], tmp_path: Path) -> None:
    tiny.gpt2().save_pretrained(tmp_path / "model")
    tiny.tokenizer(append_eos=False).save_pretrained(tmp_path / "model")
    command = ["warmup", str(tmp_path / "model"), "--runtime", "compiled", "--rows", "1", "--rows", "4"]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found["seconds"]) == ["1 x 1 tokens", "1 x 4 tokens"] and found["runtime"] == "compiled"
    assert "runtime compiled" in CliRunner().invoke(app, command).stdout
    writer = baton.load(tmp_path / "model", runtime="compiled")
    assert isinstance(writer, LanguageModel) and runtime_of(writer.lm).name == "compiled"
