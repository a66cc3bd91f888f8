"""Qwen3-1.7B, all weights fine-tuned on WikiText-2 through a cut, as the later program of arXiv 2408.13787's authors.

    msjax train --config configs/qwen3_1_7b_wikitext2.py --model.weights DIR --data.name TRAIN.txt --data.test VALID.txt

Cuts are behind block 1, 14 or 27 (--model.cut). All else is as in `configs/llama32_1b_wikitext2.py`, which says how it
differs from their program.

Run time: not measured; meant for a GPU. `python -m experiments.language_sizes` says what memory and bytes it needs.
"""

import json

from msjax.compress import MaskEncoded
from msjax.config import Config, DataConfig, ModelConfig, OptimConfig, TaskConfig
from msjax.models import DecoderConfig

DECODER = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def get_config() -> Config:
    return Config(
        model=ModelConfig(name="decoder", cut="14", decoder=json.dumps(DecoderConfig.from_json(DECODER).to_json())),
        data=DataConfig(text_length=256),
        task=TaskConfig(name="next_token"),
        optim=OptimConfig(learning_rate=1e-4, momentum=0.0, weight_decay=0.0, schedule="constant"),
        codec=MaskEncoded(ratio=0.99, bits=2, signed=True),
        clients=1,
        batch_size=4,
        epochs=3,
    )
