"""What a model is, whatever it is called: a digest of its configuration and its weights.

Cached blocks are shared between groups, so a group's name for its model must not be trusted: the
same name may stand for another checkpoint tomorrow. The digest covers every tensor's name, type,
shape and some of its bytes, spread over all of it. To read all bytes would take longer than to load
the model; what training changes it changes all over a tensor. Ranks of any number see the same
files, and so come to the same digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b

from gpu_worker.models.config import ModelConfig
from gpu_worker.models.mapped_file import MappedFile

DIGEST_BYTES = 12
NUM_SAMPLES = 8
SAMPLE_BYTES = 512


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """A tensor as it lies in a file; `kind` is the name of its element type."""

    name: str
    kind: str
    shape: tuple[int, ...]
    file: MappedFile
    offset: int
    size_bytes: int

    def samples(self) -> Iterator[bytes]:
        """Pieces from its beginning to its end; all of it, if it is small."""
        last = self.size_bytes - SAMPLE_BYTES
        if last <= SAMPLE_BYTES * (NUM_SAMPLES - 1):
            yield self.file.read(self.offset, self.size_bytes)
            return
        for i in range(NUM_SAMPLES):
            yield self.file.read(self.offset + last * i // (NUM_SAMPLES - 1), SAMPLE_BYTES)


def content_digest(config: ModelConfig, tensors: Iterable[StoredBytes]) -> str:
    """A name for the keys and values that a model makes of tokens, in hexadecimal digits.

    The context length and the tokens that end an answer do not change those.
    """
    digest = blake2b(digest_size=DIGEST_BYTES)
    digest.update(repr(replace(config, max_model_len=1, eos_token_ids=())).encode())
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        digest.update(f"\n{tensor.name} {tensor.kind} {tensor.shape} ".encode())
        for sample in tensor.samples():
            digest.update(sample)
    return digest.hexdigest()
