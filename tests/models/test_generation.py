"""Generation: filters, stops, streaming and batches.

Judge: each row decoded alone by repeated whole forward passes, and the definition of each filter.
"""

import copy
import time

import numpy as np
import pytest
import torch

from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.state import State
from ssm.utils.generation import Sampling, generate, penalize_repetition, sample

VOCAB = 11


MIXERS = {"Mamba1": {}, "Mamba2": {"layer": "Mamba2", "d_state": 8, "headdim": 4}}


@pytest.fixture(params=MIXERS)
def model(request):
    mixer = MIXERS[request.param]
    config = MambaConfig(8, n_layer=2, vocab_size=VOCAB, ssm_cfg=mixer, tie_embeddings=False)
    m = MambaLMHeadModel(config, {"initializer_range": 1.0}, dtype=torch.float64)
    with torch.no_grad():
        m.lm_head.weight *= 8
    return m


def prompts(batch=3, length=4):
    return torch.randint(0, VOCAB, (batch, length))


@torch.no_grad()
def greedy(m, row, steps):
    """Decode one row without any state."""
    row = row.tolist()
    for _ in range(steps):
        row.append(int(m(torch.tensor([row])).logits[0, -1, :VOCAB].argmax()))
    return row


def test_batched_greedy_equals_row_by_row(model):
    ids = prompts()
    got = model.generate(ids, max_length=12)
    assert got.tolist() == [greedy(model, row, 8) for row in ids]
    assert len({tuple(row) for row in got[:, 4:].tolist()}) > 1
    assert torch.equal(model.generate(ids, max_new_tokens=8), got)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_ragged_prompts_equal_row_by_row(model, side):
    rows = [[1], [2, 3, 4], [5, 6, 7, 8, 9]]
    ids, mask = torch.full((3, 5), 10), torch.zeros(3, 5, dtype=torch.long)
    for i, row in enumerate(rows):
        pad = 5 - len(row)
        start = {"left": pad, "right": 0, "both": pad // 2}[side]
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    got = model.generate(ids, max_new_tokens=6, attention_mask=mask)
    assert torch.equal(got[:, :5], ids)
    for i, row in enumerate(rows):
        assert got[i, 5:].tolist() == greedy(model, torch.tensor(row), 6)[len(row) :]


def test_finished_rows_emit_pad_and_all_finished_stops(model):
    ids = prompts()
    free = model.generate(ids, max_new_tokens=9)[:, 4:].tolist()
    eos = [free[0][1], free[1][4]]
    got = model.generate(ids, max_new_tokens=9, eos_token_id=eos, pad_token_id=0)[:, 4:].tolist()
    ends = [next((t for t, x in enumerate(row) if x in eos), 8) for row in free]
    steps = max(ends) + 1
    for row, whole, end in zip(got, free, ends, strict=True):
        assert row == whole[: end + 1] + [0] * (steps - end - 1)
    alone = model.generate(ids[:1], max_new_tokens=9, eos_token_id=eos[0])
    assert alone.shape[1] == 4 + free[0].index(eos[0]) + 1


def test_the_first_end_serves_as_pad(model):
    ids = prompts()
    end = int(model.generate(ids, max_new_tokens=1)[0, 4])
    other = (end + 1) % VOCAB
    for ends in ([end, other], [other, end]):
        got = model.generate(ids, max_new_tokens=6, eos_token_id=ends)
        assert set(got[0, 5:].tolist()) == {ends[0]}


def test_streaming_equals_not_streaming(model):
    ids = prompts()
    settings = {"max_new_tokens": 5, "top_k": 0, "temperature": 2.0, "seed": 3}
    want = model.generate(ids, **settings)
    seen = []
    again = model.generate(ids, **settings, streamer=seen.append)
    assert torch.equal(again, want)
    assert torch.equal(torch.stack(seen, 1), want[:, 4:])
    assert torch.equal(torch.stack(list(model.stream(ids, **settings)), 1), want[:, 4:])


def test_stream_yields_before_the_end(model):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    stream = model.stream(prompts(1), max_new_tokens=50)
    assert calls == []
    next(stream)
    assert len(calls) == 1
    assert torch.is_grad_enabled()


def test_streamer_of_transformers(model):
    class Streamer:
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, value):
            self.parts.append(value)

        def end(self):
            self.ended = True

    streamer, ids = Streamer(), prompts(1)
    want = model.generate(ids, max_new_tokens=3, streamer=streamer)
    assert streamer.ended
    assert torch.equal(torch.cat([p.flatten() for p in streamer.parts]), want[0])
    refused = Streamer()
    other = State({0: (torch.zeros(1, 2),)}, 1)
    with pytest.raises(ValueError, match="state must have shapes"):
        model.generate(ids, max_new_tokens=3, streamer=refused, state=other)
    assert not refused.parts
    model.generate(ids, max_new_tokens=0, streamer=refused)
    assert len(refused.parts) == 1
    assert refused.ended


@pytest.mark.parametrize("temperature", [1e-38, 1e-300])
def test_a_low_temperature_is_greedy(model, temperature):
    ids = prompts()
    got = model.generate(ids, max_new_tokens=6, top_k=0, temperature=temperature, seed=1)
    assert torch.equal(got, model.generate(ids, max_new_tokens=6))


def test_seed_decides_and_leaves_the_global_generator_alone(model):
    ids = prompts()
    before = torch.get_rng_state()

    def draw(seed):
        return model.generate(ids, max_new_tokens=12, top_k=0, temperature=5.0, seed=seed)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(1)
    by_generator = model.generate(
        ids, max_new_tokens=12, top_k=0, temperature=5.0, generator=generator
    )
    assert torch.equal(by_generator, draw(1))


def test_state_is_continued_in_place(model):
    ids = prompts(2, 6)
    state = model.allocate_state(2)
    first = model.generate(ids[:, :4], max_new_tokens=3, state=state)
    second = model.generate(first[:, -1:], max_new_tokens=3, state=state)
    want = model.generate(ids[:, :4], max_new_tokens=6)
    assert torch.equal(torch.cat([first, second[:, 1:]], 1), want)
    assert state.seqlen_offset == 4 + 6 - 1


def test_scores_are_the_logits(model):
    ids = prompts()
    out = model.generate(ids, max_length=7, return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == 3
    logits = model(out.sequences[:, :-1]).logits[:, 3:]
    scores = torch.stack(out.scores, 1)
    # float64 is not rounded; padding columns are there, though nothing is chosen from them.
    torch.testing.assert_close(scores, logits, rtol=1e-12, atol=1e-12)
    assert model.generate(ids, max_length=7, return_dict_in_generate=True).scores is None


def test_scores_have_the_dtype_of_the_model_and_the_columns_asked_for(model):
    half = copy.deepcopy(model).bfloat16()
    ids = prompts()
    kwargs = {"max_length": 7, "return_dict_in_generate": True, "output_scores": True}
    out = half.generate(ids, **kwargs)
    scores = torch.stack(out.scores, 1)
    assert scores.dtype == torch.bfloat16
    logits = half(out.sequences[:, :-1]).logits[:, 3:]
    torch.testing.assert_close(scores, logits, rtol=0.05, atol=0.05)
    narrow = model.generate(ids, vocab_size=VOCAB - 2, **kwargs)
    assert {score.shape[1] for score in narrow.scores} == {VOCAB - 2}
    assert narrow.sequences[:, 4:].max() < VOCAB - 2


def test_time_is_kept_where_asked_for(model):
    ids, kwargs = prompts(), {"max_new_tokens": 2, "return_dict_in_generate": True}
    start = time.perf_counter()
    out = model.generate(ids, enable_timing=True, **kwargs)
    assert 0 < out.seconds <= time.perf_counter() - start
    assert model.generate(ids, enable_timing=False, **kwargs).seconds is None
    assert torch.equal(model.generate(ids, max_new_tokens=2, enable_timing=True), out.sequences)


def test_padding_columns_are_never_produced(model):
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 1000
    for settings in ({}, {"top_k": 0, "temperature": 100.0, "seed": 0}):
        assert model.generate(prompts(), max_new_tokens=30, **settings).max() < VOCAB
    assert model.generate(prompts() % 4, max_new_tokens=9, vocab_size=4).max() < 4


def test_teacher_outputs_are_forced(model):
    ids = prompts()
    teacher = torch.cat([ids, prompts(3, 2)], 1)
    out = model.generate(
        ids,
        max_length=8,
        teacher_outputs=teacher,
        cg=True,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert torch.equal(out.sequences[:, :6], teacher)
    assert out.sequences[:, 6:].tolist() == [greedy(model, row, 2)[6:] for row in teacher]


def test_teacher_outputs_under_the_prompt_are_not_read(model):
    teacher = torch.cat([torch.full((3, 4), -100), prompts(3, 2)], 1)
    got = model.generate(prompts(), max_new_tokens=4, teacher_outputs=teacher)
    assert torch.equal(got[:, 4:6], teacher[:, 4:])


def test_repetition_penalty_counts_taught_tokens(model):
    ids = prompts(2)
    teacher = torch.cat([ids, prompts(2, 3)], 1)
    settings = {"max_length": 9, "repetition_penalty": 1e9}
    got = model.generate(ids, teacher_outputs=teacher, **settings)
    assert torch.equal(got, model.generate(teacher, **settings))


def test_repetition_penalty_counts_prompt_and_new_tokens(model):
    ids = prompts(2)
    out = model.generate(
        ids,
        max_new_tokens=VOCAB - 4,
        repetition_penalty=1e9,
        return_dict_in_generate=True,
        output_scores=True,
    )
    decided = 0
    for row, tokens in enumerate(out.sequences.tolist()):
        for t, logits in enumerate(out.scores, start=ids.shape[1]):
            unseen = [v for v in range(VOCAB) if v not in tokens[:t]]
            # A repetition costs everything, but a positive logit divided by 1e9 beats a negative.
            if any(logits[row, v] > 1e-6 for v in unseen):
                assert tokens[t] in unseen
                decided += 1
    assert decided >= VOCAB - 4


def test_repetition_penalty_ignores_padding(model):
    ids = torch.tensor([[3, 3, 1], [3, 2, 1]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    alone = model.generate(ids[:1, 2:], max_new_tokens=4, repetition_penalty=3.0)
    both = model.generate(ids, max_new_tokens=4, repetition_penalty=3.0, attention_mask=mask)
    assert torch.equal(both[:1, 3:], alone[:, 1:])


def test_penalty_formula():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def support(probabilities, draws=400, **settings):
    """The tokens that are ever drawn, and how often."""
    logits = torch.tensor(probabilities).log().expand(draws, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits, Sampling(**settings), generator)
    return torch.bincount(drawn, minlength=len(probabilities)) / draws


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 0, "temperature": 0.0}, {0}),
        ({"top_k": 2}, {0, 2}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_k": 0}, {0, 1, 2, 3}),
        ({"top_k": 0, "top_p": 0.3}, {0}),
        ({"top_k": 0, "top_p": 0.5}, {0, 2}),
        ({"top_k": 0, "top_p": 0.85}, {0, 1, 2}),
        ({"top_k": 0, "top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 0, "min_p": 0.7}, {0, 2}),
        ({"top_k": 0, "min_p": 0.4}, {0, 1, 2}),
        ({"top_k": 2, "min_p": 0.4}, {0, 2}),
        # Of the two tokens that are left the first has 4/7 of the mass; of all, 0.4 would not do.
        ({"top_k": 2, "top_p": 0.5}, {0}),
        ({"top_k": 0, "min_p": 1.0}, {0}),
    ],
)
def test_filters_keep_the_right_tokens(settings, want):
    frequency = support([0.4, 0.2, 0.3, 0.1], **settings)
    assert set(frequency.nonzero()[:, 0].tolist()) == want


def test_a_filter_stops_where_the_mass_is_reached():
    # Four times a quarter, exactly: the second reaches a half, and ties keep their order.
    assert set(support([0.25] * 4, top_k=0, top_p=0.5).nonzero()[:, 0].tolist()) == {0, 1}


def test_low_precision_is_filtered_in_float32():
    logits = torch.randn(200, 50).bfloat16()
    settings = Sampling(top_k=0, top_p=0.9, temperature=0.7)
    draws = [
        sample(given, settings, torch.Generator().manual_seed(0))
        for given in (logits, logits.float())
    ]
    assert torch.equal(*draws)


def test_temperature_changes_frequencies():
    flat = support([0.9, 0.1], 4000, top_k=0, temperature=2.0)
    # 0.9^(1/2) against 0.1^(1/2): 3 to 1. Four standard deviations of 4000 draws are 0.027.
    assert abs(flat[0] - 0.75) < 0.027


def test_do_sample_decides_between_drawing_and_the_best(model):
    ids = prompts()
    want = model.generate(ids, max_new_tokens=8)
    free = {"max_new_tokens": 8, "top_k": 0, "temperature": 5.0, "seed": 0}
    assert torch.equal(model.generate(ids, do_sample=False, **free), want)
    assert not torch.equal(model.generate(ids, do_sample=True, **free), want)
    # The penalty is no part of the draw.
    punished = model.generate(ids, max_new_tokens=8, repetition_penalty=9.0)
    assert not torch.equal(punished, want)
    got = model.generate(ids, do_sample=False, repetition_penalty=9.0, **free)
    assert torch.equal(got, punished)


def test_nothing_to_generate(model):
    ids, state = prompts(), model.allocate_state(3)
    assert torch.equal(model.generate(ids, max_length=4, state=state), ids)
    assert state.seqlen_offset == 0
    assert model.generate(ids[:0], max_new_tokens=3).shape == (0, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "max_length or max_new_tokens must be given"),
        ({"max_length": 3}, "max_length must be at least the prompt length 4, got 3"),
        ({"max_length": 9, "max_new_tokens": 1}, "must not be given beside max_length"),
        ({"max_new_tokens": -1}, "max_new_tokens must not be negative, got -1"),
        ({"max_length": 9, "top_k": -1}, "generate: top_k must not be negative, got -1"),
        ({"max_length": 9, "top_p": 1.5}, r"top_p must lie in \[0, 1\], got 1.5"),
        ({"max_length": 9, "min_p": -0.1}, r"min_p must lie in \[0, 1\], got -0.1"),
        ({"max_length": 9, "temperature": -1.0}, "temperature must be finite and not negative"),
        ({"max_length": 9, "temperature": float("nan")}, "temperature must be finite"),
        ({"max_length": 9, "repetition_penalty": 0}, "repetition_penalty must be positive, got 0"),
        ({"max_length": 9, "do_sample": True}, "top_k must be 0 .* with do_sample=True, got 1"),
        ({"max_length": 9, "eos_token_id": 11}, r"eos_token_id must lie in \[0, 11\), got 11"),
        ({"max_length": 9, "vocab_size": 17}, r"vocab_size must lie in \[1, 16\], got 17"),
        ({"max_length": 9, "attention_mask": torch.ones(3, 3)}, r"attention_mask must have shape"),
        (
            {"max_length": 9, "attention_mask": torch.zeros(3, 4)},
            r"keep a token in every row.*row 0",
        ),
        (
            {"max_length": 9, "attention_mask": torch.tensor([[1] * 4, [0] * 4, [1] * 4])},
            r"keep a token in every row.*row 1",
        ),
        (
            {"max_length": 9, "teacher_outputs": torch.zeros(2, 4)},
            "teacher_outputs must have shape",
        ),
        (
            {"max_length": 9, "teacher_outputs": torch.zeros(3, dtype=torch.long)},
            r"teacher_outputs must have shape \(3, T\), got \(3,\)",
        ),
        (
            {"max_length": 9, "teacher_outputs": torch.full((3, 5), 16)},
            r"teacher_outputs must lie in \[0, 16\), got 16",
        ),
        ({"max_length": 9, "pad_token_id": 16}, r"pad_token_id must lie in \[0, 16\), got 16"),
        ({"max_length": 9, "pad_token_id": -1}, r"pad_token_id must lie in \[0, 16\), got -1"),
        (
            {"max_length": 9, "seed": 1, "generator": torch.Generator()},
            "seed must not be given beside generator",
        ),
    ],
)
def test_rejects_bad_arguments(model, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts(), **settings)
    with pytest.raises(ValueError, match=message):
        model.stream(prompts(), **settings)


def test_rejects_bad_inputs(model):
    with pytest.raises(ValueError, match=r"input_ids must have shape \(B, L\) with L > 0"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), max_length=3)
    for rows in (1, 4):
        state = model.allocate_state(rows)
        for run in (model.generate, model.stream):
            with pytest.raises(ValueError, match=f"generate: state must hold 3 rows, got {rows}"):
                run(prompts(), max_length=9, state=state)
    with pytest.raises(TypeError, match="num_beams"):
        model.generate(prompts(), max_length=9, num_beams=2)
    with pytest.raises(TypeError, match=r"eos_token_id must be an int or a list of int, got '[.]'"):
        model.generate(prompts(), max_length=9, eos_token_id=".")


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([[1, 2]], TypeError, "generate: input_ids must be a torch.Tensor, got list"),
        (torch.ones(1, 2), ValueError, "generate: input_ids must hold integers, got torch.float32"),
        (torch.tensor([[1, 16]]), ValueError, r"generate: input_ids must lie in \[0, 16\), got 16"),
        (torch.tensor([[-2, 1]]), ValueError, r"generate: input_ids must lie in \[0, 16\), got -2"),
    ],
)
def test_rejects_ids_that_are_no_tokens(model, ids, error, message):
    shown = []
    with pytest.raises(error, match=message):
        model.generate(ids, max_new_tokens=1, streamer=shown.append)
    with pytest.raises(error, match=message):
        model.stream(ids, max_new_tokens=1)
    assert not shown


def test_every_integer_type_is_taken(model):
    ids = prompts()
    want = model.generate(ids, max_new_tokens=3)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        got = model.generate(ids.to(dtype), max_new_tokens=torch.tensor(3))
        assert got.dtype == torch.int64
        assert torch.equal(got, want)
    settings = {"max_new_tokens": 5, "seed": 0}
    want = model.generate(ids, top_k=3, eos_token_id=[1, 2], **settings)
    for kind in (np.int64, np.uint8, torch.tensor):
        eos = [kind(1), kind(2)]
        got = model.generate(ids, top_k=kind(3), eos_token_id=eos, **settings)
        assert torch.equal(got, want)
    model.generate(ids, max_new_tokens=1, eos_token_id=np.int64(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 1.5}, "generate: max_new_tokens must be an int, got 1.5"),
        ({"max_new_tokens": True}, "generate: max_new_tokens must be an int, got True"),
        ({"max_length": 9, "top_k": 5.0}, "generate: top_k must be an int, got 5.0"),
        ({"max_length": 9, "top_k": None}, "generate: top_k must be an int, got None"),
        ({"max_length": "x"}, "generate: max_length must be an int, got 'x'"),
        ({"max_length": 9, "pad_token_id": "x"}, "generate: pad_token_id must be an int, got 'x'"),
        ({"max_length": 9, "vocab_size": 2.0}, "generate: vocab_size must be an int, got 2.0"),
        (
            {"max_length": 9, "teacher_outputs": [[1]]},
            "generate: teacher_outputs must be a torch.Tensor, got list",
        ),
        (
            {"max_length": 9, "attention_mask": [[1]]},
            "generate: attention_mask must be a torch.Tensor, got list",
        ),
    ],
)
def test_rejects_wrong_types(model, settings, message):
    with pytest.raises(TypeError, match=message):
        model.generate(prompts(), **settings)


def test_unknown_keywords_are_refused_in_the_name_of_the_caller(model):
    with pytest.raises(TypeError, match=r"^generate: .* got 'max_tokens'; did you mean 'max_"):
        model.generate(prompts(), max_tokens=9)
    with pytest.raises(TypeError, match=r"^stream: .* got 'num_beams'$"):
        model.stream(prompts(), max_length=9, num_beams=2)


def test_streamer_is_told_nothing_before_the_checks(model):
    class Streamer:
        def put(self, value):
            raise AssertionError("put before the arguments were checked")

    with pytest.raises(ValueError, match="top_p must lie"):
        model.generate(prompts(1), max_new_tokens=3, top_p=2, streamer=Streamer())
