"""What scripts take from ``mamba_ssm.models.mixer_seq_simple`` and ``mamba_ssm.utils.hf``."""

from functools import partial

from ssm.models import build, lm
from ssm.models.build import init_weights as _init_weights
from ssm.models.config import MambaConfig
from ssm.modules.arguments import check_int

__all__ = ["MixerModel", "create_block", "load_config_hf", "load_state_dict_hf"]


def create_block(
    d_model,
    d_intermediate,
    ssm_cfg=None,
    attn_layer_idx=None,
    attn_cfg=None,
    norm_epsilon=1e-5,
    rms_norm=False,
    residual_in_fp32=False,
    fused_add_norm=False,
    layer_idx=None,
    device=None,
    dtype=None,
):
    """Build one block of a model.

    Args:
        d_model: width of the residual stream.
        d_intermediate: inner width of a GatedMLP; 0 for none.
        ssm_cfg: arguments of the mixer; key "layer" names its class, "Mamba1" (if absent) or
            "Mamba2".
        attn_layer_idx: blocks whose mixer is attention.
        attn_cfg: arguments of the attention.
        norm_epsilon: eps of the norms.
        rms_norm: RMSNorm, else LayerNorm.
        residual_in_fp32: keep the residual stream in float32.
        fused_add_norm: addition and norm by one operator.
        layer_idx: which block; the mixer keeps its state under this key.
        device: where the parameters live.
        dtype: of the parameters.

    Returns:
        The block, with ``layer_idx`` as an attribute.

    Raises:
        ValueError: an argument that the mixer does not take, or a size that does not fit.
        TypeError: a value of the wrong Python type.

    Source:
        Interface of mamba_ssm 2.3.
    """
    if layer_idx is not None:
        check_int("create_block", "layer_idx", layer_idx, 0)
    if attn_layer_idx is not None and not isinstance(attn_layer_idx, (list, tuple)):
        raise TypeError(f"create_block: attn_layer_idx must be a list, got {attn_layer_idx!r}")
    for index in attn_layer_idx or ():
        check_int("create_block", "attn_layer_idx", index, 0)
    layers = [-1 if layer_idx is None else layer_idx, *(attn_layer_idx or ())]
    config = _config(
        d_model=d_model,
        n_layer=max(layers) + 1,
        d_intermediate=d_intermediate,
        vocab_size=1,
        ssm_cfg=ssm_cfg,
        attn_layer_idx=attn_layer_idx,
        attn_cfg=attn_cfg,
        norm_epsilon=norm_epsilon,
        rms_norm=rms_norm,
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block = build.create_block(config, layer_idx, device, dtype)
    block.layer_idx = layer_idx
    return block


class MixerModel(lm.MixerModel):
    """:class:`ssm.models.lm.MixerModel` with the arguments of upstream's, initialised as there.

    Args:
        d_model: width of the residual stream.
        n_layer: number of blocks.
        d_intermediate: inner width of the GatedMLP in each block; 0 for none.
        vocab_size: rows of the embedding.
        ssm_cfg: arguments of the mixers; key "layer" names their class.
        attn_layer_idx: blocks whose mixer is attention.
        attn_cfg: arguments of the attention.
        norm_epsilon: eps of the norms.
        rms_norm: RMSNorm, else LayerNorm.
        initializer_cfg: arguments of ``_init_weights``.
        fused_add_norm: addition and norm by one operator.
        residual_in_fp32: keep the residual stream in float32.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        input_ids (B, L) -> (B, L, d_model).
    """

    def __init__(
        self,
        d_model,
        n_layer,
        d_intermediate,
        vocab_size,
        ssm_cfg=None,
        attn_layer_idx=None,
        attn_cfg=None,
        norm_epsilon=1e-5,
        rms_norm=False,
        initializer_cfg=None,
        fused_add_norm=False,
        residual_in_fp32=False,
        device=None,
        dtype=None,
    ):
        config = _config(
            d_model=d_model,
            n_layer=n_layer,
            d_intermediate=d_intermediate,
            vocab_size=vocab_size,
            ssm_cfg=ssm_cfg,
            attn_layer_idx=attn_layer_idx,
            attn_cfg=attn_cfg,
            norm_epsilon=norm_epsilon,
            rms_norm=rms_norm,
            fused_add_norm=fused_add_norm,
            residual_in_fp32=residual_in_fp32,
        )
        if initializer_cfg is not None and not isinstance(initializer_cfg, dict):
            raise TypeError(f"MixerModel: initializer_cfg must be a dict, got {initializer_cfg!r}")
        super().__init__(config, device, dtype)
        settings = {"n_residuals_per_layer": 2 if d_intermediate else 1, **(initializer_cfg or {})}
        self.apply(partial(_init_weights, n_layer=n_layer, **settings))

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """Return block -> zero state of its mixer; see there for shapes."""
        return {
            index: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for index, layer in enumerate(self.layers)
        }


def load_config_hf(model_name):
    """Return the config of a checkpoint as a dict, with the keys of the state-spaces format.

    Args:
        model_name: directory, or name on the Hugging Face hub, in any format of docs/weights.md.

    Returns:
        What ``MambaConfig(**config)`` takes.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: as ``MambaLMHeadModel.from_pretrained``.

    Source:
        Interface of mamba_ssm 2.3.
    """
    from ssm.utils.checkpoint import open_checkpoint
    from ssm.utils.hub import find_directory

    return open_checkpoint(find_directory(model_name)).config.to_dict()


def load_state_dict_hf(model_name, device=None, dtype=None):
    """Return the parameters of a checkpoint under the names of ``MambaLMHeadModel``.

    Args:
        model_name: directory, or name on the Hugging Face hub, in any format of docs/weights.md.
        device: where the tensors shall live.
        dtype: of the tensors; None keeps the dtype of the file, but A_log, D and the bias of the
            step sizes are float32 or better in any case.

    Returns:
        name -> tensor, of all parameters or an error.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: as ``MambaLMHeadModel.from_pretrained``.

    Source:
        Interface of mamba_ssm 2.3.
    """
    kind = "auto" if dtype is None else dtype
    model = lm.MambaLMHeadModel.from_pretrained(model_name, device=device, dtype=kind)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _config(ssm_cfg, attn_layer_idx, attn_cfg, **others) -> MambaConfig:
    """Return the config of arguments of upstream's, where None is an empty one."""
    return MambaConfig(
        ssm_cfg={} if ssm_cfg is None else ssm_cfg,
        attn_layer_idx=[] if attn_layer_idx is None else attn_layer_idx,
        attn_cfg={} if attn_cfg is None else attn_cfg,
        pad_vocab_size_multiple=1,
        **others,
    )
