"""Llama-3.2-1B, all weights fine-tuned on WikiText-2 through a cut, as the later program of arXiv 2408.13787's authors.

    msjax train --config configs/llama32_1b_wikitext2.py --model.weights DIR --data.name TRAIN.txt --data.test VALID.txt

DIR is a folder of Hugging Face's: config.json, model.safetensors, tokenizer.json. Cuts are behind block 1, 8 or 15
(--model.cut), codecs at about 3.3 bits a value: the default, MS with 2 bits and a sign, or "Uniform(bits=3)",
"Quantile(bits=3)", "SmallFloat()", "TopK(ratio=0.9275)", "RandTopK(ratio=0.9275)". Adapters in place of all weights:

    --lora.rank 8 --lora.targets q_proj k_proj v_proj o_proj gate_proj up_proj down_proj --dtype bfloat16
    --optim.kind adamw --optim.momentum 0.9      # AdamW's first moment; their SGD has none

Their program has SGD with 1e-4, 3 epochs, batches of 4 blocks of text of a fixed length, and one client, as here. There
the two parties share the tied embedding in one process; here each trains its own copy.

Run time: not measured; meant for a GPU. `python -m experiments.language_sizes` says what memory and bytes it needs. The
numbers of `DECODER` are those of the published config.json, for the shapes; with --model.weights they are the same.
"""

import json

from msjax.compress import MaskEncoded
from msjax.config import Config, DataConfig, ModelConfig, OptimConfig, TaskConfig
from msjax.models import DecoderConfig

DECODER = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def get_config() -> Config:
    return Config(
        model=ModelConfig(name="decoder", cut="8", decoder=json.dumps(DecoderConfig.from_json(DECODER).to_json())),
        data=DataConfig(text_length=256),
        task=TaskConfig(name="next_token"),
        optim=OptimConfig(learning_rate=1e-4, momentum=0.0, weight_decay=0.0, schedule="constant"),
        codec=MaskEncoded(ratio=0.99, bits=2, signed=True),
        clients=1,
        batch_size=4,
        epochs=3,
    )
