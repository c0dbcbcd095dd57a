"""The benchmark of the engine: what it computes from samples, and how it starts other engines."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from baton.cli.config import shipped_model
from baton.engine.config import load_model_config
from baton.engine.engine import PagedEngine
from benchmarks.engine import results
from benchmarks.engine.cells import cells
from benchmarks.engine.checkpoints import Checkpoint
from benchmarks.engine.environments import make_environment
from benchmarks.engine.limits import Limits, parameters, work
from benchmarks.engine.options import chosen, parse
from benchmarks.engine.peers import PEERS
from benchmarks.engine.processes import Process, Runner, RunnerError
from benchmarks.engine.protocol import Cell, percentile, stretches
from benchmarks.engine.report import contenders_of, markdown, rows
from benchmarks.engine.results import Contender, Results, Sample
from benchmarks.engine.rounds import turns
from benchmarks.engine.runners.llamacpp import Tools
from benchmarks.engine.sections import Clocks
from benchmarks.engine.stepping import SteppedMeasure

LIMITS = Limits(
    memory_bytes_per_s=50e9,
    memory_bytes_per_s_one_thread=30e9,
    cache_bytes_per_s=200e9,
    cache_bytes=32 << 20,
    gemm_per_s={"bf16": 800e9, "int8": 1600e9, "f32": 400e9},
    gemm_per_s_one_thread={"bf16": 400e9, "int8": 800e9, "f32": 200e9},
)
DECODE = Cell(kind="decode", batch=4, context=128, repetitions=2, steps=16)
READY = Cell(kind="ready")
MODEL = load_model_config(shipped_model())


def sample(
    peer: str, tokens_per_s: float, *, number: int = 0, cell: Cell = DECODE, run: int = 0
) -> Sample:
    tokens = 0 if cell.kind == "ready" else 64
    return Sample(
        shape="tiny",
        cell=cell,
        contender=Contender(peer, "int8" if peer == "ctranslate2" else "bf16"),
        run=run,
        round=number,
        seconds=[tokens / tokens_per_s if tokens else tokens_per_s],
        tokens=tokens,
        peak_rss_bytes=500_000_000,
        limits=LIMITS,
        least_s=0.008 if tokens else None,
    )


def test_a_small_model_is_bound_by_the_cache_and_a_prompt_by_its_products() -> None:
    """A step's least time counts weights and KV once, at the bandwidth of where they fit; a prompt's, its multiplications."""
    layers, head = parameters(MODEL)
    step = work(DECODE, MODEL, "bf16")
    prompt = work(Cell(kind="prefill", context=1024), MODEL, "bf16")
    assert step is not None
    assert prompt is not None
    assert step.bytes / DECODE.steps > 2 * (layers + head)
    assert step.least_s(LIMITS, "bf16") == pytest.approx(step.bytes / 200e9)
    assert prompt.least_s(LIMITS, "bf16") == pytest.approx(prompt.flops / 800e9)
    assert prompt.flops > 2 * layers * 1024
    assert work(READY, MODEL, "bf16") is None


def test_cells_fit_the_models_context() -> None:
    """A model of 2,048 positions is not asked for prompts that it cannot hold."""
    names = [cell.name for cell in cells(MODEL)]
    assert "decode b32 ctx 128" in names
    assert "decode b8 ctx 1024" in names
    assert not [name for name in names if "4096" in name or "2048" in name]


def test_cells_are_chosen_by_the_beginnings_of_their_names() -> None:
    assert [cell.name for cell in chosen(cells(MODEL), ["decode b1 ", "ready "])] == [
        "decode b1 ctx 128",
        "decode b1 ctx 1024",
        "ready",
    ]


def test_the_table_has_medians_ratios_and_shares() -> None:
    """Baton is compared with the best of the same format and with the best of all, round by round."""
    samples = [
        *(sample("baton", rate, number=n) for n, rate in enumerate((300.0, 330.0, 360.0))),
        *(sample("vllm", rate, number=n) for n, rate in enumerate((200.0, 220.0, 240.0))),
        *(sample("ctranslate2", rate, number=n) for n, rate in enumerate((600.0, 660.0, 720.0))),
        sample("baton", 2.0, cell=READY),
        sample("vllm", 60.0, cell=READY),
    ]
    decode, ready = rows(samples, "tiny")
    assert decode.ratio("bf16") == pytest.approx(1.5)
    assert decode.ratio(None) == pytest.approx(0.5)
    assert decode.ratio("f32") is None
    assert ready.ratio("bf16") == pytest.approx(30.0)
    lines = markdown(samples).splitlines()
    assert "|  | baton bf16 | ctranslate2 int8 | vllm bf16 | ratio, bf16 | ratio, best |" in lines
    assert "| decode b4 ctx 128 | 330 (4%) | **660** (8%) | 220 (3%) | 1.50 | 0.50 |" in lines
    assert "| ready | **2.0 s** | - | 60.0 s | 30.00 | 30.00 |" in lines
    assert "| peak memory, MB | 500 | 500 | 500 |  |  |" in lines
    assert contenders_of(samples)[0].peer == "baton"


def test_results_survive_the_file_and_a_later_run_replaces_what_it_measures(tmp_path: Path) -> None:
    """A cell that is measured again loses its old samples; all others stay."""
    path = tmp_path / "engine.json"
    taken = Results(runs=[{"command": "first"}, {"command": "second"}])
    for number in range(2):
        taken.add(sample("baton", 300.0, number=number))
        taken.add(sample("vllm", 200.0, number=number))
    taken.add(sample("baton", 400.0, run=1))
    results.save(path, taken)
    assert results.load(path) == taken
    assert [(s.contender.peer, s.round, s.run) for s in taken.samples] == [
        ("vllm", 0, 0),
        ("vllm", 1, 0),
        ("baton", 0, 1),
    ]
    taken.add(sample("baton", 300.0, cell=replace(DECODE, profile=True), run=1))
    assert taken.has("tiny", DECODE, Contender("baton", "bf16"), 0)
    assert not taken.has("tiny", DECODE, Contender("baton", "bf16"), 1)


def test_everybody_has_a_turn_in_every_round_and_nobody_is_always_first() -> None:
    who = [Contender("baton", "bf16"), Contender("vllm", "bf16")]
    cold = Cell(kind="ready-cold")
    taken = [(t.number, t.cell.kind, t.contender.peer) for t in turns(who, [DECODE, cold], 2)]
    assert taken == [
        (0, "decode", "baton"),
        (0, "decode", "vllm"),
        (0, "ready-cold", "baton"),
        (0, "ready-cold", "vllm"),
        (1, "decode", "vllm"),
        (1, "decode", "baton"),
    ]


def test_peers_start_their_own_runners_in_their_own_environments(tmp_path: Path) -> None:
    """The command names the interpreter, the converted weights and their format; threads are the cores'."""
    model = Checkpoint(name="tiny", directory=tmp_path / "checkpoints" / "tiny", config=MODEL)
    commands = {}
    for name, peer in PEERS.items():
        made = peer(cache=tmp_path, cores=(0, 2))
        commands[name] = made.command(model, next(iter(made.formats)))
        assert commands[name][1:5] == ["-m", f"benchmarks.engine.runners.{name}", "--threads", "2"]
    assert commands["baton"][0] == commands["llamacpp"][0] == sys.executable
    assert commands["vllm"][0] == str(tmp_path / "vllm" / "bin" / "python")
    assert commands["vllm"][5:] == ["--model", str(model.directory), "--format", "bfloat16"]
    assert str(tmp_path / "converted" / "tiny-bf16.gguf") in commands["llamacpp"]
    assert "--format" in commands["llamacpp"]
    assert str(tmp_path / "converted" / "tiny-ct2-int8") in commands["ctranslate2"]
    vllm = PEERS["vllm"](cache=tmp_path, cores=(0, 2)).environment(tmp_path)
    assert vllm["VLLM_CPU_OMP_THREADS_BIND"] == "0,2"
    assert "OMP_NUM_THREADS" not in vllm


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run of the same steps installs nothing; changed steps do."""
    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command[3:]))
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    for version in ("1", "1", "2"):
        assert make_environment(tmp_path, ["install", f"torch=={version}"]) == python
    assert ran == [["-q", "install", "torch==1"], ["-q", "install", "torch==2"]]


class FakeStepper:
    """Computes one prompt in two steps, then a token per step and stream."""

    vocab_size = 100

    def __init__(self) -> None:
        self.chunk: int | None = None
        self.left: dict[str, int] = {}
        self.prompts: set[tuple[int, ...]] = set()
        self.computing: list[str] = []

    def use_chunk(self, tokens: int | None) -> None:
        self.chunk = tokens

    def add(self, request: str, prompt: Sequence[int], max_tokens: int) -> None:
        self.left[request] = max_tokens
        self.prompts.add(tuple(prompt))
        self.computing.append(request)

    def step(self) -> list[tuple[str, int]]:
        waiting = set(self.computing)
        if self.computing:
            self.computing.pop(0)
        out = [name for name in self.left if name not in waiting]
        for name in out:
            self.left[name] -= 1
        self.left = {name: left for name, left in self.left.items() if left}
        return [(name, 1) for name in out]

    def abort(self, request: str) -> None:
        self.left.pop(request, None)


def test_a_stepped_engine_is_timed_while_all_streams_decode() -> None:
    """Repetitions hold a token per step and stream each; nothing runs on afterwards, and no prompt comes twice."""
    stepper = FakeStepper()
    measure = SteppedMeasure(stepper)
    prefill = measure(Cell(kind="prefill", context=20, repetitions=3))
    decode = measure(DECODE)
    mixed = Cell(
        kind="mixed", batch=2, context=20, chunk=64, interval_s=1e-6, repetitions=3, steps=2
    )
    loaded = measure(mixed)
    assert (len(prefill.seconds), prefill.tokens) == (3, 20)
    assert (len(decode.seconds), decode.tokens) == (2, 64)
    assert all(seconds > 0 for seconds in [*prefill.seconds, *decode.seconds])
    assert stepper.chunk == 64
    assert not stepper.left
    assert len(stepper.prompts) == 1 + 3 + 4 + 2 + 3
    # Three prompts of 20 tokens, with two tokens each, beside two streams.
    assert loaded.tokens == 3 * 22 + len(loaded.gaps_s)
    assert loaded.gaps_s


def test_stretches_begin_with_the_first_token() -> None:
    assert stretches([1.0, 2.0, 3.0, 5.0, 7.0], 2) == [2.0, 4.0]
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0


RUNNER = """
import sys
from collections.abc import Sequence
from dataclasses import replace
sys.path.insert(0, {root!r})
from benchmarks.engine.protocol import Answer, serve
print("a library's chatter")
def measure(cell):
    print("more of it")
    if cell.context == 13:
        raise ValueError("unlucky")
    return Answer(seconds=[0.5], tokens=cell.context)
serve(int(sys.argv[-1]), measure)
"""


def runner(tmp_path: Path) -> Runner:
    root = str(Path(__file__).parents[2])
    return Runner([sys.executable, "-c", RUNNER.format(root=root)], {}, tmp_path / "runner.log")


def test_a_runner_answers_cells_and_its_chatter_goes_to_the_log(tmp_path: Path) -> None:
    with runner(tmp_path) as one:
        answer = one.measure(Cell(kind="prefill", context=7))
        assert (answer.seconds, answer.tokens) == ([0.5], 7)
        assert one.ready_s > 0
        with pytest.raises(RunnerError, match="unlucky"):
            one.measure(Cell(kind="prefill", context=13))
    assert "chatter" not in json.dumps(answer.seconds)


def test_a_runner_that_does_not_answer_is_told_of(tmp_path: Path) -> None:
    """Every wait is bounded."""
    silent = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with (
        Process(silent, {}, tmp_path / "silent.log") as process,
        pytest.raises(RunnerError, match="no answer"),
    ):
        process.ask({}, 0.05)


def test_the_command_line_takes_a_part() -> None:
    args = parse(
        ["--shapes", "tiny", "--peers", "baton", "vllm", "--cells", "decode", "--rounds", "1"], None
    )
    assert (args.shapes, args.peers, args.cells, args.rounds) == (
        ["tiny"],
        ["baton", "vllm"],
        ["decode"],
        1,
    )


def test_every_second_counts_for_the_innermost_section() -> None:
    """What a section spends in another one is the other's."""
    clocks = Clocks()
    inner = clocks.around("inner", lambda: sum(range(200_000)))
    outer = clocks.around("outer", lambda: inner() and inner())
    outer()
    assert set(clocks.seconds) == {"inner", "outer"}
    assert clocks.seconds["inner"] > clocks.seconds["outer"] > 0


def test_the_seams_of_the_profile_are_the_engines() -> None:
    """A seam that is renamed fails here, and not in an hour of measuring; each is put back afterwards."""
    before = PagedEngine.step
    with Clocks().standing():
        assert PagedEngine.step is not before
    assert PagedEngine.step is before


LLAMA_BENCH = """#!/bin/sh
echo "$@" >> "$0.calls"
echo '[{"n_prompt": 512, "samples_ns": [ 500000000, 250000000 ]}]'
"""
LLAMA_BATCHED_BENCH = """#!/bin/sh
echo "$@" >> "$0.calls"
printf '\\n{"pp": 128, "tg": 32, "pl": 4, "t_pp": 9.5, "t_tg": 1.25}\\n\\n'
"""


def test_llama_cpps_own_benchmarks_are_asked_and_understood(tmp_path: Path) -> None:
    """A prompt's samples come one by one; a decode cell's repetitions are one stretch, with room for all its tokens."""
    for name, text in (("llama-bench", LLAMA_BENCH), ("llama-batched-bench", LLAMA_BATCHED_BENCH)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    tools = Tools(directory=tmp_path, model="m.gguf", threads=2)
    tools.ready()
    prefill = tools(Cell(kind="prefill", context=512, repetitions=2))
    decode = tools(DECODE)
    assert (prefill.seconds, prefill.tokens) == ([0.5, 0.25], 512)
    assert (decode.seconds, decode.tokens) == ([1.25], 2 * 16 * 4)
    ready, prompt = (tmp_path / "llama-bench.calls").read_text().splitlines()
    assert ready == "-m m.gguf -t 2 -p 0 -n 0 -pg 16,1 -r 1 --no-warmup"
    assert prompt == "-m m.gguf -t 2 -p 512 -n 0 -r 2 -o json"
    batched = (tmp_path / "llama-batched-bench.calls").read_text().strip()
    assert batched == ("-m m.gguf -t 2 -npp 128 -ntg 32 -npl 4 -c 1024 --output-format jsonl")
