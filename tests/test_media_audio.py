# SPDX-License-Identifier: Apache-2.0
"""Sound: the features of transformers' extractors, its loading and resampling, odd and refused files."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest
from media_files import sound, tone, video

from gemma4.errors import FormatError
from gemma4.media import audio
from gemma4.media.audio import MAX_SAMPLES, load_audio, log_mel, n_frames, n_soft_tokens, raw_frames

LENGTHS = [161, 320, 321, 480, 481, 1000, 16_000, 16_001, 38_560, 48_000, 99_360, 160_000, MAX_SAMPLES]


def extractor():
    module = pytest.importorskip("transformers.models.gemma4.feature_extraction_gemma4")
    return module.Gemma4AudioFeatureExtractor()


def replaced(mask) -> int:
    """How many soft tokens transformers' processor puts for this mask."""
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

    class Tokens:
        boa_token, audio_token, eoa_token = "<", "a", ">"

    text = Gemma4Processor.replace_audio_token(Tokens(), {"input_features_mask": [mask]}, 0)
    return len(text) - 2


@pytest.mark.parametrize("n", LENGTHS)
def test_log_mel_is_transformers(n):
    samples = tone(n / 16_000 + 0.01, seed=n)[:n]
    out = extractor()([samples], return_tensors="np")
    features, mask = out["input_features"][0], out["input_features_mask"][0]
    ours = log_mel(samples)
    assert ours.dtype == np.float32 and ours.shape == (mask.sum(), 128) == (n_frames(n), 128)
    assert mask[: len(ours)].all()
    assert np.abs(ours - features[mask]).max() < 1e-5
    assert n_soft_tokens(n) == replaced(mask)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 30.0])
def test_log_mel_of_silence_and_of_loud_sound(scale):
    samples = tone(0.5) * np.float32(scale)
    expected = extractor()([samples], return_tensors="np")
    assert np.abs(log_mel(samples) - expected["input_features"][0][expected["input_features_mask"][0]]).max() < 1e-5


def test_soft_tokens_are_counted_as_transformers_does():
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

    class Processor:
        feature_extractor, audio_seq_length = extractor(), 750

    for n in [*range(1, 2000, 7), *range(2000, MAX_SAMPLES, 9973), MAX_SAMPLES]:
        assert n_soft_tokens(n) == Gemma4Processor._compute_audio_num_tokens(Processor(), np.empty(n), 16_000), n
    known = {38_560: 60, 48_000: 75, 48_800: 76, 99_360: 155, MAX_SAMPLES: 750}
    assert {n: n_soft_tokens(n) for n in known} == known


@pytest.mark.parametrize("n", [1, 639, 640, 641, 16_000, 100_001])
def test_raw_frames_are_transformers(n):
    module = pytest.importorskip("transformers.models.gemma4_unified.feature_extraction_gemma4_unified")
    samples = tone(n / 16_000 + 0.01, seed=n)[:n]
    out = module.Gemma4UnifiedAudioFeatureExtractor()(samples, return_tensors="np")
    assert np.array_equal(raw_frames(samples), out["input_features"][0])


def test_a_frame_looks_20_ms_back_and_forth():
    """An impulse shows in the frames around it, and nowhere else."""
    samples = np.zeros(4_000, np.float32)
    samples[2_000] = 1
    loud = np.flatnonzero(np.abs(log_mel(samples) - np.log(1e-3)).max(axis=1) > 1e-3)
    assert loud.tolist() == [12, 13]  # centred at 1,920 and 2,080; half a window is 160


# -- loading ---------------------------------------------------------------------------------------------------------


def written(samples, rate, form="WAV", subtype=None) -> bytes:
    soundfile = pytest.importorskip("soundfile")
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_loading_is_transformers(tmp_path, rate, channels):
    pytest.importorskip("soxr")
    sound = np.stack([tone(7.03, rate, seed=i, hertz=200 + 90 * i) for i in range(channels)], axis=1)
    path = tmp_path / "sound.wav"
    path.write_bytes(written(sound, rate, subtype="FLOAT"))
    theirs = pytest.importorskip("transformers.audio_utils").load_audio(str(path), 16_000, backend="soundfile")
    ours = load_audio(path)
    assert ours.dtype == np.float32 and np.array_equal(ours, theirs)
    assert np.array_equal(load_audio(path.read_bytes()), ours)
    assert np.array_equal(load_audio(sound, rate), ours)


@pytest.mark.parametrize(("form", "subtype", "far"), [
    ("WAV", "PCM_16", 1e-4), ("WAV", "PCM_U8", 1e-2), ("WAV", "PCM_24", 1e-6), ("FLAC", "PCM_16", 1e-4),
    ("OGG", "VORBIS", 0.1), ("OGG", "OPUS", 0.2), ("MP3", None, 0.1),
])  # fmt: skip
def test_formats(tmp_path, form, subtype, far):
    rate = 48_000
    clean = 0.4 * np.sin(2 * np.pi * 330 * np.arange(2 * rate) / rate)
    data = written(clean, rate, form, subtype)
    path = tmp_path / "sound"  # the content decides, not the name
    path.write_bytes(data)
    ours, expected = load_audio(path), load_audio(clean, rate)
    assert abs(len(ours) - len(expected)) < 2_000
    n = min(len(ours), len(expected)) - 2_000
    assert np.abs(ours[1_000:n] - expected[1_000:n]).mean() < far
    assert np.array_equal(load_audio(data), ours)
    assert n_soft_tokens(len(ours)) in (50, 51)


def test_integers_are_full_scale():
    floats = tone(0.2)
    for dtype, full, middle in ((np.int16, 2**15, 0), (np.int32, 2**31, 0), (np.uint8, 2**7, 128)):
        integers = np.clip(np.round(floats * float(full) + middle), np.iinfo(dtype).min, np.iinfo(dtype).max)
        assert np.abs(load_audio(integers.astype(dtype)) - floats).max() < 1.1 / full + 1e-7


WIDE = {  # full scale and middle of the values, type that holds them
    "int16 in int32": (2**15, 0, np.int32), "int16 in int64": (2**15, 0, np.int64),
    "int32 in int64": (2**31, 0, np.int64), "int64": (2**63, 0, np.int64), "int8": (2**7, 0, np.int8),
    "uint16": (2**15, 2**15, np.uint16),
    "uint32": (2**31, 2**31, np.uint32), "int16 big-endian": (2**15, 0, ">i2"),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("loud", [1.0, 0.05])
def test_integers_of_other_types_are_full_scale(name, loud):
    full, middle, dtype = WIDE[name]
    floats = tone(0.2).astype(np.float64) * loud
    integers = (np.round(floats * float(full)).astype(np.int64).astype(object) + middle).astype(dtype)
    assert np.abs(load_audio(integers) - floats).max() < 1.1 / full + 1e-7
    stereo = load_audio(np.stack([integers, integers], axis=1), 16_000)
    assert np.abs(stereo - floats).max() < 1.1 / full + 1e-6


def test_silence_in_any_type_is_silence():
    for dtype in (np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64):
        assert not load_audio(np.zeros(400, dtype)).any()
    for dtype in (np.uint8, np.uint16, np.uint32, np.uint64):
        assert not load_audio(np.full(400, np.iinfo(dtype).max // 2 + 1, dtype)).any()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_bytes_in_a_wide_type_are_refused(dtype):
    """8-bit samples, signed or not, taken for 16 bits would be all but silent."""
    for samples in (np.round(tone(0.2) * 127), np.round(tone(0.2) * 127) + 128):
        with pytest.raises(ValueError, match="neither 16 bits nor the full scale"):
            load_audio(samples.astype(dtype))
    assert not load_audio(np.zeros(3200, dtype)).any()


def test_quiet_sound_as_decoders_give_it_stays_quiet():
    """16 bits, left-justified in 32."""
    quiet = np.round(tone(0.2) * 100).astype(np.int32)
    assert np.array_equal(load_audio(quiet << 16), load_audio(quiet.astype(np.int16)))


# -- what telephones record ------------------------------------------------------------------------------------------

PHONES = [
    ("ipod", "aac", ".m4a"), ("adts", "aac", ".aac"), ("webm", "libopus", ".webm"), ("mp4", "aac", ".mp4"),
    ("mov", "aac", ".mov"), ("3gp", "aac", ".3gp"), ("ogg", "libopus", ".opus"), ("matroska", "flac", ".mka"),
    ("ipod", "alac", ".m4a"),
]  # fmt: skip


@pytest.mark.parametrize(("container", "codec", "ending"), PHONES)
def test_what_telephones_record(tmp_path, container, codec, ending):
    pytest.importorskip("av")
    rate, clean = 48_000, (0.4 * np.sin(2 * np.pi * 330 * np.arange(2 * 48_000) / 48_000)).astype(np.float32)
    path = tmp_path / f"sound{ending}"
    path.write_bytes(sound(clean, rate, container, codec))
    ours = load_audio(path)
    assert ours.dtype == np.float32 and np.array_equal(load_audio(path.read_bytes()), ours)
    assert abs(len(ours) - 32_000) < 1_000
    middle = ours[8_000:24_000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert abs(np.argmax(spectrum) * 16_000 / len(middle) - 330) < 2  # hertz
    assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(0.4, rel=0.05)
    if codec in ("flac", "alac"):
        assert np.abs(ours - load_audio(clean, rate)).max() < 1e-4


@pytest.mark.parametrize(
    ("codec", "far"), [("pcm_u8", 1 / 128), ("pcm_s16le", 2**-15), ("pcm_s32le", 2**-24), ("pcm_f64le", 2**-24)]
)
def test_samples_of_every_type_that_ffmpeg_gives(codec, far):
    clean = tone(0.5)
    assert np.abs(load_audio(sound(clean, 16_000, "matroska", codec)) - clean).max() <= far


def test_the_sound_track_of_a_film():
    """The picture is left alone, both channels are heard."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    left, right = tone(1.0, 48_000), tone(1.0, 48_000, seed=1, hertz=600)
    with av.open(buffer, "w", format="matroska") as out:
        film, track = out.add_stream("mpeg4", rate=10), out.add_stream("pcm_s16le", rate=48_000)
        film.height = film.width = 64
        film.pix_fmt, track.layout = "yuv420p", "stereo"
        for _ in range(10):
            out.mux(film.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        samples = np.round(np.stack([left, right], axis=1) * 32_768).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout="stereo")
        frame.sample_rate = 48_000
        out.mux([*film.encode(), *track.encode(frame), *track.encode()])
    assert np.array_equal(load_audio(buffer.getvalue()), load_audio(samples, 48_000))


def test_blocks_do_not_show(monkeypatch):
    sound = np.stack([tone(2.0, 44_100), tone(2.0, 44_100, seed=1)], axis=1)
    data = written(sound, 44_100, subtype="FLOAT")
    whole = load_audio(data)
    monkeypatch.setattr(audio, "_BLOCK", 777)
    assert np.array_equal(load_audio(data), whole)


# -- refused ---------------------------------------------------------------------------------------------------------


BAD_FILES = (
    "empty.wav", "text.wav", "nan.wav", "silent header.wav", "cut.wav", "cut.flac", "cut.m4a", "film.mp4", "noise.raw",
)  # fmt: skip


def bad_files() -> dict[str, tuple[bytes, str]]:
    nan = tone(0.5)
    nan[4_000] = np.nan
    header = written(tone(0.1), 16_000)
    return {
        "empty.wav": (b"", "empty"),
        "text.wav": (b"these are words, not waves\n" * 30, "not audio that can be read"),
        "nan.wav": (written(nan, 16_000, subtype="FLOAT"), r"sample 4000 \(at 0\.25 s\) is nan"),
        "silent header.wav": (written(np.zeros(0), 16_000), "no sound"),
        "cut.wav": (header[:20], "not audio that can be read"),
        "cut.m4a": (sound(tone(1.0), 16_000, "ipod", "aac")[:300], "not audio that can be read"),
        "film.mp4": (video(np.zeros((3, 48, 48, 3), np.uint8)), r"not audio .*no sound track in it \(streams: video\)"),
        "noise.raw": (np.random.default_rng(0).bytes(5_000), "not audio that can be read"),
        "cut.flac": (written(tone(1.0), 16_000, "FLAC")[:60], "not audio that can be read|no sound"),
    }


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_by_name(tmp_path, name):
    pytest.importorskip("soundfile")
    data, words = bad_files()[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(FormatError, match=words) as info:
        load_audio(path)
    assert name in str(info.value) and "0x" not in str(info.value)
    with pytest.raises(FormatError, match=words):
        load_audio(data)


def test_hours_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "long.wav"
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 1, 8_000, 0, "NONE", ""))
        out.writeframes(bytes(9 * 8_000))
    soundfile = pytest.importorskip("soundfile")
    assert load_audio(path).shape == (9 * 16_000,)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio, "MAX_SECONDS", 8)
        patch.setattr(soundfile.SoundFile, "read", None)
        with pytest.raises(FormatError, match=r"long\.wav: more than"):
            load_audio(path)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: load_audio(np.zeros(0, np.float32)), "no sound"),
        (lambda: load_audio(np.array([0.0, np.inf])), "sample 1 .* is inf"),
        (lambda: load_audio(np.zeros((2, 16_000))), r"\(2, 16000\)"),
        (lambda: load_audio(np.zeros((2, 2, 2))), r"\[n, channels\]"),
        (lambda: load_audio(np.zeros(9), 12), "12 samples per second"),
        (lambda: load_audio(np.zeros(9, complex)), "floats or integers, got complex"),
        (lambda: load_audio(np.zeros(9, bool)), "floats or integers, got bool"),
        (lambda: load_audio(np.array(["a", "b"])), "floats or integers, got <U1"),
        (lambda: load_audio([0.5, None]), "floats or integers, got object"),
        (lambda: load_audio(np.zeros((9, 0))), r"\(9, 0\)"),
        (lambda: load_audio(np.arange(999) * 7919), r"int64 samples of up to 7903162: neither 16 bits .*2\*\*23"),
        (lambda: load_audio(np.arange(999, dtype=np.uint16)), "uint16 samples from 0 to 998 never cross .* 32768"),
        (lambda: load_audio(tone(0.1) * 32768), r"sample \d+ .* floats must be in -1\.\.1"),
        (lambda: load_audio(np.array([0.0, 1e300])), r"sample 1 .* is 1e\+300: floats must be"),
        (lambda: load_audio(np.array([[0.0, 0.0], [0.0, np.nan]]), 8_000), r"sample 1 \(at 0\.00 s\) is nan"),
        (lambda: load_audio("a.wav", 16_000), "rate="),
        (lambda: load_audio("http://example.org/a.wav"), "nothing is fetched"),
        (lambda: log_mel(np.zeros(160, np.float32)), "160 samples of audio at 16 kHz are too few: at least 161"),
        (lambda: log_mel(np.zeros(MAX_SAMPLES + 1, np.float32)), "30.0 s of audio.*transcribe"),
        (lambda: log_mel(np.zeros((5, 5), np.float32)), "16 kHz"),
        (lambda: raw_frames(np.zeros(0, np.float32)), "16 kHz"),
    ],
)
def test_bad_values_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_missing_file_and_missing_packages(tmp_path, monkeypatch):
    import sys

    with pytest.raises(FileNotFoundError, match=r"nowhere\.wav"):
        load_audio(tmp_path / "nowhere.wav")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(ImportError, match=r'soundfile.*pip install "gemma4\[media\]"'):
        load_audio(b"x")
    with pytest.raises(ImportError, match=r'soxr.*pip install "gemma4\[media\]"'):
        load_audio(np.zeros(100), 8_000)
    assert load_audio(np.ones(100)).tolist() == [1.0] * 100  # arrays at 16 kHz need neither


def test_a_recording_that_needs_pyav_says_so(monkeypatch):
    import sys

    data = sound(tone(0.5), 16_000, "ipod", "aac")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(FormatError, match=r'not audio .*PyAV.*pip install "gemma4\[media\]", which reads more kinds'):
        load_audio(data)
