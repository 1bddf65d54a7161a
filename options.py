"""The options of the command line that verbs share, or that need more than a line: type, name and help of each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL_HELP = "The demo, a model folder, a hub id (owner/name, @REVISION if need be), or an alias such as llava."
Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
PRESETS_HELP = (
    "auto (vlm-guard, unless validation shows its gate alone to be better), vlm-guard (projection and gate), gate, "
    "linear (a gate that an adapter holds), projection (which alone can make a model less safe), or another kind of "
    "intervention that is chosen by itself (activation-addition)"
)
GuardOption = Annotated[str, typer.Option("--guard", "-g", help=f"A guard file, or a preset: {PRESETS_HELP}.")]
Layers = Annotated[
    str | None,
    typer.Option(
        help="Decoder layers to project and to gate: last-quarter, last-half, all, or numbers from 0 (3,5,20-31). "
        "Default: chosen on validation."
    ),
]
ScopeOption = Annotated[
    str,
    typer.Option(
        "--scope",
        help="Of the preset projection. sublayers: own directions per layer, on what its attention and MLP write. "
        "shared: one set of directions, on everything that writes to the residual stream. "
        "residual: own directions per layer on the residual stream itself, which ONNX graphs hold and weights do not; "
        "with --guard vlm-guard it also steers.",
    ),
]
Rank = Annotated[int, typer.Option(min=1, help="Directions per projected layer (m).")]
Strength = Annotated[
    float | None,
    typer.Option(help="Share of the component to remove, above 0 and up to 1. Default: chosen on validation."),
]
RateOption = Annotated[
    float | None,
    typer.Option(
        "--false-positive-rate",
        min=1e-6,
        max=0.5,
        help="Share of benign prompts on which the gate may newly open: more protects more and costs more. "
        "Default: chosen on validation.",
    ),
]
PlacementOption = Annotated[
    str,
    typer.Option(
        "--placement",
        help="Where the gate's neurons go. recycle: in place of the least used ones; every shape stays. "
        "widen: beside them; every MLP grows.",
    ),
]
Benign = Annotated[
    Path | None,
    typer.Option(
        help="Harmless prompts the gate must leave alone, JSONL or CSV with column text (and image). "
        "Default: the model folder's own benign.jsonl, else the built-in ones."
    ),
]
AnchorsOption = Annotated[
    Path | None,
    typer.Option(
        help="Paired queries, JSONL or CSV with columns harmful and harmless. "
        "Default: the model folder's own anchors.jsonl, else the built-in ones."
    ),
]
ProbesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--evaluation-prompts",
        "--probes",
        metavar="FILE|NAME=PATH",
        help="Held-out evaluation prompts, JSONL or CSV with columns text and harmful (and answer); or files of a "
        "benchmark, asked as well: maliciousinstruct, advbench, xstest, jailbreakv, figstep, mm-safetybench, mm-vet, "
        "vqa. Repeatable. Default: the model folder's own probes.jsonl, else the built-in ones.",
    ),
]
QA = Annotated[
    Path | None,
    typer.Option(
        "--qa",
        help="Labelled image questions, JSONL with image, text and answer. Default: the model folder's own qa.jsonl.",
    ),
]
JudgeOption = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help="A classifier of the Llama Guard kind (folder or hub id) that rules on answers to harmful prompts. "
        "Default: by refusal phrases.",
    ),
]
RefusalsFile = Annotated[
    Path | None,
    typer.Option(
        "--refusals",
        help="How this model refuses, if not in words that are known: TOML with a list of phrases, refused = [...]; "
        "also sorry, unless, evaded, turned, before. Phrases of twelve languages are built in.",
    ),
]
MinimumEffect = Annotated[
    float,
    typer.Option(
        "--minimum-effect",
        help="By how much harmful compliance under pictures must be cut for the guard to be called safer, as a share "
        "of the original's: 0.5 is half of it, with 95 % confidence.",
    ),
]
FamilyFile = Annotated[
    Path | None,
    typer.Option(
        "--family",
        help="A file that says what writes to the residual stream, for a family that has no row of its own; "
        "`guardfold inspect MODEL --trace` makes one.",
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="A PEFT LoRA adapter of your own (folder or hub id), merged into the model first: a fine-tune, guarded in "
        "one command.",
    ),
]
SkipBehaviour = Annotated[
    bool,
    typer.Option(
        "--skip-behaviour",
        help="Check that the folder is sound and equal to its hooks, but measure no behaviour; the manifest says so.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that comes with the model (auto_map), with your rights. Read it first.",
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make the repository private.")]
CreatePR = Annotated[bool, typer.Option("--create-pr", help="Propose the change as a pull request.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch to push to, made if need be. Default: main.")]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Threads that write the checkpoint.")]
RoundingOption = Annotated[
    str,
    typer.Option(
        "--rounding",
        help="Of projected float16 and bfloat16 weights. repair: rounds a few entries the other way, so that the "
        "projection survives rounding. nearest: leaves up to 1 % of the direction behind.",
    ),
]
LinkOption = Annotated[
    str,
    typer.Option(
        "--link",
        help="Of weight files in which nothing changes. auto: share their blocks where the filesystem can (reflink), "
        "else copy. reflink: share or stop. hard: the same file in both folders, so that a change of one changes the "
        "other. none: copy.",
    ),
]
ProviderOption = Annotated[
    str, typer.Option("--provider", help="Where onnxruntime runs: cpu, cuda, or auto (cuda where there is one).")
]
FormatOption = Annotated[
    str,
    typer.Option(
        "--format",
        help="safetensors, onnx, or both: safetensors,onnx. Or lora: a PEFT adapter of a few MB for the unmodified "
        "model, which holds projections and linear gates.",
    ),
]
SettingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting of a format that has no option of its own here. Repeatable.",
    ),
]
AllowPartial = Annotated[
    bool,
    typer.Option("--allow-partial", help="Of --format lora: write an adapter that holds only a part of the guard."),
]
OnnxDtypes = Annotated[
    str,
    typer.Option(
        "--onnx-dtype", help="Number formats of the graphs, with commas: fp32, fp16, bf16, bf16-native, q8, q4."
    ),
]
OnnxWeights = Annotated[
    str,
    typer.Option(
        "--onnx-weights",
        help="copy: the graphs have weights of their own. shared: they point into the safetensors beside them.",
    ),
]
SkipRuntime = Annotated[
    bool,
    typer.Option("--skip-runtime", help="Write the graphs without running them; the manifest says NOT VERIFIED."),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Refuse a fold that is approximate by nature (a shared one under post-norms)."),
]
PushTo = Annotated[
    str | None, typer.Option("--push-to", help="Hub repository (USER/REPO) that the folder is pushed to as well.")
]
