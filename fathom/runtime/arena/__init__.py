"""An allocator for torch's tensors on the CPU that wastes no memory on holes."""
