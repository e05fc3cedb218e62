"""SGLang's 64-bit hash of GPU memory as one Triton kernel a tensor; `checksum.fmix64` says what it computes.

Hashing 1 GB takes a millisecond on the GPU and nothing waits for it: results stay in device memory until read.
"""

import triton
import triton.language as tl
from torch import Tensor

TILE = 8192  # words whose hashes are added modulo 2^32 before the first mix: a part of the hash's definition


@triton.jit
def _fmix32(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _add_tile_hash(words, total, num_words, num_bytes, SEED_A: tl.constexpr, SEED_B: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    is_inside = index < num_words
    word = tl.load(words + index, mask=is_inside, other=0).to(tl.uint32, bitcast=True)
    position = index.to(tl.uint32)
    length = num_bytes.to(tl.uint32)
    mixed_a = ((position * 0x27D4EB2D) + SEED_A) ^ ((position << 15) | (position >> 17))
    mixed_b = ((position * 0x165667B1) + SEED_B) ^ ((position << 13) | (position >> 19))
    sum_a = tl.sum(tl.where(is_inside, _fmix32(word ^ mixed_a), 0).to(tl.uint32), axis=0)
    sum_b = tl.sum(tl.where(is_inside, _fmix32(word ^ mixed_b), 0).to(tl.uint32), axis=0)
    high = _fmix32(sum_a.to(tl.uint32) ^ length).to(tl.uint64)
    low = _fmix32(sum_b.to(tl.uint32) ^ length).to(tl.uint64)
    tl.atomic_add(total, ((high << 32) + low).to(tl.int64, bitcast=True))


def add_hash(data: Tensor, total: Tensor, seeds: tuple[int, int]) -> None:
    """Add the hashes of all tiles of [n] int32 words to [1] int64 `total` (modulo 2^64), on their device's stream."""
    num_words = data.numel()
    if num_words:
        grid = (triton.cdiv(num_words, TILE),)
        _add_tile_hash[grid](data, total, num_words, num_words * 4, seeds[0], seeds[1], TILE)
