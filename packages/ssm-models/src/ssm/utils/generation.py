"""The loop over generated tokens: filter, sample, step, stop."""

from __future__ import annotations

import difflib
import inspect
import itertools
import math
import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssm.modules.arguments import check_number
from ssm.modules.precision import at_least_fp32
from ssm.state import State
from ssm.utils.decoding_graph import Decoder


@dataclass
class GenerateOutput:
    """What ``generate`` returns with ``return_dict_in_generate``.

    Args:
        sequences: (B, length) int64, prompts and what followed.
        scores: with ``output_scores`` one (B, V) tensor per new token: the logits as the model gave
            them, in its dtype, those of padding columns included; where ``vocab_size`` was given,
            as many columns. Else None.
        seconds: with ``enable_timing`` the time that prompt and decoding took; else None.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken from logits; fields as the arguments of ``generate``."""

    top_k: int = 1
    top_p: float = 0.0
    min_p: float = 0.0
    temperature: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", _integer("top_k", self.top_k))
        _check(self.top_k >= 0, "top_k", "not be negative", self.top_k)
        for name in ("top_p", "min_p", "temperature", "repetition_penalty"):
            check_number("generate", name, getattr(self, name))
        _check(0 <= self.top_p <= 1, "top_p", "lie in [0, 1]", self.top_p)
        _check(0 <= self.min_p <= 1, "min_p", "lie in [0, 1]", self.min_p)
        finite = 0 <= self.temperature < math.inf
        _check(finite, "temperature", "be finite and not negative", self.temperature)
        positive = 0 < self.repetition_penalty < math.inf
        _check(positive, "repetition_penalty", "be positive", self.repetition_penalty)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.top_k == 1 or self.temperature == 0


def generate(model, input_ids: Tensor, max_length: int | None = None, **kwargs):
    """Continue token sequences.

    Args:
        model: callable as ``model(ids, state=state, num_last_tokens=1).logits`` with
            ``allocate_state``.
        input_ids: (B, L) int, prompts, L > 0; every id is a row of the embedding.
        max_length: length of the result, prompt included.
        **kwargs: what follows.
        max_new_tokens: new tokens, in place of max_length.
        top_k: sample among the k likeliest tokens; 1 is greedy (the default), 0 is no limit.
        top_p: sample within the smallest set with that probability mass; 0 or 1 is no limit.
        min_p: sample among tokens at least min_p times as likely as the likeliest; 0 is no limit.
        temperature: divides the logits before the three filters; 0 is greedy.
        repetition_penalty: divides positive and multiplies negative logits of tokens that the row
            already holds (Keskar et al. 2019, arXiv:1909.05858): those of input_ids and of the
            result, not what a state has seen before; 1 is off.
        do_sample: False forces greedy; True demands that top_k is not 1.
        eos_token_id: int or list of int; a row that produced one is finished.
        pad_token_id: what a finished row goes on with; None takes the first eos_token_id.
        attention_mask: (B, L), nonzero = real token; prompts of unequal length, padded on any side.
        seed: start of an own random generator; the global one is left alone.
        generator: torch.Generator to use instead.
        streamer: called with the new tokens (B,) of each step, or an object with ``put`` and
            ``end`` as in transformers.
        state: State to continue, in place; input_ids then follow what it has seen.
        teacher_outputs: (B, T) int; position i of the result is teacher_outputs[:, i] where i < T.
        vocab_size: columns of the logits that are tokens; None takes ``model.config.vocab_size``.
        return_dict_in_generate: return a GenerateOutput.
        output_scores: keep the logits of every step in it.
        enable_timing: keep the time that the call took in it; a GPU is waited for.
        cg: decode with a CUDA graph, which is kept for the next call; the tokens stay the same,
            except where rounding decides between two: attention sums in another order then.
            Without effect where ``ssm.utils.decoding_graph.why_not`` gives a reason, as on a CPU.

    Returns:
        (B, length) int64, or a GenerateOutput. All rows being finished ends the loop early.

    Raises:
        ValueError: an argument is out of its range; the message names it.
        TypeError: an argument that nobody knows, or one of the wrong Python type.

    Note:
        A State that was passed in has seen every token of the result except the last. A call for
        no new token leaves it as it was, without the prompt.
    """
    return_dict = kwargs.pop("return_dict_in_generate", False)
    output_scores = kwargs.pop("output_scores", False)
    enable_timing = kwargs.pop("enable_timing", False)
    streamer = kwargs.pop("streamer", None)
    put = None if streamer is None else getattr(streamer, "put", streamer)
    if put is not None and not callable(put):
        got = type(streamer).__name__
        raise TypeError(f"generate: streamer must be callable or have put and end, got {got}")
    _check_names("generate", kwargs)
    start = _clock(input_ids) if enable_timing else 0.0
    steps = _steps(model, input_ids, max_length=max_length, **kwargs)
    sequences, scores = [input_ids.long()], []
    # After the checks, those of the model in the first step too: a call that is refused shows
    # nothing.
    first = list(itertools.islice(steps, 1))
    if hasattr(streamer, "put"):
        put(input_ids.cpu())
    for tokens, logits in itertools.chain(first, steps):
        sequences.append(tokens[:, None])
        if output_scores:
            scores.append(logits)
        if put is not None:
            put(tokens.cpu())
    if hasattr(streamer, "end"):
        streamer.end()
    result = torch.cat(sequences, dim=1)
    if not return_dict:
        return result
    seconds = _clock(result) - start if enable_timing else None
    return GenerateOutput(result, tuple(scores) if output_scores else None, seconds)


def _clock(tensor) -> float:
    """Return the time in seconds, behind everything that the device of a tensor has to do."""
    if isinstance(tensor, Tensor) and tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def stream(model, input_ids: Tensor, max_length: int | None = None, **kwargs) -> Iterator[Tensor]:
    """Yield the new tokens (B,) int64 of each step as they come; arguments of ``generate``."""
    _check_names("stream", kwargs)
    return (tokens for tokens, _ in _steps(model, input_ids, max_length=max_length, **kwargs))


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Take one token per row.

    Args:
        logits: (B, V), floating point.
        sampling: greedy or which filters; the repetition penalty is not applied here.
        generator: source of randomness; None is the global one.

    Returns:
        (B,) int64.
    """
    if sampling.is_greedy:
        return logits.argmax(dim=-1)
    # Below the largest one: a low temperature may take the others to -inf, never to inf.
    logits = logits.float()
    temperature = max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    # The filters work on sorted columns; ties keep the order of the vocabulary.
    logits, order = logits.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        logits, order = logits[:, : sampling.top_k], order[:, : sampling.top_k]
    if 0 < sampling.top_p < 1:
        mass = logits.softmax(dim=-1).cumsum(dim=-1)
        # The token that crosses top_p stays, so shift by one; the first always stays.
        beyond = torch.zeros_like(mass, dtype=torch.bool)
        beyond[:, 1:] = mass[:, :-1] >= sampling.top_p
        logits = logits.masked_fill(beyond, -torch.inf)
    if sampling.min_p > 0:
        lowest = logits[:, :1] + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    chosen = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
    return order.gather(-1, chosen)[:, 0]


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens less likely that a row already holds.

    Args:
        logits: (B, V).
        seen: (B, V) bool.
        penalty: above 1 for less, below 1 for more repetition.

    Returns:
        (B, V), a new tensor.
    """
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def _steps(
    model,
    input_ids: Tensor,
    *,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    do_sample: bool | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    attention_mask: Tensor | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    state: State | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Check everything now, then return the iterator over (tokens (B,), logits (B, V))."""
    _check_tensor("input_ids", input_ids)
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        _fail("input_ids", "have shape (B, L) with L > 0", tuple(input_ids.shape))
    columns = model.config.padded_vocab_size
    input_ids = _checked_ids("input_ids", input_ids, columns)
    batch, length = input_ids.shape
    steps = _number_of_steps(length, max_length, max_new_tokens)
    sampling = Sampling(top_k, top_p, min_p, temperature, repetition_penalty)
    if do_sample is False:
        sampling = Sampling(1, top_p, min_p, temperature, repetition_penalty)
    elif do_sample and sampling.top_k == 1:
        _fail("top_k", "be 0 (no limit) or at least 2 with do_sample=True", top_k)
    kept = columns if vocab_size is None else vocab_size
    if vocab_size is None:
        vocab_size = model.config.vocab_size
    vocab_size = _integer("vocab_size", vocab_size)
    _check(0 < vocab_size <= columns, "vocab_size", f"lie in [1, {columns}]", vocab_size)
    eos = _token_ids("eos_token_id", eos_token_id, vocab_size)
    if pad_token_id is None:
        pad_token_id = eos[0] if eos else 0
    pad_token_id = _integer("pad_token_id", pad_token_id)
    # Not vocab_size: a finished row may go on with a token that is never sampled.
    _check(0 <= pad_token_id < columns, "pad_token_id", f"lie in [0, {columns})", pad_token_id)
    if generator is not None and not isinstance(generator, torch.Generator):
        got = type(generator).__name__
        raise TypeError(f"generate: generator must be a torch.Generator, got {got}")
    if seed is not None:
        if generator is not None:
            raise ValueError("generate: seed must not be given beside generator")
        seed = _integer("seed", seed)
        _check(-(2**63) <= seed < 2**64, "seed", "fit in 64 bits", seed)
        generator = torch.Generator(device=input_ids.device).manual_seed(seed)
    if attention_mask is not None:
        input_ids, attention_mask = _pad_left(input_ids, attention_mask)
    if teacher_outputs is not None:
        _check_tensor("teacher_outputs", teacher_outputs)
        if teacher_outputs.dim() != 2 or teacher_outputs.shape[0] != batch:
            _fail("teacher_outputs", f"have shape ({batch}, T)", tuple(teacher_outputs.shape))
        # What lies under the prompt is never read.
        taught = _checked_ids("teacher_outputs", teacher_outputs[:, length:], columns)
    else:
        taught = input_ids[:, :0]
    if state is None:
        state = model.allocate_state(batch)
    elif not isinstance(state, State):
        raise TypeError(f"generate: state must be a State, got {type(state).__name__}")
    elif state.max_batch_size != batch:
        _fail("state", f"hold {batch} rows", state.max_batch_size)
    else:
        _check_room(state, input_ids, attention_mask, steps)
    end = torch.tensor(eos, dtype=torch.int64, device=input_ids.device)
    pick = _picker(sampling, generator, input_ids, attention_mask, columns, taught)

    def prefill() -> Tensor:
        output = model(input_ids, state=state, num_last_tokens=1, attention_mask=attention_mask)
        return output.logits[:, -1]

    return _loop(
        prefill, Decoder(model, state, bool(cg)), steps, pick, end, pad_token_id, vocab_size, kept
    )


def _loop(prefill, decoder, steps, pick, end, pad_token_id, vocab_size, kept):
    tokens = finished = None
    try:
        for step in range(steps):
            # Not held across the yield, where it would change the setting of the caller.
            with torch.no_grad():
                logits = prefill() if tokens is None else decoder.step(tokens)
                # Columns that only pad the vocabulary are never chosen.
                tokens = pick(logits[:, :vocab_size].to(at_least_fp32(logits.dtype)), step)
                if finished is None:
                    finished = torch.zeros_like(tokens, dtype=torch.bool)
                tokens = torch.where(finished, pad_token_id, tokens)
                finished = finished | torch.isin(tokens, end)
            yield tokens, logits[:, :kept]
            # Without an end there is nothing to ask, and asking would wait for the device.
            if end.numel() and finished.all():
                return
    finally:
        decoder.close()


def _picker(
    sampling: Sampling,
    generator,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    columns: int,
    taught: Tensor,
) -> Callable[[Tensor, int], Tensor]:
    """Return (logits, step) -> tokens, with the memory that the repetition penalty needs."""

    def choose(logits: Tensor, step: int) -> Tensor:
        return taught[:, step] if step < taught.shape[1] else sample(logits, sampling, generator)

    if sampling.repetition_penalty == 1:
        return choose
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
    counts = torch.zeros(input_ids.shape[0], columns, dtype=torch.int64, device=input_ids.device)
    counts.scatter_add_(1, input_ids.long(), real.long())

    def pick(logits: Tensor, step: int) -> Tensor:
        seen = counts[:, : logits.shape[1]] > 0
        tokens = choose(penalize_repetition(logits, seen, sampling.repetition_penalty), step)
        counts.scatter_(1, tokens[:, None], 1)
        return tokens

    return pick


def _pad_left(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move padding to the left, so that the last column is the last token of every row."""
    _check_tensor("attention_mask", attention_mask)
    if attention_mask.shape != input_ids.shape:
        _fail("attention_mask", f"have shape {tuple(input_ids.shape)}", tuple(attention_mask.shape))
    mask = attention_mask.bool()
    if not mask.any(dim=1).all():
        empty = int((~mask.any(dim=1)).nonzero()[0])
        raise ValueError(
            f"generate: attention_mask must keep a token in every row, got none in row {empty}"
        )
    order = mask.int().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), mask.gather(1, order)


def _check_room(state: State, input_ids: Tensor, attention_mask: Tensor | None, steps: int) -> None:
    """Refuse a state whose limit would end the loop half way; the last token is never fed."""
    if state.max_seqlen is None or steps == 0 or not len(input_ids):
        return
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    needed = real.sum(dim=1)
    # Only attention has a limit, and its lengths are the one kind of state with a single axis.
    held = [t for states in state.key_value_memory_dict.values() for t in states if t.dim() == 1]
    if held:
        tokens = int((needed + held[0].to(needed.device)).max()) + steps - 1
        _check(
            tokens <= state.max_seqlen,
            "state",
            f"have room for {tokens} tokens per row",
            state.max_seqlen,
        )


def _number_of_steps(length: int, max_length: int | None, max_new_tokens: int | None) -> int:
    if max_new_tokens is not None:
        if max_length is not None:
            raise ValueError("generate: max_new_tokens must not be given beside max_length")
        max_new_tokens = _integer("max_new_tokens", max_new_tokens)
        _check(max_new_tokens >= 0, "max_new_tokens", "not be negative", max_new_tokens)
        return max_new_tokens
    if max_length is None:
        raise ValueError("generate: max_length or max_new_tokens must be given, got neither")
    max_length = _integer("max_length", max_length)
    _check(
        max_length >= length, "max_length", f"be at least the prompt length {length}", max_length
    )
    return max_length - length


def _token_ids(name: str, value, vocab_size: int) -> list[int]:
    ids = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    try:
        ids = [_integer(name, token) for token in ids]
    except TypeError:
        raise TypeError(
            f"generate: {name} must be an int or a list of int, got {value!r}"
        ) from None
    for token in ids:
        _check(0 <= token < vocab_size, name, f"lie in [0, {vocab_size})", token)
    return ids


def _check_names(caller: str, kwargs: dict) -> None:
    """Refuse unknown keywords in the name of the function that was called."""
    known = inspect.signature(_steps).parameters
    for name in kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{caller}: keyword must be a known argument, got {name!r}{hint}")


def _check_tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"generate: {name} must be a torch.Tensor, got {type(value).__name__}")


def _checked_ids(name: str, ids: Tensor, columns: int) -> Tensor:
    """Return ids as int64; ValueError where they are no rows of the embedding."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        _fail(name, "hold integers", ids.dtype)
    ids = ids.long()
    if ids.numel():
        # One transfer for both, as reading a value waits for the device.
        low, high = torch.stack(ids.aminmax()).tolist()
        _check(low >= 0 and high < columns, name, f"lie in [0, {columns})", min(low, 0) or high)
    return ids


def _integer(name: str, value) -> int:
    """Return a Python int; takes the integers of numpy and torch, but no bool."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"generate: {name} must be an int, got {value!r}") from None


def _check(holds: bool, name: str, rule: str, value) -> None:
    if not holds:
        _fail(name, rule, value)


def _fail(name: str, rule: str, value):
    raise ValueError(f"generate: {name} must {rule}, got {value}")
