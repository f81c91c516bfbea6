"""What scripts take from ``mamba_ssm.utils.generation``: decoding for models of their own.

:class:`GenerationMixin` gives ``generate`` to any module that is called as models of ``mamba_ssm``
are and that has ``allocate_inference_cache``. Our own models have more in ``generate``.
"""

import operator
import time

import torch

from ssm.compat.classes import InferenceParams
from ssm.ops.python.check import check_int, check_tensor
from ssm.utils import generation
from ssm.utils.generation import GenerateOutput, Sampling, penalize_repetition

__all__ = ["GenerationMixin", "decode", "sample"]


def sample(logits, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0):
    """Take one token per row.

    Args:
        logits: (B, V), floating point.
        top_k: sample among the k likeliest tokens; 1 is greedy, 0 is no limit.
        top_p: sample within the smallest set with that probability mass; 0 or 1 is no limit.
        min_p: sample among tokens at least min_p times as likely as the likeliest; 0 is no limit.
            (Upstream compares logits there, not probabilities.)
        temperature: divides the logits; 0 is greedy.

    Returns:
        (B,) int64.

    Raises:
        ValueError: an argument is out of its range.

    Source:
        Interface of mamba_ssm 2.3.
    """
    check_tensor("sample", "logits", logits, {"B, V": tuple("BV")})
    return generation.sample(logits, Sampling(top_k, top_p, min_p, temperature))


@torch.no_grad()
def decode(
    input_ids,
    model,
    max_length,
    top_k=1,
    top_p=0.0,
    min_p=0.0,
    temperature=1.0,
    repetition_penalty=1.0,
    eos_token_id=None,
    teacher_outputs=None,
    vocab_size=None,
    cg=False,
    enable_timing=False,
    output_scores=False,
    streamer=None,
):
    """Continue token sequences with a model that keeps its state in inference_params.

    Args:
        input_ids: (B, L) int, prompts, L > 0.
        model: called with (ids, position_ids=, inference_params=, num_last_tokens=1); it returns
            what has ``logits`` (B, 1, V).
        max_length: length of the result, prompt included.
        top_k: as of :func:`sample`, like the next three.
        top_p: mass of the set that is sampled from.
        min_p: least probability, relative to the likeliest.
        temperature: divides the logits.
        repetition_penalty: divides positive and multiplies negative logits of tokens that the row
            already holds; 1 is off.
        eos_token_id: the loop ends when all rows produced it in one step.
        teacher_outputs: (B, T) int; position i of the result is teacher_outputs[:, i] where i < T.
        vocab_size: columns of the logits that are tokens; None takes all.
        cg: accepted; a CUDA graph changes no token, and ``MambaLMHeadModel.generate`` has one.
        enable_timing: keep the seconds in the result.
        output_scores: keep the logits of every step in it.
        streamer: object with ``put`` and ``end``.

    Returns:
        A GenerateOutput: ``sequences`` (B, length), ``scores``, ``seconds``.

    Raises:
        ValueError: an argument is out of its range; the message names it.
        TypeError: input_ids are no tensor, or max_length is no int.

    Source:
        Interface of mamba_ssm 2.3.
    """
    if not isinstance(input_ids, torch.Tensor):
        got = type(input_ids).__name__
        raise TypeError(f"decode: input_ids must be a torch.Tensor, got {got}")
    if input_ids.ndim != 2 or not input_ids.shape[1]:
        got = tuple(input_ids.shape)
        raise ValueError(f"decode: input_ids must have shape (B, L) with L > 0, got {got}")
    try:
        max_length = operator.index(max_length)
    except TypeError:
        raise TypeError(f"decode: max_length must be an int, got {max_length!r}") from None
    batch, length = input_ids.shape
    if max_length <= length:
        raise ValueError(f"decode: max_length must be above {length}, got {max_length}")
    sampling = Sampling(top_k, top_p, min_p, temperature, repetition_penalty)
    if teacher_outputs is not None:
        form = {"B, T": (batch, "T")}
        integers = (torch.int32, torch.int64)
        check_tensor("decode", "teacher_outputs", teacher_outputs, form, input_ids.device, integers)
    if vocab_size is not None:
        check_int("decode", "vocab_size", vocab_size, 1)
    if eos_token_id is not None:
        check_int("decode", "eos_token_id", eos_token_id, 0)
    if not callable(model):
        raise TypeError(f"decode: model must be callable, got {type(model).__name__}")
    taught = 0 if teacher_outputs is None else teacher_outputs.shape[1]
    start, sequences, scores = time.perf_counter(), input_ids, []
    memory = InferenceParams(max_seqlen=max_length, max_batch_size=batch)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    tokens = input_ids
    while sequences.shape[1] < max_length:
        offset = memory.seqlen_offset
        positions = None if offset == 0 else torch.full_like(tokens, offset)
        output = model(tokens, position_ids=positions, inference_params=memory, num_last_tokens=1)
        memory.seqlen_offset += tokens.shape[1]
        logits = output.logits[:, -1, :vocab_size]
        if output_scores:
            scores.append(logits)
        if sequences.shape[1] < taught:
            tokens = teacher_outputs[:, sequences.shape[1], None]
        else:
            if repetition_penalty != 1:
                seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(
                    1, sequences.long(), True
                )
                logits = penalize_repetition(logits, seen, repetition_penalty)
            tokens = generation.sample(logits, sampling)[:, None]
        sequences = torch.cat([sequences, tokens.to(sequences.dtype)], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        if eos_token_id is not None and (tokens == eos_token_id).all():
            break
    if streamer is not None:
        streamer.end()
    if enable_timing and sequences.is_cuda:
        torch.cuda.synchronize(sequences.device)
    seconds = time.perf_counter() - start if enable_timing else None
    return GenerateOutput(sequences, tuple(scores) if output_scores else None, seconds)


class GenerationMixin:
    """Gives ``generate`` to a module with the forward of a ``mamba_ssm`` language model."""

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """Return the zero state of all layers; for the class that mixes this in to define."""
        raise NotImplementedError

    def generate(
        self,
        input_ids,
        max_length,
        top_k=1,
        top_p=0.0,
        min_p=0.0,
        temperature=1.0,
        return_dict_in_generate=False,
        output_scores=False,
        **kwargs,
    ):
        """Continue token sequences; arguments of :func:`decode`, and one.

        Args:
            input_ids: (B, L) int, prompts.
            max_length: length of the result, prompt included.
            top_k: sample among the k likeliest tokens; 1 is greedy.
            top_p: mass of the set that is sampled from.
            min_p: least probability, relative to the likeliest.
            temperature: divides the logits.
            return_dict_in_generate: return all that decode returns, not the sequences alone.
            output_scores: keep the logits of every step.
            **kwargs: the other arguments of decode.

        Returns:
            (B, length), or a GenerateOutput.
        """
        output = decode(
            input_ids,
            self,
            max_length,
            top_k,
            top_p,
            min_p,
            temperature,
            output_scores=output_scores,
            **kwargs,
        )
        return output if return_dict_in_generate else output.sequences
