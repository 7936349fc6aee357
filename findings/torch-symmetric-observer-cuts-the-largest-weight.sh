#!/usr/bin/env bash
# Package:  torch 2.13.0 (2.15.0 does the same)
# Expected: a symmetric per-channel min-max observer chooses a step with which the largest weight of a channel survives
#           rounding (as min-max ranges do elsewhere: largest / 127, or / 7 at 4 bits).
# Happens:  the step is the largest absolute weight over half the number of steps (127.5, 7.5, 1.5), so the extreme
#           stands halfway between two codes. A positive one is always cut: by 0.4 % at 8 bits, 6.7 % at 4, a third
#           at 2; a negative one is cut or grows by as much, as the last bit of the product decides.
# Matters:  "min-max" quantization of PyTorch clips at low widths, and at 2 bits not evenly for both signs. Scales made
#           there and scales of tools that divide by the largest code are different networks.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6

cat > check.py <<'PY'
import warnings

import torch
from torch.ao.quantization import PerChannelMinMaxObserver

warnings.simplefilter("ignore")
kept, against = {}, {}
for bits in (8, 4, 2):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = torch.tensor([[1.0, 0.25, -0.5], [-1.0, 0.25, 0.5]])
    observer = PerChannelMinMaxObserver(
        ch_axis=0, dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=low, quant_max=high
    )
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    assert zero_point.tolist() == [0, 0]
    back = torch.fake_quantize_per_channel_affine(weight, scale, zero_point.int(), 0, low, high)
    kept[bits] = round(float(back[0, 0]), 3), round(float(back[1, 0]), 3)
    against[bits] = round(1 / float(scale[0]), 2)

print("version: torch", torch.__version__)
print("expected: 1 and -1, the extremes of their channels, come back as 1 and -1 (step 1/127, 1/7, 1/1)")
for bits, (positive, negative) in kept.items():
    print(f"seen: {bits} bits: step 1/{against[bits]}, 1 comes back as {positive}, -1 as {negative}")
wanted = {8: (0.996, -0.996), 4: (0.933, -0.933), 2: (0.667, -1.333)}
if kept != wanted or against != {8: 127.5, 4: 7.5, 2: 1.5}:
    raise SystemExit(f"changed: {kept} {against}")
PY
venv/bin/python check.py
