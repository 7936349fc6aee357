"""Settings of a run that concern attention alone, for a network in which nothing reads them."""

from torch import fx

from synq.config.run import RunConfig
from synq.network.attention.locations import AttentionNodes, attention_of_images, locate_attention
from synq.network.ops import products


def attention_note(config: RunConfig, graph: fx.GraphModule, name: str) -> str:
    """Return one sentence on the settings that change nothing for want of attention, "" if there are none.

    They are no error: one spec of a sweep may hold networks with attention and without.

    Args:
        config: The run.
        graph: The teacher, from ``trace_classifier``.
        name: Its name.
    """
    synthesis, quant = config.synthesis, config.quant
    is_set = {
        "synthesis.prior_weight": bool(synthesis.prior_weight),
        "synthesis.head_weight": bool(synthesis.head_weight),
        "finetune.attention_weight": config.finetune.attention_weight > 0,
        "quant.softmax": quant.softmax != "uniform",
        "quant.float_attention": quant.float_attention,
    }
    if not any(is_set.values()):
        return ""
    found = locate_attention(graph)
    missing = {
        "synthesis.prior_weight": _no_prior(graph, found),
        "synthesis.head_weight": "" if any(one.heads > 1 for one in found) else _no_attention(found, "several heads"),
        "finetune.attention_weight": "" if found else "no attention",
        "quant.softmax": "" if products(graph) else "no attention",
        "quant.float_attention": "" if products(graph) else "no attention",
    }
    reasons: dict[str, list[str]] = {}
    for setting, reason in missing.items():
        if is_set[setting] and reason:
            reasons.setdefault(reason, []).append(f"`{setting}`")
    clauses = [
        f"{' and '.join(settings)} {'do' if len(settings) > 1 else 'does'} nothing for {name}, which has {reason}"
        for reason, settings in reasons.items()
    ]
    return f"note: {'; '.join(clauses)}" if clauses else ""


def _no_attention(found: list[AttentionNodes], kind: str) -> str:
    return f"no attention of {kind}" if found else "no attention"


def _no_prior(graph: fx.GraphModule, found: list[AttentionNodes]) -> str:
    if any(one.depth > 0.5 for one in attention_of_images(graph)):
        return ""
    return _no_attention(found, "all positions of an image in its deeper half")
