"""Recordings in any container and codec, decoded to mono at 16 kHz in bounded memory.

libsndfile reads what it reads rightly: WAV, FLAC, MP3, Ogg and others whose header agrees with their content. It is up
to four times as fast as FFmpeg, which comes in PyAV's wheel and reads the rest. The file's content decides which of
them is asked, not its name. A header that claims another length than the content has is not believed.
"""

import contextlib
import io
import math
import mmap
import os
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import av
import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000  # Hz, of every waveform here
PREROLL_SECONDS = (
    0.2  # decoded before a block and thrown away: an MP3 or AAC frame builds on earlier ones, and soundfile
)
# seeks after every read, which makes the decoder forget them
BLOCK_SECONDS = 30  # read at once, so that an hour of 48 kHz stereo is never held whole
BLOCK_SAMPLES = 1 << 24  # of all channels together, at most
MOST_HOURS = 12  # of a waveform in memory (2.8 GB); slices, and checks in blocks, have no limit
RATES = (1_000, 768_000)  # Hz; outside of them a header is not one
CANCELLED_DB = -20.0  # the average of the channels below their own mean power by more: they cancel each other
SILENT_DBFS = -60.0

AUDIO_SUFFIXES = frozenset(
    ".wav .wave .w64 .rf64 .aif .aiff .aifc .au .snd .caf .flac .mp3 .mp2 .mpga .ogg .oga .opus .spx .m4a .m4b .aac"
    " .mp4 .m4v .mov .3gp .3g2 .amr .awb .webm .mkv .mka .wma .asf .wmv .avi .flv .ts .mpg .mpeg .ac3 .wv .tta .ape"
    " .g722 .gsm".split()
)

HEADERLESS = "headerless audio: it does not say its rate or coding; `ffmpeg -f s16le -ar 8000 -ac 1 -i FILE out.wav`"
NO_SOUND = "video without sound"
NO_AUDIO = "unreadable audio"
MANY_HOURS = f"more than {MOST_HOURS} hours in one piece: read it in slices"
CANCELLED = "channels in antiphase: their average cancels the sound, so name one (`channel: 0`)"
NO_FILE, NO_BYTES, NO_SAMPLES = "no such audio file", "zero bytes of audio", "no samples of audio"
DAMAGED, CUT = "damaged audio", "truncated"
UNREAD = "cannot be read now"
NO_NUMBER = "its channel is no number: write 0, 1, left or right"
BROKEN_AUDIO = frozenset(
    {NO_NUMBER, HEADERLESS, NO_SOUND, NO_AUDIO, CANCELLED, NO_FILE, NO_BYTES, NO_SAMPLES, DAMAGED, CUT}
)


class AudioError(ValueError):
    """Audio that cannot be read; its message is a reason to count by: of BROKEN_AUDIO, or channel or length."""


class ReadError(AudioError):
    """A file that is there and cannot be read: its disk, a right or a limit may be mended, and it is as it was."""


@dataclass(frozen=True)
class Sound:
    """What a recording holds."""

    seconds: float  # that can be decoded
    rate: int  # Hz
    channels: int
    is_cut: bool  # its end is missing: it holds less than it was written with


def no_channel(channel: int, channels: int) -> str:
    return f"no channel {channel}: it has {channels}, counted from 0"


def tolerated(seconds: float) -> float:
    """Seconds that may be missing of a recording: rounded durations stay below, a lost word does not."""
    return max(0.1, 0.01 * seconds)


# ------------------------------------------------------------------------------- What a file's own structure says of it

Data = bytes | mmap.mmap


@dataclass(frozen=True)
class Structure:
    """Who reads a file rightly, and whether its end is missing."""

    reader: Literal["soundfile", "ffmpeg"]
    is_cut: bool = False
    seconds: float | None = None  # known from the structure alone; None: the reader knows
    ignores_length: bool = False  # of a WAV's data


def structure(data: Data, name: str) -> Structure:
    """Looks at the parts of a container, without decoding.

    Args:
        data: the whole file.
        name: the file's name; only a format without any header is known by it.
    """
    start = after_id3(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return wav_structure(data)
    if data[start : start + 4] == b"fLaC":
        return flac_structure(data, start)
    if data[:4] == b"OggS":
        return ogg_structure(data)
    if MP3_SYNC.match(data, start) and (found := mp3_structure(data, start)):
        return found
    if data[:4] == b"FORM":
        return Structure("soundfile", is_cut=8 + int.from_bytes(data[4:8], "big") > len(data))
    if data[:4] == b"riff":
        return Structure("soundfile", is_cut=int.from_bytes(data[16:24], "little") > len(data))
    if data[:4] == b".snd":
        size = int.from_bytes(data[8:12], "big")
        return Structure("soundfile", is_cut=len(data) < int.from_bytes(data[4:8], "big") + size < 1 << 32)
    if data[:4] in (b"caff", b"RF64"):
        return Structure("soundfile")
    return Structure("ffmpeg", is_cut=data[4:8] == b"ftyp" and data.find(b"moov") < 0)


def after_id3(data: Data) -> int:
    """Where the ID3v2 tags at a file's start end."""
    place = 0
    while data[place : place + 3] == b"ID3" and len(data) >= place + 10:
        size = 0
        for byte in data[place + 6 : place + 10]:
            size = size << 7 | byte & 0x7F
        place += 10 + size
    return place


UNKNOWN_WAV_BYTES = 0x7FFF_0000  # a recorder that cannot seek back writes a data size above it, or 0
WAV_TAIL = 4096  # bytes after the data that may be anything
UNSEEKABLE_WAV = {0x31, 0x28F, 0x55, 0x161, 0xFF}  # GSM 6.10; G.722, MP3, WMA, AAC are not read by libsndfile at all


def wav_structure(data: Data) -> Structure:
    """A WAV's data chunk ends with the file or before another chunk, or its size is wrong and it ends with the file."""
    place, codec = 12, 1
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name == b"fmt ":
            codec = int.from_bytes(data[place + 8 : place + 10], "little")
        elif name == b"data":
            present, end = len(data) - place - 8, place + 8 + size + size % 2
            after = data[end : end + 4]
            is_short = len(data) - end > WAV_TAIL and not (
                len(after) == 4 and after.isascii() and after.decode().isprintable()
            )
            if (size == 0 and present) or is_short:
                return Structure("ffmpeg", ignores_length=True)
            is_cut = present < size < UNKNOWN_WAV_BYTES
            return Structure("ffmpeg" if codec in UNSEEKABLE_WAV else "soundfile", is_cut)
        place += 8 + size + size % 2
    return Structure("soundfile")


FLAC_FRAME = re.compile(rb"\xff[\xf8\xf9]")


def flac_structure(data: Data, start: int) -> Structure:
    """A FLAC's length is believed if a frame at the end of the file ends where the length says."""
    info = start + 8
    declared = int.from_bytes(data[info + 10 : info + 18], "big") & (1 << 36) - 1  # samples
    largest_block = int.from_bytes(data[info + 2 : info + 4], "big")
    tail = data[-(1 << 20) :]  # holds the largest frame there may be
    ends = (
        flac_frame_end(tail, frame.start() + begin, largest_block)
        for begin in (max(0, len(tail) - (1 << 15)), 0)  # the last frame is nearly always in the last 32 kB
        for frame in FLAC_FRAME.finditer(tail[begin:])
    )
    is_joined = data.find(b"fLaC\0\0\0\x22", start + 4) >= 0
    return Structure("soundfile" if declared and not is_joined and declared in ends else "ffmpeg")


def flac_frame_end(data: bytes, place: int, largest_block: int) -> int | None:
    """The number of the sample after a frame, by its header; None: it is none."""
    head = data[place : place + 16].ljust(16, b"\0")  # a frame of silence is shorter
    if not (code := head[2] >> 4):
        return None
    has_sample_number = head[1] & 1
    ones = 8 - (head[4] ^ 0xFF).bit_length()  # the number is coded like UTF-8
    number, after = head[4] & (0x7F >> ones), 5 + max(0, ones - 1)
    for byte in head[5:after]:
        number = number << 6 | byte & 0x3F
    first = number if has_sample_number else number * largest_block
    if code in (6, 7):
        return first + int.from_bytes(head[after : after + code - 5], "big") + 1
    return first + (192 if code == 1 else 576 << (code - 2) if code < 6 else 256 << (code - 8))


LONGEST_OGG_PAGE = 255 * 0.12  # seconds: as many packets of Opus


def ogg_structure(data: Data) -> Structure:
    """An Ogg file has one logical stream, whose pages are whole."""
    place, pages, is_chained, is_cut = 0, 0, False, False
    granule = 0
    while data[place : place + 4] == b"OggS":
        head = data[place : place + 27]
        sizes = data[place + 27 : place + 27 + head[26]] if len(head) == 27 else b""
        starts_stream = len(head) > 5 and head[5] & 2
        is_chained |= bool(starts_stream and pages and granule)
        place += 27 + len(sizes) + sum(sizes)
        is_cut = len(head) < 27 or len(sizes) < head[26] or place > len(data)
        granule = max(granule, int.from_bytes(head[6:14], "little", signed=True))
        pages += 1
    is_plausible = granule / 48_000 <= pages * LONGEST_OGG_PAGE
    is_broken = place < len(data) and data.find(b"OggS", place) >= 0
    return Structure("ffmpeg" if is_chained or is_broken or not is_plausible else "soundfile", is_cut)


MP3_SYNC = re.compile(rb"\xff[\xe2-\xff]")
MP3_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # by version bits
MP3_KILOBITS = {
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 1): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 1): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}  # by (is MPEG 1, layer bits: 2 is layer II, 1 layer III)


@lru_cache(maxsize=4096)
def mp3_frame(head: bytes) -> tuple[int, int, int] | None:
    """(bytes, samples, Hz) of an MPEG audio frame of layer II or III by its first three bytes; None: it is none."""
    version, layer, rate_code, kilobit_code = head[1] >> 3 & 3, head[1] >> 1 & 3, head[2] >> 2 & 3, head[2] >> 4
    if (
        head[0] != 0xFF
        or head[1] < 0xE0
        or version == 1
        or layer not in (1, 2)
        or rate_code == 3
        or kilobit_code in (0, 15)
    ):
        return None
    rate = MP3_RATES[version][rate_code]
    samples = 576 if layer == 1 and version != 3 else 1152
    return samples * 125 * MP3_KILOBITS[version == 3, layer][kilobit_code] // rate + (head[2] >> 1 & 1), samples, rate


def mp3_structure(data: Data, start: int) -> Structure | None:
    """Walks an MP3's frames: their number is its length, which libsndfile knows only from a right Xing header or at a
    constant bit rate. None if it is none."""
    place, frames, heads = start, 0, set()
    while place + 4 <= len(data) and (frame := mp3_frame(head := data[place : place + 3])):
        frames, place = frames + 1, place + frame[0]
        heads.add(head)
    if frames < 2:
        return None
    kinds = {frame[1:] for head in heads if (frame := mp3_frame(head))}
    first = mp3_frame(data[start : start + 3])
    assert first is not None, "it is among the frames"
    _, samples, rate = first
    is_one_kind = len({(head[1], head[2] & 0xFC) for head in heads}) == 1
    is_one_rate = len(kinds) == 1
    is_whole = place >= len(data) or data[place : place + 3] == b"TAG" or data[place : place + 8] == b"APETAGEX"
    is_cut = place > len(data)
    frames -= is_cut
    if tag := re.search(rb"(?:Xing|Info)\0\0\0(.)(.{4})", data[start : start + 256], re.DOTALL):
        declared = int.from_bytes(tag[2], "big") if tag[1][0] & 1 else -1
        frames -= 1  # the one that holds the tag
        is_cut |= frames < declared
        reader = "soundfile" if is_whole and is_one_rate and declared >= frames else "ffmpeg"
        return Structure(reader, is_cut, frames * samples / rate if is_cut else None)
    return Structure("soundfile" if is_whole and is_one_kind else "ffmpeg", is_cut, frames * samples / rate)


# ---------------------------------------------------------------------------------------------------------- The readers


def content(audio: dict[str, Any]) -> tuple[Data, str]:
    """The bytes of an undecoded `datasets` Audio value (of its file, if it has none itself), and the file's name."""
    name = str(audio.get("path") or "")
    if audio.get("bytes") is None and name:
        if not os.path.isfile(name):
            raise AudioError(NO_FILE)
        try:
            with open(name, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), name
        except ValueError as error:  # nothing to map
            raise AudioError(NO_BYTES) from error
        except OSError as error:
            raise ReadError(f"{UNREAD}: {error.strerror}") from error
    if not audio.get("bytes"):
        raise AudioError(NO_BYTES)
    return audio["bytes"], name


def stream_of(data: Data, name: str) -> BinaryIO:
    return io.BytesIO(data) if isinstance(data, bytes) else open(name, "rb")


class SoundfileReader:
    """Blocks of a file that libsndfile reads rightly."""

    def __init__(self, data: Data, name: str):
        self.sound = soundfile.SoundFile(io.BytesIO(data) if isinstance(data, bytes) else name)
        self.rate, self.channels = self.sound.samplerate, self.sound.channels

    def __enter__(self) -> "SoundfileReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.sound.close()

    def blocks(self, start: float, end: float | None) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (Hz, samples (samples, channels) float32) from `start` to `end` seconds; None: to the end."""
        position, last = round(start * self.rate), math.inf if end is None else round(end * self.rate)
        most = min(BLOCK_SECONDS * self.rate, BLOCK_SAMPLES // self.channels)
        try:
            while (left := min(last, self.sound.frames) - position) > 0:
                preroll = min(position, round(PREROLL_SECONDS * self.rate))
                self.sound.seek(position - preroll)
                block = self.sound.read(preroll + min(left, most), dtype="float32", always_2d=True)[preroll:]
                if not len(block):
                    break
                yield self.rate, block
                position += len(block)
        except soundfile.SoundFileError as error:
            raise AudioError(DAMAGED) from error


FFMPEG_FORMATS = ",".join(  # no playlists, which name other files, and no pictures or subtitles
    "aac ac3 aiff amr amrnb amrwb ape asf au avi caf dts eac3 flac flv g722 gsm matroska mov mp3 mpeg mpegts ogg rm tta"
    " w64 wav wv".split()
)
BY_NAME = {".g722": "g722", ".gsm": "gsm"}  # FFmpeg's formats that have no header
HEADERLESS_NAMES = {".raw", ".pcm", ".sln", ".ul", ".ulaw", ".al", ".alaw", ".vox", ".s16", ".sw"}
EXACT_TIMES = {"mov", "mp3", "aac", "amr", "flac", "wav", "g722"}  # FFmpeg's formats whose packets have exact times
INDEXED = {"mov", "wav"}  # of these, those that are searched in without reading all before
FRAMES_AT_ONCE = 64  # about a second
KNOWN_LENGTHS = {"mov", "matroska", "asf", "avi", "flv", "wav", "flac", "caf", "aiff", "ape", "tta"}  # not estimated


class FFmpegReader:
    """Blocks of a file's first sound track, read by FFmpeg."""

    def __init__(self, data: Data, name: str, ignores_length: bool = False):
        suffix = Path(name).suffix.lower()
        options = {"format_whitelist": FFMPEG_FORMATS} | ({"ignore_length": "1"} if ignores_length else {})
        try:
            self.container = av.open(
                stream_of(data, name),
                mode="r",
                format=BY_NAME.get(suffix),
                container_options=options,
                metadata_errors="replace",
            )
        except (av.FFmpegError, ValueError) as error:
            raise AudioError(HEADERLESS if suffix in HEADERLESS_NAMES else NO_AUDIO) from error
        except OSError as error:
            raise ReadError(f"{UNREAD}: {error.strerror}") from error
        tracks = self.container.streams
        if not tracks.audio or tracks.audio[0].codec_context is None:
            reason = NO_SOUND if tracks.video and not tracks.audio else NO_AUDIO
            self.container.close()
            raise AudioError(reason)
        self.track = tracks.audio[0]
        self.tick = self.track.time_base or Fraction(1, av.time_base)  # seconds
        self.track.codec_context.thread_count = 1
        self.format = self.container.format.name.split(",")[0]
        self.rate, self.channels = self.track.codec_context.sample_rate, self.track.codec_context.channels
        self.is_cut = False  # known after all blocks were read

    def __enter__(self) -> "FFmpegReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def packets(self, start: float) -> Iterator[av.Packet]:
        """The track's packets from `start` seconds, where their times are exact, else from the beginning."""
        begin = (self.track.start_time or 0) + math.floor((start - PREROLL_SECONDS) / self.tick)
        is_late = start > PREROLL_SECONDS and self.format in EXACT_TIMES
        if is_late and self.format in INDEXED:
            self.container.seek(begin, stream=self.track)
        ends = dict.fromkeys(range(len(self.container.streams)), 0)
        try:
            for packet in self.container.demux():
                track, end = packet.stream_index, begin if packet.pts is None else packet.pts + (packet.duration or 0)
                ends[track] = max(ends[track], end)
                if track == self.track.index and not (is_late and end < begin):
                    yield packet
        except av.FFmpegError:
            self.is_cut = True
        if self.format in KNOWN_LENGTHS and not start and self.container.duration:
            declared = self.container.duration / av.time_base
            found = max(
                float(ends[track.index] * track.time_base) for track in self.container.streams if track.time_base
            )
            self.is_cut |= declared - found > tolerated(declared)

    def frames(self, start: float) -> Iterator[av.AudioFrame]:
        """Decoded frames; raises AudioError at the end if more was damaged than is tolerated."""
        lost, kept, failed = 0.0, 0.0, 0.0
        for packet in self.packets(start):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                failed += float((packet.duration or 0) * packet.time_base) or 0.02
                continue
            if frames:
                lost, failed = lost + failed, 0.0  # what follows shows that it was not the end
            for frame in frames:
                kept += frame.samples / frame.sample_rate
                yield frame
        self.is_cut |= failed > 0 and kept > 0
        if lost > tolerated(kept) or (failed and not kept):
            raise AudioError(DAMAGED)

    def blocks(self, start: float, end: float | None) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (Hz, samples (samples, channels) float32) from `start` to `end` seconds; None: to the end."""
        place: int | None = None  # of the next frame, in samples at the frame's rate
        rate, first, last, waiting = 0, 0, math.inf, []
        for frame in self.frames(start):
            block = samples_of(frame)
            if frame.sample_rate != rate or (waiting and waiting[0].shape[1] != block.shape[1]):
                if waiting:
                    yield rate, np.concatenate(waiting)
                    waiting = []
                place = None if place is None else round(place * frame.sample_rate / rate)
                rate = frame.sample_rate
            if place is None:
                is_timed = self.format in EXACT_TIMES and frame.pts is not None
                ticks = (frame.pts or 0) - (self.track.start_time or 0) if is_timed else 0
                place = round(ticks * (frame.time_base or self.tick) * rate)
                first, last = round(start * rate), math.inf if end is None else round(end * rate)
                if self.format == "mov" and self.track.duration:  # the last packet is filled up
                    last = min(last, round(self.track.duration * self.tick * rate))
            if place < first or place + len(block) > last:
                block, place = block[max(0, first - place) : max(0, min(len(block), last - place))], place + len(block)
            else:
                place += len(block)
            waiting.append(block)
            if place >= last:
                break
            if len(waiting) == FRAMES_AT_ONCE:
                yield rate, np.concatenate(waiting)
                waiting = []
        if waiting:
            yield rate, np.concatenate(waiting)


def samples_of(frame: av.AudioFrame) -> np.ndarray:
    """A frame's samples, (samples, channels) float32 in [-1, 1)."""
    samples = frame.to_ndarray()
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    bits = 8 * samples.dtype.itemsize
    middle = 128 if samples.dtype.kind == "u" else 0
    return ((samples.astype(np.float64) - middle) / 2.0 ** (bits - 1)).astype(np.float32)


Reader = SoundfileReader | FFmpegReader


def reader_of(audio: dict[str, Any]) -> tuple[Reader, Structure]:
    """Who reads this recording, opened; raises AudioError."""
    data, name = content(audio)
    found = structure(data, name)
    if found.reader == "soundfile":
        with contextlib.suppress(soundfile.SoundFileError, OSError):
            reader = SoundfileReader(data, name)
            if reader.sound.frames and reader.sound.seekable():
                return plausible(reader), found
            if not reader.sound.frames:
                raise AudioError(NO_SAMPLES)
    try:
        return plausible(FFmpegReader(data, name, found.ignores_length)), found
    except AudioError as error:
        if found.is_cut:
            raise AudioError(CUT) from error
        if str(error) == NO_AUDIO and found.reader == "ffmpeg":
            with contextlib.suppress(soundfile.SoundFileError, OSError):  # VOC, NIST Sphere and other rare ones
                return plausible(SoundfileReader(data, name)), found
        raise


def plausible(reader: Reader) -> Reader:
    if not RATES[0] <= reader.rate <= RATES[1] or reader.channels < 1:
        raise AudioError(NO_AUDIO)
    return reader


# ---------------------------------------------------------------------------------------------------- What is asked for


def inspect_audio(audio: dict[str, Any]) -> Sound:
    """Returns how long a recording is and whether its end is missing; raises AudioError.

    Where its structure tells (WAV, FLAC, MP3, Ogg as they should be), nothing is decoded; else all of it is, in blocks.
    The last files' are remembered: segments of one file follow each other.
    """
    if audio.get("bytes") is None and audio.get("path"):
        with contextlib.suppress(OSError):
            status = os.stat(audio["path"])
            return inspect_file(str(audio["path"]), (status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return inspected(audio)


@lru_cache(maxsize=64)
def inspect_file(path: str, state: tuple[int, int, int]) -> Sound:
    return inspected({"path": path})


def inspected(audio: dict[str, Any]) -> Sound:
    reader, found = reader_of(audio)
    with reader:
        if isinstance(reader, SoundfileReader):
            seconds = reader.sound.frames / reader.rate if found.seconds is None else found.seconds
            return Sound(seconds, reader.rate, reader.channels, found.is_cut)
        seconds = math.fsum(len(block) / rate for rate, block in reader.blocks(0.0, None))
        if not seconds:
            raise AudioError(CUT if found.is_cut else NO_SAMPLES)
        return Sound(seconds, reader.rate, reader.channels, found.is_cut or reader.is_cut)


def audio_blocks(
    audio: dict[str, Any],
    start: float = 0.0,
    end: float | None = None,
    channel: int | None = None,
    may_cancel: bool = False,
) -> Generator[np.ndarray, None, bool]:
    """Yields the mono waveform at 16 kHz, float32 (samples,), half a minute or less at once; see `decode_audio`.

    Returns whether the recording's end is missing, as far as a reader tells that went to `end`.
    """
    channel = audio.get("channel") if channel is None else channel
    stream, stream_rate = None, 0
    power = np.zeros(2)  # of the channels' average, and of the channels on average; summed over samples
    samples = 0
    reader, found = reader_of(audio)
    with reader:
        for rate, block in reader.blocks(start, end):
            if channel is not None and channel >= block.shape[1]:
                raise AudioError(no_channel(channel, block.shape[1]))
            mono = block.mean(axis=1) if channel is None else np.ascontiguousarray(block[:, channel])
            if channel is None and block.shape[1] > 1:
                power += np.square(mono, dtype=np.float64).sum(), np.square(block, dtype=np.float64).mean(axis=1).sum()
                samples += len(block)
            if rate != stream_rate:
                if stream:
                    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)
                stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32") if rate != SAMPLE_RATE else None
                stream_rate = rate
            yield stream.resample_chunk(mono) if stream else mono
    if stream:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)
    is_heard = power[1] > samples * 10 ** (SILENT_DBFS / 10)
    if is_heard and not may_cancel and power[0] < power[1] * 10 ** (CANCELLED_DB / 10):
        raise AudioError(CANCELLED)
    return found.is_cut or (isinstance(reader, FFmpegReader) and reader.is_cut)


def decode_audio(
    audio: dict[str, Any],
    start: float = 0.0,
    end: float | None = None,
    channel: int | None = None,
    may_cancel: bool = False,
) -> np.ndarray:
    """Decodes from `start` to `end` seconds (None: to the end) into a mono waveform at 16 kHz, float32 (samples,).

    Args:
        audio: an undecoded `datasets` Audio value: `bytes`, or else a `path`; `channel`, where the argument is None.
        start: seconds from the first sample that decodes.
        end: seconds; what lies past the end of the recording is missing from the result.
        channel: one of the recording's, from 0; None: their average.
        may_cancel: of a part of a recording whose channels do not cancel each other in all.

    Raises:
        AudioError: it cannot be read, has no such channel, its channels cancel each other, or it is longer than
            MOST_HOURS. That its end is missing is no error: `inspect_audio` tells.
    """
    waveform = bytearray()
    for block in audio_blocks(audio, start, end, channel, may_cancel):
        waveform += block.tobytes()
        if len(waveform) > MOST_HOURS * 3600 * SAMPLE_RATE * 4:
            raise AudioError(MANY_HOURS)
    return np.frombuffer(waveform, np.float32)
