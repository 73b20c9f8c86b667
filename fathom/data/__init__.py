"""Text in, batches out: corpus -> tokenizer -> pack -> stream, in the order the files should be read.

`corpus` yields documents and says which of them are held out; `tokenizer` is a byte-level BPE with
DeepSeek-V3's pre-tokenizer; `pack` writes every document once, as token ids, to disk; `stream` cuts those
files into rows.
"""
