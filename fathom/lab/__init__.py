"""Looking at a trained model: the demo and its report."""
