"""The facts of LTX-2.3 that both halves share: component classes, official names, and numbers that no config states.

Data only. Published file names and hashes are in releases.py, config fields in config_tables.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ComponentClass:
    """The class of one component folder.

    ``index_library`` is the library's name in ``model_index.json``; None for a component outside that pipeline.
    ``loaded`` is False for a component that the runtime never builds by its class.
    """

    library: str
    name: str
    index_library: str | None
    loaded: bool = True


# Component (its folder in an overlay) -> its class. The runtime builds no other class.
COMPONENTS = {
    "transformer": ComponentClass("diffusers", "LTX2VideoTransformer3DModel", "diffusers"),
    "connectors": ComponentClass("diffusers", "LTX2TextConnectors", "ltx2"),
    "vae": ComponentClass("diffusers", "AutoencoderKLLTX2Video", "diffusers"),
    "audio_vae": ComponentClass("diffusers", "AutoencoderKLLTX2Audio", "diffusers"),
    "vocoder": ComponentClass("diffusers", "LTX2VocoderWithBWE", "ltx2"),
    "latent_upsampler": ComponentClass("diffusers", "LTX2LatentUpsamplerModel", None),
    "scheduler": ComponentClass("diffusers", "FlowMatchEulerDiscreteScheduler", "diffusers", loaded=False),
    "text_encoder": ComponentClass("transformers", "Gemma3ForConditionalGeneration", "transformers"),
    "tokenizer": ComponentClass("transformers", "GemmaTokenizerFast", "transformers", loaded=False),
}
# Component -> class name, for components whose weights the runtime loads.
LOADED_CLASSES = {name: component.name for name, component in COMPONENTS.items() if component.loaded}
# Parts of diffusers' pipeline that LTX-2.3 does not have.
ABSENT_COMPONENTS = ("processor", "prompt_enhancer", "duration_head")
PIPELINE_CLASS = "LTX2Pipeline"
# The diffusers release that the overlay's configs name.
DIFFUSERS_VERSION = "0.42.1"

# The name under which an overlay keeps the distilled LoRA; its bakes are ``distilled-<strength>``.
DISTILLED = "distilled"

# The root of Gemma's language model among the text encoder's tensors, and the model's type in its config.
TEXT_ROOT = "language_model.model."
TEXT_ENCODER_TYPE = "gemma3"
# Tokens of every prompt: longer prompts are cut, shorter ones padded.
TEXT_TOKENS = 1024

# Pixels, frames and mel steps per latent: fixed for the whole family (spec 04).
SPATIAL_FACTOR = 32
TEMPORAL_FACTOR = 8
AUDIO_FACTOR = 4
