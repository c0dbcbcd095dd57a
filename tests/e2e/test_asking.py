"""`baton generate` and `baton chat` against a running server, without a terminal."""

import json
from pathlib import Path

import pytest

from tests.served import Served, baton

pytestmark = [pytest.mark.e2e]


def test_generate_prints_the_answer_and_nothing_else(shared: Served) -> None:
    done = baton("generate", "-a", shared.address, "Once upon", "-n", "5", "--ignore-eos")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_the_same_seed_gives_the_same_answer(shared: Served) -> None:
    args = ("generate", "-a", shared.address, "Once upon", "-n", "20", "--seed", "7")
    first, second = baton(*args), baton(*args)
    assert first.stdout == second.stdout
    assert first.stdout != baton(*args[:-1], "8").stdout


def test_json_holds_the_whole_result(shared: Served) -> None:
    done = baton(
        "generate",
        "-a",
        shared.address,
        "Once upon",
        "-n",
        "5",
        "--json",
        "--ignore-eos",
        "--logprobs",
        "2",
    )
    result = json.loads(done.stdout)
    assert len(result["token_ids"]) == len(result["logprobs"]) == 5
    assert result["finish_reason"] == "length"
    assert result["usage"]["completion_tokens"] == 5
    assert result["attempts"][0]["decode_worker"] == "decode-0"


def test_the_prompt_comes_from_an_argument_a_file_or_standard_input(
    shared: Served, tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text("Once upon", encoding="utf-8")
    options = ("-a", shared.address, "-n", "9", "--seed", "1")
    answers = {
        baton("generate", "Once upon", *options).stdout,
        baton("generate", "--file", str(tmp_path / "prompt.txt"), *options).stdout,
        baton("generate", *options, stdin="Once upon").stdout,
        baton("generate", "-", *options, stdin="Once upon").stdout,
    }
    assert len(answers) == 1


def test_stats_tell_where_the_time_went(shared: Served) -> None:
    prompt = "Once upon a time there was a girl. " * 8
    done = baton("generate", "-a", shared.address, prompt, "-n", "5", "--stats", "--ignore-eos")
    assert "first token after" in done.stderr
    assert "prefill-0 to decode-0" in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--top-p", "7", "x"), "top_p"),
        (("",), "prompt"),
        (("--file", "no-such-file"), "no-such-file"),
        (("x", "-n", "0"), "max_tokens"),
    ],
)
def test_a_mistake_is_named_and_exits_with_2(
    shared: Served, args: tuple[str, ...], words: str
) -> None:
    done = baton("generate", "-a", shared.address, *args)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.strip() == ""


def test_nobody_there_exits_with_1_and_says_what_to_do() -> None:
    done = baton("generate", "-a", "127.0.0.1:9", "x")
    assert done.returncode == 1
    assert "baton serve" in done.stderr


def test_chat_keeps_the_conversation(shared: Served) -> None:
    """The second turn's prompt holds the first turn and its answer."""
    options = ("chat", "-a", shared.address, "-n", "6", "--seed", "3")
    done = baton(*options, stdin="Hello\n/stats\nAgain\n/stats\n")
    assert done.returncode == 0
    stats = [line for line in done.stderr.splitlines() if "prompt tokens" in line]
    first, second = (int(line.split()[0]) for line in stats)
    assert second > first + 5


def test_chat_starts_over_on_reset(shared: Served) -> None:
    options = ("chat", "-a", shared.address, "-n", "6", "--seed", "3")
    done = baton(*options, stdin="Hello\n/stats\n/reset\nHello\n/stats\n/exit\nnever sent\n")
    stats = [line.split()[0] for line in done.stderr.splitlines() if "prompt tokens" in line]
    assert len(stats) == 2
    assert stats[0] == stats[1]


def test_a_conversation_beyond_the_context_is_refused(shared: Served) -> None:
    done = baton("chat", "-a", shared.address, stdin="word " * 4000 + "\n")
    assert done.returncode == 2
    assert "context" in done.stderr
