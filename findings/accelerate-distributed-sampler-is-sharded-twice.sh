#!/usr/bin/env bash
# Package:  accelerate 1.15.0 with torch 2.13.0
# Expected: prepare() of a DataLoader that has PyTorch's DistributedSampler already, as plain DDP scripts have, keeps
#           it: an epoch of two processes sees each sample once.
# Happens:  the loader is sharded once more: of the batches of its half, each process gets every second one. Half of
#           the data is never seen; the epoch is just shorter. Nothing is raised or logged.
# Matters:  porting a DDP script "in five lines" halves (8 processes: takes an eighth of) the data of each epoch, so
#           that learning rates and epochs tuned there mean something else. Give prepare() the plain loader.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    accelerate==1.15.0 torch==2.13.0 numpy==2.4.6

cat > check.py <<'PY'
import json
import os
import subprocess
import sys
from pathlib import Path

import accelerate

Path("epoch.py").write_text("""
import json
import sys
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, DistributedSampler

accelerator = Accelerator(cpu=True)
data = list(range(32))
sampler = None
if sys.argv[1] == "distributed":
    sampler = DistributedSampler(data, accelerator.num_processes, accelerator.process_index, shuffle=False)
loader = accelerator.prepare(DataLoader(data, batch_size=4, sampler=sampler))
seen = [int(x) for batch in loader for x in batch]
with open(f"{sys.argv[1]}{accelerator.process_index}.json", "w") as file:
    json.dump(seen, file)
accelerator.end_training()
""")
environment = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
covered, said = {}, {}
for kind in ("plain", "distributed"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "epoch.py", kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seen = [json.loads(Path(f"{kind}{rank}.json").read_text()) for rank in (0, 1)]
    covered[kind] = [len(part) for part in seen], len(set(seen[0]) | set(seen[1]))
    said[kind] = "sampler" in (done.stdout + done.stderr).lower()

print("version: accelerate", accelerate.__version__)
print("expected: two processes of 16 samples that cover all 32, with and without a DistributedSampler")
for kind, (sizes, together) in covered.items():
    print(f"seen: {kind} loader: {sizes} by process, {together} of 32 together, a word about samplers: {said[kind]}")
if covered != {"plain": ([16, 16], 32), "distributed": ([8, 8], 16)} or any(said.values()):
    raise SystemExit(f"changed: {covered} {said}")
PY
venv/bin/python check.py
