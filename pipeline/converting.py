"""A folder that is guarded already, in other formats."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from ..export.checkpoint.staging import staging
from ..export.fold import Fold
from ..export.formats.base import Format, FormatRequest, Held
from ..export.model import OpenModel
from ..export.publish.card import extend_card
from ..export.publish.manifest import GUARD_FILE, extend_manifest, load_manifest
from ..export.publish.verify import differences
from ..guard.base.errors import InputError
from ..guard.base.untrusted import check_name
from ..guard.guard import Guard
from ..guard.model.vlm import threads_for
from ..validators.behaviour.making import GuardOptions
from ..validators.evidence.evidence import inherited
from .describing import reports
from .examining import Examiner, vouched
from .results import Export, NotSafer
from .sources import output_for
from .writing import write_all


def convert(
    model: OpenModel, chosen: Sequence[Format], output: Path | str | None, options: GuardOptions, overwrite: bool
) -> Export:
    """Writes the guarded folder that `model` is in the formats `chosen` (default: ./<name>-<format>). Its verdict
    holds, for its files are those that it was measured with.

    Raises InputError for options that would guard it again, and for files that are not as its manifest says; NotSafer
    if what was written is not equal to it.
    """
    folder, name = model.folder, model.source.name
    if options != GuardOptions():
        raise InputError(
            f"{folder}: is guarded already; leave the guard's options out, or give the model it was made of"
        )
    check_name(name)
    manifest = load_manifest(folder, "figures")
    guard = Guard.load(folder / GUARD_FILE, folder)
    evidence = inherited(model.checkpoint, guard, manifest["verdict"], None)
    for difference in differences(folder, manifest):
        raise InputError(f"{folder / difference}, so it is not what was measured; guard the original model again")
    for form in chosen:
        form.check(FormatRequest(model, tuple(map(type, guard.interventions))))
    target, held = output_for(model, output or f"{name}-{chosen[-1].name}"), Held(guard, Fold({}))
    with staging(target, overwrite) as stage, threads_for(folder):
        for file in (GUARD_FILE, *reports()):
            if (folder / file).is_file():
                (stage / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / file, stage / file)
        examiner, artefacts = Examiner(model, held, "nearest"), []
        with TemporaryDirectory(dir=stage, prefix=".aside-") as aside:
            for artefact in write_all([(form, stage) for form in chosen], model, held, Path(aside)):
                artefacts.append(artefact)
                if artefact.form.derived and artefact.opened is not None:
                    evidence = examiner.of(artefact.opened, evidence)
                    if evidence.failures:
                        raise NotSafer(evidence)
        verified = manifest["verified"] and vouched(artefacts, evidence)
        extend_card(stage)
        extend_manifest(stage, manifest, verified, {"runtime": evidence.runtime and evidence.runtime.figures()})
    return Export(target, guard, evidence, verified)
