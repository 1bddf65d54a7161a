"""A model that someone serves: asked over the chat/completions interface that OpenAI's clients speak.

vLLM, llama.cpp's llama-server, Ollama, TGI and `transformers serve` all have it. Pictures go as PNG in data URLs.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from PIL import Image

from ...guard.base.errors import InputError
from ...guard.base.hub import LONGEST_WAIT, TRANSIENT
from ...guard.base.progress import bar
from ...guard.prompts.image_kinds import ImageKind
from ...guard.prompts.prompts import Prompt, illustrated
from ..behaviour.measure import MAX_NEW_TOKENS

ROUTE = "/chat/completions"
ATTEMPTS = 5
MAX_ANSWER_BYTES = 2**22
SHOWN = 200
"""Characters of a server's complaint that are repeated."""


class _Stay(HTTPRedirectHandler):
    """Follows no redirect: it would carry the key to wherever the answer points."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """Where and as what a model is served. url: with or without /v1.  key: sent as bearer token, shown nowhere.

    Call it as behaviour.Ask: answers are greedy (temperature 0) and as long as those that are measured from weights.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    concurrency: int = 8
    timeout: float = 120.0
    opener: OpenerDirector = field(default_factory=lambda: build_opener(_Stay), repr=False)

    def __post_init__(self) -> None:
        """Raises InputError for what is no http(s) URL, or one that holds a password."""
        try:
            parts = urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            sound = False
        if not sound or parts.query or parts.fragment:
            raise InputError(f"--endpoint {self.url[:SHOWN]}: not a URL such as http://localhost:8000/v1")
        if "@" in parts.netloc:
            raise InputError(
                f"--endpoint: leave user and password out of the URL ({parts.hostname}); keys come from the environment"
            )
        if self.concurrency < 1:
            raise InputError(f"--concurrency {self.concurrency}: at least 1")

    @property
    def address(self) -> str:
        """What requests are sent to."""
        url = self.url.rstrip("/")
        if url.endswith(ROUTE):
            return url
        return url + ROUTE if urlsplit(url).path else f"{url}/v1{ROUTE}"

    def __call__(self, prompts: Sequence[Prompt], what: str, kind: ImageKind | None) -> list[str]:
        """Answers in the order of `prompts`. InputError in one line if the server cannot be had or says no."""
        answers = [""] * len(prompts)
        with bar() as progress, ThreadPoolExecutor(self.concurrency) as pool:
            task = progress.add_task(what, total=len(prompts))
            asked = {pool.submit(self.ask, prompt, kind): place for place, prompt in enumerate(prompts)}
            try:
                for done in as_completed(asked):
                    answers[asked[done]] = done.result()
                    progress.advance(task)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return answers

    def ask(self, prompt: Prompt, kind: ImageKind | None = None) -> str:
        """Returns the answer to one prompt with a picture of `kind` (None: as it is), tried again where that
        may help.
        """
        body = json.dumps(self._question(*illustrated([prompt], kind))).encode()
        for attempt in range(1, ATTEMPTS):
            try:
                return self._answer(body)
            except HTTPError as error:
                if error.code not in TRANSIENT:
                    raise self._failure(error) from None
                asked = error.headers.get("Retry-After", "")
                wait = float(asked) if asked.isdigit() else 2.0 ** (attempt - 1)
            except (OSError, http.client.HTTPException):
                wait = 2.0 ** (attempt - 1)
            time.sleep(min(LONGEST_WAIT, wait))
        try:
            return self._answer(body)
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(error) from None

    def _question(self, prompt: Prompt) -> dict[str, Any]:
        content: Any = prompt.text
        if prompt.image is not None:
            picture = {"type": "image_url", "image_url": {"url": data_url(prompt.image)}}
            content = [picture, {"type": "text", "text": prompt.text}]
        turn = {"role": "user", "content": content}
        return {
            "model": self.model,
            "messages": [turn],
            "max_tokens": MAX_NEW_TOKENS,
            "temperature": 0,
            "stream": False,
        }

    def _answer(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json", "User-Agent": "guardfold"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        with self.opener.open(Request(self.address, body, headers), timeout=self.timeout) as response:
            reply = response.read(MAX_ANSWER_BYTES)
        try:
            content = json.loads(reply)["choices"][0]["message"].get("content") or ""
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{self.address}: answered what chat/completions does not: {self._shown(reply)}") from None
        if isinstance(content, list):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        return str(content).strip()

    def _failure(self, error: Exception) -> InputError:
        if not isinstance(error, HTTPError):
            reason = error.reason if isinstance(error, URLError) else error
            complaint = self._shown(str(reason or type(error).__name__).encode())
            return InputError(f"{self.address}: cannot be reached ({complaint}); is the server up?")
        complaint = self._shown(error.read(MAX_ANSWER_BYTES))
        if error.code in (401, 403):
            return InputError(f"{self.address}: {error.code}, the key is missing or not valid; {complaint}")
        if error.code in (404, 400):
            return InputError(
                f"{self.address}: {error.code} for model {self.model!r} (its name? pictures?): {complaint}"
            )
        return InputError(f"{self.address}: {error.code}: {complaint}")

    def _shown(self, data: bytes) -> str:
        text = " ".join(data.decode("utf-8", "replace").split())
        return (text.replace(self.key, "<key>") if self.key else text)[:SHOWN]


def data_url(image: Image.Image) -> str:
    """Returns a picture as PNG in a data URL."""
    data = io.BytesIO()
    image.save(data, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
