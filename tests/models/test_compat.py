"""Upstream's names have upstream's signatures; what cannot be honoured is refused in a sentence.

Judge: the tables below, copied by hand from mamba_ssm 2.3.2.post1 (e9594ce) and causal_conv1d 1.6.1
(0d2252d). Numbers are compared in test_compat_functions.py.
"""

import inspect
import subprocess
import sys

import pytest
import torch

from ssm.compat import causal_conv1d, mamba_ssm

SIGNATURES = {
    "selective_scan_fn": "(u, delta, A, B, C, D=None, z=None, delta_bias=None, "
    "delta_softplus=False, return_last_state=False)",
    "selective_state_update": "(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, "
    "dt_softplus=False, state_batch_indices=None)",
    "mamba_chunk_scan_combined": "(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, "
    "initial_states=None, seq_idx=None, cu_seqlens=None, dt_softplus=False, "
    "dt_limit=(0.0, inf), return_final_states=False, return_varlen_states=False, "
    "state_dtype=None)",
    "mamba_split_conv1d_scan_combined": "(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, "
    "chunk_size, initial_states=None, seq_idx=None, dt_limit=(0.0, inf), "
    "return_final_states=False, activation='silu', rmsnorm_weight=None, rmsnorm_eps=1e-06, "
    "outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True, "
    "state_dtype=None)",
    "mamba_inner_fn": "(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, "
    "out_proj_weight, out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, "
    "B_proj_bias=None, C_proj_bias=None, delta_softplus=True, checkpoint_lvl=1, "
    "b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-06)",
    "selective_scan_ref": "(u, delta, A, B, C, D=None, z=None, delta_bias=None, "
    "delta_softplus=False, return_last_state=False)",
    "mamba_inner_ref": "(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, "
    "out_proj_weight, out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, "
    "B_proj_bias=None, C_proj_bias=None, delta_softplus=True)",
    "selective_state_update_ref": "(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, "
    "dt_softplus=False)",
    "ssd_chunk_scan_combined_ref": "(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, "
    "dt_softplus=False)",
    "mamba_split_conv1d_scan_ref": "(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, "
    "chunk_size, dt_limit=(0.0, inf), activation='silu', rmsnorm_weight=None, "
    "rmsnorm_eps=1e-06, outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, "
    "norm_before_gate=True)",
    "segsum": "(x)",
    "ssd_minimal_discrete": "(X, A, B, C, block_len, initial_states=None)",
    "layer_norm_ref": "(x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, "
    "eps=1e-06, dropout_p=0.0, rowscale=None, prenorm=False, dropout_mask=None, "
    "dropout_mask1=None, upcast=False)",
    "rms_norm_ref": "(x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, "
    "eps=1e-06, dropout_p=0.0, rowscale=None, prenorm=False, dropout_mask=None, "
    "dropout_mask1=None, upcast=False)",
    "rms_norm_gated_ref": "(x, weight, bias, z=None, eps=1e-06, group_size=None, "
    "norm_before_gate=True, upcast=True)",
    "causal_conv1d_ref": "(x, weight, bias=None, initial_states=None, "
    "return_final_states=False, final_states_out=None, activation=None)",
    "causal_conv1d_update_ref": "(x, conv_state, weight, bias=None, activation=None, "
    "cache_seqlens=None)",
    "causal_conv1d_varlen_states_ref": "(x, cu_seqlens, state_len)",
    "create_block": "(d_model, d_intermediate, ssm_cfg=None, attn_layer_idx=None, "
    "attn_cfg=None, norm_epsilon=1e-05, rms_norm=False, residual_in_fp32=False, "
    "fused_add_norm=False, layer_idx=None, device=None, dtype=None)",
    "_init_weights": "(module, n_layer, initializer_range=0.02, rescale_prenorm_residual=True, "
    "n_residuals_per_layer=1)",
    "MixerModel": "(d_model, n_layer, d_intermediate, vocab_size, ssm_cfg=None, "
    "attn_layer_idx=None, attn_cfg=None, norm_epsilon=1e-05, rms_norm=False, "
    "initializer_cfg=None, fused_add_norm=False, residual_in_fp32=False, device=None, "
    "dtype=None)",
    "GenerationMixin": "()",
    "load_config_hf": "(model_name)",
    "load_state_dict_hf": "(model_name, device=None, dtype=None)",
    "sample": "(logits, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0)",
    "decode": "(input_ids, model, max_length, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0, "
    "repetition_penalty=1.0, eos_token_id=None, teacher_outputs=None, vocab_size=None, cg=False, "
    "enable_timing=False, output_scores=False, streamer=None)",
    "layer_norm_fn": "(x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, "
    "eps=1e-06, dropout_p=0.0, rowscale=None, prenorm=False, residual_in_fp32=False, "
    "is_rms_norm=False, return_dropout_mask=False)",
    "rms_norm_fn": "(x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, "
    "eps=1e-06, dropout_p=0.0, rowscale=None, prenorm=False, residual_in_fp32=False, "
    "return_dropout_mask=False)",
    "layernorm_fn": "(x, weight, bias, z=None, eps=1e-06, group_size=None, "
    "norm_before_gate=True, is_rms_norm=False)",
    "rmsnorm_fn": "(x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True)",
    "causal_conv1d_fn": "(x, weight, bias=None, seq_idx=None, initial_states=None, "
    "return_final_states=False, final_states_out=None, activation=None)",
    "causal_conv1d_update": "(x, conv_state, weight, bias=None, activation=None, "
    "cache_seqlens=None, conv_state_indices=None)",
    "causal_conv1d_varlen_states": "(x, cu_seqlens, state_len)",
    "Mamba": "(d_model, d_state=16, d_conv=4, expand=2, dt_rank='auto', dt_min=0.001, "
    "dt_max=0.1, dt_init='random', dt_scale=1.0, dt_init_floor=0.0001, conv_bias=True, "
    "bias=False, use_fast_path=True, layer_idx=None, device=None, dtype=None)",
    "Mamba2": "(d_model, d_state=128, d_conv=4, conv_init=None, expand=2, headdim=64, "
    "d_ssm=None, ngroups=1, A_init_range=(1, 16), D_has_hdim=False, rmsnorm=True, "
    "norm_before_gate=False, dt_min=0.001, dt_max=0.1, dt_init_floor=0.0001, "
    "dt_limit=(0.0, inf), bias=False, conv_bias=True, chunk_size=256, use_mem_eff_path=True, "
    "layer_idx=None, process_group=None, sequence_parallel=True, device=None, dtype=None)",
    "RMSNorm": "(hidden_size, eps=1e-05, dropout_p=0.0, device=None, dtype=None)",
    "RMSNormGated": "(hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, "
    "device=None, dtype=None)",
    "LayerNormGated": "(hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, "
    "device=None, dtype=None)",
}
# Classes of the models themselves may have more arguments behind those of upstream, by keyword.
LEADING = {
    "MHA": "embed_dim num_heads num_heads_kv head_dim mlp_dim qkv_proj_bias out_proj_bias "
    "softmax_scale causal layer_idx d_conv rotary_emb_dim rotary_emb_base rotary_emb_interleaved "
    "device dtype",
    "GatedMLP": "in_features hidden_features out_features activation bias multiple_of device dtype",
    "Block": "dim mixer_cls mlp_cls norm_cls fused_add_norm residual_in_fp32",
    "MambaConfig": "d_model d_intermediate n_layer vocab_size ssm_cfg attn_layer_idx attn_cfg "
    "rms_norm residual_in_fp32 fused_add_norm pad_vocab_size_multiple tie_embeddings",
    "MambaLMHeadModel": "config initializer_cfg device dtype",
    "InferenceParams": "max_seqlen max_batch_size seqlen_offset batch_size_offset "
    "key_value_memory_dict lengths_per_sample",
}


def offered(name):
    return getattr(mamba_ssm, name, None) or getattr(causal_conv1d, name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_upstreams(name):
    signature = inspect.signature(offered(name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    plain = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
    assert str(plain) == SIGNATURES[name]


@pytest.mark.parametrize("name", LEADING)
def test_leading_arguments_are_upstreams(name):
    wanted = LEADING[name].split()
    assert list(inspect.signature(offered(name)).parameters)[: len(wanted)] == wanted


def test_every_name_is_in_a_table():
    names = {*mamba_ssm.__all__, *causal_conv1d.__all__, "_init_weights"}
    assert names == {*SIGNATURES, *LEADING}


def test_modules_take_upstreams_arguments():
    block = mamba_ssm.Mamba2(16, 8, 4, None, 2, 8, None, 2, layer_idx=0)
    assert (block.d_state, block.headdim, block.ngroups) == (8, 8, 2)
    u = torch.randn(1, 6, 16)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        packed = block(u, None, seq_idx)
        torch.testing.assert_close(packed[:, 3:], block(u[:, 3:]))
        memory = mamba_ssm.InferenceParams(6, 1)
        parts = []
        for part in u.split([4, 1, 1], 1):
            parts.append(block(part, inference_params=memory))
            memory.seqlen_offset += part.shape[1]
        torch.testing.assert_close(torch.cat(parts, 1), block(u))
    memory.lengths_per_sample = torch.tensor([6])
    memory.reset(9, 1)
    assert (memory.max_seqlen, memory.seqlen_offset) == (9, 0)
    assert memory.lengths_per_sample.tolist() == [0]
    mamba = mamba_ssm.Mamba(16, 8, 4, 2, 3, dtype=torch.float64)
    assert mamba.dt_rank == 3
    assert mamba(u.double()).dtype == torch.float64


ONE = torch.ones(1, 2, 3)
COMPLEX = -torch.ones(2, 3, dtype=torch.complex64)
SSD = {"x": torch.ones(1, 3, 2, 2), "dt": torch.ones(1, 3, 2), "A": torch.ones(2)}
SSD |= {"B": torch.ones(1, 3, 1, 4), "C": torch.ones(1, 3, 1, 4), "chunk_size": 2}
SPLIT = {"zxbcdt": torch.ones(1, 3, 18), "conv1d_weight": torch.ones(12, 4), "conv1d_bias": None}
SPLIT |= {"dt_bias": torch.ones(2), "A": torch.ones(2), "D": torch.ones(2), "chunk_size": 2}
INNER = {"xz": torch.ones(1, 4, 3), "conv1d_weight": torch.ones(2, 1, 4), "conv1d_bias": None}
INNER |= {"x_proj_weight": torch.ones(7, 2), "delta_proj_weight": torch.ones(2, 1)}
INNER |= {"out_proj_weight": torch.ones(5, 2), "out_proj_bias": None, "A": -torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("name", "arguments", "error", "sentence"),
    [
        (
            "selective_state_update",
            {**dict.fromkeys(("state", "x", "dt", "B", "C"), ONE), "A": COMPLEX},
            ValueError,
            "selective_state_update: A must be real, got complex64",
        ),
        (
            "mamba_inner_fn",
            {**INNER, "checkpoint_lvl": 2},
            ValueError,
            "mamba_inner_fn: checkpoint_lvl must be 0 or 1, got 2",
        ),
        (
            "mamba_inner_fn",
            {**INNER, "B": torch.ones(2, 3), "b_rms_weight": torch.ones(3)},
            ValueError,
            "mamba_inner_fn: b_rms_weight must be None where B is given, got a tensor",
        ),
        (
            "mamba_chunk_scan_combined",
            {**SSD, "state_dtype": torch.float64},
            ValueError,
            "mamba_chunk_scan_combined: state_dtype must be at most float32 for tensors that are "
            "not float64, got float64",
        ),
        (
            "mamba_chunk_scan_combined",
            {**SSD, "state_dtype": "bf16"},
            TypeError,
            "mamba_chunk_scan_combined: state_dtype must be a torch.dtype, got 'bf16'",
        ),
        (
            "mamba_chunk_scan_combined",
            {**SSD, "return_varlen_states": True},
            ValueError,
            "mamba_chunk_scan_combined: cu_seqlens must be given for varlen states, got None",
        ),
        (
            "mamba_chunk_scan_combined",
            {**SSD, "return_varlen_states": True, "cu_seqlens": torch.tensor([0, 3])},
            ValueError,
            "mamba_chunk_scan_combined: seq_idx must be given for varlen states, got None",
        ),
        (
            "mamba_chunk_scan_combined",
            {
                **SSD,
                "x": torch.ones(2, 3, 2, 2),
                "return_varlen_states": True,
                "cu_seqlens": torch.tensor([0, 3]),
                "seq_idx": torch.zeros(2, 3, dtype=torch.int32),
            },
            ValueError,
            "mamba_chunk_scan_combined: x must have batch 1 for varlen states, got 2",
        ),
        (
            "mamba_split_conv1d_scan_combined",
            {**SPLIT, "headdim": None},
            ValueError,
            "mamba_split_conv1d_scan_combined: headdim must be given where D has shape (H,), "
            "got None",
        ),
        (
            "mamba_split_conv1d_scan_combined",
            {**SPLIT, "D": None},
            TypeError,
            "mamba_split_conv1d_scan_combined: D must be a torch.Tensor, got NoneType",
        ),
        (
            "mamba_split_conv1d_scan_combined",
            {**SPLIT, "headdim": 2, "outproj_bias": torch.ones(3)},
            ValueError,
            "mamba_split_conv1d_scan_combined: outproj_bias must be None without outproj_weight, "
            "got a tensor",
        ),
        (
            "mamba_split_conv1d_scan_combined",
            {**SPLIT, "headdim": 2, "conv1d_weight": torch.ones(11, 4)},
            ValueError,
            "mamba_split_conv1d_scan_combined: conv1d_weight must have H P + 2 G N = 4 + 2 N rows, "
            "got 11",
        ),
        (
            "mamba_split_conv1d_scan_combined",
            {**SPLIT, "headdim": 2, "zxbcdt": torch.ones(1, 3, 19)},
            ValueError,
            "mamba_split_conv1d_scan_combined: zxbcdt must have 2 M + 18 channels, got 19",
        ),
        (
            "layer_norm_fn",
            {"x": ONE, "weight": ONE[0, 0], "bias": None, "x1": ONE, "rowscale": ONE[..., 0]},
            ValueError,
            "layer_norm_fn: rowscale must be None beside x1, got a tensor",
        ),
        (
            "layer_norm_fn",
            {"x": ONE, "weight": ONE[0, 0], "bias": None, "dropout_p": 1.0},
            ValueError,
            "layer_norm_fn: dropout_p must lie in [0, 1), got 1.0",
        ),
        (
            "causal_conv1d_fn",
            {"x": ONE, "weight": torch.ones(2, 4), "activation": "gelu"},
            ValueError,
            "dw_causal_conv: activation must be 'silu', 'swish', 'identity' or None, got 'gelu'",
        ),
        (
            "causal_conv1d_varlen_states",
            {"x": ONE[0], "cu_seqlens": torch.tensor([0, 3]), "state_len": 2},
            ValueError,
            "causal_conv1d_varlen_states: cu_seqlens must end at or before 2, got 3",
        ),
    ],
)
def test_refuses(name, arguments, error, sentence):
    with pytest.raises(error) as caught:
        offered(name)(**arguments)
    assert str(caught.value) == sentence


def test_import_needs_nothing_but_torch():
    code = (
        "import sys, ssm.compat.mamba_ssm; "
        "assert not {'transformers', 'triton', 'einops', 'mamba_ssm'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
