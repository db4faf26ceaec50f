"""Synthetic speech for the demo world: sentences, voices, noise, and rows with the columns of ivrit-ai's training sets.

Speech is espeak-ng's, called through ctypes from the library inside the espeakng-loader wheel. Waves are (samples,)
float32 at 16 kHz.
"""

import ctypes
import io
import random
import re
from dataclasses import dataclass
from pathlib import Path

import datasets
import espeakng_loader
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf
import soxr

RATE = 16_000  # samples per second

# Words. Of a slot's three lists the checkpoint and the corpus share the first; the second is the corpus's own, the
# third the checkpoint's.

HEBREW = {
    "S": (
        "הילד המורה השכן הרופא הנהג הסבא החייל התלמיד השוטר",
        "הזמר הכלב המלך הטבח העורך המנכ״ל הרמטכ״ל",
        "הדוד החבר הנגר הפועל השחקן הפקיד המנהל הצייר הבחור הדייג הסופר הנשיא המדריך",
    ),
    "V": (
        "אכל ראה לקח מצא קנה שמע מכר צבע צילם",
        "הביא חיפש שבר גנב תיקן הרים מדד",
        "כתב קרא זרק שלח פתח סגר ניקה הזמין איבד בישל שכח החזיר דחף",
    ),
    "O": (
        "תפוח ספר לחם שולחן כיסא מכתב כדור מחשב גיטרה",
        "מטריה עוגה שעון אופניים תמונה מפתח פסנתר",
        "טלפון בקבוק עיתון נעליים חולצה מנורה סכין ארנק צלחת סוכריה מחברת כוס שטיח",
    ),
    "A": (
        "גדול קטן ירוק אדום חדש ישן צהוב",
        "שבור מבריק עתיק נהדר קרוע",
        "לבן שחור כבד מתוק יקר חם מרובע זול נקי",
    ),
    "P": (
        "בבית בגן ברחוב בעיר בשוק בחנות בתחנה",
        "במוזיאון ביער בספריה במטבח בחוף",
        "בכפר בשדה בים במשרד בכיתה בפארק בחדר במלון בנמל בסירה",
    ),
    "T": (
        "אתמול הבוקר היום בלילה בשבת אמש",
        "השבוע בקיץ בחורף בשמונה בשלוש",
        "בערב בצהריים לפתע בשקט מהר ברביעי בחמש",
    ),
}
HEBREW_ORDERS = "SV VO SVO TSV SVP SVOA SVOP TSVO SVPT SVOAP TSVOP SVOAT PSVO TVOAP SVOAPT".split()
ENGLISH = {
    "S": "boy teacher doctor driver soldier farmer neighbor singer king baker",
    "V": "found sold bought lost opened cleaned painted carried wanted broke",
    "O": "apple window letter table bottle guitar camera flower basket hammer",
    "A": "green heavy little yellow wooden broken silver dirty",
    "P": "garden kitchen village station forest market office harbor",
    "T": "yesterday today tonight monday again quickly",
}
ENGLISH_ORDERS = ["the S V the O", "S V O", "a S V the A O", "T the S V a O", "the S V the O in the P", "the S V T"]

# Voices: variants of espeak-ng's Hebrew, none of them in two groups, and of its English.

BASE_VOICES = "m1 m3 m5 f1 f3 f5 Alex Michael Annie Mike linda Alicia boris Mario edward grandpa".split()
CORPUS_VOICES = "m2 m4 m6 f2 f4 belinda Andy pablo Lee quincy Denis travis".split()
HELDOUT_VOICES = "m7 norbert victor aunty".split()
ENGLISH_VOICES = "en-us+m1 en-us+f3 en-us+m5 en-us+Annie en+m3 en+f1".split()

ROWS_PER_RECORDING = 20


@dataclass
class Clip:
    """One utterance, its transcript, and the language the model is to name."""

    wave: np.ndarray
    text: str
    language: str


# Sentences


def hebrew_sentence(rng: random.Random, lists: tuple[int, int]) -> str:
    """Two to six words, each out of the two lists of its slot that `lists` names."""
    return " ".join(rng.choice(" ".join(HEBREW[slot][i] for i in lists).split()) for slot in rng.choice(HEBREW_ORDERS))


def english_sentence(rng: random.Random) -> str:
    order = rng.choice(ENGLISH_ORDERS).split()
    return " ".join(rng.choice(ENGLISH[word].split()) if word in ENGLISH else word for word in order)


def distinct(make, count: int, taken: set[str]) -> list[str]:
    """`count` different results of make(), none of them in `taken`."""
    found: dict[str, None] = {}
    while len(found) < count:
        if (text := make()) not in taken:
            found[text] = None
    return list(found)


def punctuate(text: str, rng: random.Random) -> str:
    words = text.split()
    if len(words) > 3 and rng.random() < 0.4:
        words[1] += ","
    return " ".join(words) + "."


# Speech and noise


class Espeak:
    """espeak-ng as a function from text to samples."""

    SYNCHRONOUS, UTF8, SPEED, PITCH = 2, 1, 1, 3  # values of the library's enums

    def __init__(self):
        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        self.rate = self.lib.espeak_Initialize(self.SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
        self.blocks: list[np.ndarray] = []
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = signature(self.collect)  # an attribute, since the library keeps no reference to it
        self.lib.espeak_SetSynthCallback(self.callback)

    def collect(self, samples, count, _events) -> int:
        if samples and count > 0:
            self.blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def __call__(self, text: str, voice: str, speed: int, pitch: int, peak: float) -> np.ndarray:
        """(samples,) float32 at 16 kHz; speed in words a minute, pitch 0–100; silence at the ends cut to 0.08 s."""
        self.blocks.clear()
        if self.lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        self.lib.espeak_SetParameter(self.SPEED, speed, 0)
        self.lib.espeak_SetParameter(self.PITCH, pitch, 0)
        spoken = text.replace("״", "").encode() + b"\0"
        self.lib.espeak_Synth(spoken, len(spoken), 0, 1, 0, self.UTF8, None, None)
        wave = soxr.resample(np.concatenate(self.blocks).astype(np.float32), self.rate, RATE)
        wave *= peak / np.abs(wave).max()
        loud, margin = np.flatnonzero(np.abs(wave) > 0.01), int(0.08 * RATE)
        return wave[max(0, loud[0] - margin) : loud[-1] + margin]


def delivery(rng: random.Random) -> dict:
    return {"speed": rng.randint(125, 165), "pitch": rng.randint(30, 70), "peak": rng.uniform(0.3, 0.9)}


NOISES = ("white", "pink", "hum", "clicks", "tone")


def noise(kind: str, samples: int, rng: np.random.Generator) -> np.ndarray:
    """(samples,) float32 with a mean square of 1."""
    seconds, wave = np.arange(samples) / RATE, rng.standard_normal(samples)
    if kind == "pink":  # power falls as 1 / frequency
        spectrum = np.fft.rfft(wave)
        wave = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), samples)
    elif kind == "hum":
        base = 2 * np.pi * rng.uniform(48, 120)  # radians per second
        wave = sum(np.sin(base * k * seconds) / k for k in range(1, 6)) + 0.03 * wave
    elif kind == "clicks":  # six a second, each dying away within 2 ms
        impulses = 20.0 * (rng.random(samples) < 6 / RATE)
        wave = np.convolve(0.01 * wave + impulses, np.exp(-np.arange(200) / 30))[:samples]
    elif kind == "tone":
        wave = np.sin(2 * np.pi * rng.uniform(200, 3000) * seconds) + 0.01 * wave
    return (wave / np.sqrt(np.mean(wave**2))).astype(np.float32)


def add_noise(wave: np.ndarray, low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """The wave with one kind of noise, at a signal-to-noise ratio between `low` and `high` dB."""
    gain = np.sqrt(np.mean(wave**2)) * 10 ** (-rng.uniform(low, high) / 20)
    mixed = wave + gain * noise(str(rng.choice(NOISES)), len(wave), rng)
    return mixed / max(1.0, np.abs(mixed).max() / 0.95)


def nonspeech_clip(rng: np.random.Generator) -> Clip:
    """0.6–2.5 s of noise, one in six of them so faint that it is silence."""
    kind = str(rng.choice(("silence", *NOISES)))
    level = 1e-4 if kind == "silence" else 0.5 * 10 ** rng.uniform(-3, -0.9)
    return Clip(level * noise(kind, int(rng.uniform(0.6, 2.5) * RATE), rng), "", "None")


# Rows with the columns of ivrit-ai's training sets

FEATURES = datasets.Features(
    {
        "audio": datasets.Audio(sampling_rate=RATE),
        "transcript": datasets.Value("string"),
        "metadata": {key: datasets.Value("float64") for key in ("seek", "duration", "quality_score")}
        | {key: datasets.Value("string") for key in ("source", "entry_id")},
        "has_prev": datasets.Value("bool"),
        "has_timestamps": datasets.Value("bool"),
        "prev_transcript": datasets.Value("string"),
    }
)
SLICE_SECONDS = 30.0  # metadata.duration in those sets, whatever the clip's own length
TIMESTAMP = re.compile(r"<\|\d+\.\d\d\|>")


def encode(wave: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "opus":
        sf.write(buffer, wave, RATE, format="OGG", subtype="OPUS", compression_level=1.0)  # 1: the lowest bit rate
    else:
        sf.write(buffer, wave, RATE, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.9)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    return sf.read(io.BytesIO(data), dtype="float32")[0]


def row(wave, text: str, source: str, entry: str, kind: str = "opus", seek=0.0, previous="", quality=1.0) -> dict:
    return {
        "audio": {"bytes": encode(wave, kind), "path": f"{entry}.{kind}"},
        "transcript": text,
        "metadata": {"seek": round(seek, 2), "duration": SLICE_SECONDS, "quality_score": quality}
        | {"source": source, "entry_id": entry},
        "has_prev": bool(previous),
        "has_timestamps": bool(TIMESTAMP.search(text)),
        "prev_transcript": previous,
    }


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema), path, row_group_size=100)
    print(f"  {path.parent.name}/{path.name}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB", flush=True)


def stamp(seconds: float) -> str:
    return f"<|{round(seconds / 0.02) * 0.02:.2f}|>"


def timed_row(waves: list[np.ndarray], texts: list[str], crosses: bool) -> tuple[np.ndarray, str]:
    """Segments 0.2 s apart, with timestamps; one that crosses the end is cut there, and only its start is written."""
    parts, transcript, start = [], "", 0.0
    for i, (wave, text) in enumerate(zip(waves, texts, strict=True)):
        if crosses and i == len(waves) - 1:
            parts.append(wave[: int(0.6 * len(wave))])
            transcript += stamp(start)
        else:
            parts += [wave, np.zeros(int(0.2 * RATE), np.float32)]
            transcript += f"{stamp(start)}{text}{stamp(start + len(wave) / RATE)}"
            start += len(wave) / RATE + 0.2
    return np.concatenate(parts), transcript


def recording(espeak: Espeak, entry: str, voice: str, queue: list[str], rng: random.Random) -> list[dict]:
    """Rows of one voice, their sentences taken from the queue: 10 % with timestamps, 4 % two segments, 1 % crossing."""
    manner, noise_rng = delivery(rng), np.random.default_rng(rng.randrange(2**32))
    rows, seek, previous, quality = [], 0.0, "", round(rng.uniform(0.7, 1.0), 3)
    while queue and len(rows) < ROWS_PER_RECORDING:
        draw = rng.random()
        texts = [queue.pop() for _ in range(2 if draw < 0.04 and len(queue) > 1 else 1)]
        texts = [punctuate(text, rng) if rng.random() < 0.15 else text for text in texts]
        waves = [espeak(text, voice, **manner | {"speed": manner["speed"] + rng.randint(-6, 6)}) for text in texts]
        wave, text = waves[0], texts[0]
        if draw < 0.1:
            wave, text = timed_row(waves, texts, crosses=draw < 0.01)
        if rng.random() < 0.15:
            wave = add_noise(wave, 8, 25, noise_rng)
        kind = "mp3" if rng.random() < 0.05 else "opus"
        shown = previous if rng.random() < 0.2 else ""
        rows.append(row(wave, text, "demo-crowd", entry, kind, seek, shown, quality))
        seek, previous = seek + len(wave) / RATE, text
    return rows


def corpus_rows(espeak: Espeak, sentences: list[str], rng: random.Random) -> list[dict]:
    rows, queue, number = [], list(sentences), 0
    while queue:
        voice = "he+" + CORPUS_VOICES[number % len(CORPUS_VOICES)]
        rows += recording(espeak, f"demo-{number:04d}", voice, queue, rng)
        number += 1
    rng.shuffle(rows)
    return rows


def base_clips(espeak: Espeak, hebrew: list[str], english: list[str], nonspeech: int, rng: random.Random) -> list[Clip]:
    """What the checkpoint is trained on: a quarter of the speech noisy, a third of all as Opus leaves it."""
    noise_rng = np.random.default_rng(rng.randrange(2**32))
    clips = [Clip(espeak(t, "he+" + rng.choice(BASE_VOICES), **delivery(rng)), t, "Hebrew") for t in hebrew]
    clips += [Clip(espeak(t, rng.choice(ENGLISH_VOICES), **delivery(rng)), t, "English") for t in english]
    for clip in clips:
        if rng.random() < 0.25:
            clip.wave = add_noise(clip.wave, 6, 25, noise_rng)
    clips += [nonspeech_clip(noise_rng) for _ in range(nonspeech)]
    for clip in clips:
        if rng.random() < 0.33:
            clip.wave = decode(encode(clip.wave, "opus"))
    return clips


def test_clips(
    espeak: Espeak, hebrew: list[str], english: list[str], nonspeech: int, rng: random.Random
) -> dict[str, list[Clip]]:
    """The four test sets; heldout_noisy is heldout with noise 5–15 dB below the speech."""
    noise_rng = np.random.default_rng(rng.randrange(2**32))
    clean = [
        Clip(espeak(t, "he+" + HELDOUT_VOICES[i % len(HELDOUT_VOICES)], **delivery(rng)), t, "Hebrew")
        for i, t in enumerate(hebrew)
    ]
    return {
        "heldout": clean,
        "heldout_noisy": [Clip(add_noise(clip.wave, 5, 15, noise_rng), clip.text, "Hebrew") for clip in clean],
        "english": [Clip(espeak(t, rng.choice(ENGLISH_VOICES), **delivery(rng)), t, "English") for t in english],
        "nonspeech": [nonspeech_clip(noise_rng) for _ in range(nonspeech)],
    }


def read_clips(folder: Path, language: str) -> list[Clip]:
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return [Clip(decode(row["audio"]["bytes"]), row["transcript"], language) for row in rows]
