"""Text <-> tokens: the byte vocabulary, and the tokenizer.json of a checkpoint if there is one."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import torch
from torch import Tensor

BYTE_VOCAB_SIZE = 256
TOKENIZER_FILE = "tokenizer.json"


class ByteVocabulary:
    """Every byte of UTF-8 is a token: 256 tokens, any text, no file."""

    vocab_size = BYTE_VOCAB_SIZE
    eos_token_id = None

    def encode(self, text: str | bytes) -> Tensor:
        """Return (L,) int64 tokens."""
        data = text.encode("utf-8") if isinstance(text, str) else text
        if not data:
            return torch.zeros(0, dtype=torch.int64)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()

    def decode(self, tokens: Tensor | list[int]) -> str:
        """Return the text; bytes that are no UTF-8 become the replacement character."""
        return bytes(_as_list(tokens)).decode("utf-8", errors="replace")

    def decoder(self) -> ByteDecoder:
        """Return an object that decodes one token at a time."""
        return ByteDecoder()


class ByteDecoder:
    """Decodes a stream of bytes; a character appears when its last byte has come."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the text that this token completes, often empty."""
        return self._decoder.decode(bytes([token]))

    def flush(self) -> str:
        """Return what is left of an unfinished character."""
        return self._decoder.decode(b"", final=True)


class FileVocabulary:
    """The tokenizer.json of a checkpoint, read by the optional package ``tokenizers``.

    Args:
        path: the file.

    Raises:
        RuntimeError: ``tokenizers`` is not installed.
    """

    eos_token_id = None

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise RuntimeError(
                f"text: {path} needs the package tokenizers (pip install 'ssm-models[text]')"
            ) from error
        self._tokenizer = Tokenizer.from_file(str(path))
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.eos_token_id = self._tokenizer.token_to_id(_end_of_text(path))

    def encode(self, text: str) -> Tensor:
        """Return (L,) int64 tokens."""
        return torch.tensor(self._tokenizer.encode(text).ids, dtype=torch.int64)

    def decode(self, tokens: Tensor | list[int]) -> str:
        """Return the text."""
        return self._tokenizer.decode(_as_list(tokens))

    def decoder(self) -> FileDecoder:
        """Return an object that decodes one token at a time."""
        return FileDecoder(self)


class FileDecoder:
    """Decodes a stream of tokens; text is held back while it ends in an unfinished character."""

    def __init__(self, vocabulary: FileVocabulary) -> None:
        self._vocabulary = vocabulary
        # The tokens of the last piece of text and those since: the spacing of a word depends on
        # the one before it, and decoding everything each time would cost O(L^2).
        self._tokens: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """Return the text that this token completes."""
        self._tokens.append(token)
        piece = self._rest()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._tokens = self._tokens[self._shown :]
        self._shown = len(self._tokens)
        return piece

    def flush(self) -> str:
        """Return what was held back."""
        return self._rest()

    def _rest(self) -> str:
        shown = self._vocabulary.decode(self._tokens[: self._shown])
        return self._vocabulary.decode(self._tokens)[len(shown) :]


def _end_of_text(path: Path) -> str:
    """Return the token that ends a text, as the file beside a tokenizer.json says."""
    settings = path.with_name("tokenizer_config.json")
    token = None
    if settings.is_file():
        token = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token or "<|endoftext|>"


def load_vocabulary(directory: str | Path, vocab_size: int) -> ByteVocabulary | FileVocabulary:
    """Return the vocabulary of a checkpoint directory.

    Args:
        directory: of the checkpoint.
        vocab_size: of its config; 256 without a tokenizer.json means bytes.

    Raises:
        FileNotFoundError: more tokens than bytes, and no tokenizer.json.
        RuntimeError: tokenizer.json is there, the package ``tokenizers`` is not.
    """
    path = Path(directory) / TOKENIZER_FILE
    if path.is_file():
        return FileVocabulary(path)
    if vocab_size == BYTE_VOCAB_SIZE:
        return ByteVocabulary()
    raise FileNotFoundError(
        f"text: {directory} must hold {TOKENIZER_FILE} for a vocabulary of {vocab_size}, got none"
    )


def read_bytes(path: str | Path, owner: str = "train") -> bytes:
    """Return the content of a text file.

    Args:
        path: the file.
        owner: command that asks, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a directory or empty.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{owner}: text must be a file, got directory {path}")
    if not path.is_file():
        raise FileNotFoundError(f"{owner}: text must be a file, got {path}, which does not exist")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{owner}: text must not be empty, got {path} with 0 bytes")
    return data


def _as_list(tokens) -> list[int]:
    return tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
