"""Does the tuner find the fastest method? Its choice against all candidates, measured in full, on three workloads.

    python benchmarks/tuner.py --seconds 30 --json benchmarks/results/tuner.json

The choice is good where it is within 5 % of the best candidate of the exhaustive run, which writes every prompt with
every candidate.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from baton.bench.decode import bench_decode
from baton.bench.suites import read_suite
from baton.bench.tune import CANDIDATES, WITH_SMALL_MODEL, tune
from baton.machine import machine, revision, versions
from baton.models.loading import load

ROOT = Path(__file__).resolve().parents[1]
# suite, target, small model
WORKLOADS = [
    ("code", "pycode-target", "pycode-draft"),
    ("edit", "pycode-target", "pycode-draft"),
    ("translate", "en-de-llm", None),
]
CLOSE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30, help="of each race")
    parser.add_argument("--limit", type=int, default=30, help="prompts of each exhaustive run")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    found = []
    for name, target, small in WORKLOADS:
        writer = load(ROOT / "models" / target)
        assistant = str(ROOT / "models" / small) if small else None
        suite = read_suite(name, tokenizer=writer.prompt_tokenizer)
        tuning = tune(writer, suite, assistant=assistant, seconds=args.seconds, max_new_tokens=args.max_new_tokens)
        specs = [*CANDIDATES, *(f"draft-model:model={assistant},{rest}" for rest in WITH_SMALL_MODEL if assistant)]
        full = bench_decode(
            writer,
            [suite.first(args.limit)],
            methods=specs,
            max_new_tokens=args.max_new_tokens,
            batch_sizes=[1],
        ).to_dict()
        speeds = {s["contender"]: s["speedup"] for s in full["summaries"]}
        best = max(speeds, key=lambda spec: speeds[spec])
        behind = 1 - speeds[tuning.winner] / speeds[best]
        short = {spec: spec.replace(f"{ROOT}/", "") for spec in speeds}
        found.append(
            {
                "suite": name,
                "model": f"models/{target}",
                "winner": short[tuning.winner],
                "best": short[best],
                "behind": behind,
                "close": behind <= CLOSE,
                "speedups": {short[spec]: speed for spec, speed in speeds.items()},
                "race": [{"method": short[s.method], "groups": s.groups, "left": s.left} for s in tuning.standings],
            }
        )
        print(f"{name}: chose {short[tuning.winner]}, {behind:.1%} behind {short[best]} ({speeds[best]:.2f}x)")
    report = {
        "workloads": found,
        "settings": vars(args)
        | {"json": str(args.json), "command": shlex.join(["python", *sys.argv]), "git": revision()},
        "machine": machine(),
        "versions": versions("torch", "transformers", "baton-decoding"),
    }
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
