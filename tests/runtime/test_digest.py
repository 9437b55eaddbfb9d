"""The digest of a tensor: it is the documented number, and what it depends on."""

import pytest
import torch

from megavlm.runtime.digest import digest

WORD = 2**64


def mixed(word: int) -> int:
    """SplitMix64's output for a state."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB % WORD
    return word ^ word >> 31


def by_hand(tensor: torch.Tensor) -> int:
    """In integers of Python, which do not wrap."""
    step, content = 0x9E3779B97F4A7C15, bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
    content += bytes(-len(content) % 8)
    words = [int.from_bytes(content[at : at + 8], "little") for at in range(0, len(content), 8)]
    total = sum(mixed((word + place * step) % WORD) for place, word in enumerate(words, 1)) % WORD
    found = tensor.dim()
    for number in (*tensor.shape, total):
        found = (number + mixed((found + step) % WORD)) % WORD
    return mixed(found)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5),
        torch.randn(7).bfloat16(),
        torch.randn(6, 4).T,
        torch.randn(41)[3:],
        torch.tensor(2.5),
        torch.empty(0, 4),
        torch.arange(11, dtype=torch.uint8),
        torch.randn(300, 500),  # several chunks
    ],
    ids=lambda tensor: f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}",
)
def test_it_is_the_number_that_its_page_describes(tensor):
    assert digest(tensor) == by_hand(tensor)


def test_values_that_change_places_or_signs_change_it():
    plain = torch.randn(300, 500)
    changed = [plain.clone() for _ in range(4)]
    changed[0][0, 0], changed[0][1, 0] = plain[1, 0], plain[0, 0]  # neighbours in memory or not, in another word or not
    changed[1][0, 0], changed[1][0, 1] = plain[0, 1], plain[0, 0]
    changed[2][299, 499] *= -1
    changed[3][0, 1], changed[3][7, 1] = plain[0, 1], -plain[0, 1]  # only the highest bit of two words
    swapped = changed[3].clone()
    swapped[0, 1], swapped[7, 1] = -plain[0, 1], plain[0, 1]
    assert len({digest(tensor) for tensor in (plain, *changed, swapped)}) == 6


def test_only_bytes_and_shape_count():
    tensor = torch.randn(6, 8).bfloat16()
    assert digest(tensor) == digest(tensor.view(torch.int16)) == digest(tensor.clone().T.contiguous().T)
    assert len({digest(x) for x in (tensor, tensor.view(8, 6), tensor.view(-1), tensor[None], tensor.float())}) == 5
    assert digest(torch.zeros(3)) != digest(torch.zeros(4)) != digest(torch.zeros(4, dtype=torch.bfloat16))
