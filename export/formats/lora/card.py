"""What the card of a guard's adapters says: how they are loaded, and what merging them does."""

from .adapters import BIASED

HELD = "as a LoRA adapter of just the rank of what it changes"

LOAD_ADAPTER = """\
`PATH` is this folder or its hub id. The base's own weights stay as they are.

```python
from peft import PeftModel
from transformers import {auto}, AutoProcessor

model = PeftModel.from_pretrained({auto}.from_pretrained("{source}"{trust}), "PATH")
processor = AutoProcessor.from_pretrained("{source}"{trust})
```"""

BOTH = f"""\
Layers whose biases change as well are in a second adapter (`lora_bias`, which vLLM does not load); both are needed:

```python
model.load_adapter("PATH/{BIASED}", "{BIASED}")
model.base_model.set_adapter(["default", "{BIASED}"])
```"""

MERGE_ADAPTER = """\
`with model.disable_adapter():` gives the original back; `model.merge_and_unload()` gives the folded weights."""

TIED = """\
The embedding is adapted and the head, which is tied to it, is not, so untie them before merging:

```python
model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
```"""
