"""The shape of a language model, and its JSON form."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ssm.utils.json_file import read_json

# Fields that the state-spaces format does not have.
OUR_FIELDS = (
    "norm_epsilon",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_multiplier",
    "mlp_cfg",
    "mlp_layer_idx",
    "parallel_cfg",
    "foreign",
)


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
        norm_epsilon: eps of every norm of the residual stream. Like the fields below no key of the
            state-spaces format, and written only if it differs from its default.
        embedding_multiplier: factor of the embedding.
        residual_multiplier: factor of what each mixer and MLP adds to the residual stream.
        logits_multiplier: factor of the logits.
        mlp_cfg: arguments of the MLP; key "layer" names its class, "GatedMLP" (if absent) or "MLP".
        mlp_layer_idx: blocks that are an MLP alone; if there are any, the others have none.
        parallel_cfg: if not None, the blocks of attn_layer_idx have the attention beside the
            mixer of ssm_cfg, not in its place; arguments of ``ParallelMixer``.
        foreign: fields of a config in another format that have no meaning here; kept, so that
            ``save_pretrained(format="hf")`` can write them again.

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
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    mlp_cfg: dict = field(default_factory=dict)
    mlp_layer_idx: list[int] = field(default_factory=list)
    parallel_cfg: dict | None = None
    foreign: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_integers("MambaConfig", {f.name: getattr(self, f.name) for f in fields(self)})
        for name in ("d_model", "d_intermediate", "n_layer", "vocab_size"):
            lowest = 1 if name in ("d_model", "vocab_size") else 0
            _check_int(name, getattr(self, name), lowest)
        _check_int("pad_vocab_size_multiple", self.pad_vocab_size_multiple, 1)
        for name in ("ssm_cfg", "attn_cfg", "mlp_cfg", "parallel_cfg", "foreign"):
            value = getattr(self, name)
            if not isinstance(value, dict) and not (name == "parallel_cfg" and value is None):
                raise TypeError(f"MambaConfig: {name} must be a dict, got {value!r}")
        for name in ("rms_norm", "residual_in_fp32", "fused_add_norm", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"MambaConfig: {name} must be a bool, got {getattr(self, name)!r}")
        for name in ("attn_layer_idx", "mlp_layer_idx"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise TypeError(f"MambaConfig: {name} must be a list, got {getattr(self, name)!r}")
            setattr(self, name, list(getattr(self, name)))
            for index in getattr(self, name):
                _check_int(name, index, 0)
                if index >= self.n_layer:
                    raise ValueError(
                        f"MambaConfig: {name} must be below {self.n_layer}, got {index}"
                    )
        both = set(self.attn_layer_idx) & set(self.mlp_layer_idx)
        if both:
            raise ValueError(
                "MambaConfig: mlp_layer_idx must not name blocks of attn_layer_idx, "
                f"got {sorted(both)}"
            )
        if self.mlp_layer_idx and not self.d_intermediate:
            raise ValueError(
                "MambaConfig: d_intermediate must be positive with mlp_layer_idx, got 0"
            )
        _check_positive("norm_epsilon", self.norm_epsilon)
        for name in ("embedding_multiplier", "residual_multiplier", "logits_multiplier"):
            _check_positive(name, getattr(self, name))

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
        values = read_json(Path(path), "MambaConfig")
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error} in {path}") from error

    def to_dict(self) -> dict:
        """Return the JSON values, in the state-spaces format."""
        values = asdict(self)
        usual = asdict(type(self)())
        for name in OUR_FIELDS:
            if values[name] == usual[name]:
                del values[name]
        return values

    def to_json(self) -> str:
        """Return the text of config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def check_integers(owner: str, value: object, path: str = "") -> None:
    """Refuse integers that no tensor can have as a size, nor torch take as a number.

    Args:
        owner: class or format, for messages.
        value: of a config, dicts and lists in it included.
        path: of the value in the config, for messages.

    Raises:
        ValueError: an integer needs more than 64 bits; the message names its field.
    """
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in pairs:
            check_integers(owner, inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        # Not the integer itself: Python refuses to print very large ones.
        raise ValueError(
            f"{owner}: {path} must be an integer of at most 64 bits, "
            f"got one of {value.bit_length() + 1} bits"
        )


def _check_positive(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"MambaConfig: {name} must be a float, got {value!r}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"MambaConfig: {name} must be positive, got {value}")


def _check_int(name: str, value, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"MambaConfig: {name} must be an int, got {value!r}")
    if value < lowest:
        rule = "be positive" if lowest else "not be negative"
        raise ValueError(f"MambaConfig: {name} must {rule}, got {value}")
