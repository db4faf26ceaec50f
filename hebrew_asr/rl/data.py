"""Utterances for rollouts."""

from typing import Any, Protocol

import numpy as np

from hebrew_asr.data.audio import SAMPLE_RATE
from hebrew_asr.data.augmentation import draw_noise
from hebrew_asr.data.utterances import SpeechDataset, UtteranceSettings, log_mel


class RolloutSettings(UtteranceSettings, Protocol):
    nonspeech_share: float


class RolloutDataset(SpeechDataset):
    """Training utterances, some of which are heard as silence or noise and have no text."""

    config: RolloutSettings

    def utterance(self, row: dict[str, Any], epoch: int, number: int) -> dict[str, Any]:
        random = np.random.default_rng([self.config.seed, epoch, number, 3])
        if random.random() >= self.config.nonspeech_share:
            return super().utterance(row, epoch, number)
        waveform = nonspeech(self.config.waveform_augmentation.noise_folder, random)
        features = log_mel(self.feature_extractor, waveform)
        heard = {"features": features, "text": "", "context": "", "language": "None"}
        return heard | {"epoch": int(epoch), "index": int(number)}


def nonspeech(folder: str | None, random: np.random.Generator) -> np.ndarray:
    """0.6 to 5 s of noise at −60 to −15 dBFS, one in six of them at −90, which is silence."""
    noise = draw_noise(int(random.uniform(0.6, 5) * SAMPLE_RATE), folder, random).astype(np.float32)
    level = -90 if random.random() < 1 / 6 else random.uniform(-60, -15)
    loudness = max(1e-9, float(np.sqrt(np.mean(np.square(noise)))))
    return np.clip(noise * (10 ** (level / 20) / loudness), -1, 1)


def keep_utterances(micro_batches: list) -> tuple[list[dict[str, Any]], list[str]]:
    """One step's share of one process, not collated yet: what will be trained on are samples."""
    found = [u for utterances in micro_batches for u in utterances]
    return [u for u in found if "dropped" not in u], [u["dropped"] for u in found if "dropped" in u]
