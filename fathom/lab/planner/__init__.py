"""What a model costs to train and serve: on a cluster from first principles, on this machine from measured rates."""
