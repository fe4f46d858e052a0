"""A judge that is a service: a real server on loopback, which misbehaves in every way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from megarlhf.data.arithmetic import words
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.errors import ConfigError, JudgeError, JudgeSilentError
from megarlhf.judges import remote
from megarlhf.judges.remote import RemoteConfig
from megarlhf.judges.texts import Reader, Response, text_judge
from megarlhf.observe.writers import read_metrics
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from tests.helpers.ranks import run_ranks
from tests.judges.test_panel import RESPONSES, prompt_set, rollout_of
from tests.test_cli_runs import megarlhf

TOKEN = "a-secret-that-nobody-may-see"
Answer = Callable[[dict[str, Any]], tuple[int, bytes]]


def lengths(asked: dict[str, Any]) -> tuple[int, bytes]:
    return 200, json.dumps({"scores": [len(each["response"]) for each in asked["responses"]]}).encode()


class Service(ThreadingHTTPServer):
    """Answers by `answer`; remembers what it was asked, and how much at once."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked, self.tokens, self.at_once, self.most = answer, [], [], 0, 0
        self.headers: dict[str, str] = {}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/judge"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.at_once += 1
            self.server.most = max(self.server.most, self.server.at_once)
            self.server.asked.append(asked)
            self.server.tokens.append(self.headers.get("Authorization"))
        try:
            code, body = self.server.answer(asked)
        finally:
            with self.server.lock:
                self.server.at_once -= 1
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **self.server.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(answer: Answer = lengths) -> Iterator[Service]:
    service = Service(answer)
    thread = threading.Thread(target=service.serve_forever)
    thread.start()
    try:
        yield service
    finally:
        service.shutdown()
        service.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LONGEST_PAUSE_S", 0.01)


def responses(count: int) -> list[Response]:
    return [
        Response(f"p{n}", "x" * n, "5", {"prompt": f"p{n}", "level": n, "odd": {1, 2}}, n + 1) for n in range(count)
    ]


class Alone:
    """A mesh of one rank, as far as a service asks."""

    def size(self, axis: str) -> int:
        return 1


def reader(patience_s: float = 60.0) -> Reader:
    nobody: Any = None
    return Reader(nobody, nobody, cast("Any", Alone()), patience_s)


def judge(url: str, count: int = 5, **settings: Any) -> list[float]:
    cfg = RemoteConfig.model_validate({"kind": "remote", "url": url, "timeout_s": 5, "attempts": 3, **settings})
    return [opinion.score for opinion in cfg.scorer("judges.taste", reader())(responses(count))]


def test_batches_are_asked_in_order_and_few_at_once() -> None:
    def slowly(asked: dict[str, Any]) -> tuple[int, bytes]:
        time.sleep(0.05)
        return lengths(asked)

    with serving(slowly) as service:
        cfg = RemoteConfig(kind="remote", url=service.url, batch=3, in_flight=3)
        said = cfg.scorer("judges.taste", reader())(responses(23))
        assert [(opinion.score, opinion.failed) for opinion in said] == [(n, False) for n in range(23)]
        assert sorted(len(asked["responses"]) for asked in service.asked) == [2, *[3] * 7]
        assert 1 < service.most <= 3
        first = next(asked for asked in service.asked if asked["responses"][0]["prompt"] == "p0")
        # A column that is not JSON, such as a set, stays here.
        assert first["responses"][1] == {
            "prompt": "p1",
            "response": "x",
            "answer": "5",
            "columns": {"prompt": "p1", "level": 1},
        }
        assert service.tokens == [None] * 8


def test_ranks_share_what_may_be_in_flight() -> None:
    cfg = RemoteConfig(kind="remote", url="http://x", in_flight=4)
    assert [(cfg.ranks(world), cfg.in_flight // cfg.ranks(world)) for world in (1, 2, 3, 4, 64)] == [
        *((1, 4), (2, 2), (3, 1), (4, 1), (4, 1)),
    ]


def test_the_token_comes_from_the_environment_and_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = RemoteConfig(kind="remote", url="http://127.0.0.1:9/", token_variable="MY_TOKEN")
    for bad in ("", f"{TOKEN}\n", f" {TOKEN}", f"{TOKEN}\u00e9"):
        monkeypatch.setenv("MY_TOKEN", bad)
        with pytest.raises(ConfigError, match=r"judges\.taste\.token_variable=MY_TOKEN: that .* is empty, or") as none:
            cfg.check("judges.taste", prompt_set()[0], "")
        assert TOKEN not in str(none.value)
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    cfg.check("judges.taste", prompt_set()[0], "")
    with serving() as service:
        judge(service.url, token_variable="MY_TOKEN")
        assert service.tokens == [f"Bearer {TOKEN}"]
    with serving(lambda asked: (401, b"who are you?")) as service:
        with pytest.raises(JudgeError, match=r"refuses the request \(status 401: 'who are you\?'\)") as error:
            judge(service.url, token_variable="MY_TOKEN")
        assert len(service.asked) == 1, "a refusal is not asked again"
    assert TOKEN not in str(error.value)
    assert TOKEN not in cfg.to_yaml()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nowhere", "is no address; write http://HOST:PORT/PATH."),
        ("ftp://x/y", "is no address"),
        ("http://me:secret@x/y", "holds a password, which would be logged"),
        ("http://x:port/", "is no address"),
    ],
)
def test_an_address_that_is_none_is_refused(url: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        RemoteConfig(kind="remote", url=url).check("judges.taste", prompt_set()[0], "")
    assert says in str(error.value)
    assert "secret" not in str(error.value)


BAD: dict[str, tuple[Answer, str]] = {
    "words": (lambda asked: (200, b"fine, thanks"), "answered 'fine, thanks'; it must be JSON"),
    "nested": (lambda asked: (200, b"[" * 100_000), "it must be JSON"),
    "no scores": (lambda asked: (200, b'{"score": [1]}'), "it must be JSON"),
    "no object": (lambda asked: (200, b"[1, 2, 3, 4, 5]"), "it must be JSON"),
    "no list": (lambda asked: (200, b'{"scores": 5}'), "gave 0 scores for 5 responses"),
    "too few": (lambda asked: (200, b'{"scores": [1, 2]}'), "gave 2 scores for 5 responses"),
    "too many": (lambda asked: (200, b'{"scores": [1, 2, 3, 4, 5, 6]}'), "gave 6 scores for 5 responses"),
    "NaN": (
        lambda asked: (200, b'{"scores": [1, 2, NaN, 4, 5]}'),
        "gave nan for a score; all must be numbers of a size up to 1e+12",
    ),
    "infinite": (lambda asked: (200, b'{"scores": [1, 2, 1e999, 4, 5]}'), "gave inf for a score"),
    "huge": (lambda asked: (200, b'{"scores": [1, 2, 1e31, 4, 5]}'), "gave 1e+31 for a score"),
    "a word": (lambda asked: (200, b'{"scores": [1, 2, "3", 4, 5]}'), "gave '3' for a score"),
    "true": (lambda asked: (200, b'{"scores": [1, 2, true, 4, 5]}'), "gave True for a score"),
    "null": (lambda asked: (200, b'{"scores": [1, 2, null, 4, 5]}'), "gave None for a score"),
    "not found": (lambda asked: (404, b"nothing here"), "refuses the request (status 404: 'nothing here')"),
    "elsewhere": (lambda asked: (302, b""), "refuses the request (status 302"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_judgement_is_named(name: str) -> None:
    answer, says = BAD[name]
    with serving(answer) as service, pytest.raises(JudgeError) as error:
        judge(service.url)
    assert str(error.value).startswith(f"judges.taste: {service.url} ")
    assert says in str(error.value)
    assert not isinstance(error.value, JudgeSilentError)
    assert len(service.asked) == 1


def test_a_service_that_is_overloaded_is_asked_again() -> None:
    codes = iter([503, 429])

    def later(asked: dict[str, Any]) -> tuple[int, bytes]:
        code = next(codes, 200)
        return lengths(asked) if code == 200 else (code, b"not now")

    with serving(later) as service:
        cfg = RemoteConfig(kind="remote", url=service.url, batch=5)
        said = cfg.scorer("judges.taste", reader())(responses(7))
        assert [opinion.score for opinion in said] == [0, 1, 2, 3, 4, 5, 6]
        assert len(service.asked) == 2 + 2
    # Which batch was put off is chance; whichever it was, its responses count as failures, and no others.
    assert sum(opinion.failed for opinion in said) in (2, 5, 7)


def hang_up(asked: dict[str, Any]) -> tuple[int, bytes]:
    raise ConnectionResetError


SILENT: dict[str, Answer] = {
    "status 500": lambda asked: (500, b""),
    "ReadTimeout": lambda asked: time.sleep(1.5) or lengths(asked),
    "RemoteProtocolError": hang_up,
}


@pytest.mark.parametrize("says", SILENT)
def test_one_that_stays_silent_is_given_up(says: str) -> None:
    with serving(SILENT[says]) as service, pytest.raises(JudgeSilentError) as error:
        judge(service.url, timeout_s=0.3)
    assert f"{service.url} does not answer (" in str(error.value)
    assert says in str(error.value)
    assert str(error.value).endswith("attempts: 3); see to the service.")
    assert len(service.asked) == 3


def test_a_body_that_cannot_be_read_is_no_silence() -> None:
    with serving(lengths) as service:
        service.headers = {"Content-Encoding": "gzip"}
        with pytest.raises(JudgeError, match=r"cannot be asked \(DecodingError\)") as error:
            judge(service.url)
    assert not isinstance(error.value, JudgeSilentError)


def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with serving() as service:
        assert judge(service.url) == [0, 1, 2, 3, 4]


def test_one_that_is_too_slow_for_the_other_ranks_is_given_up() -> None:
    def slowly(asked: dict[str, Any]) -> tuple[int, bytes]:
        time.sleep(0.3)
        return lengths(asked)

    with serving(slowly) as service:
        cfg = RemoteConfig(kind="remote", url=service.url, batch=1, in_flight=1)
        with pytest.raises(JudgeSilentError, match=r"has not judged a rank's responses in 0\.8 s, four fifths"):
            cfg.scorer("judges.taste", reader(1.0))(responses(20))
        assert len(service.asked) <= 4


def spread(url: str, rows: int) -> list[float]:
    """What a rank hears of a service of which two requests may be under way."""
    mesh = start(ParallelLayout(data=4), seed=1)
    prompts, tokens = prompt_set()
    own = Reader(prompts, build_tiny_tokenizer(words()), mesh, 60.0)
    rollout = rollout_of(prompts, tokens).rows(torch.arange(rows))
    return text_judge("taste", RemoteConfig(kind="remote", url=url, in_flight=2), own).judge(rollout).scores.tolist()


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_no_more_ranks_ask_than_may_and_each_row_once(rows: int) -> None:
    """With fewer rows than ranks too."""
    with serving() as service:
        for said in run_ranks(spread, 4, service.url, rows):
            assert said == [len(text) for text in RESPONSES[:rows]]
        assert len(service.asked) == min(rows, 2)
        assert sum(len(asked["responses"]) for asked in service.asked) == rows


def test_nobody_listening_is_silence() -> None:
    with serving() as service:
        url = service.url
    with pytest.raises(JudgeSilentError, match="ConnectError"):
        judge(url)


def ppo(url: str, run: str) -> list[str]:
    return [
        *("ppo", f"run_dir={run}", "layout.data=2", "actor.init=tiny-xs", "critic.init=tiny-xs", "seed=4"),
        *("prompts.source=arithmetic", "prompts.template=plain", "prompts.arithmetic.rows=16", "rollout_batch=8"),
        *(
            "global_batch=8",
            "micro_batch=4",
            "iterations=4",
            "ppo_epochs=1",
            "sampling.max_new_tokens=6",
            "save_every=2",
        ),
        *("judges.taste.kind=remote", f"judges.taste.url={url}", "judges.taste.attempts=1", "tokenizer=arithmetic"),
        *("shaping.normalise=running", "shaping.clip=9"),
    ]


@pytest.mark.slow
def test_a_run_whose_judge_falls_silent_saves_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """After three iterations, of which two are saved anyway; as equal as a run that nothing befell."""
    down = threading.Event()
    taken = []

    def answer(asked: dict[str, Any]) -> tuple[int, bytes]:
        taken.append(asked)
        return (500, b"") if down.is_set() and len(taken) > 2 * 3 else lengths(asked)

    with serving(answer) as service:
        done = megarlhf(*ppo(service.url, "whole"), directory=tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(taken) == 2 * 4
        taken.clear()
        down.set()
        done = megarlhf(*ppo(service.url, "broken"), directory=tmp_path)
        assert done.returncode == 75, done.stderr
        said = done.stderr.splitlines()
        assert f"judges.taste: {service.url} does not answer (status 500; attempts: 1); see to the service." in said[-2]
        assert said[-1] == "the state after step 3 is in broken/checkpoints, and the same command goes on from there."
        # And once more, to no avail: nothing is lost, nor saved twice.
        done = megarlhf(*ppo(service.url, "broken"), directory=tmp_path)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (75, said[-1])
        down.clear()
        done = megarlhf(*ppo(service.url, "broken"), directory=tmp_path)
        assert done.returncode == 0, done.stderr
    whole, broken = (read_metrics(tmp_path / run).rows for run in ("whole", "broken"))
    clocked = ("time/", "throughput/", "memory/")
    plain = [{k: v for k, v in row.items() if not k.startswith(clocked)} for row in whole]
    assert plain == [{k: v for k, v in row.items() if not k.startswith(clocked)} for row in broken]
    assert len(plain) == 4
