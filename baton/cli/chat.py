"""`baton chat`: a conversation in the terminal, in a session of the router: each turn sends only what is new. The conversation is kept
here too, to begin a new session with it where an answer was stopped or the router has forgotten.
"""

import sys
from contextlib import ExitStack, closing, suppress
from importlib import import_module
from typing import Annotated

import typer
from rich.console import Console

from baton.cli.connect import connected
from baton.cli.console import delays_told, report, reported, stderr
from baton.cli.generate import summary
from baton.cli.options import Address, MaxTokens, Seed, Temperature, Timeout, TopP
from baton.client import ChatMessage, Client, SamplingOptions, Session
from baton.errors import BatonError, FieldViolation, InvalidRequestError, NotFoundError

HELP = "/reset starts over, /stats tells about the last answer, /exit or Ctrl-D ends; Ctrl-C stops an answer"


class Conversation:
    """The turns so far, and the client that answers them."""

    def __init__(
        self,
        client: Client,
        sampling: SamplingOptions,
        *,
        system: str | None,
        timeout_s: float | None,
    ) -> None:
        self._client = client
        self._sampling = sampling
        self._timeout_s = timeout_s
        self._opening = () if system is None else (ChatMessage("system", system),)
        self._session: Session | None = None
        """Holds every turn, or there is none."""
        self.turns: list[ChatMessage] = []
        self.last_summary = "no answer yet"

    def reset(self) -> None:
        """Forgets every turn."""
        self.turns.clear()
        self.close()

    def close(self) -> None:
        """Lets the router forget the session, which it would do by itself some time. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            with suppress(BatonError):
                self._client.sessions.close(session)

    def ask(self, text: str) -> None:
        """Streams the answer to stdout. A turn that fails, or is stopped before the first text, leaves no trace in the conversation."""
        asked = ChatMessage("user", text)
        said: list[str] = []
        try:
            self._answer(asked, said)
        except KeyboardInterrupt:
            sys.stdout.write(" [stopped]")
            # The router knows nothing of a turn that was stopped.
            self.close()
        finally:
            if said:
                sys.stdout.write("\n")
        if said:
            self.turns += [asked, ChatMessage("assistant", "".join(said))]

    def _answer(self, asked: ChatMessage, said: list[str]) -> None:
        if self._session is not None:
            try:
                self._stream([asked], self._session, said)
            except NotFoundError:  # it has expired
                pass
            else:
                return
        self._session = self._client.sessions.create()
        try:
            self._stream([*self._opening, *self.turns, asked], self._session, said)
        except BatonError:
            # The session is as empty as it was made: it lacks all that the next turn would leave out.
            self.close()
            raise

    def _stream(self, messages: list[ChatMessage], session: Session, said: list[str]) -> None:
        with self._client.generate(
            messages, sampling=self._sampling, session=session, timeout_s=self._timeout_s
        ) as stream:
            for chunk in stream:
                said.append(chunk.text)
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
        self.last_summary = summary(stream.result)


def chat(
    *,
    address: Address = "127.0.0.1:50051",
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            "-s",
            help="Opens the conversation with this instruction.",
            show_default="none",
        ),
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    timeout: Timeout = None,
) -> None:
    """Talk with the served model.

    Lines starting with a slash are commands: /reset, /stats, /help, /exit.

    [bold]Examples[/]

      baton chat

      baton chat -t 0.7 --system "Answer in one word."

      echo "Nora's hat was red. What colour was Nora's hat?" | baton chat -t 0
    """
    sampling = SamplingOptions(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    notes = stderr()
    with reported(), delays_told(), connected(address) as client, ExitStack() as leaving:
        model = client.model()
        if not model.has_chat_template:
            raise InvalidRequestError(
                FieldViolation("model", f"{model.model} has no chat template; use `baton generate`")
            )
        talk = leaving.enter_context(
            closing(Conversation(client, sampling, system=system, timeout_s=timeout))
        )
        if sys.stdin.isatty():
            import_module("readline")  # gives input() line editing and a history
            notes.print(
                f"[bold]{model.model}[/], context {model.max_context_tokens} tokens. {HELP}."
            )
        while (line := _next_line()) is not None:
            if not _handle(line, talk, notes):
                break


def _handle(line: str, talk: Conversation, notes: Console) -> bool:
    """False where the conversation is over."""
    match line.strip():
        case "":
            pass
        case "/exit" | "/quit":
            return False
        case "/reset":
            talk.reset()
            notes.print("The conversation starts over.", style="dim")
        case "/stats":
            notes.print(talk.last_summary, style="dim", soft_wrap=True)
        case command if command.startswith("/"):
            notes.print(HELP, style="dim")
        case _:
            _ask(line, talk, notes)
    return True


def _ask(line: str, talk: Conversation, notes: Console) -> None:
    try:
        talk.ask(line)
    except BatonError as error:
        if not sys.stdin.isatty():
            raise
        report(notes, error)


def _next_line() -> str | None:
    """None at the end of input."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    try:
        return input("you> ")
    except EOFError:
        print()
        return None
