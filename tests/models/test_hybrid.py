"""Hybrid language models: blocks of a recurrence and blocks of attention behind one state.

Judge: the same model over each text alone and whole; each row decoded alone without a state.
"""

import copy
import itertools
import pickle

import pytest
import torch

from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.modules.attention import MHA
from ssm.state import State
from tests.tolerances import TOLERANCES, assert_close

VOCAB, LENGTH = 13, 6
ATTENTION = {"num_heads": 4, "num_heads_kv": 2, "head_dim": 6, "rotary_emb_dim": 4, "d_conv": 3}
MAMBA2 = {"layer": "Mamba2", "d_state": 3, "headdim": 4}
KINDS = {
    "mamba1": {"ssm_cfg": {"d_state": 3}},
    "mamba2": {"ssm_cfg": MAMBA2, "d_intermediate": 4},
    "attention_first": {"ssm_cfg": MAMBA2, "attn_layer_idx": [0, 2], "attn_cfg": {"num_heads": 2}},
    "attention_only": {"attn_layer_idx": [0, 1, 2], "d_intermediate": 4, "rms_norm": False},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def model(kind="mamba2", dtype=torch.float64, sharp=False, **kwargs) -> MambaLMHeadModel:
    settings = {"d_model": 8, "n_layer": 3, "vocab_size": VOCAB, "attn_layer_idx": [1]}
    settings = {**settings, "attn_cfg": ATTENTION, **KINDS[kind], **kwargs}
    if not sharp:
        return MambaLMHeadModel(MambaConfig(**settings), dtype=dtype)
    config = MambaConfig(**settings, tie_embeddings=False)
    m = MambaLMHeadModel(config, {"initializer_range": 1.0}, dtype=dtype)
    with torch.no_grad():
        m.lm_head.weight *= 8
        # Attention that hardly depends on the past would hide what a cache gets wrong.
        for layer in m.backbone.layers:
            if isinstance(layer.mixer, MHA):
                layer.mixer.in_proj.weight *= 2
                layer.mixer.out_proj.weight *= 8
    return m


def tokens(batch=2, length=LENGTH):
    return torch.randint(0, VOCAB, (batch, length))


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@each_kind
@pytest.mark.parametrize("with_grad", [False, True])
def test_chunked_equals_whole(kind, with_grad):
    m, ids = model(kind, sharp=True), tokens()
    want = m(ids).logits
    with torch.set_grad_enabled(with_grad):
        for cut in range(LENGTH + 1):
            state = m.allocate_state(2)
            parts = [m(part, state=state).logits for part in ids.split([cut, LENGTH - cut], 1)]
            close(torch.cat(parts, 1), want)
            assert state.seqlen_offset == LENGTH


@each_kind
@pytest.mark.parametrize("limit", [None, LENGTH])
def test_step_equals_whole(kind, limit):
    m, ids = model(kind, sharp=True), tokens()
    state = m.allocate_state(2, max_seqlen=limit)
    with torch.no_grad():
        parts = [m(ids[:, t : t + 1], state=state).logits for t in range(LENGTH)]
    close(torch.cat(parts, 1), m(ids).logits)


@each_kind
def test_packed_equals_separate(kind):
    m, ids = model(kind, sharp=True), tokens(1, 6)
    alone = torch.cat([m(part).logits for part in ids.split([1, 3, 2], dim=1)], 1)
    close(m(ids, cu_seqlens=torch.tensor([0, 1, 4, 6])).logits, alone)
    close(m(ids, seq_idx=torch.tensor([[0, 1, 1, 1, 2, 2]])).logits, alone)


@each_kind
@pytest.mark.parametrize("with_grad", [False, True])
def test_cu_seqlens_continue_a_state_each(kind, with_grad):
    m, ids = model(kind, sharp=True), tokens(2, 6)
    state, ends = m.allocate_state(3), torch.tensor([0, 2, 6, 12])
    with torch.set_grad_enabled(with_grad):
        twice = [m(ids, state=state, cu_seqlens=ends).logits for _ in range(2)]
        for begin, end in itertools.pairwise(ends.tolist()):
            text = ids.flatten()[begin:end].repeat(2)[None]
            want = m(text).logits[0].split(end - begin)
            for got, part in zip(twice, want, strict=True):
                close(got.flatten(0, 1)[begin:end], part)


@each_kind
@pytest.mark.parametrize("mask", ["001111", "111100", "101101"])
def test_padding_content_does_not_matter(kind, mask):
    m, ids, more = model(kind, sharp=True), tokens(), tokens(2, 3)
    keep = torch.tensor([[c == "1" for c in mask], [True] * LENGTH])
    with torch.no_grad():
        m.backbone.embedding.weight[VOCAB] = torch.nan
    ids[~keep] = VOCAB
    state = m.allocate_state(2)
    logits = m(ids, attention_mask=keep, state=state).logits
    after = m(more, state=state).logits
    for row in range(2):
        alone = m(torch.cat([ids[row, keep[row]], more[row]])[None]).logits[0]
        close(torch.cat([logits[row, keep[row]], after[row]]), alone)
    (logits[keep].square().sum() + after.square().sum()).backward()
    for name, parameter in m.named_parameters():
        if name != "backbone.embedding.weight":
            assert parameter.grad.isfinite().all(), name


def test_inference_params_of_mamba_ssm():
    m, ids = model(sharp=True), tokens()
    want = m(ids).logits
    for params in (State(max_batch_size=2), State(max_batch_size=2, max_seqlen=LENGTH)):
        with torch.no_grad():
            for _ in range(2):
                params.seqlen_offset = 0
                parts = [m(ids[:, :3], inference_params=params, num_last_tokens=1).logits]
                params.seqlen_offset += 3
                for t in range(3, LENGTH):
                    parts.append(m(ids[:, t : t + 1], inference_params=params).logits)
                    params.seqlen_offset += 1
        close(torch.cat(parts, 1), want[:, 2:])
        assert sorted(params.key_value_memory_dict) == [0, 1, 2]
    cache = m.allocate_inference_cache(2, 9)
    assert [tuple(t.shape) for t in cache[1]] == [(2, 9, 2, 2, 6), (2, 48, 3), (2,)]
    assert cache[1][0].dtype == torch.float64


@pytest.mark.parametrize("limit", [None, LENGTH])
def test_truncated_backpropagation_equals_the_whole_when_not_truncated(limit):
    m, ids = model(), tokens()
    want = torch.autograd.grad(m(ids).logits.square().sum(), m.parameters())
    for lengths in ([2, 2, 2], [1] * LENGTH, [5, 1]):
        state, loss = m.allocate_state(2, max_seqlen=limit), 0
        for part in ids.split(lengths, dim=1):
            loss = loss + m(part, state=state).logits.square().sum()
        for a, b in zip(torch.autograd.grad(loss, m.parameters()), want, strict=True):
            close(a, b)


def test_truncated_backpropagation_stops_at_a_detached_state():
    m, ids = model(), tokens()
    state = m.allocate_state(2)
    want = m(ids).logits[:, 3:]
    m(ids[:, :3], state=state)
    state.detach()
    assert not any(t.requires_grad for s in state.key_value_memory_dict.values() for t in s)
    logits = m(ids[:, 3:], state=state).logits
    close(logits, want)
    got = torch.autograd.grad(logits.square().sum(), m.backbone.layers[1].mixer.in_proj.weight)
    whole = torch.autograd.grad(want.square().sum(), m.backbone.layers[1].mixer.in_proj.weight)
    assert got[0].abs().sum() > 0
    assert not torch.allclose(got[0], whole[0])


def test_position_ids_reach_the_attention():
    m, ids = model(sharp=True), tokens()
    positions = torch.arange(LENGTH).expand(2, -1)
    close(m(ids, positions).logits, m(ids).logits)
    close(m(ids, positions + 5).logits, m(ids).logits, 1e-8)
    assert not torch.allclose(m(ids, positions * 3).logits, m(ids).logits)
    with pytest.raises(ValueError, match=r"position_ids must have shape \(B, L\) = \(2, 6\), got"):
        m(ids, position_ids=torch.arange(LENGTH))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("lengths_per_sample", torch.tensor([5, -1]), ValueError),
        ("lengths_per_sample", torch.tensor([5, 5, 5]), ValueError),
        ("lengths_per_sample", [5, 5], TypeError),
        ("position_ids", torch.zeros(2, 1, device="meta", dtype=torch.int64), ValueError),
    ],
)
def test_a_refused_call_leaves_the_layers_before_the_attention_alone(name, value, error):
    m, ids = model(), tokens()
    state, given = m.allocate_state(2), {}
    with torch.no_grad():
        m(ids, state=state)
        before = state.clone()
        if name == "position_ids":
            given[name] = value
        else:
            state.lengths_per_sample = value
        with pytest.raises(error, match=name):
            m(ids[:, :1], inference_params=state, **given)
    for layer, tensors in state.key_value_memory_dict.items():
        for got, want in zip(tensors, before.key_value_memory_dict[layer], strict=True):
            assert torch.equal(got, want)


def test_a_model_without_mixers_checks_its_arguments():
    m = MambaLMHeadModel(MambaConfig(d_model=8, n_layer=0, vocab_size=VOCAB))
    ids = tokens()
    assert m(ids, state=m.allocate_state(2)).logits.shape[:2] == ids.shape
    for given, error in (
        ({"state": "x"}, TypeError),
        ({"state": m.allocate_state(5)}, ValueError),
        ({"inference_params": 3}, TypeError),
        ({"nonsense": 1}, TypeError),
    ):
        with pytest.raises(error, match=r"^MambaLMHeadModel: "):
            m(ids, **given)


def test_num_last_tokens():
    m, ids = model(), tokens()
    state = m.allocate_state(2)
    close(m(ids, num_last_tokens=2, state=state).logits, m(ids).logits[:, -2:])


def test_gradient_checkpointing_changes_nothing_but_memory():
    m, ids = model(), tokens()
    keep = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    want = torch.autograd.grad(m(ids, attention_mask=keep).logits.square().sum(), m.parameters())
    calls = []
    m.backbone.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    m.gradient_checkpointing_enable()
    got = torch.autograd.grad(m(ids, attention_mask=keep).logits.square().sum(), m.parameters())
    assert len(calls) == 2
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_keys_are_those_of_state_spaces():
    """A block of mamba2attn and one of transformerpp."""
    keys = ("norm.weight", "mixer.in_proj.weight", "mixer.out_proj.weight")
    conv = ("mixer.conv1d.weight", "mixer.conv1d.bias")
    attention = {**ATTENTION, "qkv_proj_bias": False, "out_proj_bias": False}
    names = {n for n in model(attn_cfg=attention, d_intermediate=0).state_dict() if ".1." in n}
    assert names == {f"backbone.layers.1.{key}" for key in (*keys, *conv)}
    attention = {"num_heads": 2, "causal": True, "qkv_proj_bias": False, "out_proj_bias": False}
    names = set(model(attn_cfg=attention, attn_layer_idx=[0, 1, 2], d_intermediate=4).state_dict())
    mlp = ("norm2.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    layers = {f"backbone.layers.{i}.{key}" for i in range(3) for key in (*keys, *mlp)}
    assert names == layers | {
        *("backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight")
    }


@each_kind
def test_save_and_load(kind, tmp_path):
    m, ids = model(kind), tokens()
    m.save_pretrained(tmp_path)
    again = MambaLMHeadModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config == m.config
    assert torch.equal(again(ids).logits, m.eval()(ids).logits)


def test_initial_values():
    m = model(d_model=32, dtype=torch.float32, d_intermediate=0)
    mixer = m.backbone.layers[1].mixer
    assert (mixer.in_proj.bias == 0).all()
    assert (mixer.out_proj.bias == 0).all()
    # kaiming_uniform(a=sqrt 5) is uniform within 1 / sqrt(fan_in); 3 residual branches.
    assert 0.4 < mixer.out_proj.weight.abs().max() * 24**0.5 * 3**0.5 <= 1


@each_kind
def test_every_parameter_learns(kind):
    m = model(kind, tie_embeddings=False)
    m(tokens(2, 8)).logits.square().sum().backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_low_precision_is_near_float64(kind):
    m, ids = model(kind, torch.bfloat16), tokens()
    exact = model(kind)
    exact.load_state_dict(m.state_dict())
    want = exact(ids).logits
    state = m.allocate_state(2)
    with torch.no_grad():
        parts = [m(part, state=state).logits for part in ids.split([3, 1, 2], dim=1)]
    assert state.key_value_memory_dict[1][0].dtype == torch.bfloat16
    # bfloat16 has 8 bits; about ten roundings on the way.
    for logits in (m(ids).logits, torch.cat(parts, 1)):
        assert logits.dtype == torch.bfloat16
        assert (logits - want).abs().max() < 10 * 2**-8 * want.abs().max()
    wide = copy.deepcopy(m).float()
    with torch.autocast("cpu", torch.bfloat16):
        state = wide.allocate_state(2)
        parts = [wide(part, state=state).logits for part in ids.split([3, 1, 2], dim=1)]
    assert (torch.cat(parts, 1) - want).abs().max() < 10 * 2**-8 * want.abs().max()


@pytest.mark.parametrize("limit", [None, 8])
def test_compiles_without_a_graph_break(limit):
    m, ids = model("mamba1", n_layer=2), tokens()
    torch.compiler.reset()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    state = m.allocate_state(2, max_seqlen=limit)
    with torch.no_grad():
        parts = [compiled(part, state=state).logits for part in ids.split([4, 1, 1], dim=1)]
    close(torch.cat(parts, 1), m(ids).logits)
    if limit is None:
        close(compiled(ids).logits, m(ids).logits)


def test_exports_with_any_length():
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model()

        def forward(self, ids):
            return self.model(ids).logits

    m = Logits().eval()
    dynamic = {"ids": {1: torch.export.Dim("seqlen", min=2, max=64)}}
    program = torch.export.export(m, (tokens(),), dynamic_shapes=dynamic).module()
    for length in (LENGTH, 11):
        ids = tokens(2, length)
        close(program(ids), m(ids))


class Wrapped(torch.nn.Module):
    """A linear behind another module, which has no weight of its own."""

    def __init__(self, linear):
        super().__init__()
        self.base = linear

    def forward(self, x):
        return self.base(x)


class Integers(torch.nn.Module):
    """A linear whose weight is held as int8 with a scale per row."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


class Hidden(torch.nn.Module):
    """A linear that shows no parameter, and whose weight is a method, as torch quantises it."""

    def __init__(self, linear):
        super().__init__()
        self.held = [linear]

    def forward(self, x):
        return self.held[0](x)

    def weight(self):
        return self.held[0].weight


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Wrapped, "float64"), (Integers, "float64"), (Hidden, "float32")]
)
def test_decodes_with_replaced_projections(kind, dtype):
    m, ids = model(dtype=getattr(torch, dtype), attn_cfg={"num_heads": 2}).eval(), tokens()
    for module in list(m.backbone.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(module, name, kind(child))
    state = m.allocate_state(2)
    with torch.no_grad():
        parts = [m(part, state=state).logits for part in ids.split([3, 1, 2], dim=1)]
        assert_close("logits", torch.cat(parts, 1), m(ids).logits, TOLERANCES["matrix", dtype])
    assert state.key_value_memory_dict[1][0].dtype == getattr(torch, dtype)


def test_deepcopy_and_pickle():
    m, ids = model(), tokens()
    for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(copied(ids).logits, m(ids).logits)


def test_a_full_state_is_refused_before_any_layer_moves():
    m, ids = model(), tokens()
    state = m.allocate_state(2, max_seqlen=8)
    keep = torch.ones(2, LENGTH)
    keep[0, :3] = 0
    with torch.no_grad():
        m(ids, state=state, attention_mask=keep)
        before = state.clone()
        for run in (
            lambda: m(ids[:, :3], state=state),
            lambda: m(ids, state=state, attention_mask=keep),
            lambda: m.verify(ids, state),
        ):
            with pytest.raises(ValueError, match=r"MHA: state must have room for \d+ tokens per"):
                run()
        for layer, states in state.key_value_memory_dict.items():
            for a, b in zip(states, before.key_value_memory_dict[layer], strict=True):
                assert torch.equal(a, b)
        assert state.seqlen_offset == LENGTH
        # Six columns were padded to; only tokens need room.
        m(ids[:, :3], state=state, attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]]))
        params = State(max_batch_size=2, max_seqlen=5)
        with pytest.raises(ValueError, match="MHA: state must have room for 6 tokens per row, got"):
            m(ids, inference_params=params)
        assert not params.key_value_memory_dict
        # From offset 0 on nothing is held, whatever lies in the memory.
        fits = {"inference_params": params, "attention_mask": keep}
        keep[1, 0] = 0
        want = m(ids, **fits).logits
        close(m(ids, **fits).logits, want)
        # And each sequence of cu_seqlens has room of its own.
        packed = m.allocate_state(2, max_seqlen=4)
        ends = torch.tensor([0, 2, 6])
        m(ids[:1], state=packed, cu_seqlens=ends)
        with pytest.raises(ValueError, match="MHA: state must have room for 8 tokens per row, got"):
            m(ids[:1], state=packed, cu_seqlens=ends)
        params = State(max_batch_size=2, max_seqlen=4)
        with pytest.raises(ValueError, match="MHA: state must have room for 5 tokens per row, got"):
            m(ids[:1], inference_params=params, cu_seqlens=torch.tensor([0, 1, 6]))
        assert not params.key_value_memory_dict


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attn_cfg": {}}, r"attn_cfg must hold 'num_heads', got \['causal'\]"),
        ({"attn_cfg": {"num_head": 2}}, "attn_cfg must hold arguments of MHA, got 'num_head' .did"),
        ({"attn_cfg": {"num_heads": 2, "layer_idx": 1}}, "arguments of MHA, got 'layer_idx'"),
        ({"attn_cfg": {"num_heads": 2, "embed_dim": 8}}, "arguments of MHA, got 'embed_dim'"),
        ({"attn_cfg": {"num_heads": 2, "causal": False}}, r"\['causal'\] must be True, got False"),
        ({"attn_cfg": {"num_heads": 3}}, "num_heads must divide embed_dim = 8 without head_dim"),
        ({"attn_layer_idx": [3]}, "attn_layer_idx must be below 3, got 3"),
    ],
)
def test_rejects_a_config_it_cannot_build(config, message):
    with pytest.raises(ValueError, match=message):
        model(**config)


@torch.no_grad()
def greedy(m, row, steps):
    """Decode one row without any state: tokens, and the logits of every step."""
    row, logits = row.tolist(), []
    for _ in range(steps):
        logits.append(m(torch.tensor([row])).logits[0, -1, :VOCAB])
        row.append(int(logits[-1].argmax()))
    return row, torch.stack(logits)


ROWS = [[1], [2, 3, 4], [5, 6, 7, 8, 9]]


def ragged(side):
    ids, mask = torch.full((3, 5), 10), torch.zeros(3, 5, dtype=torch.long)
    for i, row in enumerate(ROWS):
        pad = 5 - len(row)
        start = {"left": pad, "right": 0, "both": pad // 2}[side]
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    return ids, mask


@torch.no_grad()
def step_logits(m, ids, mask, steps):
    """The logits that batched generation sees, in the dtype of the model."""
    from ssm.utils.generation import _pad_left

    (ids, mask), state, found = _pad_left(ids, mask), m.allocate_state(len(ids)), []
    for _ in range(steps):
        found.append(m(ids, state=state, attention_mask=mask).logits[:, -1, :VOCAB])
        ids, mask = found[-1].argmax(-1, keepdim=True), None
    return torch.stack(found, 1)


@each_kind
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_ragged_prompts_equal_row_by_row(kind, side):
    m, (ids, mask) = model(kind, sharp=True), ragged(side)
    got = m.generate(ids, max_new_tokens=6, attention_mask=mask)
    assert torch.equal(got[:, :5], ids)
    logits = step_logits(m, ids, mask, 6)
    for i, row in enumerate(ROWS):
        want, want_logits = greedy(m, torch.tensor(row), 6)
        assert got[i, 5:].tolist() == want[len(row) :]
        close(logits[i], want_logits)
    assert len({tuple(row) for row in got[:, 5:].tolist()}) > 1


@each_kind
def test_ragged_prompts_equal_row_by_row_in_float32(kind):
    m, (ids, mask) = model(kind, torch.float32, sharp=True), ragged("left")
    tolerance = TOLERANCES["matrix", "float32"]  # of the largest logit
    got = m.generate(ids, max_new_tokens=6, attention_mask=mask)
    logits = step_logits(m, ids, mask, 6)
    for i, row in enumerate(ROWS):
        want, want_logits = greedy(m, torch.tensor(row), 6)
        assert got[i, 5:].tolist() == want[len(row) :]
        scale = want_logits.abs().max()
        assert_close(f"logits of row {i}", logits[i] / scale, want_logits / scale, tolerance)


@each_kind
def test_finished_rows_emit_pad_and_all_finished_stops(kind):
    m, (ids, mask) = model(kind, sharp=True), ragged("right")
    free = m.generate(ids, max_new_tokens=9, attention_mask=mask)[:, 5:].tolist()
    eos = [free[0][1], free[1][4]]
    got = m.generate(ids, max_new_tokens=9, attention_mask=mask, eos_token_id=eos, pad_token_id=0)[
        :, 5:
    ].tolist()
    ends = [next((t for t, x in enumerate(row) if x in eos), 8) for row in free]
    for row, whole, end in zip(got, free, ends, strict=True):
        assert row == whole[: end + 1] + [0] * (max(ends) - end)
    limited = m.generate(ids, max_length=8, attention_mask=mask)
    assert limited[:, 5:].tolist() == [row[:3] for row in free]


def test_a_state_is_continued_and_its_limit_checked_before_anything_runs():
    m, ids = model(sharp=True), tokens(2, 4)
    want = m.generate(ids, max_new_tokens=6)
    for limit in (None, 9):
        state = m.allocate_state(2, max_seqlen=limit)
        first = m.generate(ids, max_new_tokens=3, state=state)
        with torch.no_grad():
            before = state.clone()
        if limit:
            with pytest.raises(ValueError, match="generate: state must have room for 10 tokens"):
                m.generate(first[:, -1:], max_new_tokens=4, state=state)
            with pytest.raises(ValueError, match="generate: state must have room for 10 tokens"):
                m.stream(first[:, -1:], max_new_tokens=4, state=state)
        assert state.seqlen_offset == before.seqlen_offset == 6
        second = m.generate(first[:, -1:], max_new_tokens=3, state=state)
        assert torch.equal(torch.cat([first, second[:, 1:]], 1), want)
        assert state.key_value_memory_dict[1][-1].tolist() == [9, 9]


def test_generation_needs_the_room_of_the_longest_row():
    m, ids = model(sharp=True), tokens(2, 4)
    mask = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]]).bool()
    state = m.allocate_state(2, max_seqlen=7)
    with pytest.raises(ValueError, match="generate: state must have room for 8 tokens"):
        m.stream(ids, max_new_tokens=6, state=state, attention_mask=mask)
    # The last of the new tokens is not fed, and padding needs no room.
    m.generate(ids, max_new_tokens=3, state=state, attention_mask=mask)
    assert state.key_value_memory_dict[1][-1].tolist() == [3, 5]
    # 3 + 3 + 1 and 5 + 1 + 1 tokens: the row that holds most is not the one that is fed most.
    m.generate(ids, max_new_tokens=2, state=state, attention_mask=mask.flip(0))
    assert state.key_value_memory_dict[1][-1].tolist() == [7, 7]


def test_sampling_is_the_same_in_a_batch_of_equal_rows():
    m, ids = model(sharp=True), tokens(1, 4)
    settings = {"max_new_tokens": 5, "top_k": 0, "temperature": 2.0, "seed": 3}
    one = m.generate(ids, **settings)
    assert torch.equal(m.generate(ids, **settings, state=m.allocate_state(1, max_seqlen=8)), one)
    assert torch.equal(torch.stack(list(m.stream(ids, **settings)), 1), one[:, 4:])


def test_a_draft_is_verified_and_partly_kept():
    m, ids = model(sharp=True), tokens(3, 4)
    draft = tokens(3, 4)
    state = m.allocate_state(3)
    with torch.no_grad():
        m(ids, state=state)
        verification = m.verify(draft, state)
        verification.keep(torch.tensor([0, 2, 4]))
        more = tokens(3, 2)
        logits = m(more, state=state).logits
        for row, kept in enumerate((0, 2, 4)):
            text = torch.cat([ids[row], draft[row, :kept], more[row]])[None]
            close(logits[row], m(text).logits[0, -2:])
