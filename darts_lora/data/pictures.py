"""An image of a row: found, opened as people see it, within a limit of pixels.
Not here: which images a row has (rows.py), nor those of TensorBoard (rank_images.py)."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from darts_lora.base.errors import InputError
from darts_lora.config import MAX_IMAGE_PIXELS
from darts_lora.data.places import SOURCE, row_name, source_folders

_ORIENTATION = 0x0112  # EXIF's tag of how the camera was held


@dataclass
class Picture:
    """An image of a row, not opened yet: an image, a path (also relative to the data file), or
    {"bytes", "path"} as in Parquet.

    A path may lead anywhere on this machine: a data file can name each image that you can read, as
    many do whose images lie elsewhere. It is read as an image alone and never fetched.
    """

    row: dict
    column: str
    stored: Any
    max_pixels: int = MAX_IMAGE_PIXELS

    def pixels(self) -> int:
        """Width times height; no more than the file's head is read.

        Raises:
            InputError: more than `max_pixels`, an image that does not open, or none at all.
        """
        with self._explained():
            width, height = self._begin().size
            return width * height

    def open(self) -> Image.Image:
        """The image decoded, upright, with at most 8 bits a channel.

        Raises:
            InputError: as of `pixels`; an image whose range of values is not known.
        """
        with self._explained():
            image = self._begin()
            image.load()  # a file that is cut off shows only now
            turned = image.getexif().get(_ORIENTATION, 1) != 1
            return _in_8_bits(ImageOps.exif_transpose(image) if turned else image)

    def _begin(self) -> Image.Image:
        """The image with its head read, its pixels not yet."""
        if isinstance(self.stored, Image.Image):
            found = self.stored
        else:
            content = self.stored.get("bytes") if isinstance(self.stored, dict) else None
            if content is None and not isinstance(self._path, str):
                kind, where = type(self.stored).__name__, row_name(self.row, self.column)
                raise InputError(f"{where}: must be an image or its path, not a {kind}")
            found = Image.open(self._file() if content is None else io.BytesIO(content))
        if found.format == "EPS":
            raise ValueError("EPS is a program, which Ghostscript would run")
        width, height = found.size
        if width * height > self.max_pixels:
            raise InputError(
                f"{self._name} has {width} x {height} pixels, max_image_pixels={self.max_pixels}; "
                "save it smaller, or raise max_image_pixels"
            )
        return found

    def _file(self) -> str:
        """The path in a folder of the row's source; else the path as it is."""
        path, folders = self._path, source_folders(str(self.row.get(SOURCE, "")))
        places = {os.path.join(folder, path) for folder in folders if folder}
        found = sorted(filter(os.path.exists, places)) or [path]
        if len(found) > 1:
            raise InputError(
                f"{self._name} is in several folders ({', '.join(found)}); give its whole path"
            )
        if os.path.exists(found[0]) and not (os.path.isfile(found[0]) or os.path.isdir(found[0])):
            raise ValueError("no regular file")  # a pipe or a device: reading it may never end
        return found[0]

    @property
    def _path(self) -> Any:
        return self.stored.get("path") if isinstance(self.stored, dict) else self.stored

    @property
    def _name(self) -> str:
        path = f" {self._path!r}" if isinstance(self._path, str) else ""
        return f"{row_name(self.row, self.column)}: image{path}"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What a decoder raises as an InputError that names the image."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # decoders raise any kind
            reason = re.sub(r" <_io\.BytesIO.*?>", "", str(error)) or type(error).__name__
            raise InputError(f"{self._name} does not open ({reason})") from error


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Values of 16 bits in proportion: Pillow's own conversion would make most of them white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image).astype(np.uint32) * 255 // 65535
        return Image.fromarray(values.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its values (mode {image.mode}) have no known range; save it with 8 or 16 bits"
        )
    return image
