"""Residual writers: which tensors of a checkpoint write to the residual stream, read from families/*.toml.

Rows for the layers are keyed by the text model's type, rows for the vision path by the outer model's type, so that a
LLaVA around any known decoder resolves, and one around an unknown decoder is refused by name.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ...guard.base.errors import InputError
from ...guard.base.untrusted import read_given
from ...guard.model.roles import decoder, decoder_layers
from ..checkpoint.headers import EDITABLE, QUANTISED, Checkpoint
from ..checkpoint.layout import Layout

WriterRole = Literal["embedding", "vision", "audio", "attention", "mlp"]
MAX_FAMILY_BYTES = 2**20


@dataclass(frozen=True)
class PostNorm:
    """The norm between a writer and the residual stream: y = gain x / rms(x), gain = `tensor` + `offset`, or 1."""

    tensor: str | None
    offset: float


@dataclass(frozen=True)
class Writer:
    """One tensor that writes to the residual stream: its names, and the axis that is the residual stream's (size d)."""

    role: WriterRole
    layer: int | None
    memory: str
    disk: str
    axis: int
    post_norm: PostNorm | None = None


@dataclass(frozen=True)
class MLP:
    """The weights of one layer's dense MLP on disk: down(act(gate x) * up x), or down(act(gate x)) where up is None."""

    gate: str
    up: str | None
    down: str

    @property
    def reading(self) -> tuple[str, ...]:
        """The weights that read the MLP's input, one row a neuron."""
        return (self.gate,) if self.up is None else (self.gate, self.up)

    @staticmethod
    def bias_of(weight: str) -> str:
        """Returns what the bias that belongs to `weight` is called, whether the checkpoint has it or not."""
        return weight.removesuffix(".weight") + ".bias"


@dataclass(frozen=True)
class Family:
    """What is known of a model before any weight is read: its writers on disk, its head, and what cannot be folded."""

    model_type: str
    text_model_type: str
    layers: int
    width: int
    writers: tuple[Writer, ...]
    mlps: Mapping[int, MLP]
    """Layer -> its dense MLP or shared expert, for the layers that have one."""
    bias_flag: str | None
    """The text config's entry that gives every MLP biases, where the family has one."""
    text_config_key: str | None
    """The entry of config.json that holds the text model's settings; None where they stand at its top."""
    neurons_key: str
    """The text config's entry that counts an MLP's neurons."""
    embedding: str
    head: str | None
    """The head's tensor on disk; None where the checkpoint has none and the embedding serves as head (tied)."""
    untied_head: str
    """What the head's tensor is called on disk once it has one of its own."""
    obstacles: tuple[str, ...]
    """Why the residual stream as a whole cannot be projected in weights; empty where it can."""

    @property
    def tied(self) -> bool:
        return self.head is None

    @property
    def pre_norm(self) -> bool:
        """Whether nothing stands between its writers and the residual stream, so that a shared fold is exact."""
        return all(writer.post_norm is None for writer in self.writers)

    @property
    def verdict(self) -> str:
        """What a projection of the whole residual stream is in its weights: exact, approximate or refused."""
        if self.obstacles:
            return f"refused: {'; '.join(self.obstacles)}"
        if not self.pre_norm:
            return "approximate: leak-free, but norms after the sublayers rescale what is left (oblique fold)"
        return "exact after untying" if self.tied else "exact"


Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of families: by text model type, what the layers write; by model type, what everything else writes."""

    text: Mapping[str, Row]
    vision: Mapping[str, Row]

    @classmethod
    @cache
    def built_in(cls) -> Table:
        table = cls({}, {})
        rows = (path for path in files("guardfold.export.families").iterdir() if path.name.endswith(".toml"))
        for path in sorted(rows, key=lambda path: path.name):
            table = table.with_rows(tomllib.loads(path.read_text(encoding="utf-8")))
        return table

    def with_rows(self, rows: Row) -> Table:
        """This table and the rows of one family file, which go first."""
        found: dict[str, dict[str, Row]] = {
            part: {str(name): rows[part] for name in rows[part]["model_types"]}
            for part in ("text", "vision")
            if part in rows
        }
        return Table({**self.text, **found.get("text", {})}, {**self.vision, **found.get("vision", {})})

    def with_file(self, path: Path) -> Table:
        """This table and the rows of the user's file `path`. InputError if it is not a family file."""
        text = read_given(path, MAX_FAMILY_BYTES)
        try:
            rows = tomllib.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not a family file ({error})") from error
        _check_rows(path, rows)
        return self.with_rows(rows)


def _check_rows(path: Path, rows: Row) -> None:
    if not rows or not set(rows) <= {"text", "vision"}:
        raise InputError(f"{path}: needs [text] or [vision], and nothing else")
    for part, row in rows.items():
        types = row.get("model_types") if isinstance(row, dict) else None
        if not isinstance(types, list) or not types or not all(isinstance(type_, str) for type_ in types):
            raise InputError(f"{path}: [{part}] needs model_types, a list of names")
        for writer in _tables(path, part, row, "writer"):
            _check_writer(f"{path}: a writer of [{part}]", writer)
        for mlp in _tables(path, part, row, "mlp"):
            named = all(isinstance(name, str) for name in mlp.values())
            if not named or not {"gate", "down"} <= set(mlp) <= set(_PARTS):
                raise InputError(f"{path}: an mlp of [{part}] needs the names of gate and down, and up if it is gated")
        if not isinstance(row.get("refused", ""), str):
            raise InputError(f"{path}: refused of [{part}] is not a reason in words")


def _check_writer(where: str, writer: Row) -> None:
    names = [writer[key] for key in ("module", "parameter") if key in writer]
    if writer.get("role") not in get_args(WriterRole) or len(names) != 1 or not isinstance(names[0], str):
        raise InputError(f"{where} needs a role ({', '.join(get_args(WriterRole))}) and a module or a parameter")
    axis = writer.get("axis", 0)
    if not isinstance(axis, int) or axis not in (0, 1, 2):
        raise InputError(f"{where}, {names[0]}: axis {axis!r} is not 0, 1 or 2")
    if not isinstance(writer.get("post_norm", ""), str):
        raise InputError(f"{where}, {names[0]}: post_norm is not a name")


def _tables(path: Path, part: str, row: Row, key: str) -> list[Row]:
    found = row.get(key, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise InputError(f"{path}: [{part}]: {key} is not a list of tables")
    return found


def family_of(checkpoint: Checkpoint, family_file: Path | None = None) -> Family:
    """Returns the family of `checkpoint` with every writer found on disk. No weights are read.

    family_file: rows that go before the built-in ones.  Raises InputError naming the model type if it has no row, or
    the tensor if transformers would load it otherwise, a row matches none, or it does not fit.
    """
    table = Table.built_in().with_file(family_file) if family_file else Table.built_in()
    model = checkpoint.model
    text_config = model.config.get_text_config()
    outer_type, text_type = model.config.model_type, text_config.model_type
    for kind, model_type, known in (("family", outer_type, table.vision), ("text model", text_type, table.text)):
        if model_type not in known:
            raise InputError(f"{checkpoint.folder}: {kind} {model_type!r} has no row; make one with inspect --trace")
    vision, text = table.vision[outer_type], table.text[text_type]
    layout = Layout(model, checkpoint.shapes)
    layout.check(checkpoint)
    prefix = module_name(model, decoder(model))
    layers = len(decoder_layers(model))
    search = _Search(checkpoint, layout, model.state_dict(keep_vars=True), text_config.hidden_size)
    found = (*search.rows(vision.get("writer", []), ""), *search.rows(text.get("writer", []), prefix))
    writers = tuple({writer.disk: writer for writer in reversed(found)}.values())[::-1]
    bare = set(range(layers)) - {writer.layer for writer in writers}
    if bare:
        raise InputError(f"{checkpoint.folder}: no row of {text_type!r} says what layer {min(bare)} writes")
    tables = [writer.disk for writer in writers if writer.role == "embedding"]
    if not tables:
        raise InputError(f"{checkpoint.folder}: no row of {text_type!r} says that the embedding table writes")
    head = module_name(model, head_of(model)) + "weight"
    ties = layout.tied
    embedding = layout.plain(ties[head]) if head in ties else None
    untied = _untied_name(model, layout, embedding or tables[0], head)
    more = ["more than the head is tied to what embeds"] if set(ties) - {head} else []
    more += ["transformers would load no head of its own"] if ties and untied is None else []
    return Family(
        model_type=outer_type,
        text_model_type=text_type,
        layers=layers,
        width=text_config.hidden_size,
        writers=writers,
        mlps=_mlps(text.get("mlp", []), prefix, layers, layout),
        bias_flag=text.get("bias_flag", {}).get(text_type),
        text_config_key=next(
            (
                key
                for key in model.config.sub_configs
                if getattr(model.config, key) is text_config and isinstance(checkpoint.config.get(key), dict)
            ),
            None,
        ),
        neurons_key=text.get("neurons", "intermediate_size"),
        embedding=embedding or tables[0],
        head=None if head not in layout.stored else layout.stored[head].disk[0],
        untied_head=untied or head,
        obstacles=(*_obstacles(vision, model.config), *_obstacles(text, text_config), *more),
    )


def module_name(model: PreTrainedModel, module: nn.Module) -> str:
    """Returns what the names of `module`'s parameters begin with in `model`, dot included. InputError if it is not in
    it.
    """
    for name, child in model.named_modules():
        if child is module:
            return f"{name}." if name else ""
    raise InputError(f"{type(model).__name__}: has no {type(module).__name__} of its own")


def head_of(model: PreTrainedModel) -> nn.Module:
    """Returns the language model's head. InputError where there is none."""
    found = model.get_output_embeddings()
    called = (module for name, module in model.named_modules() if name.rpartition(".")[2] == "lm_head")
    head = found if found is not None else next(called, None)
    if head is None:
        raise InputError(f"{type(model).__name__}: no head found in it")
    return head


def _obstacles(row: Row, config: PretrainedConfig) -> Iterator[str]:
    """Returns what `row` says against projecting the residual stream in weights, for this config."""
    if "refused" in row:
        yield row["refused"]
    for case in row.get("refused_if", []):
        if getattr(config, case["key"], None) == case["value"]:
            yield case["reason"]


@dataclass(frozen=True)
class _Search:
    """Looks rows up among the parameters of a model and the tensors on disk."""

    checkpoint: Checkpoint
    layout: Layout
    state: Mapping[str, Any]
    width: int

    def rows(self, rows: list[Row], prefix: str) -> Iterator[Writer]:
        """Returns the writers that `rows` describe. A row of the layers may match in some layers only, or in none."""
        for row in rows:
            targets = (
                [f"{row['module']}.{kind}" for kind in ("weight", "bias")] if "module" in row else [row["parameter"]]
            )
            found = [match for target in targets for match in matching(prefix + target, self.state)]
            if not found and "{layer}" not in _target(row) and not row.get("optional", False):
                name = prefix + _target(row)
                raise InputError(f"{self.checkpoint.folder}: no tensor for {name}, which writes to the residual stream")
            for match in found:
                rival = f"{prefix}{row.get('unless', '')}.weight".replace(
                    "{layer}", match.groupdict().get("layer") or ""
                )
                if "unless" not in row or rival not in self.state:
                    yield from self._writers(row, prefix, match)

    def _writers(self, row: Row, prefix: str, match: re.Match[str]) -> Iterator[Writer]:
        memory, layer = match.string, match.groupdict().get("layer")
        shape = tuple(self.state[memory].shape)
        stored = self.layout.stored.get(memory)
        if stored is None:
            raise InputError(f"{self.checkpoint.folder}: no tensor for {memory}, which writes to the residual stream")
        whole = row.get("axis", 0) if len(shape) > 1 else 0
        if self.layout.shapes[memory] != shape:
            had = list(self.checkpoint.shapes[stored.disk[0]])
            raise InputError(
                f"{self.checkpoint.folder}: tensor {stored.disk[0]!r} has shape {had}, config.json says {list(shape)}"
            )
        axis = stored.axis(whole, shape, self.checkpoint.shapes)
        if axis is None:
            raise InputError(
                f"{self.checkpoint.folder}: tensor {stored.disk[0]!r}: {memory} is kept in a form that cannot be folded"
            )
        for disk in stored.disk:
            self._check(disk, axis)
            norm = self._post_norm(row, prefix, layer)
            yield Writer(row["role"], None if layer is None else int(layer), memory, disk, axis, norm)

    def _post_norm(self, row: Row, prefix: str, layer: str | None) -> PostNorm | None:
        """Returns the norm that `row` names, unless this model has none there (some configs switch it off)."""
        memory = f"{prefix}{row.get('post_norm', '')}.weight".replace("{layer}", layer or "")
        if row.get("post_norm") == "":
            return PostNorm(None, 0)
        if "post_norm" not in row or memory not in self.state:
            return None
        disk = self.layout.plain(memory)
        if disk is None:
            raise InputError(f"{self.checkpoint.folder}: no tensor for {memory}, the gain of a post-norm")
        return PostNorm(disk, float(row.get("gain_offset", 0)))

    def _check(self, disk: str, axis: int) -> None:
        info = self.checkpoint.info(disk)
        where = f"{self.checkpoint.folder}: tensor {disk!r}"
        if info.dtype not in EDITABLE:
            raise InputError(f"{where} is {info.dtype}; {QUANTISED}")
        if info.shape[axis] != self.width:
            raise InputError(f"{where}: axis {axis} of {list(info.shape)} is not the hidden size, {self.width}")


def _target(row: Row) -> str:
    return row["module"] if "module" in row else row["parameter"]


def matching(target: str, names: Iterable[str]) -> list[re.Match[str]]:
    """Returns those of `names` that `target` means: {layer} (a group of the match) and {n} stand for any number, {last}
    for the highest that there is.
    """
    text = re.escape(target).replace(r"\{n\}", r"\d+")
    pattern = re.compile(re.sub(r"\\{(layer|last)\\}", lambda found: rf"(?P<{found[1]}>\d+)", text))
    found = [match for name in names if (match := pattern.fullmatch(name))]
    if "{last}" not in target:
        return found
    last = max((int(match["last"]) for match in found), default=0)
    return [match for match in found if int(match["last"]) == last]


def _mlps(rows: list[Row], prefix: str, layers: int, layout: Layout) -> dict[int, MLP]:
    """Returns the first of `rows` whose weights a layer has, for each layer that has any."""
    mlps: dict[int, MLP] = {}
    for layer in range(layers):
        for row in rows:
            names = {
                part: f"{prefix}{row[part]}.weight".replace("{layer}", str(layer)) for part in _PARTS if part in row
            }
            found = {part: layout.plain(name) for part, name in names.items()}
            if layer not in mlps and all(found.values()):
                mlps[layer] = MLP(**{"up": None, **found})  # type: ignore[arg-type]
    return mlps


_PARTS = ("gate", "up", "down")


def _untied_name(model: PreTrainedModel, layout: Layout, embedding: str, head: str) -> str | None:
    """Returns what a head is called in this checkpoint's own style: beside its embedding's prefix, whichever
    one loads.
    """
    prefix = embedding.partition(".")[0]
    return layout.disk_name(head, (head,) if prefix == model.base_model_prefix else (f"{prefix}.{head}", head))
