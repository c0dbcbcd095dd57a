"""Output text is whole characters, equals the decoded tokens, and never shows a stop string."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from baton.errors import InvalidRequestError, ModelLoadError
from baton.types import SamplingParams
from router.chat import ChatTurn
from router.text import Detokenizer, OutputText, StopMatcher, Tokenizer

_CORPUS = ["the quick brown fox jumps over the lazy dog", "to be or not to be", "你好世界"] * 5
_TEXTS = st.text(alphabet="abe t\n😀é你好界\N{REPLACEMENT CHARACTER}👩\u200d🚀", max_size=30)
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def _byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it: a character outside the corpus is several tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    return backend


def _byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 has it: words begin with ▁, the first space is dropped, unknown characters are byte tokens."""
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    words += [*"▁abeth", "▁a", "be", "▁be"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=[("▁", "a"), ("b", "e"), ("▁", "be")],
            byte_fallback=True,
            unk_token=words[0],
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


_BYTE_LEVEL = Tokenizer(_byte_level())
_BYTE_FALLBACK = Tokenizer(_byte_fallback())
_BYTES = Tokenizer.of_bytes()
_ALL = [_BYTE_LEVEL, _BYTE_FALLBACK, _BYTES]


def _pieces(tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("tokenizer", _ALL)
@given(text=_TEXTS)
def test_the_joined_pieces_of_a_text_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    pieces = _pieces(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    for piece in pieces:
        assert piece.count(_REPLACEMENT) <= text.count(_REPLACEMENT)


@pytest.mark.parametrize("tokenizer", [_BYTE_LEVEL, _BYTES])
@settings(max_examples=200)
@given(data=st.data())
def test_the_joined_pieces_of_any_byte_level_tokens_are_their_decoding(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=80))
    assert "".join(_pieces(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, _BYTE_FALLBACK.vocab_size - 1), max_size=80))
def test_broken_byte_fallback_tokens_do_no_harm_to_the_words_around_them(ids: list[int]) -> None:
    """Promise: no token sequence raises, and words after broken bytes come out."""
    word = _BYTE_FALLBACK.encode("the")
    assert "".join(_pieces(_BYTE_FALLBACK, [*ids, *word])).endswith("the")


def test_broken_bytes_cost_one_replacement_each_and_keep_the_characters_before_them() -> None:
    broken = [_byte_token(0xFF), *_BYTE_FALLBACK.encode("be")]
    ids = [*_BYTE_FALLBACK.encode("你"), *broken]
    assert "".join(_pieces(_BYTE_FALLBACK, ids)).startswith(f"你{_REPLACEMENT}")


def _byte_token(byte: int) -> int:
    return 3 + byte


@pytest.mark.parametrize("tokenizer", _ALL)
def test_a_character_comes_out_with_its_last_token_and_not_before(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀b")
    pieces = _pieces(tokenizer, ids)
    assert "😀" in pieces
    held = pieces[pieces.index("😀") - 3 : pieces.index("😀")]
    assert held == ["", "", ""]


@pytest.mark.parametrize("tokenizer", _ALL)
def test_an_output_that_ends_within_a_character_shows_that_it_was_cut(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀")[:-1]
    *pieces, flushed = _pieces(tokenizer, ids)
    assert "".join(pieces) == "a"
    assert flushed.strip(_REPLACEMENT) == ""
    assert "".join(pieces) + flushed == tokenizer.decode(ids)


def test_endless_broken_bytes_are_decoded_in_bounded_stretches() -> None:
    """Promise: a model that emits garbage for ever does not slow the router down for everyone else."""
    decoded: list[int] = []

    class Counting(Tokenizer):
        def decode(self, token_ids: Sequence[int]) -> str:
            decoded.append(len(token_ids))
            return super().decode(token_ids)

    for tokenizer, byte in ((Counting(_byte_level()), None), (Counting(_byte_fallback()), 0xFF)):
        lead = tokenizer.encode("😀")[-4] if byte is None else _byte_token(byte)
        assert "".join(_pieces(tokenizer, [lead] * 500)) == _REPLACEMENT * 500
    assert max(decoded) < 80


@pytest.mark.parametrize("tokenizer", _ALL)
@given(head=_TEXTS, tail=_TEXTS)
def test_output_continues_the_prompt_as_one_text(
    tokenizer: Tokenizer, head: str, tail: str
) -> None:
    """The prompt's last token decides whether a leading space is text."""
    ids = tokenizer.encode(head + tail)
    for cut in range(len(ids) + 1):
        before = tokenizer.decode(ids[:cut])
        if not before.endswith(_REPLACEMENT):
            assert before + "".join(_pieces(tokenizer, ids[cut:], ids[:cut])) == head + tail


def test_a_leading_space_is_kept_after_a_prompt_and_dropped_at_the_start_of_a_text() -> None:
    ids = _BYTE_FALLBACK.encode("a be")
    assert "".join(_pieces(_BYTE_FALLBACK, ids[1:], ids[:1])) == " be"
    assert "".join(_pieces(_BYTE_FALLBACK, ids[1:])) == "be"


def test_a_character_that_the_prompt_began_is_completed_by_the_output() -> None:
    ids = _BYTE_LEVEL.encode("a😀")
    more = _BYTE_LEVEL.encode(" be")[1:]
    assert "".join(_pieces(_BYTE_LEVEL, [*ids[-2:], *more], ids[:-2])) == "😀 be"
    assert "".join(_pieces(_BYTE_LEVEL, more, ids)) == " be"


def test_a_replacement_character_at_the_prompts_end_stays_the_prompts() -> None:
    ids = _BYTE_LEVEL.encode(f"a{_REPLACEMENT}")
    assert "".join(_pieces(_BYTE_LEVEL, _BYTE_LEVEL.encode("be"), ids)) == "be"


def test_a_long_run_of_tokens_that_each_end_within_a_character_loses_none() -> None:
    """Tokens of vocabularies with merges across characters, over more tokens than are held back."""
    ((symbols, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("😀")
    vocab = {symbols[0]: 0, symbols[1:] + symbols[0]: 1, symbols[1:]: 2}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    pieces = _pieces(Tokenizer(backend), [0, *[1] * 100, 2])
    assert pieces == ["", *["😀"] * 101, ""]


def test_special_tokens_and_ids_beyond_the_vocabulary_have_no_text() -> None:
    ids = _BYTE_LEVEL.encode("be")
    assert ids[0] == 0
    noisy = [1, 0, *ids[1:], 1, 100_000, *ids[1:]]
    assert "".join(_pieces(_BYTE_LEVEL, noisy)) == "bebe"


_STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


@given(text=st.text("abc", max_size=40), stops=_STOPS, cuts=st.lists(st.integers(0, 40)))
def test_a_stop_matcher_finds_the_first_completed_stop_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    end, size, stop = min(ends, default=(len(text), 0, None))
    matcher, found, out = StopMatcher(stops), None, ""
    borders = [0, *sorted(cuts), len(text)]
    for first, last in pairwise(borders):
        fresh, found = matcher.push(text[first:last])
        out += fresh
        if found is not None:
            break
    out += matcher.flush()
    assert (found, out) == (stop, text[: end + size])


def test_a_stop_matcher_holds_back_no_more_than_may_begin_a_stop() -> None:
    matcher = StopMatcher(["abac"])
    pushed = [matcher.push(piece) for piece in ("xa", "b", "a", "b", "z", "abac")]
    assert pushed == [
        ("x", None),
        ("", None),
        ("", None),
        ("ab", None),
        ("abz", None),
        ("", "abac"),
    ]


def _output(tokenizer: Tokenizer = _BYTES, **changes: object) -> OutputText:
    sampling = SamplingParams(max_tokens=1000, **changes)  # type: ignore[arg-type]  # by name
    return OutputText(tokenizer, sampling, prompt=(), eos_token_ids=(0,))


def test_a_stop_string_ends_the_text_before_it_and_counts_the_token_that_completes_it() -> None:
    output = _output(stop=("STOP",))
    assert output.push(b"one S").text == "one "
    update = output.push(b"TOP more")
    assert (update.text, update.consumed_tokens, update.stop, update.ended) == ("", 3, "STOP", True)
    assert output.finish() == ""
    assert output.push(b"later").consumed_tokens == 0


def test_text_that_only_looked_like_a_stop_comes_out_in_the_end() -> None:
    output = _output(stop=("END",))
    update = output.push(b"the EN")
    assert (update.text, update.consumed_tokens, update.ended) == ("the ", 6, False)
    assert output.finish() == "EN"
    assert output.finish() == ""


@pytest.mark.parametrize(
    ("changes", "ended_by"),
    [({}, 0), ({"stop_token_ids": (98,)}, 98), ({"ignore_eos": True}, None)],
)
def test_an_end_token_is_counted_and_has_no_text(
    changes: dict[str, object], ended_by: int | None
) -> None:
    update = _output(_BYTES, **changes).push([97, 98, 0, 99])
    assert update.stop_token_id == ended_by
    expected = {0: ("ab", 3), 98: ("a", 2), None: ("ab\0c", 4)}
    assert (update.text, update.consumed_tokens) == expected[ended_by]


def test_text_held_when_an_end_token_comes_is_given_out() -> None:
    output = _output(stop=("END",))
    output.push([*b"E", 0xF0])
    assert output.push([0]).ended
    assert output.finish() == f"E{_REPLACEMENT}"


def test_stop_strings_are_matched_only_in_the_text_of_tokens_from_min_tokens_on() -> None:
    update = _output(stop=("ab",), min_tokens=3).push(b"ababab")
    assert (update.text, update.consumed_tokens, update.stop) == ("abab", 6, "ab")


@pytest.mark.parametrize("tokenizer", _ALL)
@settings(max_examples=100)
@given(data=st.data())
def test_a_stop_string_never_shows_and_the_text_before_it_is_all_there(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    text = data.draw(_TEXTS)
    stops = data.draw(st.lists(st.text("ab 😀你", min_size=1, max_size=3), max_size=3))
    ids = tokenizer.encode(text)
    output = _output(tokenizer, stop=tuple(stops), ignore_eos=True)
    shown, consumed, update = "", 0, None
    while consumed < len(ids) and (update is None or not update.ended):
        update = output.push(ids[consumed : consumed + data.draw(st.integers(1, 5))])
        shown += update.text
        consumed += update.consumed_tokens
        assert not any(stop in shown for stop in stops)
    shown += output.finish()
    if update is None or update.stop is None:
        assert shown == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(shown + update.stop)
        assert consumed == next(
            n for n in range(len(ids) + 1) if any(s in tokenizer.decode(ids[:n]) for s in stops)
        )


_TEMPLATE = """\
{%- if messages[0].role == 'system' and messages|length == 1 -%}
    {{ raise_exception('A user must speak') }}
{%- endif -%}
{{ bos_token }}
{%- for message in messages %}
    {% if message.role == 'user' %}
Q: {{ message.content | tojson }}
    {% else %}
{% generation %}A: {{ message.content.strip() }}{% endgeneration %}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}A:{{ pad_token }}{% endif %}"""

_TURNS = [ChatTurn("user", "<b>你"), ChatTurn("assistant", " be "), ChatTurn("user", "to be")]


def _checkpoint(directory: Path, **config: object) -> Path:
    backend = _byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(directory / "tokenizer.json"))
    entries = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "eos_token": "</s>",
        "pad_token": "</s>",
        **config,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(entries))
    return directory


def test_a_loaded_tokenizer_adds_special_tokens_and_never_truncates_or_pads(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(_checkpoint(tmp_path)))
    ids = tokenizer.encode("to be or not to be")
    assert ids[0] == 0
    assert len(ids) > 4
    assert tokenizer.decode(ids) == "to be or not to be"
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match=r"^prompt\.chat: .*no chat template"):
        tokenizer.encode_chat(_TURNS)


@pytest.mark.parametrize("place", ["string", "named", "file"])
def test_chats_are_rendered_and_encoded_as_transformers_does(tmp_path: Path, place: str) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import, and only the oracle here

    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": _TEMPLATE}]
    sources = {"string": _TEMPLATE, "named": named, "file": "not this one"}
    _checkpoint(tmp_path, chat_template=sources[place])
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": turn.role, "content": turn.content} for turn in _TURNS]
    expected = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    tokenizer = Tokenizer.load(str(tmp_path))
    found = tokenizer.encode_chat(_TURNS)
    assert found == expected
    assert found.count(0) == 1
    assert tokenizer.encode("to be") == oracle("to be")["input_ids"]


def test_a_template_that_refuses_the_messages_is_the_requests_fault(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(_checkpoint(tmp_path, chat_template=_TEMPLATE)))
    with pytest.raises(InvalidRequestError, match="A user must speak"):
        tokenizer.encode_chat([ChatTurn("system", "be brief")])


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    """Promise: a checkpoint's template cannot run code of its own on the router."""
    escape = "{{ messages.append(1) }}{{ ''.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = Tokenizer.load(str(_checkpoint(tmp_path, chat_template=escape)))
    with pytest.raises(InvalidRequestError):
        tokenizer.encode_chat(_TURNS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"version": "1.0", "model": '),
        ("tokenizer.json", None),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}'),
        ("special_tokens_map.json", "\x00"),
        ("chat_template.jinja", "{{ unclosed"),
    ],
)
def test_an_unusable_file_is_named(tmp_path: Path, name: str, content: str | None) -> None:
    path = _checkpoint(tmp_path) / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(ModelLoadError) as caught:
        Tokenizer.load(str(tmp_path))
    assert caught.value.path == str(path)


def test_a_source_that_is_neither_directory_nor_hub_id_is_named() -> None:
    with pytest.raises(ModelLoadError, match=r"^/no/such/model: "):
        Tokenizer.load("/no/such/model")


def test_the_byte_tokenizer_has_bytes_for_tokens() -> None:
    assert _BYTES.encode("aé\n😀") == list("aé\n😀".encode())
    assert _BYTES.vocab_size == 256
