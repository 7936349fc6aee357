#!/usr/bin/env bash
# Package:  Pillow 13.0.0
# Expected: a TIFF file of PhotometricInterpretation WhiteIsZero (0) is a negative: opening it gives inverted values, in
#           8 and in 16 bits alike, or the image says that it is one.
# Happens:  8 bits are inverted, 16 bits are not: both are opened as plain gray, modes L and I;16, and equal pixels are
#           black in one and white in the other. The only trace is tag 262.
# Matters:  gray images of scanners and X-ray machines: a classifier is measured on negatives, and the accuracy that is
#           lost there is blamed on the network. Invert by tag 262 where the mode is I;16.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    pillow==13.0.0

cat > check.py <<'PY'
import io
import struct

import PIL
from PIL import Image

LONGS = (273, 279)  # StripOffsets, StripByteCounts


def tiff(bits, photometric, codes):
    """Return a TIFF file of one row, little-endian, uncompressed, in one strip; all tags that TIFF 6.0 asks of gray."""
    strip = struct.pack(f"<{len(codes)}{'B' if bits == 8 else 'H'}", *codes)
    tags = {256: len(codes), 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(strip)}
    tags |= {282: 8 + len(strip), 283: 8 + len(strip), 296: 1}  # both resolutions: the rational 1/1 behind the strip
    rows = b""
    for tag, value in tags.items():
        kind = 5 if tag in (282, 283) else 4 if tag in LONGS else 3
        rows += struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value)
    place = 8 + len(strip) + 8
    header = b"II*\0" + struct.pack("<I", place)
    return header + strip + struct.pack("<II", 1, 1) + struct.pack("<H", len(tags)) + rows + struct.pack("<I", 0)


seen = {}
for bits, codes in ((8, [0, 1, 128, 255]), (16, [0, 1, 32768, 65535])):
    for photometric in (1, 0):
        image = Image.open(io.BytesIO(tiff(bits, photometric, codes)))
        assert image.tag_v2[262] == photometric
        seen[bits, photometric] = image.mode, [image.getpixel((x, 0)) for x in range(4)]

print("version: Pillow", PIL.__version__)
print("expected: BlackIsZero gives the stored values, WhiteIsZero gives largest - stored, with 8 and with 16 bits")
for (bits, photometric), value in seen.items():
    print(f"seen: {bits:2d} bits, {('WhiteIsZero', 'BlackIsZero')[photometric]}: mode {value[0]}, {value[1]}")
stated = {
    (8, 1): ("L", [0, 1, 128, 255]),
    (8, 0): ("L", [255, 254, 127, 0]),
    (16, 1): ("I;16", [0, 1, 32768, 65535]),
    (16, 0): ("I;16", [0, 1, 32768, 65535]),
}
if seen != stated:
    raise SystemExit(f"changed: {seen}")
PY
venv/bin/python check.py
