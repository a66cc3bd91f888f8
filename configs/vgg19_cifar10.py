"""VGG19 on CIFAR-10, the paper's setting (arXiv 2408.13787): baseline 93.8 %, MS 93.3–93.7 % (its Figure 3).

    msjax train --config configs/vgg19_cifar10.py --model.cut shallow          # or medium, deep: cuts 2, 8, 15
    msjax train --config configs/vgg19_cifar10.py --codec "Identity()"         # or TopK, RandTopK, Uniform, …

Run time: not measured; meant for a GPU. The paper has ten clients; its program has one: --clients 1.
"""

from msjax.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(name="vgg19", cut="shallow"),
        data=DataConfig(name="cifar10"),
        optim=OptimConfig(learning_rate=0.1, momentum=0.9, weight_decay=5e-4, schedule="cosine"),
        clients=10,
        batch_size=256,
        epochs=200,
    )
