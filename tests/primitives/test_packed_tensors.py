"""Packing small numbers into bytes loses nothing and wastes nothing."""

from __future__ import annotations

import pytest
import torch

from fewbits.primitives.bits import pack as numpy_pack
from fewbits.primitives.packed_tensors import pack, pack_trits, unpack, unpack_trits

COUNTS = (1, 3, 5, 7, 8, 9, 31, 64)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("count", COUNTS)
def test_numbers_come_back(bits: int, count: int) -> None:
    numbers = torch.randint(0, 2**bits, (2, 3, count), dtype=torch.uint8)
    packed = pack(numbers, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, -(-count * bits // 8))
    assert torch.equal(unpack(packed, count, bits), numbers)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_layout_is_that_of_files(bits: int) -> None:
    numbers = torch.randint(0, 2**bits, (4, 21), dtype=torch.uint8)
    assert pack(numbers, bits).numpy().tolist() == numpy_pack(numbers.numpy(), bits).tolist()


@pytest.mark.parametrize("count", COUNTS)
def test_trits_come_back_from_five_to_a_byte(count: int) -> None:
    trits = torch.randint(-1, 2, (2, 3, count), dtype=torch.int8)
    packed = pack_trits(trits)
    assert packed.shape == (2, 3, -(-count // 5))
    assert packed.max() < 243
    assert torch.equal(unpack_trits(packed, count), trits)
