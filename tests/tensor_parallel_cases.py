"""Tensor parallelism against one process: run by tests/models/test_distributed.py on every rank.

Judge: the same module without a process group, on all tokens, from the same seed. float64 to 1e-10.
"""

import tempfile

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from ssm.distributed import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_state_dict,
    shard_state_dict,
)
from ssm.distributed.collectives import gathered, rank_of, same_random_state
from ssm.distributed.layout import shards_of
from ssm.distributed.norm import gated_rms_norm
from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.modules.attention import MHA
from ssm.modules.mamba2 import Mamba2
from ssm.modules.mlp import GatedMLP
from ssm.seq_meta import SeqMeta

RANKS = {"part_of_a_group_on_more_ranks": (4,), "seeds_of_a_part_of_the_ranks": (3,)}
D_MODEL, BATCH, LENGTH = 8, 2, 6
SIZES = {"d_state": 3, "headdim": 4, "chunk_size": 3}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def close(got, want, tolerance=None):
    tolerance = tolerance or TOLERANCE[want.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def pair(kind, group, seed=0, sequence_parallel=False, **kwargs):
    """The module in one process and the one of this rank, from one seed."""
    torch.manual_seed(seed)
    whole = kind(D_MODEL, **kwargs)
    torch.manual_seed(seed)
    parallel = kind(D_MODEL, process_group=group, sequence_parallel=sequence_parallel, **kwargs)
    return whole, parallel


def check_gradients(whole, parallel):
    """Every gradient of this rank is its part of the whole one."""
    want = {name: parameter.grad for name, parameter in whole.named_parameters()}
    want = shard_state_dict(parallel, want)
    for name, parameter in parallel.named_parameters():
        close(parameter.grad, want[name])


def check_mixer(group, sequence_parallel, dtype=torch.float64, **kwargs):
    settings = {**SIZES, "dtype": dtype, **kwargs}
    whole, parallel = pair(Mamba2, group, 0, sequence_parallel, **settings)
    for name, part in shard_state_dict(parallel, whole.state_dict()).items():
        assert torch.equal(part, parallel.state_dict()[name]), name  # from one seed: the same bits
    x = torch.randn(BATCH, LENGTH, D_MODEL, dtype=dtype)
    weight = torch.randn_like(x)
    a = x.clone().requires_grad_()
    want = whole(a)
    (want * weight).sum().backward()

    ranks, rank = group.size(), rank_of(group)
    if sequence_parallel:
        mine = slice(rank * BATCH * LENGTH // ranks, (rank + 1) * BATCH * LENGTH // ranks)
        b = x.flatten(0, 1)[mine].clone().requires_grad_()
        got = parallel(b, seqlen=LENGTH)
        close(got, want.flatten(0, 1)[mine])
        (got * weight.flatten(0, 1)[mine]).sum().backward()
        close(b.grad, a.grad.flatten(0, 1)[mine])
    else:
        b = x.clone().requires_grad_()
        got = parallel(b)
        close(got, want)
        (got * weight).sum().backward()
        close(b.grad, a.grad)
    check_gradients(whole, parallel)
    return whole, parallel


OPTIONS = {
    "plain": {"ngroups": 2},
    "bias_and_mlp": {"ngroups": 2, "bias": True, "d_ssm": 8, "D_has_hdim": True},
    "norm_first": {"ngroups": 4, "norm_before_gate": True, "conv_bias": False},
    "no_norm": {"ngroups": 2, "rmsnorm": False, "dt_limit": (0.01, 0.05)},
    "one_group": {"ngroups": 1, "bias": True, "norm_eps": 0.5},
    "one_group_norm_first": {"ngroups": 1, "norm_before_gate": True},
    "one_group_no_norm": {"ngroups": 1, "rmsnorm": False},
}


def case_mixer(group):
    for options in OPTIONS.values():
        check_mixer(group, False, **options)


def case_mixer_sequence_parallel(group):
    for options in OPTIONS.values():
        check_mixer(group, True, **options)


def case_mixer_float32(group):
    for parallel in (False, True):
        check_mixer(group, parallel, torch.float32, **OPTIONS["plain"])
        check_mixer(group, parallel, torch.float32, **OPTIONS["one_group"])


def case_part_of_a_group_on_more_ranks(group):
    """Two groups on four ranks: two neighbours share each."""
    for sequence_parallel in (False, True):
        for norm_before_gate in (False, True):
            options = {"ngroups": 2, "bias": True, "norm_before_gate": norm_before_gate}
            whole, parallel = check_mixer(group, sequence_parallel, **options)
    for name, tensor in gather_state_dict(parallel).items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def case_shared_norm_in_float16(group):
    """Squares that are more than float16 can hold."""
    x, weight = torch.full((3, 4), 300.0).half(), torch.ones(4).half()
    options = {"eps": 1e-5, "norm_before_gate": True, "width": 8, "slot": 0, "slots": 1}
    y = gated_rms_norm(x, weight, None, **options, group=group)
    assert y.dtype == torch.float16
    assert (y == 1).all()


def case_marks(group):
    """Those by which an optimizer spares parameters from weight decay."""
    whole, parallel = pair(Mamba2, group, **SIZES)
    for name, parameter in whole.named_parameters():
        marked = getattr(parallel.get_parameter(name), "_no_weight_decay", False)
        assert marked == getattr(parameter, "_no_weight_decay", False), name


def case_round_trip(group):
    whole, parallel = pair(Mamba2, group, **SIZES, ngroups=1, bias=True)
    joined = gather_state_dict(parallel)
    assert joined.keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(joined[name], tensor), name
    # Each part, asked for by number, is what that rank holds.
    for rank in range(group.size()):
        parts = shard_state_dict(parallel, whole.state_dict(), rank)
        for name, tensor in parallel.state_dict().items():
            assert torch.equal(gathered(tensor, group)[rank], parts[name]), name
    parallel.load_state_dict(shard_state_dict(parallel, whole.state_dict()))


def case_own_seeds(group):
    """Ranks that were seeded apart still hold parts of one model, and replicas of one."""
    torch.manual_seed(rank_of(group))
    parallel = Mamba2(D_MODEL, process_group=group, ngroups=1, bias=True, **SIZES)
    torch.manual_seed(0)
    whole = Mamba2(D_MODEL, ngroups=1, bias=True, **SIZES)
    for name, tensor in gather_state_dict(parallel).items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    split = dict(shards_of(parallel))
    for name, tensor in parallel.state_dict().items():
        if name not in split:
            both = gathered(tensor, group)
            assert torch.equal(both[0], both[-1]), name
    sizes = {"multiple_of": 2, "bias": True}
    for kind, settings in ((GatedMLP, sizes), (MHA, {"num_heads": 2})):
        torch.manual_seed(rank_of(group))
        layer = kind(D_MODEL, process_group=group, **settings)
        torch.manual_seed(0)
        alone = kind(D_MODEL, **settings)
        for name, tensor in gather_state_dict(layer).items():
            assert torch.equal(tensor, alone.state_dict()[name]), name
    heads = gathered(parallel.A_log.detach(), group)
    assert not torch.equal(heads[0], heads[1])


def case_seeds_of_a_part_of_the_ranks(group):
    """The first of the part decides, which is not the first of all."""
    part = dist.new_group([1, 2])
    if rank_of(group) == 0:
        return
    torch.manual_seed(rank_of(group))
    same_random_state(part)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(1)))


def case_mixer_states(group):
    """Prefill, single steps and a mask; the states of the ranks together are the whole ones."""
    for ngroups in (1, 2):
        settings = {**SIZES, "ngroups": ngroups, "dtype": torch.float64}
        whole, parallel = pair(Mamba2, group, **settings)
        x = torch.randn(BATCH, LENGTH, D_MODEL, dtype=torch.float64)
        mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        mask[0, :2] = False
        x[0, :2] = torch.nan
        with torch.no_grad():
            a, b = whole.allocate_state(BATCH), parallel.allocate_state(BATCH)
            want = whole(x, state=a, attention_mask=mask)
            close(parallel(x, state=b, attention_mask=mask), want)
            for _ in range(2):
                step = torch.randn(BATCH, 1, D_MODEL, dtype=torch.float64)
                close(parallel(step, state=b), whole(step, state=a))
            heads = gathered(b.key_value_memory_dict[0][1], group)
            close(heads.transpose(0, 1).flatten(1, 2), a.key_value_memory_dict[0][1])


def case_mixer_sequence_parallel_layouts(group):
    """Tokens in one axis with padding, and whole rows; packed sequences are of all ranks."""
    settings = {**SIZES, "ngroups": 1, "dtype": torch.float64}
    whole, parallel = pair(Mamba2, group, 0, True, **settings)
    x = torch.randn(BATCH, LENGTH, D_MODEL, dtype=torch.float64)
    meta = SeqMeta(seq_idx=torch.tensor([[0, 0, 1, 1, 1, -1], [-1, 3, 3, 4, 4, 4]]))
    x[meta.seq_idx < 0] = torch.nan
    want = whole(x, seq_meta=meta)
    rank, ranks = rank_of(group), group.size()
    tokens, rows = BATCH * LENGTH // ranks, BATCH // ranks
    mine = slice(rank * tokens, (rank + 1) * tokens)
    got = parallel(x.flatten(0, 1)[mine], seqlen=LENGTH, seq_meta=meta)
    close(got, want.flatten(0, 1)[mine])
    mine = slice(rank * rows, (rank + 1) * rows)
    close(parallel(x[mine], seq_meta=meta), want[mine])


def case_mlp(group):
    for parallel in (False, True):
        sizes = {"hidden_features": 6, "multiple_of": 2, "bias": True, "dtype": torch.float64}
        whole, split = pair(GatedMLP, group, 0, parallel, **sizes)
        check_layer(whole, split, parallel, group)


def check_layer(whole, parallel, is_cut, group):
    """Forward and gradients of a layer from (B, L, D) to the same; if cut, of this rank's rows."""
    x, dy = (torch.randn(BATCH, LENGTH, D_MODEL, dtype=torch.float64) for _ in range(2))
    rows = slice(rank_of(group), rank_of(group) + 1) if is_cut else slice(None)
    a, b = x.clone().requires_grad_(), x[rows].clone().requires_grad_()
    want, got = whole(a), parallel(b)
    close(got, want[rows])
    (want * dy).sum().backward()
    (got * dy[rows]).sum().backward()
    close(b.grad, a.grad[rows])
    check_gradients(whole, parallel)


def case_attention(group):
    options = [
        {"num_heads": 4},
        {"num_heads": 4, "num_heads_kv": 1, "d_conv": 3, "rotary_emb_dim": 2, "causal": True},
        {"num_heads": 4, "num_heads_kv": 2, "mlp_dim": 256, "head_dim": 3, "causal": True},
    ]
    for settings in options:
        for parallel in (False, True):
            whole, split = pair(MHA, group, 0, parallel, dtype=torch.float64, **settings)
            check_layer(whole, split, parallel, group)
            if parallel or not settings.get("causal"):
                continue
            a, b = whole.allocate_state(BATCH), split.allocate_state(BATCH)
            with torch.no_grad():
                for length in (3, 1, 2):
                    x = torch.randn(BATCH, length, D_MODEL, dtype=torch.float64)
                    close(split(x, state=b), whole(x, state=a))


def config(**kwargs):
    settings = {
        "d_model": D_MODEL,
        "n_layer": 2,
        "vocab_size": 16,
        "d_intermediate": 12,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 4},
        "attn_layer_idx": [1],
        "attn_cfg": {"num_heads": 4, "num_heads_kv": 1, "d_conv": 2, "rotary_emb_dim": 2},
    }
    return MambaConfig(**{**settings, **kwargs})


def case_language_model(group):
    """A hybrid with MLPs: logits, loss, every gradient, and the same text."""
    ids = torch.randint(16, (BATCH, LENGTH + 1))
    for cut, tied in ((False, True), (True, True), (True, False)):
        shape = config(tie_embeddings=tied, residual_in_fp32=False)
        torch.manual_seed(5)
        whole = MambaLMHeadModel(shape, dtype=torch.float64)
        torch.manual_seed(5 + rank_of(group))
        parallel = MambaLMHeadModel(
            shape, dtype=torch.float64, process_group=group, sequence_parallel=cut
        )
        for name, tensor in gather_state_dict(parallel).items():
            assert torch.equal(tensor, whole.state_dict()[name]), name
        want, got = whole(ids[:, :-1]).logits, parallel(ids[:, :-1]).logits
        close(got, want)
        for logits in (want, got):
            cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        check_gradients(whole, parallel)
        if not cut:
            prompt = ids[:, :3]
            assert torch.equal(
                parallel.generate(prompt, max_length=8), whole.generate(prompt, max_length=8)
            )


def case_saves(group):
    """The part of a rank is refused; the whole that all gather is saved."""
    torch.manual_seed(5)
    whole = MambaLMHeadModel(config(), dtype=torch.float64)
    torch.manual_seed(5)
    parallel = MambaLMHeadModel(config(), dtype=torch.float64, process_group=group)
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(ValueError, match=r"^save_pretrained: model must hold whole .*gather_"):
            parallel.save_pretrained(folder)
        gathered = MambaLMHeadModel(config(), device="meta")
        gathered.load_state_dict(gather_state_dict(parallel), assign=True)
        gathered.save_pretrained(folder)
        loaded = MambaLMHeadModel.from_pretrained(folder, dtype=torch.float64)
        for name, value in whole.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


def case_options_of_published_hybrids(group):
    """Attention beside a recurrence, blocks that are an MLP alone, factors: in a language model."""
    ids = torch.randint(16, (BATCH, LENGTH))
    shape = config(
        n_layer=3,
        ssm_cfg={"layer": "Mamba2", "d_state": 4, "headdim": 4, "multipliers": [2, 0.5, 3, 2, 1.5]},
        attn_layer_idx=[0],
        parallel_cfg={"ssm_out_multiplier": 0.5, "attention_in_multiplier": 2.0},
        mlp_layer_idx=[2],
        mlp_cfg={"layer": "MLP", "bias": True},
        residual_multiplier=0.7,
        embedding_multiplier=3.0,
        logits_multiplier=0.5,
    )
    for cut in (False, True):
        torch.manual_seed(5)
        whole = MambaLMHeadModel(shape, dtype=torch.float64)
        torch.manual_seed(5 + rank_of(group))
        parallel = MambaLMHeadModel(
            shape, dtype=torch.float64, process_group=group, sequence_parallel=cut
        )
        want, got = whole(ids).logits, parallel(ids).logits
        close(got, want)
        for logits in (want, got):
            logits.square().sum().backward()
        check_gradients(whole, parallel)


def case_norms_of_a_loaded_model(group):
    """Other parameters in the place of those that the model was made with."""
    torch.manual_seed(5)
    whole = MambaLMHeadModel(config(), dtype=torch.float64)
    torch.manual_seed(5)
    parallel = MambaLMHeadModel(
        config(), dtype=torch.float64, process_group=group, sequence_parallel=True
    )
    copies = {name: tensor.clone() for name, tensor in parallel.state_dict().items()}
    parallel.load_state_dict(copies, assign=True)
    ids = torch.randint(16, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    for model in (whole, parallel):
        model(ids).logits.square().sum().backward()
    check_gradients(whole, parallel)


def refuses(kind, text, function, *args, **kwargs):
    with pytest.raises(kind) as error:
        function(*args, **kwargs)
    assert str(error.value) == text, str(error.value)


def case_refusals(group):
    """Two ranks: nothing is exchanged before a size is refused."""
    ranks = "the 2 ranks of process_group"
    sizes = {"process_group": group, "headdim": 4}
    refuses(
        ValueError,
        f"Mamba2: d_ssm / headdim must be a multiple of {ranks}, got 1",
        *(Mamba2, 2),
        **sizes,
    )
    refuses(
        ValueError,
        f"Mamba2: d_inner - d_ssm must be a multiple of {ranks}, got 13",
        *(Mamba2, 7),
        **{**sizes, "expand": 3, "d_ssm": 8},
    )
    refuses(
        ValueError,
        f"Mamba2: ngroups must be a multiple or a divisor of {ranks}, got 3",
        *(Mamba2, 12),
        **sizes,
        ngroups=3,
    )
    group_rule = "must be a torch.distributed process group, got int"
    refuses(TypeError, f"Mamba2: process_group {group_rule}", Mamba2, 8, headdim=4, process_group=2)
    refuses(TypeError, f"MHA: process_group {group_rule}", MHA, 8, 2, process_group=2)
    refuses(TypeError, f"GatedMLP: process_group {group_rule}", GatedMLP, 8, process_group=2)
    refuses(
        TypeError,
        "MambaLMHeadModel: process_group must be a torch.distributed process group, got int",
        *(MambaLMHeadModel, config()),
        process_group=2,
    )
    refuses(
        TypeError,
        "ColumnParallelLinear: process_group must be a torch.distributed process group, got None",
        *(ColumnParallelLinear, 2, 2, None),
    )
    refuses(
        ValueError,
        "ColumnParallelLinear: out_features must be a multiple of 2 ranks, got 3",
        *(ColumnParallelLinear, 2, 3, group),
    )
    refuses(
        ValueError,
        "RowParallelLinear: in_features must be a multiple of 2 ranks, got 3",
        *(RowParallelLinear, 3, 2, group),
    )
    refuses(
        ValueError,
        f"MHA: num_heads must be a multiple of {ranks}, got 3",
        *(MHA, 6, 3),
        process_group=group,
    )
    refuses(
        ValueError,
        f"GatedMLP: hidden_features, rounded, must be a multiple of {ranks}, got 3",
        *(GatedMLP, 4, 3),
        multiple_of=1,
        process_group=group,
    )
    refuses(
        ValueError,
        "MambaLMHeadModel: ssm_cfg['layer'] must be 'Mamba2' with process_group, got 'Mamba1'",
        *(MambaLMHeadModel, config(ssm_cfg={}, attn_layer_idx=[])),
        process_group=group,
    )
    model = Mamba2(8, headdim=4, process_group=group)
    refuses(
        ValueError,
        "Mamba2: hidden_states must have shape (B L / 2, 8) with L = 4 if seqlen is given, "
        "got (3, 8)",
        *(model, torch.zeros(3, 8)),
        seqlen=4,
    )
    refuses(
        ValueError,
        "shard_state_dict: dt_bias must have 4 entries along axis 0, got shape (2,)",
        *(shard_state_dict, model, model.state_dict()),
    )
    refuses(
        ValueError,
        "shard_state_dict: state_dict must hold entries of the module, got 'module.D'",
        *(shard_state_dict, model, {"module.D": torch.zeros(4)}),
    )
    language_model = MambaLMHeadModel(config(), process_group=group, sequence_parallel=True)
    refuses(
        ValueError,
        "MambaLMHeadModel: B L must be a multiple of the 2 ranks with sequence_parallel, "
        "got (1, 3)",
        *(language_model, torch.zeros(1, 3, dtype=torch.long)),
    )
    row = RowParallelLinear(4, 2, group)
    refuses(
        ValueError,
        "RowParallelLinear: tokens must be a multiple of 2 ranks, got 3",
        *(row, torch.zeros(3, 2)),
    )
    alone = [dist.new_group([number]) for number in range(2)][1 - rank_of(group)]
    refuses(
        ValueError,
        "Mamba2: process_group must contain this process, got a group without it",
        *(Mamba2, 8),
        headdim=4,
        process_group=alone,
    )


def case_one_group_for_heads_and_steps(group):
    """A rank would attend from its steps with its heads to steps with others; refused at once."""
    twin = dist.new_group([0, 1])
    rule = "context_group must share no rank but this one with process_group, got [0, 1] in both"
    x, ids = torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.long)
    mixer = Mamba2(8, headdim=4, process_group=group, sequence_parallel=False)
    attention = MHA(8, 2, process_group=group, sequence_parallel=False)
    language_model = MambaLMHeadModel(config(), process_group=group)
    for context_group in (group, twin):
        refuses(ValueError, f"Mamba2: {rule}", mixer, x, context_group=context_group)
        refuses(ValueError, f"MHA: {rule}", attention, x, context_group=context_group)
        refuses(
            ValueError,
            f"MambaLMHeadModel: {rule}",
            *(language_model, ids),
            context_group=context_group,
        )
