"""What is read of files that somebody sends, and what is refused."""

from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import time
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import start_video
from pipeline.errors import InvalidRequest
from pipeline.start import Start, centre_crop
from pipeline.start_file import MAX_PIXELS, read_start
from tests.pictures import SPEC, encoded, picture, write_video

FORMATS = ("PNG", "JPEG", "WEBP")
SHAPE = (1, SPEC.height, SPEC.width, 3)


def read_bytes(data: bytes, folder: Path, name: str = "file") -> Start:
    path = folder / name
    path.write_bytes(data)
    return read_start(path, SPEC)


def is_valid(start: Start) -> bool:
    return start.kind == "image" and start.frames.shape == SHAPE and start.frames.dtype == np.uint8


# ---- pictures


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_is_read_whatever_its_name(kind: str, tmp_path: Path) -> None:
    data = encoded(picture(), kind)
    start = read_bytes(data, tmp_path, "holiday.txt")
    assert is_valid(start)
    assert start.sha256 == hashlib.sha256(data).hexdigest()
    assert start.source_size == (96, 80)
    assert start.crop == (0, 12, 96, 55)  # 112:64 out of the middle
    expected = np.asarray(picture().crop((0, 12, 96, 67)).resize((SPEC.width, SPEC.height), Image.Resampling.LANCZOS))
    worst = np.abs(start.frames[0].astype(int) - expected).mean()
    assert worst == 0 if kind == "PNG" else worst < 12


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_pictures_are_refused(kind: str, tmp_path: Path) -> None:
    data = encoded(picture(), kind)
    for cut in np.linspace(0, len(data) - 32, 60).astype(int):  # the very end of a PNG file holds no pixels
        with pytest.raises(InvalidRequest):
            read_bytes(data[:cut], tmp_path)


@pytest.mark.parametrize("kind", FORMATS)
def test_flipped_bytes_are_refused_or_give_a_picture(kind: str, tmp_path: Path) -> None:
    data = encoded(picture(), kind)
    rng = np.random.default_rng(1)
    for _ in range(60):
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= int(rng.integers(1, 256))
        try:
            start = read_bytes(bytes(changed), tmp_path)
        except InvalidRequest:
            continue
        assert is_valid(start)


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    return encoded(picture(80, 96), "JPEG", exif=exif)


def _transparent() -> bytes:
    image = picture(mode="RGBA")
    image.putalpha(0)
    return encoded(image, "PNG")


ODD = {
    "grey": (encoded(picture(mode="L"), "PNG"), True),
    "one bit": (encoded(picture(mode="1"), "PNG"), True),
    "palette": (encoded(picture().quantize(16), "PNG"), True),
    "16 bit grey": (encoded(Image.fromarray(np.full((80, 96), 32768, np.uint16)), "PNG"), True),
    "grey and alpha": (encoded(picture(mode="LA"), "PNG"), True),
    "cmyk": (encoded(picture(mode="CMYK"), "JPEG"), True),
    "turned": (_turned(), True),
    "transparent": (_transparent(), True),
    "animated": (encoded(picture(), "WEBP", save_all=True, append_images=[picture().rotate(90)]), True),
    "one pixel": (encoded(picture(1, 1), "PNG"), True),
    "gif": (encoded(picture(), "GIF"), False),
    "bmp": (encoded(picture(), "BMP"), False),
    "tiff": (encoded(picture(), "TIFF"), False),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", False),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", False),
    "text": (b"a red balloon", False),
    "empty": (b"", False),
    "too wide": (encoded(picture(900, 100), "PNG"), False),
    "only a head": (b"\x89PNG\r\n\x1a\n", False),
    "playlist": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", False),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures(name: str, tmp_path: Path) -> None:
    data, good = ODD[name]
    if good:
        assert is_valid(read_bytes(data, tmp_path))
        return
    with pytest.raises(InvalidRequest) as error:
        read_bytes(data, tmp_path)
    assert str(tmp_path) not in str(error.value) and str(error.value).endswith(".")


def test_pictures_are_upright_and_keep_their_brightness(tmp_path: Path) -> None:
    assert read_bytes(ODD["turned"][0], tmp_path).source_size == (96, 80)
    assert np.abs(read_bytes(ODD["16 bit grey"][0], tmp_path).frames.astype(int) - 128).max() <= 1
    assert (read_bytes(ODD["transparent"][0], tmp_path).frames == 255).all()


def _png_that_claims(width: int, height: int) -> bytes:
    """A small PNG file whose head says it is huge, with pixels that would really unpack to as many bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = b"\0" * (1 + 3 * width)
    data = b"".join(packer.compress(rows) for _ in range(min(height, 2000))) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [12_000, 30_000])  # Pillow itself only warns of the first, and refuses the second
def test_bombs_are_refused_before_they_are_unpacked(side: int, tmp_path: Path) -> None:
    data = _png_that_claims(side, side)
    began = time.process_time()
    with warnings.catch_warnings(), pytest.raises(InvalidRequest, match="megapixels"):
        warnings.simplefilter("ignore")
        read_bytes(data, tmp_path)
    assert time.process_time() - began < 1


def test_the_largest_picture_is_read_and_one_row_more_is_not(tmp_path: Path) -> None:
    width, height = 4000, MAX_PIXELS // 4000
    assert is_valid(read_bytes(encoded(Image.new("RGB", (width, height)), "JPEG"), tmp_path))
    with pytest.raises(InvalidRequest, match="4000x4001 pixels"):
        read_bytes(encoded(Image.new("RGB", (width, height + 1)), "JPEG"), tmp_path)


def test_crop_is_the_largest_part_in_the_middle() -> None:
    assert centre_crop((200, 100), (100, 100)) == (50, 0, 100, 100)
    assert centre_crop((100, 200), (100, 50)) == (0, 75, 100, 50)
    assert centre_crop((832, 480), (832, 480)) == (0, 0, 832, 480)
    assert centre_crop((1, 1), (832, 480)) == (0, 0, 1, 1)


@pytest.mark.parametrize("path", ["missing.png", ".", "zero\0byte.png"])
def test_a_file_that_is_none(path: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_start(tmp_path / path, SPEC)


# ---- videos


@pytest.mark.parametrize(("frames", "taken"), [(9, 9), (12, 9), (20, 9), (21, 21), (33, 33), (60, 33)])
def test_the_last_frames_that_make_blocks_are_taken(frames: int, taken: int, tmp_path: Path) -> None:
    start = read_start(write_video(tmp_path / "clip.mp4", frames), SPEC)
    assert (start.kind, start.frames.shape) == ("video", (taken, *SHAPE[1:]))
    assert start.source_frames == frames
    # Frame n has the level 16 + 4 n: the last ones were taken, in their order.
    levels = start.frames.mean(axis=(1, 2, 3))
    expected = np.minimum(16 + 4 * np.arange(frames), 255)[-taken:]
    assert np.abs(levels - expected).max() < 3


@pytest.mark.parametrize(
    ("stride", "block", "needed"), [(4, 3, (9, 21, 33)), (4, 1, (1, 5, 9)), (2, 3, (5, 11, 17)), (4, 5, (17, 37, 57))]
)
def test_counts_follow_from_the_model(stride: int, block: int, needed: tuple[int, ...]) -> None:
    spec = replace(SPEC, temporal_stride=stride, frames_per_block=block, window_frames=3 * block, sink_frames=block)
    assert tuple(spec.frames_in(blocks) for blocks in (1, 2, 3)) == needed
    for blocks, frames in enumerate(needed, 1):
        assert spec.blocks_in(frames) == blocks and spec.blocks_in(frames - 1) == blocks - 1
        spec.check_start(Start(kind="video", frames=np.zeros((frames, *SHAPE[1:]), np.uint8)))
        if stride > 1:
            with pytest.raises(InvalidRequest, match="whole blocks"):
                spec.check_start(Start(kind="video", frames=np.zeros((frames + 1, *SHAPE[1:]), np.uint8)))


def test_too_short_a_video_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"has 8 frames \(0.50 s\) at 16 FPS.* at least 9 \(0.56 s\)"):
        read_start(write_video(tmp_path / "clip.mp4", 8), SPEC)


def test_too_long_a_video_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_video, "MAX_SECONDS", 2.0)
    assert read_start(write_video(tmp_path / "two.mp4", 32), SPEC).source_frames == 32
    with pytest.raises(InvalidRequest, match="more than 2 s"):
        read_start(write_video(tmp_path / "longer.mp4", 40), SPEC)


@pytest.mark.parametrize(("frames", "good"), [(1798, True), (1799, True), (1802, False)])
def test_a_whole_minute_is_read_whatever_its_rate(tmp_path: Path, frames: int, good: bool) -> None:
    """At 29.97 a second, 1799 frames begin within a minute. The last is shown beyond it: at 24 a second one more."""
    path, size = tmp_path / "minute.mp4", f"{SPEC.width}x{SPEC.height}"
    source = ["-f", "lavfi", "-i", f"color=gray:size={size}:rate=30000/1001", "-frames:v", str(frames)]
    command = [start_video.ffmpeg_binary(), "-loglevel", "error", *source, "-preset", "ultrafast", str(path)]
    subprocess.run(command, check=True)
    spec = replace(SPEC, native_fps=24)
    if good:
        assert read_start(path, spec).source_frames == frames - 358
        return
    with pytest.raises(InvalidRequest, match="more than 60 s"):
        read_start(path, spec)


def test_a_decoder_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = write_video(tmp_path / "clip.mp4", 33)
    monkeypatch.setattr(start_video, "_DECODE_SECONDS", 0)
    with pytest.raises(InvalidRequest, match="could not be decoded within 0 s"):
        read_start(video, SPEC)


def test_other_rates_are_brought_to_the_models(tmp_path: Path) -> None:
    start = read_start(write_video(tmp_path / "clip.mp4", 60, fps=32), SPEC)
    assert start.source_frames == 30 and len(start.frames) == 21
    steps = np.diff(start.frames.mean(axis=(1, 2, 3)))
    assert np.abs(steps - 8).max() < 3  # every second frame


@pytest.mark.parametrize("name", ["clip.mov", "clip.mkv", "clip.webm"])
def test_other_containers(name: str, tmp_path: Path) -> None:
    options = ("-c:v", "libvpx", "-b:v", "1M") if name.endswith("webm") else ()
    start = read_start(write_video(tmp_path / name, 21, options=options), SPEC)
    assert start.frames.shape[0] == 21 and start.source_size == (160, 120)
    assert start.crop == centre_crop((160, 120), (SPEC.width, SPEC.height))


def test_the_middle_of_a_video_is_cut_out(tmp_path: Path) -> None:
    # White bars at the left and right of a picture twice as wide as the model's: none of them is seen.
    width, height = 4 * SPEC.width, 2 * SPEC.height
    left, right = f"0:0:{SPEC.width - 8}", f"{3 * SPEC.width + 8}:0:{SPEC.width}"
    bars = ",".join(f"drawbox={bar}:{height}:white:fill" for bar in (left, right))
    path = write_video(tmp_path / "wide.mp4", 9, (width, height), options=("-vf", bars))
    frames = read_start(path, SPEC).frames
    assert frames.max() < 80
    # A turned phone tells how to turn the picture back.
    turned = tmp_path / "turned.mp4"
    write_video(tmp_path / "plain.mp4", 9, (160, 120))
    subprocess.run(
        [
            start_video.ffmpeg_binary(),
            "-loglevel",
            "error",
            "-display_rotation",
            "90",
            "-i",
            str(tmp_path / "plain.mp4"),
        ]
        + ["-c", "copy", str(turned)],
        check=True,
    )
    assert read_start(turned, SPEC).source_size == (120, 160)


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = write_video(tmp_path / "wide.mp4", 9, (160, 120), options=("-vf", "setsar=2"))
    assert read_start(path, SPEC).source_size == (320, 120)


def test_damaged_videos_are_refused_or_give_frames(tmp_path: Path) -> None:
    data = write_video(tmp_path / "clip.mp4", 33).read_bytes()
    rng = np.random.default_rng(2)
    changed = [data[:cut] for cut in np.linspace(0, len(data) - 1, 12).astype(int)]
    for _ in range(12):
        flipped = bytearray(data)
        for place in rng.integers(len(data), size=20):
            flipped[place] ^= int(rng.integers(1, 256))
        changed.append(bytes(flipped))
    refused = 0
    for content in changed:
        try:
            start = read_bytes(content, tmp_path)
        except InvalidRequest:
            refused += 1
            continue
        assert start.kind == "video" and start.frames.shape[1:] == SHAPE[1:]
        assert SPEC.frames_in(SPEC.blocks_in(len(start.frames))) == len(start.frames)
    assert refused >= 12  # its index stands at the end, so a file that was cut has none


def test_a_video_that_leads_elsewhere_opens_nothing(tmp_path: Path) -> None:
    # A list of other files, behind the first bytes of a video: nothing but the demuxer for MP4 may look at it.
    secret = write_video(tmp_path / "secret.mp4", 33)
    for text in (f"ffconcat version 1.0\nfile {secret}\n", f"#EXTM3U\n#EXTINF:2,\n{secret}\n#EXT-X-ENDLIST\n"):
        for head in (b"", b"\0\0\0\x18ftypisom"):
            with pytest.raises(InvalidRequest):
                read_bytes(head + text.encode(), tmp_path, "list.mp4")


def test_huge_frames_of_a_video_are_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "huge.mp4", 1, (4100, 4000), options=("-preset", "ultrafast"))
    with pytest.raises(InvalidRequest, match="4100x4000 pixels"):
        read_start(path, SPEC)


def test_a_file_without_a_picture(tmp_path: Path) -> None:
    sound = tmp_path / "sound.mp4"
    source = ["-f", "lavfi", "-i", "sine=duration=1"]
    subprocess.run([start_video.ffmpeg_binary(), "-loglevel", "error", *source, str(sound)], check=True)
    with pytest.raises(InvalidRequest, match="no picture"):
        read_start(sound, SPEC)


def test_the_kind_that_was_asked_for(tmp_path: Path) -> None:
    image, video = tmp_path / "a.png", write_video(tmp_path / "a.mp4", 9)
    image.write_bytes(encoded(picture(), "PNG"))
    assert read_start(image, SPEC, "image").kind == "image" and read_start(video, SPEC, "video").kind == "video"
    with pytest.raises(InvalidRequest, match="A picture is needed here, but the file is a video"):
        read_start(video, SPEC, "image")
    with pytest.raises(InvalidRequest, match="A video is needed here, but the file is a picture"):
        read_start(image, SPEC, "video")


def test_reading_twice_gives_the_same(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 40)
    one, two = read_start(path, SPEC), read_start(path, SPEC)
    assert np.array_equal(one.frames, two.frames) and one.matches(two.describe())


def test_frames_that_are_from_no_file_are_told_apart() -> None:
    one = np.zeros((9, *SHAPE[1:]), np.uint8)
    other = one.copy()
    other[4, 3, 2, 1] = 1
    starts = [Start(kind="video", frames=frames) for frames in (one, other)]
    assert starts[0].matches(Start(kind="video", frames=one[::1].copy()).describe())
    assert not starts[0].matches(starts[1].describe()) and len({start.sha256 for start in starts}) == 2
    assert all(len(start.sha256) == 64 for start in starts)
    assert Start(kind="video", frames=one[:, :, ::-1]).matches(starts[0].describe()), "in whatever order they lie"
    assert Start(kind="video", frames=one, sha256="ab" * 32).sha256 == "ab" * 32, "a file has its own"


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "sound"},
        {"frames": np.zeros((1, 4, 4, 3), np.float32)},
        {"frames": np.zeros((4, 4, 3), np.uint8)},
        {"frames": np.zeros((1, 4, 4, 4), np.uint8)},
        {"frames": np.zeros((0, 4, 4, 3), np.uint8), "kind": "video"},
        {"frames": np.zeros((2, 4, 4, 3), np.uint8)},
        {"frames": io.BytesIO()},
    ],
)
def test_a_start_is_checked(fields: dict) -> None:
    with pytest.raises(InvalidRequest):
        Start(**({"kind": "image", "frames": np.zeros((1, 4, 4, 3), np.uint8)} | fields))
