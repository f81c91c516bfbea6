"""Forward passes of transformers' Mamba mixers and their norms, on our operators.

They read and write the caches of transformers, call projections as modules, and mask padding as
transformers does, so that they may take the place of the original methods in any model. Two results
differ from the original's, because those are wrong: a Mamba-1 mixer continues from its state over
several tokens instead of starting anew, and a step of decoding clamps step sizes as a prefill does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ssm import ops
from ssm.integrations.transformers_functions import NO_LIMIT, layout, serves
from ssm.modules.precision import at_least_fp32


def takes(mixer, hidden_states) -> bool:
    """Return whether our forward takes a call of a mixer.

    Args:
        mixer: of transformers.
        hidden_states: (B, L, D), any dtype.

    Returns:
        False where we have no kernels, and where accelerate has to fetch the weights of a child
        whose forward nobody calls.
    """
    children = (mixer.conv1d, getattr(mixer, "dt_proj", None))
    offloaded = any(hasattr(child, "_hf_hook") for child in children)
    return serves(hidden_states, mixer.activation) and not offloaded


def masked(hidden_states, attention_mask):
    """Return hidden_states (B, L, D) with 0 where the mask (B, L) has 0."""
    if attention_mask is None:
        return hidden_states
    return (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)


def mamba1_mixer(original: Callable) -> Callable:
    """Return the forward of a Mamba-1 mixer: Mamba, Falcon Mamba, Jamba.

    Args:
        original: the forward that it replaces; it serves where we have no kernels.
    """

    @functools.wraps(original)
    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        if not takes(self, hidden_states):
            return original(self, hidden_states, cache_params, attention_mask, **kwargs)
        dtype, seqlen = hidden_states.dtype, hidden_states.shape[1]
        meta = layout(kwargs.get("seq_idx"), kwargs.get("cu_seqlens"), cache_params is not None)
        hidden_states = masked(hidden_states, attention_mask)
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)  # (B, D, L)
        x, state = convolved(self, x, cache_params, meta)
        x = masked(x.transpose(1, 2), attention_mask)
        dt, B, C = self.x_proj(x).split(
            [self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1
        )
        if hasattr(self, "dt_layernorm"):
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        if type(self.dt_proj) is nn.Linear:
            # The bias is added by the operator, in float32.
            dt, bias = F.linear(dt, self.dt_proj.weight), self.dt_proj.bias
        else:
            dt, bias = self.dt_proj(dt), None
        A = -torch.exp(self.A_log.to(at_least_fp32(self.A_log.dtype)))
        if state is not None and seqlen == 1 and meta is None:
            y = ops.selective_state_step(
                state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D, z[..., 0], bias, True
            )[:, None]
        else:
            y = ops.selective_scan(
                x.transpose(1, 2),
                dt.transpose(1, 2),
                A,
                B.transpose(1, 2),
                C.transpose(1, 2),
                self.D,
                z,
                bias,
                True,
                cache_params is not None,
                initial_state=state,
                seq_meta=meta,
            )
            if cache_params is not None:
                y, last = y
                cache_params.update_recurrent_state(last, self.layer_idx)
            y = y.transpose(1, 2)
        return self.out_proj(y.to(dtype))

    return forward


def mamba2_mixer(original: Callable) -> Callable:
    """Return the forward of a Mamba-2 mixer: all families but the three of :func:`mamba1_mixer`.

    Args:
        original: the forward that it replaces; it serves where we have no kernels.
    """

    @functools.wraps(original)
    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        if not takes(self, hidden_states):
            return original(self, hidden_states, cache_params, attention_mask, **kwargs)
        dtype, seqlen = hidden_states.dtype, hidden_states.shape[1]
        meta = layout(kwargs.get("seq_idx"), kwargs.get("cu_seqlens"), cache_params is not None)
        hidden_states = masked(hidden_states, attention_mask)
        scaled = hasattr(self, "ssm_in_multiplier")  # Falcon H1
        if scaled:
            hidden_states = hidden_states * self.ssm_in_multiplier
        projected = self.in_proj(hidden_states)
        if scaled:
            projected = projected * self.mup_vector
        z, x, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        x, state = convolved(self, x.transpose(1, 2), cache_params, meta)
        x = masked(x.transpose(1, 2), attention_mask)
        width = self.n_groups * self.ssm_state_size
        x, B, C = x.split([self.intermediate_size, width, width], dim=-1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        B = B.unflatten(-1, (self.n_groups, self.ssm_state_size))
        C = C.unflatten(-1, (self.n_groups, self.ssm_state_size))
        A = -torch.exp(self.A_log.to(at_least_fp32(self.A_log.dtype)))
        normed = getattr(self, "mamba_rms_norm", True)
        gate = None if normed else z.unflatten(-1, (self.num_heads, self.head_dim))
        limit = NO_LIMIT if self.time_step_limit is None else tuple(self.time_step_limit)
        if state is not None and seqlen == 1 and meta is None:
            dt, bias, softplus = limited(dt[:, 0], self.dt_bias, limit)
            gate = None if gate is None else gate[:, 0]
            y = ops.selective_state_step(
                state, x[:, 0], dt, A, B[:, 0], C[:, 0], self.D, gate, bias, softplus
            )[:, None]
        else:
            y = ops.ssd_chunk_scan(
                x,
                dt,
                A,
                B,
                C,
                self.chunk_size,
                self.D,
                gate,
                meta,
                state,
                dt_bias=self.dt_bias,
                softplus=True,
                dt_limit=limit,
                return_final_states=cache_params is not None,
            )
            if cache_params is not None:
                y, last = y
                cache_params.update_recurrent_state(last, layer_idx=self.layer_idx)
        y = y.flatten(2)
        return self.out_proj((self.norm(y, z) if normed else y).to(dtype))

    return forward


def convolved(mixer, x, cache, meta):
    """Run the convolution from the window in a cache, and leave the window behind it there.

    Args:
        mixer: of transformers.
        x: (B, D, L), any dtype.
        cache: of transformers, or None.
        meta: SeqMeta of x, or None.

    Returns:
        y: (B, D, L), dtype of x.
        state: the recurrent state in the cache, which the scan continues from, or None.
    """
    weight, bias = mixer.conv1d.weight, mixer.conv1d.bias
    if cache is None:
        return ops.dw_causal_conv(x, weight, bias, mixer.activation, seq_meta=meta), None
    index, seqlen = mixer.layer_idx, x.shape[2]
    window, state = cache.get_conv_state(index), cache.get_recurrent_state(index)
    if window is not None and seqlen == 1 and meta is None and not cache.is_recording_past(index):
        return ops.dw_causal_conv_step(x, window, weight, bias, mixer.activation), state
    before = None
    if window is not None:
        # A copy: the cache writes over its window.
        before = window[..., window.shape[-1] - weight.shape[-1] + 1 :].clone()
    cache.update_conv_state(x, index, conv_kernel_size=mixer.conv_kernel_size)
    y = ops.dw_causal_conv(x, weight, bias, mixer.activation, initial_state=before, seq_meta=meta)
    return y, state


def limited(dt, bias, limit):
    """Return dt, its bias and whether softplus is left to the step operator, which has no limit."""
    if limit == NO_LIMIT:
        return dt, bias, True
    dt = dt.to(at_least_fp32(dt.dtype)) + bias
    return F.softplus(dt).clamp(*limit), None, False


def gated_norm(original: Callable) -> Callable:
    """Return the forward of a gated RMSNorm of Mamba-2.

    Args:
        original: the forward that it replaces; it serves where we have no kernels.
    """

    @functools.wraps(original)
    def forward(self, hidden_states, gate=None):
        if not serves(hidden_states):
            return original(self, hidden_states, gate)
        groups = getattr(self, "n_groups", None)  # Falcon H1 counts groups, the others channels
        size = self.group_size if groups is None else hidden_states.shape[-1] // groups
        return ops.gated_norm(
            hidden_states,
            self.weight,
            None,
            gate,
            eps=self.variance_epsilon,
            group_size=size,
            norm_before_gate=getattr(self, "norm_before_gate", False),
        )

    return forward


def rms_norm(original: Callable) -> Callable:
    """Return the forward of an RMSNorm.

    Args:
        original: the forward that it replaces; it serves where we have no kernels.
    """

    @functools.wraps(original)
    def forward(self, hidden_states):
        if not serves(hidden_states) or self.weight.dtype != hidden_states.dtype:
            return original(self, hidden_states)
        return ops.fused_layer_norm(
            hidden_states, self.weight, None, is_rms=True, eps=self.variance_epsilon, prenorm=False
        )

    return forward
