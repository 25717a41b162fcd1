"""Project: states of the LLM, [.., d_l], to vectors of the SLM's width, position by position."""

import torch
from torch import Tensor, nn

from baton.errors import UnknownOption


class Projector(nn.Module):
    """Linear, ReLU, Linear at every position independently (arXiv 2402.16844).

    Args:
        d_in: width of the states read; d_out: width of the SLM's embeddings.
        inner_width: width in between; 0 means d_out.
        bias: whether both maps have one.
        zero_init: last map starts at zero, so Z = 0 until the first step.
        identity_init: starts as Z = H, exactly: for an SLM that is at home in the LLM's states already.
    Raises: UnknownOption where the widths do not allow the identity.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        inner_width: int = 0,
        bias: bool = True,
        zero_init: bool = True,
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        inner = inner_width or d_out
        self.first = nn.Linear(d_in, inner, bias=bias)
        self.last = nn.Linear(inner, d_out, bias=bias)
        if identity_init:
            if d_in != d_out or inner < 2 * d_in:
                raise UnknownOption(
                    f"identity_init needs an LLM and an SLM of one width, and twice that in between: theirs are {d_in} "
                    f"and {d_out}, inner_width is {inner}"
                )
            same = torch.eye(d_in)
            with torch.no_grad():  # x = relu(x) - relu(-x); the other units start random, and unheard
                self.first.weight[: 2 * d_in] = torch.cat([same, -same])
                self.last.weight[:] = torch.cat([same, -same, torch.zeros(inner - 2 * d_in, d_in)]).T
                if bias:
                    self.first.bias[: 2 * d_in] = 0
                    self.last.bias.zero_()
        elif zero_init:
            nn.init.zeros_(self.last.weight)
            if bias:
                nn.init.zeros_(self.last.bias)

    def forward(self, states: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out]."""
        return self.last(nn.functional.relu(self.first(states)))
