"""The paper's method in plain PyTorch, client after client, for the studies that set it beside msjax. Needs PyTorch."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from benchmarks import torch_ms
from msjax import compress


def codec(of: compress.Codec) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns what stands in PyTorch for a codec: features to decoded features, and backward nothing at all."""
    if isinstance(of, compress.Identity):
        return lambda h: h

    def through(h):
        flat = h.detach().flatten()
        if isinstance(of, compress.MaskEncoded):
            out = torch_ms.decode(*torch_ms.encode(flat, ratio=of.ratio, bits=of.bits), bits=of.bits)
        elif isinstance(of, compress.TopK):
            kept = torch.topk(flat.abs(), int((1 - of.ratio) * flat.numel() + 1e-6)).indices
            out = torch.zeros_like(flat).index_copy(0, kept, flat[kept])
        elif isinstance(of, compress.Uniform):
            low, step = flat.min(), (flat.max() - flat.min()) / (2**of.bits - 1)
            out = torch.round((flat - low) / step) * step + low
        else:
            raise ValueError(f"of must be Identity, MaskEncoded, TopK or Uniform, got {of}")
        return h + (out.view(h.shape) - h).detach()

    return through


class Method:
    """A network that several clients and a server train together.

    Args:
      client, server: the two parts of `network`, as functions; images and features are (n, c, h, w).
      codec: of the features, which it gets as msjax has those of a client: in the order (sample, row, column, channel).
      optimizer: of the whole network.
      loss: from outputs and labels.
    """

    def __init__(
        self,
        network: nn.Module,
        client: Callable[[torch.Tensor], torch.Tensor],
        server: Callable[[torch.Tensor], torch.Tensor],
        codec: Callable[[torch.Tensor], torch.Tensor],
        optimizer: torch.optim.Optimizer,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = nn.functional.cross_entropy,
    ):
        self.network, self.optimizer = network, optimizer
        self._client, self._server, self._codec, self._loss = client, server, codec, loss
        self._running = [buffer for name, buffer in network.named_buffers() if "running" in name]

    def __call__(self, images: np.ndarray) -> torch.Tensor:
        """Returns the outputs for one client's batch, (n, h, w, c) in NumPy."""
        h = self._client(torch.from_numpy(images).permute(0, 3, 1, 2))
        h = self._codec(h.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
        return self._server(h)

    def step(self, images: np.ndarray, labels: np.ndarray) -> list[float]:
        """Takes a step on batches (clients, n, …); returns the clients' losses.

        Gradients and running statistics are the means over the clients, all of which start with the same ones.
        """
        self.network.train()
        self.optimizer.zero_grad()
        running, clients, losses = self._running, len(images), []
        before, moved = [b.clone() for b in running], [torch.zeros_like(b) for b in running]
        for x, y in zip(images, labels, strict=True):
            for buffer, old in zip(running, before, strict=True):
                buffer.copy_(old)
            loss = self._loss(self(x), torch.from_numpy(y).long())
            (loss / clients).backward()
            losses.append(loss.item())
            for total, buffer in zip(moved, running, strict=True):
                total += buffer / clients
        for buffer, mean in zip(running, moved, strict=True):
            buffer.copy_(mean)
        self.optimizer.step()
        return losses
