"""A judge that is a service: batches of responses go to it as JSON over HTTP.

POST url {"responses": [{"prompt": ..., "response": "...", "answer": "...", "columns": {...}}, ...]}
200      {"scores": [number, ...]}                                            one for each, in order
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, cast

import httpx
from pydantic import Field
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from megarlhf.data.prompts import PromptSet
from megarlhf.errors import ConfigError, JudgeError, JudgeSilentError
from megarlhf.judges.texts import Opinion, Response, Scorer, TextJudgeConfig

LONGEST_WAIT_S = 30.0
"""Between two attempts."""


class RemoteConfig(TextJudgeConfig):
    """A service."""

    kind: Literal["remote"]
    """`remote`: a service that is asked over HTTP."""
    url: str
    """Where batches are POSTed: {"responses": [{prompt, response, answer, columns}, ...]}, answered by {"scores":
    [number, ...]}."""
    batch: int = Field(default=32, ge=1)
    """Responses in one request."""
    in_flight: int = Field(default=4, ge=1)
    """Requests that are under way at once, over all ranks."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds that one request may take."""
    attempts: int = Field(default=5, ge=1)
    """Times that a request is made while the service is silent, overloaded or broken (429, 5xx), with random pauses: of
    up to a second at first, half a minute at most. Then the run saves its state and stops, with exit code 75."""
    token_variable: str = ""
    """Environment variable that holds a bearer token; empty sends none. The token itself is never written down."""

    def check(self, name: str, prompts: PromptSet, source: str) -> None:
        """Raise ConfigError where the address is none, or the token is not there. Nobody is asked yet."""
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.userinfo:
            raise ConfigError(f"judges.{name}.url holds a password, which would be logged; use token_variable instead.")
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"judges.{name}.url={self.url} is no address; write http://HOST:PORT/PATH.")
        if self.token_variable and not os.environ.get(self.token_variable):
            raise ConfigError(
                f"judges.{name}.token_variable={self.token_variable}: that environment variable is empty; set it."
            )

    def ranks(self, world: int) -> int:
        """So many that together they keep to `in_flight`."""
        return min(self.in_flight, world)

    def scorer(self, name: str, world: int) -> Scorer:
        """What asks the service."""
        return partial(_judged, self, f"judges.{name}: {self.url}", self.in_flight // self.ranks(world))


def _judged(cfg: RemoteConfig, what: str, threads: int, responses: Sequence[Response]) -> list[Opinion]:
    batches = [responses[start : start + cfg.batch] for start in range(0, len(responses), cfg.batch)]
    token = os.environ.get(cfg.token_variable, "") if cfg.token_variable else ""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    pool = ThreadPoolExecutor(threads)
    # trust_env: a proxy or a .netrc of the environment is not for what policies write.
    with httpx.Client(timeout=cfg.timeout_s, headers=headers, trust_env=False) as client:
        try:
            return [opinion for said in pool.map(partial(_ask, cfg, what, client), batches) for opinion in said]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _ask(cfg: RemoteConfig, what: str, client: httpx.Client, responses: Sequence[Response]) -> list[Opinion]:
    """One batch, asked again while the service may yet answer.

    Raises:   JudgeSilentError when it never does, JudgeError where its answer is none.
    """
    asked = {"responses": [_spelled(each) for each in responses]}
    again = Retrying(
        retry=retry_if_exception_type((httpx.TransportError, _BusyError)),
        stop=stop_after_attempt(cfg.attempts),
        wait=wait_random_exponential(multiplier=1, max=LONGEST_WAIT_S),
        reraise=True,
    )
    try:
        answer = again(_post, client, cfg.url, asked)
    except (httpx.TransportError, _BusyError) as error:
        raise JudgeSilentError(
            f"{what} does not answer ({type(error).__name__}: {error}; {cfg.attempts} attempts of up to "
            f"{cfg.timeout_s:g} s); see to the service."
        ) from None
    return _opinions(what, answer, len(responses))


class _BusyError(Exception):
    """It answers, but not now."""


def _post(client: httpx.Client, url: str, asked: dict[str, Any]) -> httpx.Response:
    answer = client.post(url, json=asked)
    if answer.status_code == 429 or answer.status_code >= 500:
        raise _BusyError(f"status {answer.status_code}")
    return answer


def _spelled(response: Response) -> dict[str, Any]:
    columns = {name: value for name, value in response.columns.items() if _is_json(value)}
    return {"prompt": response.prompt, "response": response.response, "answer": response.answer, "columns": columns}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _opinions(what: str, answer: httpx.Response, count: int) -> list[Opinion]:
    shown = repr(answer.text[:80])
    if answer.status_code != 200:
        raise JudgeError(f"{what} refuses the request (status {answer.status_code}: {shown}); mend what it is asked.")
    try:
        scores: Any = answer.json()["scores"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise JudgeError(f'{what} answered {shown}; it must be JSON, {{"scores": [number, ...]}}.') from None
    given = cast("list[Any]", scores) if isinstance(scores, list) else []
    if len(given) != count:
        raise JudgeError(f"{what} gave {len(given)} scores for {count} responses; it must give a list of one for each.")
    wrong = [score for score in given if not _is_number(score)]
    if wrong:
        raise JudgeError(f"{what} gave {wrong[0]!r} for a score; all must be finite numbers.")
    return [Opinion(float(score)) for score in given]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30 and math.isfinite(value)
