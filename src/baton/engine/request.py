"""One prompt on its way to a response."""

from dataclasses import dataclass, field

from baton.engine.rules import Rules
from baton.engine.text import TextStream
from baton.errors import PromptError
from baton.models.adapter import Target
from baton.types import FinishReason, Output, Timings


@dataclass(eq=False, kw_only=True)
class Request:
    """What the engine knows about one row."""

    index: int  # place among the prompts of the call
    key: int  # its random numbers are those of this request number
    prompt: str
    prompt_ids: list[int]
    limit: int  # most response tokens
    stream: TextStream
    follow: bool  # decode text at every token, because of stop strings or someone who reads along
    tokens: list[int] = field(default_factory=list)  # response so far
    finish_reason: FinishReason | None = None

    def fit(self, target: Target, prompt_tokens: int) -> None:
        """Lower the limit to what the target has room for after so many prompt tokens.

        Raises:
            PromptError: there is room for none.
        """
        self.limit = target.room(prompt_tokens, self.limit)
        if self.limit < 1:
            raise PromptError(
                f"prompt {self.index} takes {prompt_tokens} of the {target.context} positions of the model that "
                "writes, which leaves none for a response: shorten it, or cut prompts with --truncate"
            )

    def append(self, token: int, rules: Rules) -> str:
        """Take one response token in, decide whether it is the last; returns the text it settles."""
        self.tokens.append(token)
        if token in rules.ends:
            self.finish_reason = "eos"
        elif len(self.tokens) == self.limit:
            self.finish_reason = "length"
        text = ""
        if self.finish_reason != "eos":
            if self.follow:
                text = self.stream.push(token)
            else:
                self.stream.hold(token)
        if self.finish_reason is not None and not self.stream.stopped:
            text += self.stream.finish()
        if self.stream.stopped:
            self.finish_reason = "stop"
        return text

    def output(self, timings: Timings) -> Output:
        assert self.finish_reason is not None
        return Output(
            prompt=self.prompt,
            text=self.stream.text,
            token_ids=self.tokens,
            finish_reason=self.finish_reason,
            timings=timings,
        )
