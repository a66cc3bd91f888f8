"""Small decoders of each family, with weights by a formula; run as a program it writes golden logits of transformers.

python -m tests.decoders    # needs the extra `bench`
"""

import json
import pathlib
import zlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden" / "decoder_logits.json"
_SIZES = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama 2": dict(_SIZES, model_type="llama", max_position_embeddings=32),
    "llama 3": dict(
        _SIZES,
        model_type="llama",
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_theta=500.0,
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
        tie_word_embeddings=True,
    ),
    "llama with biases": dict(
        _SIZES, model_type="llama", max_position_embeddings=32, head_dim=8, attention_bias=True, mlp_bias=True
    ),
    "qwen 2.5": dict(
        _SIZES,
        model_type="qwen2",
        num_key_value_heads=1,
        max_position_embeddings=32,
        rope_theta=1e6,
        tie_word_embeddings=True,
        use_sliding_window=False,
        sliding_window=8,
        max_window_layers=1,
    ),
    "qwen 3": dict(
        _SIZES, model_type="qwen3", num_key_value_heads=2, head_dim=8, max_position_embeddings=32, rope_theta=1e6
    ),
}
"""config.json of each case, without what follows from the family."""
TOKENS = (np.arange(2 * 13).reshape(2, 13) ** 2 % 19).astype(np.int32)


def tensors(shapes):
    """float32 by Hugging Face's names: of sines, around 1 for normalisations, that no two tensors have alike."""
    found = {}
    for name, shape in shapes.items():
        start = zlib.crc32(name.encode()) % 1000
        values = np.sin(start + 1.7 * np.arange(np.prod(shape))).reshape(shape)
        found[name] = np.float32(1 + 0.3 * values if "norm" in name else 0.6 * values)
    return found


def main():
    import torch
    import transformers

    found = {}
    for case, config in CONFIGS.items():
        options = {name: value for name, value in config.items() if name != "model_type"}
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(config["model_type"], **options, attn_implementation="eager")
        )
        shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        weights = {name: torch.from_numpy(value) for name, value in tensors(shapes).items()}
        model.load_state_dict(weights, strict=not config.get("tie_word_embeddings"))
        model.tie_weights()
        with torch.no_grad():
            logits = model(torch.from_numpy(TOKENS).long()).logits.numpy()
        found[case] = {"shapes": shapes, "logits": np.round(logits.astype(np.float64), 6).tolist()}
    made = {"transformers": transformers.__version__, "torch": torch.__version__, "cases": found}
    GOLDEN.write_text(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
