"""Project: states of the LLM, [.., d_l], to vectors of the SLM's width, position by position."""

from torch import Tensor, nn


class Projector(nn.Module):
    """Linear, ReLU, Linear at every position independently (arXiv 2402.16844).

    Args:
        d_in: width of the states read; d_out: width of the SLM's embeddings.
        inner_width: width in between; 0 means d_out.
        bias: whether both maps have one.
        zero_init: last map starts at zero, so Z = 0 until the first step.
    """

    def __init__(self, d_in: int, d_out: int, *, inner_width: int = 0, bias: bool = True, zero_init: bool = True):
        super().__init__()
        inner = inner_width or d_out
        self.first = nn.Linear(d_in, inner, bias=bias)
        self.last = nn.Linear(inner, d_out, bias=bias)
        if zero_init:
            nn.init.zeros_(self.last.weight)
            if bias:
                nn.init.zeros_(self.last.bias)

    def forward(self, states: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out]."""
        return self.last(nn.functional.relu(self.first(states)))
