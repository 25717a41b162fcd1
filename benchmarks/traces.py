"""Many sampled answers to one prompt: do drafts get better from one to the next?

    python benchmarks/traces.py                 into benchmarks/results/traces.json

For each prompt of the suite `math`, sixteen answers one after the other: tokens per step of the first of them, and of
the sixteenth, with tables that answers of one prompt share, and without.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path

from rich.progress import track

from baton.bench.suites import read_suite
from baton.engine import Engine, generate
from baton.machine import machine, revision
from baton.models.loading import load
from baton.types import Sampling

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("stand:shared=true", "stand", "token-recycling:shared=true", "prompt-lookup")
TRACES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "pycode-target"))
    parser.add_argument("--suite", default="math")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "traces.json")
    args = parser.parse_args()
    writer = load(args.model)
    prompts = [task.prompt for task in read_suite(args.suite).tasks[: args.prompts]]
    sampling = Sampling(temperature=args.temperature, top_p=0.95)
    lengths: dict[str, list[float]] = {}
    for method in METHODS:
        # Per trace, emitted tokens and steps of all prompts; an engine per prompt, so that nothing else is shared.
        emitted, steps = [0] * TRACES, [0] * TRACES
        for prompt in track(prompts, description=method):
            engine = Engine(writer, method, max_rows=1)
            for trace in range(TRACES):
                (output,) = generate(
                    engine, prompt, sampling=sampling, max_new_tokens=args.tokens, first_index=trace, truncate=True
                )
                emitted[trace] += sum(step.emitted for step in output.steps)
                steps[trace] += len(output.steps)
        lengths[method] = [e / s for e, s in zip(emitted, steps, strict=True)]
    result = {
        "tokens_per_step": lengths,
        "first": {method: each[0] for method, each in lengths.items()},
        "all": {method: statistics.fmean(each) for method, each in lengths.items()},
        "last": {method: each[-1] for method, each in lengths.items()},
        "settings": {k: str(v) for k, v in vars(args).items() if k not in ("json", "model")},
        "machine": machine(),
        "git": revision(),
        "command": shlex.join(["python", "benchmarks/traces.py", *sys.argv[1:]]),
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for method, each in lengths.items():
        print(f"{method}: {each[0]:.2f} tokens per step in the first answer, {each[-1]:.2f} in the last")


if __name__ == "__main__":
    main()
