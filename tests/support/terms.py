"""Patterns of words that prose of the source and of the documents does not use, with the standard terms."""

PROSE = {
    r"\bwords\b": "args, argv",
    r"(?<!bit-)\bwidths\b|\bwidth choice\b": "bit-widths, mixed-precision search",
    r"\bthe ends\b": "first and last layer",
    r"\bsaid\b|\btold\b|\bsays?\b|\btells?\b|\bhears? of\b": "logged, warned, printed, reported, given",
    r"\brefus\w+": "reject, raise",
    r"\bstands?\b(?!-)": "is",
    r"\bbeside\b|\bbehind\b|\bwhoever\b": "next to, after, any process",
    r"\bof (its|their) own\b": "separate, dedicated",
    r"\bin the place of\b": "instead of",
    r"\banswer\w*": "logits, outputs, reply",
    r"\balike\b": "equal, tied",
    r"\bdoors?\b": "command",
    r"\bsites?\b(?!-)": "cluster, location",
    r"\bmerit\b|\bhalts?\b|\bworkplace\b|\brehears\w+|\bremarks?\b": "sort_key, stop, workspace, smoke run, note",
    r"(?<!decimal )\bplaces\b": "paths",
    r"\bidle\b": "inactive",
}
BRITISH = (
    r"\w*(?:colour|behaviour|favour|neighbour|labelled|modelled|cancelled|travelled|artefact|catalogue|grey|centre|whilst|learnt)\w*"
    r"|\w*(?:optim|equal|normal|quant|minim|maxim|summar|initial|serial|recogn|organ|parallel|regular|visual|synchron|general|special)is(?:e|ed|es|er|ing|ation)\b"
    r"|\banalyse\w*|\blicence\w*"
)
FIGURE = {r"\bfigures?\b": "metric, value, result"}
