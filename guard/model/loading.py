"""What in a folder changes what `from_pretrained` loads from it, and what is done about each: there is one reader.

transformers takes a folder apart by itself. What it does not load is not guarded, so whatever here would make it load
something else than the tensors of `model.safetensors` (or of the files that its index lists) is refused by name, or is
read as transformers reads it. Names are those of transformers 5.23: `modeling_utils`, `configuration_utils`,
`core_model_loading`, `integrations/peft`, `distributed/checkpoint`, `fusion_mapping`, `quantizers/auto`.

| in the folder | transformers | here |
|---|---|---|
| adapter_config.json | puts that adapter on the model, PEFT being installed | refused |
| adapter_model.safetensors alone | passes it by | passed by, not copied |
| model.safetensors beside an index and its files | takes model.safetensors | the same; the others are not copied |
| an index alone | takes every tensor of every file it lists, listed or not | refused where the two differ |
| an index without metadata | fails | refused |
| an index whose metadata name a dtype | loads in that where config.json names none | refused unless floating |
| shard-00001-model-00001-of-00001.safetensors | takes such files instead of all others | refused |
| variants (model.fp16.safetensors), other indices | passes them by unless asked for | passed by, not copied |
| consolidated.safetensors, other safetensors | passes them by | passed by, not copied |
| pytorch_model.bin and its index, other pickles | passes them by beside safetensors | passed by, not copied |
| subfolders (original/, checkpoint-500/, .cache/) | passes them by | passed by, not copied |
| additional_chat_templates/, qformer_tokenizer/ | reads it with the processor | copied |
| custom_generate/ | runs it if code is trusted | refused then (remote_code.py) |
| generation_config.json | reads it; it changes what is generated, no weights | copied; both models have it |

| in config.json | transformers | here |
|---|---|---|
| transformers_weights | loads the file that it names | refused |
| configuration_files | reads the config that it names instead | refused |
| fusion_config | puts other modules in, and turns their weights | refused |
| quantization_config, at any depth | puts other modules in | refused (headers.py) |
| auto_map | runs code of the folder | refused unless trusted (remote_code.py) |
| dtype, torch_dtype | casts what it loads | compared after the same cast; refused unless floating |
| return_dict: false | returns tuples, of which nobody here knows the parts | refused |
| is_encoder_decoder: true | generates as from an encoder and a decoder, which these models have not | refused |
| tie_word_embeddings | ties a head that has no tensor | the same; a head without either is missing |
| text_config left out (Qwen2-VL as published) | reads it off the top | written as it was read (rewrite.py) |
| key_mapping, _checkpoint_conversion_mapping | passes them by: an argument, and once a class's | passed by |

| among the tensors | transformers | here |
|---|---|---|
| one parameter under two names | takes the name that sorts first | refused (layout.py) |
| a parameter without a tensor | fills it with random numbers | refused |
| a tensor of another shape | fails | refused |
| NaN, Inf, or what is one in the dtype of the config | loads it | refused when its values are read (loaded.py) |
| a tensor that is no parameter's | passes it by | refused, unless the class says that it may be there |

What is passed by is passed by in the belief that transformers does; `validators/evidence/loaded.py` holds it to that:
it compares every value that `from_pretrained` loads with what was read here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.errors import InputError

ADAPTER = "adapter_config.json"

DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Files of a model that was saved from several processes."""

DTYPES = ("float32", "float16", "bfloat16", "float64")
"""What a model can be loaded in."""

REDIRECTING = {
    "transformers_weights": "transformers loads its weights from there; give that file the name model.safetensors",
    "configuration_files": "transformers reads another config; make that one config.json",
    "fusion_config": "transformers puts other modules in place of the model's",
}
"""Entry of config.json -> why it is not taken."""


def check_loading(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises InputError naming the file or the entry of `config`, config.json of `folder`, that would make transformers
    load another model than the one whose tensors lie there.
    """
    if os.path.lexists(folder / ADAPTER):
        raise InputError(
            f"{folder / ADAPTER}: transformers would put this adapter on the model, whose weights here are without it; "
            "remove the file if it was merged, or move it to a folder of its own and pass that as --adapter"
        )
    for name in sorted(path.name for path in folder.iterdir()):
        if DISTRIBUTED.fullmatch(name):
            raise InputError(
                f"{folder / name}: transformers would load such files instead of model.safetensors; move them away"
            )
    for entry, reason in REDIRECTING.items():
        if config.get(entry) is not None:
            raise InputError(f"{folder / 'config.json'}: {entry} is set: {reason}; remove the entry")
    for entry in ("dtype", "torch_dtype"):
        if config.get(entry) not in (None, *DTYPES):
            raise InputError(
                f"{folder / 'config.json'}: {entry} is {config[entry]!r}, in which no model is loaded; use one of "
                f"{', '.join(DTYPES)}"
            )
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get("is_encoder_decoder"):
            raise InputError(
                f"{folder / 'config.json'}: is_encoder_decoder is {part['is_encoder_decoder']!r}, and no model whose "
                "text has an encoder is guarded; remove the entry if this one has none"
            )
    if config.get("return_dict") is False:
        raise InputError(
            f"{folder / 'config.json'}: return_dict is false, so the model returns tuples; remove the entry"
        )
