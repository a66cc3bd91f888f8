"""Adapters of a published Llama (260 thousand parameters), trained on a text through a cut, in minutes on two cores.

msjax train --config configs/stories_lora.py --model.weights DIR --data.name TEXT.txt

DIR is a folder of Hugging Face's: config.json, model.safetensors, tokenizer.json. Clients keep the embedding and two
blocks, and what keeps them equal are the adapters of these alone.
"""

from msjax.compress import MaskEncoded
from msjax.config import Config, DataConfig, LoraConfig, ModelConfig, OptimConfig, TaskConfig
from msjax.models import TARGETS


def get_config() -> Config:
    return Config(
        model=ModelConfig(name="decoder", cut="2"),
        lora=LoraConfig(rank=8, targets=TARGETS),
        data=DataConfig(text_length=256),
        task=TaskConfig(name="next_token"),
        optim=OptimConfig(kind="adamw", learning_rate=3e-3, weight_decay=0.0, warmup_epochs=0.1),
        codec=MaskEncoded(ratio=0.9, bits=4, signed=True),
        clients=4,
        batch_size=4,
        epochs=1,
    )
