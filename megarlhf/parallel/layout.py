"""How a run is split over ranks: numbers only, checked before anything is built."""

from __future__ import annotations

from pydantic import Field

from megarlhf.config import Config
from megarlhf.errors import LayoutError

FP8_MULTIPLES = {"tensorwise": 16, "blockwise": 128}
"""Of what rows and columns of matrices that are multiplied in FP8 are multiples, by Megatron-Core's recipe. Source:
Transformer Engine; of its Float8BlockQuantizer, a block."""


def fp8_multiple(fp8: str | None, recipe: str | None) -> int:
    """The same of a model's configuration; 1 where nothing is multiplied in FP8."""
    return 1 if fp8 is None or recipe is None else FP8_MULTIPLES[recipe]


class ParallelLayout(Config):
    """Tensor x pipeline x context x data parallelism of every model in the run."""

    tensor: int = Field(default=1, ge=1)
    """Ranks that share each weight matrix (Megatron's tensor parallelism); divides heads, query groups and FFN size."""
    pipeline: int = Field(default=1, ge=1)
    """Ranks that share the stack of layers (pipeline stages). Must divide the number of layers, or that number and 2:
    embedding and head then count as a layer each."""
    context: int = Field(default=1, ge=1)
    """Ranks that share each sequence (Megatron's context parallelism): activations fall in proportion, so that rows may
    be that much longer. While rollouts are drawn these ranks are data ranks."""
    data: int = Field(default=1, ge=1)
    """Copies of the model, each on its own rollouts. Must divide every batch size."""
    sequence_parallel: bool = False
    """Split activations between matrix multiplications along the sequence over the tensor ranks (saves memory)."""
    virtual_pipeline: int = Field(default=1, ge=1)
    """Model chunks per pipeline rank; more than 1 selects the interleaved 1F1B schedule (Narayanan et al. 2021)."""

    elastic: bool = False
    """Take as many data ranks as a launcher's ranks make, where they are not what `data` needs: fewer nodes after a
    requeue. Every batch size must divide by them too. false: such a start is refused."""

    @property
    def world_size(self) -> int:
        """Ranks this layout needs."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def drawing(self) -> ParallelLayout:
        """The same ranks while they draw rollouts, when context ranks are data ranks."""
        return self.model_copy(update={"context": 1, "data": self.context * self.data})

    @property
    def stages(self) -> int:
        """Pieces the stack of layers is cut into."""
        return self.pipeline * self.virtual_pipeline

    def check(self) -> None:
        """Raise LayoutError where two of the numbers contradict each other."""
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise LayoutError(
                f"layout.virtual_pipeline={self.virtual_pipeline} needs pipeline stages but layout.pipeline=1; "
                "set layout.pipeline to at least 2 or layout.virtual_pipeline=1."
            )
        if self.sequence_parallel and self.tensor == 1:
            raise LayoutError(
                "layout.sequence_parallel=true splits activations over tensor ranks but layout.tensor=1; "
                "set layout.tensor to at least 2 or layout.sequence_parallel=false."
            )

    def check_world(self, world_size: int) -> None:
        """Raise LayoutError unless `world_size` ranks are what this layout needs."""
        if world_size != self.world_size:
            data, rest = divmod(world_size, self.world_size // self.data)
            fits = f"set layout.data={data}, or layout.elastic=true, which does,"
            change = fits if data and not rest else "change the layout"
            context = f"context {self.context} x " if self.context > 1 else ""
            raise LayoutError(
                f"layout needs {self.world_size} ranks (tensor {self.tensor} x pipeline {self.pipeline} x {context}"
                f"data {self.data}) but {world_size} were started; {change} or start {self.world_size}."
            )

    def fitted(self, world_size: int) -> ParallelLayout:
        """This layout for `world_size` ranks: with another number of data ranks where it is elastic.

        Raises:   LayoutError where no number of data ranks needs so many.
        """
        data, rest = divmod(world_size, self.world_size // self.data)
        found = self.model_copy(update={"data": data}) if self.elastic and data and not rest else self
        found.check_world(world_size)
        return found

    def check_divides(self, what: str, value: int, axis: str, parts: int) -> None:
        """Raise LayoutError unless `parts` ranks along `axis` divide `value` of `what`."""
        if value % parts:
            raise LayoutError(
                f"{what}={value} is not divisible by layout.{axis}={parts}; choose a layout.{axis} that divides it."
            )
