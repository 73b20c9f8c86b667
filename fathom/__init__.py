"""Fathom: the whole DeepSeek-V3 recipe, from a laptop to a cluster, with a core that one can read in a weekend.

model = fathom.load_model(path)                         # any Hugging Face DeepSeek-V3 directory
out = model(tokens_BS, mtp=True)                        # out.logits_BSO, out.router, out.mtp_logits
fathom.save_model(model, path)                          # what transformers and vLLM load
model = fathom.Model(fathom.ModelConfig(...))           # or fathom.presets.nano().model
text = fathom.generate(model, tokenizer, "def main(", max_new_tokens=64)
engine = fathom.Engine(model, tokenizer)                # many requests at once, drafts by the MTP module
answers = engine.generate(["def a(", "class B"], fathom.SamplingParams(temperature=0.8, max_tokens=64))
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fathom import presets
    from fathom.checkpoint.hf.model import load_model, save_model
    from fathom.data.tokenizer import load_tokenizer
    from fathom.engine.config import EngineConfig
    from fathom.engine.engine import Engine
    from fathom.engine.generate import generate
    from fathom.engine.outputs import Completion
    from fathom.engine.request import Request
    from fathom.engine.sampling.sampler import SamplingParams
    from fathom.model.config import ModelConfig
    from fathom.model.quantize import quantized
    from fathom.model.transformer import Model
else:
    # The same, imported at first use (PEP 562): `import fathom` and `fathom --help` need no torch.
    _MODULES = {
        "Completion": "fathom.engine.outputs",
        "Engine": "fathom.engine.engine",
        "EngineConfig": "fathom.engine.config",
        "Model": "fathom.model.transformer",
        "ModelConfig": "fathom.model.config",
        "Request": "fathom.engine.request",
        "SamplingParams": "fathom.engine.sampling.sampler",
        "generate": "fathom.engine.generate",
        "load_model": "fathom.checkpoint.hf.model",
        "load_tokenizer": "fathom.data.tokenizer",
        "quantized": "fathom.model.quantize",
        "save_model": "fathom.checkpoint.hf.model",
    }

    def __getattr__(name):
        import importlib

        if name == "presets":
            return importlib.import_module("fathom.presets")
        if name not in _MODULES:
            raise AttributeError(f"module 'fathom' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})


__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "Model",
    "ModelConfig",
    "Request",
    "SamplingParams",
    "generate",
    "load_model",
    "load_tokenizer",
    "presets",
    "quantized",
    "save_model",
]
__version__ = "0.1.0"
