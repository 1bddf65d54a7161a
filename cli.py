"""The command line: one thin function per verb. Exit status 0 done, 1 unexpected, 2 bad input, 3 refused, 130 ^C."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ._version import __version__
from .guard.base.errors import InputError, Refused
from .guard.base.untrusted import printable
from .guard.model.complaints import own_words
from .options import (
    MODEL_HELP,
    QA,
    AdapterOption,
    AllowPartial,
    AnchorsOption,
    Benign,
    CreatePR,
    FamilyFile,
    FormatOption,
    GuardOption,
    Jobs,
    JudgeOption,
    Layers,
    LinkOption,
    MinimumEffect,
    Model,
    OnnxDtypes,
    OnnxWeights,
    PlacementOption,
    Private,
    ProbesOption,
    ProviderOption,
    PushTo,
    Rank,
    RateOption,
    RefusalsFile,
    Revision,
    RoundingOption,
    ScopeOption,
    SettingOption,
    SkipBehaviour,
    SkipRuntime,
    Strength,
    Strict,
    TrustRemoteCode,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .export.formats import Formats
    from .pipeline import GuardOptions
    from .validators.evidence.evidence import Evidence

app = typer.Typer(
    name="guardfold",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fold a safety guard into the weights of a vision-language model, and prove what it does.\n\n"
    "Start with:  guardfold export --model demo",
    epilog="Exit status: 0 done, 1 unexpected error, 2 bad input, 3 refused because not safer or not equal, "
    "130 interrupted. --debug, anywhere, shows tracebacks.",
)

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

LINE_CHARACTERS = 1000
"""Of what is said of an error."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"guardfold {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def export(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write. Default: ./<name>-guarded.")
    ] = None,
    guard: GuardOption = "auto",
    scope: ScopeOption = "sublayers",
    layers: Layers = None,
    rank: Rank = 1,
    strength: Strength = None,
    false_positive_rate: RateOption = None,
    placement: PlacementOption = "recycle",
    anchors: AnchorsOption = None,
    benign: Benign = None,
    family: FamilyFile = None,
    adapter: AdapterOption = None,
    probes: ProbesOption = None,
    qa: QA = None,
    judge: JudgeOption = None,
    refusals: RefusalsFile = None,
    minimum_effect: MinimumEffect = 0.5,
    skip_behaviour: SkipBehaviour = False,
    formats: FormatOption = "safetensors",
    settings: SettingOption = None,
    allow_partial: AllowPartial = False,
    onnx_dtype: OnnxDtypes = "fp32",
    onnx_weights: OnnxWeights = "copy",
    provider: ProviderOption = "auto",
    skip_runtime: SkipRuntime = False,
    allow_weaker: Annotated[
        bool, typer.Option("--allow-weaker", help="Publish even if not safer, marked NOT VERIFIED. For research.")
    ] = False,
    strict: Strict = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output folder, if guardfold wrote it.")
    ] = False,
    jobs: Jobs = 2,
    rounding: RoundingOption = "repair",
    link: LinkOption = "auto",
    push_to: PushTo = None,
    private: Private = False,
    create_pr: CreatePR = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a guarded copy of a model, and publish it only if it is measurably safer. Or, with --format onnx and a
    folder that is guarded already, write its graphs.

    Extracts the safety steering directions, folds the guard into the weights, proves the result equal to the hooks,
    measures refusals and answers with and without images, and prints original against guarded.
    """
    from .export.checkpoint.rewrite import LINKS, Writing
    from .export.checkpoint.rounding import ROUNDINGS
    from .export.publish.hub import Target
    from .pipeline import export_guarded
    from .validators.behaviour.verdict import Limits

    _begin(model)
    _check_choices(("rounding", rounding, ROUNDINGS), ("link", link, LINKS))
    options = _options(
        guard=guard,
        scope=scope,
        layers=layers,
        rank=rank,
        strength=strength,
        false_positive_rate=false_positive_rate,
        placement=placement,
        anchors=anchors,
        benign=benign,
        family=family,
    )
    result = export_guarded(
        model,
        output,
        options,
        _formats(formats, onnx_dtype, onnx_weights, provider, skip_runtime, settings or ()),
        probes=probes,
        qa=qa,
        judge=judge,
        refusals=refusals,
        limits=Limits(minimum_effect=minimum_effect),
        skip_behaviour=skip_behaviour,
        allow_weaker=allow_weaker,
        strict=strict,
        overwrite=overwrite,
        writing=Writing(jobs, cast(Any, rounding), cast(Any, link)),
        push_to=Target(push_to, private, create_pr, revision) if push_to else None,
        adapter=adapter,
        allow_partial=allow_partial,
        trust_remote_code=trust_remote_code,
    )
    _show(result.evidence)
    typer.echo(f"written to {result.folder}" + ("" if result.verified else " (NOT VERIFIED)"))
    if result.url:
        typer.echo(f"pushed to {result.url}")


@app.command()
def extract(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Guard file to write (.safetensors).")],
    guard: GuardOption = "auto",
    scope: ScopeOption = "sublayers",
    layers: Layers = None,
    rank: Rank = 1,
    strength: Strength = None,
    false_positive_rate: RateOption = None,
    placement: PlacementOption = "recycle",
    anchors: AnchorsOption = None,
    benign: Benign = None,
    family: FamilyFile = None,
    adapter: AdapterOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Extract a guard from a model and write it to a file, without touching the model.

    Prints, per layer, how strongly the direction stands out and how well it separates harmful from harmless prompts.
    """
    from .pipeline import extract_to
    from .validators.report.terminal import directions_table

    _begin(model)
    made = extract_to(
        output,
        model,
        _options(
            guard=guard,
            scope=scope,
            layers=layers,
            rank=rank,
            strength=strength,
            false_positive_rate=false_positive_rate,
            placement=placement,
            anchors=anchors,
            benign=benign,
            family=family,
        ),
        overwrite=overwrite,
        adapter=adapter,
        trust_remote_code=trust_remote_code,
    )
    _print(directions_table(made))
    typer.echo(f"written to {output}")


@app.command()
def check(
    folder: Annotated[Path | None, typer.Argument(help="A folder written by `guardfold export`.")] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="The model the folder was made from. " + MODEL_HELP)
    ] = None,
    probes: ProbesOption = None,
    qa: QA = None,
    judge: JudgeOption = None,
    refusals: RefusalsFile = None,
    minimum_effect: MinimumEffect = 0.5,
    skip_behaviour: SkipBehaviour = False,
    family: FamilyFile = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint", help="Measure what is served there (OpenAI's chat/completions) instead of a folder."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="What the endpoint calls the model.")] = None,
    baseline_endpoint: Annotated[
        str | None,
        typer.Option("--baseline-endpoint", help="Where the unguarded model is served. Default: --endpoint."),
    ] = None,
    baseline_model: Annotated[
        str | None, typer.Option("--baseline-model", help="What it is called there. Gives a verdict.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 8,
    report: Annotated[
        Path | None, typer.Option("--report", help="JSON file to write an endpoint's figures to.")
    ] = None,
    adapter: AdapterOption = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure a guarded folder afresh against the model it was made from, or a model that is being served.

    With --endpoint and --model, text and pictures are sent to a running server; a key, if it wants one, is taken from
    GUARDFOLD_API_KEY (GUARDFOLD_BASELINE_API_KEY). Rates come alone, or with a verdict against --baseline-model or
    against the original as the report of FOLDER has it. Exit status 3 if it is not equal to its hooks or, unless
    behaviour is skipped or nothing compared, not safer.
    """
    if endpoint is not None:
        _check_served(
            endpoint, model, baseline_endpoint, baseline_model, concurrency, folder, probes, qa, judge, refusals, report
        )
        return
    if folder is None or against is None:
        raise InputError("check: give a folder and --against MODEL, or --endpoint URL and --model NAME")
    from .pipeline import check_guarded
    from .validators.behaviour.verdict import Limits

    _begin(against)
    evidence = check_guarded(
        folder,
        against,
        probes=probes,
        qa=qa,
        judge=judge,
        refusals=refusals,
        limits=Limits(minimum_effect=minimum_effect),
        skip_behaviour=skip_behaviour,
        family_file=family,
        adapter=adapter,
        trust_remote_code=trust_remote_code,
    )
    _show(evidence)
    if not evidence.sound or not (skip_behaviour or evidence.ruling == "safer"):
        raise typer.Exit(3)


def _check_served(
    url: str,
    model: str | None,
    baseline_url: str | None,
    baseline_model: str | None,
    concurrency: int,
    folder: Path | None,
    probes: list[str] | None,
    qa: Path | None,
    judge: str | None,
    refusals: Path | None,
    report: Path | None,
) -> None:
    from .pipeline import check_served
    from .validators.report.terminal import render_served
    from .validators.runtimes.endpoint import Endpoint

    if model is None or (baseline_url and not baseline_model):
        raise InputError("--endpoint needs --model, --baseline-endpoint --baseline-model: what the server calls it")
    _begin(model)
    served = Endpoint(url, model, os.environ.get("GUARDFOLD_API_KEY"), concurrency)
    baseline = None
    if baseline_model:
        name = "GUARDFOLD_BASELINE_API_KEY" if baseline_url else "GUARDFOLD_API_KEY"
        baseline = Endpoint(baseline_url or url, baseline_model, os.environ.get(name), concurrency)
    found = check_served(
        served, baseline=baseline, folder=folder, probes=probes, qa=qa, judge=judge, refusals=refusals, report=report
    )
    columns = {"original": found.baseline} if found.baseline else {}
    _print(render_served({**columns, "served": found.behaviour}, found.verdict))
    if found.verdict and found.verdict.ruling != "safer":
        raise typer.Exit(3)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A folder written by `guardfold export`. Or: " + MODEL_HELP)],
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[Path | None, typer.Option(help="A picture to ask about.")] = None,
    runtime: Annotated[
        str | None, typer.Option(help="torch or onnx. Default: torch where there are safetensors, else onnx.")
    ] = None,
    onnx_dtype: Annotated[
        str | None, typer.Option("--onnx-dtype", help="Which of the graphs. Default: the first there is.")
    ] = None,
    provider: ProviderOption = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to say.")] = 256,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Ask a folder's model one question, in torch or onnxruntime, and see the answer as it is made."""
    from .validators.runtimes.chat import answer_in_pieces

    _begin(model)

    def say(piece: str) -> None:
        typer.echo(piece, nl=False)

    answer_in_pieces(
        model,
        prompt,
        image,
        say,
        runtime=runtime,
        precision=onnx_dtype,
        provider=provider,
        most=max_tokens,
        trust_remote_code=trust_remote_code,
    )
    typer.echo()


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    trace: Annotated[
        bool,
        typer.Option(
            "--trace",
            help="Print a family file instead, found by running the model's class without its weights: save it, and "
            "pass it to --family.",
        ),
    ] = False,
    family: FamilyFile = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say what a model is and which of its tensors write to the residual stream, from config and headers alone."""
    from .pipeline import inspect_model, trace_family
    from .validators.report.terminal import family_table

    _begin(model)
    if trace:
        typer.echo(trace_family(model, trust_remote_code=trust_remote_code), nl=False)
    else:
        _print(family_table(*inspect_model(model, family, trust_remote_code=trust_remote_code)))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A folder written by `guardfold export`.")],
    repo: Annotated[str, typer.Argument(help="USER/REPO on the hub, made if need be.")],
    private: Private = False,
    create_pr: CreatePR = False,
    revision: Revision = None,
    allow_weaker: Annotated[
        bool, typer.Option("--allow-weaker", help="Push even if not safer; its card says NOT VERIFIED.")
    ] = False,
) -> None:
    """Push a guarded folder to the Hugging Face Hub. Run it again after an interruption: it sends what is missing.

    The token is the one that `hf auth login` or HF_TOKEN gives. Exit status 3 if the verdict is not "safer", or if the
    files are not those that were measured.
    """
    from .export.publish.hub import Target
    from .export.publish.hub import push as send

    _begin(repo)
    typer.echo(f"pushed to {send(folder, Target(repo, private, create_pr, revision), allow_weaker=allow_weaker)}")


@app.command()
def verify(
    name: Annotated[str, typer.Argument(metavar="DIR|HUB_ID", help="A guarded folder, or a hub id (@REVISION).")],
) -> None:
    """Say whether the files of a guarded folder or repository are the ones that were measured, byte for byte.

    Exit status 3, with a line for each file that differs, is missing or was added, if they are not.
    """
    from .export.publish.verify import verify as compare

    _begin(name)
    found = compare(name)
    for line in found.differences:
        print(f"guardfold: refused: {found.folder / line}", file=sys.stderr)
    if found.differences:
        raise typer.Exit(3)
    typer.echo(f"{name}: {found}")


def _options(**given: Any) -> GuardOptions:
    from .export.fold import PLACEMENTS
    from .guard.presets.layers import SCOPES
    from .pipeline import GuardOptions

    _check_choices(("scope", given["scope"], SCOPES), ("placement", given["placement"], PLACEMENTS))
    return GuardOptions(**given)


def _formats(
    names: str, dtype: str, weights: str, provider: str, skip_runtime: bool, settings: Sequence[str]
) -> Formats:
    from .export.formats import Formats

    more = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: give NAME=VALUE")
        more[name] = value
    return Formats(names, dtype, cast(Any, weights), provider, skip_runtime, more=more)


def _check_choices(*choices: tuple[str, str, Sequence[str]]) -> None:
    """Raises InputError for the first (option, value, known values) whose value is not known."""
    for name, value, known in choices:
        if value not in known:
            raise InputError(f"--{name} {value}: one of {', '.join(known)}")


def _show(evidence: Evidence) -> None:
    from .validators.report.terminal import render

    _print(render(evidence))


def _print(what: RenderableType) -> None:
    from rich.console import Console

    Console().print(what)


def _begin(model: str) -> None:
    """Says which hub id an alias stands for; progress bars and remarks of the libraries below would interrupt ours."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    from .guard.model.vlm import ALIASES

    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
    if model in ALIASES and not Path(model).is_dir():
        print(f"{model}: {ALIASES[model]}", file=sys.stderr)


def _one_line(problem: object) -> str:
    return printable(" ".join(str(problem).split()), LINE_CHARACTERS) or type(problem).__name__


def _open_standard_streams() -> None:
    """Those that were closed lead nowhere from now on, so that no file of ours gets the number of one."""
    for stream in range(3):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def main() -> None:
    """The `guardfold` command: runs it, turns errors into one line and an exit status, and ends the process."""
    _open_standard_streams()
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if not debug and not sys.warnoptions:
        warnings.simplefilter("ignore")  # what libraries remark would stand between the lines of ours
    cause: BaseException | None = None
    message = ""
    try:
        status = app(arguments or ["--help"], standalone_mode=False) or 0
        if status == INTERRUPTED:
            raise KeyboardInterrupt  # which the parser has turned into a status
    except InputError as error:
        status, message, cause = 2, f"error: {_one_line(error)}", error
    except (KeyboardInterrupt, typer.Abort) as error:
        status, message, cause = INTERRUPTED, "interrupted; nothing half-written is left", error
    except Refused as error:
        status, message, cause = 3, f"refused: {_one_line(error)}", error
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        status, message, cause = 2, f"error: {_one_line(f'{where}{error.strerror or error}')}", error
    except ImportError as error:
        status, message, cause = 2, f"error: a library cannot be imported: {_one_line(own_words(error))}", error
    except Exception as error:
        cause = error
        if hasattr(error, "format_message"):  # what the parser says of a command it cannot take
            status, message = 2, f"error: {_one_line(error.format_message())} (--help explains)"
        else:
            status, message = 1, f"unexpected {type(error).__name__}: {_one_line(error)} (--debug shows where)"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left to do is to end
    with suppress(OSError):
        evidence = getattr(cause, "evidence", None)
        if evidence is not None:
            _show(evidence)
        if debug and cause is not None:
            traceback.print_exception(cause)
        if message:
            print(f"guardfold: {message}", file=sys.stderr)
    sys.exit(status)
