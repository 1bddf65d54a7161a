"""The run, from a model to a guarded one: extract -> fold -> check -> publish. What Python users call."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import __version__
from .export.adapter import BIASED, CONFIG_FILE, Adapter, adaptable, adapters, without
from .export.adapter_card import notes
from .export.card import (
    GUARD_FILE,
    MANIFEST,
    AdapterNotes,
    Source,
    extend_card,
    extend_manifest,
    write_card,
    write_manifest,
    written_rounding,
)
from .export.checkpoint import Checkpoint
from .export.companions import copy_companions
from .export.fold import Fold, fold
from .export.formats import Formats
from .export.hub import Target, push
from .export.merge import describe_adapter, merging
from .export.onnx.graphs import Plan, write_graphs
from .export.remote import hollow_copy
from .export.rewrite import Writing, rewrite
from .export.staging import check_room, staging
from .export.traced_rows import as_toml, family_rows
from .export.tracer import hollow
from .export.verify import differences, load_manifest
from .export.writers import Family, family_of
from .guard.errors import InputError, Refused
from .guard.guard import Guard
from .guard.images import IMAGE_KINDS
from .guard.progress import bar
from .guard.trust import code_of, trusting_if_asked
from .guard.vlm import located, meta_model, resolve, threads_for
from .validators.adapted import Adapted
from .validators.batches import comparison_batches
from .validators.behaviour import Behaviour, observe
from .validators.check import NOT_MEASURED, Evidence, examine, examine_hooked, with_graphs
from .validators.endpoint import Endpoint
from .validators.integrity import Integrity
from .validators.judge import ModelJudge, PhraseJudge
from .validators.making import GATED, PRESETS, GuardOptions, guard_of
from .validators.measures import markdown, shown
from .validators.page import render_page
from .validators.plots import compliance_picture
from .validators.probes import Asked, load_probes
from .validators.recorded import recall
from .validators.runtime import Runtime, check_graphs
from .validators.verdict import Verdict, judge_guard

PICTURE = GUARD_FILE.with_name("compliance.png")
"""Of the card: what was complied with, by image kind."""


@dataclass(frozen=True)
class Export:
    """A finished export: where it lies, its guard, the evidence about it, and whether that shows it to be safer."""

    folder: Path
    guard: Guard
    evidence: Evidence
    verified: bool
    url: str | None = None
    """Of the commit or pull request, where it was pushed."""


class NotSafer(Refused):
    """Nothing was published: the evidence says why."""

    def __init__(self, evidence: Evidence) -> None:
        first, *others = evidence.reasons
        more = f" (and {len(others)} more reasons)" if others else ""
        if evidence.sound:
            super().__init__(f"{evidence.ruling}: {first}{more}; nothing was written (--allow-weaker overrides)")
        else:
            super().__init__(f"not sound: {first}{more}; nothing was written")
        self.evidence = evidence


@trusting_if_asked
def extract_guard(model: str, options: GuardOptions | None = None, *, trust_remote_code: bool = False) -> Guard:
    """The guard that `options` describe: read from a file, or made from `model` (demo, alias, hub id or folder).

    Raises InputError for a model or prompts that cannot be used, layers out of range, or a rank above the anchors, and
    Refused if no candidate is within the limits or the detector cannot tell harmful prompts apart.
    """
    return guard_of(*resolve(model), options or GuardOptions())


@trusting_if_asked
def extract_to(
    output: Path,
    model: str,
    options: GuardOptions,
    *,
    overwrite: bool = False,
    adapter: str | None = None,
    trust_remote_code: bool = False,
) -> Guard:
    """Extracts a guard into the file `output`, from `model` or, with `adapter`, from `model` after merging it.

    Raises InputError if the file exists (without `overwrite`) or cannot be.
    """
    if output.exists() and not (overwrite and output.is_file()):
        raise InputError(f"{output}: exists already; choose another --output or pass --overwrite")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder")
    if options.guard not in PRESETS:
        raise InputError(f"--guard {options.guard}: extraction takes a preset ({', '.join(PRESETS)})")
    with _base(*resolve(model), adapter, output.parent, options.family) as (source, base):
        guard = guard_of(base, source.title, options)
    guard.save(output)
    return guard


@trusting_if_asked
def export_guarded(
    model: str,
    output: Path | str | None = None,
    options: GuardOptions | None = None,
    formats: Formats | None = None,
    *,
    probes: Asked = None,
    qa: Path | None = None,
    judge: str | None = None,
    skip_behaviour: bool = False,
    allow_weaker: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    writing: Writing | None = None,
    push_to: Target | None = None,
    adapter: str | None = None,
    allow_partial: bool = False,
    trust_remote_code: bool = False,
) -> Export:
    """Writes `model` with a guard to `output` (default ./<name>-guarded), if it is safer: folded into its weights, as
    ONNX graphs, or both; or as a PEFT adapter for the unmodified model. Of a folder that is guarded already, graphs are
    written (default ./<name>-onnx).

    allow_partial: write an adapter even if it does not hold all of the guard.  adapter: folder or hub id of a PEFT LoRA
    adapter that is merged into the model first; what is guarded, and measured against, is then the merged model.

    probes, qa: files that replace the model's own or the built-in ones.  skip_behaviour: measure nothing but soundness
    and equality; the manifest says NOT VERIFIED.  allow_weaker: publish whatever the verdict; the manifest and the card
    say NOT VERIFIED.  strict: refuse a fold that is approximate by nature (under post-norms).  overwrite: replace
    `output`, if guardfold wrote it.  writing: threads, rounding, links.  push_to: where on the hub the finished folder
    goes as well.  trust_remote_code: run the code that comes with the model, and copy it.  Raises InputError for what
    cannot be used, and NotSafer, leaving nothing behind, if the result is not safer or not equal to its hooks (the
    latter is never published).
    """
    options = options or GuardOptions()
    if push_to:
        push_to.check()
        if skip_behaviour and not allow_weaker:
            raise InputError("--skip-behaviour: what was not measured is not pushed (--allow-weaker overrides)")
    folder, name = resolve(model)
    formats, writing = formats or Formats(), writing or Writing()
    if formats.has("onnx") and (folder / MANIFEST).is_file():
        made = _add_graphs(folder, name, output, options, formats, overwrite)
        return replace(made, url=push(made.folder, push_to, allow_weaker=allow_weaker)) if push_to else made
    _check_adapters(formats, options, adapter, allow_partial)
    called = resolve(adapter)[1] if adapter else name
    target = _target(folder, output or f"{called.rpartition('/')[2]}-guarded")
    with staging(target, overwrite) as stage:
        with _base(folder, name, adapter, stage, options.family) as (source, base), threads_for(base):
            checkpoint = Checkpoint.open(base)
            family = family_of(checkpoint, options.family)
            asked = None if skip_behaviour else load_probes(base, probes, qa)
            decides = ModelJudge(judge) if judge else None
            if writing.link != "hard" and not formats.has("lora"):
                check_room(target.parent, checkpoint.data_bytes)
            guard = guard_of(base, source.title, options)
            plan, edits, said = formats.plan(guard), Fold({}), None
            if formats.has("lora"):
                guard, edits, said = _write_adapters(stage, checkpoint, family, guard, source, allow_partial)
            else:
                copy_companions(base, stage)
            (stage / GUARD_FILE).parent.mkdir()
            guard.save(stage / GUARD_FILE)
            with _weights_place(stage, formats) as place:
                if plan and plan.traced:
                    place = base
                    evidence = examine_hooked(checkpoint, guard, asked, decides)
                else:
                    edits = edits if said else fold(guard, family, checkpoint.shapes, checkpoint.read)
                    if strict and edits.approximate:
                        raise Refused(f"--strict: {family.model_type}: {edits.approximate}; use --scope sublayers")
                    if not said:
                        with _writing(checkpoint, "folding (MB)") as advance:
                            rewrite(checkpoint, family, edits, place, advance, writing)
                        copy_companions(base, place)
                    folded = Adapted(checkpoint, stage) if said else Checkpoint.open(place)
                    evidence = examine(checkpoint, folded, family, guard, edits, writing.rounding, asked, decides)
                    _refuse_unsound(evidence, allow_weaker or skip_behaviour)
                if plan and (runtime := _graphs(place, base, stage, plan, guard, formats)):
                    evidence = with_graphs(evidence, runtime, stage, formats.provider, asked, decides)
        _refuse_unsound(evidence, allow_weaker or skip_behaviour)
        verified = evidence.ruling == "safer" and (plan is None or _vouched(evidence.runtime))
        figures = evidence.figures()
        described = {**guard.provenance, "interventions": guard.describe()}
        report = json.dumps({**figures, "guard": described}, indent=2) + "\n"
        (stage / "report.json").write_text(report, encoding="utf-8")
        page = render_page(source.title, figures, described, edits.per_layer(family))
        (stage / "report.html").write_text(page, encoding="utf-8")
        write_card(
            stage,
            source,
            guard,
            evidence.ruling,
            verified,
            markdown(figures),
            pictures=_pictures(stage, figures),
            command=_command(source, options, said is not None),
            notes=said,
        )
        write_manifest(stage, source, guard, writing.rounding, evidence.ruling, verified, figures, said)
    made = Export(target, guard, evidence, verified)
    return replace(made, url=push(target, push_to, allow_weaker=allow_weaker)) if push_to else made


def _vouched(runtime: Runtime | None) -> bool:
    return runtime is not None and runtime.vouched


def _target(folder: Path, output: Path | str) -> Path:
    if folder.resolve().is_relative_to(Path(output).resolve()):
        raise InputError(f"{output}: holds the model itself; choose another --output")
    return Path(output)


def _refuse_unsound(evidence: Evidence, whatever_it_does: bool) -> None:
    if not evidence.sound or not (evidence.ruling == "safer" or whatever_it_does):
        raise NotSafer(evidence)


@contextmanager
def _weights_place(stage: Path, formats: Formats) -> Iterator[Path]:
    """Where the folded weights go: into `stage`, or, where nobody wants them but the graphs, aside and away."""
    if formats.has("safetensors") or formats.has("lora"):
        yield stage
        return
    with TemporaryDirectory(dir=stage, prefix=".weights-") as aside:
        yield Path(aside)


def _graphs(
    weights: Path, original: Path | None, stage: Path, plan: Plan, guard: Guard, formats: Formats
) -> Runtime | None:
    """Writes the graphs of the model in `weights` into `stage` and compares them with torch, unless told not to."""
    if weights != stage:
        shutil.copyfile(weights / "config.json", stage / "config.json")
    write_graphs(Checkpoint.open(weights), stage, plan)
    return None if formats.skip_runtime else check_graphs(stage, plan, weights, original, guard, formats.provider)


def _add_graphs(
    folder: Path, name: str, output: Path | str | None, options: GuardOptions, formats: Formats, overwrite: bool
) -> Export:
    """The guarded `folder` in other formats. Its verdict holds, for its files are those that it was measured with."""
    if options != GuardOptions():
        raise InputError(
            f"{folder}: is guarded already; leave the guard's options out, or give the model it was made of"
        )
    manifest, guard, checkpoint = load_manifest(folder), Guard.load(folder / GUARD_FILE), Checkpoint.open(folder)
    for difference in differences(folder, manifest):
        raise InputError(f"{folder / difference}, so it is not what was measured; guard the original model again")
    plan = formats.plan(guard)
    assert plan
    with staging(target := _target(folder, output or f"{name}-onnx"), overwrite) as stage, threads_for(folder):
        copy_companions(folder, stage)
        if formats.has("safetensors"):
            with _writing(checkpoint, "copying (MB)") as advance:
                rewrite(checkpoint, family_of(checkpoint), Fold({}), stage, advance)
        for file in (GUARD_FILE, PICTURE, Path("report.json"), Path("report.html"), Path("README.md")):
            if (folder / file).is_file():
                (stage / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / file, stage / file)
        runtime = _graphs(folder, None, stage, plan, guard, formats)
        verdict = Verdict(manifest["verdict"], ("measured when it was guarded",), {})
        integrity = Integrity(len(checkpoint.tensors), 0, (), "hashes in the manifest", ())
        evidence = Evidence(integrity, None, verdict=verdict, runtime=runtime)
        if runtime and not runtime.passed:
            raise NotSafer(evidence)
        verified = manifest["verified"] and _vouched(runtime)
        extend_card(stage)
        extend_manifest(stage, manifest, verified, {"runtime": runtime and runtime.figures()})
    return Export(target, guard, evidence, verified)


def _pictures(folder: Path, figures: dict[str, Any]) -> dict[str, str]:
    """Draws what the card shows into `folder`: path -> caption."""
    behaviours = shown(figures)
    if not behaviours:
        return {}
    (folder / PICTURE).write_bytes(compliance_picture(behaviours, IMAGE_KINDS))
    return {PICTURE.as_posix(): "Harmful prompts complied with, by image kind, with Wilson 95 % intervals"}


def _command(source: Source, options: GuardOptions, as_adapter: bool = False) -> str:
    """What makes the same folder again: options that are not the default, files by their names alone."""
    given = {name: value for name, value in asdict(options).items() if value != getattr(GuardOptions(), name)}
    if "guard" in given and given["guard"] not in PRESETS:
        given["guard"] = GUARD_FILE.as_posix()
    model = f"{source.name}@{source.revision}" if source.revision else source.name
    words = [f"--{name.replace('_', '-')} {getattr(value, 'name', value)}" for name, value in given.items()]
    words += [f"--adapter {source.adapter['name']}"] if source.adapter else []
    words += ["--format lora"] if as_adapter else []
    words += ["--trust-remote-code"] if code_of(source.folder) else []
    return " ".join(["guardfold export --model", model, *words])


def _check_adapters(formats: Formats, options: GuardOptions, adapter: str | None, allow_partial: bool) -> None:
    if not formats.has("lora"):
        return
    if adapter:
        raise InputError("--format lora with --adapter: it would fit the merged model, which nobody has; leave one out")
    if options.guard in GATED and not allow_partial:
        raise InputError(
            f"--format lora: the preset {options.guard} has a gate, whose neurons no adapter holds; use --guard linear "
            "or projection, or --allow-partial to leave the gate out"
        )


@contextmanager
def _base(
    folder: Path, name: str, adapter: str | None, scratch: Path, family_file: Path | None
) -> Iterator[tuple[Source, Path]]:
    """(what is guarded, the folder of its weights): the model `name` in `folder`, or, with `adapter`, that model after
    merging, which lies in `scratch` until the block ends.
    """
    if adapter is None:
        yield Source(name, folder), folder
        return
    place, called = resolve(adapter)
    checkpoint = Checkpoint.open(folder)
    family = family_of(checkpoint, family_file)
    edits = merging(checkpoint, family, place)
    check_room(scratch, checkpoint.data_bytes)
    with TemporaryDirectory(prefix=".merged-", dir=scratch) as merged:
        with _writing(checkpoint, "merging (MB)") as advance:
            rewrite(checkpoint, family, edits, Path(merged), advance)
        copy_companions(folder, Path(merged))
        yield Source(name, folder, describe_adapter(called, place)), Path(merged)


def _write_adapters(
    stage: Path, checkpoint: Checkpoint, family: Family, guard: Guard, source: Source, allow_partial: bool
) -> tuple[Guard, Fold, AdapterNotes]:
    """(what adapters hold of `guard`, the same as a fold, what the card says), the adapters being written into `stage`.

    Raises InputError if they do not hold all of it, unless `allow_partial`, or nothing.
    """
    kept, lost = adaptable(guard)
    edits, made = Fold({}), list[Adapter]()
    if kept is not None:
        whole = fold(kept, family, checkpoint.shapes, checkpoint.read)
        made, left_out = adapters(checkpoint, family, whole)
        edits = without(whole, left_out)
        lost += edits.left_out
    if not made or kept is None:
        raise InputError(f"--format lora: no adapter holds any of this guard: {'; '.join(lost)}; use --guard linear")
    if lost and not allow_partial:
        raise InputError(f"--format lora: adapters do not hold {'; '.join(lost)}; leave it out with --allow-partial")
    for each, place in zip(made, (stage, stage / BIASED), strict=False):
        each.save(place, source.name, source.revision)
    return kept, edits, notes(stage, family.tied and family.embedding in edits.edits, lost)


@trusting_if_asked
def check_guarded(
    folder: Path,
    against: str,
    *,
    probes: Asked = None,
    qa: Path | None = None,
    judge: str | None = None,
    skip_behaviour: bool = False,
    family_file: Path | None = None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
) -> Evidence:
    """The evidence about the guarded `folder`, weights or adapters, measured afresh against the model that it was made
    from; with `adapter`, that is `against` after merging it.

    Raises InputError if either cannot be loaded or `folder` brings no guard file.
    """
    base, guard = resolve(against), Guard.load(folder / GUARD_FILE)
    rounding = written_rounding(folder)
    with _base(*base, adapter, folder.parent, family_file) as (_, origin), threads_for(origin):
        checkpoint = Checkpoint.open(origin)
        family = family_of(checkpoint, family_file)
        edits = fold(guard, family, checkpoint.shapes, checkpoint.read)
        folded: Checkpoint | Adapted
        if (folder / CONFIG_FILE).is_file():
            edits = without(edits, adapters(checkpoint, family, edits)[1])
            folded = Adapted(checkpoint, folder)
        else:
            folded = Checkpoint.open(folder)
        asked = None if skip_behaviour else load_probes(origin, probes, qa)
        decides = ModelJudge(judge) if judge else None
        return examine(checkpoint, folded, family, guard, edits, rounding, asked, decides)


@dataclass(frozen=True)
class Served:
    """What a served model does, what its baseline does where there is one, and the verdict that follows."""

    endpoint: Endpoint
    behaviour: Behaviour
    baseline: Behaviour | None
    verdict: Verdict | None

    def figures(self) -> dict[str, Any]:
        """Everything measured, as JSON; no answers."""
        return {
            "guardfold": __version__,
            "endpoint": self.endpoint.address,
            "model": self.endpoint.model,
            "ruling": self.verdict.ruling if self.verdict else NOT_MEASURED,
            "verdict": self.verdict.figures() if self.verdict else None,
            "served": self.behaviour.figures(),
            "original": self.baseline.figures() if self.baseline else None,
        }


def check_served(
    endpoint: Endpoint,
    *,
    baseline: Endpoint | None = None,
    folder: Path | None = None,
    probes: Asked = None,
    qa: Path | None = None,
    judge: str | None = None,
    report: Path | None = None,
) -> Served:
    """The behaviour of what an endpoint serves. The verdict is against `baseline`, else against what the report of the
    exported `folder` has of its original, else there is none.

    folder: also brings its own probes.  report: a JSON file to write the figures to.  Raises InputError if the server,
    the probes or the folder cannot be used.
    """
    if folder and not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if report and not report.parent.is_dir():
        raise InputError(f"{report.parent}: no such folder")
    asked = load_probes(folder, probes, qa)
    decides = ModelJudge(judge) if judge else PhraseJudge(asked.refusal)
    before = observe(baseline, asked, decides, "baseline") if baseline else None
    now = observe(endpoint, asked, decides, "served")
    if before is None and folder:
        before = recall(folder, asked, decides.name, now)
    served = Served(endpoint, now, before, judge_guard(before, now) if before else None)
    if report:
        report.write_text(json.dumps(served.figures(), indent=2) + "\n", encoding="utf-8")
    return served


@trusting_if_asked
def inspect_model(
    model: str, family_file: Path | None = None, *, trust_remote_code: bool = False
) -> tuple[Checkpoint, Family]:
    """The checkpoint and family of `model`, from its config and headers alone; of a model on the hub, nothing else is
    downloaded, and the checkpoint's data cannot be read. Raises InputError if unsupported.
    """
    with _headers_of(model) as folder:
        checkpoint = Checkpoint.open(folder)
        return checkpoint, family_of(checkpoint, family_file)


@contextmanager
def _headers_of(model: str) -> Iterator[Path]:
    found = located(model)
    if isinstance(found, Path):
        yield found
        return
    with TemporaryDirectory() as folder, bar() as progress:
        progress.add_task("headers", total=None)
        yield hollow_copy(*found, Path(folder))


@trusting_if_asked
def trace_family(model: str, *, trust_remote_code: bool = False) -> str:
    """A family file that says what writes to the residual stream of `model`, found by running its class, without its
    weights, on a text and a picture. Raises InputError if transformers cannot build or run it.
    """
    with _headers_of(model) as folder:
        built = hollow(meta_model(folder))
        with bar() as progress:
            progress.add_task("tracing", total=None)
            batches = comparison_batches(built, folder)
            if not batches:
                raise InputError(f"{model}: no prompt that its class runs; add the model's processor to the folder")
            rows = family_rows(built, batches)
    return f"# Traced from {model} on: {', '.join(batches)}.\n{as_toml(rows)}"


@contextmanager
def _writing(checkpoint: Checkpoint, what: str) -> Iterator[Any]:
    with bar() as progress:
        task = progress.add_task(what, total=checkpoint.data_bytes >> 20)
        written = 0

        def advance(count: int) -> None:
            nonlocal written
            written += count
            progress.update(task, completed=written >> 20)

        yield advance
