"""`baton chat`'s conversation, and the blocking client's sessions, over a real router with simulated workers."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from baton.cli.chat import Conversation
from baton.cli.config import shipped_model
from baton.client import Client, SamplingOptions, Session, SessionState
from baton.errors import InvalidRequestError, NotFoundError
from router.text import Tokenizer
from tests.integration.test_router_sessions import house
from tests.worker_rig import SIM

SAMPLING = SamplingOptions(max_tokens=8, temperature=0.0, ignore_eos=True)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    tokenizer = Tokenizer.load(str(shipped_model()))
    async with house(sim=replace(SIM, vocab_size=2336), tokenizer=tokenizer) as here:
        with Client(f"127.0.0.1:{here.ports[0]}") as connected:
            yield connected


async def within(act: Callable[[], object]) -> None:
    """The blocking client runs in a thread; the router is in this loop."""
    async with asyncio.timeout(20):
        await asyncio.to_thread(act)


def talk(client: Client) -> Conversation:
    return Conversation(client, SAMPLING, system="Be brief.", timeout_s=10.0)


def only(client: Client) -> Session:
    (session,) = client.sessions.list()
    return session


def prompt_tokens(conversation: Conversation) -> int:
    return int(conversation.last_summary.split()[0])


async def test_a_conversation_is_one_session_until_it_ends(client: Client) -> None:
    def act() -> None:
        conversation = talk(client)
        conversation.ask("Who has the hat?")
        conversation.ask("Why?")
        session = only(client)
        assert (session.turns, session.state) == (2, SessionState.IDLE)
        assert session.history_tokens == prompt_tokens(conversation) + 8
        conversation.reset()
        assert [*client.sessions.list()] == []
        conversation.ask("Who has the hat?")
        assert only(client).turns == 1
        conversation.close()
        assert [*client.sessions.list(state=SessionState.IDLE, page_size=1)] == []

    await within(act)


async def test_a_session_that_was_forgotten_begins_anew_with_all_that_was_said(
    client: Client,
) -> None:
    def act() -> None:
        conversation = talk(client)
        conversation.ask("Who has the hat?")
        before = prompt_tokens(conversation)
        client.sessions.close(only(client))
        conversation.ask("Why?")
        assert only(client).turns == 1
        assert prompt_tokens(conversation) > before + 8
        conversation.close()

    await within(act)


class Interrupting:
    """A terminal at which somebody presses Ctrl-C after the first words."""

    def __init__(self) -> None:
        self.written = ""

    def write(self, text: str) -> None:
        pressed = not self.written
        self.written += text
        if pressed:
            raise KeyboardInterrupt

    def flush(self) -> None:
        """Nothing."""


async def test_what_was_said_before_an_answer_was_stopped_stays(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router forgets a stopped turn; the conversation does not."""

    def act() -> None:
        conversation = talk(client)
        with monkeypatch.context() as patch:
            terminal = Interrupting()
            patch.setattr(sys, "stdout", terminal)
            conversation.ask("Who has the hat?")
        assert terminal.written.endswith(" [stopped]\n")
        assert [turn.role for turn in conversation.turns] == ["user", "assistant"]
        conversation.ask("Why?")
        assert only(client).turns == 1
        assert len(conversation.turns) == 4
        conversation.close()

    await within(act)


async def test_a_turn_that_failed_costs_the_next_one_nothing(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: the system prompt and what was said go along again, where they were to open a session and did not; no session is left."""

    def act() -> None:
        conversation, undisturbed = talk(client), talk(client)

        def ask_in_vain() -> None:
            with monkeypatch.context() as patch:
                patch.setattr(conversation, "_sampling", replace(SAMPLING, temperature=-1.0))
                with pytest.raises(InvalidRequestError):
                    conversation.ask("Who?")
            assert [*client.sessions.list()] == []

        ask_in_vain()
        undisturbed.ask("Who has the hat?")
        undisturbed.close()
        conversation.ask("Who has the hat?")
        before = prompt_tokens(conversation)
        assert before == prompt_tokens(undisturbed)
        client.sessions.close(only(client))
        ask_in_vain()
        conversation.ask("Why?")
        assert prompt_tokens(conversation) > before + 8
        conversation.close()

    await within(act)


async def test_the_blocking_client_raises_what_the_router_meant(client: Client) -> None:
    def act() -> None:
        session = client.sessions.create(ttl_s=60, idle_s=30)
        assert round(session.expires_unix_s - session.created_unix_s) == 30
        answer = client.complete([1, 2, 3], sampling=SAMPLING, session=session)
        assert answer.session is not None
        assert (answer.session.session_id, answer.session.turn) == (session.session_id, 1)
        assert client.sessions.close(session).turns == 1
        for call in (client.sessions.get, client.sessions.close):
            with pytest.raises(NotFoundError):
                call(session)

    await within(act)
