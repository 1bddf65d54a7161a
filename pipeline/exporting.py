"""guardfold export: extract -> choose -> fold -> check -> publish, or refuse."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from ..export.checkpoint.companions import copy_companions
from ..export.checkpoint.headers import Checkpoint
from ..export.checkpoint.rewrite import Writing, rewrite
from ..export.checkpoint.staging import check_room, staging
from ..export.families.table import family_of
from ..export.fold import Fold, fold
from ..export.formats.formats import Formats
from ..export.publish.card import GUARD_FILE, MANIFEST, extend_card, extend_manifest
from ..export.publish.hub import Target, push
from ..export.publish.verify import differences, load_manifest
from ..guard.base.errors import InputError, Refused
from ..guard.base.remote_code import trusting_if_asked
from ..guard.base.untrusted import check_name
from ..guard.guard import Guard
from ..guard.model.vlm import resolve, threads_for
from ..validators.behaviour.evaluation_prompts import Asked, load_probes
from ..validators.behaviour.judge import ModelJudge
from ..validators.behaviour.making import GuardOptions, guard_of
from ..validators.evidence.evidence import examine, examine_hooked, inherited, with_graphs
from ..validators.runtimes.adapted import Adapted
from .artefacts import check_adapters, graphs, vouched, weights_place, write_adapters
from .describing import describe, reports
from .results import Export, NotSafer, refuse_unsound
from .sources import based_on, written


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
    check_adapters(formats, options, adapter, allow_partial)
    called = resolve(adapter)[1] if adapter else name
    target = _target(folder, output or f"{called.rpartition('/')[2]}-guarded")
    with staging(target, overwrite) as stage:
        with based_on(folder, name, adapter, stage, options.family) as (source, base), threads_for(base):
            checkpoint = Checkpoint.open(base)
            family = family_of(checkpoint, options.family)
            asked = None if skip_behaviour else load_probes(base, probes, qa)
            decides = ModelJudge(judge) if judge else None
            if writing.link != "hard" and not formats.has("lora"):
                check_room(target.parent, checkpoint.data_bytes)
            guard = guard_of(base, source.title, options)
            plan, edits, said = formats.plan(guard), Fold({}), None
            if formats.has("lora"):
                guard, edits, said = write_adapters(stage, checkpoint, family, guard, source, allow_partial)
            else:
                copy_companions(base, stage)
            (stage / GUARD_FILE).parent.mkdir()
            guard.save(stage / GUARD_FILE)
            with weights_place(stage, formats) as place:
                if plan and plan.traced:
                    place = base
                    evidence = examine_hooked(checkpoint, guard, asked, decides)
                else:
                    edits = edits if said else fold(guard, family, checkpoint.shapes, checkpoint.read)
                    if strict and edits.approximate:
                        raise Refused(f"--strict: {family.model_type}: {edits.approximate}; use --scope sublayers")
                    if not said:
                        with written(checkpoint, "folding (MB)") as advance:
                            rewrite(checkpoint, family, edits, place, advance, writing)
                        copy_companions(base, place)
                    folded = Adapted(checkpoint, stage) if said else Checkpoint.open(place)
                    evidence = examine(checkpoint, folded, family, guard, edits, writing.rounding, asked, decides)
                    refuse_unsound(evidence, allow_weaker or skip_behaviour)
                if plan and (runtime := graphs(place, base, stage, plan, guard, formats)):
                    evidence = with_graphs(evidence, runtime, stage, formats.provider, asked, decides)
        refuse_unsound(evidence, allow_weaker or skip_behaviour)
        verified = evidence.ruling == "safer" and (plan is None or vouched(evidence.runtime))
        describe(
            stage,
            source,
            guard,
            evidence,
            verified,
            edits=edits.per_layer(family),
            options=options,
            rounding=writing.rounding,
            notes=said,
        )
    made = Export(target, guard, evidence, verified)
    return replace(made, url=push(target, push_to, allow_weaker=allow_weaker)) if push_to else made


def _target(folder: Path, output: Path | str) -> Path:
    """`output`. InputError if writing it would replace the model in `folder`."""
    if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(output)):
        raise InputError(f"{output}: holds the model itself; choose another --output")
    return Path(output)


def _add_graphs(
    folder: Path, name: str, output: Path | str | None, options: GuardOptions, formats: Formats, overwrite: bool
) -> Export:
    """The guarded `folder` in other formats. Its verdict holds, for its files are those that it was measured with."""
    if options != GuardOptions():
        raise InputError(
            f"{folder}: is guarded already; leave the guard's options out, or give the model it was made of"
        )
    check_name(name)
    manifest = load_manifest(folder, "figures")
    guard, checkpoint = Guard.load(folder / GUARD_FILE, folder), Checkpoint.open(folder)
    for difference in differences(folder, manifest):
        raise InputError(f"{folder / difference}, so it is not what was measured; guard the original model again")
    plan = formats.plan(guard)
    assert plan
    with staging(target := _target(folder, output or f"{name}-onnx"), overwrite) as stage, threads_for(folder):
        copy_companions(folder, stage)
        if formats.has("safetensors"):
            with written(checkpoint, "copying (MB)") as advance:
                rewrite(checkpoint, family_of(checkpoint), Fold({}), stage, advance)
        for file in (GUARD_FILE, *reports()):
            if (folder / file).is_file():
                (stage / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / file, stage / file)
        runtime = graphs(folder, None, stage, plan, guard, formats)
        evidence = inherited(checkpoint, guard, manifest["verdict"], runtime)
        if runtime and not runtime.passed:
            raise NotSafer(evidence)
        verified = manifest["verified"] and vouched(runtime)
        extend_card(stage)
        extend_manifest(stage, manifest, verified, {"runtime": runtime and runtime.figures()})
    return Export(target, guard, evidence, verified)
