# SPDX-License-Identifier: Apache-2.0
"""Videos: frames and times as transformers' processor chooses them, odd files, and files that are refused."""

from __future__ import annotations

import numpy as np
import pytest
from media_files import encoded, picture, sound, tone, turned, video

from gemma4.errors import FormatError
from gemma4.media.video import load_video, preprocess, sample_indices, timestamp

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")


BITS = 8


def counting(n: int, height: int = 64, width: int = 128) -> np.ndarray:
    """uint8 [n, height, width, 3]: frame i shows i in binary, a white bar per bit, so that no codec blurs it."""
    bits = (np.arange(n)[:, None] >> np.arange(BITS)) & 1
    bars = np.repeat(bits * 255, width // BITS, axis=1).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(bars[:, None, :, None], (n, height, width, 3)))


def numbers(frames: list[np.ndarray]) -> list[int]:
    return [
        int(sum(2**i for i, bar in enumerate(np.split(frame, BITS, axis=1)) if bar.mean() > 127)) for frame in frames
    ]


# -- against transformers --------------------------------------------------------------------------------------------


def test_sampling_is_transformers():
    utils = pytest.importorskip("transformers.video_utils")
    for total in [32, 33, 50, 60, 61, 299, 300, 1000, 123_457]:
        for wanted in [1, 2, 7, 32]:
            theirs = utils.default_sample_indices_fn(utils.VideoMetadata(total_num_frames=total), num_frames=wanted)
            assert np.array_equal(sample_indices(total, wanted), theirs)
    assert sample_indices(5, 32).tolist() == [0, 1, 2, 3, 4]  # transformers refuses videos this short


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
@pytest.mark.parametrize(("total", "fps"), [(60, 10), (33, 25), (45, 1)])
def test_frames_and_times_are_transformers(tmp_path, container, total, fps):
    utils = pytest.importorskip("transformers.video_utils")
    path = tmp_path / "film.bin"
    path.write_bytes(video(counting(total), fps, container))
    ours = load_video(path, num_frames=8)
    wanted = [i * total // 8 for i in range(8)]
    assert ours.indices.tolist() == wanted and numbers(ours.frames) == wanted
    assert load_video(path.read_bytes(), num_frames=8).timestamps == ours.timestamps
    if container == "matroska":  # says no number of frames, and transformers then finds none
        return
    frames, metadata = utils.read_video_pyav(
        str(path), lambda metadata: utils.default_sample_indices_fn(metadata, num_frames=8)
    )
    assert np.array_equal(np.stack(ours.frames), frames)
    assert ours.fps == metadata.fps == fps
    assert ours.seconds == metadata.timestamps


def test_timestamps_are_the_processors():
    processing = pytest.importorskip("transformers.models.gemma4.processing_gemma4")
    utils = pytest.importorskip("transformers.video_utils")

    class Tokens:
        boi_token, video_token, eoi_token = "[", "v", "]"

    for total, fps in [(200, 24.0), (3000, 29.97), (250_000, 25.0)]:
        frames = [np.zeros((8, 8, 3), np.uint8)] * total
        ours = load_video(frames, num_frames=20, fps=fps)
        metadata = utils.VideoMetadata(total_num_frames=total, fps=fps, frames_indices=ours.indices.tolist())
        inputs = {"num_soft_tokens_per_video": [2], "video_metadata": [metadata]}
        text = processing.Gemma4Processor.replace_video_token(Tokens(), inputs, 0)
        assert " ".join(f"{t} [vv]" for t in ours.timestamps) == text


def test_frames_are_pictures_of_70_tokens():
    pil = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")
    frames = np.stack([picture(90, 160, seed) for seed in range(3)])
    found = preprocess(load_video(frames))
    expected = pil.Gemma4ImageProcessorPil(max_soft_tokens=70)(
        [Image.fromarray(f) for f in frames], return_tensors="np"
    )
    for ours, patches in zip(found, expected["pixel_values"], strict=True):
        assert ours.n_soft_tokens == expected["num_soft_tokens_per_image"][0] <= 70
        assert np.array_equal(ours.patches, patches[: len(ours.patches)])


# -- what is given ---------------------------------------------------------------------------------------------------


def test_frames_given_one_by_one(tmp_path):
    frames = counting(40)
    files = [encoded(Image.fromarray(frame), "PNG") for frame in frames]
    for given in (frames, list(frames), files, [Image.fromarray(frame) for frame in frames]):
        found = load_video(given, fps=2, num_frames=4)
        assert numbers(found.frames) == [0, 10, 20, 30] and found.timestamps == ["00:00", "00:05", "00:10", "00:15"]
    assert load_video(frames[:3]).seconds == [0, 1 / 24, 2 / 24]
    assert load_video(load_video(frames, fps=2)).fps == 2  # loaded already


def test_timestamps_round_down():
    assert [timestamp(s) for s in (0, 0.999, 59.99, 60, 3599.9, 3600, 6000)] == [
        "00:00", "00:00", "00:59", "01:00", "59:59", "60:00", "100:00"
    ]  # fmt: skip


# What a camera stored, and the matrix that the file has for it: (x, y) goes to (a x + c y, b x + d y).
STORED = {
    "as it is": (lambda a: a, (1, 0, 0, 1)),
    "turned 90": (lambda a: np.rot90(a, 1, (1, 2)), (0, 1, -1, 0)),
    "turned 180": (lambda a: np.rot90(a, 2, (1, 2)), (-1, 0, 0, -1)),
    "turned 270": (lambda a: np.rot90(a, 3, (1, 2)), (0, -1, 1, 0)),
    "mirrored left and right": (lambda a: a[:, :, ::-1], (-1, 0, 0, 1)),
    "mirrored top and bottom": (lambda a: a[:, ::-1], (1, 0, 0, -1)),
    "mirrored on the diagonal": (lambda a: a.swapaxes(1, 2), (0, 1, 1, 0)),
    "mirrored on the other diagonal": (lambda a: a[:, ::-1, ::-1].swapaxes(1, 2), (0, -1, -1, 0)),
}


@pytest.mark.parametrize("name", STORED)
def test_telephones_hold_the_camera_sideways_and_mirror(name):
    """The file says how to turn and mirror its frames (16.16 fixed-point numbers in the track header)."""
    upright = np.zeros((4, 64, 96, 3), np.uint8)
    upright[:, :20, :30] = 250  # a bright corner, top left
    store, matrix = STORED[name]
    frame = load_video(turned(video(np.ascontiguousarray(store(upright))), matrix)).frames[0]
    assert frame.shape == (64, 96, 3) and frame.flags.c_contiguous
    assert frame[:15, :25].min() > 200 and frame[30:].max() < 60 and frame[:, 45:].max() < 60


SLOW_THEN_FAST = [*range(0, 4000, 500), *range(4000, 6000, 50)]  # 8 frames in 4 s, then 40 in 2 s


@pytest.mark.parametrize("container", ["mp4", "matroska", "mov"])
def test_frames_of_uneven_films_are_taken_by_time(container):
    """Telephones slow down in the dark: half of the frames may be of the last second."""
    data = video(counting(48), 20, container, times=SLOW_THEN_FAST)
    found = load_video(data, num_frames=6)
    assert numbers(found.frames) == found.indices.tolist() == [0, 2, 4, 6, 8, 28]
    assert found.seconds == [0, 1, 2, 3, 4, 5] and found.timestamps[-1] == "00:05"
    by_index = load_video(data, num_frames=6, sampling="index")
    assert numbers(by_index.frames) == by_index.indices.tolist() == [0, 8, 16, 24, 32, 40]
    assert by_index.seconds == [i / by_index.fps for i in by_index.indices]


def test_sampling_by_index_is_transformers_on_uneven_films(tmp_path):
    utils = pytest.importorskip("transformers.video_utils")
    path = tmp_path / "film.mp4"
    path.write_bytes(video(counting(48), 20, times=SLOW_THEN_FAST))
    frames, metadata = utils.read_video_pyav(
        str(path), lambda metadata: utils.default_sample_indices_fn(metadata, num_frames=8)
    )
    ours = load_video(path, num_frames=8, sampling="index")
    assert np.array_equal(np.stack(ours.frames), frames) and ours.seconds == metadata.timestamps


def test_a_long_still_is_one_frame():
    data = video(counting(12), times=[*range(0, 1100, 100), 31_000])
    found = load_video(data, num_frames=8)
    assert numbers(found.frames) == found.indices.tolist() == [0, 10] and found.seconds == [0, 1]
    everything = load_video(data, num_frames=12)
    assert numbers(everything.frames) == list(range(12)) and everything.timestamps[-2:] == ["00:01", "00:31"]


def test_times_count_from_the_first_frame():
    data = video(counting(12), container="matroska", times=range(5000, 17_000, 1000))
    assert load_video(data, num_frames=4).seconds == [0, 3, 6, 9]


def test_a_stream_that_changes_its_size():
    """Frames of another size are brought to the first one's: the model reads them all alike."""
    small, large = (video(counting(6, 64, width), container="mpegts", codec="mpeg2video") for width in (128, 256))
    found = load_video(small + large, num_frames=12)
    assert {frame.shape for frame in found.frames} == {(64, 128, 3)}
    assert numbers(found.frames)[:5] == list(range(5)) and numbers(found.frames)[-5:] == list(range(1, 6))


def test_a_header_that_promises_too_much():
    data = video(counting(40), container="avi")
    start, end = data.index(b"movi"), data.index(b"idx1")
    cut = load_video(data[: start + (end - start) * 6 // 10], num_frames=8)
    assert 1 < len(cut.frames) < 8
    assert numbers(cut.frames) == cut.indices.tolist() == [0, 5, 10, 15, 20, 25, 30, 35][: len(cut.frames)]


# -- refused ---------------------------------------------------------------------------------------------------------


def bad_files() -> dict[str, tuple[bytes, str]]:
    good, avi = video(counting(20)), video(counting(20), container="avi")
    return {
        "sound.mp4": (sound(tone(0.5), 16_000, "mp4", "aac"), r"no video stream in it \(streams: audio\)"),
        "empty.mp4": (b"", "empty"),
        "text.mp4": (b"not a film, only words\n" * 50, "not a video that can be read|no video stream"),
        "cut.mp4": (good[: len(good) // 2], "not a video that can be read"),
        "no frames.avi": (avi[: avi.index(b"movi") + 4], "no frame"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_files_are_refused_by_name(tmp_path, name):
    data, words = bad_files()[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(FormatError, match=words) as info:
        load_video(path)
    assert name in str(info.value) and "0x" not in str(info.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: load_video([]), "no frames"),
        (lambda: load_video(np.zeros((4, 8, 3), np.uint8)), r"\[frames, height, width, channels\]"),
        (lambda: load_video([np.zeros((4, 8, 3), np.uint8), np.zeros((8, 4, 3), np.uint8)]), "one size"),
        (lambda: load_video(np.zeros((2, 8, 8, 3), np.uint8), fps=0), "fps must be"),
        (lambda: load_video("a.mp4", fps=3), "fps="),
        (lambda: load_video(np.zeros((2, 8, 8, 3), np.uint8), num_frames=0), "num_frames"),
        (lambda: load_video(np.zeros((2, 8, 8, 3), np.uint8), num_frames=True), "num_frames.*True"),
        (lambda: load_video(np.zeros((2, 8, 8, 3), np.uint8), num_frames=2.5), r"num_frames.*2\.5"),
        (lambda: load_video(np.zeros((2, 8, 8, 3), np.uint8), sampling="rate"), '"time" or "index", got \'rate\''),
        (lambda: load_video(7), "int"),
    ],
)
def test_bad_values_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_missing_file_and_package(tmp_path, monkeypatch):
    import sys

    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4"):
        load_video(tmp_path / "nowhere.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r'PyAV.*pip install "gemma4\[media\]"'):
        load_video(b"x")
