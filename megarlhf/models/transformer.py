"""A Megatron-Core GPTModel from a ModelSpec: Transformer Engine layers on a GPU, local layers elsewhere, same names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megarlhf.models.attention import CausalAttention, EngineSelfAttention, LocalSelfAttention, rope_frequencies
from megarlhf.models.compute import Compute
from megarlhf.models.heads import ScalarHead
from megarlhf.models.linear import LocalColumnParallelLinear, LocalRowParallelLinear
from megarlhf.models.mlp import SwiGLU
from megarlhf.models.recompute import megatron_recompute
from megarlhf.models.spec import ModelSpec
from megarlhf.parallel.context import HeadShare
from megarlhf.parallel.gradients import main_grad, said
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.micro_batches import Documents
from megarlhf_kernels import PolicyTerms, Projected, Shard, linear_kl, linear_logprob, linear_ppo
from megarlhf_kernels.linear_ppo import METRICS

HeadKind = Literal["language", "scalar"]


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked so that Megatron sums its gradient over tensor ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **rest: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LocalLayer(TransformerLayer):
    """Megatron's layer, which at the top of the model leaves out the MLP of hidden states that nobody reads."""

    unread: Tensor | None = None
    """The padding mask of the forward that runs, which Megatron's block hands to no layer beside those that backward
    computes again."""

    def _forward_mlp(
        self,
        hidden_states: Tensor,
        inference_context: BaseInferenceContext | None = None,
        padding_mask: Tensor | None = None,
        **_of_experts: Any,
    ) -> Any:
        """[s, b, H] -> [s, b, H]; rows in `padding_mask` [b, s] keep what they had.

        Under sequence parallelism every row is computed: tensor ranks must hold equally many. So it is on a GPU, which
        would have to be waited for before anybody knew how many there are.
        """
        on_top = self.layer_number == self.config.num_layers
        padding_mask = self.unread if padding_mask is None else padding_mask
        if padding_mask is None or not on_top or self.config.sequence_parallel or not hidden_states.is_cpu:
            return super()._forward_mlp(hidden_states, inference_context)
        rows = hidden_states.flatten(0, 1)
        read = (~padding_mask).t().flatten().nonzero()[:, 0]
        computed: Any = super()._forward_mlp(rows[read][:, None])
        return rows.index_copy(0, read, computed[:, 0]).view_as(hidden_states)


class LlamaModel(GPTModel):
    """GPTModel that ends, outside inference, at the final hidden states; what is read off them is asked for by name.

    Reading by name lets a role compute only the rows it needs: prompt and padding rows never reach the vocabulary
    projection.
    """

    def __init__(self, spec: ModelSpec, head: HeadKind, **megatron: Any) -> None:
        super().__init__(**megatron)
        self.spec = spec
        self.head = head
        self.says_gradients = False
        """Autograd is told of gradients that go to Megatron's buffer beside it."""
        self.rotary_pos_emb.inv_freq = rope_frequencies(spec).to(self.rotary_pos_emb.inv_freq.device)
        # Its angles stay whole: tokens say themselves where they stand, and a rollout's are of no context rank.
        self.rotary_pos_emb.cp_group = None
        if head == "scalar" and self.post_process:
            self.output_layer = ScalarHead(self.config)

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *args: Any,
        inference_context: BaseInferenceContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **rest: Any,
    ) -> tuple[Any, ...]:
        top: Any = self.decoder.layers[-1]
        if isinstance(top, LocalLayer):
            top.unread = rest.get("padding_mask")
        given: Any = {"inference_context": inference_context, "packed_seq_params": packed_seq_params}
        first, angles, *others = super()._preprocess(input_ids, position_ids, *args, **given, **rest)
        if first is not None and self.config.recompute_granularity and torch.is_grad_enabled():
            # Layers that are computed again have gradients only where their input does: also over a frozen embedding.
            first = first if first.requires_grad else first.requires_grad_()
        if first is not None and isinstance(packed_seq_params, Documents):
            # Transposed, one line has strides for which torch would multiply each token by itself.
            first = first[:, 0][:, None]
        if angles is not None and isinstance(packed_seq_params, Documents):
            # Megatron's are those of the longest document; here every token gets its own, once for all layers.
            angles = angles[packed_seq_params.positions]
        elif angles is not None and inference_context is None and self.config.context_parallel_size > 1:
            angles = angles[position_ids[0]]  # which every row has
        return first, angles, *others

    def _postprocess(
        self, hidden_states: Tensor, *args: Any, inference_context: BaseInferenceContext | None = None, **rest: Any
    ) -> Tensor:
        if not self.post_process or inference_context is not None:
            return super()._postprocess(hidden_states, *args, inference_context=inference_context, **rest)
        if self.config.sequence_parallel:
            # Every tensor rank goes on with the same full rows, so the gradient is split, not summed.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        return hidden_states.transpose(0, 1)

    def label_logprobs(
        self, hidden: Tensor, labels: Tensor, *, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """Log-prob of each label after its hidden state, and the entropy of its distribution.

        Shapes:   hidden [n, H]; labels [n] int64. Returns (logprobs, entropy) [n] fp32; entropy [0] without
                  `with_entropy`.
        Units:    nats.
        Ranks:    tensor: one gather of four numbers a row; context: each projects its share, one gather of the results,
                  the same on each.
        """
        share = self._share(hidden)
        logprobs, entropy = linear_logprob(
            hidden[share.own],
            self._projection,
            labels[share.own],
            temperature=temperature,
            with_entropy=with_entropy,
            weight_grad=self._vocab_weight_grad,
            **self._vocab_shard(),
        )
        return share.whole(logprobs), share.whole(entropy) if with_entropy else entropy

    def policy_loss(self, hidden: Tensor, labels: Tensor, terms: PolicyTerms) -> tuple[Tensor, dict[str, Tensor]]:
        """`terms` summed over labels [n] after hidden states [n, H]; and the loss's metrics, summed alike.

        Backward must weigh the loss by 1, as the pipeline driver does. Ranks as in `label_logprobs`.
        """
        share = self._share(hidden)
        loss, metrics, *_ = linear_ppo(
            hidden[share.own],
            self._projection,
            labels[share.own],
            terms.rows(share.own),
            weight_grad=self._vocab_weight_grad,
            **self._vocab_shard(),
        )
        return share.total(loss), dict(zip(METRICS, share.total(metrics).unbind(), strict=True))

    def policy_kl(self, hidden: Tensor, policy: Projected, *, temperature: float) -> Tensor:
        """KL of a policy's distribution to this model's, after each state, over the whole vocabulary. No gradient.

        Shapes:   hidden [n, H], of this model; policy: its states [n, H'] and its rows of the projection. Returns [n].
        Ranks:    as `label_logprobs`, five numbers a row.
        """
        share = self._share(hidden)
        own, theirs = (
            Projected(hidden[share.own], self.vocab_weight),
            Projected(policy.hidden[share.own], policy.weight),
        )
        return share.whole(linear_kl(theirs, own, temperature=temperature, **self._vocab_shard()))

    def scalars(self, hidden: Tensor) -> Tensor:
        """The scalar head at every position: hidden [n, H] -> [n] fp32."""
        share = self._share(hidden)
        return share.whole(self.output_layer(hidden[share.own]))

    def _share(self, hidden: Tensor) -> HeadShare:
        return HeadShare(len(hidden), self.pg_collection.cp)

    @property
    def vocab_weight(self) -> Tensor:
        """This tensor rank's rows of the vocabulary projection, [V_local, H]; the embedding itself where tied."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    @property
    def head_weight(self) -> Tensor:
        """Of the head, whichever it is."""
        return self.vocab_weight if self.head == "language" else self.output_layer.weight

    @property
    def _projection(self) -> Tensor:
        return said(self.vocab_weight) if self.says_gradients else self.vocab_weight

    @property
    def _vocab_weight_grad(self) -> Tensor | None:
        """Megatron's fp32 buffer for the weight's gradient, which a model that is not trained does not have."""
        return main_grad(self.vocab_weight)

    def _vocab_shard(self) -> Shard:
        group = self.pg_collection.tp
        columns = self.vocab_size // group.size()
        return Shard(vocab_start=group.rank() * columns, vocab_size=self.spec.vocab_size, group=group)


def transformer_config(spec: ModelSpec, compute: Compute, mesh: Mesh) -> TransformerConfig:
    """Megatron's configuration of `spec` on `mesh`. Losses are sums: `parallel/pipeline.py` divides."""
    layout = mesh.layout
    on_cpu = mesh.device.type == "cpu"
    return TransformerConfig(
        num_layers=spec.layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.heads,
        num_query_groups=spec.kv_heads,
        kv_channels=spec.head_dim,
        ffn_hidden_size=spec.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        cp_comm_type="p2p",  # of Transformer Engine's attention: the one that takes documents, and overlaps
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=compute.dtype,
        params_dtype=compute.dtype,
        bf16=compute.dtype == torch.bfloat16,
        fp8=compute.fp8,
        fp8_recipe=compute.fp8_recipe,
        # Micro-batches are trimmed to their longest row, so stages tell each other the shape; `parallel/pipeline.py`
        # says why interleaved ones do not. Batched messages would mix up forward and backward between two stages.
        variable_seq_lengths=layout.pipeline > 1 and layout.virtual_pipeline == 1,
        moe_token_dispatcher_type="alltoall",  # no experts here, but Megatron checks it against variable lengths
        batch_p2p_comm=not on_cpu and layout.virtual_pipeline == 1,
        calculate_per_token_loss=True,
        # Weights come from a checkpoint, or are drawn the same way for every layout.
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        attention_backend=AttnBackend.auto if compute.transformer_engine else AttnBackend.local,
        gradient_accumulation_fusion=compute.gradient_accumulation_fusion,
        masked_softmax_fusion=False,
        use_te_activation_func=not compute.transformer_engine,  # the layer's own module, whoever wrote it
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        **megatron_recompute(compute.recompute),
        cuda_graph_impl="none",  # decode steps are captured; see `rollout/graphs.py`
        cuda_graph_scope=[],
        account_for_embedding_in_pipeline_split=spec.counts_ends(layout.stages),
        account_for_loss_in_pipeline_split=spec.counts_ends(layout.stages),
    )


def layer_spec(transformer_engine: bool) -> tuple[ModuleSpec, type]:
    """One transformer layer, and its norm. Norms stay separate modules so that both kinds name their weights alike."""
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TEDotProductAttention,
            TENorm,
            TERowParallelLinear,
        )

        mlp = MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
        return _layer_spec(TransformerLayer, EngineSelfAttention, TEDotProductAttention, mlp, TENorm), TENorm
    mlp = MLPSubmodules(linear_fc1=LocalColumnParallelLinear, linear_fc2=LocalRowParallelLinear, activation_func=SwiGLU)
    return _layer_spec(LocalLayer, LocalSelfAttention, CausalAttention, mlp, RMSNorm), RMSNorm


def _layer_spec(layer: type, attention: type, core: type, mlp: MLPSubmodules, norm: type) -> ModuleSpec:
    residual_add: Any = get_bias_dropout_add
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=mlp.linear_fc1,
                    core_attention=core,
                    linear_proj=mlp.linear_fc2,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=residual_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=residual_add,
        ),
    )


def build_chunks(spec: ModelSpec, head: HeadKind, compute: Compute, mesh: Mesh) -> list[LlamaModel]:
    """This rank's model chunks, one unless the schedule is interleaved. Their weights are not set yet.

    Ranks:    every rank of the mesh calls it. Raises LayoutError when the layout does not divide the spec.
    """
    spec.check_layout(mesh.layout)
    spec.check_fp8(mesh.layout, compute.fp8_multiple)
    config = transformer_config(spec, compute, mesh)
    layer, norm = layer_spec(compute.transformer_engine)
    chunks = mesh.layout.virtual_pipeline
    return [
        _build_chunk(spec, head, config, layer, norm, mesh, chunk if chunks > 1 else None) for chunk in range(chunks)
    ]


def _build_chunk(
    spec: ModelSpec,
    head: HeadKind,
    config: TransformerConfig,
    layer: ModuleSpec,
    norm: Any,
    mesh: Mesh,
    chunk: int | None,
) -> LlamaModel:
    first = mesh.pipeline_rank == 0 and chunk in (None, 0)
    last = mesh.pipeline_rank == mesh.layout.pipeline - 1 and chunk in (None, mesh.layout.virtual_pipeline - 1)
    layers = spec.layers_of(mesh.layout.stages, first=first, last=last)
    block = TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
    model = LlamaModel(
        spec,
        head,
        config=config,
        transformer_layer_spec=block,
        vocab_size=spec.padded_vocab(mesh.layout.tensor),
        max_sequence_length=spec.max_positions,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=spec.tie_embeddings and head == "language",
        position_embedding_type="rope",
        rotary_base=spec.rope_theta,
        pg_collection=mesh.groups,
        vp_stage=chunk,
    )
    _mark_shards(model)
    return model.to(mesh.device)


def named_parameters(chunks: Sequence[LlamaModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of this rank with layers numbered over the whole model."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if name.startswith("decoder.layers."):
                # Megatron numbers layers from 1 over the whole model, and from 0 within a chunk.
                layer: Any = chunk.decoder.layers[int(parts[2])]
                parts[2] = str(layer.layer_number - 1)
            yield ".".join(parts), parameter


def _mark_shards(model: LlamaModel) -> None:
    """Tell Megatron which weights are shards. 0.16 does so while it initialises them, which is left to us here.

    A weight without the mark passes for a copy, and the gradient norm would count tensor rank 0's part alone.
    """
    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding | ColumnParallelLinear) and module.weight is not None:
            # A shard of the gated layer is a part of the gate, then one of the rest: another layout cuts both.
            stride = 2 if name.endswith(".linear_fc1") else 1
            _mark_shard(module.weight, 0, stride)
        elif isinstance(module, RowParallelLinear):
            _mark_shard(module.weight, 1, 1)


def _mark_shard(weight: Any, dim: int, stride: int) -> None:
    """As Megatron's own function for it, which refuses a weight that is marked already, as those of 0.19 are."""
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, dim, stride
