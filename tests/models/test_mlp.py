"""The gated MLP's activation against its formula."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megarlhf.models.mlp import SwiGLU, swiglu


def test_swiglu_is_its_formula_and_gradient() -> None:
    x = torch.randn(3, 5, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    gate, up = x[..., :7], x[..., 7:]
    expected = gate * torch.sigmoid(gate) * up
    upstream = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # Both are the same few fp64 operations in another order.
    torch.testing.assert_close(swiglu(x), expected, rtol=1e-14, atol=1e-14)
    (theirs,) = torch.autograd.grad(expected, x, upstream)
    made = x.clone()  # as a layer makes it: backward writes over it
    (ours,) = torch.autograd.grad(swiglu(made), x, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


def test_swiglu_refuses_a_second_backward_pass() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(5), requires_grad=True)
    out = swiglu(x.clone()).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_swiglu_leaves_its_input_alone_without_gradients() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    before = x.clone()
    with torch.no_grad():
        out = swiglu(x)
    assert torch.equal(x, before)
    # In fp32 silu and product each round once, as here.
    assert torch.equal(out, torch.nn.functional.silu(before[:, :3]) * before[:, 3:])


def test_swiglu_in_place_is_the_same_bit_for_bit() -> None:
    module = SwiGLU(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(4))
    expected = module(x.clone())
    with torch.no_grad():
        assert torch.equal(module(x), expected)
