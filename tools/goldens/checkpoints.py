"""What the kept checkpoints say: loss on a text and greedy continuation, on the reference."""

from __future__ import annotations

from pathlib import Path

from tools.goldens.files import Fault, write_json

HELD_OUT_TEXT = "sonnets.txt"
PROMPT = "ROMEO:\n"
GREEDY_TOKENS = 200


def refresh(folder: Path) -> None:
    """Write held_out.json and greedy.json beside every checkpoint, both on the reference."""
    import torch

    from ssm.models.lm import MambaLMHeadModel
    from ssm.text import load_vocabulary, read_bytes
    from ssm.training import evaluate
    from ssm.utils import dispatch

    for config in sorted(folder.glob("models/*/config.json")):
        model = MambaLMHeadModel.from_pretrained(str(config.parent), dtype=torch.float64)
        vocabulary = load_vocabulary(config.parent, model.config.vocab_size)
        tokens = vocabulary.encode(read_bytes(folder / "models" / HELD_OUT_TEXT))
        with dispatch.use_backend("python"):
            loss = evaluate(model, tokens)
            text, logits = continue_greedily(model, vocabulary)
        found = {
            "text": HELD_OUT_TEXT,
            "nats_per_byte": round(loss, 6),
            "source": "ssm.training.evaluate on the reference operators in float64",
        }
        write_json(config.with_name("held_out.json"), found)
        found = {
            "prompt": PROMPT,
            "text": text,
            "source": "the likeliest byte each time, and the logits after the last, "
            "on the reference operators in float64",
            "logits": [round(logit, 6) for logit in logits.tolist()],
        }
        write_json(config.with_name("greedy.json"), found)


def continue_greedily(model, vocabulary):
    """Return the text that a model continues PROMPT with, and the logits (V,) after it.

    Raises:
        Fault: a byte is not the likeliest by a pass over the whole text, or the text is no UTF-8.
    """
    import torch

    prompt = vocabulary.encode(PROMPT)
    tokens = model.generate(prompt[None], max_new_tokens=GREEDY_TOKENS)[0]
    text = tokens[len(prompt) :]
    # What is kept must not depend on the state that the decoding carried.
    with torch.inference_mode():
        logits = model(tokens[None]).logits[0, len(prompt) - 1 :, : vocabulary.vocab_size]
    if not torch.equal(logits[:-1].argmax(-1), text):
        raise Fault("a checkpoint must write the same text step by step and whole, got two texts")
    if not torch.equal(vocabulary.encode(vocabulary.decode(text)), text):
        raise Fault("a checkpoint must continue the prompt with UTF-8, got other bytes")
    return vocabulary.decode(text), logits[-1]
