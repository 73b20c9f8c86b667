"""Text in, batches out: corpus -> tokenizer -> tokenize -> dataset -> batch, in the order the files should be read.

`corpus` yields documents and decides which of them are held out; `tokenizer` is a byte-level BPE with DeepSeek-V3's
pre-tokenizer; `tokenize` writes every document once, as token ids, to disk; `dataset` cuts those files into rows;
`batch` is what a loss takes: input tokens and each head's targets.
"""
