"""What a checkpoint's generation_config says about single tokens: honoured, so that greedy equals transformers' own."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from baton.models.writer import Writer

logger = logging.getLogger(__name__)

# Settings that would change a greedy response and that the engine does not apply, with the value that means "off".
NOT_APPLIED = {
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "sequence_bias": None,
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which tokens end a response, must be in it or must not."""

    ends: frozenset[int] = frozenset()  # any of these ends the response
    first: int | None = None  # forced as the first token (forced_bos_token_id)
    last: int | None = None  # forced where the response reaches its limit (forced_eos_token_id)
    banned: tuple[int, ...] = ()  # never
    banned_first: tuple[int, ...] = ()  # not as the first token that is not forced

    @classmethod
    def of(cls, writer: Writer, settings: Any = None) -> "Rules":
        """Read from model and tokenizer, or from a generation_config alone. What is not applied is logged."""
        sources = [settings]
        if settings is None:
            settings = writer.lm.generation_config
            sources = [settings, writer.lm.config, writer.response_tokenizer]
        ends = frozenset(token for source in sources for token in _ids(getattr(source, "eos_token_id", None)))
        bad_words = [tuple(words) for words in getattr(settings, "bad_words_ids", None) or []]
        banned = [words[0] for words in bad_words if len(words) == 1 and words[0] not in ends]
        ignored = [
            f"{name}={value}"
            for name, off in NOT_APPLIED.items()
            if (value := getattr(settings, name, None)) is not None and value != off
        ]
        ignored += [f"bad_words_ids={words}" for words in bad_words if len(words) > 1]
        if ignored:
            logger.warning("the generation_config of %s is not fully applied: %s", writer.lm.name_or_path, ignored)
        forced_last = _ids(getattr(settings, "forced_eos_token_id", None))
        return cls(
            ends=ends,
            first=getattr(settings, "forced_bos_token_id", None) if writer.lm.config.is_encoder_decoder else None,
            last=min(forced_last, default=None),
            banned=tuple(sorted({*banned, *_ids(getattr(settings, "suppress_tokens", None))})),
            banned_first=_ids(getattr(settings, "begin_suppress_tokens", None)),
        )

    def forced(self, position: int, limit: int) -> int | None:
        """The token that must stand at this position of a response of at most `limit` tokens, if any."""
        if position == limit - 1 and self.last is not None:
            return self.last
        return self.first if position == 0 else None


def _ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(int(token) for token in value)
