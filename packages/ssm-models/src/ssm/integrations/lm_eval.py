"""Our language models for the evaluation harness ``lm_eval``.

``python -m ssm.integrations.lm_eval --model ssm --model_args pretrained=DIR --tasks NAME`` is the
command of the harness with ``ssm`` among its models.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ssm.models.lm import MambaLMHeadModel
from ssm.text import BYTE_VOCAB_SIZE, ByteVocabulary, load_vocabulary
from ssm.utils.hub import find_directory

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

    MISSING = None
except Exception as error:  # a broken installation must not break this import either
    LM, register_model, MISSING = object, None, error


class SSMLM(LM):
    """A language model as the harness asks for it: text in, log likelihoods or text out.

    A text of any length is scored in one piece, its state carried from chunk to chunk, where a
    transformer needs windows.

    Args:
        pretrained: directory or hub name of a checkpoint, or a model.
        tokenizer: object with ``encode``, ``decode`` and ``eos_token_id``; None takes that of the
            checkpoint.
        device: where the model shall live.
        dtype: as for ``from_pretrained``.
        batch_size: rows per call in ``loglikelihood``.
        max_gen_toks: length of an answer, if the task does not say.
        chunk: tokens per call in ``loglikelihood_rolling``; changes memory, not the result.
        **kwargs: for ``from_pretrained``; what the harness adds (``max_batch_size``) is ignored.

    Raises:
        RuntimeError: ``lm_eval`` cannot be imported.
        ValueError: batch_size, max_gen_toks or chunk is not positive, or a model whose vocabulary
            is not bytes comes without tokenizer.
    """

    def __init__(
        self,
        pretrained: str | MambaLMHeadModel,
        tokenizer=None,
        device=None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_gen_toks: int = 256,
        chunk: int = 1024,
        **kwargs,
    ) -> None:
        if MISSING is not None:
            raise RuntimeError(
                f"SSMLM: lm_eval must be installed (pip install lm_eval), got {MISSING}"
            ) from MISSING
        super().__init__()
        kwargs.pop("max_batch_size", None)
        self.batch_size = _count("batch_size", batch_size)
        self.max_gen_toks = _count("max_gen_toks", max_gen_toks)
        self.chunk = _count("chunk", chunk)
        if isinstance(pretrained, MambaLMHeadModel):
            self.model, directory = pretrained, None
        else:
            directory = find_directory(pretrained)
            self.model = MambaLMHeadModel.from_pretrained(
                directory, device=device, dtype=dtype, **kwargs
            )
        if tokenizer is None and directory is not None:
            tokenizer = load_vocabulary(directory, self.model.config.vocab_size)
        elif tokenizer is None:
            if self.model.config.vocab_size != BYTE_VOCAB_SIZE:
                raise ValueError("SSMLM: tokenizer must be given beside a model, got None")
            tokenizer = ByteVocabulary()
        self.tokenizer = tokenizer
        self._device = self.model.backbone.embedding.weight.device

    @property
    def prefix_token(self) -> int:
        """The token before the first one: the end of a text, or a new line where there is none."""
        if self.tokenizer.eos_token_id is not None:
            return self.tokenizer.eos_token_id
        return int(self._encode("\n")[-1])

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations.

        Args:
            requests: objects whose ``args`` are (context, continuation).
            disable_tqdm: accepted; there is no bar.

        Returns:
            (log likelihood of the continuation, whether it is what greedy decoding writes) each.
        """
        pairs = [self._pair(*request.args) for request in requests]
        # Rows of like length share a call.
        order = sorted(range(len(pairs)), key=lambda index: -sum(map(len, pairs[index])))
        found: list = [None] * len(pairs)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for index, answer in zip(rows, self._score([pairs[i] for i in rows]), strict=True):
                found[index] = answer
                self._remember("loglikelihood", requests[index], answer)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, each behind the prefix token.

        Args:
            requests: objects whose ``args`` are (text,).
            disable_tqdm: accepted; there is no bar.

        Returns:
            Log likelihood of each.
        """
        found = []
        for request in requests:
            tokens = [self.prefix_token, *self._encode(request.args[0])]
            found.append(self._score_text(torch.tensor(tokens)))
            self._remember("loglikelihood_rolling", request, found[-1])
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continue texts until a stopping sequence.

        Args:
            requests: objects whose ``args`` are (context, settings); of these ``until``,
                ``max_gen_toks``, ``do_sample``, ``temperature``, ``top_k`` and ``top_p`` count.
            disable_tqdm: accepted; there is no bar.

        Returns:
            The continuations, without the stopping sequence.
        """
        found = []
        for request in requests:
            context, settings = request.args
            found.append(self._continue(context, dict(settings)))
            self._remember("generate_until", request, found[-1])
        return found

    def _continue(self, context: str, settings: dict) -> str:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        sampling = {"top_k": 1}
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            sampling = {
                "top_k": settings.get("top_k", 0),
                "top_p": settings.get("top_p", 0.0),
                "temperature": settings.get("temperature", 1.0),
            }
        prompt = torch.tensor([self._encode(context) or [self.prefix_token]])
        decoder, text = self.tokenizer.decoder(), ""
        stream = self.model.stream(
            prompt.to(self._device),
            max_new_tokens=settings.get("max_gen_toks", self.max_gen_toks),
            eos_token_id=self.tokenizer.eos_token_id,
            **sampling,
        )
        for token in stream:
            if int(token) == self.tokenizer.eos_token_id:
                break
            text += decoder.push(int(token))
            if any(stop in text for stop in until):
                break
        else:
            text += decoder.flush()
        ends = [text.index(stop) for stop in until if stop in text]
        return text[: min(ends)] if ends else text

    @torch.no_grad()
    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Score (context, continuation) rows of unequal length in one call."""
        rows = [(context + continuation)[:-1] for context, continuation in pairs]
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = True
        is_ragged = not bool(mask.all())
        logits = self.model(
            ids.to(self._device),
            attention_mask=mask.to(self._device) if is_ragged else None,
        ).logits
        found = []
        for number, (row, (_, continuation)) in enumerate(zip(rows, pairs, strict=True)):
            part = logits[number, len(row) - len(continuation) : len(row)].float()
            target = torch.tensor(continuation, device=part.device)
            likelihood = part.log_softmax(-1).gather(1, target[:, None]).double().sum()
            found.append((float(likelihood), bool((part.argmax(-1) == target).all())))
        return found

    @torch.no_grad()
    def _score_text(self, tokens: Tensor) -> float:
        """Return the log likelihood of all tokens but the first."""
        state = self.model.allocate_state(1)
        inputs, targets = tokens[:-1].to(self._device), tokens[1:].to(self._device)
        total = 0.0
        for start in range(0, inputs.numel(), self.chunk):
            part = slice(start, start + self.chunk)
            logits = self.model(inputs[None, part], state=state).logits[0].float()
            chosen = logits.log_softmax(-1).gather(1, targets[part, None])
            total += float(chosen.double().sum())
        return total

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenise a pair as one text, and cut it where the context alone ends."""
        # A tokenizer joins a space with the word behind it.
        words = context.rstrip()
        continuation = context[len(words) :] + continuation
        if not words:
            return [self.prefix_token], self._encode(continuation)
        before = self._encode(words)
        return before, self._encode(words + continuation)[len(before) :]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).tolist()

    def _remember(self, kind: str, request, answer) -> None:
        """Hand an answer to the harness's cache."""
        self.cache_hook.add_partial(kind, request.args, answer)


def register() -> None:
    """Make the harness know the model under the name ``ssm``.

    Raises:
        RuntimeError: ``lm_eval`` cannot be imported.
    """
    if register_model is None:
        raise RuntimeError(
            f"SSMLM: lm_eval must be installed (pip install lm_eval), got {MISSING}"
        ) from MISSING
    register_model("ssm")(SSMLM)


def _count(name: str, value) -> int:
    """Return a positive int; arguments of the command line come as text."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ValueError(f"SSMLM: {name} must be a positive number, got {value!r}")
    return number


if __name__ == "__main__":
    try:
        register()
    except RuntimeError as error:
        sys.exit(" ".join(str(error).split()))
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
