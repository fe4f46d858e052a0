"""The work of a run: tokens and floating-point operations, counted by whoever spends them.

A role counts what it scores and learns from, the rollout engine what it draws. So the numbers are right for any
algorithm, whatever it leaves out or does twice. All are of the whole run: of every rank, since its first step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from megarlhf.errors import CheckpointError

PHASES = ("rollout", "score", "estimate", "optimise", "train", "measure")
"""What a Clock may time: the four paragraphs of an iteration, or a step of another trainer; and held-out data."""
WORKED = ("rollout", "score", "optimise", "train")
"""Those in which models work at what the run is for. Measuring is not: a run is no dearer for being watched."""

CONVENTION = (
    "2 FLOPs a multiply-add of matrix products and causal attention (its triangle alone), backward counted as twice "
    "forward (once where weights are frozen beside adapters), padding and recomputation not at all"
)
"""What a model FLOP is, here and beside every number that is made of them."""


class Work:
    """Tokens and model FLOPs by phase of the clock; what is done outside of WORKED, such as a check, is not counted.

    Ranks:    no communication: batches are global, so that every rank counts the same.
    """

    def __init__(self, ranks: int = 1) -> None:
        """ranks: devices that share it."""
        self.ranks = ranks
        self.phase = ""
        """That the clock is in; empty for none."""
        self.tokens: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()

    def spend(self, *, tokens: int, flops: int) -> None:
        """Book work of all ranks to the phase that the clock is in."""
        if self.phase in WORKED:
            self.tokens[self.phase] += tokens
            self.flops[self.phase] += flops

    def state(self) -> dict[str, int]:
        """What a run that goes on must know: FLOPs by phase."""
        return dict(self.flops)

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on from `state`.

        Raises:   CheckpointError if it speaks of phases that there are not.
        """
        if unknown := sorted(state.keys() - set(WORKED)):
            raise CheckpointError(
                f"the state's work has {', '.join(map(repr, unknown))}; its phases are {', '.join(WORKED)}: resume "
                "from another state."
            )
        self.flops = Counter(state)
