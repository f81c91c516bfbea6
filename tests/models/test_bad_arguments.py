"""What modules, models and states are given wrongly is refused in one sentence that names it.

Operators have such tests of their own (tests/kernels/*_rejects.py, test_reference_*.py); configs
test_bad_configs.py, checkpoints test_bad_checkpoints.py.
"""

import pytest
import torch

from ssm.compat import causal_conv1d, mamba_ssm
from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.modules.attention import MHA
from ssm.modules.mamba1 import Mamba1
from ssm.modules.mamba2 import Mamba2
from ssm.modules.mlp import MLP, GatedMLP
from ssm.modules.norm import RMSNorm, RMSNormGated
from ssm.modules.rotary import Rotary
from ssm.seq_meta import SeqMeta
from ssm.state import State

ONE = torch.ones(2, 3)
IDS = torch.ones(1, 3, dtype=torch.int64)
WIDE = torch.ones(1, 3, 8)
BOOLS = torch.ones(2, 3, dtype=torch.bool)


def model():
    return MambaLMHeadModel(MambaConfig(d_model=8, n_layer=1, vocab_size=8, ssm_cfg={"d_state": 2}))


def state():
    return State({0: (torch.zeros(2, 3),)}, 2)


def combined(**changes):
    given = {"x": torch.ones(1, 3, 2, 2), "dt": torch.ones(1, 3, 2), "A": -torch.ones(2)}
    given |= {"B": torch.ones(1, 3, 1, 4), "C": torch.ones(1, 3, 1, 4), "chunk_size": 2}
    return mamba_ssm.mamba_chunk_scan_combined(**{**given, **changes})


def split(**changes):
    given = {"zxbcdt": torch.ones(1, 3, 18), "conv1d_weight": torch.ones(12, 4)}
    given |= {"conv1d_bias": None, "dt_bias": torch.ones(2), "A": -torch.ones(2)}
    given |= {"D": torch.ones(2), "chunk_size": 2, "headdim": 2}
    return mamba_ssm.mamba_split_conv1d_scan_combined(**{**given, **changes})


def inner(**changes):
    given = {"xz": torch.ones(1, 4, 3), "conv1d_weight": torch.ones(2, 1, 4), "conv1d_bias": None}
    given |= {"x_proj_weight": torch.ones(7, 2), "delta_proj_weight": torch.ones(2, 1)}
    given |= {"out_proj_weight": torch.ones(5, 2), "out_proj_bias": None, "A": -torch.ones(2, 3)}
    return mamba_ssm.mamba_inner_fn(**{**given, **changes})


def generate(**changes):
    return model().generate(IDS, 5, **changes)


def decode(**changes):
    given = {"input_ids": IDS, "model": model(), "max_length": 5}
    return mamba_ssm.decode(**{**given, **changes})


def varlen(**changes):
    given = {"x": torch.ones(4, 2), "cu_seqlens": torch.tensor([0, 4]), "state_len": 2}
    return causal_conv1d.causal_conv1d_varlen_states(**{**given, **changes})


def norm_ref(**changes):
    given = {"x": ONE, "weight": torch.ones(3), "bias": None, "dropout_p": 0.5}
    return mamba_ssm.layer_norm_ref(**{**given, **changes})


def modules():
    """Return every module that mixes activations, with the name of its input."""
    return {
        "Mamba1: hidden_states": Mamba1(8),
        "Mamba2: hidden_states": Mamba2(8, headdim=4),
        "MHA: x": MHA(8, 2, causal=True),
        "GatedMLP: x": GatedMLP(8),
        "MLP: x": MLP(8, 8),
    }


WRONG_TYPES = {
    "Mamba1: max_seqlen must be an int, got 'abc'": lambda: Mamba1(8).allocate_inference_cache(
        2, "abc"
    ),
    "Mamba2: max_seqlen must be an int, got 1.5": lambda: Mamba2(
        8, headdim=4
    ).allocate_inference_cache(2, 1.5),
    "Mamba2: dtype must be a torch.dtype, got 'bf16'": lambda: Mamba2(8, headdim=4, dtype="bf16"),
    "MHA: dtype must be a torch.dtype, got 3": lambda: MHA(8, 2).allocate_inference_cache(2, 4, 3),
    "MambaLMHeadModel: dtype must be a torch.dtype, got 'bf16'": lambda: MambaLMHeadModel(
        model().config, dtype="bf16"
    ),
    "MambaLMHeadModel: seq_meta must be a SeqMeta, got dict": lambda: model()(IDS, seq_meta={}),
    "State: max_batch_size must be an int, got 1.5": lambda: State(max_batch_size=1.5),
    "State: max_seqlen must be an int, got 'x'": lambda: state().reset(max_seqlen="x"),
    "generate: state must be a State, got str": lambda: generate(state="x"),
    "generate: generator must be a torch.Generator, got str": lambda: generate(generator="x"),
    "Mamba1: d_model must be an int, got '8'": lambda: Mamba1("8"),
    "Mamba1: expand must be a number, got None": lambda: Mamba1(8, expand=None),
    "Mamba1: dt_max must be a number, got 'x'": lambda: Mamba1(8, dt_max="x"),
    "Mamba1: dt_scale must be a number, got [1]": lambda: Mamba1(8, dt_scale=[1]),
    "Mamba1: dt_rank must be an int, got 'half'": lambda: Mamba1(8, dt_rank="half"),
    "Mamba2: multipliers must be five numbers, got [1, 1, 1, 1, 1, 1]": lambda: Mamba2(
        8, headdim=4, multipliers=[1] * 6
    ),
    "MHA: position_ids must be a torch.Tensor, got list": lambda: MHA(8, 2)(
        WIDE, position_ids=[[0]]
    ),
    "MHA: softmax_scale must be a number, got 'x'": lambda: MHA(8, 2, softmax_scale="x"),
    "MHA: rotary_emb_base must be a number, got None": lambda: MHA(8, 2, rotary_emb_base=None),
    "MHA: max_seqlen must be an int, got 1.5": lambda: MHA(8, 2).allocate_inference_cache(1, 1.5),
    "GatedMLP: in_features must be an int, got None": lambda: GatedMLP(None),
    "GatedMLP: multiple_of must be an int, got 1.5": lambda: GatedMLP(8, multiple_of=1.5),
    "GatedMLP: out_multiplier must be a number, got 'x'": lambda: GatedMLP(8, out_multiplier="x"),
    "MLP: hidden_features must be an int, got 2.0": lambda: MLP(8, 2.0),
    "MLP: x must be a torch.Tensor, got list": lambda: MLP(8, 8)([1.0]),
    "RMSNorm: hidden_size must be an int, got 'x'": lambda: RMSNorm("x"),
    "RMSNormGated: hidden_size must be an int, got 'x'": lambda: RMSNormGated("x"),
    "MambaLMHeadModel: config must be a MambaConfig, got dict": lambda: MambaLMHeadModel({}),
    "MambaLMHeadModel: initializer_cfg must be a dict, got int": lambda: MambaLMHeadModel(
        model().config, 3
    ),
    "MambaLMHeadModel: position_ids must be a torch.Tensor, got int": lambda: model()(IDS, 3),
    "MambaLMHeadModel: num_last_tokens must be an int, got None": lambda: model()(
        IDS, num_last_tokens=None
    ),
    "generate: top_p must be a number, got None": lambda: generate(top_p=None),
    "generate: temperature must be a number, got 'x'": lambda: generate(temperature="x"),
    "generate: seed must be an int, got 1.5": lambda: generate(seed=1.5),
    "generate: streamer must be callable or have put and end, got int": lambda: generate(
        streamer=3
    ),
    "State: indices must be a tensor or list of ints, got NoneType": lambda: state().gather(None),
    "State: other must be a State, got dict": lambda: state().update([0], {}),
    "seq_meta: seqlen must be an int, got [3]": lambda: SeqMeta(mask=BOOLS).positions(2, [3]),
    "mamba_chunk_scan_combined: x must be a torch.Tensor, got int": lambda: combined(x=1),
    "mamba_split_conv1d_scan_combined: zxbcdt must be a torch.Tensor, got int": lambda: split(
        zxbcdt=1
    ),
    "mamba_split_conv1d_scan_combined: ngroups must be an int, got NoneType": lambda: split(
        ngroups=None
    ),
    "mamba_split_conv1d_scan_combined: headdim must be an int, got str": lambda: split(headdim="2"),
    "mamba_split_conv1d_scan_combined: D must be a torch.Tensor, got float": lambda: split(D=1.0),
    "MambaConfig: attn_layer_idx must be a list, got 1": lambda: MambaConfig(attn_layer_idx=1),
    "mamba_inner_fn: xz must be a torch.Tensor, got NoneType": lambda: inner(xz=None),
    "mamba_inner_fn: A must be a torch.Tensor, got float": lambda: inner(A=1.0),
    "mamba_inner_fn: B_proj_bias must be a torch.Tensor, got bool": lambda: inner(B_proj_bias=True),
    "causal_conv1d_varlen_states: x must be a torch.Tensor, got list": lambda: varlen(x=[]),
    "causal_conv1d_varlen_states: state_len must be an int, got NoneType": lambda: varlen(
        state_len=None
    ),
    "layer_norm_fn: x must be a torch.Tensor, got NoneType": lambda: mamba_ssm.layer_norm_fn(
        None, ONE, None
    ),
    "layer_norm_ref: dropout_p must be a number, got 'x'": lambda: norm_ref(dropout_p="x"),
    "segsum: x must be a torch.Tensor, got list": lambda: mamba_ssm.segsum([1.0]),
    "sample: logits must be a torch.Tensor, got list": lambda: mamba_ssm.sample([1.0]),
    "decode: model must be callable, got NoneType": lambda: decode(model=None),
    "decode: eos_token_id must be an int, got str": lambda: decode(eos_token_id="x"),
    "decode: vocab_size must be an int, got float": lambda: decode(vocab_size=3.0),
    "create_block: layer_idx must be an int, got 'x'": lambda: mamba_ssm.create_block(
        8, 0, layer_idx="x"
    ),
    "create_block: attn_layer_idx must be a list, got 1": lambda: mamba_ssm.create_block(
        8, 0, attn_layer_idx=1
    ),
    "MixerModel: initializer_cfg must be a dict, got 3": lambda: mamba_ssm.MixerModel(
        8, 1, 0, 8, initializer_cfg=3
    ),
}
WRONG_VALUES = {
    "Mamba1: max_seqlen must not be negative, got -1": lambda: Mamba1(8).allocate_inference_cache(
        2, -1
    ),
    "Mamba2: max_seqlen must not be negative, got -1": lambda: Mamba2(
        8, headdim=4
    ).allocate_inference_cache(2, -1),
    "Mamba1: dtype must be floating point, got torch.int32": lambda: Mamba1(8).allocate_state(
        2, torch.int32
    ),
    "Mamba2: dtype must be floating point, got torch.bool": lambda: Mamba2(
        8, headdim=4
    ).allocate_state(2, torch.bool),
    "MHA: dtype must be floating point, got torch.complex64": lambda: MHA(8, 2).allocate_state(
        2, torch.complex64
    ),
    "Mamba1: dtype must be floating point, got torch.int64": lambda: Mamba1(8, dtype=torch.int64),
    "Mamba2: dtype must be floating point, got torch.int32": lambda: Mamba2(
        8, headdim=4, dtype=torch.int32
    ),
    "MHA: dtype must be floating point, got torch.int32": lambda: MHA(8, 2, dtype=torch.int32),
    "GatedMLP: dtype must be floating point, got torch.complex64": lambda: GatedMLP(
        8, dtype=torch.complex64
    ),
    "MLP: dtype must be floating point, got torch.int32": lambda: MLP(8, 8, dtype=torch.int32),
    "RMSNorm: dtype must be floating point, got torch.int32": lambda: RMSNorm(8, dtype=torch.int32),
    "RMSNormGated: dtype must be floating point, got torch.complex64": lambda: RMSNormGated(
        8, dtype=torch.complex64
    ),
    "MambaLMHeadModel: dtype must be floating point, got torch.int32": lambda: MambaLMHeadModel(
        model().config, dtype=torch.int32
    ),
    "State: max_batch_size must not be negative, got -1": lambda: State(max_batch_size=-1),
    "State: max_seqlen must not be negative, got -5": lambda: State(max_seqlen=-5),
    "State: seqlen_offset must not be negative, got -1": lambda: State(seqlen_offset=-1),
    "Rotary: dim must be even and positive, got 3": lambda: Rotary(3),
    "Rotary: dim must be even and positive, got 0": lambda: Rotary(0),
    "Rotary: base must be positive, got 0": lambda: Rotary(2, base=0),
    "causal_conv1d_varlen_states: cu_seqlens must be on cpu, got meta": lambda: varlen(
        cu_seqlens=torch.tensor([0, 4], device="meta")
    ),
    "Mamba1: dt_max must be positive, got nan": lambda: Mamba1(8, dt_max=float("nan")),
    "Mamba2: multipliers must be finite, got (1.0, 1.0, 1.0, 1.0, inf)": lambda: Mamba2(
        8, headdim=4, multipliers=(1.0, 1.0, 1.0, 1.0, float("inf"))
    ),
    "MHA: softmax_scale must be positive, got inf": lambda: MHA(8, 2, softmax_scale=float("inf")),
    "GatedMLP: x must have shape (..., 8), got (2, 3)": lambda: GatedMLP(8)(ONE),
    "GatedMLP: x must have shape (..., 8), got ()": lambda: GatedMLP(8)(torch.tensor(1.0)),
    "MLP: x must have shape (..., 8), got (2, 3)": lambda: MLP(8, 8)(ONE),
    "RMSNorm: hidden_size must not be negative, got -1": lambda: RMSNorm(-1),
    "RMSNormGated: hidden_size must not be negative, got -1": lambda: RMSNormGated(-1),
    "Mamba1: batch_size must not be negative, got -1": lambda: Mamba1(8).allocate_inference_cache(
        -1, 3
    ),
    "Mamba2: batch_size must not be negative, got -1": lambda: Mamba2(
        8, headdim=4
    ).allocate_inference_cache(-1, 3),
    "MHA: batch_size must not be negative, got -1": lambda: MHA(8, 2).allocate_inference_cache(
        -1, 3
    ),
    "MHA: max_seqlen must not be negative, got -1": lambda: MHA(8, 2).allocate_inference_cache(
        1, -1
    ),
    "generate: temperature must be finite, got an int beyond": lambda: generate(
        temperature=10**400
    ),
    "Mamba1: hidden_states must have shape (B, 1, 8) in step, got (1, 1, 9)": lambda: Mamba1(
        8
    ).step(torch.ones(1, 1, 9), *Mamba1(8).allocate_inference_cache(1, 1)),
    "MHA: position_ids must not be complex, got torch.complex64": lambda: MHA(8, 2)(
        WIDE, position_ids=torch.ones(1, 3, dtype=torch.complex64)
    ),
    "generate: seed must fit in 64 bits": lambda: generate(seed=2**64),
    "MambaLMHeadModel: position_ids must have shape (B, L) = (1, 3), got (1, 2)": lambda: model()(
        IDS, IDS[:, :2]
    ),
    "State: indices must have shape (R,), got ()": lambda: state().gather(3),
    "mamba_chunk_scan_combined: x must have shape (B, L, H, P)": lambda: combined(x=ONE),
    "mamba_split_conv1d_scan_combined: D must have shape (H)": lambda: split(D=torch.tensor(1.0)),
    "mamba_split_conv1d_scan_combined: ngroups must be at least 1, got 0": lambda: split(ngroups=0),
    "mamba_split_conv1d_scan_combined: headdim must be at least 1, got -1": lambda: split(
        headdim=-1
    ),
    "mamba_split_conv1d_scan_combined: outproj_weight must have shape (E, D)": lambda: split(
        outproj_weight=torch.ones(5, 3)
    ),
    "mamba_inner_fn: xz must have 2 D channels, got 3": lambda: inner(xz=torch.ones(1, 3, 3)),
    "mamba_inner_fn: x_proj_weight must have shape (R + 2 N, D) = (7, 2)": lambda: inner(
        x_proj_weight=torch.ones(6, 2)
    ),
    "mamba_inner_fn: x_proj_weight must have at least 4 rows, got 3": lambda: inner(
        x_proj_weight=torch.ones(3, 2), B=torch.ones(2, 3)
    ),
    "mamba_inner_fn: delta_proj_weight must have shape (D, R)": lambda: inner(
        delta_proj_weight=torch.ones(3, 1)
    ),
    "mamba_inner_fn: out_proj_bias must have shape (E) = (5,)": lambda: inner(
        out_proj_bias=torch.ones(4)
    ),
    "mamba_inner_fn: C_proj_bias must have shape (N) = (3,)": lambda: inner(
        C_proj_bias=torch.ones(4)
    ),
    "mamba_inner_fn: A must be on cpu, got meta": lambda: inner(A=torch.ones(2, 3, device="meta")),
    "seq_meta: cu_seqlens must start at 0, got 1": lambda: varlen(cu_seqlens=torch.tensor([1, 4])),
    "causal_conv1d_varlen_states: state_len must be at least 0": lambda: varlen(state_len=-1),
    "causal_conv1d_fn: final_states_out must have shape (B, D, W - 1) = (1, 2, 3)": lambda: (
        causal_conv1d.causal_conv1d_fn(
            *(torch.ones(1, 2, 5), torch.ones(2, 4)),
            return_final_states=True,
            final_states_out=ONE,
        )
    ),
    "layer_norm_fn: x1 must have shape": lambda: mamba_ssm.layer_norm_fn(
        ONE, torch.ones(3), None, x1=ONE[:1]
    ),
    "layer_norm_ref: dropout_mask must have dtype bool": lambda: norm_ref(dropout_mask=ONE),
    "segsum: x must have shape": lambda: mamba_ssm.segsum(torch.tensor(1.0)),
    "sample: logits must have shape (B, V)": lambda: mamba_ssm.sample(torch.ones(3)),
    "decode: teacher_outputs must have dtype int32 or int64": lambda: decode(
        teacher_outputs=torch.ones(1, 3)
    ),
    "decode: vocab_size must be at least 1, got 0": lambda: decode(vocab_size=0),
}


@pytest.mark.parametrize("sentence", WRONG_TYPES)
def test_wrong_types(sentence):
    with pytest.raises(TypeError) as caught:
        WRONG_TYPES[sentence]()
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("sentence", WRONG_VALUES)
def test_wrong_values(sentence):
    with pytest.raises(ValueError) as caught:
        WRONG_VALUES[sentence]()
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", modules())
def test_activations_must_be_floating_point(name, dtype):
    """Integers would be cast to the weights' dtype, and the result, cast back, be zero."""
    module, x = modules()[name], torch.ones(1, 1, 8, dtype=dtype)
    calls = [lambda: module(x)]
    if hasattr(module, "step"):
        calls.append(lambda: module.step(x, *module.allocate_inference_cache(1, 4)))
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == f"{name} must be floating point, got {dtype}"


@pytest.mark.parametrize("name", list(modules())[:3])
@pytest.mark.parametrize("given", [{"mask": BOOLS}, BOOLS], ids=["dict", "tensor"])
def test_what_is_no_seq_meta(name, given):
    owner = name.partition(":")[0]
    with pytest.raises(TypeError) as caught:
        modules()[name](torch.ones(2, 3, 8), seq_meta=given)
    got = type(given).__name__
    assert str(caught.value) == f"{owner}: seq_meta must be a SeqMeta, got {got}"


@pytest.mark.parametrize(
    ("dtype", "error", "rule"),
    [
        (torch.int8, ValueError, "be floating point, got torch.int8"),
        ("bf16", TypeError, "be a torch.dtype, got 'bf16'"),
    ],
)
def test_a_file_of_another_kind_of_numbers_is_not_written(tmp_path, dtype, error, rule):
    with pytest.raises(error) as caught:
        model().save_pretrained(tmp_path / "new", dtype=dtype)
    assert str(caught.value) == f"save_pretrained: dtype must {rule}"
    assert not any(tmp_path.iterdir())


def test_what_is_right_passes():
    """The calls above, as they are without the fault."""
    assert combined().shape == (1, 3, 2, 2)
    assert split(outproj_weight=torch.ones(5, 4)).shape == (1, 3, 5)
    assert inner(out_proj_bias=torch.ones(5), B_proj_bias=torch.ones(3)).shape == (1, 3, 5)
    assert generate(seed=2**63, streamer=lambda tokens: None).shape == (1, 5)
    assert generate(generator=torch.Generator(), state=model().allocate_state(1)).shape == (1, 5)
    assert decode(eos_token_id=9, vocab_size=8, teacher_outputs=IDS).sequences.shape == (1, 5)
    assert varlen().shape == (1, 2, 2)
    assert norm_ref(dropout_mask=BOOLS).shape == (2, 3)
    assert Mamba1(8, dt_min=torch.finfo(torch.float32).tiny, expand=1.5).d_inner == 12


@pytest.mark.parametrize(
    "make",
    [
        lambda **kwargs: Mamba1(8, **kwargs),
        lambda **kwargs: Mamba1(8, bcdt_norm="weightless", **kwargs),
        lambda **kwargs: Mamba2(8, headdim=4, **kwargs),
        lambda **kwargs: MHA(8, 2, **kwargs),
        lambda **kwargs: GatedMLP(8, **kwargs),
    ],
    ids=["mamba1", "mamba1-normed", "mamba2", "mha", "mlp"],
)
def test_modules_run_without_data(make):
    """Shapes are worked out on the device type "meta", which has no autocast to ask about."""
    y = make(device="meta")(torch.empty(2, 3, 8, device="meta"))
    assert y.shape == (2, 3, 8)
    assert y.is_meta
