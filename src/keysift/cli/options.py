"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

from typer import Argument as argument
from typer import Option as option

Dash = Annotated[str | None, argument(metavar="[-]", help="Read the prompt from standard input.")]
Prompt = Annotated[str | None, option(metavar="TEXT", help="The prompt.")]
PromptFile = Annotated[Path | None, option(metavar="FILE", help="UTF-8 file with the prompt; - as above.")]
Model = Annotated[
    str | None, option(metavar="PATH", show_default="the shipped pocket model", help="Model folder or hub id.")
]
Prefill = Annotated[str, option(metavar="SPEC", help="How the prompt is read: name[:key=value,...].")]
Draft = Annotated[
    str | None,
    option(metavar="SPEC", show_default="none", help="How tokens are drafted for self-speculation: a decode method."),
]
Gamma = Annotated[
    int | None, option(metavar="N", show_default="as it pays, 0 included", help="Tokens drafted at a time, 1 to 8.")
]
Chat = Annotated[bool, option("--chat", help="Apply the model's chat template.")]
Device = Annotated[str, option(metavar="D", help="auto, cpu, cuda or cuda:N.")]
TensorParallel = Annotated[
    int | None, option(metavar="N", show_default="1", help="GPUs, or processes on a CPU, that share the model.")
]
DType = Annotated[
    str, option(metavar="T", help="auto (float32 on a CPU, the model's own on a GPU), float32, bfloat16 or float16.")
]
Refresh = Annotated[
    str, option(metavar="WHEN", help="When drafts select keys: verify (after each pass) or never (once an answer).")
]
DraftModel = Annotated[
    str | None,
    option(metavar="PATH", help="A smaller model drafts, over a cache of its own: --draft streaming or snapkv."),
]
