"""Pictures and sequences of every kind a user may have: the right answer, or one sentence that says what is wrong."""

import io
import struct
import wave
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from omniconv.bench.picture import feature_maps, read_picture, read_sequence, sequence_features, square

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def saved(tmp_path, image, name, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def pixel(path, at=(0, 0)):
    return read_picture(path).image.getpixel(at)


def refused(path):
    """The sentence with which a picture is refused."""
    with pytest.raises(ValueError, match=r"^compare: the picture must .*, got ") as error:
        read_picture(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# pictures that are read


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.bmp", "a.tiff", "a.ppm", "no_suffix"])
def test_formats(tmp_path, name):
    path = saved(tmp_path, Image.new("RGB", (20, 10), RED), name, format=None if "." in name else "PNG")
    picture = read_picture(path)
    assert picture.image.mode == "RGB"
    assert picture.image.size == (20, 10)
    np.testing.assert_allclose(picture.image.getpixel((5, 5)), RED, atol=3)


def test_the_sample_ships_and_is_small():
    picture = read_picture()
    assert picture.name == "chelsea.jpg"
    assert picture.image.size == (451, 300)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
def test_white_and_black_in_every_mode(tmp_path, mode):
    image = Image.new("RGB", (8, 8), WHITE)
    image.paste(BLACK, (4, 0, 8, 8))
    path = saved(tmp_path, image.convert(mode), "a.tiff")
    assert pixel(path) == WHITE
    assert pixel(path, (7, 0)) == BLACK


def test_cmyk_jpeg(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (16, 16), GREEN).convert("CMYK"), "a.jpg", quality=100)
    with Image.open(path) as stored:
        assert stored.mode == "CMYK"
    np.testing.assert_allclose(pixel(path), GREEN, atol=4)
    assert any("CMYK" in note for note in read_picture(path).notes)


def test_palette(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (4, 4), BLUE).quantize(4), "a.png")
    with Image.open(path) as stored:
        assert stored.mode == "P"
    assert pixel(path) == BLUE


def test_palette_with_transparency_is_laid_on_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    for name, transparency in (("index.png", 0), ("table.png", bytes([0, 255]))):
        path = saved(tmp_path, image, name, transparency=transparency)
        assert pixel(path) == WHITE
        assert pixel(path, (1, 0)) == BLUE
        assert "laid on white" in read_picture(path).notes


@pytest.mark.parametrize(("mode", "colour", "transparency"), [("RGB", RED, RED), ("L", 7, 7), ("1", 0, 0)])
def test_a_colour_key_is_transparent(tmp_path, mode, colour, transparency):
    path = saved(tmp_path, Image.new(mode, (4, 4), colour), "a.png", transparency=transparency)
    assert pixel(path) == WHITE


def test_alpha_is_laid_on_white(tmp_path):
    path = saved(tmp_path, Image.new("RGBA", (4, 4), (*BLACK, 51)), "a.png")
    assert pixel(path) == (204, 204, 204)
    assert pixel(saved(tmp_path, Image.new("LA", (4, 4), (0, 0)), "b.png")) == WHITE


@pytest.mark.parametrize(("values", "expected"), [([0, 65535], [0, 255]), ([32896, 257], [128, 1])])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_keeps_its_range(tmp_path, values, expected, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.array([values], dtype=np.uint16)).save(path)
    picture = read_picture(path)
    assert [picture.image.getpixel((i, 0)) for i in range(2)] == [(e, e, e) for e in expected]
    assert picture.notes == ("16-bit grey",)


def test_float_and_32_bit_grey(tmp_path):
    for dtype, values, grey in (("float32", [0.0, 0.2], 51), ("float32", [-5.0, 5.0], 255), ("int32", [0, 1 << 20], 255)):
        path = tmp_path / "a.tiff"
        Image.fromarray(np.array([values], dtype=dtype)).save(path)
        assert [pixel(path, (i, 0))[0] for i in range(2)] == [0, grey]
    Image.fromarray(np.array([[0.0, np.nan]], dtype="float32")).save(path)
    assert "not finite" in refused(path)


def test_16_bit_colour_png(tmp_path):
    path = tmp_path / "a.png"
    row = b"\0" + struct.pack(">3H", 65535, 0, 32896)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b""))
    assert pixel(path) == (255, 0, 128)


@pytest.mark.parametrize(("orientation", "corner"), [(1, "left top"), (3, "right bottom"), (6, "right top"), (8, "left bottom")])
def test_exif_orientation_is_applied(tmp_path, orientation, corner):
    image = Image.new("RGB", (40, 20), BLACK)
    image.paste(WHITE, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = read_picture(saved(tmp_path, image, "a.jpg", exif=exif, quality=100))
    assert picture.image.size == ((20, 40) if orientation in (6, 8) else (40, 20))
    width, height = picture.image.size
    at = (2 if "left" in corner else width - 3, 2 if "top" in corner else height - 3)
    assert min(picture.image.getpixel(at)) > 200
    assert bool(picture.notes) == (orientation != 1)


def test_damaged_exif_beside_a_sound_picture(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (8, 8), RED), "a.jpg", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xffrubbish")
    np.testing.assert_allclose(pixel(path), RED, atol=3)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in (RED, GREEN, BLUE)]
    for name in ("a.gif", "a.png", "a.webp", "a.tiff"):
        path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
        picture = read_picture(path)
        np.testing.assert_allclose(picture.image.getpixel((3, 3)), RED, atol=8)
        assert picture.notes == ("the first of 3 frames",)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2000)])
def test_tiny_and_extreme_shapes(tmp_path, size):
    picture = read_picture(saved(tmp_path, Image.new("RGB", size, (10, 200, 30)), "a.png"))
    maps = feature_maps(picture, channels=4, size=6)
    assert maps.shape == (1, 4, 6, 6)
    assert torch.equal(maps, torch.zeros_like(maps))  # nothing varies


# pictures that are refused


def test_missing_folder_device_empty(tmp_path):
    assert "exists" in refused(tmp_path / "none.png")
    assert "the folder" in refused(tmp_path)
    assert "the device" in refused("/dev/null")
    (tmp_path / "a.png").touch()
    assert "0 bytes" in refused(tmp_path / "a.png")


@pytest.mark.parametrize(
    "content", [b"hello", b"%PDF-1.4\n", b"\x89PNG\r\n\x1a\n", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", bytes(1000)]
)
def test_no_picture(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert "whole picture" in refused(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, suffix)
    content = whole.getvalue()
    (tmp_path / "a").write_bytes(content[: int(share * len(content))])
    refused(tmp_path / "a")


@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm"])
def test_damaged_bytes_never_give_a_traceback(tmp_path, suffix):
    rng = np.random.default_rng(1)
    whole = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(whole, suffix)
    for trial in range(40):
        content = bytearray(whole.getvalue())
        for place in rng.integers(0, min(len(content), 120 if trial % 2 else len(content)), 4):
            content[place] = int(rng.integers(0, 256))
        (tmp_path / "a").write_bytes(bytes(content))
        try:
            answer = read_picture(tmp_path / "a").image.mode
        except ValueError as error:
            answer = str(error)
        assert answer == "RGB" or answer.startswith("compare: the picture must ")


@pytest.mark.parametrize("side", [9_000, 12_000, 30_000])
def test_a_decompression_bomb(tmp_path, side):
    """A small file that would unpack to gigabytes: refused from its head alone."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))))
    assert "at most 80,000,000 pixels" in refused(tmp_path / "a.png")


def test_no_permission(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new("RGB", (4, 4)), "a.png")

    def closed(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", closed)
    assert "readable" in refused(path)


# the stem


def test_square_is_the_middle(tmp_path):
    image = Image.new("RGB", (30, 10), BLACK)
    image.paste(WHITE, (10, 0, 20, 10))
    assert square(read_picture(saved(tmp_path, image, "a.png")), 10).eq(1).all()


def test_feature_maps_are_normal_different_and_the_same_again():
    picture = read_picture()
    maps = feature_maps(picture, channels=100, size=20, batch=2)
    assert maps.shape == (2, 100, 20, 20)
    assert maps.is_contiguous()
    torch.testing.assert_close(maps.mean((2, 3)), torch.zeros(2, 100), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps.square().mean((2, 3)), torch.ones(2, 100), atol=1e-4, rtol=0)
    assert torch.equal(maps, feature_maps(picture, channels=100, size=20, batch=2))
    assert not torch.equal(maps[0], maps[1])
    assert not torch.equal(maps, feature_maps(picture, channels=100, size=20, batch=2, seed=1))
    flat = maps[0].flatten(1)
    likeness = (flat @ flat.t() / flat.shape[1] - torch.eye(100)).abs()
    assert likeness.max() < 0.9999  # no two filters are the same
    torch.testing.assert_close(feature_maps(picture, channels=7, size=20), maps[:1, :7], atol=1e-5, rtol=0)


# sequences


def refused_sequence(path):
    with pytest.raises(ValueError, match=r"^compare: the sequence must .*, got ") as error:
        read_sequence(path, 1000)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_wav(path, frames, width, channels=1, rate=8000):
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(channels)
        stream.setsampwidth(width)
        stream.setframerate(rate)
        stream.writeframes(frames)
    return path


@pytest.mark.parametrize(
    ("width", "frames"),
    [
        (1, bytes([128, 192, 64, 0])),
        (2, struct.pack("<4h", 0, 1 << 14, -(1 << 14), -(1 << 15))),
        (3, b"".join((v & 0xFFFFFF).to_bytes(3, "little") for v in (0, 1 << 22, -(1 << 22), -(1 << 23)))),
        (4, struct.pack("<4i", 0, 1 << 30, -(1 << 30), -(1 << 31))),
    ],
)
def test_wav_of_every_width(tmp_path, width, frames):
    sequence = read_sequence(write_wav(tmp_path / "a.wav", frames, width), 1000)
    assert sequence.samples.tolist() == [[0.0, 0.5, -0.5, -1.0]]
    assert f"{8 * width}-bit" in sequence.notes[0]


def test_stereo_wav_and_its_first_frames(tmp_path):
    path = write_wav(tmp_path / "a.wav", struct.pack("<8h", *(v << 13 for v in (0, 1, 2, 3, -1, -2, -3, -4))), 2, channels=2)
    assert read_sequence(path, 1000).samples.mul(4).tolist() == [[0, 2, -1, -3], [1, 3, -2, -4]]
    short = read_sequence(path, 2)
    assert short.samples.shape == (2, 2)
    assert "the first 2 of 4 frames" in short.notes


def test_malformed_wav(tmp_path):
    whole = write_wav(tmp_path / "a.wav", bytes(200), 2).read_bytes()
    for content, word in (
        (whole[:100], "cut off"),
        (whole[:44], "cut off"),
        (whole[:20], "WAV"),
        (b"RIFF", "WAV"),
        (b"RIFX" + whole[4:], "WAV"),
        (whole[:20] + b"\x03\0" + whole[22:], "WAV"),  # floating-point samples
        (whole[:22] + b"\0\0" + whole[24:], "WAV"),  # no channels
    ):
        (tmp_path / "b.wav").write_bytes(content)
        assert word in refused_sequence(tmp_path / "b.wav")
    assert "no samples" in refused_sequence(write_wav(tmp_path / "c.wav", b"", 2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1\n2\n3\n", [[1, 2, 3]]),
        ("1,2\n3,4\n", [[1, 3], [2, 4]]),
        ("time;level\n1;2\n3;4", [[1, 3], [2, 4]]),
        ("1\t2\r\n3\t4\r\n", [[1, 3], [2, 4]]),
        ("1  2\n 3 4\n", [[1, 3], [2, 4]]),
        ("\ufeff1,2,\n\n3,4,\n", [[1, 3], [2, 4]]),
        ('"a","b"\n"1e3","-2.5"\n', [[1000], [-2.5]]),
    ],
)
def test_csv(tmp_path, text, expected):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    assert read_sequence(tmp_path / "a.csv", 1000).samples.tolist() == expected


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"1,2\n3\n", "row 2 has 1 values where the first has 2"),
        (b"1\nnan\n", "row 2 holds a number that is not finite"),
        (b"1\ninf\n", "not finite"),
        (b"1\n1e999\n", "not finite"),
        (b"1\ntwo\n", "row 2 holds 'two'"),
        (b"1,5;2,5\n3,5;4,5\n", "row 2 holds '3,5'"),
        (b"1\n1,5\n", "row 2 has 2 values"),
        (b"1,,2\n", "row 1 holds ''"),
        (b"head\n", "no numbers"),
        (b"\n \n\n", "no numbers"),
        (b"\xff\xfe1\x00", "WAV or a CSV"),
        (b"\x89PNG\r\n\x1a\n\0\0", "WAV or a CSV"),
        (b"caf\xe9\n1\n", "WAV or a CSV"),
    ],
)
def test_malformed_csv(tmp_path, content, word):
    (tmp_path / "a.csv").write_bytes(content)
    assert word in refused_sequence(tmp_path / "a.csv")


def test_missing_and_empty_sequence(tmp_path):
    assert "exists" in refused_sequence(tmp_path / "a.wav")
    assert "the folder" in refused_sequence(tmp_path)
    (tmp_path / "a.wav").touch()
    assert "0 bytes" in refused_sequence(tmp_path / "a.wav")


def test_a_long_csv_is_read_from_its_start(tmp_path):
    (tmp_path / "a.csv").write_text("".join(f"{i}\n" for i in range(50)))
    sequence = read_sequence(tmp_path / "a.csv", 20)
    assert sequence.samples.shape == (1, 20)
    assert "the first 20 rows" in sequence.notes


@pytest.mark.parametrize(("length", "steps", "expected"), [(1, 16, 1), (5, 16, 5), (16, 16, 16), (100, 16, 16), (100_000, 16, 16)])
@pytest.mark.parametrize("inputs", [1, 3])
def test_sequence_features(tmp_path, length, steps, expected, inputs):
    rows = np.random.default_rng(0).normal(size=(length, inputs))
    np.savetxt(tmp_path / "a.csv", rows, delimiter=",")
    sequence = read_sequence(tmp_path / "a.csv", steps * 16)
    x = sequence_features(sequence, channels=6, steps=steps, batch=2)
    assert x.shape == (2, 6, expected)
    assert x.isfinite().all()
    assert torch.equal(x, sequence_features(sequence, channels=6, steps=steps, batch=2))
    if expected > 1:
        torch.testing.assert_close(x.square().mean(2), torch.ones(2, 6), atol=1e-3, rtol=0)


def test_silence_and_huge_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("0\n0\n0\n")
    assert torch.equal(sequence_features(read_sequence(tmp_path / "a.csv", 9), 4, 9), torch.zeros(1, 4, 3))
    (tmp_path / "a.csv").write_text("1e300\n-1e300\n1e300\n0\n")
    assert sequence_features(read_sequence(tmp_path / "a.csv", 9), 4, 9).isfinite().all()
