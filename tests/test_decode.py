import io

import numpy as np
import pytest
import simplejpeg
from corpus import encoded, picture
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from sklearn.datasets import load_sample_images

from clipindex.decode import decode_image
from clipindex.errors import SampleError
from clipindex.types import Preprocess


def preprocess(size=(64, 64), mode="shortest", interpolation="bicubic"):
    return Preprocess(size=size, resize_mode=mode, interpolation=interpolation, mean=(0.0,) * 3, std=(1.0,) * 3)


def decoded(data, how):
    out = np.zeros((*how.size, 3), np.uint8)
    return out, decode_image(data, how, out)


def reference(data, how):
    """open_clip's own transform, with mean 0 and std 1, back in 0..255."""
    cfg = PreprocessCfg(size=how.size, mean=how.mean, std=how.std, interpolation=how.interpolation,
                        resize_mode=how.resize_mode)  # fmt: skip
    tensor = image_transform_v2(cfg, is_train=False)(Image.open(io.BytesIO(data)))
    return (tensor * 255).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "how",
    [((64, 64), "shortest"), ((64, 64), "squash"), ((64, 64), "longest"), ((48, 80), "squash"), ((48, 80), "shortest")],
)
@pytest.mark.parametrize("shape", [(500, 375), (375, 700), (40, 30), (64, 64), (301, 97)])
def test_jpegs_are_within_two_of_open_clips_transform(shape, how, interpolation):
    data = encoded(picture(*shape), quality=92)
    plan = preprocess(*how, interpolation)
    pixels, size = decoded(data, plan)
    assert size == shape
    assert np.abs(pixels - reference(data, plan)).max() <= 2.001


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("width", [500, 640, 1600])
def test_photographs_are_within_a_hundredth_of_a_level_on_average(mode, width):
    for pixels in load_sample_images().images:
        photograph = Image.fromarray(pixels).resize((width, width * 3 // 4), Image.Resampling.LANCZOS)
        data = encoded(photograph, quality=90)
        plan = preprocess((224, 224), mode)
        difference = np.abs(decoded(data, plan)[0] - reference(data, plan))
        assert difference.max() <= 2.001
        assert difference.mean() <= 0.01


@pytest.mark.parametrize(("mode", "shape", "shrunk"), [
    ("shortest", (1600, 1200), 2), ("shortest", (2000, 900), 2), ("shortest", (895, 2000), 1), ("squash", (99, 9), 1),
    ("squash", (1600, 1200), 2), ("squash", (4000, 880), 1), ("shortest", (3600, 3601), 8), ("shortest", (901, 897), 2),
])  # fmt: skip
def test_fast_decoding_shrinks_large_jpegs_and_moves_pixels_by_little(mode, shape, shrunk, monkeypatch):
    photograph = Image.fromarray(load_sample_images().images[0]).resize(shape, Image.Resampling.BICUBIC)
    data = encoded(photograph, quality=90)
    plan = preprocess((224, 224), mode)
    sizes = []
    whole = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: sizes.append((p := whole(*a, **k)).shape) or p)
    out = np.zeros((224, 224, 3), np.uint8)
    assert decode_image(data, plan, out, fast=True) == shape
    assert sizes == [(-(-shape[1] // shrunk), -(-shape[0] // shrunk), 3)]
    difference = np.abs(out - reference(data, plan))
    assert difference.mean() < 0.7
    assert difference.max() < 20
    if shrunk == 1:
        np.testing.assert_array_equal(out, decoded(data, plan)[0])


OTHERS = [
    ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "L"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "1"), ("PNG", "I;16"),
    ("WEBP", "RGB"), ("WEBP", "RGBA"), ("BMP", "RGB"), ("GIF", "P"), ("TIFF", "RGB"), ("TIFF", "CMYK"),
    ("JPEG", "CMYK"), ("JPEG2000", "RGB"), ("AVIF", "RGB"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "mode"), OTHERS)
def test_other_formats_and_modes_are_exactly_open_clips(form, mode):
    image = picture().convert("I").convert("I;16") if mode == "I;16" else picture().convert(mode)
    data = encoded(image, form)
    pixels, _ = decoded(data, preprocess())
    np.testing.assert_allclose(pixels, reference(data, preprocess()), atol=1e-3)


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 30}])
def test_jpeg_varieties(options):
    for mode in ("RGB", "L"):
        data = encoded(picture(200, 150).convert(mode), **options)
        assert np.abs(decoded(data, preprocess())[0] - reference(data, preprocess())).max() <= 2.001


def test_exif_orientation_is_ignored_as_in_open_clip():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, plain = encoded(picture(90, 64), exif=exif), encoded(picture(90, 64))
    assert Image.open(io.BytesIO(turned)).getexif()[0x0112] == 6
    np.testing.assert_array_equal(decoded(turned, preprocess())[0], decoded(plain, preprocess())[0])


def test_the_content_decides_not_a_name():
    webp = encoded(form="WEBP", lossless=True)
    np.testing.assert_array_equal(decoded(webp, preprocess())[0], decoded(encoded(form="PNG"), preprocess())[0])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.97])
def test_a_truncated_image_is_never_grey_filler(form, share):
    data = encoded(picture(300, 200), form)
    with pytest.raises(SampleError):
        decoded(data[: int(share * len(data))], preprocess())


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty"), (b"<html></html>", "no image that Pillow knows")])
def test_reasons_speak_plainly(data, reason):
    with pytest.raises(SampleError, match=reason):
        decoded(data, preprocess())


def test_bombs_are_refused_from_the_header():
    tall = encoded(Image.new("L", (1, 20_000)), "PNG")
    with pytest.raises(SampleError, match="1 x 20000 pixels"):
        decoded(tall, preprocess((224, 224)))
    header = bytearray(encoded(Image.new("1", (8, 8)), "BMP"))
    header[18:26] = (30_000).to_bytes(4, "little") * 2
    with pytest.raises(SampleError):
        decoded(bytes(header), preprocess())
