"""Writing a model as one GGUF file, which llama.cpp runs (its architecture `deepseek2`).

The tensors are ours under llama.cpp's names, except that W_kvb is split into its key half, transposed per head, and its
value half: llama.cpp runs the absorbed form of latent attention only. Matrices are written in the requested type;
norms, routers and correction biases stay float32. A model that llama.cpp would compute differently is refused.
"""

from contextlib import closing
from pathlib import Path

import numpy as np

from fathom.checkpoint.hf.safetensors_io import check_disk_space
from fathom.checkpoint.hf.save import Verification
from fathom.checkpoint.hf.weights import ModelWeights, Weights
from fathom.data.tokenizer import Tokenizer
from fathom.files import atomic_file
from fathom.model.transformer import Model

try:
    import gguf

    from fathom.checkpoint.gguf.config import add_config, check_config, drafting_modules
    from fathom.checkpoint.gguf.tensors import (
        GGML_TYPES,
        DType,
        GGUFTensor,
        encoded_chunks,
        gguf_tensors,
        verify_file,
    )
    from fathom.checkpoint.gguf.tokenizer import add_tokenizer, gguf_vocabulary
except ImportError as error:
    raise ImportError("GGUF files are written with the gguf package: pip install 'fathom-lm[gguf]'") from error

_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def save_gguf(model: Model, tokenizer: Tokenizer | None, path: str | Path, dtype: DType = "bf16") -> None:
    """Write the model, and the tokenizer with its chat template, as the GGUF file `path`.

    `q8_0` stores blocks of 32 values in 34 bytes; matrices whose number of columns is not a multiple of 32 stay
    bfloat16. The file is written under another name and then renamed: an interrupted write leaves `path` unchanged.

    llama.cpp drafts with one MTP module, and only when queries are compressed; modules that it cannot use are left out,
    with a warning. Raises ValueError for a model or a tokenizer that it would run differently.
    """
    write_gguf(ModelWeights(model), tokenizer, Path(path), dtype)


def write_gguf(
    weights: Weights, tokenizer: Tokenizer | None, target: Path, dtype: DType, verify: bool = False
) -> Verification | None:
    """As `save_gguf`, from weights in memory or in a directory; a few rows of one tensor are in memory at a time.

    With `verify` the file is read back and compared with its source before it gets its name. Raises ValueError also
    where the disk is too full, or the comparison fails.
    """
    if dtype not in GGML_TYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(GGML_TYPES)}")
    if target.is_dir():
        raise ValueError(f"path is {str(target)!r}, a directory; a GGUF model is a file")
    config = weights.config
    check_config(config)
    vocabulary = None if tokenizer is None else gguf_vocabulary(tokenizer, config.vocab_size)
    modules = drafting_modules(config)
    tensors = gguf_tensors(weights, modules)
    check_disk_space(target, sum(tensor.bytes(dtype) for tensor in tensors))
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as temporary:
        with closing(gguf.GGUFWriter(temporary, "deepseek2")) as writer:
            writer.add_type("model")
            writer.add_name(target.stem)
            writer.add_file_type(_FILE_TYPES[dtype])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            add_config(writer, config, modules)
            if tokenizer is None or vocabulary is None:
                writer.add_tokenizer_model("none")
            else:
                add_tokenizer(writer, tokenizer, vocabulary)
            _write_tensors(writer, weights, tensors, dtype)
        return verify_file(weights, tensors, temporary, dtype) if verify else None


def _write_tensors(writer: gguf.GGUFWriter, weights: Weights, tensors: list[GGUFTensor], dtype: DType) -> None:
    """Write the table of tensors, then each tensor at an aligned offset, chunk by chunk."""
    for tensor in tensors:
        size, ggml_type = tensor.bytes(dtype), tensor.ggml_type(dtype)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (file,) = writer.fout
    for tensor in tensors:
        writer.write_padding(file, file.tell())
        for chunk in encoded_chunks(weights, tensor, dtype):
            chunk.tofile(file)
    writer.write_padding(file, file.tell())
