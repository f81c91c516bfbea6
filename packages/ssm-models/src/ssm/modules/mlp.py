"""Two-layer feed-forward networks, with a gate and without."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ssm import ops
from ssm.distributed.collectives import check_group
from ssm.distributed.layout import Section
from ssm.modules.arguments import check_dtype, check_int, check_number
from ssm.modules.sequence import check_input
from ssm.modules.tensor_parallel import check_split, column_linear, row_linear
from ssm.ops.projection import project


class GatedMLP(nn.Module):
    """Gated MLP ``fc2(up * activation(gate))``; SwiGLU by default (Shazeer 2020, arXiv:2002.05202).

    The rows of ``fc1`` are (up, gate), as in the state-spaces checkpoints.

    Args:
        in_features: width of the input.
        hidden_features: inner width before rounding; None takes 8/3 of in_features.
        out_features: width of the output; None takes in_features.
        activation: applied to the gate.
        bias: whether both linears have a bias.
        multiple_of: the inner width is rounded up to a multiple of this.
        gate_multiplier: factor of the gate before its activation (muP, Falcon-H1).
        out_multiplier: factor of the result.
        device: where the parameters live.
        dtype: of the parameters.
        process_group: ranks among which the inner width is split; one rank is as None.
        sequence_parallel: with several ranks, whether input and output hold only this rank's part
            of the tokens, along axis 0; else they are whole on every rank.

    Shape:
        (..., in_features) -> (..., out_features), dtype of the input.

    Raises:
        TypeError: process_group is no process group.
        ValueError: a width is not positive, or the ranks cannot split it evenly.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device=None,
        dtype=None,
        *,
        gate_multiplier: float = 1.0,
        out_multiplier: float = 1.0,
        process_group=None,
        sequence_parallel: bool = True,
    ) -> None:
        super().__init__()
        check_dtype("GatedMLP", dtype)
        if out_features is None:
            out_features = in_features
        if hidden_features is None:
            check_int("GatedMLP", "in_features", in_features)
            hidden_features = 8 * in_features // 3
        for name, value in (
            ("in_features", in_features),
            ("hidden_features", hidden_features),
            ("out_features", out_features),
            ("multiple_of", multiple_of),
        ):
            check_int("GatedMLP", name, value)
        factors = {"gate_multiplier": gate_multiplier, "out_multiplier": out_multiplier}
        for name, value in factors.items():
            check_number("GatedMLP", name, value)
            if not math.isfinite(value):
                raise ValueError(f"GatedMLP: {name} must be finite, got {value}")
        hidden_features = -(-hidden_features // multiple_of) * multiple_of
        self.in_features = in_features
        self.activation = activation
        self.gate_multiplier = gate_multiplier
        self.out_multiplier = out_multiplier
        factory = {"device": device, "dtype": dtype}
        split = sections = None
        ranks = check_group("GatedMLP", "process_group", process_group)
        if ranks > 1:
            check_split("GatedMLP", "hidden_features, rounded,", hidden_features, ranks)
            split, sections = (process_group, sequence_parallel), (Section(hidden_features, ranks),)
        self.fc1 = column_linear(
            in_features, 2 * hidden_features, bias, split, sections and sections * 2, **factory
        )
        self.fc2 = row_linear(hidden_features, out_features, bias, split, sections, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        check_input("GatedMLP", "x", x, self.in_features)
        up, gate = project(self.fc1, x).chunk(2, dim=-1)
        if self.gate_multiplier != 1:
            gate = gate * self.gate_multiplier
        if self.activation is F.silu:
            y = project(self.fc2, ops.swiglu(gate, up))
        else:
            y = project(self.fc2, up * self.activation(gate))
        return y if self.out_multiplier == 1 else y * self.out_multiplier


ACTIVATIONS = {"relu2": lambda x: F.relu(x).square(), "silu": F.silu}


class MLP(nn.Module):
    """Feed-forward network without a gate, ``fc2(activation(fc1(x)))`` (Nemotron-H).

    Args:
        in_features: width of input and output.
        hidden_features: inner width.
        activation: "relu2" (So et al. 2021, arXiv:2109.08668) or "silu".
        bias: whether both linears have a bias.
        device: where the parameters live.
        dtype: of the parameters.
        process_group: ranks among which the inner width is split; one rank is as None.
        sequence_parallel: as in ``GatedMLP``.

    Shape:
        (..., in_features) -> (..., in_features), dtype of the input.

    Raises:
        TypeError: process_group is no process group.
        ValueError: a width is not positive, the activation is not known, or the ranks cannot split
            the inner width evenly.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        activation: str = "relu2",
        bias: bool = False,
        device=None,
        dtype=None,
        *,
        process_group=None,
        sequence_parallel: bool = True,
    ) -> None:
        super().__init__()
        check_dtype("MLP", dtype)
        for name, value in (("in_features", in_features), ("hidden_features", hidden_features)):
            check_int("MLP", name, value)
        if activation not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"MLP: activation must be one of {names}, got {activation!r}")
        self.in_features = in_features
        self.activation = activation
        factory = {"device": device, "dtype": dtype}
        split = sections = None
        ranks = check_group("MLP", "process_group", process_group)
        if ranks > 1:
            check_split("MLP", "hidden_features", hidden_features, ranks)
            split, sections = (process_group, sequence_parallel), (Section(hidden_features, ranks),)
        self.fc1 = column_linear(in_features, hidden_features, bias, split, sections, **factory)
        self.fc2 = row_linear(hidden_features, in_features, bias, split, sections, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., in_features)."""
        check_input("MLP", "x", x, self.in_features)
        return project(self.fc2, ACTIVATIONS[self.activation](project(self.fc1, x)))
