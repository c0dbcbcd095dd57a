"""The prompt of a session's next turn, and the history that a turn leaves. Pure.

A prompt's tokens are the history's tokens and those of what is new, so that the workers' caches hold its beginning by construction.
A conversation's prompt is what the chat template renders:

    whole     ─── base ───┬── answer, its end ──┬── rest ──▶      rendered now
    history   ─── tokens of both ───────────────┘

Where the rendering does not go on like that (a template that rewrites earlier turns, an answer that a stop string cut), it is
tokenized anew: that costs a recompute of what differs, and nothing else. So it is where a message contains a control token's text,
which only a rendering of the whole can keep apart from the template's.
"""

from array import array
from collections.abc import Sequence

from router.chat import ChatTurn
from router.sessions.record import History
from router.text import Tokenizer


def chat_prompt(history: History, new: Sequence[ChatTurn], tokenizer: Tokenizer) -> list[int]:
    """The tokens of a conversation with these messages added. Raises `InvalidRequestError` where the template refuses them."""
    messages = [*history.messages, *new]
    rest = None
    if history.messages and not tokenizer.must_quote(messages):
        rest = _rest(history, messages, tokenizer)
    if rest is None:
        return tokenizer.encode_chat(messages)
    return [*history.tokens, *tokenizer.encode_rendered(rest)]


def _rest(history: History, messages: Sequence[ChatTurn], tokenizer: Tokenizer) -> str | None:
    """What a conversation's text adds to that of the history's tokens; None where it does not begin with it."""
    whole = tokenizer.render_chat(messages)
    *before, answer = history.messages
    base = tokenizer.render_chat(before)
    if not whole.startswith(base):
        return None
    rest = whole[len(base) :]
    if not history.answer_in_tokens:
        return rest
    end = tokenizer.special_text(history.tokens[-1])
    # Many templates strip what was said. The history keeps the tokens as the model chose them.
    for said in (answer.content, answer.content.strip()):
        if rest.startswith(said + end):
            return rest[len(said + end) :]
    return None


def history_after(
    history: History,
    new: Sequence[ChatTurn],
    *,
    prompt: Sequence[int],
    output: Sequence[int],
    answer: str,
    exact: bool,
) -> History:
    """The history with a turn that finished. `new` is empty where it was no chat; `exact` tells whether the answer is the text of the
    output's tokens, but for a special token that ends it.
    """
    if not new:
        return History(array("I", (*prompt, *output)))
    messages = (*history.messages, *new, ChatTurn("assistant", answer))
    tokens = (*prompt, *output) if exact else prompt
    return History(array("I", tokens), messages, answer_in_tokens=exact)
