"""MS in plain PyTorch, as the paper's program does it, to compare with: `torch.topk`, codes not packed."""

import torch


def encode(h: torch.Tensor, *, ratio: float = 0.99, bits: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the kept values in the order of their positions, and uint8 codes of h's shape; 2^bits − 1: kept."""
    x = h.flatten()
    top = 2**bits - 1
    values, positions = torch.topk(x, max(1, int((1 - ratio) * x.numel() + 1e-6)), sorted=False)
    codes = (x.float() * top / values.min().float()).round_().clamp_(0, top - 1).to(torch.uint8)
    positions = positions.sort().values
    codes[positions] = top
    return x[positions], codes.view(h.shape)


def decode(values: torch.Tensor, codes: torch.Tensor, *, bits: int = 2) -> torch.Tensor:
    """Returns the features that `encode`'s values and codes stand for."""
    top = 2**bits - 1
    h = (codes * (values.min().float() / top)).to(values.dtype)
    h[codes == top] = values
    return h
