"""Pictures that others made: opened where they may lie, measured before they are decoded."""

from __future__ import annotations

import os
import warnings
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..base.errors import InputError
from ..base.untrusted import open_regular, read_given

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pictures that are opened. Of others that Pillow knows some are programs for other programs (EPS)."""

MAX_PICTURE_BYTES = 64 * 2**20
MAX_PIXELS = 2**25
MAX_EDGE = 2**14
MAX_ASPECT = 100
"""Above any photograph or page, below what image processors make gigabytes of."""

MAX_PIXELS_TOGETHER = 2**28
"""In three bytes each."""

MAX_PIXELS_AT_ONCE = 2**26
"""Of one batch: image processors need some forty bytes each."""


def inside(folder: Path, name: str, where: str) -> Path:
    """Returns the file `name` inside `folder`; InputError if it leads outside or is none."""
    try:
        os.close(open_regular(folder, name))
    except InputError as error:
        raise InputError(f"{where}: {name[:256]!r} is not a file inside {folder}") from error
    return (folder / name).resolve()


def load_image(folder: Path, name: str, where: str) -> Image.Image:
    """Returns the picture `name` inside `folder`; InputError if it leads outside or is no picture."""
    return open_image(inside(folder, name, where), f"{where}: {name!r}")


class Pictures:
    """Pictures of one folder, for as long as one file of prompts is read: each decoded once, however often it is named.

    All together they have at most MAX_PIXELS_TOGETHER.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: dict[Path, Image.Image] = {}
        self.pixels = 0

    def load(self, name: str, where: str) -> Image.Image:
        """As `load_image`. InputError also if this picture is one too many."""
        path = inside(self.folder, name, where)
        if path not in self.held:
            picture = self.held[path] = open_image(path, f"{where}: {name!r}")
            self.pixels += picture.width * picture.height
            if self.pixels > MAX_PIXELS_TOGETHER:
                raise InputError(
                    f"{where}: the pictures up to here have over {MAX_PIXELS_TOGETHER} pixels; shrink them"
                )
        return self.held[path]


def open_image(path: Path, what: str) -> Image.Image:
    """Returns the picture in `path`; InputError if it is none, or larger than it need be. What is larger is not
    decoded.
    """
    data = read_given(path, MAX_PICTURE_BYTES)
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow's, of pictures that are taken or refused here
            picture = Image.open(BytesIO(data), formats=FORMATS)
            _check_size(*picture.size, what)
            return picture.convert("RGB")
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{what} is not a readable picture (none of {', '.join(FORMATS)})") from error
    except Exception as error:  # foreign files can break a decoder in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} is not a readable picture ({reason})") from error


def _check_size(width: int, height: int, what: str) -> None:
    short, long = sorted((width, height))
    if long > MAX_EDGE or width * height > MAX_PIXELS or long > MAX_ASPECT * short:
        raise InputError(
            f"{what} is a picture of {width} x {height} pixels; at most {MAX_PIXELS} in all, {MAX_EDGE} along an edge "
            f"and {MAX_ASPECT} times as long as wide are taken"
        )
