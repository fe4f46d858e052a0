"""Several judges as one: their scores are weighed and added, and each is logged by its name."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.judges import JudgeSettings
from megarlhf.judges.judge import UNKNOWN, Judge, Verdict, joined_verdicts, padded_cat
from megarlhf.judges.process_model import ProcessJudge, ProcessJudgeConfig, process_judge
from megarlhf.judges.reward_model import ModelJudge, ModelJudgeConfig, model_judge
from megarlhf.judges.rules import RuleConfig
from megarlhf.judges.texts import Reader, TextJudge, TextJudgeConfig, text_judge
from megarlhf.judges.verifiers import Decider
from megarlhf.models.role import Role
from megarlhf.observe.metrics import Metrics
from megarlhf.runtime.checks import Model
from megarlhf.runtime.settings import RanksConfig


@dataclass(frozen=True)
class Judgement:
    """What a panel says of a batch, equal on every rank."""

    token_scores: Tensor
    """[B, T] fp32: the weighted sum, before any penalty."""
    verdicts: Mapping[str, Verdict]
    """Of each judge, by name, unweighted."""
    correct: Sequence[bool | None]
    """Whether each response is right; None where nobody knows."""
    metrics: Metrics
    """Of each judge, by its name."""

    @property
    def scores(self) -> Tensor:
        """[B] fp32."""
        return self.token_scores.sum(1)

    def rows(self, chosen: Sequence[int]) -> Judgement:
        """Of the chosen rows; the metrics stay those of all."""
        return Judgement(
            self.token_scores[torch.tensor(chosen, device=self.token_scores.device)],
            {name: verdict.rows(chosen) for name, verdict in self.verdicts.items()},
            [self.correct[row] for row in chosen],
            self.metrics,
        )


def joined(parts: Sequence[Judgement]) -> Judgement:
    """Of the rows of several batches, in order, that one panel judged."""
    verdicts = {name: joined_verdicts([part.verdicts[name] for part in parts]) for name in parts[0].verdicts}
    metrics: Metrics = {}
    for name, verdict in verdicts.items():
        seconds = sum(part.metrics[f"time/judge_{name}_s"] for part in parts)
        metrics |= _metrics_of(name, parts[0].metrics[f"judge/{name}_weight"], verdict, seconds)
    correct = [right for part in parts for right in part.correct]
    return Judgement(padded_cat([part.token_scores for part in parts]), verdicts, correct, metrics)


@dataclass(frozen=True)
class Panel:
    """The judges of a run, in the order of its file."""

    judges: tuple[Judge, ...]
    verifier: Judge | None = None
    """Who says for the log whether responses are right; where it is one of the judges, its verdict is taken."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """The models among them."""
        return tuple(judge.role for judge in self.judges if isinstance(judge, ModelJudge | ProcessJudge))

    @property
    def wrong_score(self) -> float:
        """Mean sum of scores that wrong responses get; inf where one judge's is not known."""
        heard = [judge for judge in self.judges if judge.weight]
        known = all(judge.wrong_score != UNKNOWN for judge in heard)
        return sum(judge.weight * judge.wrong_score for judge in heard) if known else UNKNOWN

    def reading(self, reader: Reader) -> Panel:
        """The same judges, before responses to the prompts of another reader."""

        def moved(judge: Judge) -> Judge:
            return replace(judge, reader=reader) if isinstance(judge, TextJudge) else judge

        judges = tuple(map(moved, self.judges))
        if self.verifier is None:
            return Panel(judges)
        asked = [new for old, new in zip(self.judges, judges, strict=True) if old is self.verifier]
        return Panel(judges, asked[0] if asked else moved(self.verifier))

    def judge(self, rollout: Rollout) -> Judgement:
        """Ask every judge once. Collective: each rank calls it with the same global batch."""
        verdicts: dict[str, Verdict] = {}
        metrics: Metrics = {}
        total = torch.zeros_like(rollout.sampler_logprobs)
        for judge in self.judges:
            begun = time.perf_counter()
            verdict = verdicts[judge.name] = judge.judge(rollout)
            metrics |= _metrics_of(judge.name, judge.weight, verdict, time.perf_counter() - begun)
            if judge.weight:  # 0 times what is not finite is no number
                total = total + judge.weight * verdict.token_scores
        return Judgement(total, verdicts, self._correct(rollout, verdicts), metrics)

    def _correct(self, rollout: Rollout, verdicts: Mapping[str, Verdict]) -> Sequence[bool | None]:
        if self.verifier is None:
            return (None,) * len(rollout)
        said = verdicts[self.verifier.name] if self.verifier in self.judges else self.verifier.judge(rollout)
        return said.correct


@dataclass(frozen=True)
class Court:
    """What judges are built from, beside their own settings."""

    models: Mapping[str, Model]
    """Those of judges that are models, by the judge's name."""
    reader: Reader
    cfg: RanksConfig


def build_panel(judges: Mapping[str, JudgeSettings], verifier: Decider | None, court: Court) -> Panel:
    """Load the models and make the others ready, in order. Collective.

    verifier: by which responses are right or wrong for the log; a judge that knows by it is not asked twice.
    """
    built = tuple(_built(name, settings, court) for name, settings in judges.items())
    if verifier is None:
        return Panel(built)
    texts = {name: settings for name, settings in judges.items() if isinstance(settings, TextJudgeConfig)}
    same = [name for name, settings in texts.items() if settings.verifier == verifier]
    if same:
        return Panel(built, next(judge for judge in built if judge.name == same[0]))
    assert verifier != "code_tests"  # which is that of a judge
    alone = RuleConfig(kind="rule", rule=verifier)
    return Panel(built, text_judge("verifier", alone, court.reader))


def _built(name: str, settings: JudgeSettings, court: Court) -> Judge:
    if isinstance(settings, ModelJudgeConfig):
        return model_judge(name, settings.weight, court.models[name], court.cfg, court.reader.mesh)
    if isinstance(settings, ProcessJudgeConfig):
        return process_judge(name, settings, court.models[name], court.cfg, court.reader)
    return text_judge(name, settings, court.reader)


def _metrics_of(name: str, weight: float, verdict: Verdict, seconds: float) -> Metrics:
    scores = verdict.scores
    return {
        f"judge/{name}_mean": float(scores.mean()),
        f"judge/{name}_std": float(scores.std(correction=0)),
        f"judge/{name}_weight": weight,
        **({f"judge/{name}_failures": sum(verdict.failed)} if verdict.failed else {}),
        f"time/judge_{name}_s": seconds,
        **{f"judge/{name}.{part}_mean": float(values.mean()) for part, values in verdict.parts.items()},
    }
