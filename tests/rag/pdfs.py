"""A few lines that write PDFs: text at a place in a font, bookmarks, page labels, anything raw."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

WIDTHS = " ".join(["500"] * 224)
FONTS = {
    "F1": "/BaseFont/Helvetica/Encoding/WinAnsiEncoding",
    "F2": "/BaseFont/Helvetica-Bold/Encoding/WinAnsiEncoding",
    "F3": "/BaseFont/Helvetica/Encoding<</BaseEncoding/WinAnsiEncoding/Differences[1/fi/fl]>>",
}


@dataclass(frozen=True)
class Text:
    """A string at (x, y), in points from the lower left corner."""

    x: float
    y: float
    text: str
    size: float = 11
    font: str = "F1"


@dataclass
class Pdf:
    """Objects by number; pages are added, then `write` gives the bytes."""

    objects: dict[int, bytes] = field(default_factory=dict)
    pages: list[int] = field(default_factory=list)
    catalog: str = ""  # more entries of the catalogue

    def add(self, body: str | bytes) -> int:
        """An object; returns its number. 1 is the catalogue, 2 the page tree, 3 the fonts."""
        number = max(self.objects, default=3) + 1
        self.objects[number] = body.encode("latin-1") if isinstance(body, str) else body
        return number

    def stream(self, content: bytes, entries: str = "", packed: bool = False) -> int:
        """A stream object."""
        content = zlib.compress(content) if packed else content
        entries += "/Filter/FlateDecode" if packed else ""
        return self.add(f"<<{entries}/Length {len(content)}>>stream\n".encode() + content + b"\nendstream")

    def page(self, *texts: Text, drawing: str = "", entries: str = "", resources: str = "") -> int:
        """A page of A4; returns its object number."""
        lines = [f"BT /{t.font} {t.size} Tf {t.x} {t.y} Td ({_escaped(t.text)}) Tj ET" for t in texts]
        return self.raw_page(self.stream("\n".join([drawing, *lines]).encode("latin-1")), entries, resources)

    def raw_page(self, content: int, entries: str = "", resources: str = "") -> int:
        """A page with a content stream of its own."""
        page = self.add(f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Contents {content} 0 R/Resources<</Font 3 0 R{resources}>>{entries}>>")
        self.pages.append(page)
        return page

    def write(self) -> bytes:
        """The file."""
        fonts = "".join(f"/{name}<</Type/Font/Subtype/Type1{rest}>>" for name, rest in FONTS.items())
        kids = " ".join(f"{page} 0 R" for page in self.pages)
        head = {
            1: f"<</Type/Catalog/Pages 2 0 R{self.catalog}>>",
            2: f"<</Type/Pages/Kids[{kids}]/Count {len(self.pages)}>>",
            3: f"<<{fonts}{self.more_fonts()}>>",
        }
        every = {number: body.encode("latin-1") for number, body in head.items()} | self.objects
        out, places = bytearray(b"%PDF-1.7\n"), {}
        for number, body in sorted(every.items()):
            places[number] = len(out)
            out += b"%d 0 obj\n" % number + body + b"\nendobj\n"
        table = "".join(f"{places[n]:010d} 00000 n \n" for n in sorted(every))
        start = len(out)
        out += f"xref\n0 {len(every) + 1}\n0000000000 65535 f \n{table}trailer<</Size {len(every) + 1}/Root 1 0 R>>\nstartxref\n{start}\n%%EOF".encode()
        return bytes(out)

    def more_fonts(self) -> str:
        """F4, where `hebrew` has been called."""
        return f"/F4 {self._hebrew} 0 R" if self._hebrew else ""

    _hebrew: int = 0

    def hebrew(self) -> None:
        """A font F4 whose letters a, b, c … are the Hebrew ones, as ToUnicode says."""
        rows = "".join(f"<{0x61 + n:02x}><{0x5D0 + n:04x}>\n" for n in range(26))
        cmap = f"/CIDInit/ProcSet findresource begin begincmap 1 begincodespacerange<00><ff>endcodespacerange\n26 beginbfchar\n{rows}endbfchar endcmap end"
        unicode = self.stream(cmap.encode())
        self._hebrew = self.add(f"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding/ToUnicode {unicode} 0 R>>")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")


def column(x: float, top: float, lines: list[str], size: float = 11, pitch: float = 14) -> list[Text]:
    """Lines beneath each other."""
    return [Text(x, top - n * pitch, line, size) for n, line in enumerate(lines)]


def five_thousand_pages() -> bytes:
    """Five thousand short pages with running lines."""
    pdf = Pdf()
    for number in range(1, 5001):
        pdf.page(
            Text(72, 800, "Annual register"),
            *column(72, 700, [f"Entry {number} of the register names the owner.", "It is kept for ten years."]),
            Text(290, 30, f"{number}"),
        )
    return pdf.write()


def billion_laughs(depth: int = 12) -> bytes:
    """A page whose form calls a form ten times, which calls a form ten times, and so on: 10 ** depth words."""
    pdf = Pdf()
    inner = pdf.stream(b"BT /F1 11 Tf 72 700 Td (laugh ) Tj ET", "/Type/XObject/Subtype/Form/BBox[0 0 595 842]/Resources<</Font 3 0 R>>")
    for _ in range(depth):
        inner = pdf.stream(b"/X Do " * 10, f"/Type/XObject/Subtype/Form/BBox[0 0 595 842]/Resources<</XObject<</X {inner} 0 R>>>>")
    pdf.raw_page(pdf.stream(b"/X Do"), resources=f"/XObject<</X {inner} 0 R>>")
    return pdf.write()


def decompression_bomb(mebibytes: int) -> bytes:
    """A page whose content unpacks to so many MiB of operators."""
    pdf = Pdf()
    packer = zlib.compressobj(1)
    block = b"BT /F1 11 Tf 72 700 Td (bomb ) Tj ET\n" * 28_000  # about 1 MiB
    packed = b"".join(packer.compress(block) for _ in range(mebibytes)) + packer.flush()
    pdf.raw_page(pdf.add(f"<</Length {len(packed)}/Filter/FlateDecode>>stream\n".encode() + packed + b"\nendstream"))
    return pdf.write()
