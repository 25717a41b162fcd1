"""Train a small subword tokenizer. Byte fallback means that no text is ever unknown."""

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, append_eos: bool, max_length: int = 512
) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer with ids 0 `<pad>`, 1 `</s>`, 2 `<unk>`, then 256 bytes, then merges.

    Args:
        texts: training sentences; vocab_size: ids in all.
        append_eos: end each encoded text with `</s>`, as T5 does.
        max_length: recorded as the tokenizer's `model_max_length`, tokens.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFC()
    # Sentence marks stand alone, or a small vocabulary fills up with "word." and "word,".
    marks = pre_tokenizers.Split(Regex(r'[.,!?;:"()„“”]'), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), marks])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = [PAD, EOS, UNK]
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special + fallback, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer = _without_special(tokenizer, fallback)
    if append_eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _without_special(tokenizer: Tokenizer, tokens: list[str]) -> Tokenizer:
    """The same tokenizer where `tokens` are ordinary vocabulary: decoding must not skip bytes as special."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in set(tokens)]
    return Tokenizer.from_str(json.dumps(state))
