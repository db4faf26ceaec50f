"""What a pass of Qwen3-ASR costs in floating-point operations, by component, from the model's configuration alone."""

from dataclasses import dataclass

import transformers

FRAMES_PER_CHUNK = 100


@dataclass(frozen=True)
class Work:
    """What one forward pass has to do."""

    chunks: int
    """Seconds of features, each clip's last one counted whole, padding included."""
    audio_tokens: int
    """Positions of the encoder's layers, which are not padded."""
    window_pairs: int
    """Sum over the encoder's windows of their tokens squared."""
    tokens: int
    """Positions of the language model, padding included."""
    token_pairs: int
    """Sum over the rows of their width squared."""
    labels: int
    """Positions that are projected to the vocabulary."""


def real_config() -> transformers.Qwen3ASRConfig:
    """Qwen3-ASR-1.7B."""
    text = {"model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144}
    text |= {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    text |= {"tie_word_embeddings": True}
    return transformers.Qwen3ASRConfig(text_config=text, audio_config={"output_dim": 2048})


def forward_flops(config: transformers.Qwen3ASRConfig, work: Work) -> dict[str, int]:
    """Multiplications and additions of the matrix products, convolutions and attention of a forward pass."""
    audio, text = config.audio_config, config.text_config
    channels, mel, time, convolutions = 1, audio.num_mel_bins, FRAMES_PER_CHUNK, 0
    for _ in range(3):
        mel, time = (mel + 1) // 2, (time + 1) // 2
        convolutions += mel * time * channels * audio.downsample_hidden_size * 9
        channels = audio.downsample_hidden_size
    convolutions += time * mel * channels * audio.d_model  # conv_out
    encoder_layer = 4 * audio.d_model**2 + 2 * audio.d_model * audio.encoder_ffn_dim
    heads = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    llm_layer = text.hidden_size * (2 * heads + 2 * keys + 3 * text.intermediate_size)
    multiplied = {
        "convolution": work.chunks * convolutions,
        "encoder": audio.encoder_layers * (work.audio_tokens * encoder_layer + 2 * work.window_pairs * audio.d_model),
        "projector": work.audio_tokens * audio.d_model * (audio.d_model + audio.output_dim),
        "llm": text.num_hidden_layers * (work.tokens * llm_layer + 2 * work.token_pairs * heads),
        "head": work.labels * text.hidden_size * text.vocab_size,
    }
    return {component: 2 * count for component, count in multiplied.items()}
