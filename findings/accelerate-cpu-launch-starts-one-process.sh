#!/usr/bin/env bash
# Package:  accelerate 1.15.0 with torch 2.13.0
# Expected: `accelerate launch --cpu --num_processes 2 script.py` runs two processes, or says that it will not.
# Happens:  it runs one, exits with 0 and says nothing: the number is dropped because no distributed type goes with
#           --cpu. With --multi_gpu in place of --cpu, on a machine without any GPU, and Accelerator(cpu=True) in
#           the script, there are two.
# Matters:  a "2-process" test or benchmark on CPU measures one process: global batch, sampler and reduction are never
#           exercised. Check num_processes against what was asked for at the start of the script.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    accelerate==1.15.0 torch==2.13.0 numpy==2.4.6

cat > check.py <<'PY'
import os
import subprocess
import sys
from pathlib import Path

import accelerate

Path("count.py").write_text("""
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
open(f"rank{accelerator.process_index}of{accelerator.num_processes}", "w").close()
accelerator.end_training()
""")
launch = [sys.executable, "-m", "accelerate.commands.launch"]
environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
environment |= {"HF_HOME": os.getcwd(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
seen = {}
for flag in ("--cpu", "--multi_gpu"):
    command = [*launch, flag, "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0", "count.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    ranks = sorted(path.name for path in Path().glob("rank*"))
    for name in ranks:
        os.remove(name)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "process" in line.lower()]
    seen[flag] = done.returncode, ranks, said

print("version: accelerate", accelerate.__version__)
print("expected: two processes, or an error")
for flag, (code, ranks, said) in seen.items():
    print(f"seen: {flag} --num_processes 2: exit {code}, ran {ranks}, lines about processes: {said}")
if seen["--cpu"] != (0, ["rank0of1"], []) or seen["--multi_gpu"][1] != ["rank0of2", "rank1of2"]:
    raise SystemExit(f"changed: {seen}")
PY
venv/bin/python check.py
