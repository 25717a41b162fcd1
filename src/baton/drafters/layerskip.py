"""LayerSkip: the target drafts with its own first layers, and checks with the others.

Source: arXiv 2404.16710. Lossless: yes. Training: the target's, with layer dropout and losses after early layers
(`baton.train.layerskip`; published for Llama 2, Llama 3 and Code Llama); any other target drafts badly. Memory: none.
Draft cost: exit_layer layers and the output head per token; the check goes on from what they left.
Helps where the target was trained so and there is no room for a second model.

Unlike the paper's code: when sampling, the exit's most probable tokens are proposed and the text is that of plain
decoding token for token; sample=true draws them and tests p/q as the paper does. Where nothing can be drafted any
more, the step is a plain one. Rows of a batch draft together, and each stops where it must; min_confidence is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.draft import Draft
from baton.drafters.parts.early_exit import EarlyExit
from baton.engine.drafter import at_least
from baton.engine.request import Request
from baton.errors import UnknownOption

if TYPE_CHECKING:
    from baton.engine.loop import Engine


@dataclass(kw_only=True)
class LayerSkip(EarlyExit):
    exit_layer: int = 0  # layers that draft; 0: what the model names (assistant_early_exit), or a quarter of all
    num_draft_tokens: int = 6  # most tokens proposed per decode step
    min_confidence: float = 0.0  # a chain ends behind a token that the exit gives a smaller probability
    name = "layerskip"

    def __post_init__(self) -> None:
        at_least(self, exit_layer=0, num_draft_tokens=1)

    def attach(self, engine: "Engine") -> None:
        super().attach(engine)
        named = getattr(engine.target.model.generation_config, "assistant_early_exit", None)
        self.exit = self.exit_layer or named or max(1, round(self.depth / 4))
        if not 0 < self.exit < self.depth:
            raise UnknownOption(
                f"{self.name}: exit_layer={self.exit} is not possible: a model of {self.depth} layers can be left "
                f"after layer 1 to {self.depth - 1}"
            )

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        depths = [min(self.num_draft_tokens, request.room) for request in requests]
        return self.chains(requests, self.exit, depths, [self.min_confidence] * len(requests))[0]
