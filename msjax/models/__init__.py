"""Networks as lists of blocks, and the cut that makes a client and a server part of them.

    model = models.build("resnet18", input_shape=(32, 32, 3), num_classes=100)
    client, server = models.split(model, "medium", seed=0)
    h, client_stats = client.apply(client.params, client.stats, x, train=True)
    logits, server_stats = server.apply(server.params, server.stats, h, train=True)

`decoder(DecoderConfig.load(folder), length=256)` is a language model of the Llama family, whose weights `load_decoder`
reads from a folder of Hugging Face's.

A `Model` is a description without arrays, so `build`, `list_cuts` and `count_params` cost next to nothing; `split`
draws the parameters, or takes those that `load_weights` read from a file in PyTorch's names; `save_weights` writes one.
"""

from msjax.models._build import NAMES, RESNETS, TOKEN_MODELS, build
from msjax.models._cache import Cache, attends, cache_bytes, decoder_blocks, extend_cached, make_cache, part_config
from msjax.models._decoder import DECODER, decoder
from msjax.models._decoder_config import FAMILIES, DecoderConfig
from msjax.models._digest import weights_digest
from msjax.models._huggingface import end_tokens, is_decoder, load_decoder, open_decoder, save_decoder
from msjax.models._layers import ACTIVATIONS
from msjax.models._lora import TARGETS, LoRA
from msjax.models._model import Block, Model
from msjax.models._modules import as_part
from msjax.models._own_model import as_parts, cut_sequential
from msjax.models._part import PARTS, ModelPart, RemoteApply, RemotePart, constants_of, shapes_of
from msjax.models._pytorch import PYTORCH, load_weights, save_weights
from msjax.models._rope import RopeScaling
from msjax.models._sampling import Sampling, largest
from msjax.models._split import (
    Apply,
    Cut,
    base,
    count_params,
    cut_places,
    list_cuts,
    resolve_cut,
    split,
    untied,
    whole,
    with_adapters_merged,
)

__all__ = [
    "ACTIVATIONS",
    "DECODER",
    "FAMILIES",
    "NAMES",
    "PARTS",
    "PYTORCH",
    "RESNETS",
    "TARGETS",
    "TOKEN_MODELS",
    "Apply",
    "Block",
    "Cache",
    "Cut",
    "DecoderConfig",
    "LoRA",
    "Model",
    "ModelPart",
    "RemoteApply",
    "RemotePart",
    "RopeScaling",
    "Sampling",
    "as_part",
    "as_parts",
    "attends",
    "base",
    "build",
    "cache_bytes",
    "constants_of",
    "count_params",
    "cut_places",
    "cut_sequential",
    "decoder",
    "decoder_blocks",
    "end_tokens",
    "extend_cached",
    "is_decoder",
    "largest",
    "list_cuts",
    "load_decoder",
    "load_weights",
    "make_cache",
    "open_decoder",
    "part_config",
    "resolve_cut",
    "save_decoder",
    "save_weights",
    "shapes_of",
    "split",
    "untied",
    "weights_digest",
    "whole",
    "with_adapters_merged",
]
