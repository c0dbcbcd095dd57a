"""Chat templates: the Jinja program of a checkpoint that turns messages into the text the model was tuned on.

Rendered as `transformers` renders it, in Jinja's immutable sandbox, because a checkpoint's template is foreign code. A template is
immutable once loaded and may be rendered from any thread.
"""

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.errors import FieldViolation, InvalidRequestError, ModelLoadError

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One message of a conversation."""

    role: str
    content: str


class ChatTemplate:
    """A compiled template and the special-token strings that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, path: str) -> None:
        """Raises `ModelLoadError` naming `path` where the source is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelLoadError(path, f"not a chat template: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, turns: Sequence[ChatTurn]) -> str:
        """The prompt, ending where the assistant begins to speak. Raises `InvalidRequestError` where the template refuses."""
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self._template.render(
                **self._special_tokens,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template is a program, and may raise anything on messages it does not expect
            problem = f"the model's chat template refuses the messages: {error}"
            raise InvalidRequestError(FieldViolation("prompt.chat", problem)) from error


def load_chat_template(directory: Path) -> ChatTemplate | None:
    """The checkpoint's template, or None where it has none. Raises `ModelLoadError` naming the unusable file."""
    config = _read_object(directory / CONFIG_FILE)
    special_tokens = {
        **_token_strings(_read_object(directory / SPECIAL_TOKENS_FILE)),
        **_token_strings(config),
    }
    file = directory / TEMPLATE_FILE
    if file.is_file():
        try:
            return ChatTemplate(file.read_text("utf-8"), special_tokens, path=str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(str(file), str(error)) from error
    source = _default_template(config.get("chat_template"))
    if source is None:
        return None
    return ChatTemplate(source, special_tokens, path=str(directory / CONFIG_FILE))


def _read_object(path: Path) -> dict[str, object]:
    """A JSON object from a file; empty where there is no such file."""
    try:
        value: object = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelLoadError(str(path), f"cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(str(path), "is not a JSON object")
    return value


def _token_strings(config: Mapping[str, object]) -> dict[str, str]:
    """`bos_token`, `eos_token` and their like, written as a string or as an object with its content."""
    found = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def _default_template(value: object) -> str | None:
    """The template of `tokenizer_config.json`: one string, or a list of named ones."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        named = [entry for entry in value if isinstance(entry, dict)]
        sources = [entry.get("template") for entry in named if entry.get("name") == "default"]
        return next((source for source in sources if isinstance(source, str)), None)
    return None


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - the signature that templates call
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """Unlike Jinja's own filter, escapes nothing for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return dt.datetime.now().astimezone().strftime(pattern)
