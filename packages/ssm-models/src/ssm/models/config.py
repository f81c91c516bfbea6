"""The shape of a language model, and its JSON form."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


@dataclass
class MambaConfig:
    """Hyperparameters of ``MambaLMHeadModel``; the JSON keys of the state-spaces checkpoints.

    Args:
        d_model: width of the residual stream.
        d_intermediate: inner width of the GatedMLP in each block; 0 for none.
        n_layer: number of blocks.
        vocab_size: number of tokens, before padding.
        ssm_cfg: arguments of the mixer; key "layer" names its class, "Mamba1" (if absent) or
            "Mamba2".
        attn_layer_idx: blocks whose mixer is attention.
        attn_cfg: arguments of the attention.
        rms_norm: RMSNorm, else LayerNorm.
        residual_in_fp32: keep the residual stream in float32.
        fused_add_norm: addition and norm by one operator.
        pad_vocab_size_multiple: the embedding has vocab_size rounded up to a multiple of this rows.
        tie_embeddings: lm_head shares the weight of the embedding.
        norm_epsilon: eps of every norm. Not a key of the state-spaces format: written only if it
            differs from its default.

    Raises:
        ValueError: a value is out of its range.
        TypeError: a value has the wrong Python type.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
    norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("d_model", "d_intermediate", "n_layer", "vocab_size"):
            lowest = 1 if name in ("d_model", "vocab_size") else 0
            _check_int(name, getattr(self, name), lowest)
        _check_int("pad_vocab_size_multiple", self.pad_vocab_size_multiple, 1)
        for name, kind in (
            ("ssm_cfg", dict),
            ("attn_cfg", dict),
            ("attn_layer_idx", (list, tuple)),
        ):
            if not isinstance(getattr(self, name), kind):
                word = "a list" if name == "attn_layer_idx" else "a dict"
                raise TypeError(f"MambaConfig: {name} must be {word}, got {getattr(self, name)!r}")
        for name in ("rms_norm", "residual_in_fp32", "fused_add_norm", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"MambaConfig: {name} must be a bool, got {getattr(self, name)!r}")
        self.attn_layer_idx = list(self.attn_layer_idx)
        for index in self.attn_layer_idx:
            _check_int("attn_layer_idx", index, 0)
            if index >= self.n_layer:
                raise ValueError(
                    f"MambaConfig: attn_layer_idx must be below {self.n_layer}, got {index}"
                )
        epsilon = self.norm_epsilon
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)):
            raise TypeError(f"MambaConfig: norm_epsilon must be a float, got {epsilon!r}")
        if not (epsilon > 0 and math.isfinite(epsilon)):
            raise ValueError(f"MambaConfig: norm_epsilon must be positive, got {epsilon}")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of pad_vocab_size_multiple."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    @classmethod
    def from_dict(cls, values: dict) -> MambaConfig:
        """Make a config from JSON values; a field that is absent takes its default.

        Raises:
            ValueError: a field is not known (the nearest name is proposed) or out of its range.
            TypeError: values is no dict, or a value has the wrong type.
        """
        if not isinstance(values, dict):
            raise TypeError(f"MambaConfig: values must be a dict, got {type(values).__name__}")
        known = [entry.name for entry in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(
                    f"MambaConfig: field must be one of {', '.join(known)}, got {name!r}{hint}"
                )
        return cls(**values)

    @classmethod
    def from_json(cls, path: str | Path) -> MambaConfig:
        """Read a config.json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no JSON object, or a field is wrong; the message names the file.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"MambaConfig: {path} must be a JSON file, got {error}") from error
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error} in {path}") from error

    def to_dict(self) -> dict:
        """Return the JSON values, in the state-spaces format."""
        values = asdict(self)
        if self.norm_epsilon == type(self).norm_epsilon:
            del values["norm_epsilon"]
        return values

    def to_json(self) -> str:
        """Return the text of config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _check_int(name: str, value, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"MambaConfig: {name} must be an int, got {value!r}")
    if value < lowest:
        rule = "be positive" if lowest else "not be negative"
        raise ValueError(f"MambaConfig: {name} must {rule}, got {value}")
