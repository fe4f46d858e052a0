"""Chat templates are programs from whoever made the model, so they run where an endless one ends alone.

Run as a script this is that place: a process of its own with bounds on time and memory, which knows Jinja and nothing
of megarlhf. Its argument is the seconds that it may compute for one conversation. It reads a template and then
conversations, one JSON line each, answers each with a line, and leaves when its standard input ends, as it does when
the process that asked is gone.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30
"""Bytes of address space that it may have."""
LONGEST = 10_000_000
"""Characters that it may write, some 20 times the longest context."""

OPENS, CLOSES = "generation_opens", "generation_closes"
"""Variables: what to write before and after what an assistant wrote, nothing where they are not given."""


class _Generation(Extension):
    """`{% generation %}` is around what an assistant wrote, for training; the text is the same without it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Take the text between the tags as it is, between two marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opens, closes = (nodes.Output([nodes.Name(name, "load")], lineno=line) for name in (OPENS, CLOSES))
        return [opens, nodes.Scope(body, lineno=line), closes]


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as `transformers` gives it to chat templates."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(text: str) -> str:
        return datetime.datetime.now().strftime(text)

    def tojson(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return made


def main() -> None:
    """Answer until standard input ends."""
    computing_s = float(sys.argv[1])
    # A signal to the whole process group is for the ranks to obey; this process ends with the one that it serves.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    template = None
    source = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        # Time of this process, not of the clock: a busy machine is no endless template. The signal kills: C code that
        # never returns would not see a Python handler.
        signal.setitimer(signal.ITIMER_PROF, computing_s)
        try:
            template = template or environment().from_string(source)
            text = template.render(json.loads(line))
            answer = {"error": f"it writes {len(text)} characters"} if len(text) > LONGEST else {"text": text}
        except TemplateError as error:
            answer = {"error": str(error)}
        except MemoryError:
            answer = {"error": f"it takes more than {MEMORY >> 30} GiB of memory (MemoryError)"}
        except Exception as error:  # noqa: BLE001 (a template may raise anything; whoever asked hears of it)
            answer = {"error": f"{type(error).__name__}: {error}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
