"""The orthonormal discrete Fourier transform of real numbers, as so many real numbers.

n real numbers have n real degrees of freedom in the frequency domain, too: the real part at
frequency 0, real and imaginary parts between, and the real part at the highest frequency where n is
even. Those between count twice, so they are scaled by √2: lengths and inner products stay.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def real_fourier(x: Tensor) -> Tensor:
    """(…, n) → (…, n): cosine and sine parts in turn, by rising frequency. O(n·log n) per row."""
    count = x.shape[-1]
    spectrum = torch.view_as_real(torch.fft.rfft(x.float(), norm="ortho")).flatten(-2)
    # The imaginary part at 0 is always zero, and so is that at the highest frequency for even n.
    numbers = torch.cat([spectrum[..., :1], spectrum[..., 2 : count + 1]], dim=-1)
    return numbers * scales(count, x.device)


def inverse_real_fourier(y: Tensor) -> Tensor:
    """(…, n) → (…, n): the rows that `real_fourier` transformed."""
    count = y.shape[-1]
    numbers = y.float() / scales(count, y.device)
    zero = torch.zeros_like(numbers[..., :1])
    pieces = [numbers[..., :1], zero, numbers[..., 1:], *([zero] if count % 2 == 0 else [])]
    spectrum = torch.cat(pieces, dim=-1).unflatten(-1, (-1, 2)).contiguous()
    return torch.fft.irfft(torch.view_as_complex(spectrum), n=count, norm="ortho")


def scales(count: int, device: torch.device) -> Tensor:
    """(n,): √2, but 1 for the frequencies that stand alone."""
    found = torch.full((count,), math.sqrt(2), device=device)
    found[0] = 1
    if count % 2 == 0:
        found[-1] = 1
    return found
