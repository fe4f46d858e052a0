"""The house rules hold, and the checks that say so catch planted violations."""

from __future__ import annotations

import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

from megarlhf.observe.metrics import GLOSSARY
from megarlhf.observe.work import WORKED
from tests.helpers import house
from tests.helpers.house import Source

ROOT = Path(__file__).resolve().parents[1]
CODE = ("megarlhf", "kernels", "examples", "tools", "tests")
TOP_LEVEL = {
    *("megarlhf", "kernels", "examples", "tools", "tests", "setup.py", "README.md", "pyproject.toml", "Makefile"),
    *("Dockerfile", ".dockerignore"),
    *("CONTRIBUTING.md", "CHANGELOG.md", "constraints.txt", "benchmarks", "docs", ".ci", ".gitignore"),
    *("LICENSE", "CITATION.cff", ".pre-commit-config.yaml"),
}
YAML_LINES = 45


@cache
def sources() -> tuple[Source, ...]:
    files = [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]
    return tuple(Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in files)


@cache
def tracked() -> tuple[str, ...]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(path for path in listed.splitlines() if (ROOT / path).is_file())


@pytest.mark.parametrize("rule", house.FILE_RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_in_every_file(rule) -> None:
    found = [violation for source in sources() for violation in rule(source)]
    assert not found, "\n".join(found)


def test_every_setting_is_documented() -> None:
    found = list(house.documented_settings(s for s in sources() if not s.is_test))
    assert not found, "\n".join(found)


def test_every_metric_in_the_code_is_in_the_glossary() -> None:
    families = {name.split("/")[0] for name in GLOSSARY}
    judged = [source for source in sources() if not source.is_test and source.path != "megarlhf/observe/metrics.py"]
    used = [pair for source in judged for pair in house.metric_names(source, families)]
    unknown = [f"{where}: metric {name} has no entry" for where, name in used if name not in GLOSSARY]
    assert not unknown, "\n".join(unknown)


def test_every_metric_of_the_glossary_is_logged() -> None:
    """A name that nothing writes is a promise to its reader. Those of a phase are of one that is timed."""
    text = "\n".join(s.text for s in sources() if s.path.startswith("megarlhf/") and "/observe/" not in s.path)
    timed = set(re.findall(r'\bclock\("(\w+)"\)', text))
    counted = timed & set(WORKED)
    by_phase = {
        *(f"time/{phase}_s" for phase in timed),
        *(f"throughput/{phase}_tokens_per_s" for phase in counted),
        *(f"throughput/{phase}_flops_per_s" for phase in counted),
        *(f"mfu/{phase}" for phase in counted),
        *(f"compute/{phase}_flops" for phase in counted),
        *("time/iteration_s", "memory/peak_bytes", "compute/flops"),  # of every clock
    }
    written = {name for name in GLOSSARY if f'"{name}"' in text}
    assert GLOSSARY.keys() - written - by_phase == set()
    assert by_phase <= GLOSSARY.keys()


def test_the_ppo_page_exists() -> None:
    pages = [source.path for source in sources() if re.search(r"^def ppo_iteration\(", source.text, re.MULTILINE)]
    assert pages == ["megarlhf/trainers/ppo.py"]


def test_the_tree_is_the_tree() -> None:
    assert {path.split("/")[0] for path in tracked()} <= TOP_LEVEL
    packages = {Path(path).parent for path in tracked() if path.startswith("megarlhf/") and path.endswith(".py")}
    missing = sorted(f"{package}/__init__.py" for package in packages if not (ROOT / package / "__init__.py").exists())
    assert not missing
    # Hugging Face's `kernels` is another package: ours must not be importable under that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_documents_exist(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8")) > 200


def test_the_documents_draw_the_layers_that_are_enforced() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    # Parentheses mark a layer that may be missing; the documents draw what is there.
    there = [layer for layer in layers if not layer.startswith("(")]
    drawn = " -> ".join(there).replace("megarlhf.", "")
    for name in ("README.md", "CONTRIBUTING.md"):
        assert drawn in (ROOT / name).read_text(encoding="utf-8"), f"{name} does not draw {drawn}"


def test_citation_and_package_agree() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    package = (ROOT / "setup.py").read_text(encoding="utf-8")
    for field in ("version", "license"):
        assert f'{field}="{cited[field]}"' in package


def test_example_settings_are_short() -> None:
    long = [p for p in (ROOT / "examples").glob("*.yaml") if len(p.read_text("utf-8").splitlines()) > YAML_LINES]
    assert not long


def test_no_path_of_one_machine_is_in_the_repository() -> None:
    pattern = re.compile(r"(?<![\w.~$}])/(?:home|root|work|Users)/\w")
    texts = {path: (ROOT / path).read_text(encoding="utf-8", errors="replace") for path in tracked()}
    assert not [path for path, text in texts.items() if pattern.search(text)]


def long_function(lines: int, name: str = "f") -> str:
    return f"def {name}():\n" + "    x = 1\n" * (lines - 1)


def nested(depth: int) -> str:
    blocks = "".join(" " * 4 * (level + 1) + "if a:\n" for level in range(depth))
    return f"def f(a):\n{blocks}{' ' * 4 * (depth + 1)}return a\n"


MANY = ", ".join(f"a{i}" for i in range(8))

GOOD = [
    (house.file_length, "megarlhf/a.py", "x = 1\n" * 400),
    (house.file_length, "kernels/megarlhf_kernels/a.py", "x = 1\n" * 450),
    (house.function_size, "megarlhf/a.py", long_function(80)),
    (house.function_size, "megarlhf/trainers/ppo.py", long_function(60, "ppo_iteration")),
    (house.function_size, "megarlhf/a.py", f"class A:\n    def f(self, {MANY}): ...\n"),
    (house.function_size, "kernels/megarlhf_kernels/a.py", f"@jit\ndef f({MANY}, b): ...\n"),
    (house.function_size, "megarlhf/a.py", nested(4)),
    (house.function_size, "megarlhf/a.py", "def f(a):\n    if a: x\n" + "    elif a: x\n" * 6),
    (house.one_mesh, "megarlhf/parallel/mesh.py", "from megatron.core import parallel_state\n"),
    (house.one_patcher, "megarlhf/parallel/cpu.py", "import torch\ntorch.cuda.synchronize = print\n"),
    (house.one_patcher, "megarlhf/a.py", "import torch\ntorch.backends.cuda.matmul.allow_tf32 = True\n"),
    (house.one_patcher, "megarlhf/a.py", "import torch\nclass A:\n    def f(self):\n        self.torch = torch\n"),
    (house.one_patcher, "megarlhf/a.py", "import os\nos.environ['A'] = '1'\nx = {}\nx['a'] = 1\n"),
    (house.no_probing, "megarlhf/a.py", "# getattr(a, 'b')\nx = a.getattr('b')\n"),
    (house.run_files_spelt_once, house.THE_RUN_FILES, "METRICS = 'metrics.jsonl'\n"),
    (house.run_files_spelt_once, "megarlhf/a.py", "said = f'no metrics.jsonl in {run}'\n"),
    (house.global_batches, "megarlhf/trainers/a.py", "x = DataSet('data', cfg.layout.data)  # of a data rank\n"),
    (house.global_batches, "megarlhf/models/a.py", "x = mesh.data_rank\n"),
    (house.nothing_unsafe, house.THE_UNPICKLER, "import pickle\n"),
    (house.nothing_unsafe, "megarlhf/a.py", "dist_checkpointing.load(state, 'a', PlainLoad('save again'))\n"),
    (house.nothing_unsafe, "megarlhf/a.py", "load(trust_remote_code=False)\nmodel.eval()\nrun(['a'], shell=False)\n"),
]

BAD = [
    (house.file_length, "megarlhf/a.py", "x = 1\n" * 401),
    (house.file_length, "kernels/megarlhf_kernels/a.py", "x = 1\n" * 451),
    (house.function_size, "megarlhf/a.py", long_function(81)),
    (house.function_size, "megarlhf/a.py", "class A:\n" + re.sub("^", "    ", long_function(81), flags=re.MULTILINE)),
    (house.function_size, "megarlhf/trainers/ppo.py", long_function(61, "ppo_iteration")),
    (house.function_size, "tests/a.py", long_function(61, "toy_iteration")),
    (house.function_size, "megarlhf/a.py", f"def f({MANY}, *, b): ...\n"),
    (house.function_size, "megarlhf/a.py", f"def f({MANY}, **rest): ...\n"),
    (house.function_size, "kernels/megarlhf_kernels/a.py", f"@jit(1)\ndef f({MANY}, b): ...\n"),
    (house.function_size, "megarlhf/a.py", nested(5)),
    (house.function_size, "megarlhf/a.py", nested(5).replace("if a", "for _ in a")),
    (house.one_mesh, "megarlhf/a.py", "from megatron.core import parallel_state\n"),
    (house.one_mesh, "megarlhf/a.py", "import megatron.core.parallel_state as ps\n"),
    (house.one_mesh, "megarlhf/a.py", "from megatron.core.parallel_state import get_rank\n"),
    (house.one_mesh, "tools/a.py", "import megatron.core as core\ncore.parallel_state.destroy()\n"),
    (house.one_patcher, "megarlhf/a.py", "import torch\ntorch.cuda.synchronize = print\n"),
    (house.one_patcher, "megarlhf/a.py", "import megatron.core.x as m\nm.flag = True\n"),
    (house.one_patcher, "megarlhf/a.py", "from megatron.core.x import Engine\nEngine.run, a = 1, 2\n"),
    (house.one_patcher, "megarlhf/a.py", "import torch\nsetattr(torch.cuda, 'x', 1)\n"),
    (house.one_patcher, "megarlhf/a.py", "import torch\nvars(torch.cuda)['x'] = 1\n"),
    (house.one_patcher, "megarlhf/a.py", "import torch\ntorch.__dict__['x'] = 1\n"),
    (house.one_patcher, "megarlhf/a.py", "import importlib\nm = importlib.import_module('megatron')\nm.x = 1\n"),
    (house.one_patcher, "megarlhf/a.py", "import sys\nm = sys.modules['megatron']\nm.x += 1\n"),
    (house.no_probing, "megarlhf/a.py", "x = getattr(a, 'b', None)\n"),
    (house.no_probing, "tests/a.py", "if hasattr(a, 'b'): pass\n"),
    (house.no_star_imports, "megarlhf/a.py", "from torch import *\n"),
    (house.run_files_spelt_once, "megarlhf/a.py", "path = run / 'metrics.jsonl'\n"),
    (house.global_batches, "megarlhf/trainers/a.py", "from megarlhf.parallel.collectives import own_part\n"),
    (house.global_batches, "megarlhf/eval/a.py", "x = mesh.size('data')\n"),
    (house.global_batches, "megarlhf/runs/a.py", "x = self.mesh.data_rank\n"),
    (house.global_batches, "megarlhf/gates/a.py", "x = gather(x, mesh, 'data')\n"),
    (house.run_files_spelt_once, "tools/a.py", "name = f'step_{step:08d}'\n"),
    (house.nothing_unsafe, "megarlhf/a.py", "import pickle\n"),
    (house.nothing_unsafe, "megarlhf/a.py", "from dill.x import load\n"),
    (house.nothing_unsafe, "megarlhf/a.py", "import torch\ntorch.load('a', weights_only=True)\n"),
    (house.nothing_unsafe, "megarlhf/a.py", "dist_checkpointing.load(state, 'a')\n"),
    (house.nothing_unsafe, "megarlhf/a.py", "reader = FileSystemReader('a')\n"),
    (house.nothing_unsafe, "megarlhf/a.py", "f(trust_remote_code=True)\n"),
    (house.nothing_unsafe, "megarlhf/a.py", "subprocess.run('a', shell=True)\n"),
    (house.nothing_unsafe, "megarlhf/a.py", "os.system('a')\n"),
    (house.nothing_unsafe, "megarlhf/a.py", "eval('a')\n"),
]


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_the_checks_leave_good_code_alone(rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text))) == []


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_the_checks_catch_planted_violations(rule, path: str, text: str) -> None:
    found = list(rule(Source(path, text)))
    assert len(found) == 1
    assert re.match(rf"{re.escape(path)}:\d+: ", found[0])


def test_undocumented_settings_are_found_also_in_grandchildren_in_other_files() -> None:
    child = "class Child(x.Parent):\n    a: int = 1\n    '''Text.'''\n    b: int = 2\n    c: str\n    ''' '''\n"
    parent = "class Parent(config.Config):\n    d: int\n    _e: int\n    F: ClassVar[int]\nclass Other:\n    g: int\n"
    found = list(house.documented_settings([Source("megarlhf/c.py", child), Source("megarlhf/p.py", parent)]))
    assert [violation.split(" setting ")[1] for violation in found] == [
        *("Child.b is undocumented", "Child.c is undocumented", "Parent.d is undocumented"),
    ]


def test_metric_names_are_recognised() -> None:
    source = Source("megarlhf/a.py", "m = {'policy/loss': 1, 'policy/Los': 2, 'a/b': 3, 'see policy/loss': 4}\n")
    assert list(house.metric_names(source, {"policy", "kl"})) == [("megarlhf/a.py:1", "policy/loss")]


def test_the_rules_have_files_to_judge() -> None:
    paths = {source.path for source in sources()}
    assert {"megarlhf/cli.py", "megarlhf/config/load.py", "tests/test_house.py"} <= paths
