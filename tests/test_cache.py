"""The cache of rows, alone and under models: whatever was done to it, it equals one that was filled afresh."""

import random
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    MBartConfig,
    MistralConfig,
    MT5Config,
    OPTConfig,
    PegasusConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    T5GemmaConfig,
)

from baton.cache import RowCache, fill_holes
from baton.errors import UnsupportedModel
from baton.models.adapter import FAMILIES, target_for
from baton.models.prompts import pad_right
from baton.models.text import embed_tokens
from baton.models.writer import PromptInputs

SMALL = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": tiny.WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": tiny.HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": tiny.PAD,
    "eos_token_id": tiny.EOS,
    "bos_token_id": tiny.EOS,
}
BART_LIKE = {
    "vocab_size": tiny.VOCAB,
    "d_model": tiny.WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": tiny.HEADS,
    "decoder_attention_heads": tiny.HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": tiny.PAD,
    "eos_token_id": tiny.EOS,
    "decoder_start_token_id": 2,
}
OPT_LIKE = {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16}
T5_LIKE = {
    "vocab_size": tiny.VOCAB,
    "d_model": tiny.WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": tiny.HEADS,
    "num_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "pad_token_id": tiny.PAD,
    "eos_token_id": tiny.EOS,
    "decoder_start_token_id": tiny.PAD,
}


def t5gemma() -> T5GemmaConfig:
    part = {**SMALL, "sliding_window": 4}
    return T5GemmaConfig(encoder=part, decoder=part, vocab_size=tiny.VOCAB, decoder_start_token_id=2)


OTHERS: dict[str, Any] = {
    "gemma": lambda: GemmaConfig(**SMALL),
    "gemma2": lambda: Gemma2Config(**SMALL, sliding_window=4),
    "gemma3_text": lambda: Gemma3TextConfig(
        **SMALL, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL),
    "mbart": lambda: MBartConfig(**BART_LIKE, scale_embedding=True),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=5),
    "mt5": lambda: MT5Config(**T5_LIKE),
    "opt": lambda: OPTConfig(**OPT_LIKE),
    "pegasus": lambda: PegasusConfig(**BART_LIKE),
    "phi3": lambda: Phi3Config(**SMALL),
    "qwen2": lambda: Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SMALL),
    "t5gemma": t5gemma,
}


def build(family: str) -> PreTrainedModel:
    if family in tiny.FAMILIES:
        return tiny.FAMILIES[family]()
    config = OTHERS[family]()
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return tiny.randomized(auto.from_config(config), seed=0)


@torch.no_grad()
def fresh(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """Logits [V] after prompt and response, by the model's own forward without any cache."""
    if not model.config.is_encoder_decoder:
        return model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, -1]
    start = model.generation_config.decoder_start_token_id
    return model(
        input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *response]]), use_cache=False
    ).logits[0, -1]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)


PROMPTS = [[5, 9, 77, 30, 12, 8, 260], [41, 3], [100, 101, 102, 7]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pass_equals_the_models_own_forward(family: str) -> None:
    """Ragged prompts, single steps, a tree of drafts, different accepted paths, rows that join, leave and fork.

    Some layers look back over a window of four or five positions, in families that have such layers.
    """
    model = build(family)
    target = target_for(model)
    ids, mask = pad_right(PROMPTS)
    logits, memory = target.prefill(PromptInputs(ids=ids, mask=mask))
    responses: list[list[int]] = [[], [], []]
    for row, prompt in enumerate(PROMPTS):
        close(logits[row], fresh(model, prompt, []))

    for token in (11, 250):
        logits = target.forward(torch.tensor([[token], [token + 1], [token + 2]]), memory)
        for row, prompt in enumerate(PROMPTS):
            responses[row].append(token + row)
            close(logits[row, 0], fresh(model, prompt, responses[row]))

    # A root, two children, and a child of the second: who sees whom, and at what depth.
    tokens = torch.tensor([[20, 21, 22, 23], [30, 31, 32, 33], [40, 41, 42, 43]])
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool().expand(3, -1, -1)
    depth = torch.tensor([0, 1, 1, 2])
    positions = torch.tensor(memory.lengths)[:, None] + depth
    logits = target.forward(tokens, memory, positions=positions, tree=tree)
    paths = {0: [0], 1: [0, 1], 2: [0, 2], 3: [0, 2, 3]}  # node -> way from the root
    for row, prompt in enumerate(PROMPTS):
        for node, path in paths.items():
            close(logits[row, node], fresh(model, prompt, responses[row] + tokens[row, path].tolist()))

    kept = [[0, 2, 3], [0], [0, 1]]
    memory.keep(kept)
    for row, path in enumerate(kept):
        responses[row] += tokens[row, path].tolist()
    for token in (60, 70):
        logits = target.forward(torch.tensor([[token]] * 3), memory)
        for row, prompt in enumerate(PROMPTS):
            responses[row].append(token)
            close(logits[row, 0], fresh(model, prompt, responses[row]))

    memory.select([2, 0])
    memory.fork(1)
    order = [2, 0, 0]
    chains = torch.tensor([[80, 81], [82, 83], [84, 85]])
    logits = target.forward(chains, memory)  # without a tree, a chain
    for row, original in enumerate(order):
        for node in (0, 1):
            so_far = responses[original] + chains[row, : node + 1].tolist()
            close(logits[row, node], fresh(model, PROMPTS[original], so_far))

    memory.truncate([length - 2 for length in memory.lengths])
    logits = target.forward(torch.tensor([[90], [91], [92]]), memory)
    for row, original in enumerate(order):
        close(logits[row, 0], fresh(model, PROMPTS[original], [*responses[original], 90 + row]))

    # A longer prompt joins; the first of the others leaves, and the last takes its place.
    long = [7, 8, 9, 10, 11, 12, 13, 14, 15]
    memory.join(target.prefill(PromptInputs(ids=torch.tensor([long]), mask=torch.ones(1, 9, dtype=torch.long)))[1])
    memory.select(fill_holes(4, {0}))
    rows = [
        (long, []),
        (PROMPTS[order[1]], [*responses[order[1]], 91]),
        (PROMPTS[order[2]], [*responses[order[2]], 92]),
    ]
    for token in (50, 120):
        logits = target.forward(torch.tensor([[token], [token + 1], [token + 2]]), memory)
        for row, (prompt, response) in enumerate(rows):
            response.append(token + row)
            close(logits[row, 0], fresh(model, prompt, response))
    memory.select([1])  # the long prompt has left
    logits = target.forward(torch.tensor([[33]]), memory)
    close(logits[0, 0], fresh(model, rows[1][0], [*rows[1][1], 33]))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_can_be_run_in_parts(family: str) -> None:
    """The first layers, then the others on what these gave, are a whole pass; the final norm is applied once."""
    model = build(family)
    target = target_for(model)
    ids, mask = pad_right(PROMPTS)
    tokens = torch.tensor([[20, 21, 22], [30, 31, 32], [40, 41, 42]])
    _, whole = target.prefill(PromptInputs(ids=ids, mask=mask))
    with target.capture({0, 1, len(target.layers)}) as outputs:
        expected = target.forward(tokens, whole)
    _, memory = target.prefill(PromptInputs(ids=ids, mask=mask))
    before = list(memory.lengths)
    low = target.forward_layers(0, 1, tokens, memory)
    memory.truncate(before)
    high = target.forward_layers(1, len(target.layers), tokens, memory, hidden=low)
    close(low, outputs[1])
    close(high, outputs[len(target.layers)])
    close(target.head(high), expected)
    close(target.forward(tokens[:, :1], memory), target.forward(tokens[:, :1], whole))  # both caches are whole
    with pytest.raises(ValueError, match="with hidden"):
        target.forward_layers(0, 1, tokens, memory, hidden=low)


@pytest.mark.parametrize("family", ["t5", "bart", "marian", "gpt2", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_kinds_of_attention_and_embeddings_as_prompts(family: str, attention: str) -> None:
    """A prompt given as the model's own embeddings is the prompt given as ids."""
    model = tiny.FAMILIES[family]()
    model.set_attn_implementation(attention)
    target = target_for(model)
    ids, mask = pad_right(PROMPTS)
    with torch.no_grad():
        embeds = embed_tokens(model, ids)
    logits, memory = target.prefill(PromptInputs(embeds=embeds, mask=mask))
    for row, prompt in enumerate(PROMPTS):
        close(logits[row], fresh(model, prompt, []))
    logits = target.forward(torch.tensor([[20, 21, 22]] * 3), memory)
    for row, prompt in enumerate(PROMPTS):
        close(logits[row, 2], fresh(model, prompt, [20, 21, 22]))


def test_t5_with_more_decoder_than_encoder_layers() -> None:
    """Stock T5 sizes its cache by the encoder's layers; ours by the decoder's."""
    model = tiny.t5(num_layers=1, num_decoder_layers=3)
    target = target_for(model)
    _, memory = target.prefill(PromptInputs(ids=torch.tensor([[5, 6]]), mask=torch.ones(1, 2, dtype=torch.long)))
    close(target.forward(torch.tensor([[7]]), memory)[0, 0], fresh(model, [5, 6], [7]))


def test_t5_bias_grows_with_the_row() -> None:
    """The table of biases by distance is computed ahead for a while, then again."""
    model = tiny.t5()
    target: Any = target_for(model)
    _, memory = target.prefill(PromptInputs(ids=torch.tensor([[5, 6]]), mask=torch.ones(1, 2, dtype=torch.long)))
    tokens = [random.Random(0).randrange(3, tiny.VOCAB) for _ in range(600)]
    target.forward(torch.tensor([tokens[:-1]]), memory)
    close(target.forward(torch.tensor([tokens[-1:]]), memory)[0, 0], fresh(model, [5, 6], tokens))


def test_cross_attention_is_computed_once() -> None:
    """Keys and values over the encoder's states come from the first pass; the encoder runs once."""
    model = tiny.t5()
    calls = {"encoder": 0, "keys": 0}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    model.encoder.register_forward_hook(count("encoder"))
    for block in model.decoder.block:
        block.layer[1].EncDecAttention.k.register_forward_hook(count("keys"))
    target = target_for(model)
    _, memory = target.prefill(PromptInputs(ids=torch.tensor([[5, 6]]), mask=torch.ones(1, 2, dtype=torch.long)))
    for token in range(10, 15):
        target.forward(torch.tensor([[token]]), memory)
    assert calls == {"encoder": 1, "keys": len(model.decoder.block)}


def test_no_hook_stays_on_the_model() -> None:
    """Ragged rows of BART place their positions for one call only."""
    model = tiny.bart()
    target = target_for(model)
    ids, mask = pad_right(PROMPTS)
    _, memory = target.prefill(PromptInputs(ids=ids, mask=mask))
    target.forward(torch.tensor([[9, 8], [7, 6], [5, 4]]), memory)
    memory.keep([[0], [0, 1], []])
    target.forward(torch.tensor([[9], [8], [7]]), memory)
    assert "forward" not in vars(model.model.decoder.embed_positions)


@torch.inference_mode()
def test_cache_equals_a_list_of_tokens() -> None:
    """Random operations on a cache and on plain lists give the same rows, values included."""
    chance = random.Random(0)
    for _ in range(20):
        cache = RowCache(2, 3, capacity=1)
        rows: list[list[float]] = [[], [], []]
        for _ in range(12):
            count = chance.choice([1, 1, 3, 40])
            new = torch.arange(len(rows) * count).view(len(rows), 1, count, 1) + chance.random()
            cache.append(count)
            for layer in (0, 1):
                keys, values = cache.update(new * (layer + 1), -new * (layer + 1), layer)
                assert keys.shape == values.shape == (len(rows), 1, max(map(len, rows)) + count, 1)
            paths = [sorted(chance.sample(range(count), chance.randrange(count + 1))) for _ in rows]
            if chance.random() < 0.5:
                paths = [list(range(len(path))) for path in paths]
            cache.keep(paths)
            rows = [row + [float(new[i, 0, node, 0]) for node in paths[i]] for i, row in enumerate(rows)]
            if chance.random() < 0.3:
                lengths = [chance.randrange(len(row) + 1) for row in rows]
                cache.truncate(lengths)
                rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
            if chance.random() < 0.3:
                leaving = {row for row in range(len(rows)) if chance.random() < 0.3}
                order = fill_holes(len(rows), leaving)
                assert sorted(order) == [row for row in range(len(rows)) if row not in leaving]
                cache.select(order)
                rows = [rows[row] for row in order]
            if chance.random() < 0.4 and rows:
                other, added = RowCache(2, 2, capacity=1), [[1.5, 2.5, 3.5], [4.5, 5.5, 6.5]]
                other.append(3)
                for layer in (0, 1):
                    new = torch.tensor(added)[:, None, :, None] * (layer + 1)
                    other.update(new, -new, layer)
                cut = chance.randrange(4)
                other.truncate([cut, 3])
                cache.join(other)
                rows += [added[0][:cut], added[1]]
            if not rows:
                break
            if chance.random() < 0.3:
                order = [chance.randrange(len(rows)) for _ in range(chance.randrange(1, 5))]
                cache.select(order)
                rows = [list(rows[row]) for row in order]
            assert cache.lengths == [len(row) for row in rows]
            for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
                assert keys is not None and values is not None
                for row, expected in enumerate(rows):
                    wanted = torch.tensor(expected) * (layer + 1)
                    assert torch.equal(keys[row, 0, : len(expected), 0], wanted)
                    assert torch.equal(values[row, 0, : len(expected), 0], -wanted)


@torch.inference_mode()
def test_forked_rows_are_independent() -> None:
    cache = RowCache(1, 1)
    cache.append(2)
    cache.update(torch.ones(1, 1, 2, 1), torch.ones(1, 1, 2, 1), 0)
    cache.fork(0)
    cache.append(1)
    new = torch.tensor([5.0, 6.0]).view(2, 1, 1, 1)
    keys, _ = cache.update(new, new, 0)
    assert keys[:, 0, :, 0].tolist() == [[1, 1, 5], [1, 1, 6]]


def test_impossible_operations_are_refused() -> None:
    cache = RowCache(1, 2)
    cache.append(3)
    with pytest.raises(ValueError, match=r"rows of \[3, 3\] slots to \[4, 0\]"):
        cache.truncate([4, 0])
    with pytest.raises(ValueError, match="1 paths for 2 rows"):
        cache.keep([[0]])
    for path in ([1, 0], [0, 0], [3], [-1]):
        with pytest.raises(ValueError, match=r"must rise within 0\.\.2"):
            cache.keep([[0], path])
    assert cache.lengths == [3, 3]


def test_models_that_were_not_compared_are_refused() -> None:
    model = tiny.gpt2()
    model.config.model_type = "mamba"
    with pytest.raises(UnsupportedModel, match=r"type 'mamba'.*supported: bart, "):
        target_for(model)
    model = tiny.llama()
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UnsupportedModel, match="layers of type linear_attention"):
        target_for(model)
    model = tiny.llama()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModel, match="attn_implementation='sdpa'"):
        target_for(model)
