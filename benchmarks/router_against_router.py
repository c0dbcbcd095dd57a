"""Baton's router and smg, a router in Rust, side by side before the same workers: simulated ones, a prefill and two decode workers, which
both drive at the same time, each by its own protocol. Clients, routers and workers are processes of their own.

    direct        no router: the clients call the workers themselves, prefill leg and decode leg, with token ids
    smg           OpenAI's completions over HTTP; workers by vLLM's engine API
    baton-http    the same over HTTP; workers by Baton's own API
    baton-grpc    Baton's InferenceService over gRPC; workers by Baton's own API

All routers get text and give text, and every prompt is prefilled by one worker and decoded by another. (Over HTTP, a token without a text
of its own, one in nine here, is seen with the next.) Cells, in turn in each round, the fronts of each in another order each time:

    streams       so many streams at once of requests of many tokens, at several numbers of streams
    one_token     requests of one token: what a request costs
    latency       one request at a time, the fronts by turns: TTFT and ITL over those of `direct`

What a router costs is its process's CPU time, which does not depend on what else the machine does; throughput does, and where the workers
or the clients fill the machine's cores, no router can be seen in it: `workers_cpu` says how busy they were.

    python -m benchmarks.router_against_router [--rounds 3] [--plot docs/images/router_against_router.png]
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import baton
from baton.cli.ports import bind
from benchmarks.report import write_report
from benchmarks.router_load import Measured, quantile, running_router

TALES = Path(baton.__file__).parent / "models" / "tales"
MODEL = "tales"
SMG = Path(sys.executable).with_name("smg")
READY_S = 15.0
FRONTS = ("direct", "smg", "baton-http", "baton-grpc")


class Bench:
    """Everything that runs; `fronts` are those that answer."""

    def __init__(
        self,
        fronts: Mapping[str, Mapping[str, Any]],
        routers: Mapping[str, Measured],
        workers: Measured,
        load: "subprocess.Popen[str]",
    ) -> None:
        self.fronts = fronts
        self._routers = routers
        self._workers = workers
        self._load = load

    def ask(self, **job: Any) -> dict[str, Any]:
        """Has the clients do a job."""
        assert self._load.stdin is not None
        assert self._load.stdout is not None
        self._load.stdin.write(json.dumps(job) + "\n")
        self._load.stdin.flush()
        result: dict[str, Any] = json.loads(self._load.stdout.readline())
        return result

    def throughput(self, name: str, **job: Any) -> dict[str, float]:
        """One front under load: what the clients saw, and what it cost."""
        router = self._routers.get(name)
        before_s, workers_s = (router.cpu_s if router else 0.0), self._workers.cpu_s
        seen = self.ask(kind="throughput", fronts={name: self.fronts[name]}, **job)[name]
        cpu_s = (router.cpu_s if router else 0.0) - before_s
        requests, tokens = max(1, seen["requests"]), max(1, seen["tokens"])
        return {
            "requests": seen["requests"],
            "errors": seen["errors"],
            "tokens": seen["tokens"],
            "requests_per_s": round(seen["requests"] / seen["wall_s"], 1),
            "tokens_per_s": round(seen["tokens"] / seen["wall_s"], 1),
            "tokens_per_message": round(tokens / max(1, seen["messages"]), 2),
            "router_cpu_s_per_1000_tokens": round(cpu_s / tokens * 1000, 4),
            "router_cpu_s_per_1000_requests": round(cpu_s / requests * 1000, 4),
            "router_cpu": round(cpu_s / seen["wall_s"], 3),
            "workers_cpu": round((self._workers.cpu_s - workers_s) / seen["wall_s"], 3),
            **_milliseconds(seen),
        }

    def latency(self, **job: Any) -> dict[str, dict[str, float]]:
        """All fronts by turns."""
        seen = self.ask(kind="latency", fronts=self.fronts, **job)
        told = {name: _milliseconds(each) for name, each in seen.items()}
        direct = told["direct"]
        return {
            name: figures
            | {f"added_{key}": round(figures[key] - value, 3) for key, value in direct.items()}
            for name, figures in told.items()
        }


def _milliseconds(seen: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{name}_p{share * 100:.0f}_ms": round(quantile(seen[key], share) * 1e3, 3)
        for name, key in (("ttft", "ttft_s"), ("itl", "gaps_s"))
        for share in (0.5, 0.99)
    }


@contextmanager
def running_workers(router: Measured, args: argparse.Namespace) -> Iterator[tuple[Measured, Any]]:
    """See `benchmarks.processes.many_workers`; and their addresses by role."""
    command = [sys.executable, "-m", "benchmarks.processes.many_workers", "--router"]
    command += [router.address, "--prefill", "1", "--decode", "2", "--model", str(TALES)]
    command += ["--step-ms", str(args.step_ms)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            addresses = json.loads(process.stdout.readline())
            yield Measured(process, ""), addresses
        finally:
            process.stdin.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def running_smg(addresses: Mapping[str, Sequence[str]]) -> Iterator[Measured]:
    """With its defaults, but for its log."""
    port, metrics_port = free_ports(2)
    command = [str(SMG), "launch", "--pd-disaggregation", "--model-path", str(TALES)]
    for role in ("prefill", "decode"):
        for address in addresses[role]:
            command += [f"--{role}", f"grpc://{address}"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port)]
    with subprocess.Popen(
        [*command, "--log-level", "error"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield Measured(process, f"127.0.0.1:{port}")
        finally:
            process.kill()


@contextmanager
def running_load() -> Iterator["subprocess.Popen[str]"]:
    """The clients; see `benchmarks.processes.text_load`."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.processes.text_load",
        str(TALES / "tokenizer.json"),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        yield process
        process.stdin.close()


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    with ExitStack() as held:
        return [bind("127.0.0.1", 0, held) for _ in range(count)]


def answers(address: str) -> bool:
    """Whether completions are served over HTTP there, before long."""
    asked = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    request = urllib.request.Request(
        f"http://{address}/v1/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    end_s = time.monotonic() + READY_S
    while time.monotonic() < end_s:
        try:
            with urllib.request.urlopen(request, timeout=10):  # noqa: S310
                return True
        except OSError:  # an answer of another status, too
            time.sleep(0.1)
    return False


@contextmanager
def bench(args: argparse.Namespace) -> Iterator[Bench]:
    """Both routers and the workers, up."""
    http = f"127.0.0.1:{free_ports(1)[0]}"
    with ExitStack() as stack:
        own = stack.enter_context(
            running_router(
                model=TALES,
                max_running=4096,
                local_prefill_tokens=0,
                session_store="sqlite://",
                http_listen=http,
            )
        )
        workers, addresses = stack.enter_context(running_workers(own, args))
        smg = stack.enter_context(running_smg(addresses))
        fronts: dict[str, dict[str, Any]] = {
            "direct": {"kind": "direct", **addresses},
            "smg": {"kind": "http", "address": smg.address, "model": MODEL},
            "baton-http": {"kind": "http", "address": http, "model": MODEL},
            "baton-grpc": {"kind": "grpc", "address": own.address},
        }
        for name in args.fronts:
            if fronts[name]["kind"] == "http" and not answers(fronts[name]["address"]):
                raise SystemExit(f"{name} serves no completions after {READY_S:.0f} s")
        chosen = {name: fronts[name] for name in ("direct", *args.fronts)}
        routers = {"smg": smg, "baton-http": own, "baton-grpc": own}
        load = stack.enter_context(running_load())
        yield Bench(chosen, routers, workers, load)


def measure(here: Bench, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Each round's figures, by cell and front."""
    raw: dict[str, list[dict[str, Any]]] = {}
    cells = [(f"streams_{count}", count, args.new_tokens) for count in args.concurrency]
    cells.append(("one_token", args.one_token_concurrency, 1))
    for name in here.fronts:
        load = {"concurrency": 8, "prompt_words": args.prompt_words, "new_tokens": 16}
        here.throughput(name, seconds=1.0, **load)
    for _ in range(args.rounds):
        for cell, count, new_tokens in cells:
            figures = {}
            for name in random.sample(list(here.fronts), len(here.fronts)):
                figures[name] = here.throughput(
                    name,
                    seconds=args.seconds,
                    concurrency=count,
                    prompt_words=args.prompt_words,
                    new_tokens=new_tokens,
                )
                print(cell, name, figures[name], flush=True)
            raw.setdefault(cell, []).append(figures)
        raw.setdefault("latency", []).append(
            here.latency(
                requests=args.latency_requests,
                prompt_words=args.prompt_words,
                new_tokens=args.new_tokens,
            )
        )
        print("latency", raw["latency"][-1], flush=True)
    return raw


Summary = dict[str, dict[str, dict[str, float]]]


def summarize(raw: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]]) -> Summary:
    """Medians over the rounds, by cell and front."""
    return {
        cell: {
            name: {
                figure: round(statistics.median(each[name][figure] for each in rounds), 4)
                for figure in rounds[0][name]
            }
            for name in rounds[0]
        }
        for cell, rounds in raw.items()
    }


def ratios(summary: Summary) -> dict[str, dict[str, dict[str, float]]]:
    """Baton's fronts over smg: by cell, front and figure."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for cell, by_front in summary.items():
        smg = by_front.get("smg", {})
        for name, figures in by_front.items():
            if name.startswith("baton"):
                found.setdefault(cell, {})[name] = {
                    figure: round(value / smg[figure], 3)
                    for figure, value in figures.items()
                    if smg.get(figure) and not figure.startswith("added")
                }
    return found


def print_table(summary: Summary) -> None:
    """What the documentation shows."""
    columns = {
        "requests_per_s": "requests/s",
        "tokens_per_s": "tokens/s",
        "router_cpu_s_per_1000_tokens": "CPU s / 1,000 tokens",
        "router_cpu_s_per_1000_requests": "CPU s / 1,000 requests",
        "ttft_p50_ms": "TTFT p50 ms",
        "ttft_p99_ms": "p99",
        "itl_p50_ms": "ITL p50 ms",
        "itl_p99_ms": "p99",
        "added_ttft_p50_ms": "added TTFT p50 ms",
        "added_itl_p50_ms": "added ITL p50 ms",
    }
    print("\n| cell | front | " + " | ".join(columns.values()) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for cell, by_front in summary.items():
        for name in sorted(by_front):
            row = [f"{by_front[name][key]:g}" if key in by_front[name] else "" for key in columns]
            print(f"| {cell} | {name} | " + " | ".join(row) + " |")


def plot(path: Path, summary: Summary, counts: Sequence[int]) -> None:
    """Cost, throughput and TTFT over the number of streams."""
    # Only the plot needs it.
    from matplotlib.figure import Figure  # noqa: PLC0415

    shown = (
        ("router_cpu_s_per_1000_tokens", "router CPU s / 1,000 tokens"),
        ("tokens_per_s", "tokens/s"),
        ("ttft_p50_ms", "TTFT p50 [ms]"),
        ("itl_p99_ms", "ITL p99 [ms]"),
    )
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    axes = figure.subplots(1, len(shown))
    colors = {name: f"C{index}" for index, name in enumerate(FRONTS)}
    for axis, (key, label) in zip(axes, shown, strict=True):
        for name in sorted(summary[f"streams_{counts[0]}"]):
            if name == "direct" and key.startswith("router"):
                continue
            values = [summary[f"streams_{count}"][name][key] for count in counts]
            style = ":" if name == "direct" else "-"
            axis.plot(counts, values, marker="o", linestyle=style, color=colors[name], label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("streams")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    axes[1].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--fronts", nargs="+", choices=FRONTS[1:], default=FRONTS[1:])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.5, help="of each measurement")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--one-token-concurrency", type=int, default=32)
    parser.add_argument("--prompt-words", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--latency-requests", type=int, default=25, help="of each front")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/router_against_router.json")
    )
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    with bench(args) as here:
        raw = measure(here, args)
    summary = summarize(raw)
    print_table(summary)
    if args.plot is not None:
        plot(args.plot, summary, args.concurrency)
    settings = {k: v for k, v in vars(args).items() if k not in {"out", "plot"}}
    write_report(
        args.out,
        settings=settings,
        raw=dict(raw),
        summary={"medians": summary, "baton_over_smg": ratios(summary)},
    )


if __name__ == "__main__":
    main()
