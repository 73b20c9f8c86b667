"""What a CPU does between the matrix products, in C++: one pass over memory where torch's operators take several."""
