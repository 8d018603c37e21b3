"""Pictures and films that were made by a model: how they were made, and a mark that they were, in the file's metadata.

A PNG gets the settings as JSON in a text chunk of its own, and an XMP packet with IPTC's *digital source type*, which
other programs and sites look for; an mp4 gets both in boxes of their own, and a comment that players show.
``docs/drawing.md`` says what this protects against and what not. Source: IPTC Photo Metadata Standard 2025.1;
NewsCodes "Digital Source Type"; XMP part 3 for where files keep their packet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import quoteattr

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image as PILImage
from PIL import PngImagePlugin
from torch import Tensor

from polymodal.core.errors import MediaError
from polymodal.core.files import atomic_path
from polymodal.core.sample import Image
from polymodal.modalities.film import box, boxes, film
from polymodal.modalities.image import open_picture

SOURCES: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/"
GENERATED: Final = SOURCES + "trainedAlgorithmicMedia"
COMPOSITE: Final = SOURCES + "compositeWithTrainedAlgorithmicMedia"  # parts of it, or what it began as, were not made
SETTINGS: Final = "polymodal"  # the text chunk of the settings
_SETTINGS_BOX: Final = b"polymodal.made.1"  # of an mp4; its name is no UUID that anybody else will draw
_XMP_BOX: Final = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
_FINE: Final = 12  # of H.264
_XMP: Final = "XML:com.adobe.xmp"
_PACKET: Final = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 Iptc4xmpExt:DigitalSourceType={source}
 Iptc4xmpExt:AISystemUsed={system} Iptc4xmpExt:AISystemVersionUsed={version}
 Iptc4xmpExt:AIPromptInformation={prompt} xmp:CreatorTool={tool}/>
</rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""
# What XML 1.0 has no way to write, lone halves of characters among it.
_UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_uint8(pictures: Float[Tensor, "*batch 3 height width"]) -> UInt8[np.ndarray, "*batch height width 3"]:
    """Pictures in [0, 1] with 8 bits a colour."""
    return (pictures * 255).round().clamp(0, 255).byte().movedim(-3, -1).contiguous().cpu().numpy()


def to_pil(picture: Float[Tensor, "3 height width"]) -> PILImage.Image:
    """A picture in [0, 1] with 8 bits a colour."""
    return PILImage.fromarray(to_uint8(picture))


def write_generated(
    path: str | Path,
    picture: PILImage.Image,
    settings: Mapping[str, Any],
    *,
    prompt: str,
    system: str,
    version: str,
    composite: bool = False,
) -> None:
    """Writes a PNG with its settings and the mark, whole or not at all.

    Args:
        path: the file.
        picture: what was made.
        settings: what JSON can hold.
        prompt: what it was made of.
        system: the model's name.
        version: of this package.
        composite: whether it was made of another picture.
    """
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Software", _tool(version))
    chunks.add_text(SETTINGS, json.dumps(settings))  # ASCII, whatever a prompt holds
    chunks.add_itxt(_XMP, _packet(prompt=prompt, system=system, version=version, composite=composite))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        picture.save(file, format="PNG", pnginfo=chunks)


def write_generated_film(
    path: str | Path,
    frames: UInt8[np.ndarray, "time height width 3"],
    fps: int,
    settings: Mapping[str, Any],
    *,
    prompt: str,
    system: str,
    version: str,
    composite: bool = False,
) -> None:
    """Writes an mp4 with its settings and the mark, whole or not at all; arguments as of `write_generated`.

    Raises:
        MissingDependency: PyAV is not installed.
        MediaError: it would have no frames.
    """
    packet = _packet(prompt=prompt, system=system, version=version, composite=composite)
    tail = box(_XMP_BOX, packet.encode()) + box(_SETTINGS_BOX, json.dumps(settings).encode())
    with film(path, fps, crf=_FINE, comment=f"made by a model ({_tool(version)})", tail=tail) as out:
        for frame in frames:
            out.add(PILImage.fromarray(frame))


def _tool(version: str) -> str:
    return f"Polymodal {version}"


def _packet(*, prompt: str, system: str, version: str, composite: bool) -> str:
    return _PACKET.format(
        source=_attribute(COMPOSITE if composite else GENERATED), system=_attribute(system),
        version=_attribute(_tool(version)), prompt=_attribute(prompt), tool=_attribute(_tool(version)),
    )  # fmt: skip


def read_settings(path: str | Path) -> dict[str, Any]:
    """How a picture or a film was made.

    Raises:
        MediaError: it is neither, or says nothing of how it was made: another program wrote it, or took that out.
    """
    text = _text(path).get(SETTINGS)
    if text is None:
        raise MediaError(f"{path}: says nothing of how it was made; Polymodal did not write it, or it was taken out")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MediaError(f"{path}: what it says of how it was made is broken") from error
    if not isinstance(settings, dict):
        raise MediaError(f"{path}: what it says of how it was made is broken")
    return settings


def check_settings(path: str | Path, raw: Any, kinds: Mapping[str, tuple[type, ...]]) -> None:
    """Whether what `read_settings` found has these names, each of one of its kinds, as JSON has them.

    Raises:
        MediaError: it has not. True and False are no numbers.
    """
    if not isinstance(raw, dict) or raw.keys() != kinds.keys():
        raise MediaError(f"{path}: what it says of how it was made is not of this version of Polymodal, or broken")
    wrong = [name for name, kind in kinds.items() if type(raw[name]) not in kind]
    if wrong:
        raise MediaError(f"{path}: what it says of how it was made is broken ({', '.join(wrong)})")


def source_type(path: str | Path) -> str | None:
    """IPTC's digital source type that a PNG or an mp4 declares, by whatever program; None where it declares none.

    Raises:
        MediaError: it is no picture and no mp4.
    """
    found = re.search(rf"{re.escape(SOURCES)}([A-Za-z]{{1,64}})", _text(path).get(_XMP, ""))
    return None if found is None else found.group(1)


def _text(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG, or what stands in their place in an mp4."""
    if (held := boxes(path)) is not None:
        names = {_XMP_BOX: _XMP, _SETTINGS_BOX: SETTINGS}
        return {names[name]: content.decode(errors="replace") for name, content in held.items() if name in names}
    opened = open_picture(Image(Path(path)))
    if not isinstance(opened, PngImagePlugin.PngImageFile):
        return {}
    try:  # chunks may stand behind the pixels; a decoder raises whatever a hostile file provokes in it
        return {str(key): str(value) for key, value in opened.text.items()}
    except Exception as error:
        raise MediaError(f"{path}: the PNG data is broken or cut off") from error


def _attribute(text: str) -> str:
    return quoteattr(_UNWRITABLE.sub("\ufffd", text))
