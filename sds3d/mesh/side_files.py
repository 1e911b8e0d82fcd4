"""The files that a mesh file names (.mtl, .bin, pictures): only those in its own folder, and only so much."""

import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

from PIL import Image
from trimesh.resolvers import Resolver

from sds3d.errors import InputError

MIB = 1 << 20
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a mesh from elsewhere may ask for. Larger ones are refused before they are read."""

    file_mib: int = 256  # of the file and of the files it names, together
    faces: int = 5_000_000
    vertices: int = 15_000_000  # three per face, as in STL
    picture_px: int = 8192 * 8192  # of one texture
    pictures_px: int = 4 * 8192 * 8192  # of all textures
    nodes: int = 10_000  # of a glTF scene


class SideFiles(Resolver):
    """Reads what a mesh file names, for trimesh; keeps the first refusal, because trimesh swallows some of them."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self.limits = path, limits
        self.folder = path.parent.resolve()
        self.file_name = path.name  # trimesh names meshes after it
        self.left_bytes, self.left_px = limits.file_mib * MIB, limits.pictures_px
        self.refusal: InputError | None = None

    def get(self, name: str) -> bytes:
        """The contents of a file in the mesh's folder.

        Raises:
            InputError: the name leads out of the folder or to no file on this disk, or the file is too large.
            FileNotFoundError: there is no such file.
        """
        data = self.read(self.place(name))
        self.check_picture(data, name)
        return data

    def place(self, name: str) -> Path:
        """Where a named file lies; refuses all ways out of the folder, links included."""
        wanted = str(name).strip()
        for spelled in dict.fromkeys((wanted, unquote(wanted))):
            plain = spelled.replace("\\", "/")
            if _SCHEME.match(plain):
                self.refuse(f"names {name!r}; only files in its own folder are read, no addresses")
            if plain.startswith("/") or "\0" in plain:
                self.refuse(f"names {name!r}, an absolute path; only files in its own folder are read")
            found = (self.folder / plain).resolve()
            if not found.is_relative_to(self.folder):
                self.refuse(f"names {name!r}, which lies outside its own folder; put it beside the mesh")
            if found.is_file():
                return found
        raise FileNotFoundError(f"{name!r}, which it names, is not in {self.folder}")

    def read(self, path: Path) -> bytes:
        """A whole file, counted against the limit for all."""
        with open(path, "rb") as file:
            data = file.read(self.left_bytes + 1)
        self.left_bytes -= len(data)
        if self.left_bytes < 0:
            self.refuse(f"is larger than {self.limits.file_mib} MiB, with the files that it names")
        return data

    def check_picture(self, data: bytes, name: str) -> None:
        """Refuse a picture that would unpack to too many pixels; what is no picture passes."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                width, height = Image.open(io.BytesIO(data)).size
        except Image.DecompressionBombError:
            self.refuse(f"holds the picture {name!r} of more than {self.limits.picture_px} pixels")
        except (OSError, ValueError, SyntaxError):
            return
        self.left_px -= width * height
        if width * height > self.limits.picture_px:
            self.refuse(
                f"holds the picture {name!r} of {width} x {height} pixels; the limit is {self.limits.picture_px} pixels"
            )
        if self.left_px < 0:
            self.refuse(f"holds pictures of more than {self.limits.pictures_px} pixels")

    def refuse(self, what: str) -> NoReturn:
        """Raise InputError, and remember it."""
        self.refusal = self.refusal or InputError(f"{self.path}: {what}")
        raise self.refusal

    def write(self, name: str, data: Any) -> NoReturn:
        """Nothing is ever written."""
        raise NotImplementedError(f"{name}: a mesh that is read writes no files")

    def namespaced(self, namespace: str) -> "SideFiles":
        """Itself: folders inside are named in full."""
        return self

    def keys(self) -> list[str]:
        """Nothing is listed."""
        return []
