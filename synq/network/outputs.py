"""The end of a classifier's graph: logits are what the losses need."""

import torch
from torch import Tensor, fx

from synq.network.op_traits import is_passive, traits_of, value_inputs


@torch.no_grad()
def drop_log_softmax(traced: fx.GraphModule, sample: Tensor) -> bool:
    """Remove, in place, a log-softmax over the classes at the end of a network, so that it returns logits.

    Softmax, loss and ranking of log-probabilities are those of the logits that they were computed from. The quantized
    student must return the logits: as a non-linearity the log-softmax would be a quantization point, and the outputs
    of a classifier would be rounded to the activations' bits.

    Args:
        traced: A graph from ``trace_classifier`` with recorded traits.
        sample: (N, C, H, W) images.

    Returns:
        Whether there was one.
    """
    output = next(node for node in traced.graph.nodes if node.op == "output")
    (last,) = output.all_input_nodes
    while is_passive(last):
        (last,) = value_inputs(last)
    # Not a log-softmax over positions or images: those rows sum to something else.
    if traits_of(last).operators != ("_log_softmax",) or not _rows_sum_to_one(traced(sample)):
        return False
    (logits,) = value_inputs(last)
    last.replace_all_uses_with(logits)
    traced.graph.erase_node(last)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return True


def _rows_sum_to_one(log_probabilities: Tensor) -> bool:
    return torch.allclose(log_probabilities.double().exp().sum(1), torch.ones(()).to(log_probabilities).double())
