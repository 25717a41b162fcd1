"""From tokens to text, as tokens come: whole characters only, and nothing that a stop string may still take back."""

from typing import Any


class TextStream:
    """The text of one response.

    Its pieces, joined, are the text that decoding all tokens at once gives, cut before the first stop string.

    Args:
        tokenizer: decodes responses; special tokens are left out.
        stop: strings that end the response.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.text = ""  # decoded for good
        self.stopped = False  # a stop string was found; `text` ends before it
        self._sent = 0  # characters of `text` given out
        self._ids: list[int] = []
        # Text is decoded from a window that starts before what is new: what a token adds can depend on the one before.
        self._start = 0
        self._read = 0

    def push(self, token: int) -> str:
        """Take one token in; returns what can be given out now, possibly nothing."""
        self._ids.append(token)
        if self._is_byte(token):  # until a run of bytes ends, it is not known what characters it makes
            return ""
        known = self._decode(self._ids[self._start : self._read])
        window = self._decode(self._ids[self._start :])
        if len(window) <= len(known) or window.endswith("\ufffd"):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._add(window[len(known) :])

    def hold(self, token: int) -> None:
        """Take one token in without decoding; `finish` will."""
        self._ids.append(token)

    def finish(self) -> str:
        """No token follows; returns the rest of the text."""
        sent = self._sent
        if not self.stopped:
            whole = self._decode(self._ids)
            if whole.startswith(self.text):
                self._add(whole[len(self.text) :])
        self._sent = len(self.text)
        return self.text[sent:]

    def _add(self, piece: str) -> str:
        searched = len(self.text)
        self.text += piece
        found = [self.text.find(stop, max(0, searched - len(stop) + 1)) for stop in self.stop]
        cut = min((at for at in found if at >= 0), default=None)
        if cut is not None:
            self.text, self.stopped = self.text[:cut], True
        end = len(self.text) - (0 if self.stopped else self._held())
        given, self._sent = self.text[self._sent : end], max(end, self._sent)
        return given

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max(map(len, self.stop), default=0)
        for size in range(min(longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self.stop):
                return size
        return 0

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _is_byte(self, token: int) -> bool:
        name = self.tokenizer.convert_ids_to_tokens(token)
        return isinstance(name, str) and len(name) == 6 and name.startswith("<0x")
