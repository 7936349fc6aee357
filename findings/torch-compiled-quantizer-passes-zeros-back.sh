#!/usr/bin/env bash
# Package:  torch 2.11.0 (2.15.0 passes the right gradient)
# Expected: a compiled straight-through quantizer, an autograd.Function, passes back the gradients of eager mode.
# Happens:  If `forward` returns what an operation has returned of its own input (the product `codes.mul_(scale)`, or
#           `.to(dtype)` of a tensor that has the dtype already), the compiled function passes zeros back for every
#           gradient. The values are right, nothing is printed, also with fullgraph=True and backend aot_eager. With the
#           product as a new tensor the gradients are those of eager mode.
# Matters:  fake quantization is written this way for its speed in eager mode. Compiled, no weight below such a
#           quantizer learns anything, and the student stays what rounding made of it. Return a new tensor where
#           torch.compiler.is_compiling().
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check torch==2.11.0 numpy==2.4.6

cat > check.py <<'PY'
import torch


def quantizer(ending):
    class Quantize(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, scale):
            steps = torch.round(x / scale)
            codes = torch.clamp(steps, -8, 7)
            ctx.save_for_backward(codes == steps)
            return ending(codes, scale)

        @staticmethod
        def backward(ctx, gradient):
            (inside,) = ctx.saved_tensors
            return gradient * inside, None

    return Quantize


ENDINGS = {
    "codes.mul_(scale)": lambda codes, scale: codes.mul_(scale),
    "(codes * scale).to(torch.float32)": lambda codes, scale: (codes * scale).to(torch.float32),
    "codes * scale": lambda codes, scale: codes * scale,
}
x, scale = torch.linspace(-3, 3, 64), torch.tensor(0.3)
seen = {}
for name, ending in ENDINGS.items():
    function = quantizer(ending)
    values, gradients = [], []
    for call in (function.apply, torch.compile(function.apply, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        out = call(leaf, scale)
        values.append(out.detach())
        gradients.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    assert torch.equal(*values) and gradients[0].count_nonzero() > 40
    if torch.equal(*gradients):
        seen[name] = "the gradient of eager mode"
    else:
        seen[name] = "another gradient" if gradients[1].any() else "zeros"

print("version: torch", torch.__version__)
print("expected: the gradient of eager mode, three times")
for name, what in seen.items():
    print(f"seen: return {name}: {what}")
if list(seen.values()) != ["zeros", "zeros", "the gradient of eager mode"]:
    raise SystemExit(f"changed: {seen}")
PY
venv/bin/python check.py
