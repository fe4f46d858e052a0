"""A judge that runs what a response says: it is worth the tests that its program passes, in a sandbox (sandbox.py).

A test is text in and text out, of a whole program, or a statement such as `assert f(1) == 2`, of what the program
defines. The first kind compares, here, what the program printed; the second is in two_sides.py. Either way the program
is never shown what is expected, and each test has a program of its own, started afresh.
"""

from __future__ import annotations

import ast
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

from pydantic import Field

from megarlhf.config import Config
from megarlhf.config.base import FreeToChange
from megarlhf.data.prompts import PromptSet
from megarlhf.errors import DataError, JudgeError
from megarlhf.judges.sandbox import Finished, Isolation, Job, Limits, Sandbox, open_sandbox, run
from megarlhf.judges.texts import Opinion, Reader, Response, RightOrWrongConfig, Scorer

PATIENCE = 0.8
"""Share of the seconds that other ranks wait in which a rank's programs must have run."""
FENCED = re.compile(
    r"^[ \t]*```(?:python3?|py)[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE | re.IGNORECASE
)
TWO_SIDES = (Path(__file__).parent / "two_sides.py").read_text(encoding="utf-8")


class Printed(NamedTuple):
    """A test of a whole program."""

    stdin: str
    stdout: str


class Asserted(NamedTuple):
    """A test of what a program defines."""

    statements: str


Test = Printed | Asserted


class SandboxedTests(Config):
    """Where tests of programs are, and how those are run."""

    column: str = "tests"
    """Column with a prompt's tests: a list, or a JSON text of one, of {"stdin": "...", "stdout": "..."} (also named
    "expected") for whole programs, and of statements such as "assert f(1) == 2" for what they define."""
    cpu_s: int = Field(default=4, ge=1, le=3600)
    """Seconds that each process of a program computes, in each test; for `processes` of them together, so much each."""
    wall_s: float = Field(default=8.0, gt=0, le=3600)
    """Seconds that a test takes at most, whatever the program does. Of the machine's clock: leave room for its load."""
    memory_mb: int = Field(default=512, ge=64, le=1 << 20)
    """MiB of addresses that each process of a program has."""
    processes: int = Field(default=4, ge=1, le=4096)
    """Processes and threads that a program has at once."""
    open_files: int = Field(default=64, ge=16, le=4096)
    """Files that each process of a program has open at once."""
    output_kb: int = Field(default=256, ge=1, le=1 << 20)
    """KiB that a program may print, to standard output and to standard error each; with more it is ended."""
    scratch_mb: int = Field(default=16, ge=1, le=1 << 16)
    """MiB that a program's files take, in memory."""
    workers: Annotated[int, FreeToChange()] = Field(default=2, ge=1, le=4096)
    """Tests under way at once on each rank. In the worst case a rank needs tests x wall_s / workers seconds, which must
    be less than four fifths of the run's timeout_s."""
    isolation: Annotated[Isolation, FreeToChange(said=True)] = "auto"
    """What keeps programs apart: `bubblewrap`, or Linux's `namespaces` directly; `auto` takes the first that works
    here, and refuses where none does. With `none` programs run as you, and can read, delete and send what you can."""

    @property
    def limits(self) -> Limits:
        """Of one program."""
        return Limits(**{name: vars(self)[name] for name in Limits.__dataclass_fields__})


class CodeTestsConfig(RightOrWrongConfig, SandboxedTests):
    """Tests of the program in a response."""

    kind: Literal["code_tests"]
    """`code_tests`: the tests that the program in a response passes; it is run in a sandbox. The program is the last
    block that begins with ```python, or else the whole response."""
    reward: Literal["share", "all"] = "share"
    """Score: from `wrong` to `right` by the share of tests passed; or `right` where all are, else `wrong`."""

    @property
    def verifier(self) -> Literal["code_tests"]:
        """By all tests of its prompt."""
        return "code_tests"

    def check(self, setting: str, prompts: PromptSet, source: str) -> str:
        """That programs run unguarded, where they do.

        Raises:   DataError where a prompt has no tests that can be run, ConfigError where there is no sandbox here.
        """
        for index, columns in zip(prompts.ids, prompts.columns, strict=True):
            found = parse_tests(columns.get(self.column))
            if isinstance(found, str):
                raise DataError(f"{source}, row {index + 1}, column {self.column!r}: {found}; {setting} needs {FORM}.")
        _opened(self.isolation, self.limits, setting)
        return f"{setting} runs generated programs unguarded, as you" if self.isolation == "none" else ""

    def scorer(self, setting: str, reader: Reader) -> Scorer:
        """What runs programs. Raises ConfigError where there is no sandbox on this node."""
        sandbox = _opened(self.isolation, self.limits, setting)
        return _Tester(setting, self, sandbox, reader.patience_s * PATIENCE)


FORM = 'a list of {"stdin": "...", "stdout": "..."} or of statements such as "assert f(1) == 2", or a JSON text of one'


@cache
def _opened(isolation: Isolation, limits: Limits, setting: str) -> Sandbox:
    """Tried once a process."""
    return open_sandbox(isolation, limits, setting)


def parse_tests(value: Any) -> list[Test] | str:
    """The tests in a column, or else what is wrong with them."""
    found: Any = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError) as error:
            return f"its text is no JSON ({error})"
    if found is None or found == []:
        return "no tests"
    if not isinstance(found, list):
        return f"no list, but {type(found).__name__}"
    tests: list[Test] = []
    for number, each in enumerate(cast("list[Any]", found), 1):
        test = _test(each)
        if isinstance(test, str):
            return f"test {number} {test}"
        tests.append(test)
    return tests


def _test(value: Any) -> Test | str:
    if isinstance(value, str):
        try:
            tree = ast.parse(value)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return f"is no Python ({error})"
        asserts = any(isinstance(node, ast.Assert) for node in ast.walk(tree))
        return Asserted(value) if asserts else "asserts nothing"
    given: Mapping[str, Any] = cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}
    stdin, stdout = given.get("stdin", ""), given.get("stdout", given.get("expected"))
    if not isinstance(stdin, str) or not isinstance(stdout, str):
        return 'is neither a statement nor has texts "stdin" and "stdout"'
    return Printed(stdin, stdout)


def program_of(response: str) -> str:
    """The last block of Python, to its end or that of the response; the whole response where there is none."""
    blocks = FENCED.findall(response)
    return blocks[-1] if blocks else response


def passes(sandbox: Sandbox, program: str, test: Test) -> bool:
    """Whether a program passes a test. Raises JudgeError where that could not be found out."""
    if len(program.encode(errors="replace")) > sandbox.limits.scratch_mb << 19:
        return False  # with what else lies there it might not find room, which would be the sandbox's fault
    if isinstance(test, Printed):
        (said,) = run(sandbox, Job({"program.py": program}, ["program.py"], test.stdin.encode(errors="replace")))
        return is_right(said, test.stdout)
    (hears, tells), (is_told, says) = os.pipe(), os.pipe()
    side = {"two_sides.py": TWO_SIDES}
    asking = Job(
        {**side, "test.py": test.statements}, ["two_sides.py", "test", f"{hears}", f"{says}"], keep=(hears, says)
    )
    answers = ["two_sides.py", "program", f"{is_told}", f"{tells}"]
    said, _ = run(sandbox, asking, Job({**side, "program.py": program}, answers, keep=(is_told, tells)))
    return (said.ended, said.code) == ("itself", 0)


def is_right(said: Finished, expected: str) -> bool:
    """Whether a program ended by itself, without error, and printed what was expected.

    White space at ends of lines, and lines that are nothing else at the end, do not count.
    """
    printed = said.stdout.decode(errors="replace")
    return (said.ended, said.code) == ("itself", 0) and _lines(printed) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


@dataclass(frozen=True)
class _Tester:
    what: str
    cfg: CodeTestsConfig
    sandbox: Sandbox
    patience_s: float

    def __call__(self, responses: Sequence[Response]) -> list[Opinion]:
        """One opinion a response; programs of one prompt that are equal are run once."""
        programs = [(each.row, program_of(each.response)) for each in responses]
        distinct = dict(zip(programs, responses, strict=True))
        pool = ThreadPoolExecutor(self.cfg.workers)
        try:
            said = pool.map(partial(self._opinion, time.monotonic() + self.patience_s), distinct.values())
            opinions = dict(zip(distinct, said, strict=True))
        finally:
            pool.shutdown(cancel_futures=True)
        return [opinions[program] for program in programs]

    def _opinion(self, deadline: float, of: Response) -> Opinion:
        program, tests = program_of(of.response), parse_tests(of.columns[self.cfg.column])
        assert not isinstance(tests, str)  # as checked
        passed = 0
        for tried, test in enumerate(tests):
            if self.cfg.reward == "all" and passed < tried:
                break  # nothing can be gained any more
            if time.monotonic() > deadline:
                raise JudgeError(
                    f"{self.what} has not run a rank's programs in {self.patience_s:g} s, four fifths of timeout_s; "
                    f"lower wall_s={self.cfg.wall_s:g}, or raise workers={self.cfg.workers} or timeout_s."
                )
            passed += passes(self.sandbox, program, test)
        right = passed == len(tests)
        share = float(right) if self.cfg.reward == "all" else passed / len(tests)
        score = self.cfg.right if right else self.cfg.wrong + (self.cfg.right - self.cfg.wrong) * share
        return Opinion(score, correct=right)
