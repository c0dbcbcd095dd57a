"""Whether `baton bench` measures what AIPerf measures: both put the same load on the same OpenAI endpoint, in turn, and are compared.

The load is chats of fixed lengths, streamed, with `ignore_eos`, closed-loop and at a fixed rate. The server is `baton serve` with a
simulated engine whose steps take time rather than cores, and with loads under which no request waits for another: where they queue, a
generator that comes a millisecond later changes who waits for whom. It has one half of the cores, the generators the other. `--url` names
another server. Figures are the medians of the rounds; means, medians and throughput must agree within 5 %, and p90 is told beside them.

    python -m benchmarks.bench_against_aiperf --aiperf ~/aiperf/bin/aiperf

Without --aiperf, AIPerf is installed into an environment of its own first: about 1.2 GB.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from baton.cli.config import shipped_model
from benchmarks.report import write_report
from benchmarks.split_cost import serving

AIPERF = "aiperf==0.13.0"
ALLOWED = 0.05
LOADS = {
    "closed": {"aiperf": ["--concurrency"], "baton": ["--concurrency"]},
    "fixed rate": {
        "aiperf": ["--arrival-pattern", "constant", "--request-rate"],
        "baton": ["--fixed-rate", "--rate"],
    },
}
LATENCIES = {"ttft": "time_to_first_token", "itl": "inter_token_latency", "e2e": "request_latency"}
STATISTICS = {"mean": "avg", "p50": "p50", "p90": "p90"}
RATES = {
    "requests_per_s": "request_throughput",
    "output_tokens_per_s": "output_token_throughput",
}
LENGTHS = {"input_lengths": "input_sequence_length", "output_lengths": "output_sequence_length"}


def installed_aiperf(directory: Path) -> str:
    """AIPerf in an environment of its own, made where it is not there."""
    command = directory / "bin" / "aiperf"
    if not command.exists():
        print(f"installing {AIPERF} into {directory}")
        venv.create(directory, with_pip=True)
        subprocess.run([directory / "bin" / "pip", "install", "-q", AIPERF], check=True)
    return str(command)


@contextmanager
def endpoint(args: argparse.Namespace) -> Iterator[str]:
    """The server's URL."""
    if args.url:
        yield args.url
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _, port = free.getsockname()
    address = f"127.0.0.1:{port}"
    flags = ["--engine", "sim", "--step-ms", str(args.step_ms), "--transport", "memory"]
    flags += ["--max-batch-tokens", str(args.chunk_tokens), "--no-prefix-cache"]
    # AIPerf is a dozen processes: on the server's cores they would slow down what they measure.
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    os.sched_setaffinity(0, cores[:half])
    with serving(*flags, "--http", address):
        os.sched_setaffinity(0, cores[half:] or cores)
        yield f"http://{address}"


def level_of(args: argparse.Namespace, load: str) -> str:
    """As both commands take it."""
    return f"{args.concurrency if load == 'closed' else args.rate:g}"


def run_aiperf(args: argparse.Namespace, url: str, load: str, seed: int) -> dict[str, float]:
    """Its figures, latencies in milliseconds."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            args.aiperf,
            "profile",
            *("--model", args.model, "--url", url, "--tokenizer", args.tokenizer),
            *("--endpoint-type", "chat", "--streaming", "--use-server-token-count"),
            *("--isl", str(args.isl), "--osl", str(args.osl)),
            *("--extra-inputs", "ignore_eos:true"),
            *(*LOADS[load]["aiperf"], level_of(args, load), "--request-count", str(args.requests)),
            *("--warmup-request-count", str(args.warm_up), "--random-seed", str(seed)),
            *("--output-artifact-dir", directory, "--ui", "none"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(Path(directory).rglob("profile_export_aiperf.json"))
        if not found:
            raise SystemExit(f"AIPerf failed:\n{done.stdout}\n{done.stderr}")
        exported = json.loads(found[0].read_text())
    figures = {
        f"{name}_{ours}_ms": exported[theirs][key]
        for name, theirs in LATENCIES.items()
        for ours, key in STATISTICS.items()
    }
    figures |= {name: exported[theirs]["avg"] for name, theirs in RATES.items()}
    return figures | {name: exported[theirs]["avg"] for name, theirs in LENGTHS.items()}


def run_baton(args: argparse.Namespace, url: str, load: str, seed: int) -> dict[str, float]:
    """Its figures, latencies in milliseconds."""
    command = [
        *(sys.executable, "-m", "baton", "bench", "--url", url, "--model", args.model),
        *("--tokenizer", args.tokenizer, "--isl", str(args.isl), "--osl", str(args.osl)),
        *(*LOADS[load]["baton"], level_of(args, load), "--requests", str(args.requests)),
        *("--warmup", str(args.warm_up), "--seed", str(seed), "--json", "-"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)["levels"][0]["figures"]
    assert found["answered"] == args.requests, found["errors"]
    figures = {
        f"{name}_{key}_ms": 1e3 * found[f"{name}_s"][key]
        for name in LATENCIES
        for key in STATISTICS
    }
    figures |= {name: found[name] for name in RATES}
    return figures | {name: found[name]["mean"] for name in LENGTHS}


def compared(
    rounds: Mapping[str, Sequence[Mapping[str, float]]],
) -> dict[str, dict[str, float]]:
    """Medians of both, and how far Baton's is from AIPerf's."""
    table = {}
    for name in rounds["aiperf"][0]:
        aiperf, baton = (statistics.median(r[name] for r in rounds[k]) for k in ("aiperf", "baton"))
        table[name] = {
            "aiperf": round(aiperf, 3),
            "baton": round(baton, 3),
            "difference": round(baton / aiperf - 1, 4),
        }
    return table


def main() -> None:
    """Measures in turn, prints, writes; exit code 1 where they do not agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--aiperf", default=None, help="the command; default: installed")
    parser.add_argument("--environment", type=Path, default=Path(".tools/aiperf"))
    parser.add_argument("--url", default=None, help="default: a server of its own")
    parser.add_argument("--model", default="tales")
    parser.add_argument("--tokenizer", default=str(shipped_model()))
    parser.add_argument("--step-ms", type=float, default=25.0)
    parser.add_argument("--chunk-tokens", type=int, default=128, help="of prefill, in a step")
    parser.add_argument("--isl", type=int, default=1500)
    parser.add_argument("--osl", type=int, default=32)
    parser.add_argument("--requests", type=int, default=25)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1.7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/bench_against_aiperf.json")
    )
    args = parser.parse_args()
    args.aiperf = args.aiperf or installed_aiperf(args.environment)
    tools = {"aiperf": run_aiperf, "baton": run_baton}
    raw: dict[str, dict[str, list[dict[str, float]]]] = {
        load: {tool: [] for tool in tools} for load in LOADS
    }
    with endpoint(args) as url:
        for number in range(args.rounds):
            for load in LOADS:
                for tool in sorted(tools, reverse=bool(number % 2)):
                    raw[load][tool].append(tools[tool](args, url, load, number))
                    print(f"round {number + 1}: {load}, {tool}")
    summary = {load: compared(rounds) for load, rounds in raw.items()}
    for load, table in summary.items():
        print(f"\n{load:22} {'AIPerf':>10} {'baton bench':>12} {'difference':>11}")
        for name, row in table.items():
            print(f"{name:22} {row['aiperf']:10.2f} {row['baton']:12.2f} {row['difference']:11.1%}")
    worst = max(
        abs(row["difference"])
        for table in summary.values()
        for name, row in table.items()
        if "p90" not in name
    )
    print(f"\nthe largest difference of means, medians and throughput is {worst:.1%}")
    write_report(
        args.out,
        settings={
            k: Path(v).name if k == "tokenizer" else str(v)
            for k, v in vars(args).items()
            if k not in ("out", "aiperf", "environment")
        },
        raw=raw,
        summary=summary | {"largest_difference": worst},
    )
    sys.exit(worst > ALLOWED)


if __name__ == "__main__":
    main()
