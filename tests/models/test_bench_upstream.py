"""tools/bench.py --mamba-repo: upstream's functions are called with what ours are called with.

Judge: functions with upstream's names and arguments that follow the formulas, in a repository made
here; the operators' references.
"""

import sys

import pytest
import torch

from tests.clones import commit_all
from tools import bench, upstream_peers, verify
from tools.goldens import clone
from tools.goldens.files import Fault

SCAN = """
from ssm.ops.python import reference

def selective_scan_ref(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    return reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
"""
STEP = """
import torch.nn.functional as F
import triton

def selective_state_update_ref(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False
):
    if state.dim() == 3:
        return selective_state_update_ref(
            *(t.unsqueeze(1) for t in (state, x, dt)), A[None], *(t.unsqueeze(1) for t in (B, C)),
            D[None], z.unsqueeze(1), dt_bias[None], dt_softplus,
        ).squeeze(1)
    assert dt.shape == x.shape and A.shape == state.shape[1:] and D.shape == x.shape[1:]
    dt = F.softplus(dt + dt_bias)
    heads = state.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(heads, 1)[:, :, None] for t in (B, C))
    state.copy_(state * (dt[..., None] * A).exp() + B * (dt * x)[..., None])
    return ((state * C).sum(-1) + D * x) * F.silu(z)
"""
MINIMAL = """
import torch

def ssd_minimal_discrete(X, A, B, C, block_len, initial_states=None):
    assert X.shape[1] % block_len == 0 and B.shape[2] == X.shape[2]
    state, rows = X.new_zeros(X.shape[0], *X.shape[2:], B.shape[3]), []
    for x, a, b, c in zip(*(t.unbind(1) for t in (X, A, B, C))):
        state = state * a.exp()[..., None, None] + x[..., None] * b[:, :, None]
        rows.append((state * c[:, :, None]).sum(-1))
    return torch.stack(rows, 1), state
"""
FILES = {
    "ops/selective_scan_interface.py": SCAN,
    "ops/triton/selective_state_update.py": STEP,
    "modules/ssd_minimal.py": MINIMAL,
}


@pytest.fixture
def repository(tmp_path):
    """A clone of something with upstream's functions; what was imported of it is forgotten."""
    for name, text in FILES.items():
        path = tmp_path / "mamba_ssm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    commit_all(tmp_path)
    before = dict(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - set(before):
        if name.partition(".")[0] == "mamba_ssm":
            del sys.modules[name]


@pytest.mark.parametrize("op", ["selective_scan", "selective_state_step", "ssd_chunk_scan"])
def test_upstreams_functions_agree_with_the_reference(repository, op):
    peers = upstream_peers.load(repository)[op]
    assert len({peer.name for peer in peers}) == len(peers)
    module = bench.workloads_of(op)
    for case in module.CASES:
        small = case.reduced(seqlen=37, dim=24, nheads=4, batch=2)
        problem = module.setup(small, torch.device("cpu"))
        if problem.args[0].dtype == torch.float32:
            verify.verify(op, problem, problem, {peer.name: peer.function for peer in peers})


def test_a_clone_without_the_functions_is_refused(repository):
    (repository / "mamba_ssm/modules/ssd_minimal.py").write_text("")
    with pytest.raises(Fault, match=r"--mamba-repo must .* no attribute 'ssd_minimal_discrete'"):
        upstream_peers.load(repository)
    with pytest.raises(Fault, match="without changes, got 1"):
        clone.check(clone.MAMBA, repository, allow_other_commit=True)


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        ((), 1, "--mamba-repo must be the root of a git clone of state-spaces/mamba, got"),
        (("--device", "cuda"), 2, "--mamba-repo must go with --device cpu, got cuda"),
    ],
)
def test_what_is_no_clone_is_refused(monkeypatch, capsys, tmp_path, options, status, sentence):
    monkeypatch.setattr(sys, "argv", ["bench", "--mamba-repo", str(tmp_path), *options])
    try:
        found = bench.main()
    except SystemExit as stop:
        found = stop.code
    assert found == status
    assert sentence in capsys.readouterr().err
