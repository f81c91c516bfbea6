"""Context parallelism against one process: run by tests/models/test_distributed.py on every rank.

Judge: the same call on the whole sequence, gradients of parameters and states summed over the
ranks. float64 to 1e-10.
"""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from ssm import ops
from ssm.distributed import ContextOperators, copy_parameters, own_steps, sum_gradients
from ssm.distributed.collectives import gathered, rank_of, summed
from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.modules.attention import MHA
from ssm.modules.mamba1 import Mamba1
from ssm.modules.mamba2 import Mamba2
from ssm.seq_meta import SeqMeta
from ssm.training import TrainOptions, train

RANKS = dict.fromkeys(
    (
        *("conv", "selective_scan", "ssd_chunk_scan"),
        *("mixers", "mixer_states", "language_model", "model_states"),
    ),
    (2, 3),
)
BATCH, LENGTH = 2, 9
# The filters are longer than some of the parts, and some ranks have nothing.
CUTS = {2: [(5, 4), (1, 8), (0, 9), (9, 0)], 3: [(3, 3, 3), (1, 7, 1), (0, 5, 4), (4, 0, 5)]}
# Boundaries inside a part, between two, a sequence of one step, and padding anywhere.
IDS = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2, 2], [-1, 4, 4, -1, -1, 4, 3, 3, -1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 1, 0, 0, 1, 0]]).bool()
LAYOUTS = {
    "whole": {},
    "packed": {"seq_idx": IDS},
    "padded": {"mask": MASK},
    "nothing": {"mask": torch.zeros_like(MASK)},
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def close(got, want, tolerance=None):
    tolerance = tolerance or TOLERANCE[want.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def part(cut, group):
    rank = rank_of(group)
    return slice(sum(cut[:rank]), sum(cut[: rank + 1]))


def meta(layout, mine):
    if not layout:
        return None
    return SeqMeta(**{name: tensor[:, mine] for name, tensor in layout.items()})


def leaf(*shape, dtype=torch.float64, low=None):
    x = torch.randn(*shape, dtype=dtype) if low is None else torch.rand(*shape, dtype=dtype) + low
    return x.requires_grad_()


def gradients(outputs, inputs, gradient=None):
    """Like autograd.grad, with zeros for what nothing depends on."""
    return torch.autograd.grad(outputs, inputs, gradient, materialize_grads=True)


def check(function, tensors, axes, time_axis, group, cut, layout):
    """Compare a call on a part with the call on the whole, and every gradient.

    ``function(operators, tensors, seq_meta)`` returns (y, final state); ``axes`` says which axis of
    a tensor is time, None for none; ``time_axis`` is the axis of time in y.
    """
    mine = part(cut, group)
    size = mine.stop - mine.start

    def cut_out(x, axis):
        return x if axis is None else x.narrow(axis, mine.start, size)

    want, want_state = function(ops, tensors, meta(layout, slice(None)))
    dy, dstate = torch.randn_like(want), torch.randn_like(want_state)
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]
    wanted = gradients((want, want_state), [tensors[n] for n in names], (dy, dstate))
    parts = {
        name: cut_out(tensor.detach(), axes.get(name)).clone().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    got, got_state = function(ContextOperators(group), parts, meta(layout, mine))
    close(got, cut_out(want, time_axis))
    close(got_state, want_state)
    # Every rank has the whole final state; each takes a share of its gradient.
    share = dstate * (rank_of(group) + 1) / sum(range(group.size() + 1))
    found = gradients((got, got_state), [parts[n] for n in names], (cut_out(dy, time_axis), share))
    for name, gradient, whole in zip(names, found, wanted, strict=True):
        axis = axes.get(name)
        if axis is None:
            close(summed(gradient, group), whole)
        else:
            close(gradient, cut_out(whole, axis))


def every(group):
    for cut in CUTS[group.size()]:
        for layout in LAYOUTS.values():
            yield cut, layout


def case_conv(group):
    def conv(run, t, seq_meta):
        return run.dw_causal_conv(
            t["x"],
            t["weight"],
            t["bias"],
            initial_state=t["initial"],
            return_final_state=True,
            seq_meta=seq_meta,
        )

    for cut, layout in every(group):
        for width in (1, 2, 4):
            tensors = {
                "x": leaf(BATCH, 3, LENGTH),
                "weight": leaf(3, width),
                "bias": leaf(3),
                "initial": leaf(BATCH, 3, width - 1),
            }
            check(conv, tensors, {"x": 2}, 2, group, cut, layout)


def scan(run, t, seq_meta):
    return run.selective_scan(
        *(t[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "dt_bias")),
        True,
        True,
        initial_state=t["initial"],
        seq_meta=seq_meta,
    )


def scan_tensors(dtype=torch.float64):
    return {
        "u": leaf(BATCH, 3, LENGTH, dtype=dtype),
        "delta": leaf(BATCH, 3, LENGTH, dtype=dtype),
        "A": (-torch.rand(3, 2, dtype=dtype)).requires_grad_(),
        "B": leaf(BATCH, 2, LENGTH, dtype=dtype),
        "C": leaf(BATCH, 2, LENGTH, dtype=dtype),
        "D": leaf(3, dtype=dtype),
        "z": leaf(BATCH, 3, LENGTH, dtype=dtype),
        "dt_bias": leaf(3, dtype=dtype),
        "initial": leaf(BATCH, 3, 2, dtype=dtype),
    }


SCAN_AXES = {"u": 2, "delta": 2, "B": 2, "C": 2, "z": 2}


def case_selective_scan(group):
    for cut, layout in every(group):
        check(scan, scan_tensors(), SCAN_AXES, 2, group, cut, layout)


def ssd(run, t, seq_meta):
    return run.ssd_chunk_scan(
        *(t[name] for name in ("X", "dt", "A", "B", "C")),
        4,
        t["D"],
        t["z"],
        seq_meta,
        t["initial"],
        dt_bias=t["dt_bias"],
        softplus=True,
        dt_limit=(0.1, 1.5),
        return_final_states=True,
    )


def ssd_tensors(dtype=torch.float64):
    return {
        "X": leaf(BATCH, LENGTH, 4, 3, dtype=dtype),
        "dt": leaf(BATCH, LENGTH, 4, dtype=dtype),
        "A": (-torch.rand(4, dtype=dtype)).requires_grad_(),
        "B": leaf(BATCH, LENGTH, 2, 5, dtype=dtype),
        "C": leaf(BATCH, LENGTH, 2, 5, dtype=dtype),
        "D": leaf(4, dtype=dtype),
        "z": leaf(BATCH, LENGTH, 4, 3, dtype=dtype),
        "dt_bias": leaf(4, dtype=dtype),
        "initial": leaf(BATCH, 4, 3, 5, dtype=dtype),
    }


SSD_AXES = dict.fromkeys(("X", "dt", "B", "C", "z"), 1)


def case_ssd_chunk_scan(group):
    for cut, layout in every(group):
        check(ssd, ssd_tensors(), SSD_AXES, 1, group, cut, layout)


def case_float32(group):
    for cut, layout in [(CUTS[2][0], LAYOUTS["packed"]), (CUTS[2][1], LAYOUTS["whole"])]:
        check(scan, scan_tensors(torch.float32), SCAN_AXES, 2, group, cut, layout)
        check(ssd, ssd_tensors(torch.float32), SSD_AXES, 1, group, cut, layout)


def mixers():
    torch.manual_seed(3)
    settings = {"d_state": 3, "dtype": torch.float64}
    return [
        Mamba1(4, **settings),
        Mamba2(4, headdim=4, ngroups=2, bias=True, d_ssm=8, expand=4, **settings),
        Mamba2(4, headdim=4, rmsnorm=False, d_conv=1, **settings),
        MHA(4, 2, 1, d_conv=3, rotary_emb_dim=2, causal=True, dtype=torch.float64),
        MHA(4, 2, softmax_scale=3.0, dtype=torch.float64),
    ]


def case_mixers(group):
    """Content of padding is NaN; with and without gradients."""
    for mixer in mixers():
        for cut, layout in every(group):
            mine = part(cut, group)
            x, dy = (torch.randn(BATCH, LENGTH, 4, dtype=torch.float64) for _ in range(2))
            if layout:
                keep = meta(layout, slice(None)).positions(BATCH, LENGTH) >= 0
                x = torch.where(keep[..., None], x, torch.nan)
            a, b = x.clone().requires_grad_(), x[:, mine].clone().requires_grad_()
            want = mixer(a, seq_meta=meta(layout, slice(None)))
            wanted = gradients(want, [a, *mixer.parameters()], dy)
            got = mixer(b, seq_meta=meta(layout, mine), context_group=group)
            close(got, want[:, mine])
            found = gradients(got, [b, *mixer.parameters()], dy[:, mine])
            close(found[0], wanted[0][:, mine])
            for gradient, whole in zip(found[1:], wanted[1:], strict=True):
                close(summed(gradient, group), whole)
            with torch.no_grad():
                again = mixer(b, seq_meta=meta(layout, mine), context_group=group)
            assert torch.equal(again, got)


def case_mixer_states(group):
    """Two calls over the ranks, then single steps, continue one state."""
    for mixer in mixers()[:3]:
        for cut in CUTS[group.size()]:
            mine = part(cut, group)
            x = torch.randn(BATCH, 2 * LENGTH + 2, 4, dtype=torch.float64)
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    want = mixer(x)
                    state = mixer.allocate_state(BATCH)
                    for start in (0, LENGTH):
                        steps = slice(start + mine.start, start + mine.stop)
                        got = mixer(x[:, steps], state=state, context_group=group)
                        close(got, want[:, steps])
                    close(mixer(x[:, -2:-1], state=state), want[:, -2:-1])
                    close(mixer(x[:, -1:], state=state), want[:, -1:])


def model(**kwargs):
    torch.manual_seed(7)
    config = MambaConfig(
        **{
            "d_model": 8,
            "n_layer": 3,
            "vocab_size": 16,
            "d_intermediate": 8,
            "ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 4},
            "attn_layer_idx": [1],
            "attn_cfg": {"num_heads": 2, "num_heads_kv": 1, "d_conv": 4, "rotary_emb_dim": 2},
            **kwargs,
        }
    )
    return MambaLMHeadModel(config, dtype=torch.float64)


def case_language_model(group):
    """The loss of a hybrid, whose labels are shifted across the boundaries, and all gradients."""
    ids = torch.randint(16, (BATCH, LENGTH + 1))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    for number, (cut, layout) in enumerate(every(group)):
        for recompute in (False, True) if number < 2 else (False,):
            lm = model()
            if recompute:
                lm.gradient_checkpointing_enable()
            mine = part(cut, group)
            weight = torch.ones(BATCH, LENGTH, dtype=torch.float64)
            if layout:
                weight = (meta(layout, slice(None)).positions(BATCH, LENGTH) >= 0).double()

            def loss(part, lm=lm, layout=layout, weight=weight, **kwargs):
                logits = lm(inputs[:, part], seq_meta=meta(layout, part), **kwargs).logits
                each = cross_entropy(logits.transpose(1, 2), targets[:, part], reduction="none")
                return (each * weight[:, part]).sum() / (BATCH * LENGTH)

            whole = loss(slice(None))
            wanted = gradients(whole, list(lm.parameters()))
            own = loss(mine, context_group=group)
            close(summed(own, group), whole.detach())
            found = gradients(own, list(lm.parameters()))
            for gradient, want in zip(found, wanted, strict=True):
                close(summed(gradient, group), want)


def case_model_states(group):
    """Prefill over the ranks; every rank then goes on alone, with the same text."""
    lm = model(attn_layer_idx=[], ssm_cfg={"layer": "Mamba1", "d_state": 4})
    ids = torch.randint(16, (BATCH, LENGTH))
    with torch.no_grad():
        a, b = lm.allocate_state(BATCH), lm.allocate_state(BATCH)
        mine = own_steps(LENGTH, group)
        want = lm(ids, state=a).logits
        close(lm(ids[:, mine], state=b, context_group=group).logits, want[:, mine])
        assert b.seqlen_offset == a.seqlen_offset == LENGTH
        new = torch.randint(16, (BATCH, 1))
        close(lm(new, state=b).logits, lm(new, state=a).logits)


def case_determinism(group):
    """Two runs give the same bits, and all ranks hold the same final state."""
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        tensors = ssd_tensors(torch.float32)
        steps, cut = own_steps(LENGTH, group), {}
        for name, tensor in tensors.items():
            tensor = tensor.detach()[:, steps] if name in SSD_AXES else tensor.detach()
            cut[name] = tensor.clone().requires_grad_()
        y, last = ssd(ContextOperators(group), cut, None)
        found.append([y, last, *gradients((y.sum(), last.square().sum()), list(cut.values()))])
        every_last = gathered(last, group)
        assert torch.equal(every_last[0], every_last[1])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def case_a_sum_leaves_its_parts(group):
    x = torch.ones(3)
    assert summed(x, group).tolist() == [2, 2, 2]
    assert x.tolist() == [1, 1, 1]


def case_parameters_and_gradients(group):
    """Buffers are copied as parameters are; a gradient that is missing counts as zeros."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    tensors = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(rank_of(group))
    copy_parameters(model, group)
    assert not any(tensor.any() for tensor in tensors)
    model[0].requires_grad_(False)
    model[1].weight.grad = torch.ones(2)
    sum_gradients(model, group)
    assert model[0].weight.grad is None
    assert model[1].weight.grad.tolist() == [2, 2]
    assert model[1].bias.grad.tolist() == [0, 0]


def case_training(group):
    """The same steps as one process; a stopped and resumed run is bitwise one that was not."""
    tokens = torch.randint(16, (200,))
    settings = {"steps": 4, "batch": 2, "seqlen": LENGTH, "warmup": 1, "lr": 1e-2}
    options = TrainOptions(**settings, checkpoint_every=2)
    whole, parallel, resumed = model(), model(), model()
    with torch.no_grad():
        for parameter in parallel.parameters():
            parameter.mul_(1 + rank_of(group))  # the first rank's values count
    want = train(whole, tokens, TrainOptions(**settings))
    got = train(parallel, tokens, options, context_group=group)
    close(torch.tensor([got.loss, got.grad_norm]), torch.tensor([want.loss, want.grad_norm]), 1e-9)
    for ours, theirs in zip(parallel.parameters(), whole.parameters(), strict=True):
        close(ours.detach(), theirs.detach(), 1e-9)

    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    folder = shared_folder(group)
    arguments = {"out": folder, "context_group": group}
    with pytest.raises(KeyboardInterrupt):
        train(model(), tokens, options, report=stop, **arguments)
    train(resumed, tokens, options, resume=True, **arguments)
    for ours, theirs in zip(resumed.parameters(), parallel.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def shared_folder(group):
    """Return a folder that the first rank makes and all know."""
    names = [tempfile.mkdtemp() if rank_of(group) == 0 else None]
    dist.broadcast_object_list(names, group=group)
    return Path(names[0])


def refuses(kind, text, function, *args, **kwargs):
    with pytest.raises(kind) as error:
        function(*args, **kwargs)
    assert str(error.value) == text, str(error.value)


def case_refusals(group):
    x = torch.zeros(1, 4, 4, dtype=torch.float64)
    mamba1, mamba2, *_, attention = mixers()
    rule = "must be a torch.distributed process group, got str"
    refuses(TypeError, f"Mamba1: context_group {rule}", mamba1, x, context_group="gloo")
    refuses(TypeError, f"Mamba2: context_group {rule}", mamba2, x, context_group="gloo")
    refuses(TypeError, f"MHA: context_group {rule}", attention, x, context_group="gloo")
    refuses(TypeError, f"ContextOperators: group {rule}", ContextOperators, "gloo")
    refuses(
        ValueError,
        "ContextOperators: group must be a process group, got None",
        *(ContextOperators, None),
    )
    refuses(TypeError, f"own_steps: group {rule}", own_steps, 4, "gloo")
    refuses(ValueError, "own_steps: seqlen must not be negative, got -1", own_steps, -1, group)
    refuses(TypeError, "own_steps: seqlen must be an int, got 5.0", own_steps, 5.0, group)
    packed = SeqMeta(cu_seqlens=torch.tensor([0, 4]))
    rule = "seq_meta must hold seq_idx or mask of this rank's steps"
    arguments = {"seq_meta": packed, "context_group": group}
    refuses(ValueError, f"ContextOperators: {rule}, got cu_seqlens", mamba1, x, **arguments)
    refuses(
        ValueError, f"MHA: {rule} with context_group, got cu_seqlens", attention, x, **arguments
    )
    state = attention.allocate_state(1)
    causal = MHA(4, 2, causal=True, dtype=torch.float64)
    refuses(
        ValueError,
        "MHA: state must be None with context_group, got one",
        *(causal, x),
        state=state,
        context_group=group,
    )
    lm, ids = model(), torch.zeros(1, 4, dtype=torch.long)
    refuses(
        ValueError,
        "MambaLMHeadModel: state must be None with context_group in a model with attention, "
        "got one",
        *(lm, ids),
        state=lm.allocate_state(1),
        context_group=group,
    )
    refuses(
        ValueError,
        "MambaLMHeadModel: cu_seqlens must be None with context_group, which takes seq_idx, "
        "got one",
        *(lm, ids),
        cu_seqlens=torch.tensor([0, 4]),
        context_group=group,
    )
    refuses(
        TypeError,
        "MambaLMHeadModel: context_group must be a torch.distributed process group, got int",
        *(lm, ids),
        context_group=2,
    )
