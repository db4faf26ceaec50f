"""An engine for ivrit.ai's harness, behind the Hebrew leaderboard: Qwen3-ASR as the evaluation command runs it.

    python evaluate_model.py --engine scripts/ivrit_ai_engine.py --model runs/NAME/final_model \\
        --dataset ivrit-ai/eval-d1:test:text --output eval-d1.csv

in a checkout of ivrit-ai/asr-training, with this project installed beside it (`uv pip install -e FOLDER`). One entry is
transcribed at a time, so the harness's times are those of a batch of one.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import soxr
import torch

from hebrew_asr.data.audio import SAMPLE_RATE
from hebrew_asr.evaluation.engines import decoding_for, open_engine
from hebrew_asr.evaluation.settings import Decoding
from hebrew_asr.evaluation.transcription import cut_at_pauses


def create_app(model_path: str, device: str = "auto") -> Callable[[dict[str, Any]], tuple[str, float]]:
    """Loads a model; returns what transcribes an entry with `audio` {array (samples,), sampling_rate}.

    It returns the text and the seconds that it took. The harness may call it from several threads.
    """
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    engine = open_engine(model_path, Decoding(), torch.device(name))
    engine.decoding = decoding_for(engine, Decoding(), "Hebrew")
    one_at_a_time = threading.Lock()

    def transcribe(entry: dict[str, Any]) -> tuple[str, float]:
        waveform = np.asarray(entry["audio"]["array"], np.float32)
        waveform = soxr.resample(waveform, entry["audio"]["sampling_rate"], SAMPLE_RATE)
        with one_at_a_time:
            began = time.perf_counter()
            texts, seconds, longest = [], len(waveform) / SAMPLE_RATE, engine.decoding.longest_seconds
            for start, end in cut_at_pauses(waveform, longest) if seconds > longest else [(0.0, seconds)]:
                piece = waveform[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
                texts.append(engine.transcribe([engine.features(piece)], [end - start])[0].text)
            return " ".join(filter(None, texts)), time.perf_counter() - began

    return transcribe
