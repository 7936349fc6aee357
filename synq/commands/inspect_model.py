"""`synq inspect`: how a classifier would be quantized, layer by layer."""

import json

import click

from synq.config.command_line import Command
from synq.config.command_options import config_option, option
from synq.config.run import RunConfig
from synq.train import TEACHER_SETTINGS

COMMON = (
    *TEACHER_SETTINGS,
    *(
        "teacher.output",
        "quant.weight_bits",
        "quant.act_bits",
        "quant.first_bits",
        "quant.last_bits",
        "quant.act_points",
        "quant.target",
    ),
)
EXAMPLES = """\
  %(prog)s                                              the classifier that ships with SynQ
  %(prog)s torchvision:resnet18 --teacher.weights random --quant.weight_bits 3
  %(prog)s torchvision:mobilenet_v3_small --teacher.weights random --target onnxruntime
  %(prog)s FILE.py:FUNCTION --teacher.weights random --teacher.input_size 3 32 32 --json"""


@click.command("inspect", cls=Command, settings="run", common=COMMON, examples=EXAMPLES)
@config_option
@option(
    "--target",
    metavar="ENGINE",
    help="list the engine's kernel of each layer: research, onnxruntime, openvino, litert or executorch, as "
    "--quant.target; tensorrt or qnn: by their published rules, not run",
)
@option("--json", "as_json", is_flag=True, help="print one JSON object instead of tables")
def command(config: RunConfig, target: str | None, as_json: bool) -> None:
    """Show how a classifier would be quantized, layer by layer; no file is written.

    Every operation of the forward pass is listed with the bits of its weight (W) and output (out), where 32 means float
    or an operation that does not change its input's values, such as max pooling (BitOps count the bits that are read);
    the batch norms that guide the synthesis; where and how class activation maps are computed; parameters,
    multiply-accumulates (MACs), bit operations (BitOps) and sizes. A classifier that cannot be quantized is rejected as
    in a run. Only the settings of `teacher` and `quant` are used. Without a target it is onnxruntime, as in
    `synq.inspect` and `synq.quantize`; `synq train` without one has research.

    For an engine a second table has the kernel of every step, with what is folded into it: whether it runs in integers,
    in floats or is rejected, and why, as measured in the version of the engine that the last line names.
    """
    from synq.api.settings import with_shipped_target
    from synq.common.text_tables import to_text
    from synq.diagnostics.inspection import COLUMNS, HEADINGS, inspect, summary
    from synq.diagnostics.kernel_table import for_target, table_text
    from synq.quant.student import build_student
    from synq.teacher.teacher import load_teacher

    given = click.get_current_context().obj
    config = with_shipped_target(config, given.files[0] if given.files else None, given.overrides)
    teacher = load_teacher(config.teacher)
    quant, rules = for_target(config.quant, target)
    found = inspect(teacher, build_student(teacher, quant), quant, rules)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    # Empty cells are easier to read than zeros.
    rows = [{name: value or None for name, value in row.items()} for row in found["layers"]]
    print(to_text(rows, COLUMNS, HEADINGS))
    print(table_text(found["kernels"]), end="")
    print(summary(found), end="", flush=True)


main = command.run
