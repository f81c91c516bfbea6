"""Mamba2 as a PyTorch module: parameters, dtypes, replaced parts, compilation, refusals.

Judge: the released code's names and initial values; the same module in float64 or run eagerly.
"""

import copy
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssm.modules.mamba2 import Mamba2
from ssm.modules.norm import RMSNormGated
from ssm.seq_meta import SeqMeta
from ssm.state import State

D_MODEL, LENGTH = 8, 7


def mixer(dtype=torch.float64, **kwargs) -> Mamba2:
    settings = {"d_state": 5, "headdim": 4, "chunk_size": 3, **kwargs}
    return Mamba2(D_MODEL, dtype=dtype, **settings)


def inputs(batch=2, length=LENGTH, dtype=torch.float64):
    return torch.randn(batch, length, D_MODEL, dtype=dtype)


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_positional_order_is_that_of_the_api():
    names = list(inspect.signature(Mamba2).parameters)
    sizes = ["d_model", "d_state", "d_conv", "headdim", "expand", "ngroups", "d_ssm", "chunk_size"]
    assert names[:13] == [*sizes, "bias", "conv_bias", "layer_idx", "device", "dtype"]
    names = list(inspect.signature(Mamba2.forward).parameters)
    assert names[1:5] == ["hidden_states", "inference_params", "seq_idx", "cu_seqlens"]


def test_defaults_are_those_of_the_api():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(Mamba2).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert defaults == {
        "d_state": 128,
        "d_conv": 4,
        "headdim": 64,
        "expand": 2,
        "ngroups": 1,
        "d_ssm": None,
        "chunk_size": 256,
        "bias": False,
        "conv_bias": True,
        "layer_idx": None,
        "device": None,
        "dtype": None,
        "conv_init": None,
        "A_init_range": (1, 16),
        "D_has_hdim": False,
        "rmsnorm": True,
        "norm_before_gate": False,
        "norm_eps": 1e-5,
        "multipliers": None,
        "dt_min": 0.001,
        "dt_max": 0.1,
        "dt_init_floor": 0.0001,
        "dt_limit": (0.0, math.inf),
        "use_mem_eff_path": True,
        "process_group": None,
        "sequence_parallel": True,
    }


def test_keys_and_shapes_are_those_of_state_spaces():
    m = Mamba2(16, d_state=5, d_conv=3, headdim=4, ngroups=2, bias=True)
    assert {name: tuple(p.shape) for name, p in m.state_dict().items()} == {
        "dt_bias": (8,),
        "A_log": (8,),
        "D": (8,),
        "in_proj.weight": (2 * 32 + 2 * 2 * 5 + 8, 16),
        "in_proj.bias": (2 * 32 + 2 * 2 * 5 + 8,),
        "conv1d.weight": (32 + 2 * 2 * 5, 1, 3),
        "conv1d.bias": (32 + 2 * 2 * 5,),
        "norm.weight": (32,),
        "out_proj.weight": (16, 32),
        "out_proj.bias": (16,),
    }
    m = Mamba2(16, d_state=5, headdim=4, d_ssm=8, D_has_hdim=True, rmsnorm=False, conv_bias=False)
    assert {name: tuple(p.shape) for name, p in m.state_dict().items()} == {
        "dt_bias": (2,),
        "A_log": (2,),
        "D": (8,),
        "in_proj.weight": (2 * 24 + 8 + 8 + 2 * 5 + 2, 16),
        "conv1d.weight": (8 + 2 * 5, 1, 4),
        "out_proj.weight": (16, 32),
    }


def test_shapes_of_the_released_130m_model():
    m = Mamba2(768, device="meta")
    assert m.in_proj.weight.shape == (3352, 768)
    assert m.conv1d.weight.shape == (1792, 1, 4)
    assert m.nheads == 24
    conv_state, ssm_state = m.allocate_inference_cache(3, 0)
    assert conv_state.shape == (3, 1792, 4)
    assert ssm_state.shape == (3, 24, 64, 128)


def test_initial_values_are_those_of_the_paper():
    m = Mamba2(64, d_state=5, headdim=1, dt_min=0.01, dt_max=0.02, A_init_range=(2, 3))
    assert m.nheads == 128
    rates = m.A_log.exp()
    assert 2 <= rates.min() < 2.2 < 2.8 < rates.max() <= 3
    assert torch.equal(m.D, torch.ones(128))
    assert torch.equal(m.norm.weight, torch.ones(128))
    dt = F.softplus(m.dt_bias)
    assert 0.0099 < dt.min() < 0.0115 < 0.0175 < dt.max() < 0.0201
    # Log-uniform: half of the values lie below the geometric mean.
    assert 40 < (dt < (0.01 * 0.02) ** 0.5).sum() < 88
    floor = F.softplus(Mamba2(32, dt_min=1e-9, dt_max=1e-8, dt_init_floor=1e-3).dt_bias)
    torch.testing.assert_close(floor, torch.full((1,), 1e-3))
    weight = mixer(conv_init=1e-3).conv1d.weight
    assert 0 < weight.abs().max() <= 1e-3
    assert mixer().conv1d.weight.abs().max() > 0.1
    marked = {n for n, p in m.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D", "dt_bias"}


def test_one_seed_gives_the_weights_of_mamba_ssm():
    """The released code makes its layers, and draws step sizes and rates, in this order."""
    torch.manual_seed(5)
    made = Mamba2(32, d_state=3, headdim=16).state_dict()
    behind = torch.rand(())
    torch.manual_seed(5)
    layers = {"in_proj": nn.Linear(32, 2 * 64 + 2 * 3 + 4, bias=False)}
    layers["conv1d"] = nn.Conv1d(70, 70, 4, groups=70, padding=3)
    low, high = math.log(1e-3), math.log(1e-1)
    dt = torch.exp(torch.rand(4) * (high - low) + low).clamp(min=1e-4)
    rates = torch.empty(4).uniform_(1, 16)
    layers["out_proj"] = nn.Linear(64, 32, bias=False)
    assert torch.equal(behind, torch.rand(()))
    want = {"dt_bias": dt + torch.log(-torch.expm1(-dt)), "A_log": rates.log()}
    for name, layer in layers.items():
        want |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    for name, value in want.items():
        assert torch.equal(made[name], value), name


def test_norm_groups_follow_the_groups():
    assert mixer(ngroups=2).norm.group_size == 8
    norm = RMSNormGated(6, group_size=3, norm_before_gate=False, dtype=torch.float64)
    x, z = torch.randn(2, 2, 6, dtype=torch.float64)
    gated = (x * F.silu(z)).view(2, 2, 3)
    want = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    close(norm(x, z), want.view(2, 6))
    close(norm(x), F.rms_norm(x.view(2, 2, 3), (3,), eps=1e-5).view(2, 6))
    assert "6, eps=1e-05, group_size=3, norm_before_gate=False" in repr(norm)


def test_bfloat16_keeps_the_recurrence_in_float32():
    m = mixer(torch.bfloat16)
    assert m.in_proj.weight.dtype == m.norm.weight.dtype == torch.bfloat16
    assert m.A_log.dtype == m.D.dtype == m.dt_bias.dtype == torch.float32
    conv_state, ssm_state = m.allocate_inference_cache(1, 0)
    assert (conv_state.dtype, ssm_state.dtype) == (torch.bfloat16, torch.float32)
    assert m.allocate_inference_cache(1, 0, torch.float64)[1].dtype == torch.float64
    assert m.to(torch.bfloat16)._decay_rates(torch.bfloat16).dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"rmsnorm": False}, {"d_ssm": 8}])
@pytest.mark.parametrize("cast", ["to", "half", "autocast", "created"])
def test_low_precision_is_near_float32(cast, options):
    m, x = mixer(torch.float32, **options), inputs(dtype=torch.float32)
    want = m(x)
    low = torch.float16 if cast == "half" else torch.bfloat16
    if cast == "created":
        other = mixer(low, **options)
        other.load_state_dict(m.state_dict())
        m = other
    elif cast != "autocast":
        m = m.to(low)
    if cast == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y = m(x)
        assert y.dtype == torch.float32
    else:
        y = m(x.to(low))
        assert y.dtype == low
    # bfloat16 has 8 bits; five roundings on the way.
    assert (y.float() - want).abs().max() < 5 * 2**-8 * want.abs().max()
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_steps_are_near_the_scan(dtype):
    m, x = mixer(dtype), inputs(dtype=dtype)
    state = m.allocate_state(2)
    with torch.no_grad():
        want = m(x)
        got = torch.cat([m(x[:, t : t + 1], state=state) for t in range(LENGTH)], 1)
    assert (got - want).abs().max() <= 2**-7 * want.abs().max()


def test_module_dtype_differs_from_input_dtype():
    y = mixer(torch.bfloat16)(inputs(dtype=torch.float32))
    assert y.dtype == torch.float32


def test_forward_hooks_fire_on_every_part():
    m, fired = mixer(), []
    for name, module in m.named_modules():
        if isinstance(module, (nn.Linear, RMSNormGated)):
            module.register_forward_hook(lambda *_, name=name: fired.append(name))
    m(inputs())
    assert fired == ["in_proj", "norm", "out_proj"]
    fired.clear()
    with torch.no_grad():
        m(inputs(length=1), state=m.allocate_state(2))
    assert fired == ["in_proj", "norm", "out_proj"]


class LowRank(nn.Module):
    """A linear with a low-rank correction, as LoRA puts it in the place of a linear."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("name", ["in_proj", "out_proj"])
@pytest.mark.parametrize("length", [1, LENGTH])
def test_replaced_projection_is_used(name, length):
    m, x = mixer(), inputs(length=length)
    merged = copy.deepcopy(m)
    adapted = LowRank(getattr(m, name))
    setattr(m, name, adapted)
    with torch.no_grad():
        getattr(merged, name).weight += adapted.up @ adapted.down
        close(m(x, state=m.allocate_state(2)), merged(x))
    y = m(x)
    close(y, merged(x))
    y.square().sum().backward()
    assert adapted.down.grad.abs().sum() > 0
    assert adapted.up.grad.abs().sum() > 0


def test_deepcopy_and_pickle():
    m, x = mixer(), inputs()
    for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(copied(x), m(x))
        with torch.no_grad():
            copied.D += 1
        assert not torch.equal(copied(x), m(x))


def test_state_clone_is_independent():
    m = mixer()
    state = m.allocate_state(2)
    with torch.no_grad():
        m(inputs(), state=state)
        fork = state.clone()
        x = inputs(length=2)
        want = m(x, state=state)
        close(m(x, state=fork), want)
    assert (state.reset().key_value_memory_dict[0][1] == 0).all()
    assert fork.key_value_memory_dict[0][1].abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"rmsnorm": False, "d_ssm": 8, "dt_limit": (0.0, 0.05)}])
def test_compiles_without_a_graph_break(options):
    m = mixer(chunk_size=16, **options)
    torch._dynamo.reset()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    for length in (5, 6, 9):
        x = inputs(length=length)
        want = torch.autograd.grad(m(x).square().sum(), m.parameters())
        got = torch.autograd.grad(compiled(x).square().sum(), m.parameters())
        for a, b in zip(got, want, strict=True):
            close(a, b)
    x = inputs()
    state = m.allocate_state(2)
    with torch.no_grad():
        parts = [compiled(part, state=state) for part in x.split([4, 1, 1, 1], dim=1)]
    close(torch.cat(parts, 1), m(x))


def test_compiles_with_packing():
    m, x = mixer(chunk_size=16), inputs(1)
    ends = torch.tensor([0, 3, 7])
    torch._dynamo.reset()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    close(compiled(x, cu_seqlens=ends), m(x, cu_seqlens=ends))
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1]])
    close(compiled(x, attention_mask=mask), m(x, attention_mask=mask))


def test_export():
    m, x = mixer().eval(), inputs()
    exported = torch.export.export(m, (x,))
    close(exported.module()(x), m(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_state": 0}, "Mamba2: d_state must be positive, got 0"),
        ({"d_ssm": -4}, "Mamba2: d_ssm must be positive, got -4"),
        ({"chunk_size": 0}, "Mamba2: chunk_size must be positive, got 0"),
        ({"expand": 0}, "Mamba2: expand must be positive, got 0"),
        ({"expand": math.inf}, "Mamba2: expand must be positive, got inf"),
        ({"conv_init": -1.0}, r"Mamba2: conv_init must be positive, got -1\.0"),
        ({"dt_min": math.nan}, "Mamba2: dt_min must be positive, got nan"),
        ({"dt_min": 0.2}, r"Mamba2: dt_max must be at least dt_min = 0\.2, got 0\.1"),
        (
            {"A_init_range": (0, 16)},
            r"A_init_range must be \(low, high\) with 0 < low <= high, got \(0, 16\)",
        ),
        ({"A_init_range": [2, 1]}, r"A_init_range must be .* got \[2, 1\]"),
        ({"dt_limit": (0.2, 0.1)}, r"dt_limit must be .* low <= high, got \(0\.2, 0\.1\)"),
        ({"d_ssm": 192}, r"Mamba2: d_ssm must be at most expand \* d_model = 128, got 192"),
        (
            {"d_ssm": 72},
            r"Mamba2: d_ssm must be a multiple of headdim = 64, got 72 "
            r"\(nearest valid: d_ssm 64 or 128, headdim 36 or 72\)",
        ),
        (
            {"d_model": 48},
            r"d_ssm must be a multiple of headdim = 64, got 96 "
            r"\(nearest valid: d_model 32 or 64, headdim 48 or 96\)",
        ),
        (
            {"d_model": 16},
            r"d_ssm must be a multiple of headdim = 64, got 32 "
            r"\(nearest valid: d_model 32, headdim 32\)",
        ),
        (
            {"d_model": 1, "expand": 0.2},
            r"d_ssm must be a multiple of headdim = 64, got 0 \(nearest valid: .*\)",
        ),
        ({"ngroups": 3}, r"Mamba2: ngroups must divide d_ssm / headdim = 2 heads, got 3"),
    ],
)
def test_rejects_a_bad_argument(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Mamba2(**{"d_model": 64, **kwargs})


@pytest.mark.parametrize(
    ("kwargs", "nearest"),
    [
        ({"headdim": 10**30}, f"d_model {5 * 10**29}, headdim 128"),
        ({"headdim": 10**30, "expand": 1.3}, "headdim 83"),
        ({"headdim": 10**30, "d_ssm": 72}, "headdim 72"),
        (
            {"d_model": 10**30, "headdim": 7},
            f"d_model {10**30 - 1} or {10**30 + 6}, headdim 5 or 8",
        ),
    ],
)
def test_a_refusal_takes_no_longer_for_large_sizes(kwargs, nearest):
    """Looked for one by one, the sizes to propose would not be found before the end of the day."""
    with pytest.raises(ValueError) as error:
        Mamba2(**{"d_model": 64, **kwargs})
    assert str(error.value).endswith(f"(nearest valid: {nearest})")


@pytest.mark.parametrize("d_model", [16, 24, 48, 50, 100, 300])
def test_the_sizes_that_a_refusal_names_are_valid(d_model):
    with pytest.raises(ValueError, match="nearest valid") as error:
        Mamba2(d_model, device="meta")
    names, values = (
        str(error.value).split("nearest valid: d_model ")[1].rstrip(")").split(", headdim ")
    )
    for width in map(int, names.split(" or ")):
        Mamba2(width, device="meta")
    for headdim in map(int, values.split(" or ")):
        Mamba2(d_model, headdim=headdim, device="meta")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("headdim", 2.5, "an int"),
        ("ngroups", True, "an int"),
        ("d_ssm", "all", "an int"),
        ("expand", "two", "a number"),
        ("dt_limit", 0.1, "two numbers"),
        ("A_init_range", (1, 2, 3), "two numbers"),
    ],
)
def test_rejects_the_wrong_type(name, value, kind):
    with pytest.raises(TypeError) as error:
        Mamba2(64, **{name: value})
    assert str(error.value) == f"Mamba2: {name} must be {kind}, got {value!r}"


def test_lists_from_json_serve_as_ranges():
    m = Mamba2(32, dt_limit=[0.0, 0.1], A_init_range=[1, 2])
    assert m.dt_limit == (0.0, 0.1)


def test_rejects_bad_inputs():
    m, x = mixer(layer_idx=0), inputs()
    with pytest.raises(TypeError, match="Mamba2: got an unexpected keyword argument 'stat'"):
        m(x, stat=None)
    with pytest.raises(ValueError, match=r"hidden_states must have shape \(B, L, 8\), got \(2, 7"):
        m(x[..., :5])
    with pytest.raises(ValueError, match=r"must have shape \(B, L, 8\), got \(14, 8\)"):
        m(x.flatten(0, 1))
    for seqlen, given in ((3, x.flatten(0, 1)), (7, x)):
        with pytest.raises(ValueError, match=rf"\(B L, 8\) with L = {seqlen} if seqlen is given"):
            m(given, seqlen=seqlen)
    with pytest.raises(ValueError, match="seqlen must be positive, got 0"):
        m(x.flatten(0, 1), seqlen=0)
    with pytest.raises(TypeError, match=r"seqlen must be an int, got 7\.0"):
        m(x.flatten(0, 1), seqlen=7.0)
    with pytest.raises(ValueError, match="state must not be given beside inference_params"):
        m(x, inference_params=State(), state=State())
    with pytest.raises(ValueError, match="Mamba2: state must hold 2 rows, got 3"):
        m(x, state=m.allocate_state(3))
    with pytest.raises(ValueError, match="layer_idx must be set"):
        mixer()(x, inference_params=State())
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        m(x, attention_mask=torch.ones(2, 3))
    meta = SeqMeta(mask=torch.ones(2, LENGTH, dtype=torch.bool))
    with pytest.raises(ValueError, match="seq_meta must be the only"):
        m(x, seq_meta=meta, attention_mask=torch.ones(2, LENGTH))
    for shape in ((2, 2, 8), (2, 1, 5), (2, 8)):
        with pytest.raises(ValueError, match=r"must have shape \(B, 1, 8\) in step, got"):
            m.step(torch.zeros(shape), *m.allocate_inference_cache(2, 0))


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([1, 7], "cu_seqlens must start at 0, got 1"),
        ([0, 5, 3], "cu_seqlens must not decrease, got 5 then 3"),
        ([0, 15], r"cu_seqlens must end at or before B \* L = 14, got 15"),
        ([0, 9], "cu_seqlens must not cross a row of length 7, got sequence 0:9"),
    ],
)
def test_rejects_bad_boundaries_and_keeps_the_state(ends, message):
    m, x = mixer(), inputs()
    state = m.allocate_state(len(ends) - 1)
    for tensor in state.key_value_memory_dict[0]:
        tensor.fill_(1)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        m(x, state=state, cu_seqlens=torch.tensor(ends))
    assert all((tensor == 1).all() for tensor in state.key_value_memory_dict[0])


def test_rejects_ids_that_disagree_with_the_boundaries():
    m, x = mixer(), inputs(1, 4)
    ids = torch.tensor([[0, 0, 0, 1]])
    with pytest.raises(ValueError, match="seq_idx must agree with cu_seqlens"):
        m(x, seq_idx=ids, cu_seqlens=torch.tensor([0, 2, 4]))


def test_rejects_the_state_of_another_layer_untouched():
    m = mixer(layer_idx=0)
    # As many channels in the convolution, but other heads.
    other = mixer(layer_idx=0, headdim=8).allocate_state(2)
    for tensor in other.key_value_memory_dict[0]:
        tensor.fill_(1)
    wanted, got = r"\(2, 26, 4\), \(2, 4, 4, 5\)", r"\(2, 26, 4\), \(2, 2, 8, 5\)"
    message = f"Mamba2: state must have shapes {wanted}, got {got}"
    with torch.no_grad():
        for arguments in ({"state": other}, {"inference_params": other}):
            with pytest.raises(ValueError, match=message):
                m(inputs(length=1), **arguments)
        with pytest.raises(ValueError, match=message):
            m.step(inputs(length=1), *other.key_value_memory_dict[0])
    assert all((tensor == 1).all() for tensor in other.key_value_memory_dict[0])
