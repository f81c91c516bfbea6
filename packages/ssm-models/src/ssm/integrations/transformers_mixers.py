"""Forward passes of transformers' Mamba mixers, norms and language model heads, on our operators.

They read and write the caches of transformers, call projections that are more than a product as
modules, and mask padding as transformers does, so that they may take the place of the original
methods in any model. Two results
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
from ssm.ops.projection import project, projected


def mamba1_mixer(original: Callable) -> Callable:
    """Return the forward of a Mamba-1 mixer: Mamba, Falcon Mamba, Jamba.

    Args:
        original: the forward that it replaces; it serves where we have no kernels.
    """

    @functools.wraps(original)
    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        if not takes(self, hidden_states):
            return original(self, hidden_states, cache_params, attention_mask, **kwargs)
        meta = layout(kwargs.get("seq_idx"), kwargs.get("cu_seqlens"), cache_params is not None)
        xz = project(self.in_proj, masked(hidden_states, attention_mask))
        if can_step(self, hidden_states, cache_params, attention_mask, meta):
            y = _mamba1_step(self, xz[:, 0], cache_params)[:, None]
        else:
            y = _mamba1_scan(self, xz, cache_params, attention_mask, meta)
        return project(self.out_proj, y.to(hidden_states.dtype))

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
        dtype = hidden_states.dtype
        meta = layout(kwargs.get("seq_idx"), kwargs.get("cu_seqlens"), cache_params is not None)
        hidden_states = masked(hidden_states, attention_mask)
        scaled = hasattr(self, "ssm_in_multiplier")  # Falcon H1
        if scaled:
            hidden_states = hidden_states * self.ssm_in_multiplier
        zxdt = project(self.in_proj, hidden_states)
        if scaled:
            zxdt = zxdt * self.mup_vector
        if can_step(self, hidden_states, cache_params, attention_mask, meta):
            y = _mamba2_step(self, zxdt[:, 0], cache_params)[:, None]
        else:
            y = _mamba2_scan(self, zxdt, cache_params, attention_mask, meta)
        return project(self.out_proj, y.to(dtype))

    return forward


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


def can_step(mixer, hidden_states, cache, attention_mask, meta) -> bool:
    """Return whether a call is one token behind a filled cache, whose states are changed in place.

    Args:
        mixer: of transformers.
        hidden_states: (B, L, D), any dtype.
        cache: of transformers, or None.
        attention_mask: (B, L) or None.
        meta: SeqMeta or None.
    """
    if cache is None or hidden_states.shape[1] != 1:
        return False
    if attention_mask is not None or meta is not None:
        return False
    index = mixer.layer_idx
    return cache.get_conv_state(index) is not None and not cache.is_recording_past(index)


def convolved(mixer, x, cache, meta):
    """Run the convolution from the window in a cache, and leave the window behind it there.

    Args:
        mixer: of transformers.
        x: (B, D, L), any dtype.
        cache: of transformers, or None.
        meta: SeqMeta of x, or None.

    Returns:
        y: (B, D, L), dtype of x.
        state: the recurrent state in the cache, from which the scan continues, or None.
    """
    weight, bias, before, state = mixer.conv1d.weight, mixer.conv1d.bias, None, None
    if cache is not None:
        index = mixer.layer_idx
        window, state = cache.get_conv_state(index), cache.get_recurrent_state(index)
        if window is not None:
            # A copy: the cache writes over its window.
            before = window[..., window.shape[-1] - weight.shape[-1] + 1 :].clone()
        cache.update_conv_state(x, index, conv_kernel_size=mixer.conv_kernel_size)
    y = ops.dw_causal_conv(x, weight, bias, mixer.activation, initial_state=before, seq_meta=meta)
    return y, state


def stepped(mixer, x, cache):
    """Run one step of the convolution: x (B, D) -> (B, D), and return the recurrent state too."""
    window, conv = cache.get_conv_state(mixer.layer_idx), mixer.conv1d
    y = ops.dw_causal_conv_step(x, window, conv.weight, conv.bias, mixer.activation)
    return y, cache.get_recurrent_state(mixer.layer_idx)


def decay_rates(mixer):
    """Return A = -exp(A_log), in float32 or better."""
    return -torch.exp(mixer.A_log.to(at_least_fp32(mixer.A_log.dtype)))


def _mamba1_select(mixer, x):
    """From x (..., D) the step sizes (..., D), their bias if the operator adds it, and B and C."""
    width = mixer.ssm_state_size
    dt, B, C = project(mixer.x_proj, x).split([mixer.time_step_rank, width, width], dim=-1)
    if hasattr(mixer, "dt_layernorm"):  # Falcon Mamba, Jamba
        dt, B, C = mixer.dt_layernorm(dt), mixer.b_layernorm(B), mixer.c_layernorm(C)
    if type(mixer.dt_proj) is nn.Linear:
        # The operator adds the bias in float32.
        return F.linear(dt, mixer.dt_proj.weight), mixer.dt_proj.bias, B, C
    return mixer.dt_proj(dt), None, B, C


def _mamba1_step(mixer, xz, cache):
    """One token: xz (B, 2 D) -> (B, D)."""
    x, z = xz.chunk(2, dim=-1)
    x, state = stepped(mixer, x, cache)
    dt, bias, B, C = _mamba1_select(mixer, x)
    A = decay_rates(mixer)
    return ops.selective_state_step(state, x, dt, A, B, C, mixer.D, z, bias, True)


def _mamba1_scan(mixer, xz, cache, attention_mask, meta):
    """Any number of tokens: xz (B, L, 2 D) -> (B, L, D)."""
    x, z = xz.transpose(1, 2).chunk(2, dim=1)
    x, state = convolved(mixer, x, cache, meta)
    x = masked(x.transpose(1, 2), attention_mask)
    dt, bias, B, C = _mamba1_select(mixer, x)
    x, dt, B, C = (t.transpose(1, 2) for t in (x, dt, B, C))
    arguments = (x, dt, decay_rates(mixer), B, C, mixer.D, z, bias, True, cache is not None)
    y = ops.selective_scan(*arguments, initial_state=state, seq_meta=meta)
    if cache is not None:
        y, state = y
        cache.update_recurrent_state(state, mixer.layer_idx)
    return y.transpose(1, 2)


def _mamba2_split(mixer, zxdt):
    """From (..., 2 D + 2 G N + H) the gate, what is convolved, and the step sizes."""
    return zxdt.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)


def _mamba2_heads(mixer, z, xBC):
    """From (..., D + 2 G N) x (..., H, P), B and C (..., G, N); and the gate of the operator.

    The gate is None where a norm applies it.
    """
    groups, heads = (mixer.n_groups, mixer.ssm_state_size), (mixer.num_heads, mixer.head_dim)
    width = mixer.n_groups * mixer.ssm_state_size
    x, B, C = xBC.split([mixer.intermediate_size, width, width], dim=-1)
    gate = None if _is_normed(mixer) else z.unflatten(-1, heads)
    return x.unflatten(-1, heads), B.unflatten(-1, groups), C.unflatten(-1, groups), gate


def _is_normed(mixer) -> bool:
    return getattr(mixer, "mamba_rms_norm", True)  # an option of Falcon H1


def _limit(mixer) -> tuple:
    return NO_LIMIT if mixer.time_step_limit is None else tuple(mixer.time_step_limit)


def _mamba2_step(mixer, zxdt, cache):
    """One token: zxdt (B, 2 D + 2 G N + H) -> (B, D)."""
    z, xBC, dt = _mamba2_split(mixer, zxdt)
    xBC, state = stepped(mixer, xBC, cache)
    x, B, C, gate = _mamba2_heads(mixer, z, xBC)
    bias, softplus, limit = mixer.dt_bias, True, _limit(mixer)
    if limit != NO_LIMIT:
        # The operator knows no limit, so it gets finished step sizes.
        dt = F.softplus(dt.to(at_least_fp32(dt.dtype)) + bias).clamp(*limit)
        bias, softplus = None, False
    A = decay_rates(mixer)
    y = ops.selective_state_step(state, x, dt, A, B, C, mixer.D, gate, bias, softplus).flatten(1)
    return mixer.norm(y, z) if _is_normed(mixer) else y


def _mamba2_scan(mixer, zxdt, cache, attention_mask, meta):
    """Any number of tokens: zxdt (B, L, 2 D + 2 G N + H) -> (B, L, D)."""
    z, xBC, dt = _mamba2_split(mixer, zxdt)
    xBC, state = convolved(mixer, xBC.transpose(1, 2), cache, meta)
    x, B, C, gate = _mamba2_heads(mixer, z, masked(xBC.transpose(1, 2), attention_mask))
    y = ops.ssd_chunk_scan(
        x,
        dt,
        decay_rates(mixer),
        B,
        C,
        mixer.chunk_size,
        mixer.D,
        gate,
        meta,
        state,
        dt_bias=mixer.dt_bias,
        softplus=True,
        dt_limit=_limit(mixer),
        return_final_states=cache is not None,
    )
    if cache is not None:
        y, state = y
        cache.update_recurrent_state(state, layer_idx=mixer.layer_idx)
    y = y.flatten(2)
    return mixer.norm(y, z) if _is_normed(mixer) else y


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


def language_model(original: Callable) -> Callable:
    """Return the forward of a causal language model: the original's, with our product of its head.

    Args:
        original: the forward that it calls.
    """

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        with projected(self.lm_head):
            return original(self, *args, **kwargs)

    return forward
