"""How long audio is as mel frames and as tokens."""

MEL_BINS = 128
FRAMES_PER_CHUNK = 100  # the encoder's convolutions see the mel axis in chunks of 1 s, padded to a whole number of them
TOKENS_PER_CHUNK = 13
SHORTEST_CLIP = 0.5  # seconds; the extractor pads shorter ones to it


def audio_token_count(frames: int) -> int:
    """Placeholders for `frames` mel frames: three convolutions of stride 2 on each chunk of 100 frames."""
    whole, rest = divmod(frames, FRAMES_PER_CHUNK)
    for _ in range(3):
        rest = (rest + 1) // 2
    return whole * TOKENS_PER_CHUNK + rest
