"""guardfold export: extract -> choose -> write -> examine -> publish, or refuse."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ..export.checkpoint.rewrite import Writing
from ..export.checkpoint.staging import MANIFEST, check_room, staging
from ..export.formats import Formats
from ..export.formats.base import Format, FormatRequest, Held
from ..export.formats.safetensors import Safetensors
from ..export.model import OpenModel
from ..export.publish.hub import Target, push
from ..export.publish.manifest import GUARD_FILE
from ..guard.base.errors import InputError, Refused
from ..guard.base.remote_code import trusting_if_asked
from ..guard.guard import Guard
from ..guard.model.vlm import resolve, threads_for
from ..validators.behaviour.evaluation_prompts import Asked, load_evaluation_prompts
from ..validators.behaviour.judge import judge_for
from ..validators.behaviour.making import GuardOptions, given_guard, guard_of, kinds_of
from ..validators.behaviour.verdict import LIMITS, Limits
from ..validators.evidence.evidence import Evidence
from .converting import convert
from .describing import describe
from .examining import Examiner, vouched
from .results import Export, refuse_unsound
from .sources import based_on, open_source, output_for
from .writing import write_all


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
    refusals: Path | None = None,
    limits: Limits = LIMITS,
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

    allow_partial: write a format even if it does not hold all of the guard.  adapter: folder or hub id of a PEFT LoRA
    adapter that is merged into the model first; what is guarded, and measured against, is then the merged model.

    probes, qa: files that replace the model's own or the built-in ones. judge: a classifier that rules on answers,
    in choosing the guard as well. refusals: a file of phrases of refusal, beside those built in. limits: what the
    guard must do and may cost to be called safer. skip_behaviour:
    measure nothing but soundness and equality; the manifest says NOT VERIFIED. allow_weaker: publish whatever the
    verdict; the manifest and the card say NOT VERIFIED. strict: refuse a fold that is approximate by nature (under
    post-norms). overwrite: replace `output`, if guardfold wrote it. writing: threads, rounding, links. push_to:
    where on the hub the finished folder goes as well. trust_remote_code: run the code that comes with the model,
    and copy it. Raises InputError for what cannot be used, and NotSafer, leaving nothing behind, if the result is
    not safer or not equal to its hooks (the latter is never published).
    """
    options, formats = options or GuardOptions(), formats or Formats()
    formats = replace(formats, writing=writing or formats.writing)
    if push_to:
        push_to.check()
        if skip_behaviour and not allow_weaker:
            raise InputError("--skip-behaviour: what was not measured is not pushed (--allow-weaker overrides)")
    source = open_source(model, options.family)
    if (source.folder / MANIFEST).is_file() and any(form.derived for form in formats.chosen):
        made = convert(source, formats.chosen, output, options, overwrite)
    else:
        terms = _Terms(probes, qa, judge, refusals, limits, skip_behaviour, allow_weaker, strict, allow_partial)
        made = _guard(source, output, options, formats, adapter, terms, overwrite)
    return replace(made, url=push(made.folder, push_to, allow_weaker=allow_weaker)) if push_to else made


@dataclass(frozen=True)
class _Terms:
    """How a guarded model is judged, and what it must be to be published (see export_guarded)."""

    probes: Asked
    qa: Path | None
    judge: str | None
    refusals: Path | None
    limits: Limits
    skip_behaviour: bool
    allow_weaker: bool
    strict: bool
    allow_partial: bool

    def hold(self, form: Format, model: OpenModel, guard: Guard) -> Held:
        """Returns what `form` holds of `guard`. InputError, or Refused, if that is not as much or as exact as it must
        be.
        """
        held = form.hold(model, guard)
        if held.left_out and not self.allow_partial:
            left_out = "; ".join(held.left_out)
            raise InputError(
                f"--format {form.name}: {form.parts} do not hold {left_out}; leave it out with --allow-partial"
            )
        if self.strict and held.fold.approximate:
            raise Refused(f"--strict: {model.family.model_type}: {held.fold.approximate}; use --scope sublayers")
        return held

    def refuse(self, evidence: Evidence) -> None:
        """Raises NotSafer for what is not equal to its hooks, or not safer where it must be."""
        refuse_unsound(evidence, self.allow_weaker or self.skip_behaviour)


def _guard(
    source: OpenModel,
    output: Path | str | None,
    options: GuardOptions,
    formats: Formats,
    adapter: str | None,
    terms: _Terms,
    overwrite: bool,
) -> Export:
    """Guards `source`, or it after merging `adapter`, and writes it into `output`. What a format cannot hold is refused
    before any model is run.
    """
    given = given_guard(options)
    kinds = tuple(map(type, given.interventions)) if given else kinds_of(options)
    ask = FormatRequest(source, kinds, None if given else options.guard, adapter, terms.allow_partial)
    order = _in_order(formats, ask.in_weights and (given is None or source.holds(given)))
    for form in order:
        form.check(ask)
    if given:
        terms.hold(order[0], source, given)
    called = resolve(adapter)[1] if adapter else source.source.name
    target = output_for(source, output or f"{called.rpartition('/')[2]}-guarded")
    rounding = formats.writing.rounding
    with staging(target, overwrite) as stage:
        with (
            based_on(source, adapter, stage) as base,
            threads_for(base.folder),
            TemporaryDirectory(dir=stage, prefix=".aside-") as aside,
        ):
            asked = terms.probes, terms.qa, terms.refusals
            probes = None if terms.skip_behaviour else load_evaluation_prompts(base.folder, *asked)
            judge = judge_for(probes.refusal, probes.phrases, terms.judge) if probes else None
            if room := max(form.room(base.checkpoint) for form in order):
                check_room(target.parent, room)
            guard = given or guard_of(base, options, judge)
            order = _in_order(formats, base.holds(guard))
            held = terms.hold(order[0], base, guard)
            (stage / GUARD_FILE).parent.mkdir()
            held.guard.save(stage / GUARD_FILE)
            examiner = Examiner(base, held, rounding, probes, judge, terms.limits, base.folder)
            evidence = examiner.of_hooks() if held.traced else None
            places = [(form, stage if form in formats.chosen else Path(aside, form.name)) for form in order]
            artefacts = []
            for artefact in write_all(places, base, held, Path(aside)):
                artefacts.append(artefact)
                if artefact.opened is not None:
                    evidence = examiner.of(artefact.opened, evidence)
                    terms.refuse(evidence)
        assert evidence, "what holds a guard can be opened"
        verified = evidence.ruling == "safer" and vouched(artefacts, evidence)
        edits, notes = held.fold.per_layer(base.family), order[0].notes(artefacts[0].job)
        describe(stage, base.source, held.guard, evidence, verified, edits, options, rounding, notes)
    return Export(target, held.guard, evidence, verified)


def _in_order(formats: Formats, in_weights: bool) -> list[Format]:
    """Returns the formats in the order in which they are written: before those that are made of weights, weights, which
    lie aside if nobody asked for them; none where weights cannot hold the guard.
    """
    lacking = in_weights and all(form.derived for form in formats.chosen)
    return [*([Safetensors(formats.writing)] if lacking else []), *formats.chosen]
