"""The data plane: a shard holds one part of the parameter space and applies what workers push to it."""
