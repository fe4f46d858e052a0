"""CUDA graphs of decode steps: captured for one rollout, gone before anything else runs the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.cuda_graphs import CudaGraphManager, delete_cuda_graphs


@contextmanager
def decode_graphs(model: GPTModel) -> Iterator[None]:
    """Inside, Megatron-Core captures and replays the layers of `model` wherever a step of its engine only decodes.

    Outside, no layer has a graph: Megatron would capture the first ragged batch that is scored or trained on, and fail
    at the next. Weights may move between rollouts, so graphs, which hold addresses, do not outlive one.
    """
    stream = torch.cuda.current_stream()
    try:
        model.config.cuda_graph_impl = "local"
        for layer in model.decoder.layers:
            layer.add_module("cudagraph_manager", CudaGraphManager(model.config))
        # Megatron has gone over to a stream of its own, which must find weights and cache complete.
        torch.cuda.synchronize()
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.set_stream(stream)
        model.config.cuda_graph_impl = "none"
        for layer in model.decoder.layers:
            layer._modules.pop("cudagraph_manager", None)
        delete_cuda_graphs()
