"""Chat completions over HTTP: one question, one reply, patient with a server in trouble.

Address and key come from the environment. Neither is printed, logged or written anywhere; what a
server says is shown without them.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import httpx2

from fedmllm.errors import UserError
from fedmllm.rng import uniform

# Address and key are taken from one pair: a key never goes to the other pair's address.
PAIRS = (("FEDMLLM_JUDGE_URL", "FEDMLLM_JUDGE_KEY"), ("OPENAI_BASE_URL", "OPENAI_API_KEY"))
LONGEST_WAIT = 60.0  # seconds, whatever a server asks for
_PATH = "/chat/completions"


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and the key to show there (empty for none)."""

    url: str = field(repr=False)
    key: str = field(repr=False, default="")


@dataclass(frozen=True)
class Reply:
    """What the judge said. served: the model's name by its server. The tokens: 0 if it does not
    say. spent: no text, since all tokens that it may write went into thoughts."""

    text: str
    served: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    spent: bool = False


def endpoint_from(environment: Mapping[str, str]) -> Endpoint:
    """The endpoint that the environment names. Raises `UserError`, which holds neither address nor
    key, if it names none or one that cannot be."""
    for url_name, key_name in PAIRS:
        url = environment.get(url_name, "").strip().rstrip("/")
        if not url:
            continue
        key = environment.get(key_name, "").strip()
        fault = _fault(url)
        if fault:
            raise UserError(f"{url_name} is no address: {fault}")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise UserError(f"{key_name} holds a character that no key has")
        return Endpoint(url.removesuffix(_PATH) + _PATH, key)
    names = " or ".join(f"{url} (with {key}, if it wants a key)" for url, key in PAIRS)
    raise UserError(f"no judge is named: set the environment variable {names}")


def _fault(url: str) -> str:
    """Why it is no address to ask at; empty if it is one. The URL itself is not told."""
    if any(sign.isspace() or not sign.isprintable() for sign in url):
        return "it holds a space or a control character"
    if "?" in url or "#" in url:
        return "it must end in its path, without ? or #"
    try:
        parts = httpx2.URL(url)
        parts.host.encode("idna")  # as the connection will
        urlsplit(url)
    except (httpx2.InvalidURL, ValueError):
        return "its host or port cannot be read"
    if parts.scheme not in ("http", "https") or not parts.host:
        return "it must begin with https:// or http://"
    if parts.port is not None and not 0 < parts.port < 65536:
        return "its port must be from 1 to 65535"
    return ""


class _TryAgainError(Exception):
    """The server may answer the next time. wait: seconds that it asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Judge:
    """A model behind an endpoint. Safe to use from several threads.

    request: fields of each request besides the messages, e.g. model and temperature.
    retries: further tries after the first, each after twice the wait of the one before, beginning
    with `first_wait` seconds; on 408, 409, 429, 5xx, timeouts, broken connections and replies that
    are none. stopped: set by whoever wants the waiting to end.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        request: Mapping[str, Any],
        *,
        retries: int = 5,
        timeout: float = 60.0,
        first_wait: float = 1.0,
    ) -> None:
        self.endpoint, self.request = endpoint, dict(request)
        self.retries, self.first_wait = retries, first_wait
        self.stopped = threading.Event()
        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        self._client = httpx2.Client(timeout=timeout, headers=headers)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ask(self, system: str, message: str) -> Reply:
        """The judge's reply. Raises `UserError` if the server refuses, or after the last try."""
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": message},
        ]
        reason = ""
        for attempt in range(self.retries + 1):
            try:
                return self._once({**self.request, "messages": messages})
            except _TryAgainError as error:
                reason = str(error)
                wait = self.first_wait * 2**attempt * (0.75 + uniform(attempt, "wait", message) / 2)
                wait = min(max(wait, error.wait), LONGEST_WAIT)
            if attempt < self.retries and self.stopped.wait(wait):
                break
        raise UserError(f"the judge gave no answer after {attempt + 1} tries: {reason}")

    def _once(self, body: Mapping[str, Any]) -> Reply:
        try:
            response = self._client.post(self.endpoint.url, json=body)
        except httpx2.TimeoutException as error:
            raise _TryAgainError("it was too slow (--timeout)") from error
        except httpx2.RequestError as error:
            reason = f"the connection failed ({type(error).__name__}: {error})"
            raise _TryAgainError(self._clean(reason)) from error
        except (httpx2.InvalidURL, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"the request cannot be sent: {self._clean(reason)}") from None
        status = response.status_code
        if status in (408, 409, 429) or status >= 500:
            reason = f"it answered with status {status}: {self._said(response)}"
            raise _TryAgainError(reason, _asked_wait(response.headers.get("retry-after", "")))
        if status == 400 and _is_filtered(response):  # its filter read the question, not the model
            return Reply("")
        if status != 200:
            raise UserError(f"the judge refuses: status {status}: {self._said(response)}")
        reply = _reply(response)
        text, served = self._without_key(reply.text), self._without_key(reply.served)
        return replace(reply, text=_encodable(text), served=_encodable(served))

    def _said(self, response: httpx2.Response) -> str:
        """A server's own words on an error, in short."""
        words = response.text
        error = _object(_parsed(response)).get("error")
        if isinstance(error, str):
            words = error
        elif isinstance(error, dict) and isinstance(error.get("message"), str):
            words = error["message"]
        # cut last: a key that is cut in two is not found
        return _encodable(self._clean(" ".join(words.split()))[:200] or "nothing more")

    def _clean(self, words: str) -> str:
        """Without the address and the key; of a key of 16 characters or more also without its first
        eight, with what follows them up to a space, and its last four."""
        words = self._without_key(words, shortest=1)
        parts = urlsplit(self.endpoint.url)
        tail = self.endpoint.key[-4:] if len(self.endpoint.key) >= 16 else ""
        for secret in filter(None, (parts.netloc, parts.hostname, parts.password, tail)):
            words = words.replace(secret, "…")
        return words

    def _without_key(self, words: str, *, shortest: int = 8) -> str:
        """Without the URL and the key, and with a key of 16 characters or more without its first
        eight and what follows them up to a space. A key below the shortest is a dummy: hiding
        "1" would spoil replies."""
        key = self.endpoint.key
        words = words.replace(self.endpoint.url.removesuffix(_PATH), "…")
        if len(key) >= shortest:
            words = words.replace(key, "…")
        return re.sub(re.escape(key[:8]) + r"\S*", "…", words) if len(key) >= 16 else words


def _reply(response: httpx2.Response) -> Reply:
    """The first choice. No text in it (filtered, cut off) is an empty reply; no choice is none."""
    found = _object(_parsed(response))
    choices = found.get("choices")
    choice = _object(choices[0]) if isinstance(choices, list) and choices else None
    if choice is None or not isinstance(choice.get("message"), dict):
        raise _TryAgainError("its reply is no chat completion")
    text, usage = _text(choice["message"].get("content")), _object(found.get("usage"))
    return Reply(
        text=text,
        served=str(found.get("model") or ""),
        tokens_in=_count(usage.get("prompt_tokens")),
        tokens_out=_count(usage.get("completion_tokens")),
        spent=not text.strip() and choice.get("finish_reason") == "length",
    )


def _text(content: Any) -> str:
    """A message's text, which may come in parts; parts that are no text are passed over."""
    if isinstance(content, list):
        texts = [_object(part).get("text") for part in content]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _encodable(words: str) -> str:
    """Without halves of surrogate pairs, which JSON can hold and no file."""
    return words.encode("utf-8", "replace").decode()


def _is_filtered(response: httpx2.Response) -> bool:
    error = _object(_object(_parsed(response)).get("error"))
    return error.get("code") == "content_filter"


def _parsed(response: httpx2.Response) -> Any:
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError):
        return None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _asked_wait(header: str) -> float:
    """Seconds of a Retry-After header; 0 for a date or none."""
    try:
        return max(0.0, float(header))
    except ValueError:
        return 0.0
