"""The DeepSeek-V3 architecture for one device: no rank, mesh, environment variable or cache bookkeeping in here."""
