"""Tests of generated programs: what passes, what a program cannot forge, and what is refused before a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from megarlhf.data.arithmetic import words
from megarlhf.data.prompts import PromptSet
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.errors import ConfigError, DataError, JudgeError
from megarlhf.judges import code_tests
from megarlhf.judges.code_tests import Asserted, CodeTestsConfig, Printed, parse_tests, passes, program_of
from megarlhf.judges.sandbox import Job, Limits, Sandbox, open_sandbox, run
from megarlhf.judges.texts import Opinion, Reader, Response, text_judge
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from tests.helpers.ranks import run_ranks
from tests.judges.test_panel import rollout_of

LIMITS = Limits(cpu_s=5, wall_s=20, memory_mb=256, processes=4, open_files=32, output_kb=64, scratch_mb=4)


def opened() -> Sandbox:
    try:
        return open_sandbox("auto", LIMITS, "judges.code")
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def verdicts() -> dict[str, bool]:
    """Of every statement below, a few at once."""
    sandbox = opened()
    every = {**{name: (HONEST, name) for name in (*TRUE, *FALSE)}, **FORGED}
    with ThreadPoolExecutor(4) as pool:
        said = pool.map(lambda pair: passes(sandbox, pair[0], Asserted(pair[1])), every.values())
        return dict(zip(every, said, strict=True))


HONEST = """
from collections import Counter
from dataclasses import dataclass
@dataclass
class Point:
    x: int
    def moved(self, by): return Point(self.x + by)
LIMIT = 7
def f(x): return x + 1
def sort(items): items.sort(); return None
def count(n):
    for i in range(n): yield i
def sum(a, b): return 6
def no(x): raise ValueError(f"no {x}")
def nest(x, *, y=2): return {1: (x, {2.5}, [None, True]), "b": b"\\x00", y: 1j}
def letters(text): return Counter(text)
print("noise")
if __name__ == "__main__":
    raise SystemExit("only for whole programs")
"""
TRUE = (
    "assert f(1) == 2",
    "assert f(10**30) == 10**30 + 1 and f(-1.5) == -0.5 and f(float('inf')) == float('inf'), 'numbers'",
    "items = [3, 1]\nassert sort(items) is None\nassert items == [1, 3]",
    "assert list(count(3)) == [0, 1, 2] and max(count(3)) == 2",
    "assert sum(10, 15) == 6",
    "assert math.isclose(f(0.1), 1.1)",
    "import math as m\nassert m.isclose(f(0.1), 1.1)",
    "assert nest('\\ud800', y=3) == {1: ('\\ud800', {2.5}, [None, True]), 'b': b'\\x00', 3: 1j}",
    "assert letters('aab') == {'a': 2, 'b': 1}",
    "assert Point(1) == Point(1) and Point(1) != Point(2)",
    "p = Point(4).moved(2)\nassert p.x == 6 and str(p) == 'Point(x=6)'",
    "assert LIMIT == 7",
    "try:\n    no(5)\nexcept ValueError as error:\n    assert str(error) == 'no 5'\nelse:\n    assert False",
    "assert [f(x) for x in range(3)] == [1, 2, 3] and all(map(lambda x: f(x) > x, [1, 2]))",
)
FALSE = (
    "assert f(1) == 3",
    "assert missing(1) == 2",
    "assert f(1) == 2\nassert f(2) == 2",
    "assert f('a') == 'a1'",
    "assert no(5) == 5",
    "assert Point(1) == 1 or Point(1) in [1, 2] or abs(Point(1) - 1) < 2",
    "import sys\nsys.exit(0)\nassert f(1) == 2",
)

ANY = """
class Any:
    def yes(self, *args, **named): return True
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = yes
    def same(self, *args): return self
    __sub__ = __rsub__ = __add__ = __abs__ = __round__ = __call__ = __getattr__ = same
    def __float__(self): return 0.0
    def __int__(self): return 2
    __index__ = __hash__ = __len__ = __int__
"""
FORGED: dict[str, tuple[str, str]] = {
    "an object that equals everything": (ANY + "def f(x): return Any()", "assert f(1) == 2"),
    "a number that equals everything": (
        (
            "class Two(int):\n    __hash__ = int.__hash__\n"
            "    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\n"
            "def f(x): return Two(5)"
        ),
        "assert f(1) == 2",
    ),
    "an object that is close to everything": (ANY + "def f(x): return Any()", "assert abs(f(1) - 1.41) < 0.01"),
    "an object that is a number, it says": (
        ANY + "    __class__ = int\ndef f(x): return Any()",
        "assert isinstance(f(1), int) and f(1) == 2",
    ),
    "a function that is everything": (ANY + "f = Any()", "assert f(1) == 2"),
    "an object among others": (ANY + "def f(x): return [Any()]", "assert f(1) == [2] or 2 in f(1)"),
    "an object that holds everything": (
        (
            "class All:\n    def __contains__(self, x): return True\n    def __iter__(self): return iter([])\n"
            "def f(x): return All()"
        ),
        "assert 2 in f(1)",
    ),
    "it exits": ("import sys\nsys.exit(0)\ndef f(x): return 2", "assert f(1) == 2"),
    "it exits at once": ("import os\nos._exit(0)", "assert f(1) == 2"),
    "it exits when it is called": ("def f(x): raise SystemExit(0)", "assert f(1) == 2"),
    "it exits at once when it is called": ("import os\ndef f(x): os._exit(0)", "assert f(1) == 2"),
    "it takes assertions away": (
        (
            "import builtins\nclass AssertionError(BaseException): pass\nbuiltins.AssertionError = AssertionError\n"
            "builtins.abs = lambda x: 0\nimport math\nmath.isclose = lambda *_: True\nabs = lambda x: 0\n"
            "class math: isclose = lambda *_: True\ndef f(x): return 5.0"
        ),
        "assert abs(f(1) - 2) < 1 or math.isclose(f(1), 2)",
    ),
    "it takes printing and files over": (
        (
            "import builtins, json, os, sys\nwas = print\n"
            'builtins.print = lambda *a, **k: was(\'{"value": true, "changed": []}\','
            " file=k.get('file'), flush=True)\nsys.stdout = sys.stderr = open(os.devnull, 'w')\ndef f(x): return 5"
        ),
        "assert f(1) == 2",
    ),
    "it answers with an exit": (
        (
            "import json\ndumps = json.dumps\njson.dumps = lambda said: dumps({'error': 'SystemExit', 'text': '0'})\n"
            "def f(x): return 5"
        ),
        "assert f(1) == 2",
    ),
    "it ends the loops of the test": (
        "def f(x): raise StopIteration",
        "assert all(map(lambda x: f(x) == 2, [1])) and list(map(f, [1])) in ([], [2])",
    ),
    "it answers without being asked": (
        (
            'import os, sys\nfor fd in range(3, 32):\n    try: os.write(fd, b\'{"value": 2, "changed": []}\\n\' * 9)\n'
            "    except OSError: pass\ndef f(x): return 5"
        ),
        "assert f(1) == 2 and f(3) == 4",
    ),
    "it answers without end": (
        (
            "import os\nfor fd in range(3, 32):\n    try:\n        while True: os.write(fd, b'[' * 65536)\n"
            "    except OSError: pass"
        ),
        "assert f(1) == 2",
    ),
    "it answers too deep": (
        "import json\njson.dumps = lambda said: '[' * 100000\ndef f(x): return 5",
        "assert f(1) == 2",
    ),
    "it reads what is asked, and looks for the rest": (
        (
            "import gc, glob, sys\ndef f(x):\n"
            "    seen = [g for g in gc.get_objects() if isinstance(g, dict) and 'expected' in g]\n"
            "    for path in glob.glob('/*/test.py'): return 2\n"
            "    frame = sys._getframe()\n    while frame:\n"
            "        if 'expected' in frame.f_globals: return frame.f_globals['expected']\n"
            "        frame = frame.f_back\n    return seen"
        ),
        "expected = 2\nassert f(1) == expected",
    ),
    "it plants modules": (
        (
            "for name in ('json', 'ast', 'two_sides', 'test', 'sitecustomize', 'math'):\n"
            "    open(name + '.py', 'w').write('import os; os._exit(0)')\n"
            "import os, sys\nos.execv(sys.executable, [sys.executable, 'json.py'])"
        ),
        "assert math.isclose(f(1), 2)",
    ),
    "it ends everybody": (
        "import os, signal\ndef f(x): os.kill(-1, 9); os.kill(1, 2); os.kill(os.getppid(), 9)",
        "assert f(1) == 2",
    ),
    "it changes what it is given": ("def f(x):\n    x.append(2)\n    return 2", "assert f((x := [1])) == x[0]"),
}


@pytest.mark.parametrize("statement", TRUE)
def test_statements_that_hold(statement: str, verdicts: dict[str, bool]) -> None:
    assert verdicts[statement]


@pytest.mark.parametrize("statement", FALSE)
def test_statements_that_do_not(statement: str, verdicts: dict[str, bool]) -> None:
    assert not verdicts[statement]


@pytest.mark.parametrize("name", FORGED)
def test_a_verdict_is_not_forged(name: str, verdicts: dict[str, bool]) -> None:
    assert not verdicts[name]


def test_what_can_be_forged_is_what_the_page_says() -> None:
    """If this fails, good: then the docstring of two_sides.py is to say less."""
    for program, statement in (
        (ANY + "def f(x): return Any()", "assert f(1)"),
        (ANY + "Point = Any", "assert Point() == Point()"),
    ):
        assert passes(opened(), program, Asserted(statement))


def test_most_of_them_would_be_forged_in_one_process() -> None:
    """So that they are worth trying: each as one file, with the test at its end, ends well."""
    sandbox = opened()
    files = [
        Job({"program.py": f"import math\n{program}\n{test}"}, ["program.py"]) for program, test in FORGED.values()
    ]
    with ThreadPoolExecutor(4) as pool:
        said = pool.map(lambda job: run(sandbox, job)[0], files)
        fooled = [name for name, each in zip(FORGED, said, strict=True) if each.code == 0]
    assert len(fooled) >= 12, fooled


@pytest.mark.parametrize(
    ("program", "stdin", "stdout", "right"),
    [
        ("print(int(input()) + int(input()))", "20\n22\n", "42", True),
        ("import sys\nprint(*sys.stdin.read().split(), sep=' \\n', end='\\n\\n')", "1 2", "1\n2\n", True),
        ("print('é', '\\u4e2d')", "", "é \u4e2d\n", True),
        ("print(' 42')", "", "42", False),
        ("print('42\\n43')", "", "42", False),
        ("print(42", "", "42", False),
        ("", "", "42", False),
        ("print(42)\n1 / 0", "", "42", False),
        ("print(42)  # " + "x" * (5 << 20), "", "42", False),
    ],
)
def test_whole_programs(program: str, stdin: str, stdout: str, right: bool) -> None:
    assert passes(opened(), program, Printed(stdin, stdout)) is right


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("Here:\n```python\nprint(1)\n```\nor\n```Python3\nprint(2)\n```\nDone.", "print(2)\n"),
        ("```py\nprint(1)", "print(1)"),
        ("  ```python\nprint('```')\n  ```", "print('```')\n"),
        ("```\nprint(1)\n```", "```\nprint(1)\n```"),
        ("print(1)", "print(1)"),
        ("```python\n```", ""),
    ],
)
def test_the_program_is_the_last_block_or_all(response: str, program: str) -> None:
    assert program_of(response) == program


def test_tests_are_read_in_every_form() -> None:
    pairs = [{"stdin": "1", "stdout": "2"}, {"expected": "3"}, "assert f(1) == 2"]
    read = [Printed("1", "2"), Printed("", "3"), Asserted("assert f(1) == 2")]
    assert parse_tests(pairs) == parse_tests(json.dumps(pairs)) == read


BAD = {
    "none": (None, "no tests"),
    "an empty list": ([], "no tests"),
    "words": ("assert f(1) == 2", "its text is no JSON"),
    "an object": ({"stdin": ""}, "no list, but dict"),
    "a number": ([1], 'test 1 is neither a statement nor has texts "stdin" and "stdout"'),
    "no output": (["assert 1", {"stdin": "1"}], "test 2 is neither a statement"),
    "a number for output": ([{"stdin": "1", "stdout": 2}], "test 1 is neither a statement"),
    "no Python": (["assert f(1 == 2"], "test 1 is no Python"),
    "no assertion": (["f(1) == 2"], "test 1 asserts nothing"),
    "deep": ("[" * 100_000, "its text is no JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_tests_that_are_none_are_named_by_row_and_column(name: str) -> None:
    value, says = BAD[name]
    with pytest.raises(DataError) as error:
        config().check("judges.code", prompts([["assert f(1) == 2"], value]), "x.jsonl")
    assert str(error.value).startswith(f"x.jsonl, row 2, column 'tests': {says}")
    assert 'judges.code needs a list of {"stdin": "...", "stdout": "..."} or of statements' in str(error.value)


def config(**settings: Any) -> CodeTestsConfig:
    return CodeTestsConfig.model_validate({"kind": "code_tests", "memory_mb": 256, "wall_s": 20, **settings})


def prompts(tests: Sequence[Any], column: str = "tests") -> PromptSet:
    columns = [{"prompt": f"p{n}", column: each} for n, each in enumerate(tests)]
    return PromptSet([[1]] * len(tests), [""] * len(tests), range(len(tests)), 0, dropped=0, columns=columns)


class Alone:
    """A mesh of one rank."""

    def size(self, axis: str) -> int:
        return 1


def judged(responses: Sequence[str], tests: Any, patience_s: float = 600.0, **settings: Any) -> Sequence[Opinion]:
    nobody: Any = None
    opened()
    scorer = config(**settings).scorer("judges.code", Reader(nobody, nobody, cast("Any", Alone()), patience_s))
    return scorer([Response("p", each, "", {"tests": tests}, n + 1) for n, each in enumerate(responses)])


HALF = ["assert f(1) == 2", "assert f(2) == 5", {"stdin": "", "stdout": "x"}, {"stdin": "y", "stdout": "x"}]
RESPONSES = (
    "def f(x): return x + 1\nprint('x')",
    "```python\ndef f(x): return x * x + 1\nprint('x')\n```",
    "I cannot.",
)


@pytest.mark.parametrize(("reward", "scores"), [("share", [1.25, 2.0, -1.0]), ("all", [-1.0, 2.0, -1.0])])
def test_scores_are_by_the_share_of_tests_or_all(reward: str, scores: list[float]) -> None:
    said = judged(RESPONSES, json.dumps(HALF), reward=reward, right=2.0, wrong=-1.0)
    assert [each.score for each in said] == scores  # three of four tests: -1 + 3 * 3/4
    assert [each.correct for each in said] == [False, True, False]
    assert config(wrong=-1.0).wrong_score == -1.0


def test_equal_programs_of_a_prompt_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, str]] = []

    def passes(sandbox: Sandbox, program: str, test: Printed) -> bool:
        tried.append((program, test.stdout))
        return program == f"print({test.stdout})"

    monkeypatch.setattr(code_tests, "passes", passes)
    monkeypatch.setattr(code_tests, "open_sandbox", lambda *_: Sandbox("none", LIMITS, mapped=False))
    rows = [(1, "print(4)"), (2, "print(4)"), (1, "Well:\n```python\nprint(4)"), (1, "print(5)"), (1, "print(4)")]
    nobody: Any = None
    scorer = config(wall_s=19).scorer("judges.code", Reader(nobody, nobody, nobody, 600.0))
    tests = {1: [{"stdout": "4"}], 2: [{"stdout": "5"}]}
    said = scorer([Response("p", response, "", {"tests": tests[row]}, row) for row, response in rows])
    assert [each.correct for each in said] == [True, False, True, False, True]
    assert sorted(tried) == [("print(4)", "4"), ("print(4)", "5"), ("print(5)", "4")]


def test_programs_that_take_too_long_for_the_run_stop_it() -> None:
    with pytest.raises(
        JudgeError, match=r"has not run a rank's programs in 0 s, four fifths of timeout_s; lower wall_s"
    ):
        judged(RESPONSES, HALF, patience_s=0.0)


def test_unguarded_programs_are_said_before_a_run() -> None:
    assert config(isolation="none").check("judges.code", prompts([HALF]), "x") == (
        "judges.code runs generated programs unguarded, as you"
    )
    opened()
    assert config(column="checks").check("judges.code", prompts([HALF], "checks"), "x") == ""


PROGRAMS = ("The answer is 5.", "5", "6")


def on_ranks(layout: ParallelLayout) -> tuple[list[float], list[bool | None], list[float]]:
    """What a judge says on this rank of responses that are whole programs, or none."""
    tokenizer = build_tiny_tokenizer(words())
    ids = [tokenizer.encode_prompt("How many?", "plain")] * len(PROGRAMS)
    columns = [{"prompt": "How many?", "tests": [{"stdin": "", "stdout": ""}]}] * len(PROGRAMS)
    found = PromptSet(ids, [""] * len(ids), range(len(ids)), tokenizer.pad_id, dropped=0, columns=columns)
    rollout = rollout_of(found, [a + tokenizer.encode_response(b) for a, b in zip(ids, PROGRAMS, strict=True)])
    reader = Reader(found, tokenizer, start(layout, seed=1), 600.0)
    said = text_judge("code", config(wrong=-1.0), reader).judge(rollout)
    return said.scores.tolist(), list(said.correct), said.token_scores.sum(1).tolist()


def test_ranks_judge_their_share_and_say_the_same() -> None:
    opened()
    for scores, correct, sums in run_ranks(on_ranks, 2, ParallelLayout(tensor=2)):
        assert scores == sums == [-1.0, 1.0, 1.0]  # words are no program; a number is one that prints nothing
        assert correct == [False, True, True]
