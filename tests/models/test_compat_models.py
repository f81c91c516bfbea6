"""What scripts for mamba_ssm build their own models and loops of.

Judges: ``MambaLMHeadModel`` of the same shape, and its ``generate``.
"""

from collections import namedtuple
from functools import partial

import pytest
import torch
from torch import nn

from ssm.compat import mamba_ssm
from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel

SIZES = {"d_model": 16, "n_layer": 3, "d_intermediate": 24, "vocab_size": 24}
SHAPE = {
    "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 4},
    "attn_layer_idx": [1],
    "attn_cfg": {"num_heads": 2},
    "rms_norm": True,
    "fused_add_norm": True,
    "residual_in_fp32": True,
}


class Script(nn.Module, mamba_ssm.GenerationMixin):
    """A language model as scripts write it, on upstream's names."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.backbone = mamba_ssm.MixerModel(**SIZES, **SHAPE, dtype=dtype)
        self.lm_head = nn.Linear(SIZES["d_model"], SIZES["vocab_size"], bias=False, dtype=dtype)
        self.apply(partial(mamba_ssm._init_weights, n_layer=SIZES["n_layer"]))

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype, **kwargs)

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0):
        hidden = self.backbone(input_ids, inference_params=inference_params)
        hidden = hidden[:, -num_last_tokens:] if num_last_tokens else hidden
        return namedtuple("Output", ["logits"])(self.lm_head(hidden))


@pytest.fixture
def pair():
    """The script's model, and ours with its parameters."""
    torch.manual_seed(0)
    script = Script()
    with torch.no_grad():  # logits far apart: no tie decides a token
        script.lm_head.weight.mul_(20)
    config = MambaConfig(**SIZES, **SHAPE, tie_embeddings=False)
    model = MambaLMHeadModel(config, dtype=torch.float64)
    model.load_state_dict(script.state_dict())
    return script, model


PROMPT = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


def test_backbone_is_that_of_the_language_model(pair):
    script, model = pair
    with torch.no_grad():
        assert torch.equal(script(PROMPT).logits, model(PROMPT).logits)
    cache = script.allocate_inference_cache(2, 9)
    want = model.allocate_inference_cache(2, 9)
    assert {i: [t.shape for t in ts] for i, ts in cache.items()} == {
        i: [t.shape for t in ts] for i, ts in want.items()
    }


@pytest.mark.parametrize("extras", [{}, {"repetition_penalty": 1.7}, {"eos_token_id": 30}])
def test_generates_greedily_as_ours(pair, extras):
    script, model = pair
    ours = {k: v for k, v in extras.items() if k != "eos_token_id"}
    want = model.generate(PROMPT, 11, return_dict_in_generate=True, output_scores=True, **ours)
    got = script.generate(PROMPT, 11, return_dict_in_generate=True, output_scores=True, **extras)
    assert torch.equal(got.sequences, want.sequences)
    for g, w in zip(got.scores, want.scores, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)
    assert torch.equal(script.generate(PROMPT, 11, **extras), want.sequences)


def test_decode_stops_streams_and_is_taught(pair):
    script, _ = pair
    free = script.generate(PROMPT[:1], 12)
    end = int(free[0, 6])
    first = (free[0, 4:] == end).nonzero()[0, 0] + 5
    assert torch.equal(script.generate(PROMPT[:1], 12, eos_token_id=end), free[:, :first])

    class Streamer:
        seen, ended = [], 0

        def put(self, tokens):
            self.seen.append(tokens)

        def end(self):
            self.ended += 1

    streamer = Streamer()
    taught = torch.tensor([[0, 0, 0, 0, 7, 8]])
    output = mamba_ssm.decode(
        PROMPT[:1], script, 9, teacher_outputs=taught, streamer=streamer, enable_timing=True
    )
    assert output.sequences[0, 4:6].tolist() == [7, 8]
    assert output.sequences.shape == (1, 9)
    assert output.scores is None
    assert output.seconds > 0
    assert torch.equal(torch.cat(streamer.seen, 1), output.sequences)
    assert streamer.ended == 1
    # What follows is what follows a prompt that holds what was taught.
    assert torch.equal(output.sequences, script.generate(output.sequences[:, :6], 9))


class Counter(nn.Module):
    """Row b says b + the number of tokens seen; keeps the positions it was given."""

    def __init__(self):
        super().__init__()
        self.positions = []

    def forward(self, input_ids, position_ids, inference_params, num_last_tokens):
        self.positions.append(None if position_ids is None else position_ids.tolist())
        seen = inference_params.seqlen_offset + input_ids.shape[1]
        logits = torch.zeros(len(input_ids), 1, 16)
        for row in range(len(input_ids)):
            logits[row, 0, row + seen] = 1
        return namedtuple("Output", ["logits"])(logits)


def test_decode_tells_positions_and_ends_when_all_rows_end_at_once():
    model = Counter()
    output = mamba_ssm.decode(PROMPT, model, 8, eos_token_id=5)
    assert output.sequences[:, 4:].tolist() == [[4, 5, 6, 7], [5, 6, 7, 8]]
    assert model.positions == [None, [[4], [4]], [[5], [5]], [[6], [6]]]


def test_decode_samples_among_the_columns_asked_for(pair):
    script, _ = pair
    torch.manual_seed(0)
    got = script.generate(PROMPT, 40, top_k=0, temperature=50.0, vocab_size=5)
    assert set(got[:, 4:].unique().tolist()) == set(range(5))


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((PROMPT[0], 9), ValueError, r"decode: input_ids must have shape \(B, L\)"),
        ((PROMPT[:, :0], 9), ValueError, "decode: input_ids must have shape"),
        (([[1]], 9), TypeError, "decode: input_ids must be a torch.Tensor, got list"),
        ((PROMPT, 4), ValueError, "decode: max_length must be above 4, got 4"),
        ((PROMPT, 4.5), TypeError, "decode: max_length must be an int, got 4.5"),
        ((PROMPT, 9, -1), ValueError, "top_k must not be negative"),
    ],
)
def test_decode_refuses(pair, arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        pair[0].generate(*arguments)


def test_mixin_leaves_the_cache_to_the_class():
    with pytest.raises(NotImplementedError):
        mamba_ssm.GenerationMixin().allocate_inference_cache(1, 2)


def test_sample():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.9]])
    assert mamba_ssm.sample(logits).tolist() == [1, 0]
    torch.manual_seed(0)
    drawn = torch.stack([mamba_ssm.sample(logits, top_k=2, temperature=5.0) for _ in range(99)])
    assert [set(column.tolist()) for column in drawn.T] == [{1, 2}, {0, 2}]
    with pytest.raises(ValueError, match="top_p must lie in"):
        mamba_ssm.sample(logits, top_k=0, top_p=1.5)


def test_create_block():
    block = mamba_ssm.create_block(
        16, 24, {"d_state": 4}, [2], {"num_heads": 2}, rms_norm=True, layer_idx=1
    )
    assert (block.layer_idx, block.mixer.layer_idx, block.mixer.d_state) == (1, 1, 4)
    assert isinstance(block, mamba_ssm.Block)
    assert isinstance(block.mixer, mamba_ssm.Mamba.__base__)
    assert block.mlp.fc2.in_features >= 24
    attention = mamba_ssm.create_block(
        16, 0, attn_layer_idx=[2], attn_cfg={"num_heads": 2}, layer_idx=2, dtype=torch.float64
    )
    assert isinstance(attention.mixer, mamba_ssm.MHA)
    assert attention.norm.weight.dtype == torch.float64
    alone = mamba_ssm.create_block(16, 0)
    assert alone.layer_idx is None
    hidden, residual = alone(torch.randn(1, 3, 16))
    assert hidden.shape == residual.shape == (1, 3, 16)
    with pytest.raises(ValueError, match="ssm_cfg must hold arguments of Mamba1, got 'd_stat'"):
        mamba_ssm.create_block(16, 0, {"d_stat": 4})


@pytest.mark.parametrize(("inner", "residuals"), [(0, 50), (32, 100)])
def test_weights_are_initialised_once_for_the_depth(inner, residuals):
    """out_proj is drawn with torch's bound, divided by the root of the residuals."""
    torch.manual_seed(0)
    deep = mamba_ssm.MixerModel(32, 50, inner, 8)
    bound = 1 / 64**0.5 / residuals**0.5  # fan-in of out_proj is 64
    largest = max(float(layer.mixer.out_proj.weight.abs().max()) for layer in deep.layers)
    assert 0.99 * bound < largest <= bound
    assert 0.015 < float(deep.embedding.weight.std()) < 0.025


def test_loads_config_and_parameters(tmp_path, pair):
    _, model = pair
    model.save_pretrained(tmp_path, format="mamba_ssm")
    config = mamba_ssm.MambaConfig(**mamba_ssm.load_config_hf(str(tmp_path)))
    assert config == model.config
    loaded = mamba_ssm.load_state_dict_hf(str(tmp_path))
    want = model.state_dict()
    assert loaded.keys() == want.keys()
    assert all(torch.equal(loaded[name], want[name]) for name in want)
    halves = mamba_ssm.load_state_dict_hf(str(tmp_path), device="cpu", dtype=torch.bfloat16)
    assert halves["lm_head.weight"].dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError):
        mamba_ssm.load_config_hf(str(tmp_path / "none"))
