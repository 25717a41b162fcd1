"""One prompt on its way to a response."""

from dataclasses import dataclass, field

from baton.engine.rules import Rules
from baton.engine.text import TextStream
from baton.errors import PromptError
from baton.models.adapter import Target
from baton.types import FinishReason, Output, Sampling, Step, Timings


@dataclass(eq=False, kw_only=True)
class Request:
    """What the engine knows about one row. Drafters may read all of it, and change nothing."""

    index: int  # place among the prompts of the call
    key: int  # its random numbers are those of this request number
    prompt: str
    prompt_ids: list[int]
    context: list[int]  # the prompt in the target's vocabulary, for drafters; empty where it is not known in it
    sampling: Sampling
    limit: int  # most response tokens
    stream: TextStream
    follow: bool  # decode text at every token, because of stop strings or someone who reads along
    read: list[int] = field(default_factory=list)  # tokens that the target read before the response: for penalties
    tokens: list[int] = field(default_factory=list)  # response so far; the newest has not been read by the target
    sources: list[str] = field(default_factory=list)  # who wrote each
    steps: list[Step] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    finish_reason: FinishReason | None = None
    error: str = ""
    worthwhile: int | None = None  # draft nodes that will be verified at most; None: as many as there are

    @property
    def room(self) -> int:
        """How deep a draft may be: the target adds one token to whatever it accepts."""
        left = self.limit - len(self.tokens) - 1
        return left if self.worthwhile is None else min(left, self.worthwhile)

    def nodes(self, most: int) -> int:
        """How many nodes a draft should have, of a drafter that makes so many: what it makes beyond that is cut off."""
        return most if self.worthwhile is None else min(most, self.worthwhile)

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

    def append(self, token: int, source: str, rules: Rules) -> str:
        """Take one response token in, decide whether it is the last; returns the text it settles."""
        self.tokens.append(token)
        self.sources.append(source)
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

    def end(self, reason: FinishReason, error: str = "") -> None:
        """Stop before the response is complete."""
        self.finish_reason, self.error = reason, error
        if not self.stream.stopped:
            self.stream.finish()

    def output(self) -> Output:
        assert self.finish_reason is not None
        return Output(
            prompt=self.prompt,
            text=self.stream.text,
            token_ids=self.tokens,
            finish_reason=self.finish_reason,
            error=self.error,
            sources=self.sources,
            steps=self.steps,
            timings=self.timings,
        )
