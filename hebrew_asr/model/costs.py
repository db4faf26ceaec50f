"""What a training step of Qwen3-ASR costs in floating-point operations, by component, from its configuration alone."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import transformers

from hebrew_asr.model.attention import WINDOW_TOKENS, is_inside_utterances
from hebrew_asr.model.frames import FRAMES_PER_CHUNK

PEAK_FLOPS = {  # dense bf16 a second, of the makers' data sheets, by a part of the name CUDA gives the device
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "4090": 165e12,
}


@dataclass
class Work:
    """What a pass has to do."""

    chunks: int = 0
    """Seconds of features, the last one of a clip counted whole, padding included."""
    audio_tokens: int = 0
    """Positions of the encoder's layers, which are not padded."""
    window_pairs: int = 0
    """Sum over the encoder's windows of their tokens squared."""
    tokens: int = 0
    """Positions of the language model, padding included."""
    token_pairs: int = 0
    """Sum of the squared widths of what attention is computed in: rows, or utterances."""
    labels: int = 0
    """Positions that are projected to the vocabulary."""

    def __add__(self, other: "Work") -> "Work":
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)})


def work_of(batch: dict[str, torch.Tensor], config: transformers.Qwen3ASRConfig) -> Work:
    """The work in a training batch, packed or padded."""
    rows, width = batch["input_ids"].shape
    if "window_ends" in batch:
        windows = batch["window_ends"].diff().tolist()
    else:
        counts = (batch["input_ids"] == config.audio_token_id).sum(dim=1).tolist()
        windows = [min(WINDOW_TOKENS, count - begin) for count in counts for begin in range(0, count, WINDOW_TOKENS)]
    attended = [width] * rows
    if "utterance_ends" in batch and is_inside_utterances(config.text_config):
        attended = batch["utterance_ends"].diff().tolist()
    return Work(
        chunks=len(batch["input_features"]) * batch["input_features"].shape[2] // FRAMES_PER_CHUNK,
        audio_tokens=sum(windows),
        window_pairs=sum(window**2 for window in windows),
        tokens=rows * width,
        token_pairs=sum(width**2 for width in attended),
        labels=int((batch["labels"] >= 0).sum()),
    )


def real_config() -> transformers.Qwen3ASRConfig:
    """Qwen3-ASR-1.7B."""
    text = {"model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144}
    text |= {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    text |= {"tie_word_embeddings": True}
    return transformers.Qwen3ASRConfig(text_config=text, audio_config={"output_dim": 2048})


def small_config() -> transformers.Qwen3ASRConfig:
    """Qwen3-ASR-0.6B."""
    config = real_config().to_dict()
    config["text_config"] |= {"hidden_size": 1024, "intermediate_size": 3072}
    config["audio_config"] |= {"d_model": 896, "encoder_ffn_dim": 3584, "encoder_attention_heads": 14}
    config["audio_config"] |= {"encoder_layers": 18, "num_hidden_layers": 18, "output_dim": 1024}
    return transformers.Qwen3ASRConfig(**config)


def flops(
    config: transformers.Qwen3ASRConfig, work: Work, trains: Callable[[str], bool] | None = None
) -> dict[str, int]:
    """Floating-point operations of the matrix products, convolutions and attention, by component.

    Args:
        trains: of a parameter's name; None: a forward pass alone. Backwards, a product costs as much again for its
            weight where that trains, and as much again for its input where something below trains.
    """
    audio, text = config.audio_config, config.text_config
    below = False  # whether anything trains below what is being counted
    found = dict.fromkeys(("convolution", "encoder", "projector", "llm", "head"), 0)

    def add(component: str, multiplied: int, parameter: str) -> bool:
        learns = trains is not None and trains(parameter)
        found[component] += 2 * multiplied * (1 + learns + below)
        return learns

    def attend(component: str, multiplied: int, learns: bool) -> None:
        found[component] += 2 * multiplied * (3 if learns or below else 1)  # its two products have two inputs each

    channels, mel, time = 1, audio.num_mel_bins, FRAMES_PER_CHUNK
    for number in (1, 2, 3):
        mel, time = (mel + 1) // 2, (time + 1) // 2
        size = mel * time * channels * audio.downsample_hidden_size * 9
        below |= add("convolution", work.chunks * size, f"model.audio_tower.conv2d{number}.weight")
        channels = audio.downsample_hidden_size
    size = work.chunks * time * mel * channels * audio.d_model
    below |= add("convolution", size, "model.audio_tower.conv_out.weight")
    for number in range(audio.encoder_layers):
        layer = f"model.audio_tower.layers.{number}."
        learns = add("encoder", 3 * work.audio_tokens * audio.d_model**2, layer + "self_attn.q_proj.weight")
        attend("encoder", 2 * work.window_pairs * audio.d_model, learns)
        below |= learns
        add("encoder", work.audio_tokens * audio.d_model**2, layer + "self_attn.out_proj.weight")
        add("encoder", 2 * work.audio_tokens * audio.d_model * audio.encoder_ffn_dim, layer + "fc1.weight")
    below |= trains is not None and trains("model.audio_tower.ln_post.weight")
    projector = "model.multi_modal_projector.linear_"
    below |= add("projector", work.audio_tokens * audio.d_model**2, projector + "1.weight")
    below |= add("projector", work.audio_tokens * audio.d_model * audio.output_dim, projector + "2.weight")
    below |= trains is not None and trains("model.language_model.embed_tokens.weight")
    heads = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    for number in range(text.num_hidden_layers):
        layer = f"model.language_model.layers.{number}."
        learns = add("llm", work.tokens * text.hidden_size * (heads + 2 * keys), layer + "self_attn.q_proj.weight")
        attend("llm", 2 * work.token_pairs * heads, learns)
        below |= learns
        add("llm", work.tokens * text.hidden_size * heads, layer + "self_attn.o_proj.weight")
        add("llm", 3 * work.tokens * text.hidden_size * text.intermediate_size, layer + "mlp.up_proj.weight")
    name = "model.language_model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    add("head", work.labels * text.hidden_size * text.vocab_size, name)
    return found


def peak_flops() -> float | None:
    """What this process's device can do in a second, or None for one that is not in the table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device), None)
