"""A published Llama of 260 thousand parameters, fine-tuned on a text through a cut, in minutes on two CPU cores.

msjax train --config configs/stories.py --model.weights DIR --data.name TEXT.txt
"""

from msjax.compress import MaskEncoded
from msjax.config import Config, DataConfig, ModelConfig, OptimConfig, TaskConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(name="decoder", cut="2"),
        data=DataConfig(text_length=256),
        task=TaskConfig(name="next_token"),
        optim=OptimConfig(kind="adamw", learning_rate=1e-3, weight_decay=0.01, warmup_epochs=0.1),
        codec=MaskEncoded(ratio=0.9, bits=4, signed=True),
        clients=4,
        batch_size=4,
        epochs=1,
    )
