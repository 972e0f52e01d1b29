"""Search by meaning: texts as vectors whose inner product says how near two meanings are.

The model is WordLlama's (l2_supercat, 256 numbers for each of 32,000 word pieces): a text's vector
is the mean over its pieces, scaled to unit length. It comes inside the wheel, needs no network,
16 MB of disk, and about a tenth of a millisecond for a query. Where it is not installed, search
goes by words alone.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WORDS = 512  # of a text that are read; an abstract has about 200
_REMEMBERED = 32_768  # words whose vectors are kept while many texts are embedded, 32 MB


class Model:
    """A sentence-embedding model. It may be used from several threads.

    >>> model = load()
    >>> if model is not None:
    ...     dog, puppy, tax = model.embed(["a dog", "a puppy", "income tax"])
    ...     assert dog @ puppy > dog @ tax
    """

    name = "wordllama-l2-supercat-256"
    dimensions = 256

    def __init__(self, inner: Any) -> None:
        # as the file has them: half the memory of the library's copy in float32, the same values
        self._pieces = inner.embedding.astype(np.float16)
        self._tokenizer = inner.tokenizer
        self._tokenizer.no_padding()
        self._rows: dict[str, int] = {}  # of words met before in ...
        self._sums = np.zeros((0, self.dimensions), np.float32)  # ... the sums of their pieces
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return one vector of unit length per text, ``(len(texts), dimensions)``.

        A text without a single word has the zero vector, which is near to nothing. Of a long text
        the first 512 words count.
        """
        # No piece reaches over a space: a text's sum is the sum over its words, and words recur.
        split = [text.split()[:_WORDS] for text in texts]
        if len(split) == 1:  # a query, which shall not wait for a batch
            found = self._sum(split[0]).sum(0, keepdims=True)
        else:
            found = np.zeros((len(texts), self.dimensions), np.float32)
            with self._lock:
                self._meet({word for words in split for word in words})
                for row, words in zip(found, split, strict=True):
                    self._sums[[self._rows[word] for word in words]].sum(0, out=row)
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        found /= np.where(lengths > 0, lengths, 1)
        return found

    def _meet(self, words: set[str]) -> None:
        if len(self._rows) > _REMEMBERED:
            self._rows, self._sums = {}, self._sums[:0]
        new = [word for word in words if word not in self._rows]
        self._rows.update(zip(new, range(len(self._rows), len(self._rows) + len(new)), strict=True))
        self._sums = np.concatenate([self._sums, self._sum(new)])

    def _sum(self, words: Sequence[str]) -> NDArray[np.float32]:
        """Return the sum of the vectors of each word's pieces."""
        encoded = self._tokenizer.encode_batch_fast(list(words), add_special_tokens=False)
        sums = np.zeros((len(words), self.dimensions), np.float32)
        for row, pieces in zip(sums, encoded, strict=True):
            self._pieces[pieces.ids].sum(0, dtype=np.float32, out=row)
        return sums


_loading = threading.Lock()


def load() -> Model | None:
    """Return the model, loaded once for the process; None where it is not installed."""
    with _loading:
        return _load()


@functools.cache
def _load() -> Model | None:
    # One text at a time is the rule here, and forks are none of our business.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        import wordllama  # which configures logging for the whole process

        # Named folders and no download: only what the wheel brought is read.
        folder = Path(wordllama.__file__).parent
        inner = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
    except (ImportError, FileNotFoundError):
        return None
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return Model(inner)


def text_of(title: str, summary: str) -> str:
    """Return what of a paper is embedded: its title counts twice."""
    return f"{title}. {title}. {summary}"


def digest(title: str, summary: str) -> str:
    """Return what changes whenever a paper has to be embedded anew."""
    return hashlib.blake2b(text_of(title, summary).encode(), digest_size=16).hexdigest()


def pack(vector: NDArray[np.float32]) -> bytes:
    """Return a vector as it is stored: float16, little-endian."""
    return vector.astype("<f2").tobytes()


def unpack(rows: Sequence[bytes], dimensions: int) -> NDArray[np.float32]:
    """Return stored vectors as a matrix, ``(len(rows), dimensions)``."""
    flat = np.frombuffer(b"".join(rows), "<f2")
    return flat.reshape(len(rows), dimensions).astype(np.float32)
