"""What is captured as a CUDA graph: decode steps, as often as the weights move, and nothing else that runs the model.

Megatron-Core decides what to capture; the graph itself, which needs a GPU, is a stand-in that runs its layer again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import cuda_graphs

from megarlhf.batch.supervised import TokenBatch
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.releases import STEPS_SAY_WHAT_RAN
from megarlhf.rollout import engine as engine_module
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import RolloutConfig, SamplingConfig
from megarlhf.trainers.sft import next_token_loss
from tests.helpers.models import language_model, learner, ragged_rollout, settings
from tests.helpers.ranks import run_ranks
from tests.rollout.worlds import EOS, PAD, as_tensors, prompts

LAYERS = 4
SAMPLING = SamplingConfig(temperature=1.0, max_new_tokens=6)


class Graph:
    """Stands in for Megatron's runner of one graph of one layer."""

    captured: list[tuple[int, int, bool]]
    """Layer, rows, and whether the step only decodes; of every graph so far."""
    replayed: int
    recorded_in_training: int

    def __init__(self, layer: Any, *_rest: Any) -> None:
        self.base_module = layer
        self.status = cuda_graphs._GraphStatus.FWD_READY
        self.is_first_layer = layer.layer_number == 1
        self.fwd_graph_recorded = self.bwd_graph_recorded = self.cudagraph_created = False
        self.fwd_graph: object = None
        self.fwd_graph_outputs: Any = None

    def eval(self) -> Graph:
        """A rollout has no gradients."""
        return self

    def create_fwd_graph(self, args: Any, kwargs: dict[str, Any], **_rest: Any) -> None:
        self.fwd_graph = self
        for argument in (*args, *kwargs.values()):  # as the runner that this stands in for would, first of all
            cuda_graphs._check_supported_type(cuda_graphs.ArgMetadata(argument))
        self.fwd_graph_outputs = torch.nn.Module.__call__(self.base_module, *args, **kwargs)
        rows, decodes = len(kwargs["hidden_states"]), kwargs["inference_context"].is_decode_only()
        Graph.captured.append((self.base_module.layer_number, rows, decodes))

    def replay_graph_capture(self, _first: bool, args: Any, kwargs: dict[str, Any]) -> Any:
        Graph.replayed += 1
        return torch.nn.Module.__call__(self.base_module, *args, **kwargs)

    def record_graph_capture(self, args: Any, kwargs: dict[str, Any]) -> Any:
        Graph.recorded_in_training += 1
        return torch.nn.Module.__call__(self.base_module, *args, **kwargs)


@contextmanager
def graphs_here(streams: list[Any]) -> Iterator[None]:
    """A machine on which graphs can be captured, as far as Megatron asks; `streams`: those that it goes over to."""
    Graph.captured, Graph.replayed, Graph.recorded_in_training = [], 0, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "CUDA_BLOCK_TOKENS", 8)
        patch.setattr(cuda_graphs, "_CudaGraphRunner", Graph)
        patch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**30))
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(torch.cuda, "graph_pool_handle", object)
        patch.setattr(torch.cuda, "current_stream", lambda *_: "the stream before")
        patch.setattr(torch.cuda, "set_stream", streams.append)
        yield


def roll_and_learn(directory: str) -> dict[str, Any]:
    mesh = start(ParallelLayout(), seed=1)
    shared = settings(mesh, 3, offload="none")
    # Full recompute is for training; Megatron would refuse both at once.
    shared = dataclasses.replace(
        shared, compute=dataclasses.replace(shared.compute, cuda_graphs=True, recompute="full")
    )
    without = dataclasses.replace(shared, compute=dataclasses.replace(shared.compute, cuda_graphs=False))
    role = learner(directory, LabelLogprobs(1.0), shared, mesh, OptimConfig(lr=0.01))
    on_gpu = dataclasses.replace(mesh, device=torch.device("cuda"))
    plain, kept, fresh = (
        RolloutEngine(role, eos_ids=[EOS], pad_id=PAD, max_sequence_length=40, settings=RolloutConfig(keep=keep))
        for keep in (False, True, False)
    )
    for sampler in (plain, kept, fresh):
        sampler.mesh = on_gpu
    streams: list[Any] = []
    found: dict[str, Any] = {"captured": [], "same": [], "left": [], "kept": [], "replayed": []}
    rows = ragged_rollout(8)
    batch = TokenBatch(rows.tokens, rows.lengths, rows.response_mask)
    with graphs_here(streams):
        for graphed in (kept, kept, fresh, fresh):
            if graphed is fresh:
                kept.release()
            role.settings = without
            drawn = [plain.generate(prompts(), SAMPLING, seed=7, group_size=4)]
            role.settings = shared
            drawn.append(graphed.generate(prompts(), SAMPLING, seed=7, group_size=4))
            found["same"].append(all(torch.equal(a, b) for a, b in zip(*map(as_tensors, drawn), strict=True)))
            found["captured"].append(list(Graph.captured))
            Graph.captured.clear()
            found["replayed"].append(Graph.replayed)
            Graph.replayed = 0
            for _ in range(2):  # ragged, twice: the second found a graph of another shape
                role.score(rows)
                assert role.update(batch, next_token_loss(role)).stepped
            record = cuda_graphs._CudagraphGlobalRecord
            managers = [m for m in role.model.modules() if isinstance(m, cuda_graphs.CudaGraphManager)]
            found["left"].append((len(managers), Graph.recorded_in_training, role.model.config.cuda_graph_impl))
            found["kept"].append(len([*record.cudagraph_record, *record.cudagraph_inference_record]))
            assert not Graph.captured
    found["stream"] = streams[-1]
    tracker = get_cuda_rng_tracker()
    assert tracker is not None
    found["tracker"] = tracker.get_states()
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU where there is none")
def test_graphs_belong_to_decode_steps_alone(tmp_path: Path) -> None:
    language_model(tmp_path, seed=1)
    found = run_ranks(roll_and_learn, 1, str(tmp_path))[0]
    # 20 rows: eight sizes would be 2 or 3 rows apart, but Megatron takes multiples of 8, and the greatest; from 0.19 on
    # halves of it.
    sizes = [20, 10, 4, 2, 1] if STEPS_SAY_WHAT_RAN else [20, 16, 8]
    expected = sorted((layer, size, True) for layer in range(1, LAYERS + 1) for size in sizes)
    # Once, where they are kept; else for each rollout.
    assert [sorted(captured) for captured in found["captured"]] == [expected, [], expected, expected]
    assert [kept > 0 for kept in found["kept"]] == [True, True, False, False]
    assert min(found["replayed"]) >= LAYERS * (SAMPLING.max_new_tokens - 1)
    assert found["same"] == [True] * 4
    assert found["left"] == [(0, 0, "none")] * 4
    assert found["stream"] == "the stream before"  # Megatron leaves its own behind
    assert found["tracker"] == {}  # its layers draw nothing, which is what it wants to hear
