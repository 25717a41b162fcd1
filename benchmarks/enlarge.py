"""The same model at the cost of a larger one: what a method yields where a step is the reading of many weights.

    python benchmarks/enlarge.py models/pycode-target out/pycode-110m --parameters 110e6

Feed-forward parts of a Llama-like model are widened. What is added is read and multiplied like the rest, and then
weighed by zero: every text stays what it was, token for token, so acceptance is that of the small model, and time is
that of a model too large for a processor's caches.
"""

import argparse
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

STEP = 64  # widths stay multiples of what vector units take


def widen(model: nn.Module, parameters: int) -> int:
    """Widen all feed-forward parts until a model has so many parameters.

    Returns: the new inner width.
    """
    config = model.config
    missing = parameters - sum(weight.numel() for weight in model.parameters())
    more = max(0, round(missing / (3 * config.hidden_size * config.num_hidden_layers) / STEP)) * STEP
    for layer in model.model.layers:
        mlp = layer.mlp
        for name in ("gate_proj", "up_proj"):
            part = getattr(mlp, name)
            rows = torch.arange(more) % len(part.weight)
            part.weight = nn.Parameter(torch.cat([part.weight, part.weight[rows]]))
            part.out_features = len(part.weight)
        zeros = torch.zeros((config.hidden_size, more), dtype=mlp.down_proj.weight.dtype)
        mlp.down_proj.weight = nn.Parameter(torch.cat([mlp.down_proj.weight, zeros], 1))
        mlp.down_proj.in_features = mlp.down_proj.weight.shape[1]
    config.intermediate_size += more
    return int(config.intermediate_size)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Llama-like model: a folder or a Hub id")
    parser.add_argument("out", type=Path)
    parser.add_argument("--parameters", type=float, default=110e6)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    width = widen(model, int(args.parameters))
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    prompts = Path(args.model) / "prompts.jsonl"
    if prompts.exists():
        shutil.copy(prompts, args.out)
    size = sum(weight.numel() for weight in model.parameters())
    print(f"{args.out}: {size / 1e6:,.0f} M parameters, feed-forward parts {width:,} wide")


if __name__ == "__main__":
    main()
