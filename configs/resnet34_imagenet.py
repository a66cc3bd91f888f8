"""ResNet34 on ImageNet-1K, the paper's setting (arXiv 2408.13787): baseline 73.1 %, MS 72.5–73.1 % (its Figure 3).

    msjax train --config configs/resnet34_imagenet.py --data.data-dir DIR --model.cut medium    # 15; or deep, 27
    msjax train --config configs/resnet34_imagenet.py --data.data-dir DIR --model.cut shallow --model.first-block paper

ImageNet is streamed: prepare it once with TFDS (`imagenet2012`, file format array_record) from the archives that you
may download. See `configs/resnet18_cifar100.py` for the shallow cut.

Run time: not measured; meant for several GPUs or TPUs.
"""

from msjax.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(name="resnet34", cut="medium"),
        data=DataConfig(name="imagenet2012"),
        optim=OptimConfig(
            learning_rate=0.1, momentum=0.9, weight_decay=1e-4, schedule="steps", milestones=(30, 60), gamma=0.1
        ),
        clients=10,
        batch_size=256,
        epochs=90,
    )
