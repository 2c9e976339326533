"""Images as people see them, whatever form they are stored in; those that are too large.
Not here: images that do not open (test_rows.py), or should not (test_security.py)."""

import io

import numpy as np
import pytest
from PIL import Image

from darts_lora.base.errors import InputError
from darts_lora.data.pictures import Picture

UPRIGHT = {
    1: 1,
    2: 2,
    3: 3,
    4: 4,
    5: 5,
    6: 8,
    7: 7,
    8: 6,
}  # an orientation -> the one that undoes it
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def stored(image, form, tmp_path, exif=None, kind="PNG"):
    """The image as a path, as bytes of a table, or in memory."""
    content = io.BytesIO()
    image.save(content, kind, **({} if exif is None else {"exif": exif}))
    if form == "path":
        path = tmp_path / f"image.{kind.lower()}"
        path.write_bytes(content.getvalue())
        return str(path)
    if form == "bytes":
        return {"bytes": content.getvalue(), "path": None}
    return Image.open(content)


@pytest.mark.parametrize("form", ["path", "bytes", "memory"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_upright(tmp_path, form, orientation):
    seen = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))
    undone = UPRIGHT[orientation]
    lying = seen if undone == 1 else seen.transpose(TURNS[undone])
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = Picture({}, "image", stored(lying, form, tmp_path, exif)).open()
    assert opened.size == (6, 4) and np.array_equal(np.asarray(opened), np.asarray(seen))


@pytest.mark.parametrize("form", ["path", "bytes", "memory"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_become_8_in_proportion(tmp_path, form, kind):
    values = np.array([[0, 257, 32896], [65535, 1000, 60000]], dtype=np.uint16)
    image = stored(Image.fromarray(values), form, tmp_path, kind=kind)
    opened = Picture({}, "image", image).open()
    assert opened.mode == "L"
    assert np.asarray(opened).tolist() == [[0, 1, 128], [255, 3, 233]]


def test_values_without_a_known_range_are_refused(tmp_path):
    image = stored(Image.new("F", (4, 4), 0.5), "path", tmp_path, kind="TIFF")
    with pytest.raises(InputError, match=r"^row 3, column 'image': .*mode F\) have no known range"):
        Picture({"row_index": 3}, "image", image).open()


@pytest.mark.parametrize("read", [Picture.pixels, Picture.open])
@pytest.mark.parametrize("form", ["path", "bytes", "memory"])
def test_an_image_that_is_too_large_is_refused_by_its_head(tmp_path, monkeypatch, form, read):
    image = stored(Image.new("RGB", (40, 30)), form, tmp_path)
    assert Picture({}, "image", image, 1200).pixels() == 1200
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(InputError, match=r"40 x 30 pixels, max_image_pixels=1199; .* or raise max"):
        read(Picture({}, "image", image, 1199))
