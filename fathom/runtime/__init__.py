"""What a process sets up once: the allocator, the devices, the C++ build."""
