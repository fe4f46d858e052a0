"""CUDA graphs of decode steps: there while a rollout is drawn, and in nobody's way when something else runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.cuda_graphs import CudaGraphManager, delete_cuda_graphs


class DecodeGraphs:
    """What Megatron-Core has captured of the layers of `model`, wherever a step of its engine only decodes.

    Graphs hold addresses: of the weights, and of the cache of one engine. One process captures for one model.
    """

    def __init__(self, model: GPTModel) -> None:
        self._model = model
        self._managers: list[CudaGraphManager] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, they are captured where they are missing, and replayed.

        Outside, no layer has a graph: Megatron would capture the first ragged batch that is scored or trained on, and
        fail at the next.
        """
        stream = torch.cuda.current_stream()
        config, layers = self._model.config, self._model.decoder.layers
        try:
            config.cuda_graph_impl = "local"
            self._managers = self._managers or [CudaGraphManager(config) for _ in layers]
            for layer, manager in zip(layers, self._managers, strict=True):
                layer.add_module("cudagraph_manager", manager)
            # Megatron has gone over to a stream of its own, which must find weights and cache complete.
            torch.cuda.synchronize()
            yield
        finally:
            torch.cuda.synchronize()
            torch.cuda.set_stream(stream)
            config.cuda_graph_impl = "none"
            for layer in layers:
                layer._modules.pop("cudagraph_manager", None)

    def delete(self) -> None:
        """Give their memory back."""
        self._managers = []
        delete_cuda_graphs()
