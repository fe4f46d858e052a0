"""A judge that is a service: batches of responses go to it as JSON over HTTP.

POST url {"responses": [{"prompt": ..., "response": "...", "answer": "...", "columns": {...}}, ...]}
200      {"scores": [number, ...]}                                            one for each, in order
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, cast

import httpx
from pydantic import Field
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from megarlhf.config.base import FreeToChange
from megarlhf.data.prompts import PromptSet
from megarlhf.errors import ConfigError, JudgeError, JudgeSilentError
from megarlhf.judges.texts import MOST, Opinion, Reader, Response, Scorer, TextJudgeConfig, is_score

LONGEST_PAUSE_S = 30.0
"""Between two attempts."""
PATIENCE = 0.8
"""Share of the seconds that other ranks wait in which the service must have judged a rank's rows."""
AGAIN = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
"""What may pass. No other error of a request does."""


class RemoteConfig(TextJudgeConfig):
    """A service."""

    kind: Literal["remote"]
    """`remote`: a service that is asked over HTTP."""
    url: Annotated[str, FreeToChange(said=True)]
    """Where batches are POSTed: {"responses": [{prompt, response, answer, columns}, ...]}, answered by {"scores":
    [number, ...]}."""
    batch: Annotated[int, FreeToChange()] = Field(default=32, ge=1)
    """Responses in one request."""
    in_flight: Annotated[int, FreeToChange()] = Field(default=4, ge=1)
    """Requests that are under way at once over all ranks, at most."""
    timeout_s: Annotated[float, FreeToChange()] = Field(default=60.0, gt=0)
    """Seconds in which a request connects, and again in which a part of its answer comes."""
    attempts: Annotated[int, FreeToChange()] = Field(default=5, ge=1)
    """Times that a request is made while the service is silent, overloaded or broken (429, 5xx), with random pauses: of
    up to 1, 2, 4, ... and at most 30 seconds. Then, or after four fifths of the run's timeout_s, the run saves its
    state and stops, with exit code 75."""
    token_variable: Annotated[str, FreeToChange()] = ""
    """Environment variable that holds a bearer token; empty sends none. The token itself is never written down."""

    def check(self, setting: str, prompts: PromptSet, source: str) -> str:
        """Nothing, and nobody is asked yet. Raises ConfigError where the address is none, or the token is not there."""
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL:
            url = httpx.URL()
        if "@" in self.url.partition("?")[0]:
            raise ConfigError(f"{setting}.url holds a password, which would be logged; use token_variable instead.")
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"{setting}.url={self.url} is no address; write http://HOST:PORT/PATH.")
        # h11 quotes a header that it refuses, so that it must never see a bad one.
        if self.token_variable and not re.fullmatch(r"[\x21-\x7e]+", os.environ.get(self.token_variable, "")):
            raise ConfigError(
                f"{setting}.token_variable={self.token_variable}: that environment variable is empty, or has "
                "spaces, line ends or letters outside of ASCII; set it to the token alone."
            )
        return ""

    def ranks(self, world: int) -> int:
        """So many that together they keep to `in_flight`."""
        return min(self.in_flight, world)

    def scorer(self, setting: str, reader: Reader) -> Scorer:
        """What asks the service."""
        threads = self.in_flight // self.ranks(reader.mesh.size("world"))
        return _Service(f"{setting}: {self.url}", self, threads, reader.patience_s * PATIENCE)


@dataclass(frozen=True)
class _Service:
    what: str
    cfg: RemoteConfig
    threads: int
    patience_s: float

    def __call__(self, responses: Sequence[Response]) -> list[Opinion]:
        """One opinion a response."""
        cfg, deadline = self.cfg, time.monotonic() + self.patience_s
        batches = [responses[start : start + cfg.batch] for start in range(0, len(responses), cfg.batch)]
        token = os.environ.get(cfg.token_variable, "") if cfg.token_variable else ""
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        pool = ThreadPoolExecutor(self.threads)
        # trust_env: a proxy or a .netrc of the environment is not for what policies write.
        with httpx.Client(timeout=cfg.timeout_s, headers=headers, trust_env=False) as client:
            try:
                said = pool.map(partial(self._ask, client, deadline), batches)
                return [opinion for part in said for opinion in part]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, client: httpx.Client, deadline: float, responses: Sequence[Response]) -> list[Opinion]:
        """One batch, asked again while the service may yet answer.

        Raises:   JudgeSilentError when it never does, JudgeError where its answer is none.
        """
        body = json.dumps({"responses": [_payload(each) for each in responses]}).encode()
        again = Retrying(
            retry=retry_if_exception_type((*AGAIN, _BusyError)),
            stop=stop_after_attempt(self.cfg.attempts),
            wait=wait_random_exponential(multiplier=1, max=LONGEST_PAUSE_S),
            reraise=True,
        )
        try:
            reply = again(self._post, client, body, deadline)
        except (*AGAIN, _BusyError) as error:
            reason = str(error) if isinstance(error, _BusyError) else type(error).__name__
            raise JudgeSilentError(
                f"{self.what} does not answer ({reason}; attempts: {self.cfg.attempts}); see to the service."
            ) from None
        except httpx.RequestError as error:
            raise JudgeError(f"{self.what} cannot be asked ({type(error).__name__}); see to the service.") from None
        asked_again = again.statistics["attempt_number"] > 1
        return [opinion._replace(failed=asked_again) for opinion in self._opinions(reply, len(responses))]

    def _post(self, client: httpx.Client, body: bytes, deadline: float) -> httpx.Response:
        if time.monotonic() > deadline:
            raise JudgeSilentError(
                f"{self.what} has not judged a rank's responses in {self.patience_s:g} s, four fifths of timeout_s; "
                "make it quicker, or raise timeout_s or in_flight."
            )
        reply = client.post(self.cfg.url, content=body)
        if reply.status_code == 429 or reply.status_code >= 500:
            raise _BusyError(f"status {reply.status_code}")
        return reply

    def _opinions(self, reply: httpx.Response, count: int) -> list[Opinion]:
        shown = repr(reply.text[:80])
        if reply.status_code != 200:
            raise JudgeError(
                f"{self.what} refuses the request (status {reply.status_code}: {shown}); mend what it is asked."
            )
        try:
            scores: Any = reply.json()["scores"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise JudgeError(f'{self.what} answered {shown}; it must be JSON, {{"scores": [number, ...]}}.') from None
        given = cast("list[Any]", scores) if isinstance(scores, list) else []
        if len(given) != count:
            raise JudgeError(
                f"{self.what} gave {len(given)} scores for {count} responses; it must give a list of one for each."
            )
        wrong = [score for score in given if not is_score(score)]
        if wrong:
            raise JudgeError(
                f"{self.what} gave {wrong[0]!r} for a score; all must be numbers of a size up to {MOST:g}."
            )
        return [Opinion(float(score)) for score in given]


class _BusyError(Exception):
    """It answers, but not now."""


def _payload(response: Response) -> dict[str, Any]:
    """What of a response is JSON; a column that is not stays here."""
    columns = {name: value for name, value in response.columns.items() if _is_json(value)}
    prompt = response.prompt if _is_json(response.prompt) else str(response.prompt)
    return {"prompt": prompt, "response": response.response, "answer": response.answer, "columns": columns}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
