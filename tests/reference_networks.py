"""VGG19 and ResNets in NumPy as PyTorch has them, from tensors by its names; nothing of the package, no jax.

Images are (n, channels, rows, columns). Batch normalisation uses the running statistics. Source: the networks'
definitions in torchvision, and for CIFAR in akamaster/pytorch_resnet_cifar10.
"""

import numpy as np


def logits(tensors, x):
    """Those of the network that the tensors are of."""
    tensors = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    return (_vgg if "features.0.weight" in tensors else _resnet)(tensors, np.asarray(x, np.float64))


def _vgg(tensors, x):
    place = 0
    for convolutions in (2, 2, 4, 4, 4):
        for _ in range(convolutions):
            x = np.maximum(_conv_norm(tensors, f"features.{place}", f"features.{place + 1}", x), 0)
            place += 3
        x = _max_pool(x, 2, 0)
        place += 1
    x = x.reshape(len(x), -1)
    for layer in (0, 3):
        x = np.maximum(_dense(tensors, f"classifier.{layer}", x), 0)
    return _dense(tensors, "classifier.6", x)


def _resnet(tensors, x):
    large = tensors["conv1.weight"].shape[-1] == 7
    x = np.maximum(_conv_norm(tensors, "conv1", "bn1", x, 2 if large else 1), 0)
    x = _max_pool(x, 3, 1) if large else x
    for stage in (1, 2, 3, 4):
        i = 0
        while f"layer{stage}.{i}.conv1.weight" in tensors:
            x = _block(tensors, f"layer{stage}.{i}", x, 2 if i == 0 and stage > 1 else 1)
            i += 1
    return _dense(tensors, "fc" if "fc.weight" in tensors else "linear", x.mean((2, 3)))


def _block(tensors, at, x, stride):
    h = np.maximum(_conv_norm(tensors, f"{at}.conv1", f"{at}.bn1", x, stride), 0)
    h = _conv_norm(tensors, f"{at}.conv2", f"{at}.bn2", h)
    for shortcut in ("downsample", "shortcut"):
        if f"{at}.{shortcut}.0.weight" in tensors:
            return np.maximum(h + _conv_norm(tensors, f"{at}.{shortcut}.0", f"{at}.{shortcut}.1", x, stride), 0)
    if stride == 2:
        quarter = h.shape[1] // 4
        x = np.pad(x[:, :, ::2, ::2], ((0, 0), (quarter, quarter), (0, 0), (0, 0)))
    return np.maximum(h + x, 0)


def _conv_norm(tensors, conv, norm, x, stride=1):
    kernel = tensors[f"{conv}.weight"]
    x = _padded(x, kernel.shape[-1] // 2, 0)
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    h = np.einsum("nchwij,ocij->nohw", windows, kernel)
    bias = tensors.get(f"{conv}.bias", 0) - tensors[f"{norm}.running_mean"]
    scale = tensors[f"{norm}.weight"] / np.sqrt(tensors[f"{norm}.running_var"] + 1e-5)
    return (h + bias.reshape(-1, 1, 1)) * scale.reshape(-1, 1, 1) + tensors[f"{norm}.bias"].reshape(-1, 1, 1)


def _max_pool(x, window, padding):
    x = _padded(x, padding, -np.inf)
    return np.lib.stride_tricks.sliding_window_view(x, (window, window), (2, 3))[:, :, ::2, ::2].max((4, 5))


def _padded(x, by, value):
    return np.pad(x, ((0, 0), (0, 0), (by, by), (by, by)), constant_values=value)


def _dense(tensors, at, x):
    return x @ tensors[f"{at}.weight"].T + tensors[f"{at}.bias"]
