"""A vocabulary for models of public shapes, whose tokens mean nothing: some engines take no weights without one."""

from itertools import product

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from baton.bench.peers.table import Absent

SPECIAL = ("<pad>", "</s>", "<unk>")


def made_up(size: int) -> PreTrainedTokenizerFast:
    """Byte pairs: so many different pieces, the special ones first. Raises: Absent for more than there are pairs."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(product(letters, letters))
    pieces = [*SPECIAL, *letters, *map("".join, merges)]
    if not len(SPECIAL) + len(letters) <= size <= len(pieces):
        raise Absent(f"left out: no vocabulary of {size} tokens is made up here")
    merges = merges[: size - len(SPECIAL) - len(letters)]
    pairs = models.BPE(vocab={piece: place for place, piece in enumerate(pieces[:size])}, merges=merges)
    made = Tokenizer(pairs)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pad, eos, unk = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, eos_token=eos, unk_token=unk)
