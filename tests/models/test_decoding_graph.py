"""Decoding with graphs, on the CPU: what a graph does is played by tests/recorded_graph.py.

Judge: the same call without graphs, bit for bit.
"""

import contextlib
import copy
import gc
import inspect
import weakref

import pytest
import torch

from ssm.models.config import MambaConfig
from ssm.models.lm import CausalLMOutput, MambaLMHeadModel
from ssm.state import CACHE_AXES, State
from ssm.utils import decoding_graph, dispatch
from ssm.utils.decoding_graph import record_cuda, release, why_not
from tests.recorded_graph import Recorder

VOCAB = 11
ATTENTION = {"num_heads": 2, "head_dim": 4}
CONFIGS = {
    "mamba1": {},
    "mamba1_norms": {"ssm_cfg": {"bcdt_norm": "weightless"}, "d_intermediate": 16},
    "mamba2": {"ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 4}},
    "mamba2_no_norm": {
        "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 4, "rmsnorm": False}
    },
}


def make(name="mamba1", dtype=torch.float32, **options):
    config = MambaConfig(8, n_layer=2, vocab_size=VOCAB, **{**CONFIGS[name], **options})
    return MambaLMHeadModel(config, {"initializer_range": 1.0}, dtype=dtype).eval()


def prompts(batch=3, length=4):
    return torch.randint(0, VOCAB, (batch, length))


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(decoding_graph.RECORDERS, "cpu", recorder)
    return recorder


def bits(tensors):
    return [t.contiguous().view(torch.uint8).tolist() for t in tensors]


def outcome(model, ids, **options):
    """Return everything that a call gives and leaves: tokens, logits and state, as bits."""
    state = options.pop("state", None) or model.allocate_state(len(ids))
    options = {"max_new_tokens": 7, **options}
    found = model.generate(
        ids, state=state, return_dict_in_generate=True, output_scores=True, **options
    )
    held = [t for tensors in state.key_value_memory_dict.values() for t in tensors]
    return found.sequences.tolist(), bits(found.scores), bits(held), state.seqlen_offset


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_same_bits_as_without(recorder, name, dtype):
    model, ids = make(name, dtype), prompts()
    want = outcome(model, ids)
    assert recorder.replays == []
    assert outcome(model, ids, cg=True) == want
    assert recorder.replays == [6]  # the first of 7 tokens comes from the prompt


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0, "temperature": 3.0, "seed": 5},
        {"eos_token_id": [1, 2, 3], "pad_token_id": 0},
        {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 1]])},
        {"repetition_penalty": 2.0},
        {"teacher_outputs": torch.arange(24).reshape(3, 8) % VOCAB},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_do_the_same(recorder, options):
    model, ids = make(), prompts()
    assert outcome(model, ids, **options, cg=True) == outcome(model, ids, **options)
    assert len(recorder.replays) == 1


def test_one_graph_serves_call_after_call(recorder):
    model, ids = make(), prompts()
    others = [prompts(length=2), prompts(length=9)]
    for each in (ids, *others, ids):
        assert outcome(model, each, cg=True) == outcome(model, each)
    assert recorder.replays == [24]


def test_other_batch_size_gets_another_graph(recorder):
    model = make()
    for batch in (3, 1, 5, 1):
        ids = prompts(batch)
        assert outcome(model, ids, cg=True) == outcome(model, ids)
    assert recorder.replays == [6, 6, 6, 6]


@pytest.mark.parametrize("steps", [0, 1])
def test_nothing_is_captured_for_less_than_two_tokens(recorder, steps):
    model, ids = make(), prompts()
    assert model.generate(ids, max_new_tokens=steps, cg=True).shape == (3, 4 + steps)
    assert model.generate(ids[:0], max_new_tokens=3, cg=True).shape == (0, 7)
    assert recorder.replays == []


def test_state_keeps_its_tensors_and_is_continued(recorder):
    model, ids = make("mamba2"), prompts()
    want = outcome(model, ids, max_new_tokens=6)
    state = model.allocate_state(3)
    before = dict(state.key_value_memory_dict)
    first = model.generate(ids, max_new_tokens=3, state=state, cg=True)
    assert all(state.key_value_memory_dict[layer] is held for layer, held in before.items())
    model.generate(prompts(), max_new_tokens=5, cg=True)  # the graph moves on to another text
    second = model.generate(first[:, -1:], max_new_tokens=3, state=state, cg=True)
    assert torch.cat([first, second[:, 1:]], 1).tolist() == want[0]
    held = [t for tensors in state.key_value_memory_dict.values() for t in tensors]
    assert (bits(held), state.seqlen_offset) == want[2:]


def test_state_can_be_read_and_replaced_between_tokens(recorder):
    model, ids = make(), prompts()
    seen = {}
    for graphs in (False, True):
        state, other = model.allocate_state(3), model.allocate_state(3)
        with torch.no_grad():
            model(prompts(3, 1) * 0 + 4, state=other)
        seen[graphs] = []
        for i, tokens in enumerate(model.stream(ids, max_new_tokens=9, state=state, cg=graphs)):
            held = state.clone().key_value_memory_dict.values()
            seen[graphs].append((tokens.tolist(), bits(t for each in held for t in each)))
            if i == 2:
                state.update([1], other.gather([0]))
            elif i == 4:
                state.key_value_memory_dict[1] = other.clone().key_value_memory_dict[1]
            elif i == 6:
                state.key_value_memory_dict.update(other.clone().key_value_memory_dict)
        seen[graphs].append(state.seqlen_offset)
    assert seen[True] == seen[False]
    assert len(recorder.replays) == 1


def test_calls_at_the_same_time_do_not_meet(recorder):
    model = make()
    texts = [prompts(), prompts()]
    wants = [model.generate(ids, max_new_tokens=6, cg=True)[:, 4:] for ids in texts]
    streams = [model.stream(ids, max_new_tokens=6, cg=True) for ids in texts]
    both = list(zip(*streams, strict=True))
    for got, want in zip(zip(*both, strict=True), wants, strict=True):
        assert torch.equal(torch.stack(got, 1), want)
    assert recorder.replays == [15, 5]  # the second one had to get a graph of its own


def test_abandoned_stream_gives_back_state_and_graph(recorder):
    model, ids = make(), prompts()
    state = model.allocate_state(3)
    own = dict(state.key_value_memory_dict)
    stream = model.stream(ids, max_new_tokens=9, state=state, cg=True)
    tokens = [next(stream) for _ in range(4)]
    stream.close()
    assert all(state.key_value_memory_dict[layer] is held for layer, held in own.items())
    rest = model.generate(tokens[-1][:, None], max_new_tokens=2, state=state, cg=True)
    want = model.generate(ids, max_new_tokens=6)
    assert torch.equal(torch.cat([torch.stack(tokens, 1), rest[:, 1:]], 1), want[:, 4:])
    assert len(recorder.replays) == 1


def test_weights_changed_in_place_are_followed(recorder):
    model, ids, other = make(), prompts(), make().state_dict()
    before = outcome(model, ids, cg=True)
    model.load_state_dict(other)
    assert outcome(model, ids, cg=True) == outcome(model, ids) != before
    assert len(recorder.replays) == 1


def replace_a_weight(model):
    mixer = model.backbone.layers[1].mixer
    mixer.out_proj.weight = torch.nn.Parameter(mixer.out_proj.weight.detach() * -2)


def put_other_weights(model):
    model.load_state_dict(make().state_dict(), assign=True)
    model.tie_weights()


@pytest.mark.parametrize(
    "change",
    [replace_a_weight, put_other_weights, torch.nn.Module.double, torch.nn.Module.bfloat16],
)
def test_other_weights_get_another_graph(recorder, change):
    model, ids = make(), prompts()
    outcome(model, ids, cg=True)
    change(model)
    gc.collect()
    assert outcome(model, ids, cg=True) == outcome(model, ids)
    assert recorder.replays == [6, 6]


def test_settings_of_the_caller_are_those_of_the_graph(recorder):
    model, ids = make(), prompts()
    plain = outcome(model, ids, cg=True)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = outcome(model, ids, cg=True)
        assert narrow == outcome(model, ids) != plain
    with dispatch.use_backend("python"):
        assert outcome(model, ids, cg=True) == outcome(model, ids)
    with torch.inference_mode():
        assert outcome(model, ids, cg=True) == plain
    assert outcome(model, ids, cg=True) == plain
    # The float32 graph gave way to others twice: to bfloat16 and to the reference.
    assert recorder.replays == [6, 6, 6, 12]


def test_graph_ends_with_its_model_or_when_released(recorder):
    model, ids = make(), prompts()
    model.generate(ids, max_new_tokens=3, cg=True)
    first = weakref.ref(decoding_graph._kept[model][1])
    release(model)
    release(model)
    gc.collect()
    assert first() is None
    model.generate(ids, max_new_tokens=3, cg=True)
    second = weakref.ref(decoding_graph._kept[model][1])
    del model
    gc.collect()
    assert second() is None


def test_model_can_be_copied_after_decoding(recorder):
    model, ids = make(), prompts()
    want = outcome(model, ids, cg=True)
    twin = copy.deepcopy(model)
    assert outcome(twin, ids, cg=True) == want
    assert len(recorder.replays) == 2


HYBRIDS = {
    "rotary": {"attn_layer_idx": [1], "attn_cfg": {**ATTENTION, "rotary_emb_dim": 4}},
    "conv": {"attn_layer_idx": [0], "attn_cfg": {**ATTENTION, "num_heads_kv": 1, "d_conv": 3}},
    "alone": {"attn_layer_idx": [0, 1], "attn_cfg": {**ATTENTION, "mlp_dim": 8}},
}


@pytest.fixture
def small_rooms(monkeypatch):
    monkeypatch.setattr(decoding_graph, "LEAST_ROOM", 4)


def close(model, ids, limit=None, **options):
    """Generate with graphs and without; return both states, having compared what came out."""
    states = [model.allocate_state(len(ids), max_seqlen=limit) for _ in range(2)]
    found = []
    for graphs, state in enumerate(states):
        found.append(
            model.generate(
                ids,
                state=state,
                cg=bool(graphs),
                return_dict_in_generate=True,
                output_scores=True,
                **{"max_new_tokens": 7, **options},
            )
        )
    assert torch.equal(found[0].sequences, found[1].sequences)
    # Attention sums in another order, and where there is nothing it adds zeros.
    torch.testing.assert_close(found[1].scores, found[0].scores, rtol=1e-12, atol=1e-12)
    assert_same_state(*states)
    return states


def assert_same_state(plain, graphed):
    assert plain.seqlen_offset == graphed.seqlen_offset
    for layer, held in plain.key_value_memory_dict.items():
        lengths = held[-1] if held[-1].dim() == 1 else None
        for want, got in zip(held, graphed.key_value_memory_dict[layer], strict=True):
            if want.dim() == CACHE_AXES:
                inside = torch.arange(lengths.max()) < lengths[:, None]
                want, got = (t[:, : lengths.max()][inside] for t in (want, got))
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", HYBRIDS)
def test_attention_decodes_in_rooms_that_double(recorder, small_rooms, name):
    model = make(dtype=torch.float64, **HYBRIDS[name])
    close(model, prompts(length=2), max_new_tokens=20)  # tokens 2 to 20 are fed
    assert recorder.replays == [2, 4, 8, 5]  # in rooms of 4, 8, 16 and 32
    close(model, prompts(length=17), max_new_tokens=3)
    assert recorder.replays == [2, 4, 8, 7]


def test_attention_decodes_ragged_prompts(recorder, small_rooms):
    model = make(dtype=torch.float64, **HYBRIDS["rotary"])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 0, 0, 1]])
    _, state = close(model, prompts(), attention_mask=mask)
    assert state.key_value_memory_dict[1][-1].tolist() == [8, 9, 8]
    assert recorder.replays == [4, 2]


def test_room_ends_at_the_limit_of_a_state(recorder, small_rooms):
    model = make(dtype=torch.float64, **HYBRIDS["rotary"])
    _, state = close(model, prompts(), limit=10)
    assert state.key_value_memory_dict[1][0].shape[1] == 10
    assert recorder.replays == [4, 2]
    assert decoding_graph._kept[model][1].room == 10
    assert "is full" in why_not(model, state)
    assert why_not(model, model.allocate_state(3, max_seqlen=10)) is None


def test_what_another_text_left_in_a_cache_is_not_heard(recorder):
    model = make(dtype=torch.float64, **HYBRIDS["rotary"])
    model.generate(prompts(length=9), max_new_tokens=4, cg=True)
    for tensor in decoding_graph._kept[model][1].layers[1][:-1]:
        tensor.fill_(float("nan"))
    close(model, prompts(length=2))
    assert len(recorder.replays) == 1


@pytest.mark.parametrize(
    ("length", "limit", "replays"),
    [(7, 8, [3, 5]), (7, None, [3, 5]), (19, None, [2, 6])],
    ids=["in_place", "same_room", "more_room"],
)
def test_longer_rows_put_in_between_tokens_find_room(recorder, monkeypatch, length, limit, replays):
    monkeypatch.setattr(decoding_graph, "LEAST_ROOM", 8)
    model = make(dtype=torch.float64, **HYBRIDS["rotary"])
    ids, others = prompts(length=2), prompts(length=length)
    states = [model.allocate_state(3) for _ in range(2)]
    seen = {}
    for graphs, state in enumerate(states):
        longer = model.allocate_state(3, max_seqlen=limit)
        with torch.no_grad():
            model(others, state=longer)
        seen[graphs] = []
        stream = model.stream(ids, max_new_tokens=9, state=state, cg=bool(graphs))
        for i, tokens in enumerate(stream):
            seen[graphs].append(tokens.tolist())
            if i == 2:
                state.update([1], longer.gather([2]))
    assert seen[0] == seen[1]
    assert_same_state(*states)
    assert recorder.replays == replays


def test_cpu_has_no_graphs():
    model, ids = make(), prompts()
    assert why_not(model, model.allocate_state(3)) == "device type cpu has no graphs"
    assert outcome(model, ids, cg=True) == outcome(model, ids)
    assert model not in decoding_graph._kept


def test_other_reasons_are_said(recorder):
    model, state = make(), make().allocate_state(2)
    assert why_not(model, state) is None
    assert why_not(model, State()) == "there is nothing to capture"
    assert why_not(lambda *_: None, state) == "there is nothing to capture"
    state.key_value_memory_dict[0][0].requires_grad_()
    assert "autograd" in why_not(model, state)
    model.backbone.process_group = object()
    assert "ranks" in why_not(model, make().allocate_state(2))


def test_cuda_recorder_warms_up_before_it_captures(monkeypatch):
    """Without a GPU: what it asks of torch, and in which order."""
    done, options_of = [], inspect.signature(torch.cuda.graph)

    class Graph:
        def replay(self):
            done.append("replay")

    @contextlib.contextmanager
    def capture(graph, **options):
        options_of.bind(graph, **options)
        done.append(("begin", options["stream"]))
        yield
        done.append("end")

    fakes = {"CUDAGraph": Graph, "graph": capture, "device": contextlib.nullcontext}
    for name, fake in {**fakes, "Stream": str}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(decoding_graph, "_streams", {})
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        replay, result = record_cuda(lambda: done.append("step") or len(done), torch.device(device))
        replay()
    first = ["step", ("begin", "cuda:1"), "step", "end", "replay"]
    assert done[:5] == done[10:] == first
    assert done[6] == ("begin", "cuda:0")
    assert result == 13


def test_model_that_replaces_its_state_is_refused(recorder):
    class Replacing(torch.nn.Module):
        config = MambaConfig(8, n_layer=1, vocab_size=VOCAB)

        def allocate_state(self, batch):
            return State({0: (torch.zeros(batch, 2),)}, batch)

        def forward(self, ids, state, num_last_tokens=0, attention_mask=None):
            state.key_value_memory_dict[0] = (state.key_value_memory_dict[0][0] + 1,)
            return CausalLMOutput(torch.zeros(*ids.shape, self.config.padded_vocab_size))

    model = Replacing()
    with pytest.raises(ValueError, match="cg must be False for a model that does not step"):
        model_generate(model, cg=True)
    assert model_generate(model, cg=False).shape == (2, 5)


def model_generate(model, cg):
    from ssm.utils.generation import generate

    return generate(model, prompts(2, 1), max_new_tokens=4, cg=cg)
