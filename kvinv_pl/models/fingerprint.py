"""Models that are changed in memory after they were loaded, as by a LoRA that is put into them."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvinv_pl.models.checkpoints.in_memory import Pipeline
from kvinv_pl.models.checkpoints.loading import combined
from kvinv_pl.models.stable_diffusion import Backbone

PARTS = ("unet", "vae", "text_encoder")
SAMPLE = 32
"""Values of each weight that are compared, evenly spaced: an adapter or another training changes them all."""


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """A digest of names, shapes, adapters and a sample of every weight; on every device the same."""
    network: Any = getattr(model, "_orig_mod", model)  # of a compiled one
    if not isinstance(network, nn.Module):
        return ""
    lines, samples = list[str](), list[Tensor]()
    for name, value in network.state_dict(keep_vars=True).items():
        lines.append(f"{name} {value.dtype} {tuple(value.shape)}")
        if value.numel() and not value.is_meta:
            apart = max(1, value.numel() // SAMPLE)
            samples.append(value.reshape(-1)[: apart * SAMPLE : apart].float())
    for path, layer in network.named_modules():
        if "base_layer" in layer._modules:  # of peft
            state = ("merged", "disable_adapters", "active_adapters", "scaling")
            lines.append(f"{path} {[getattr(layer, name, None) for name in state]}")
    content = hashlib.sha256("\n".join(lines).encode())
    if samples:  # copied to the host at once
        content.update(torch.cat([sample.to(samples[0].device) for sample in samples]).cpu().numpy().data)
    return content.hexdigest()


def pipeline_fingerprints(pipeline: Pipeline) -> list[str]:
    """Fingerprints of what is copied of a pipeline; others, once it is to be copied anew."""
    parts = pipeline.components
    scheduler, tokenizer = parts.get("scheduler"), parts.get("tokenizer")
    found = [fingerprint(parts.get(part)) for part in PARTS]
    return [*found, f"{type(scheduler)} {getattr(scheduler, 'config', None)}", str(len(tokenizer or ()))]


class ChangeTracker:
    """What was changed of a backbone since it was loaded."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone, self._notes = backbone, list(backbone.notes)
        self._identity = dict(backbone.identity)
        self._loaded = self._seen = self._fingerprints()

    def update_identity(self) -> bool:
        """Put into the identity what is not as it was loaded; whether any part changed since the last call.

        What was made with another state is then refused, and what is made now belongs to this one.
        """
        before, self._seen = self._seen, self._fingerprints()
        if self._seen == before:
            return False
        changed = {part: now for part, now in self._seen.items() if now != self._loaded[part]}
        backbone = self._backbone
        backbone.identity, backbone.notes = dict(self._identity), list(self._notes)
        if changed:
            sha256 = combined(
                self._identity["sha256"], {f"{part} in memory": changed[part] for part in changed}
            )
            backbone.identity |= {"changed_in_memory": [*changed], "sha256": sha256}
            backbone.notes.append(
                f"changed in memory since loading: {', '.join(changed)}; runs are of the model as it is now"
            )
        backbone.requires_grad_(False).train(False)
        return True

    def _fingerprints(self) -> Mapping[str, str]:
        return {part: fingerprint(getattr(self._backbone, part)) for part in PARTS}
