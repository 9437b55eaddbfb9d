"""A number by which two processes can tell that they hold the same tensor. It imports torch alone."""

import torch
from torch import Tensor

_CHUNK = 2**16  # words that are mixed at a time: half a MiB, which stays in a processor's cache
_CHUNK_GPU = 2**24  # on a GPU 128 MiB, because each kernel has to be started
_WORD = 2**64
_STEP = 0x9E3779B97F4A7C15  # the increment and the factors of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def digest(tensor: Tensor) -> int:
    """A number in [0, 2^64) that depends on the bytes of a tensor, on their order, and on its shape.

    The bytes, in the order of a contiguous tensor and followed by zeros up to a multiple of eight, are 64-bit words.
    Each word plus a multiple of its position is mixed as by SplitMix64, and the results are summed; the shape is mixed
    into the sum. So two values that change places, or one bit, change the number, and the sum does not depend on the
    order in which a device adds. The dtype has no influence beyond the bytes: a tensor and its ``view`` as another
    dtype of the same width have the same digest. Against somebody who wants two tensors to agree it is no protection.

    Args:
        tensor: of any dtype, shape, strides and device. The work is done there, in chunks of bounded memory; only the
            sum comes to the host. A tensor that is not contiguous is copied first.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    size = 8 * (_CHUNK_GPU if flat.is_cuda else _CHUNK)
    places = torch.arange(min(size, flat.numel() + 7) // 8, device=flat.device) * _signed(_STEP)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for first in range(0, flat.numel(), size):
        words = _words(flat[first : first + size])
        words += places[: len(words)]
        words += _signed(_STEP * (first // 8 + 1))
        total += _mixed(words).sum()
    mixed = torch.tensor([tensor.dim(), *tensor.shape, int(total)])  # on the host
    for number in range(1, len(mixed)):
        mixed[number] += _mixed(mixed[number - 1] + _signed(_STEP))
    return int(_mixed(mixed[-1])) % _WORD


def _words(chunk: Tensor) -> Tensor:
    """A copy of bytes as int64 words, the last one filled with zeros."""
    whole = chunk.new_zeros(-(-len(chunk) // 8) * 8)
    whole[: len(chunk)] = chunk
    return whole.view(torch.int64)


def _mixed(words: Tensor) -> Tensor:
    """SplitMix64's mixing of each word, in place; products of int64 wrap on every device."""
    words ^= _shifted(words, 30)
    words *= _signed(_FACTORS[0])
    words ^= _shifted(words, 27)
    words *= _signed(_FACTORS[1])
    words ^= _shifted(words, 31)
    return words


def _shifted(words: Tensor, bits: int) -> Tensor:
    """The words shifted to the right as if they were unsigned."""
    return (words >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word, of which the lowest 64 bits count."""
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word
