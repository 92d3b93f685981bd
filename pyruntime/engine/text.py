"""Text and tokens: tokeniser, incremental decoding, stop strings, chat templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers
from tokenizers.decoders import DecodeStream

from pyruntime.errors import CorruptDataError, InvalidArgumentError, NotFoundError

__all__ = ["Detokenizer", "StopStrings", "Tokenizer"]


class Tokenizer:
    """The tokeniser and chat template of a Hugging Face model directory.

    Parameters
    ----------
    directory : path
        Holds ``tokenizer.json``; ``tokenizer_config.json`` or ``chat_template.jinja`` may hold a
        chat template, which runs in jinja2's sandbox.

    Raises
    ------
    pyruntime.errors.NotFoundError
        There is no ``tokenizer.json``.
    pyruntime.errors.CorruptDataError
        A file is not valid.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.exists():
            raise NotFoundError(f"{path} does not exist; the tokeniser is read from it")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CorruptDataError(f"{path} is not a tokeniser: {error}") from None
        self._special = {
            token.content: index
            for index, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        self._variables: dict[str, Any] = {}
        template = self._read_template(directory)
        self._template = None
        if template is not None:
            environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
            )
            environment.globals["raise_exception"] = _refuse_chat
            try:
                self._template = environment.from_string(template)
            except (jinja2.TemplateError, RecursionError) as error:
                raise CorruptDataError(f"the chat template is not valid: {error}") from None

    def _read_template(self, directory: Path) -> str | None:
        template = None
        path = directory / "tokenizer_config.json"
        if path.exists():
            try:
                given = json.loads(path.read_text())
                template = given.get("chat_template")
            except (ValueError, AttributeError, RecursionError) as error:
                raise CorruptDataError(f"{path} is not a JSON object: {error}") from None
            for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
                token = given.get(name)
                token = token.get("content") if isinstance(token, dict) else token
                self._variables[name] = token or ""
        path = directory / "chat_template.jinja"
        if path.exists():
            try:
                template = path.read_text()
            except UnicodeDecodeError as error:
                raise CorruptDataError(f"{path} is not text: {error}") from None
        if isinstance(template, list):  # several named templates
            try:
                named = {entry["name"]: entry["template"] for entry in template}
            except (TypeError, KeyError):
                raise CorruptDataError(f"{directory}: a named chat template is not one") from None
            template = named.get("default")
        if template is not None and not isinstance(template, str):
            raise CorruptDataError(f"{directory}: the chat template is not text")
        return template

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works."""
        return self._template is not None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of a text.

        Parameters
        ----------
        text : str
        special : bool, default True
            Let the tokeniser add its special tokens (such as a begin token). Special tokens that
            are spelled out in the text count as such either way.
        """
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """Return the text of one token, special or not; incomplete characters become U+FFFD."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def chat(self, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
        """Return the tokens of a conversation that the assistant is to continue.

        Raises
        ------
        pyruntime.errors.InvalidArgumentError
            The model has no chat template, or the template refuses the messages.
        """
        if self._template is None:
            raise InvalidArgumentError("this model has no chat template; use completions")
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=True, **self._variables, **variables
            )
        except InvalidArgumentError:
            raise  # by `raise_exception`
        except Exception as error:  # the template is a program: whatever it may raise
            raise InvalidArgumentError(f"the chat template refuses the messages: {error}") from None
        return self.encode(text, special=False)

    def detokenizer(self) -> Detokenizer:
        """Return a decoder of one stream of tokens."""
        return Detokenizer(self._tokenizer)


def _refuse_chat(message: str) -> None:
    raise InvalidArgumentError(message)


class Detokenizer:
    """Turns a stream of tokens into text, holding back incomplete characters."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def feed(self, tokens: Sequence[int]) -> str:
        """Return the text that `tokens` complete."""
        if len(tokens) == 1:
            return self._stream.step(self._tokenizer, tokens[0]) or ""
        return "".join(self._stream.step(self._tokenizer, token) or "" for token in tokens)


class StopStrings:
    """Ends a stream of text at the first of some strings, which is left out.

    Text that may be the beginning of a stop string is held back until it is clear.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Return the text that is safe to show, and whether a stop string was reached."""
        if not self._stops:
            return text, False
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self._held = ""
            return text[: min(places)], True
        hold = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), hold, -1):
                if stop.startswith(text[-size:]):
                    hold = size
                    break
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    def flush(self) -> str:
        """Return what was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held
